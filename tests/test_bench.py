"""The benchmark runner: its turns, its ratios, and that what fails is shown."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("harness")
    finally:
        sys.path.remove(str(BENCH))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
                del sys.modules[name]


def result(harness: Any, figure: Any, turns: dict[str, tuple[str, list[float | None]]]) -> Any:
    """A Result with these values of each contender, (role, values); None is a failed turn."""
    entries = tuple(
        harness.Entry(name, harness.Role(role), lambda meter: {}) for name, (role, _) in turns.items()
    )
    found = harness.Result(harness.Row("row", "What it means.", (figure,), entries))
    for name, (_, values) in turns.items():
        found.turns[name] = [
            harness.Failure("OSError: no luck") if v is None else harness.Sample({"": v}, 10, 1.0, 0.5)
            for v in values
        ]
    return found


TURNS: dict[str, tuple[str, list[float | None]]] = {
    "mine": ("ours", [20.0, 60.0, 30.0]),
    "slow": ("peer", [1.0, 1.0, 1.0]),
    "fast": ("peer", [10.0, 20.0, None]),
    "gone": ("peer", [None, None, None]),
    "bare": ("limit", [100.0, 100.0, 100.0]),
}


def test_ratios_are_taken_within_a_round(harness: Any) -> None:
    figure = harness.Figure("", "calls/s", higher_is_better=True)
    found = result(harness, figure, TURNS)
    assert found.best_peer(figure) == "fast"
    summary = found.summary("mine", figure)
    assert summary.value == harness.Spread(30.0, 20.0, 60.0)
    assert summary.to_best_peer == harness.Spread(2.5, 2.0, 3.0)  # of the rounds that both have
    assert summary.to_limit == harness.Spread(0.3, 0.2, 0.6)
    assert found.summary("gone", figure) is None
    assert found.cpu_per_operation("mine").median == 0.05


def test_the_best_is_the_least_where_lower_is_better(harness: Any) -> None:
    figure = harness.Figure("", "ms")
    assert result(harness, figure, TURNS).best_peer(figure) == "slow"


def test_table_shows_failures(harness: Any) -> None:
    figure = harness.Figure("", "calls/s", higher_is_better=True)
    found = result(harness, figure, TURNS)
    lines = {
        line.split("|")[1].strip(): line for line in harness.table(found).splitlines() if line.startswith("|")
    }
    assert [cell.strip() for cell in lines["mine"].split("|")[2:8]] == [
        "30.0", "20.0 – 60.0", "2.50", "0.30", "50,000", "",
    ]  # fmt: skip
    assert "| FAILED: OSError: no luck" in lines["gone"]
    assert "1 of 3 FAILED: OSError: no luck" in lines["fast"]
    assert "limit: bare" in lines
    assert len({len(line) for line in lines.values()}) == 1
    json.dumps(harness.record(found))


def burn(meter: Any) -> dict[str, float]:
    """60 ms of CPU, half of it in a child."""

    def work() -> None:
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass

    with meter.timing():
        child = os.fork()
        work()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    meter.operations = 3
    return {"": 1.0}


def test_a_turn_counts_the_cpu_of_all_its_processes(harness: Any) -> None:
    sample = harness.turn(burn, 30)
    assert isinstance(sample, harness.Sample), sample
    assert sample.operations == 3 and sample.killed == 0
    assert sample.cpu_seconds >= 0.055


def hang(meter: Any) -> dict[str, float]:
    while True:
        signal.pause()


def leave_a_child(meter: Any) -> dict[str, float]:
    if os.fork() == 0:
        hang(meter)
    return {"": 1.0}


def die(meter: Any) -> dict[str, float]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def miss(meter: Any) -> dict[str, float]:
    importlib.import_module("no_such_pool")
    return {}


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (miss, "ModuleNotFoundError: No module named 'no_such_pool'"),
        (die, "SIGKILL"),
        (hang, "no result in 0.2 s"),
    ],
)
def test_a_turn_that_fails_says_why(harness: Any, measure: Any, words: str) -> None:
    failure = harness.turn(measure, 0.2 if measure is hang else 30)
    assert isinstance(failure, harness.Failure)
    assert words in failure.error
    if measure is hang:
        assert "in hang" in failure.error


def test_what_a_turn_leaves_behind_is_ended(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PATIENCE", 0.05)
    assert harness.turn(leave_a_child, 30).killed == 1


def test_command(harness: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = tmp_path / "order"

    def entry(name: str, role: str, fails: bool = False) -> Any:
        def measure(meter: Any) -> dict[str, float]:
            with open(order, "a") as file:
                file.write(name)
            if fails:
                raise OSError("no luck")
            with meter.timing():
                pass
            return {"": 1.0}

        return harness.Entry(name, harness.Role(role), measure)

    def main(*argv: str, ours_fails: bool = False, row_seconds: float = 30) -> int:
        def rows(scale: Any) -> list[Any]:
            entries = (entry("A", "ours", ours_fails), entry("B", "peer", True), entry("C", "peer"))
            return [harness.Row("row", "", (harness.Figure("", "ms"),), entries)]

        scale = harness.Scale(rounds=2, row_seconds=row_seconds, seconds=0.01, limit=30)
        return int(
            harness.main("Title", rows, quick=scale, full=scale, packages=["no-such-package"], argv=argv)
        )

    report = tmp_path / "report.json"
    assert main("--json", str(report)) == 0
    assert order.read_text() == "ABCABC"
    out = capsys.readouterr().out
    assert "no-such-package missing" in out and "FAILED: OSError: no luck" in out
    peer = json.loads(report.read_text())["rows"][0]["contenders"][1]
    assert peer["failures"] == ["OSError: no luck"] * 2 and peer["summaries"] == {}

    assert main("--peers", "none", ours_fails=True) == 1
    assert order.read_text() == "ABCABCAA"
    assert main("--rows", "row", row_seconds=0) == 0  # no time for a second round
    assert order.read_text() == "ABCABCAAABC"
    assert "rounds: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("--peers", "D")
    assert "no peer is named 'D'; there are: B, C" in capsys.readouterr().err


def test_parts_that_are_timed_add_up(harness: Any) -> None:
    def measure(meter: Any) -> dict[str, float]:
        for name in ("a", "b"):
            with meter.timing():
                end = time.process_time() + 0.02
                while time.process_time() < end:
                    pass
            meter.cpu[name] = meter.cpu_seconds
        meter.detail = [1]
        return {"a": 1.0, "b": 1.0, "c": 1.0}

    sample = harness.turn(measure, 30)
    assert isinstance(sample, harness.Sample), sample
    assert (
        0.02 <= sample.cpu["a"] <= sample.cpu["b"] - 0.02 and sample.seconds >= 0.04 and sample.detail == [1]
    )
    found = harness.Result(harness.Row("row", "", (), ()), {"mine": [sample]})
    assert found.cpu_per_operation("mine", "a").median == sample.cpu["a"]
    assert found.cpu_per_operation("mine", "c").median == sample.cpu_seconds


def python(script: Path, *args: str) -> str:
    """What a script prints, run by itself: bench/tasks.py is another module than tests/tasks.py."""
    done = subprocess.run(
        [sys.executable, str(script), *args],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `bench/arrays.py --quick` without peers."""
    pytest.importorskip("numpy")
    report = tmp_path_factory.mktemp("bench") / "arrays.json"
    python(BENCH / "arrays.py", "--quick", "--peers", "none", "--json", str(report))
    return report


@pytest.mark.stress
@pytest.mark.timeout(150)
def test_arrays_has_a_figure_in_each_row(quick: Path) -> None:
    rows = json.loads(quick.read_text())["rows"]
    assert len(rows) == 13
    for row in rows:
        wanted = {figure["name"] for figure in row["figures"]}
        for contender in row["contenders"]:
            assert set(contender["summaries"]) == wanted, (row["name"], contender["name"])


@pytest.mark.stress
@pytest.mark.timeout(150)
def test_arrays_prints_its_tables(quick: Path) -> None:
    out = python(BENCH / "arrays.py", "--table", str(quick))
    assert "| argument, against one memcpy " in out and "| argument, Ray / ours " in out
    assert "### result by size" in out and "outside / inside" in out and "Second half (MB/min)" in out


@pytest.mark.stress
@pytest.mark.timeout(150)
def test_arrays_curves_are_drawn(quick: Path, tmp_path: Path) -> None:
    picture = tmp_path / "arrays.svg"
    python(ROOT / "tools" / "chart.py", str(quick), str(picture))
    lines = list(ElementTree.fromstring(picture.read_text()).iter("{http://www.w3.org/2000/svg}polyline"))
    rows = json.loads(quick.read_text())["rows"]
    assert len(lines) == sum(len(row["contenders"]) for row in rows if row["name"].endswith("by size"))
    assert {len(line.attrib["points"].split()) for line in lines} == {2}


def test_the_crossing_is_from_where_it_pays_for_good(harness: Any) -> None:
    crossing = importlib.import_module("digest").crossing
    assert "from 16 KiB on" in crossing(
        {"2 KiB": 0.5, "4 KiB": 0.9, "8 KiB": 1.1, "16 KiB": 0.9}, "from 4 KiB"
    )
    assert "Nowhere" in crossing({"2 KiB": 0.5, "4 KiB": 0.9, "8 KiB": 1.1}, "from 4 KiB")
