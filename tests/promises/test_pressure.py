"""Promise 15: who produces ten times faster than the rest goes at the pace of the rest, in flat memory.

The input of `map` is endless, and its items are made in a tenth of the time, or less, in which they are used
up. Four shapes take turns: small items, items that go through the region, a map without order, and a slow
consumer, for whom producer and workers are both too fast.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from pathlib import Path

from watching import settled, until

SHAPE_SECONDS = 2.5
WARM_UP = 0.3  # of it: chunks find their size, the interpreter its memory
PAGE = os.sysconf("SC_PAGE_SIZE")
ROOM = 2 << 20  # bytes by which the rest may exceed the beginning


def slow(item):
    end = time.perf_counter() + 0.0005
    while time.perf_counter() < end:
        pass
    return item if isinstance(item, int) else len(item)


def fast(item):
    return bytes(10_000)


class Producer:
    """An endless input that knows how far ahead it is, and how long making items took."""

    def __init__(self, make):
        self.make = make
        self.made = 0
        self.seconds = 0.0

    def __iter__(self):
        for i in itertools.count():
            begin = time.perf_counter()
            item = self.make(i)
            self.seconds += time.perf_counter() - begin
            self.made += 1
            yield item


def private(pid):
    """Bytes of memory that a process shares with nobody: its resident pages without those of files."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * PAGE


class Watch:
    """The largest that has been seen of each figure, in the beginning and since."""

    def __init__(self, rt):
        self.rt = rt
        self.pids = {"host": os.getpid(), **{f"worker {w.number}": w.pid for w in rt.workers()}}
        self.early, self.late = {}, {}

    def look(self, warm, ahead):
        stats = self.rt.stats()
        now = {name: private(pid) for name, pid in self.pids.items()}
        now |= {"used": stats.used, "reserved": stats.reserved, "ahead": ahead, "queued": stats.queued}
        into = self.late if warm else self.early
        for name, value in now.items():
            into[name] = max(into.get(name, 0), value)

    def check(self):
        for name, value in self.late.items():
            counted = {"ahead": self.early[name], "queued": self.early[name] + 100, "reserved": 0}
            room = counted.get(name, ROOM)
            assert value <= self.early[name] + room, f"{name} grew: {self.early} to {self.late}"


SHAPES = {
    "small": (slow, lambda i: i, 0.0, False),
    "large": (slow, lambda i: b"%08d" % i * 8_000, 0.0, False),
    "unordered": (slow, lambda i: i, 0.0, True),
    "slow consumer": (fast, lambda i: i, 0.002, False),
}


def one_shape(rt, shape, seconds):
    function, make, pause, unordered = SHAPES[shape]
    producer = Producer(make)
    gc.collect()
    watch = Watch(rt)
    begin = looked = time.monotonic()
    results = (rt.map_unordered if unordered else rt.map)(function, producer)
    taken = 0
    for _ in results:
        taken += 1
        now = time.monotonic()
        if now > looked + 0.05:
            looked = now
            watch.look(now > begin + WARM_UP * seconds, producer.made - taken)
        if now > begin + seconds:
            break
        if pause:
            end = time.perf_counter() + pause
            while time.perf_counter() < end:
                pass
    took = time.monotonic() - begin
    results.close()
    settled(rt)
    watch.check()
    assert taken > 100 * seconds
    assert producer.seconds * 10 <= took, "the producer was not ten times too fast"
    return took


def test_memory_is_flat_under_a_fast_producer(tally, runtime_factory):
    rt = runtime_factory(2, region_size="8MiB", region_max="8MiB")
    until(lambda: list(rt.map(slow, range(4))) == [0, 1, 2, 3])
    shapes = itertools.cycle(SHAPES)
    while tally.more() or (not tally.is_slice and tally.counts["shapes"] < len(SHAPES)):
        # A slice gives each shape a quarter of its time, so that each of them runs for long.
        seconds = max(SHAPE_SECONDS, tally.seconds / len(SHAPES))
        tally.counts["seconds"] += one_shape(rt, next(shapes), seconds)
        tally.counts["shapes"] += 1
    settled(rt)
