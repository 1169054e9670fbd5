"""The census: what it counts, how it kills, what it refuses to call a success; then for real."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

import runtime

ROOT = Path(runtime.__file__).resolve().parent.parent
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "census.py"
PATIENCE = 40  # seconds for a subprocess that hangs: less than the watchdog of the tests


@pytest.fixture(scope="module")
def census():
    spec = importlib.util.spec_from_file_location("census_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


GOOD = b"""\
import os, os.path, sys
from collections.abc import Iterable
from . import sibling
from .sibling import name

class A:
    def method(self): return self.method()
    class B: pass

async def run():
    def inner(): print("\\d")
    print(len([]), os.path.join("a"))
    (lambda: 0)()
"""


@pytest.fixture
def tree(tmp_path):
    files = {
        "a.py": GOOD,
        "b/empty.py": b"",
        "b/latin.py": b"# coding: latin-1\nx = '\xe9'\r\ny = 1",
        "b/bad_syntax.py": b"ok = 1\ndef (\n",
        "b/bad_encoding.py": b"x = '\xff\xfe'\n",
        "b/null.py": b"x = 1\0\n",
        "b/deep/c.py": b"import sys\n",
        "b/notes.txt": b"import sys\n",
        "site-packages/d.py": b"import sys\n",
        "b/__pycache__/e.py": b"import sys\n",
    }
    for name, data in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "b" / "folder.py").mkdir()
    return tmp_path


NAMES = [
    "a.py",
    "b/bad_encoding.py",
    "b/bad_syntax.py",
    "b/deep/c.py",
    "b/empty.py",
    "b/latin.py",
    "b/null.py",
]


def test_find(census, tree):
    assert census.find(str(tree)) == [str(tree / name) for name in NAMES]


def test_the_standard_library_is_complete(census):
    found = census.find(os.path.dirname(os.__file__))
    assert os.__file__ in found
    assert len(found) > 500
    assert not any("site-packages" in path for path in found)


@pytest.mark.parametrize(
    ("limit", "picked"),
    [(None, "abcdefghij"), (10, "abcdefghij"), (99, "abcdefghij"), (5, "acegi"), (3, "adg"), (1, "a")],
)
def test_spread(census, limit, picked):
    assert census.spread(list("abcdefghij"), limit) == list(picked)


def test_record(census, tree):
    record = census.read(str(tree / "a.py"))
    assert record == {
        "lines": 13,
        "sha256": hashlib.sha256(GOOD).hexdigest(),
        "error": None,
        "functions": 3,
        "classes": 2,
        "imports": 4,
        "modules": {"os": 1, "sys": 1, "collections": 1},
        "calls": {"method": 1, "print": 2, "len": 1, "join": 1},
    }


@pytest.mark.parametrize(
    ("name", "lines", "error"),
    [
        ("b/empty.py", 0, None),
        ("b/latin.py", 3, None),
        ("b/bad_syntax.py", 2, r"SyntaxError: invalid syntax \(line 2\)"),
        ("b/bad_encoding.py", 1, r"SyntaxError: \(unicode error\) 'utf-8' codec can't decode.*"),
        ("b/null.py", 1, r"(SyntaxError|ValueError): source code .*null bytes.*"),
        ("b/missing.py", 0, r"FileNotFoundError: .*No such file.*"),
    ],
)
def test_files_that_do_not_parse_are_counted_and_say_why(census, tree, name, lines, error):
    record = census.read(str(tree / name))
    assert record["lines"] == lines
    if error is None:
        assert record["error"] is None
    else:
        assert re.fullmatch(error, record["error"]), record["error"]
        assert record["functions"] == record["classes"] == record["imports"] == 0


def test_warnings_of_the_files_are_silent(census, tree, recwarn):
    census.read(str(tree / "a.py"))
    assert not recwarn.list


def test_totals(census, tree):
    paths = census.find(str(tree))
    result = census.totals(NAMES, census.count_alone(paths).records)
    assert (result["files"], result["lines"], result["functions"], result["classes"]) == (7, 21, 3, 2)
    assert result["modules"] == {"sys": 2, "collections": 1, "os": 1}
    assert list(result["calls"]) == ["print", "join", "len", "method"]
    assert list(result["unparsed"]) == ["b/bad_encoding.py", "b/bad_syntax.py", "b/null.py"]


def test_digest_sees_every_difference(census):
    base = census.digest(["a", "b"], [{"x": 1, "y": 2}, {"x": 3}])
    assert census.digest(["a", "b"], [{"y": 2, "x": 1}, {"x": 3}]) == base
    assert census.digest(["b", "a"], [{"x": 1, "y": 2}, {"x": 3}]) != base
    assert census.digest(["a", "b"], [{"x": 1, "y": 2}, {"x": 4}]) != base
    assert census.digest(["a"], [{"x": 1, "y": 2}]) != base


# What must hold


def count(census, records, tasks, pids=(1,), again=0):
    return census.Count(records, 1.0, Counter(tasks), set(pids), {1: 1, 2: again + 1})


def failures(census, alone, shared, *, same=True, numbers=(0, 1), wanted=0):
    killer = types.SimpleNamespace(wanted=wanted)
    return [words for good, words in census.checks(alone, shared, same, list(numbers), killer) if not good]


def test_checks(census):
    records = [{"x": n} for n in range(100)]
    alone = count(census, records, {})
    good = count(census, list(records), {0: 50, 1: 50})
    assert failures(census, alone, good) == []
    assert failures(census, alone, good, same=False) == ["the results differ in 0 files"]
    changed = count(census, [{"x": -1}, *records[1:]], {0: 50, 1: 50})
    assert failures(census, alone, changed) == ["the results differ in 1 files"]
    short = count(census, records[:98], {0: 49, 1: 49})
    assert failures(census, alone, short, same=False) == ["the results differ in 2 files"]
    inside = count(census, records, {0: 50, 1: 50}, pids=(1, os.getpid()))
    assert failures(census, alone, inside) == [f"tasks ran in the host (pid {os.getpid()})"]


def test_checks_of_shares(census):
    records = [{"x": n} for n in range(100)]
    alone = count(census, records, {})
    assert failures(census, alone, count(census, records, {0: 87, 1: 13})) == []
    assert failures(census, alone, count(census, records, {0: 88, 1: 12})) == [
        "workers below a quarter of its share (12 tasks): 1"
    ]
    assert failures(census, alone, count(census, records, {0: 100})) != []
    # With few files per worker chance decides.
    assert failures(census, alone, count(census, records, {0: 100}), numbers=(0, 1, 2)) == []


def test_checks_of_kills(census):
    records = [{"x": n} for n in range(10)]
    alone = count(census, records, {})
    assert failures(census, alone, count(census, records, {}, again=2), wanted=3) == []
    assert failures(census, alone, count(census, records, {}, again=0), wanted=3) == [
        "0 of 3 kills ended a running task: proves nothing"
    ]


# Killing


class Workers:
    """Processes that wait, as the workers of a Runtime."""

    def __init__(self, number):
        self.processes = [subprocess.Popen(["sleep", "600"]) for _ in range(number)]
        self.tasks = {n: f"task {n}" for n in range(number)}
        self.asked = 0

    def workers(self):
        self.asked += 1
        return tuple(
            types.SimpleNamespace(number=n, pid=p.pid, task=self.tasks.get(n), started=float(-n))
            for n, p in enumerate(self.processes)
            if p.poll() is None
        )

    def dead(self):
        return [n for n, process in enumerate(self.processes) if process.poll() == -signal.SIGKILL]


@pytest.fixture
def workers():
    fleet = Workers(3)
    yield fleet
    for process in fleet.processes:
        process.kill()
        process.wait()


def test_kills_are_spread_over_the_results(census, workers):
    killer = census.Killer(workers, wanted=3, total=100)
    sent = []
    for finished in range(1, 101):
        before = killer.sent
        killer.after(finished)
        sent += [finished] * (killer.sent - before)
    assert sent == [25, 50, 75]
    assert workers.dead() == [0, 1, 2]


def test_kills_begin_with_the_worker_that_started_first(census, workers):
    killer = census.Killer(workers, wanted=1, total=10)
    assert killer.strike()
    assert workers.dead() == [2]


def test_idle_workers_are_not_killed(census, workers):
    workers.tasks = {}
    killer = census.Killer(workers, wanted=2, total=4)
    killer.after(4)
    assert (killer.sent, workers.dead()) == (0, [])
    workers.tasks = {1: "at last"}
    killer.after(4)
    assert (killer.sent, workers.dead()) == (1, [1])


def test_a_worker_that_has_just_finished_is_spared(census, workers):
    workers.tasks = {1: "nearly done"}
    look = workers.workers

    def forgetful():
        found = look()
        workers.tasks = {}  # seen running once; at the second look it is idle
        return found

    workers.workers = forgetful
    assert not census.Killer(workers, wanted=1, total=4).strike()
    assert workers.dead() == []


def test_no_kills_wanted(census, workers):
    census.Killer(workers, wanted=0, total=4).after(4)
    assert workers.asked == 0


# The command


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--limit", "x"], ["--kill", "-1"], ["--bogus"]])
def test_bad_arguments(census, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        census.parse(arguments, own=True)
    assert caught.value.code == 2
    assert "usage: census.py" in capsys.readouterr().err


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RUNTIME_MAX_WORKERS", None)
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=PATIENCE, env=environment
    )


def test_for_real():
    done = run(str(SCRIPT), "--workers", "2", "--limit", "110", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and all(check["ok"] for check in report["checks"])
    assert sum(report["tasks"].values()) == report["census"]["files"] == 110
    assert min(report["tasks"].values()) >= 110 / 2 / 4
    assert report["ways"]["rescued"] == 0
    assert report["ways"]["lane"] + report["ways"]["message"] > 0


def test_with_kills_for_real():
    done = run(str(SCRIPT), "--workers", "2", "--limit", "60", "--kill", "3", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert 1 <= report["kills"]["landed"] <= report["kills"]["sent"] <= report["kills"]["wanted"] == 3


def test_through_the_command(tree):
    target = f"{SCRIPT}:main"
    done = run("-m", "runtime", "run", "--workers", "2", "--no-progress", target, "--root", str(tree))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"census of {tree}" in done.stdout
    assert "both results are equal" in done.stdout
    assert "no task ran in the host" in done.stdout
    assert "b/bad_syntax.py: SyntaxError: invalid syntax (line 2)" in done.stdout
    assert done.stderr == ""


def test_an_empty_folder_is_an_error(tmp_path):
    done = run(str(SCRIPT), "--workers", "1", "--root", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"census: there is no .py file below {tmp_path}\n"
