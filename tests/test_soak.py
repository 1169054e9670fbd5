"""What tools/soak.py makes of its ledger: sums of the same compiled code, and never more than that."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from watching import stopped, until

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


soak = load("soak")
GOAL = soak.Goal((1, 2), "nothing is lost", "test_x.py::test_x", {"kills": (10, 1000)}, "1 s", False)


def line(kills: int, code: str = "now", seconds: float = 60.0, **more: Any) -> dict[str, Any]:
    ms = {"it": {"tries": 5, "p50": 1.0, "p99": 7.5, "max": 9.0}}
    return {
        "promises": [1, 2], "code": code, "dirty": False, "failed": False, "commit": 40 * "a",
        "counts": {"kills": kills}, "seconds": seconds, "ms": ms, **more,
    }  # fmt: skip


def test_only_what_was_committed_and_went_well_with_this_code_is_summed() -> None:
    ledger = [
        line(100),
        line(200, seconds=600.0),
        line(5000, code="before"),
        line(5000, dirty=True),
        line(5000, failed=True),
        line(5000, promises=[3]),
    ]
    found = soak.reached(GOAL, ledger, "now")
    assert (found.slices, found.failed, found.counts) == (2, 1, {"kills": 300})
    assert found.longest["counts"] == {"kills": 200}
    assert soak.missing(GOAL, found) == {"kills": 700}
    section = soak.table([GOAL], ledger, "now")
    assert "| 1, 2 | nothing is lost (1 s) | 10 kills | 1,000 kills | 300 kills; p99 ≤ 7.5 ms; " in section
    assert "| 10.0 min: 200 kills | 700 kills |" in section
    assert "**1 slices failed**" in section


def test_where_one_run_has_to_reach_it_the_longest_counts_alone() -> None:
    alone = GOAL._replace(longest=True)
    found = soak.reached(alone, [line(600), line(600, seconds=61.0)], "now")
    assert soak.missing(alone, found) == {"kills": 400}
    assert soak.missing(GOAL, found) == {"kills": 0}


def test_an_empty_ledger_has_reached_nothing() -> None:
    section = soak.table([GOAL], [], "now")
    assert "no slice yet" in section and "| – | – | 1,000 kills |" in section


def test_the_page_says_what_the_ledger_says() -> None:
    """For the compiled code that it names; it need not be today's."""
    page = soak.GUARANTEES.read_text()
    code = re.search(r"Compiled code `([0-9a-f]+)`", page)
    assert code is not None
    section = soak.table(soak.load_goals(), soak.read_ledger(soak.LEDGER), code[1])
    assert soak.replaced(page, section) == page, "run `python tools/soak.py --table`"


def test_the_digest_is_that_of_compiled_sources_alone(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    for name in ("a.pyx", "a.pxd", "include/a.h", "a.py"):
        (tmp_path / name).write_text("one")
    before = soak.digest(tmp_path)
    (tmp_path / "a.py").write_text("two")
    assert soak.digest(tmp_path) == before
    for name in ("a.pyx", "a.pxd", "include/a.h"):
        (tmp_path / name).write_text("two")
        assert soak.digest(tmp_path) != before
        (tmp_path / name).write_text("one")
    assert soak.digest(tmp_path) == before


def test_each_goal_names_a_test_that_exists() -> None:
    promised = [number for goal in soak.load_goals() for number in goal.promises]
    assert len(set(promised)) == len(promised)
    for goal in soak.load_goals():
        file, _, name = goal.test.partition("::")
        assert f"def {name}(tally" in (soak.GOALS.parent / file).read_text()
        assert all(0 < ci <= full for ci, full in goal.counts.values())


def test_a_stalled_processor_is_written_down(tmp_path: Path) -> None:
    """Here it is the heartbeat itself that is stopped: it looks the same to it."""
    path = tmp_path / "stalls"
    beats = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "heartbeat.py"), str(path)], stdin=subprocess.PIPE
    )

    def stall() -> list[list[float]]:
        """What is written of 50 ms in which it was stopped; nothing if it had not begun to beat by then."""
        os.kill(beats.pid, signal.SIGSTOP)
        until(lambda: stopped(beats.pid), "it has stopped")
        begin = time.monotonic()
        until(lambda: time.monotonic() > begin + 0.05)
        os.kill(beats.pid, signal.SIGCONT)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            if found := [line for line in lines if line[0] <= begin + 0.01 and line[1] >= begin + 0.05]:
                return found
        return []

    try:
        until(path.exists, "it starts")
        assert until(stall, "it beats")
    finally:
        beats.stdin.close()  # type: ignore[union-attr]
        assert beats.wait(20) == 0


@pytest.mark.parametrize("argv", [["--promise", "999"], ["--promise", "1", "--minutes", "0"]])
def test_what_cannot_be_meant(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "soak.py"), *argv], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("soak: ")
