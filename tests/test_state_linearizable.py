"""SharedState is linearizable per key, also under kills; and a map that is not is found out."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from linearizable import FOREVER, Op, linearizable, overlapping
from marks import FORKS_BESIDE_THREADS
from watching import fork, join, until

from runtime import SharedRegion, SharedState

pytestmark = FORKS_BESIDE_THREADS

PROCESSES, OPS = 4, 24
KINDS = ("get", "set", "delete", "add", "cas")
RECORD = struct.Struct("<5qqq")  # kind, two arguments, result, has one, called, returned
NONE = -(1 << 62)  # stands for None


def number(value: bytes | None) -> int | None:
    return None if value is None else int.from_bytes(value, "little", signed=True)


def as_bytes(n: int | None) -> bytes | None:
    return None if n is None else n.to_bytes(8, "little", signed=True)


def perform(state: Any, kind: str, args: tuple[int | None, ...]) -> object:
    if kind == "get":
        return number(state.get("k"))
    if kind == "set":
        return state.set("k", as_bytes(args[0]))
    if kind == "delete":
        return state.delete("k")
    if kind == "add":
        return state.add("k", args[0])
    return state.compare_and_set("k", as_bytes(args[0]), as_bytes(args[1]))


class Log:
    """What each process does, in memory that all share: a call is noted before it is made."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PROCESSES * OPS * RECORD.size + 64)

    def put(self, process: int, i: int, *numbers: int) -> None:
        RECORD.pack_into(self.memory, 64 + (process * OPS + i) * RECORD.size, *numbers)

    def returned(self, process: int, i: int, result: int, has: int, returned: int) -> None:
        """pack_into clears first: killed there, a call must not look as if it had never been."""
        at = 64 + (process * OPS + i) * RECORD.size
        struct.pack_into("<qq", self.memory, at + 24, result, has)
        struct.pack_into("<q", self.memory, at + 48, returned)

    def history(self) -> list[Op]:
        found = []
        for at in range(PROCESSES * OPS):
            kind, a, b, result, has, called, returned = RECORD.unpack_from(self.memory, 64 + at * RECORD.size)
            if called:
                args = tuple(None if x == NONE else x for x in (a, b))
                value: object = None if result == NONE else bool(result) if has == 2 else result
                found.append(Op(KINDS[kind], args, value, called, returned or FOREVER))
        return found


def run(state: Any, log: Log, process: int, seed: int) -> None:
    chance = random.Random(seed * PROCESSES + process)
    while log.memory[0] == 0:  # all begin together
        pass
    for i in range(OPS):
        kind = chance.choice(KINDS)
        args = tuple(
            chance.choice((None, 1, 2, 3)) if kind == "cas" and n == 0 else chance.randrange(4)
            for n in (0, 1)
        )
        shown = [NONE if x is None else x for x in args]
        called = time.monotonic_ns()
        log.put(process, i, KINDS.index(kind), *shown, 0, 0, called, 0)
        result = perform(state, kind, args)
        returned = time.monotonic_ns()
        log.returned(
            process,
            i,
            NONE if result is None else int(result),
            2 if isinstance(result, bool) else 1,
            returned,
        )


def record(state: Any, seed: int, kills: bool) -> list[Op]:
    """What four processes do with one key at the same time; two of them are killed on the way."""
    log = Log()
    pids = [fork(lambda p=p: run(state, log, p, seed)) for p in range(PROCESSES)]
    chance = random.Random(seed)
    log.memory[0] = 1
    if kills:
        time.sleep(chance.random() * 0.0006)
        for pid in pids[:2]:
            os.kill(pid, signal.SIGKILL)
    for pid in pids[:2]:
        os.waitpid(pid, 0)
    join(*pids[2:])
    found = log.history()
    log.memory.close()
    return found


@pytest.fixture
def make() -> Iterator[Callable[[], SharedState]]:
    regions = []

    def new() -> SharedState:
        regions.append(SharedRegion.create(1 << 15))
        return SharedState.create(regions[-1])

    yield new
    for region in regions:
        region.close()


def test_the_checker_itself() -> None:
    def at(kind: str, args: tuple[int | None, ...], result: object, called: int, returned: int) -> Op:
        return Op(kind, args, result, called, returned)

    assert linearizable([at("set", (1,), None, 1, 2), at("get", (), 1, 3, 4)])
    assert not linearizable([at("set", (1,), None, 1, 2), at("get", (), None, 3, 4)])
    assert linearizable([at("set", (1,), None, 1, 5), at("get", (), None, 2, 3), at("get", (), 1, 4, 6)])
    assert not linearizable([at("set", (1,), None, 1, 6), at("get", (), 1, 2, 3), at("get", (), None, 4, 5)])
    assert not linearizable([at("add", (1,), 1, 1, 3), at("add", (1,), 1, 2, 4)])
    dead = at("set", (7,), None, 1, FOREVER)
    assert linearizable([dead, at("get", (), None, 2, 3), at("get", (), 7, 4, 5)])
    assert linearizable([dead, at("get", (), None, 2, 3)])
    assert not linearizable([dead, at("get", (), 7, 2, 3), at("get", (), None, 4, 5)])


@pytest.mark.parametrize("histories", [50])
@pytest.mark.parametrize("watched", [False, True])
def test_histories_under_kills(make: Callable[[], SharedState], histories: int, watched: bool) -> None:
    """Watched: a delete leaves a tombstone, which is emptied now and then."""
    state = make()
    watch = state.watch() if watched else None
    shares = []
    for seed in range(histories):
        history = record(state, seed, kills=seed % 2 == 0)
        start = None
        assert linearizable(history, start), f"seed {seed}: {history}"
        shares.append(overlapping(history))
        state.sweep()
        state.delete("k")
        if watch is not None:
            assert [value for _, _, value in watch._watch.look()] == [None]
    # On one processor operations overlap only when one is interrupted: nothing to be shown there.
    if len(os.sched_getaffinity(0)) > 1:
        print(f"overlapping: {sum(shares) / len(shares):.0%}")


class Broken:
    """A map whose add and compare_and_set read, and then write: not atomic."""

    def __init__(self, state: SharedState) -> None:
        self.state = state
        self.get, self.set, self.delete = state.get, state.set, state.delete

    def add(self, key: str, n: int) -> int:
        total = (number(self.state.get(key)) or 0) + n
        self.state.set(key, as_bytes(total) or b"")
        return total

    def compare_and_set(self, key: str, expected: bytes | None, value: bytes) -> bool:
        if self.state.get(key) != expected:
            return False
        self.state.set(key, value)
        return True


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nothing overlaps on one processor")
def test_a_broken_map_is_found_out(make: Callable[[], SharedState]) -> None:
    state = make()

    def found() -> bool:
        state.delete("k")
        return not linearizable(record(Broken(state), next(seeds), kills=False))

    seeds = iter(range(200))
    until(found, "a history that is not linearizable", 100)
