"""Where an option's value comes from, and what is said of one that cannot be."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from watching import ROOT

from runtime.cli import options
from runtime.cli.exits import Usage
from runtime.cli.listeners import host_and_port


def resolved(folder: Path, *words: str, environ: dict[str, str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    options.add(parser, options.SERVE)
    return options.resolve(parser.parse_args(words), options.SERVE, environ or {}, str(folder))


def table(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(f"[tool.runtime]\n{text}")


def test_precedence(tmp_path: Path) -> None:
    assert resolved(tmp_path)["max_workers"] is None
    table(tmp_path, "max_workers = 3")
    assert resolved(tmp_path)["max_workers"] == 3
    environ = {"RUNTIME_MAX_WORKERS": " 4 "}
    assert resolved(tmp_path, environ=environ)["max_workers"] == 4
    assert resolved(tmp_path, "--workers", "5", environ=environ)["max_workers"] == 5
    assert resolved(tmp_path, environ={"RUNTIME_MAX_WORKERS": ""})["max_workers"] == 3


def test_every_kind_from_every_place(tmp_path: Path) -> None:
    table(
        tmp_path,
        'bind = ["a:1", "b:2,c:3"]\nreload = true\nsettle = 1\nshared_size = 65536\nname = "x"\n'
        'preload = "json, csv"\nthreads = 2',  # the last one is for run
    )
    found = resolved(tmp_path)
    assert found["bind"] == ["a:1", "b:2", "c:3"]
    assert (found["reload"], found["settle"], found["shared_size"], found["name"]) == (True, 1, 65536, "x")
    assert found["preload"] == ["json", "csv"]
    environ = {"RUNTIME_BIND": "d:4,e:5", "RUNTIME_RELOAD": "no", "RUNTIME_SETTLE": "0.5"}
    found = resolved(tmp_path, environ=environ)
    assert (found["bind"], found["reload"], found["settle"]) == (["d:4", "e:5"], False, 0.5)
    found = resolved(tmp_path, "--bind", "f:6,g:7", "--bind", "h:8", "--no-reload", environ=environ)
    assert (found["bind"], found["reload"]) == (["f:6", "g:7", "h:8"], False)


def test_the_nearest_table_counts(tmp_path: Path) -> None:
    table(tmp_path, "max_workers = 3")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert resolved(inner)["max_workers"] == 3
    (tmp_path / "a" / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert resolved(inner)["max_workers"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_worker = 3", "did you mean max_workers?"),
        ("zzzzzz = 3", "the keys are backlog, bind, "),
        ('max_workers = "3"', "max_workers is '3' in"),
        ("max_workers = true", "it must be a number"),
        ("settle = [1]", "it must be a number of seconds"),
        ("bind = [1]", "it must be one or several"),
        ("reload = 1", "it must be true or false"),
        ("bind = [", "cannot be read"),
    ],
)
def test_a_wrong_table(tmp_path: Path, text: str, said: str) -> None:
    table(tmp_path, text)
    with pytest.raises(Usage) as caught:
        resolved(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / "pyproject.toml") in str(caught.value)


def test_a_table_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.runtime]\nreload_dir = "é"\n', encoding="utf-8")
    code = (
        "import argparse, os; from runtime.cli import options; parser = argparse.ArgumentParser(); "
        "options.add(parser, options.SERVE); "
        "found = options.resolve(parser.parse_args([]), options.SERVE, {}, os.getcwd()); "
        "print(ascii(found['reload_dir']))"
    )
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": ROOT, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert done.stdout == "['\\xe9']\n", done.stderr


def test_folders_that_cannot_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user's, above the current one."""
    real = os.stat

    def denied(path: Any, **keywords: Any) -> os.stat_result:
        if str(path) == str(tmp_path / "pyproject.toml"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, **keywords)

    inner = tmp_path / "inner"
    inner.mkdir()
    table(tmp_path, "max_workers = 3")
    monkeypatch.setattr(os, "stat", denied)
    assert resolved(inner)["max_workers"] is None


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nruntime = 3\n"])
def test_a_table_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(Usage, match="must be a table"):
        resolved(tmp_path)


@pytest.mark.parametrize("name", ["RUNTIME_MAX_WORKERS", "RUNTIME_SETTLE", "RUNTIME_RELOAD"])
def test_a_wrong_variable(tmp_path: Path, name: str) -> None:
    with pytest.raises(Usage, match=f"{name} is 'many' in the environment: it must be"):
        resolved(tmp_path, environ={name: "many"})


def test_addresses() -> None:
    assert host_and_port("localhost:80") == ("localhost", 80)
    assert host_and_port("[::1]:0") == ("::1", 0)
    assert host_and_port(":8000") == ("", 8000)
    for text in ("", "80", "host:", "host:port", "::1:80", "host:-1", "host:65536", "host:²"):
        with pytest.raises(Usage):
            host_and_port(text)
