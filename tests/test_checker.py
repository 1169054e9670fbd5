"""The checker finds what it should on small worlds, and the models of tools/model hold; each fault is found.

What takes more than a second or two is marked `stress`; the step `model` of .ci/run is all of this file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from tools.model import blocks, growth, lease_state, leases, pool, runs
from tools.model.catalogue import FAULTS, MODELS
from tools.model.checker import Broken, Explorer, Report, Step, World, explore, step

ROOT = Path(__file__).resolve().parent.parent
LARGE = ("leases: retry", "leases: chunk")  # ten seconds and more
LOOKED_INTO = "leases: deadline"
QUICK = ("leases: own", "growth", "pool")
SLOW_FAULTS = ("sweep-forgets-published", "head-first")  # found late, or only when all has been seen
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.stress) for name in MODELS]
EACH_FAULT = [pytest.param(name, marks=pytest.mark.stress if name in SLOW_FAULTS else []) for name in FAULTS]
WORLDS = (leases.Leases, blocks.Blocks, growth.Growth, pool.Pool)


# ---- the checker -----------------------------------------------------------------------------------------


class Counters(World):
    """Two that add one to a shared number, by a load and a store."""

    def __init__(self, atomic: bool = True, exits: bool = True, state: bytes | None = None) -> None:
        self.atomic, self.exits = atomic, exits
        self.total, *self.seen = state or (0, 9, 9)  # 9: not loaded, 8: stored

    def raw(self) -> bytes:
        return bytes([self.total, *self.seen])

    def freeze(self) -> bytes:
        return bytes([self.total, *sorted(self.seen)])

    def shown(self) -> dict[str, str]:
        return {"total": str(self.total)}

    def steps(self) -> list[Step]:
        found = []
        for a, seen in enumerate(self.seen):
            if seen == 9:
                found.append(Step(Counters.add if self.atomic else Counters.load, (a,)))
            elif seen < 8:
                found.append(Step(Counters.store, (a,)))
        return found

    @step("here.py:add", "{0} adds one")
    def add(self, a: int) -> None:
        self.total, self.seen[a] = self.total + 1, 8

    @step("here.py:load", "{0} loads")
    def load(self, a: int) -> None:
        self.seen[a] = self.total

    @step("here.py:store", "{0} stores")
    def store(self, a: int) -> None:
        self.total, self.seen[a] = self.seen[a] + 1, 8

    def check(self) -> None:
        if self.seen == [8, 8] and self.total != 2:
            raise Broken(f"two have added one, and the sum is {self.total}")

    def ended(self) -> bool:
        return self.exits and self.seen == [8, 8]


def test_all_of_a_small_world_is_seen() -> None:
    report = explore(partial(Counters, True, True))
    assert (report.states, report.transitions, report.depth, report.ends) == (3, 3, 2, 1)
    assert (report.broken, report.trace, report.taken) == ("", [], {"add"})


def test_shortest_way_to_a_broken_state_is_told() -> None:
    report = explore(partial(Counters, False, True))
    assert report.broken == "two have added one, and the sum is 1"
    assert report.steps == 4
    steps = [line for line in report.trace if not line.startswith(" ")]
    assert sorted(line.split(" ", 1)[1] for line in steps) == [
        "loads  [here.py:load]", "loads  [here.py:load]",
        "stores  [here.py:store]", "stores  [here.py:store]",
    ]  # fmt: skip
    assert report.trace.count("    total: 0 -> 1") == 1


def test_state_without_a_way_to_the_end_is_found() -> None:
    report = explore(partial(Counters, True, False))
    assert report.broken == "no way leads to the end from here"


def test_a_world_that_is_too_large_is_refused() -> None:
    with pytest.raises(MemoryError, match="more than 2 states"):
        explore(partial(Counters, True, True), limit=2)


# ---- the models ------------------------------------------------------------------------------------------


@cache
def exploration() -> Explorer:
    """Of one model, with all its states."""
    explorer = Explorer(MODELS[LOOKED_INTO], 1_000_000)
    explorer.run()
    return explorer


@cache
def explored(name: str) -> Report:
    return exploration().report if name == LOOKED_INTO else explore(MODELS[name])


@cache
def broken(fault: str) -> Report:
    return explore(FAULTS[fault].thaw)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EACH)
def test_model_holds(name: str) -> None:
    report = explored(name)
    assert report.broken == "", "\n".join([report.broken, *report.trace])
    assert report.ends > 0
    # The page says how large it is. A model that has shrunk unseen would promise less than is written there.
    row = f"| {name} | {report.states:,} | {report.transitions:,} | {report.depth} |"
    assert row in (ROOT / "docs" / "model.md").read_text(), row


EXPECTED = {
    "kill-after-lost-race": "task 1 is blamed for a death that the host has caused for another task's sake",
    "free-before-death": "the entry of task 0 is given back while a worker runs it",
    "sweep-before-harvest": "the result of task 0 is lost: its block is not the worker's to hand over",
    "claim-by-store": "lease 0.0 is RUNNING(0), and no task of the host's holds it",
    "retry-before-death": "lease 0.0 is KILLED(0), and no task of the host's holds it",
    "publish-after-done": "the result of task 0 is lost: its block is not the worker's to hand over",
    "clock-before-word": "an item is killed whose deadline has not passed",
    "blame-the-waiting": "task 0 is blamed for a death, and was never started",
    "blame-the-neighbour": "task 1 is blamed for a death that the host has caused for another task's sake",
    "answer-after-killed": "task 0 gets a second outcome",
    "guessed-death": "a slot is swept while its process lives",
    "retry-without-end": "task 0 runs more often than its attempts allow",
    "put-back-delivered": "task 0 runs again, although no worker was lost with it",
    "kept-once": "the arguments of task 0 are freed while a worker has a view of them",
    "keep-after-done": "the arguments of task 0 are freed while a worker has a view of them",
    "own-after-done": "the result of task 0 lies in a block that is not there to be handed over",
    "collect-without-drain": "the arguments of task 0 are freed while a worker has a view of them",
    "sweep-skips-keeps": "the result of task 1 refers to a block that is gone",
    "unkeep-before-record": "the result of task 1 refers to a block that is gone",
    "head-first": "block 1 is worker 0's, and its words say otherwise",
    "record-before-publishing": "a record of worker 0 names a block that is not there to be handed over",
    "sweep-before-records": "block 0 is worker 0's, and its words say otherwise",
    "sweep-forgets-published": "no way leads to the end from here",
    "sweep-of-the-living": "block 0 is worker 0's, and its words say otherwise",
    "trim-unclaimed": "extent 0 is free to be taken, and has no memory",
    "hole-is-free": "block 0 is in use, and has no memory",
    "fill-before-memory": "extent 0 is free to be taken, and has no memory",
    "count-before-memory": "extent 2 is free to be taken, and has no memory",
    "tag-not-raised": "block 0 is taken from process 1, which lives",
    "row-not-read-again": "block 0 is taken from process 1, which lives",
    "row-cleared-first": "block 0 is lost: nobody who lives knows of it, and no row says who is dead",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", EACH_FAULT)
def test_fault_is_found(fault: str) -> None:
    report = broken(fault)
    print(f"{fault}: {FAULTS[fault].words}\n{report.broken}", *report.trace, sep="\n    ")
    assert report.broken == EXPECTED[fault]
    assert 0 < report.steps <= 20
    assert report.steps == sum(not line.startswith(" ") for line in report.trace)


def test_lost_race_reads_as_a_story() -> None:
    """The trace of the fault that the design calls the worst, as the page shows it."""
    report = broken("kill-after-lost-race")
    lines = [line.partition("  [")[0] for line in report.trace if not line.startswith(" ")]
    done = lines.index("worker 0 moves RUNNING to DONE; if that fails it was killed, and exits")
    late = lines.index("the keeper, under the guard, moves RUNNING to KILLED, if it still can")
    kill = lines.index("the keeper sends SIGKILL, and lets the guard go")
    assert done < late < kill
    assert "worker 0 claims what the place names, if it is still LEASED" in lines[done:kill]


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_every_step_is_taken_and_every_outcome_reached() -> None:
    """A property says nothing of steps that never happen."""
    small = [explored(name).taken for name in MODELS if name not in LARGE]
    taken = set.union(*small, broken("answer-after-killed").taken, broken("publish-after-done").taken)
    assert {step for world in WORLDS for step in marked(world)} - taken == set()

    explorer = exploration()
    seen = {task.outcome for number in explorer.ends for task in explorer.thaw(explorer.states[number]).tasks}
    assert seen == {lease_state.RESULT, lease_state.DIED, lease_state.TIMED_OUT}


def marked(world: type[World]) -> dict[str, Any]:
    """The steps of a model by name."""
    found = {name: getattr(world, name) for name in dir(world)}
    return {name: method for name, method in found.items() if hasattr(method, "source")}


# ---- the models and the code -----------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
def test_steps_name_code_that_exists(world: type[World]) -> None:
    for name, method in marked(world).items():
        for place in filter(None, method.source.split("; ")):
            file, _, functions = place.partition(":")
            text = (ROOT / "runtime" / file).read_text()
            for function in functions.split(","):
                assert re.search(rf"^\s*c?p?def [^\n]*\b{function}\(", text, re.M), (name, file, function)


def enumerated(file: str) -> dict[str, int]:
    """NAME = number, of the enums of a .pxd file."""
    text = (ROOT / "runtime" / file).read_text()
    return {name: int(n) for name, n in re.findall(r"^ {4}([A-Z]_[A-Z_]+) = (\d+)", text, re.M)}


OF_THE_MODEL_ALONE = {"T_IN_CHUNK", "X_NONE"}
LEFT_OUT = {"R_ASK", "R_OFFER"}  # they move no word


@pytest.mark.parametrize(("module", "prefixes"), [(lease_state, "LSTR"), (runs, "X")], ids=["leases", "runs"])
def test_words_have_the_values_of_the_code(module: Any, prefixes: str) -> None:
    code = {**enumerated("_layout.pxd"), **enumerated("_records.pxd")}
    own = {
        name: value for name, value in vars(module).items()
        if name[1:2] == "_" and name[0] in prefixes + "X" and isinstance(value, int)
        and name not in OF_THE_MODEL_ALONE
    }  # fmt: skip
    assert own == {name: code.get(name) for name in own}
    assert {name for name in code if name[0] in prefixes} <= own.keys() | LEFT_OUT


def test_command_prints_figures_and_traces() -> None:
    argv = [sys.executable, "-m", "tools.model", "pool"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^pool +[\d,]+ +[\d,]+ +\d+ +[\d.]+   nothing$", done.stdout, re.M)
    assert done.stdout.count("found after") == len(pool.FAULTS)
