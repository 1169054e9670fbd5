"""A region that grows while it is used, and gives back what is not; who waits for room, and who must not.

What lies in blocks is checked by its bytes, what takes memory by the blocks of the region's file.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import scribbling
import tasks
from watching import all_ready, idle, output, send, until

import runtime
from runtime import RegionFull, Runtime, WorkerDied, memory, pressure
from runtime._core import Arena, GrowingArena, HostBlock

EXTENT, KIB, MIB, GIB = 4096, 1 << 10, 1 << 20, 1 << 30
EXTENTS_AT, WANTED_AT = 64, 4096 + 128  # words of arena_t
ENOUGH = 1 << 40  # bytes of memory


def arena(size: int, most: int) -> GrowingArena:
    """An arena with the smallest tables."""
    return GrowingArena.create(size, 1, 4, 4, EXTENT, True, 0, 1, most)


def taken(region: Arena, nbytes: int, mark: int) -> HostBlock:
    """A block full of marks; the region grows for it."""
    block = region.take(nbytes)
    for piece, marks in pieces(block, mark):
        piece[:] = marks
    return block


def marked(block: HostBlock, mark: int) -> bool:
    return all(bytes(piece) == marks for piece, marks in pieces(block, mark))


def pieces(block: HostBlock, mark: int) -> Iterator[tuple[memoryview, bytes]]:
    """A block by parts, so that the tests themselves need little memory, and what each shall hold."""
    whole, marks = memoryview(block), bytes([mark]) * MIB
    for at in range(0, block.nbytes, MIB):
        piece = whole[at : at + MIB]
        yield piece, marks[: len(piece)]


def memory_of(region: Arena) -> int:
    """Bytes of memory that its file has."""
    return os.fstat(region.fd).st_blocks * 512


def trim(region: Arena) -> int:
    """Two looks, and nothing in between."""
    return region.trim(0) + region.trim(0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Memory is short: so many bytes are available. What it returns grows with each time somebody asks."""
    asked: list[int] = []

    def set_room(nbytes: int) -> list[int]:
        def room(root: str = "/") -> tuple[int, str]:
            asked.append(nbytes)
            return nbytes + memory.SPARED, "the test's limit"

        monkeypatch.setattr(memory, "memory_room", room)
        return asked

    return set_room


# ---- growing -----------------------------------------------------------------------------------------


def test_grows_when_it_must() -> None:
    region = arena(MIB, 64 * MIB)
    assert (region.data_bytes, region.max_bytes, region.growths) == (MIB, 64 * MIB, 0)
    tables = region.reserved_bytes - MIB
    first = taken(region, MIB, 1)
    assert region.growths == 0
    second = taken(region, 3 * MIB, 2)
    assert (region.data_bytes, region.growths) == (4 * MIB, 1)
    third = taken(region, 1, 3)  # as much again as there was
    assert (region.data_bytes, region.growths) == (8 * MIB, 2)
    assert 0 <= region.reserved_bytes - tables - 8 * MIB <= 16 * KIB  # pages of words
    assert abs(memory_of(region) - region.reserved_bytes) <= 2 * EXTENT  # the file's header, the tables' end
    assert marked(first, 1) and marked(second, 2) and marked(third, 3)
    del first, second, third
    assert (region.used_bytes, region.largest_free_bytes, region.owners()) == (0, 8 * MIB, {})


def test_new_memory_is_zero_and_there() -> None:
    region = arena(EXTENT, 16 * MIB)
    before = memory_of(region)
    block = region.take(10 * MIB)
    assert memory_of(region) - before >= 10 * MIB - EXTENT  # before anybody has touched it
    assert not any(memoryview(block))


def test_what_is_free_at_the_end_counts() -> None:
    region = arena(4 * MIB, 6 * MIB)
    first = taken(region, 3 * MIB, 1)
    block = taken(region, 3 * MIB, 2)  # 1 MiB was free behind the first
    assert region.data_bytes == 6 * MIB and marked(first, 1) and marked(block, 2)


@pytest.mark.parametrize("size", [1, EXTENT, MIB])
def test_no_further_than_it_may(size: int) -> None:
    region = arena(size, 3 * MIB)
    blocks = [region.take(MIB) for _ in range(3)]
    assert region.data_bytes == region.max_bytes == 3 * MIB
    assert not region.grow(1) and not region.grow(4 * MIB) and not region.grow(2**64 - 1)
    with pytest.raises(
        RegionFull, match=r"no room for 1 bytes.* 3145728 are in use.*\(region_max\).*available"
    ):
        region.take(1)
    for nbytes in (4 * MIB, 2**64 - 1, 10**30):
        with pytest.raises(RegionFull, match=f"no room for {nbytes} bytes"):
            region.take(nbytes)
    del blocks[1]
    assert region.take(MIB).nbytes == MIB


def test_a_plain_arena_does_not_grow() -> None:
    region = Arena.create(MIB, 1, 4, 4, EXTENT)
    assert not region.grow(2 * MIB) and region.trim() == 0 and region.max_bytes == MIB
    assert HostBlock.take(region, 2 * MIB) is None


def test_little_memory(short: Callable[[int], list[int]]) -> None:
    """What is needed is got, if not more; and what is not there is not asked for again and again."""
    region = arena(4 * MIB, 64 * MIB)
    asked = short(3 * MIB)
    block = taken(region, 6 * MIB, 1)  # 2 MiB more are needed, not the 4 that a growth would be
    assert region.data_bytes == 6 * MIB
    before, tries = memory_of(region), len(asked)
    assert not region.grow(7 * MIB)
    assert "the test's limit" in region.refusal and str(3 * MIB + memory.SPARED) in region.refusal
    assert memory_of(region) == before
    tries = len(asked)
    assert not region.grow(8 * MIB) and not region.grow(7 * MIB) and len(asked) == tries
    assert region.grow(3 * MIB)  # less may be there
    assert marked(block, 1)
    short(ENOUGH)
    until(lambda: region.grow(20 * MIB), "it is tried again")


def test_what_was_reserved_in_vain_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    region = arena(MIB, 128 * MIB)
    rooms = [ENOUGH, ENOUGH, ENOUGH, 0]  # words, two steps of the extents; then no more
    monkeypatch.setattr(memory, "memory_room", lambda root="/": (rooms.pop(0) if rooms else 0, "a limit"))
    before = memory_of(region)
    assert not region.grow(100 * MIB)
    assert memory_of(region) == before
    assert region.data_bytes == MIB


def test_others_see_it() -> None:
    region = arena(MIB, 8 * MIB)
    other = Arena.attach_fd(region.fd)
    block = taken(region, 5 * MIB, 7)
    assert other.data_bytes == region.data_bytes == 5 * MIB
    assert other.owners() == {"host": 1} and other.used_bytes == 5 * MIB
    assert not other.grow(MIB) and other.trim(0) == 0
    del block
    assert other.owners() == {}


def test_nonsense_beyond_the_end_is_wiped() -> None:
    """A worker that runs wild may write where there is no memory yet, and how many extents there are."""
    region = arena(MIB, 8 * MIB)
    base = next(at for at in [scribbling.data_at()])
    head = scribbling.HEAD.unpack(ctypes.string_at(base, scribbling.HEAD.size))
    for index in range(256, 2048):
        scribbling.put(base + head[8] + 8 * index, 2**64 - 1)
    scribbling.put(base + 72, 2**64 - 1)
    assert region.data_bytes == MIB
    blocks = [taken(region, MIB, mark) for mark in range(8)]
    assert region.data_bytes == 8 * MIB and all(marked(block, mark) for mark, block in enumerate(blocks))
    blocks.clear()
    assert region.owners() == {} and region.largest_free_bytes == 8 * MIB


def test_a_fork_neither_grows_nor_shrinks() -> None:
    region = arena(MIB, 8 * MIB)
    region.grow(6 * MIB)
    region.make_private()
    assert not region.grow(8 * MIB)
    with pytest.raises(RegionFull):
        region.take(8 * MIB)
    assert trim(region) == 0


def test_several_grow_at_once() -> None:
    region = arena(MIB, 256 * MIB)
    barrier = threading.Barrier(6)

    def use(mark: int) -> int:
        held, missed = [], 0
        barrier.wait()
        for _ in range(15):
            try:
                held.append(taken(region, 2 * MIB + mark, mark))
            except RegionFull:  # another one was growing just then
                missed += 1
        assert all(marked(block, mark) for block in held)
        return missed

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(use, range(6))) < 90
    assert (region.owners(), region.used_bytes) == ({}, 0)
    assert region.largest_free_bytes == region.data_bytes <= 256 * MIB


# ---- giving back -------------------------------------------------------------------------------------


def test_what_is_not_used_is_given_back() -> None:
    region = arena(4 * MIB, 64 * MIB)
    at_first = region.reserved_bytes
    stays = taken(region, 3 * MIB, 1)
    taken(region, 40 * MIB, 2)
    assert region.reserved_bytes > at_first + 39 * MIB
    assert region.trim(0) == 0  # nobody knows yet whether it was just used
    given = region.trim(0)
    assert given >= 39 * MIB and given % MIB == 0
    assert at_first <= region.reserved_bytes < at_first + 2 * MIB
    assert abs(memory_of(region) - region.reserved_bytes) <= 2 * EXTENT
    assert region.data_bytes == region.largest_free_bytes + 3 * MIB  # it is there, as far as anybody asks
    assert region.used_bytes == 3 * MIB and region.owners() == {"host": 1}
    assert trim(region) == 0 and marked(stays, 1)


def test_what_was_given_back_is_taken_back() -> None:
    region = arena(MIB, 64 * MIB)
    stays = taken(region, MIB, 1)
    taken(region, 32 * MIB, 2)
    assert trim(region) == 32 * MIB
    data, growths = region.data_bytes, region.growths
    again = region.take(30 * MIB)
    assert region.data_bytes == data and region.growths == growths + 1
    assert not any(memoryview(again))  # other memory
    memoryview(again)[:] = bytes([3]) * again.nbytes
    assert memory_of(region) >= 31 * MIB
    assert marked(stays, 1) and marked(again, 3)
    del again, stays
    assert (region.used_bytes, region.largest_free_bytes) == (0, data)


def test_what_is_used_is_kept() -> None:
    region = arena(MIB, 64 * MIB)
    block = taken(region, 20 * MIB, 1)
    assert trim(region) == 0
    del block
    for _ in range(5):
        assert region.trim(0) == 0  # since it was used between two looks
        taken(region, 20 * MIB, 2)
    assert trim(region) >= 18 * MIB


def test_what_it_began_with_stays() -> None:
    region = arena(8 * MIB, 64 * MIB)
    assert trim(region) == 0
    region.grow(20 * MIB)
    assert trim(region) == 12 * MIB
    before = memory_of(region)
    block = HostBlock.take(region, 8 * MIB)
    assert block is not None and memory_of(region) == before


def test_it_looks_only_now_and_then() -> None:
    region = arena(MIB, 64 * MIB)
    region.grow(20 * MIB)
    assert region.trim(0) == 0
    assert region.trim() == region.trim() == 0  # 5 s have not passed


def test_holes_are_nobodys_to_take() -> None:
    region = arena(MIB, 16 * MIB)
    region.grow(16 * MIB)
    assert trim(region) == 15 * MIB
    assert HostBlock.take(region, 2 * MIB) is None
    blocks = [HostBlock.take(region, EXTENT) for _ in range(256)]
    assert None not in blocks and HostBlock.take(region, 1) is None
    assert len({block.offset for block in blocks if block is not None}) == 256


def test_short_memory_and_holes(short: Callable[[int], list[int]]) -> None:
    region = arena(MIB, 16 * MIB)
    region.grow(16 * MIB)
    assert trim(region) == 15 * MIB
    asked = short(2 * MIB)
    assert not region.grow(8 * MIB) and asked
    before = memory_of(region)
    block = taken(region, 2 * MIB, 1)
    assert memory_of(region) <= before + 2 * MIB and marked(block, 1)


def test_holes_are_filled_by_whole_pieces() -> None:
    """Else a piece that is half a hole keeps its other half for ever."""
    region = arena(MIB, 16 * MIB)
    region.grow(16 * MIB)
    trim(region)
    before = region.reserved_bytes
    first = taken(region, MIB, 1)  # all that has memory
    second = taken(region, 2 * MIB + 3 * EXTENT, 2)  # in holes, and it ends within a piece
    assert marked(first, 1) and marked(second, 2)
    del first, second
    assert trim(region) == 3 * MIB and region.reserved_bytes == before


def minutes() -> float:
    """How long the longer variant runs."""
    return float(os.environ.get("RUNTIME_GROWTH_MINUTES", "0.1"))


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(2.0, id="2 s"),
        pytest.param(
            0.0, id="minutes", marks=[pytest.mark.promise, pytest.mark.timeout(60 * minutes() + 60)]
        ),
    ],
)
@pytest.mark.parametrize(
    ("most", "largest"),
    [(16 * MIB, 4 * MIB), (256 * MIB, 4 * MIB), (GIB, 64 * MIB)],
    ids=["cramped", "roomy", "large"],
)
def test_mixed_sizes_under_load(seconds: float, most: int, largest: int) -> None:
    """Threads take and drop blocks of all sizes, grow and trim: no block is another's, and in the end all is
    one run."""
    region = arena(MIB, most)
    end = time.monotonic() + (seconds or 60 * minutes())
    counts = {"taken": 0, "given": 0}
    doublings = largest.bit_length() - 1

    def use(seed: int) -> None:
        chance = random.Random(seed)
        held: list[tuple[HostBlock, int]] = []
        while time.monotonic() < end:
            if held and (chance.random() < 0.5 or len(held) > 12):
                block, mark = held.pop(chance.randrange(len(held)))
                assert marked(block, mark)
                del block
            else:
                mark = chance.randrange(256)
                try:
                    held.append((taken(region, int(2 ** chance.uniform(0, doublings)), mark), mark))
                    counts["taken"] += 1
                except RegionFull:
                    time.sleep(0)

    def give_back() -> None:
        while time.monotonic() < end:
            counts["given"] += region.trim(0)
            time.sleep(0.005)

    with ThreadPoolExecutor(4) as threads:
        for running in [threads.submit(give_back), *[threads.submit(use, seed) for seed in range(3)]]:
            running.result()
    assert counts["taken"] > 20 and counts["given"] > 0 and region.growths > 0
    assert (region.owners(), region.used_bytes) == ({}, 0)
    assert region.largest_free_bytes == region.data_bytes
    trim(region)
    # What it began with, less than a piece more, a word for each extent that there ever was, and the tables.
    assert region.reserved_bytes < 2 * MIB + 8 * (region.data_bytes // EXTENT) + 128 * KIB
    assert region.take(region.data_bytes).nbytes == region.data_bytes


# ---- a runtime's -------------------------------------------------------------------------------------


@pytest.fixture
def numpy() -> Any:
    return pytest.importorskip("numpy")


def in_one_run(rt: Runtime) -> None:
    """What is left are pickles of functions; trimmed, the region is as small as it was."""
    region = rt._core.arena

    def back() -> bool:
        gc.collect()
        return idle(rt) and region.used_bytes <= 64 * EXTENT and rt.stats().pinned == 0

    until(back, lambda: f"blocks are back: {region.owners()}, {rt.stats()}")
    until(lambda: trim(region) == 0 and rt.stats().reserved < 16 * MIB, lambda: f"it shrinks: {rt.stats()}")


def filled(nbytes: int, mark: int) -> Any:
    import numpy

    return numpy.full(nbytes, mark, numpy.uint8)


def all_are(array: Any, mark: int) -> bool:
    return bool((array == mark).all())


def test_it_grows_for_arguments_and_results(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(2)
    assert rt.stats().growths == 0
    for nbytes in (MIB, 10 * MIB, 64 * MIB):
        array = filled(nbytes, 3)
        back = rt.submit(tasks.echo, array).result()
        assert all_are(back, 3) and numpy.array_equal(back, array)
        del back
    assert rt.stats().growths > 0 and rt.stats().reserved > 64 * MIB
    assert rt.submit(all_are, filled(64 * MIB, 9), 9).result()
    assert rt.stats().rescued == 0
    in_one_run(rt)
    assert all_are(rt.submit(tasks.echo, filled(20 * MIB, 4)).result(), 4)  # and again


def test_it_grows_for_results(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(2)
    assert all_are(rt.submit(filled, 40 * MIB, 1).result(), 1)
    assert rt.stats().growths > 0 and rt.stats().reserved > 40 * MIB
    assert [all_are(one, 2) for one in rt.map(filled, [12 * MIB] * 8, [2] * 8)] == [True] * 8
    assert rt.stats().rescued == 0
    in_one_run(rt)


def test_it_grows_for_what_a_map_is_given(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(2)
    arrays = [filled(9 * MIB, mark) for mark in range(6)]
    assert list(rt.map(all_are, arrays, range(6))) == [True] * 6
    assert rt.stats().growths > 0
    in_one_run(rt)


def test_without_memory_it_goes_by_value(
    factory: Callable[..., Runtime], numpy: Any, short: Callable[[int], list[int]]
) -> None:
    rt = factory(2)
    all_ready(rt)
    asked = short(0)
    array = filled(10 * MIB, 5)
    for _ in range(3):
        assert numpy.array_equal(rt.submit(tasks.echo, array).result(), array)
    assert all_are(rt.submit(filled, 10 * MIB, 6).result(), 6)
    assert asked and (rt.stats().growths, rt.stats().failed) == (0, 0)
    with pytest.raises(RegionFull, match="the test's limit"):
        rt._core.arena.take(10 * MIB)
    in_one_run(rt)


def test_worker_dies_while_it_waits_for_room(
    factory: Callable[..., Runtime], numpy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is about to see to it; and what has no memory stays so through the sweep."""
    rt = factory(1)
    assert all_are(rt.submit(filled, 30 * MIB, 1).result(), 1)
    in_one_run(rt)
    asked, answered = threading.Event(), threading.Event()
    real = memory.memory_room

    def room(root: str = "/") -> tuple[int, str]:
        asked.set()
        assert answered.wait(tasks.PATIENCE)
        return real(root)

    monkeypatch.setattr(memory, "memory_room", room)
    future = rt.submit(filled, 40 * MIB, 2)
    assert asked.wait(tasks.PATIENCE)
    for worker in rt.workers():
        assert worker.pid is not None
        send(worker.pid, signal.SIGKILL)
    answered.set()
    assert isinstance(future.exception(tasks.PATIENCE), WorkerDied)
    assert all_are(rt.submit(filled, 40 * MIB, 3).result(tasks.PATIENCE), 3)
    in_one_run(rt)


def wish_for(nbytes: int) -> None:
    scribbling.put(scribbling.data_at() + WANTED_AT, nbytes)


@pytest.mark.parametrize("nbytes", [1, 2**63, 2**64 - 1])
def test_wild_wishes(factory: Callable[..., Runtime], numpy: Any, nbytes: int) -> None:
    rt = factory(1, region_size="1MiB", region_max="16MiB")
    for _ in range(20):
        rt.submit(wish_for, nbytes).result()
    array = filled(5 * MIB, 1)
    assert numpy.array_equal(rt.submit(tasks.echo, array).result(), array)
    assert rt._core.arena.data_bytes <= 16 * MIB
    in_one_run(rt)


def say_extents(n: int) -> None:
    scribbling.put(scribbling.data_at() + EXTENTS_AT, n)


@pytest.mark.parametrize("n", [0, 1, 2**32, 2**64 - 1])
def test_a_wild_count_of_extents(factory: Callable[..., Runtime], numpy: Any, n: int) -> None:
    """Workers take blocks where there is no memory, or none; until the host looks after it."""
    rt = factory(1, region_size="1MiB", region_max="64MiB")
    region = rt._core.arena.region
    count = region.load_u64(EXTENTS_AT)
    rt.submit(say_extents, n).result()
    until(lambda: region.load_u64(EXTENTS_AT) == count, "the count is right again")
    results = [rt.submit(filled, MIB, i) for i in range(12)]
    assert all(all_are(result.result(), i) for i, result in enumerate(results))
    assert rt.stats().failed == 0
    results.clear()
    in_one_run(rt)


@pytest.mark.promise
def test_an_idle_runtime_gives_back(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(1)
    before = rt.stats().reserved
    array = rt.submit(filled, 50 * MIB, 1).result()
    assert all_are(array, 1)
    assert rt.stats().reserved > before + 45 * MIB
    del array
    until(lambda: gc.collect() >= 0 and rt.stats().reserved < before + 2 * MIB, lambda: str(rt.stats()), 20)


# ---- who waits for room ------------------------------------------------------------------------------


def look_at(array: Any, seconds: float = 0.01) -> int:
    time.sleep(seconds)
    return int(array[0])


@pytest.fixture
def watched() -> Iterator[Callable[[], int]]:
    """The most memory of its own that this process has had, beyond what it had at first."""
    start = most = memory.unshared() or 0
    stop = threading.Event()

    def look() -> int:
        nonlocal most
        most = max(most, memory.unshared() or 0)
        return most - start

    def watch() -> None:
        while not stop.wait(0.002):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    yield look
    stop.set()
    thread.join()


def test_a_producer_is_slowed_down_again_after_a_standstill(
    factory: Callable[..., Runtime], numpy: Any, watched: Callable[[], int], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """What waits in the host's memory since then takes the room that is made; the next ones wait for it."""
    rt = factory(2, region_max="16MiB")
    array = filled(MIB, 7)
    with contextlib.closing(tasks.Gate(tmp_path)) as gate:
        blockers = [rt.submit(tasks.pass_through, gate.path, n) for n in range(2)]
        gate.arrived(2)
        with monkeypatch.context() as hasty:  # for the standstill alone: a busy machine stands still as well
            hasty.setattr(pressure, "_STALLED", 0.05)
            futures = [rt.submit(look_at, array) for _ in range(32)]  # nothing moves: nobody waits for long
        held = watched()
        gate.open(2)
        futures += [rt.submit(look_at, array) for _ in range(200)]
        assert {future.result() for future in futures} == {7}
        assert len([blocker.result() for blocker in blockers]) == 2
    assert watched() < held + 32 * MIB  # all of the 200 would be 200 MiB
    in_one_run(rt)


def test_nobody_waits_for_long_for_room_that_others_hold(
    factory: Callable[..., Runtime], numpy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is freed all the time goes to others, and what is left of the region is too little."""
    monkeypatch.setattr(pressure, "_LONGEST", 0.2)
    rt = factory(1, region_max="8MiB")
    held = rt.put(filled(5 * MIB, 1))
    others = rt.map_unordered(len, (bytes(100_000) for _ in itertools.count()))
    next(others)
    began = time.monotonic()
    assert rt.submit(len, filled(200_000, 1)).result() == 200_000
    assert time.monotonic() - began < 2
    others.close()
    held.release()


def test_a_producer_that_is_too_fast_is_slowed_down(
    factory: Callable[..., Runtime], numpy: Any, watched: Callable[[], int]
) -> None:
    rt = factory(2, region_max="64MiB")
    array = filled(4 * MIB, 7)
    futures = [rt.submit(look_at, array) for _ in range(400)]
    assert rt.stats().used <= 64 * MIB
    assert {future.result() for future in futures} == {7}
    assert watched() < 64 * MIB
    in_one_run(rt)


def test_nobody_waits_for_what_stands_still(
    factory: Callable[..., Runtime], numpy: Any, gate: tasks.Gate
) -> None:
    """Workers hang: after a moment arguments wait in the host's memory, as they do when it is paused."""
    rt = factory(2, region_max="8MiB")
    held = [rt.submit(tasks.pass_through, gate.path) for _ in range(2)]
    gate.arrived(2)
    futures = [rt.submit(look_at, filled(3 * MIB, mark), 0) for mark in range(4)]
    gate.open(2)
    assert [future.result(tasks.PATIENCE) for future in futures] == [0, 1, 2, 3]
    wait(held)
    rt.scale(0)
    futures = [rt.submit(look_at, filled(3 * MIB, mark), 0) for mark in range(6)]
    rt.scale(2)
    assert [future.result(tasks.PATIENCE) for future in futures] == [0, 1, 2, 3, 4, 5]


def test_nobody_waits_for_what_the_user_holds(factory: Callable[..., Runtime], numpy: Any) -> None:
    """Tasks end, and none of them frees any room: a long line of them is no reason to wait."""
    rt = factory(1, region_max="8MiB")
    held = rt.alloc(5 * MIB)
    line = [rt.submit(time.sleep, 0.02) for _ in range(400)]
    futures = [rt.submit(look_at, filled(2 * MIB, mark), 0) for mark in range(4)]
    assert not all(future.done() for future in line)
    for future in line:
        future.cancel()
    assert [future.result(tasks.PATIENCE) for future in futures] == [0, 1, 2, 3]
    del held


def test_a_callback_that_submits(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(2, region_max="8MiB")
    more: list[Any] = []
    done = threading.Event()

    def go_on(future: Any) -> None:
        if len(more) < 40:
            more.extend(rt.submit(look_at, filled(2 * MIB, 1), 0) for _ in range(8))
            more[-1].add_done_callback(go_on)
        else:
            done.set()

    rt.submit(look_at, filled(2 * MIB, 1)).add_done_callback(go_on)
    assert done.wait(tasks.PATIENCE)
    assert {future.result(tasks.PATIENCE) for future in more} == {1}


def test_an_event_loop_that_submits_goes_on(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(1, region_max="8MiB")

    async def produce() -> list[int]:
        futures = [asyncio.wrap_future(rt.submit(look_at, filled(2 * MIB, 2), 0.02)) for _ in range(30)]
        assert sum(future.done() for future in futures) < 15  # it was not held up until there was room
        return list(await asyncio.gather(*futures))

    assert asyncio.run(produce()) == [2] * 30


def test_ctrl_c_ends_the_wait(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(1, region_max="8MiB")
    all_ready(rt)
    array = filled(3 * MIB, 1)
    futures = []

    def strike(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            while True:
                futures.append(rt.submit(look_at, array, 0.2))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(futures) < 20
    assert {future.result(tasks.PATIENCE) for future in futures} <= {1}
    in_one_run(rt)


# ---- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_FSIZE"])
def test_a_process_that_is_limited(limit: str) -> None:
    """The default makes do with what there is; what was asked for is an error that says what is missing."""
    code = f"""if True:
        import resource, runtime, tasks
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        room = mapped + (600 << 20) if "{limit}" == "RLIMIT_AS" else 200 << 20
        resource.setrlimit(resource.{limit}, (room, room))
        with runtime.Runtime(1) as rt:
            assert 4 << 20 <= rt._core.arena.max_bytes < room, rt._core.arena.max_bytes
            data = [b"x" * 100_000] * 100
            assert rt.submit(tasks.echo, data).result() == data
        try:
            runtime.Runtime(1, region_max="8GiB")
        except runtime.RegionFull as error:
            print("ulimit" in str(error))
    """
    assert output(code) == ["True"]


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"region_max \(1,048,576 bytes\).* region_size \(2,097,152 bytes\)"):
        runtime.Runtime(1, region_size="2MiB", region_max="1MiB")
    with pytest.raises(ValueError, match=r"region_max must be at most 1,099,511,619,584 bytes"):
        runtime.Runtime(1, region_max="2TiB")
    with pytest.raises(ValueError, match=r"a region of .* is over the limit"):
        GrowingArena.create(MIB, 1, 4, 4, EXTENT, True, 0, 1, 2 << 40)


def test_more_than_the_machine_has_is_address_space(factory: Callable[..., Runtime], numpy: Any) -> None:
    rt = factory(1, region_max="512GiB")
    assert all_are(rt.submit(tasks.echo, filled(8 * MIB, 1)).result(), 1)
    assert rt.stats().reserved < 64 * MIB


def test_several_threads_take_while_it_grows_and_is_trimmed() -> None:
    """Who comes while another thread grows the region waits for that: there is room."""
    region = arena(MIB, 64 * MIB)
    over = threading.Event()
    failures: list[BaseException] = []

    def take() -> None:
        try:
            for _ in range(200):
                blocks = [region.take(MIB) for _ in range(3)]
                del blocks
        except BaseException as error:
            failures.append(error)

    def trim() -> None:
        while not over.is_set():
            region.trim(0)

    trimmer = threading.Thread(target=trim)
    takers = [threading.Thread(target=take) for _ in range(4)]
    for thread in (trimmer, *takers):
        thread.start()
    for thread in takers:
        thread.join()
    over.set()
    trimmer.join()
    assert not failures
