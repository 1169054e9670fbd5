"""Workloads that look at memory: one object read by many, and a long mixed load."""

from __future__ import annotations

import gc
import heapq
import itertools
import math
import os
import random
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import tasks
from copies import MIB, expect, octets, plain_bytes, words
from harness import Figure, Meter
from peers import Contender

READS = 8  # tasks that read the one object
IN_FLIGHT = 8
HELD = 512 * MIB  # bytes that the mixed load keeps at most
SAMPLES = 120  # of memory, in the mixed load
LETTING_GO = 10.0  # seconds in which what nobody holds is to be given back
SLOPES = (
    Figure("host", "MB/min"),
    Figure("workers", "MB/min"),
    Figure("reserved", "MB/min"),
    Figure("used, all let go", "MB"),
)


def shared(contender: Contender, workers: int, nbytes: int, meter: Meter) -> Mapping[str, float]:
    """Keep one array, delete the source, let tasks read all of it: PSS of all processes, then and before."""
    with contender.open(workers) as pool:
        assert pool.put is not None
        small = words(64 * 1024)  # numpy is imported and everybody awake before the first look
        for handle in [pool.submit(tasks.total, small) for _ in range(READS)]:
            pool.result(handle)
        del small, handle
        before = pss()
        data = words(nbytes)
        wanted = tasks.total(data)
        kept = pool.put(data)
        del data
        gc.collect()
        meter.operations = READS
        with meter.timing():
            handles = [pool.submit(tasks.total, kept) for _ in range(READS)]
            for handle in handles:
                expect(pool.result(handle), wanted)
        after = pss()
    meter.detail = {"before": before, "after": after}
    return {"PSS": (after - before) / nbytes}


def pss() -> int:
    """Bytes of memory of this process and all below it, what they share counted once."""
    total = 0
    for pid in (os.getpid(), *machine.descendants(os.getpid())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


class Load:
    """What the mixed load holds and has in flight. most: bytes of one value; lifetimes are 1 s on average."""

    def __init__(self, rt: Any, most: int) -> None:
        self.rt = rt
        self.random = random.Random(1)
        self.most = most
        self.flying: deque[tuple[Any, int]] = deque()
        self.held: list[tuple[float, int, int, Any]] = []  # when it goes, number, bytes, value
        self.numbers = itertools.count()
        self.bytes = 0
        self.calls = self.refused = 0
        self.ways = (
            self._echo,
            self._echo_bytes,
            self._made,
            self._born,
            self._in_empty,
            self._put,
        )

    def step(self) -> None:
        """Let go of what is due, send something, and take a result when enough are under way."""
        import runtime

        now = time.monotonic()
        while self.held and (self.held[0][0] < now or self.bytes > HELD):
            self.bytes -= heapq.heappop(self.held)[2]
        nbytes = int(1024 * math.exp(self.random.random() * math.log(self.most / 1024))) // 8 * 8
        try:
            self.flying.append((self.random.choice(self.ways)(nbytes), nbytes))
        except runtime.RegionFull:
            self.refused += 1
        self.calls += 1
        if len(self.flying) >= IN_FLIGHT:
            self.take()

    def take(self) -> None:
        """The oldest result; it is held for a while."""
        future, nbytes = self.flying.popleft()
        self.hold(future.result(), nbytes)

    def hold(self, value: Any, nbytes: int) -> None:
        until = time.monotonic() + self.random.expovariate(1.0)
        heapq.heappush(self.held, (until, next(self.numbers), nbytes, value))
        self.bytes += nbytes

    def let_go(self) -> None:
        """Of everything."""
        while self.flying:
            self.take()
        self.held.clear()

    def _echo(self, nbytes: int) -> Any:
        return self.rt.submit(tasks.same, octets(nbytes))

    def _echo_bytes(self, nbytes: int) -> Any:
        return self.rt.submit(tasks.same, plain_bytes(nbytes))

    def _made(self, nbytes: int) -> Any:
        return self.rt.submit(tasks.full, nbytes // 8)

    def _born(self, nbytes: int) -> Any:
        return self.rt.submit(tasks.born, nbytes // 8)

    def _in_empty(self, nbytes: int) -> Any:
        array = self.rt.empty(nbytes // 8, "uint64")
        array.fill(7)
        self.hold(array, nbytes)
        return self.rt.submit(tasks.first, array)

    def _put(self, nbytes: int) -> Any:
        kept = self.rt.put(words(nbytes))
        self.hold(kept, nbytes)
        return self.rt.submit(tasks.first, kept)


def mixed(workers: int, minutes: float, most: int, meter: Meter) -> Mapping[str, float]:
    """Run such a load; how memory grows in its second half, and what is used when all was let go."""
    import runtime

    with runtime.Runtime(workers) as rt:
        for fn, argument in ((tasks.first, words(8)), (tasks.same, 0), (tasks.full, 1), (tasks.born, 1)):
            rt.submit(fn, argument).result()  # each function takes a block, for good
        idle = rt.stats().used
        load = Load(rt, most)
        start = time.monotonic()
        seconds = 60 * minutes
        samples: list[dict[str, float]] = []
        with meter.timing():
            while (now := time.monotonic() - start) < seconds:
                load.step()
                if now >= len(samples) * seconds / SAMPLES:
                    samples.append(sample(rt, now))
        meter.operations = load.calls
        load.let_go()
        deadline = time.monotonic() + LETTING_GO
        while rt.stats().used > idle and time.monotonic() < deadline:
            time.sleep(0.01)
        left = rt.stats().used - idle
    meter.detail = {"samples": samples, "refused": load.refused}
    if load.refused:
        meter.note = f"{load.refused} of {load.calls} refused: RegionFull"
    second = samples[len(samples) // 2 :]
    return {
        **{name: slope(second, name) * 60 / 1e6 for name in ("host", "workers", "reserved")},
        "used, all let go": left / 1e6,
    }


def sample(rt: Any, now: float) -> dict[str, float]:
    """Bytes after so many seconds. host, workers: of memory that is not shared."""
    stats = rt.stats()
    below = machine.descendants(os.getpid())
    return {
        "seconds": now,
        "host": unshared(os.getpid()),
        "workers": sum(map(unshared, below)),
        "reserved": stats.reserved,
        "used": stats.used,
        "pinned": stats.pinned,
        "growths": stats.growths,
    }


def unshared(pid: int) -> int:
    """Resident bytes of a process that lie in no file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def slope(samples: Sequence[Mapping[str, float]], name: str) -> float:
    """By how much it grows in a second: the line of the least squares."""
    if len(samples) < 2:
        return 0.0
    return statistics.linear_regression([s["seconds"] for s in samples], [s[name] for s in samples]).slope
