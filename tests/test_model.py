"""Maps against a model: host and workers in one thread, so that each death comes where it is told.

What dies is the loop in _runner: an exception leaves it at once, as SIGKILL would, with whatever it has
written to the region until then; and the host sweeps its slot.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import WorkerDied, _core, config, serializer
from runtime.collector import Collector
from runtime.mapping import Results, Run
from runtime.outcomes import Death
from runtime.worker import Worker


class Killed(BaseException):
    """Leaves the loop of a worker."""


class Mortal(_core.Runner):
    """Dies now and then as it commits."""

    def commit(self, entry: int, items: list[Any], count: int) -> bool:
        world.perhaps_die()
        done = super().commit(entry, items, count)
        world.perhaps_die()
        return done


class Stub(Worker):
    """The worker without its process."""

    def __init__(self, port: Mortal) -> None:
        self.port, self.functions = port, serializer.FunctionCache()

    def failed(self, error: BaseException) -> tuple[Any, ...]:
        if isinstance(error, Killed):
            raise error
        return super().failed(error)

    def deliver(self, *args: Any) -> bool:
        world.perhaps_die()
        done = super().deliver(*args)
        world.perhaps_die()
        return done

    def check(self) -> None:
        """Nothing."""


def behave(value: Any) -> Any:
    """What an item does."""
    index, kind, deaths = value
    world.runs[index] += 1
    if kind == "slow":  # so that it is committed by itself
        until = time.monotonic() + 0.0001
        while time.monotonic() < until:
            pass
    elif kind == "raise":
        raise ValueError(index)
    elif kind == "leave":
        world.current.leaving = True
    elif kind == "die" and world.runs[index] <= deaths:
        world.kills += 1
        raise Killed
    return {index} if kind == "odd" else b"x" * 3000 if kind == "large" else index


class World:
    """A host, and its workers, in this thread."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.runs: Counter[int] = Counter()
        self.kills = 0
        self.mortality = chance.choice([0.0, 0.0, 0.02, 0.2])
        workers = chance.randint(1, 3)
        # Room for everything: who waits for some would wait for the host, which is this thread.
        self.arena = _core.Arena.create(16 << 20, workers + 1, chance.choice([4, 16]), 1024, 4096)
        self.bell = os.eventfd(0)
        self.keeper = _core.DeadlineKeeper(self.arena, self.bell)
        self.dispatcher = _core.Dispatcher(self.arena, self.keeper)
        link: Any = SimpleNamespace(send=lambda *_: True, wake=lambda: None)
        watcher: Any = SimpleNamespace(stopping=False)
        self.collector = Collector(self.dispatcher, link, watcher)
        self.ports: dict[int, Mortal] = {}
        for _ in range(workers):
            self.born()

    def born(self) -> None:
        slot = self.dispatcher.open_slot(0, 1)
        self.ports[slot] = port = Mortal(self.arena, slot, lambda: None)
        stub = Stub(port)
        left = self.chance.choice([-1, -1, 1, 7])
        port.attend(stub, SimpleNamespace(), stub.functions, self.bell, left, 1)
        port.ready()
        self.dispatcher.make_ready(slot)

    def perhaps_die(self) -> None:
        if self.chance.random() < self.mortality:
            self.kills += 1
            raise Killed

    def turn(self) -> None:
        """A worker runs what it has, and may die of it."""
        slot = self.chance.choice(list(self.ports))
        port = self.current = self.ports[slot]
        gone = False
        try:
            assert port.serve() == -1
            gone = port.leaving
        except Killed:
            gone = True
        if gone:
            if self.chance.random() < 0.5:
                self.dispatcher.stop_slot(slot)
            self.dispatcher.vacate(slot)
            del self.ports[slot]
            self.born()
            self.dispatcher.settle(slot, Death(None, 0, None, 9, "", None))
        if self.chance.random() < 0.7:
            self.dispatcher.drain_everything()
            self.collector.complete()

    def map(self, items: list[Any], retries: int) -> Results:
        options = config.TaskOptions(None, retries, (), 0)
        return Results(
            behave, (items,), run=Run(options, self.chance.random() < 0.5, True), options=options,
            submit=self.dispatcher.add, drop=self.dispatcher.drop, table=serializer.FunctionTable(),
            workers=len(self.ports), timeout=None, chunksize=self.chance.choice([0, 1, 3, 50, 100_000]),
            buffersize=None,
        )  # fmt: skip

    def settle(self) -> None:
        for _ in range(100_000):
            if self.dispatcher.idle:
                break
            self.turn()
            self.dispatcher.take_retries()
            if not self.chance.randrange(10):
                self.dispatcher.drain_everything()
                self.dispatcher.rescan()
                self.collector.complete()
        else:
            pytest.fail("it never ends")
        assert (self.dispatcher.waiting, self.dispatcher.leased) == (0, 0)
        ended = self.dispatcher.done + self.dispatcher.failed + self.dispatcher.vanished
        assert ended == self.dispatcher.accepted

    def close(self) -> None:
        for slot in self.ports:
            self.dispatcher.vacate(slot)
            self.dispatcher.settle(slot, None)
        self.dispatcher.close()
        self.collector.complete()
        assert self.dispatcher.malformed == 0
        assert (self.arena.owners(), self.arena.held) == ({}, 0)
        self.arena.release()
        os.close(self.bell)


world: World
KINDS = {"ok": 60, "slow": 9, "raise": 2, "leave": 1, "die": 1, "odd": 5, "large": 1}  # how often


@pytest.mark.parametrize("seed", range(60))
def test_maps_against_the_model(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    global world
    # Retries are put off, but not for so long that all else has ended by then.
    monkeypatch.setattr("runtime.outcomes.retry_delay", lambda attempts: 1e-5 * (attempts - 1))
    world = World(seed)
    chance = world.chance
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=300)
    items: list[Any] = [(i, kinds[i], chance.randint(1, 3)) for i in range(chance.choice([1, 5, 300]))]
    items = [list(item) if chance.random() < 0.1 else item for item in items]  # a list is pickled by itself
    retries = chance.randint(0, 2)
    results = world.map(items, retries)
    if seed % 4 == 3:  # nobody wants the rest
        for _ in range(chance.randrange(5)):
            world.turn()
        results.close()
        world.settle()
    else:
        world.settle()
        outcomes = list(results.iterate())
        assert len(outcomes) == len(items)
        found = [outcome_of(outcome) for outcome in outcomes]
        died = found.count("died")
        assert died <= world.kills
        expected = [expected_of(*item, retries) for item in items]
        if not results._run._ordered:
            assert not Counter(found) - Counter(expected) - Counter(died=died)
        else:
            assert all(one in (other, "died") for one, other in zip(found, expected, strict=True))
        if world.mortality == 0.0:
            assert Counter(found) == Counter(expected)
            # Each kill may have cost the uncommitted neighbours of a chunk one run more.
            assert all(n >= 1 for n in world.runs.values()) and len(world.runs) == len(items)
            assert world.kills or set(world.runs.values()) == {1}
        del outcomes, found
    del results
    world.close()


def outcome_of(outcome: Any) -> Any:
    if isinstance(outcome, WorkerDied):
        return "died"
    if isinstance(outcome, ValueError):
        return f"raised {outcome.args[0]}"
    return tuple(outcome) if isinstance(outcome, set) else outcome


def expected_of(index: int, kind: str, deaths: int, retries: int) -> Any:
    if kind == "raise":
        return f"raised {index}"
    if kind == "die" and deaths > retries:
        return "died"
    return (index,) if kind == "odd" else b"x" * 3000 if kind == "large" else index
