"""A process that asks for more memory than there is, in every way there is: promise 9.

`main()` with a JSON object as its argument: {"place": what is scarce, "seed": text, "count": refusals that
are wanted}. Whatever is asked for is refused by an exception, or is there to its last byte: so all that was
given is written and read. The same in a worker, which must be alive in the end. What was counted is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
from collections import Counter
from pathlib import Path

import runtime
from runtime import MemoryPool, RegionFull, SharedRegion
from runtime.config import memory_total

MIB = 1 << 20
PLENTY = resource.RLIM_INFINITY
RESULT = 256 * MIB  # what a host or a worker has no memory for, when its address space is scarce
SPARE = 128 * MIB  # what it has


def full(region, size):
    """Write a region to its last byte, and look."""
    piece = b"\xa5" * min(MIB, size)
    for at in range(0, size, len(piece)):
        region.write_at(at, piece[: size - at])
    assert region.read_at(size - 1, 1) == b"\xa5"


def name(draw):
    return f"runtime-test-{os.getpid()}-{draw.getrandbits(64):x}"


# ---- ways to ask for too much: each returns whether it was refused ---------------------------------


def refused(make):
    """Make it, and use it up; or be refused."""
    try:
        make()
    except (RegionFull, MemoryError):
        return True
    return False


def a_region(draw, size):
    def make():
        with SharedRegion.create(size) as region:
            full(region, size)

    return refused(make)


def a_named_region(draw, size):
    def make():
        with SharedRegion.create(size, name=name(draw)) as region:
            region.unlink()
            full(region, size)

    return refused(make)


def named_regions_until_there_is_no_room(draw, size):
    """They are all used up at once, those that were given."""
    with contextlib.ExitStack() as kept:
        regions = []

        def make():
            while True:
                least = max(1, size // 8)
                region = kept.enter_context(
                    SharedRegion.create(draw.randrange(least, 2 * least), name=name(draw))
                )
                kept.callback(region.unlink)
                regions.append(region)

        was = refused(make)
        for region in regions:
            full(region, region.size)
    return was


def a_region_that_may_grow(draw, size):
    """What it may grow to is address space, no memory."""

    def make():
        with SharedRegion.create(4096, max_size=size) as region:
            full(region, 4096)

    return refused(make)


def a_pool(draw, size):
    block = draw.choice([1 << 16, MIB])

    def make():
        pool = MemoryPool(max(1, size // block), block)
        while (taken := pool.acquire()) is not None:
            taken.write(0, b"\xa5" * block)

    return refused(make)


def a_runtime(draw, size):
    def make():
        with runtime.Runtime(1, region_size=size, region_max=size) as rt:
            rt.submit(pow, 2, 3).result()

    return refused(make)


WAYS = (
    a_region, a_named_region, named_regions_until_there_is_no_room, a_region_that_may_grow, a_pool, a_runtime,
)  # fmt: skip


def in_worker(way, seed, size):
    return way(random.Random(seed), size)


# ---- what is scarce --------------------------------------------------------------------------------


def limit_space(spare=SPARE):
    """This process may have so many more bytes of address space."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + spare, PLENTY))


class Place:
    """What is scarce, the sizes that are too large there, and who may ask for them."""

    ways = WAYS
    sizes = ()
    own = ()  # names of methods: further ways, that need the runtime

    def __init__(self, draw):
        self.draw = draw

    def enter(self):
        """Before a runtime is made."""

    def started(self, rt):
        """When it has been made."""

    def leave(self):
        """Memory is not scarce any more."""


class Machine(Place):
    """The machine itself: twice what it has. (The largest runtime has a terabyte.)"""

    sizes = (2 * memory_total(), 3 * memory_total())
    ways = (a_region, a_named_region, a_region_that_may_grow, a_pool)
    if max(sizes) < 1 << 39:
        ways += (a_runtime,)


class FileSize(Place):
    """RLIMIT_FSIZE, also where its signal would end the process. A runtime needs more for itself."""

    sizes = (4 * MIB, 64 * MIB)
    ways = (a_region, a_named_region, a_pool, a_runtime)

    def started(self, rt):
        for limited in (self.limit, lambda: rt.submit(FileSize.limit).result()):
            limited()
        if self.draw.random() < 0.5:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    @staticmethod
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, PLENTY))


class Space(Place):
    """RLIMIT_AS, of the host and of its worker."""

    sizes = (RESULT, 4 * RESULT)
    ways = (a_region, a_named_region, a_region_that_may_grow, a_pool, a_runtime)
    own = ("a_result", "an_argument", "a_result_of_a_map", "a_result_that_the_host_has_no_room_for")

    def started(self, rt):
        self.rt = rt
        rt.submit(limit_space).result()
        limit_space()

    def leave(self):
        resource.setrlimit(resource.RLIMIT_AS, (PLENTY, PLENTY))

    def a_result(self):
        return refused(lambda: self.rt.submit(bytes, RESULT).result())

    def a_result_of_a_map(self):
        first, error, last = self.rt.map(bytes, [5, RESULT, 6], return_exceptions=True)
        assert (len(first), len(last)) == (5, 6)
        return isinstance(error, MemoryError)

    def an_argument(self):
        """The worker has no memory for what the host sends, piece by piece."""
        self.leave()
        try:
            future = self.rt.submit(len, bytearray(RESULT))
            return refused(future.result)
        finally:
            limit_space()

    def a_result_that_the_host_has_no_room_for(self):
        """The worker has it, and sends it piece by piece."""
        self.rt.submit(resource.setrlimit, resource.RLIMIT_AS, (PLENTY, PLENTY)).result()
        try:
            return refused(lambda: self.rt.submit(bytes, RESULT).result())
        finally:
            self.rt.submit(limit_space).result()


class Tmpfs(Place):
    """A /dev/shm of 1 MiB, which was mounted before. What has no name does not lie there."""

    sizes = (MIB // 2, MIB, 2 * MIB, 16 * MIB)
    ways = (a_named_region, named_regions_until_there_is_no_room)


class Group(Place):
    """A cgroup with a limit, which this process was moved to before it began."""

    sizes = (128 * MIB, 1 << 30)
    own = ("workers",)

    def started(self, rt):
        self.rt = rt

    def workers(self):
        """Slots of workers that would be too many for it."""
        was = refused(lambda: self.rt.scale(64))
        self.rt.scale(1)
        return was


PLACES = {
    "machine": Machine, "file size": FileSize, "address space": Space, "tmpfs": Tmpfs, "cgroup": Group,
}  # fmt: skip


# ---- the process -----------------------------------------------------------------------------------


def ask(place, rt, draw, counts):
    """Once, for too much, or for what may be just too much; here or in the worker."""
    way = draw.choice([*place.ways, *place.own])
    if isinstance(way, str):
        was = getattr(place, way)()
        who = way.replace("_", " ")
    else:
        size = draw.choice(place.sizes) + draw.randrange(-4096, 4096)
        there = draw.random() < 0.4
        who = f"{way.__name__.replace('_', ' ')} in the {'worker' if there else 'host'}"
        was = rt.submit(in_worker, way, draw.random(), size).result() if there else way(draw, size)
    counts["refused" if was else "given"] += 1
    counts[f"{who}: {'refused' if was else 'given'}"] += 1


def main():
    settings = json.loads(sys.argv[1])
    draw = random.Random(settings["seed"])
    counts = Counter()
    place = PLACES[settings["place"]](draw)
    place.enter()
    with runtime.Runtime(1) as rt:
        (pid,) = [rt.submit(os.getpid).result()]
        place.started(rt)
        while counts["refused"] < settings["count"]:
            ask(place, rt, draw, counts)
        assert rt.submit(os.getpid).result() == pid, "the worker has died"
        place.leave()
    assert rt._core.arena.owners() == {}
    left = [file for file in os.listdir("/dev/shm") if file.startswith(f"runtime-test-{os.getpid()}-")]
    assert not left, left
    print(json.dumps(counts))
