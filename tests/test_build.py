"""The build: what the sdist and the wheel hold, the edit loop, and what is said when something is missing."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("Cython")

ROOT = Path(__file__).resolve().parent.parent
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = (".py", ".pyx", ".pxd", ".pyi", ".h", ".typed")


def run(*argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RUNTIME_")}
    return subprocess.run(argv, cwd=cwd, env={**clean, **environ}, text=True, capture_output=True)


def must(*argv: str, cwd: Path, **environ: str) -> str:
    done = run(*argv, cwd=cwd, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def backend(hook: str, tree: Path, **environ: str) -> Path:
    """What a front end such as pip calls; the file that it made."""
    code = f"from setuptools.build_meta import {hook} as make; print(); print(make('dist'))"
    return tree / "dist" / must(sys.executable, "-c", code, cwd=tree, **environ).split()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of this tree, as a fresh clone would be."""
    copy = tmp_path_factory.mktemp("clone") / "tree"
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=skip)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    return backend("build_sdist", tree)


def package_sources() -> set[str]:
    return {str(x.relative_to(ROOT)) for x in (ROOT / "runtime").rglob("*") if x.suffix in SOURCES}


# ---- sdist and wheel -----------------------------------------------------------------------------


def test_sdist_holds_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_sources() <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "tools/build.py", "tests/conftest.py"} <= names
    assert not {name for name in names if name.endswith((".so", ".c", ".pyc"))}
    assert not {name for name in names if name.startswith(("build/", "dist/", ".venv"))}


def test_wheel_holds_the_package_and_nothing_else(sdist: Path, tmp_path: Path) -> None:
    """All but the extensions, which take longer to compile than this test may: see tools/wheels.py."""
    unpacked = unpack(sdist, tmp_path)
    wheel = backend("build_wheel", unpacked, RUNTIME_NO_EXTENSIONS="1")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == package_sources()
    assert f"{info}/licenses/LICENSE" in names
    assert "runtime = runtime.cli:main" in entry_points
    assert (metadata["Name"], metadata["Version"]) == ("runtime-workers", PROJECT["version"])
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = {x.partition(">")[0] for x in metadata.get_all("Requires-Dist", []) if "extra" not in x}
    assert needed == {"pyzmq", "psutil", "cloudpickle"}


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


# ---- the edit loop -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The build of this project around two extensions that compile in a moment."""
    package = tmp_path / "runtime"
    (package / "cli").mkdir(parents=True)
    (package / "include").mkdir()
    (tmp_path / "tools").mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "tools/build.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("README.md", "runtime/__init__.py", "runtime/cli/__init__.py", "runtime/py.typed"):
        (tmp_path / name).touch()
    (package / "include" / "number.h").write_text("#define NUMBER 1\n")
    (package / "_one.pxd").write_text('cdef extern from "include/number.h":\n    int NUMBER\n')
    (package / "_one.pyx").write_text("def number():\n    return NUMBER\n")
    (package / "_two.pyx").write_text("def number():\n    return 2\n")
    return tmp_path


def edit_loop(tree: Path, *argv: str) -> str:
    return must(sys.executable, "tools/build.py", *argv, cwd=tree)


def number(tree: Path, module: str) -> str:
    return must(
        sys.executable, "-c", f"from runtime import {module}; print({module}.number())", cwd=tree
    ).strip()


@pytest.mark.stress
def test_edit_loop(small: Path) -> None:
    package = small / "runtime"
    assert "built runtime._one, runtime._two" in edit_loop(small)
    assert (number(small, "_one"), number(small, "_two")) == ("1", "2")
    assert edit_loop(small) == "build: nothing to do\n"

    (package / "include" / "number.h").write_text("#define NUMBER 10\n")
    edit_loop(small)
    assert number(small, "_one") == "10", "an edit of a header alone must rebuild"

    (package / "_two.pyx").write_text("def number():\n    return 20\n")
    said = edit_loop(small)
    assert "runtime._two" in said and "built runtime._two" in said
    assert number(small, "_two") == "20"

    (package / "_two.pyx").unlink()
    assert "removed runtime._two" in edit_loop(small)
    assert sorted(x.name for x in package.glob("*.so")) == [f"_one{SUFFIX}"]
    assert not list(package.rglob("*.c")), "the generated C belongs below build/"

    (package / "_one.pyx").write_text("def number():\n    return nonsense(\n")
    for _ in range(2):  # it must fail again, not be taken for done
        done = run(sys.executable, "tools/build.py", cwd=small)
        assert done.returncode != 0 and "_one.pyx" in done.stdout + done.stderr
    assert number(small, "_one") == "10", "the module of before must still be there"


@pytest.mark.promise
def test_variants_are_kept_apart(small: Path) -> None:
    (small / "runtime" / "_two.pyx").unlink()
    (small / "runtime" / "include" / "number.h").write_text(
        "#ifdef RUNTIME_DEBUG\n#define NUMBER 2\n#else\n#define NUMBER 1\n#endif\n"
    )
    edit_loop(small)
    must(sys.executable, "tools/build.py", cwd=small, RUNTIME_DEBUG="1")
    assert number(small, "_one") == "2"
    assert "Compiling" not in edit_loop(small)
    assert number(small, "_one") == "1"


# ---- what is said --------------------------------------------------------------------------------


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode != 0 and len(lines) == 1, lines
    return lines[0]


def test_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    for tool in (("build.py", "--check"), ("bootstrap.py", "--venv", str(tmp_path / "venv"))):
        argv = (sys.executable, str(ROOT / "tools" / tool[0]), *tool[1:])
        said = only_line(run(*argv, cwd=tmp_path, PATH="/nonexistent", CC="/nonexistent/cc"))
        assert "no C compiler" in said and "apt install gcc" in said and "dnf install gcc" in said
    assert not (tmp_path / "venv").exists()


def test_bootstrap_names_an_unknown_extra(tmp_path: Path) -> None:
    argv = (sys.executable, str(ROOT / "tools" / "bootstrap.py"), "--venv", str(tmp_path / "venv"))
    said = only_line(run(*argv, "--extras", "cli,tset", cwd=tmp_path))
    assert "'tset'" in said and "test" in said
    assert not (tmp_path / "venv").exists()


def test_bootstrap_spares_a_folder_that_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    argv = (sys.executable, str(ROOT / "tools" / "bootstrap.py"), "--venv", str(tmp_path))
    assert "is no virtual environment" in only_line(run(*argv, cwd=tmp_path))
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize(("value", "reason"), [("leak", "'leak'"), ("address,thread", "exclude each other")])
def test_bad_sanitizer_is_named(small: Path, value: str, reason: str) -> None:
    done = run(sys.executable, "tools/build.py", cwd=small, RUNTIME_SANITIZE=value)
    assert done.returncode != 0 and reason in done.stderr
