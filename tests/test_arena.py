"""The arena's blocks and frames in one process: the canon of a concurrent structure, and malformed frames.

A block that two threads had at once would show: each fills it with its own mark and looks again.
"""

from __future__ import annotations

import gc
import itertools
import random
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime._core import Arena, Frame, HostBlock, read_frame

EXTENT = 4096


def arena(extents: int, *, slots: int = 1) -> Arena:
    """An arena of so many extents, with the smallest tables."""
    return Arena.create(extents * EXTENT, slots, 4, 4, EXTENT)


def take(region: Arena, nbytes: int) -> HostBlock:
    block = HostBlock.take(region, nbytes)
    assert block is not None
    return block


# ---- blocks ------------------------------------------------------------------------------------------


def test_smoke() -> None:
    region = arena(16)
    assert (region.data_bytes, region.used_bytes, region.largest_free_bytes) == (16 * EXTENT, 0, 16 * EXTENT)
    block = take(region, 100)
    assert block.nbytes == 100
    assert region.owners() == {"host": 1}
    view = memoryview(block)
    view[:] = b"x" * 100
    assert bytes(block) == b"x" * 100 and not view.readonly
    view.release()
    del block
    assert (region.owners(), region.used_bytes) == ({}, 0)


def test_view_keeps_its_block() -> None:
    region = arena(4)
    view = memoryview(take(region, 4 * EXTENT))
    gc.collect()
    assert HostBlock.take(region, 1) is None
    view[-1] = 7
    part = view[-10:]
    del view
    assert HostBlock.take(region, 1) is None
    assert part[-1] == 7
    del part
    assert HostBlock.take(region, 4 * EXTENT) is not None


@pytest.mark.parametrize("extents", [1, 2, 16, 1000])
def test_capacity(extents: int) -> None:
    region = arena(extents)
    for nbytes in (1, EXTENT - 1, EXTENT):
        blocks = [take(region, nbytes) for _ in range(extents)]
        assert len({block.offset for block in blocks}) == extents
        assert HostBlock.take(region, 1) is None
        assert region.largest_free_bytes == 0
        blocks.clear()
        assert region.used_bytes == 0
    whole = take(region, extents * EXTENT)
    assert HostBlock.take(region, 0) is None
    del whole
    assert HostBlock.take(region, extents * EXTENT + 1) is None
    assert HostBlock.take(region, 2**63) is None
    assert region.used_bytes == 0


def test_zero() -> None:
    region = arena(2)
    empty = take(region, 0)
    assert empty.nbytes == 0 and bytes(empty) == b""
    other = take(region, 0)
    assert other.offset != empty.offset
    assert HostBlock.take(region, 0) is None
    del empty, other
    assert region.used_bytes == 0


@pytest.mark.parametrize("nbytes", [-1, 2**64])
def test_sizes_that_are_none(nbytes: int) -> None:
    region = arena(2)
    with pytest.raises((ValueError, OverflowError)):
        HostBlock.take(region, nbytes)
    assert region.used_bytes == 0


def test_tiny() -> None:
    region = arena(1)
    for i in range(1000):
        block = take(region, i % EXTENT + 1)
        assert HostBlock.take(region, 1) is None
        del block
    assert region.owners() == {}


def test_full_and_empty_again_and_again() -> None:
    region = arena(64)
    for round_ in range(50):
        blocks = [take(region, EXTENT) for _ in range(64)]
        assert HostBlock.take(region, 1) is None
        random.Random(round_).shuffle(blocks)
        blocks.clear()
        assert region.largest_free_bytes == 64 * EXTENT


def test_fragments_become_one_run() -> None:
    region = arena(100)
    blocks = [take(region, EXTENT) for _ in range(100)]
    del blocks[::2]
    assert region.used_bytes == 50 * EXTENT
    assert region.largest_free_bytes == EXTENT
    assert HostBlock.take(region, 2 * EXTENT) is None
    single = take(region, EXTENT)
    del single
    blocks.clear()
    assert region.largest_free_bytes == 100 * EXTENT
    assert take(region, 100 * EXTENT).nbytes == 100 * EXTENT


def test_blocks_do_not_overlap() -> None:
    region = arena(200)
    chance = random.Random(11)
    held: list[tuple[HostBlock, bytes]] = []
    for step in range(3000):
        if held and (chance.random() < 0.45 or len(held) > 60):
            block, mark = held.pop(chance.randrange(len(held)))
            assert bytes(block) == mark * block.nbytes
            del block
        else:
            block = HostBlock.take(region, chance.randrange(12 * EXTENT))
            if block is not None:
                mark = bytes([step % 256])
                memoryview(block)[:] = mark * block.nbytes
                held.append((block, mark))
                del block
    spans = sorted((b.offset, b.offset + max(1, -(-b.nbytes // EXTENT)) * EXTENT) for b, _ in held)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert region.used_bytes == sum(end - start for start, end in spans)
    held.clear()
    block = None
    assert (region.owners(), region.largest_free_bytes) == ({}, 200 * EXTENT)


@pytest.mark.parametrize("extents", [1, 3, 64])
def test_many_threads_exactly_once(extents: int) -> None:
    region = arena(extents)
    barrier = threading.Barrier(6)

    left = list(range(1500))

    def use(seed: int) -> None:
        chance = random.Random(seed)
        mark = bytes([seed + 1])
        barrier.wait()
        while left:
            block = HostBlock.take(region, chance.randrange(3 * EXTENT) + 1)
            if block is None:
                continue
            with memoryview(block) as view:
                view[:] = mark * block.nbytes
                assert view.tobytes().count(mark) == block.nbytes
            if left:
                left.pop()
            del block

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(use, range(6)))
    assert (region.owners(), region.used_bytes) == ({}, 0)
    assert region.largest_free_bytes == extents * EXTENT


def test_blocks_pass_between_threads() -> None:
    """Taken in one thread, dropped in another: the count is exact in the end."""
    region = arena(32)
    passed: list[HostBlock] = []
    done = threading.Event()

    def drop() -> None:
        while passed or not done.is_set():
            if passed:
                passed.pop()

    with ThreadPoolExecutor(2) as threads:
        droppers = [threads.submit(drop) for _ in range(2)]
        made = 0
        while made < 1500:
            block = HostBlock.take(region, EXTENT)
            if block is not None:
                passed.append(block)
                made += 1
                del block
        done.set()
        for dropper in droppers:
            try:
                dropper.result()
            except IndexError:  # the other one was quicker with the last
                pass
    passed.clear()
    assert region.owners() == {}


def test_arena_goes_with_its_last_block() -> None:
    block = take(arena(4), 100)
    gc.collect()
    memoryview(block)[:] = b"y" * 100
    assert bytes(block) == b"y" * 100


@pytest.mark.parametrize("size", [0, 1, EXTENT - 1, EXTENT, EXTENT + 1, 10**6])
def test_arena_has_at_least_what_was_asked_for(size: int) -> None:
    region = Arena.create(size, 1, 4, 4, EXTENT)
    assert size <= region.data_bytes < size + EXTENT
    if size:
        assert take(region, size).nbytes == size
    else:
        assert HostBlock.take(region, 0) is None


def test_attach() -> None:
    region = arena(8, slots=3)
    block = take(region, 5000)
    memoryview(block)[:] = b"z" * 5000
    other = Arena.attach_fd(region.fd)
    assert other.data_bytes == region.data_bytes
    assert other.owners() == {"host": 1}
    assert other.used_bytes == region.used_bytes == 2 * EXTENT
    del block
    assert other.owners() == {}


# ---- frames --------------------------------------------------------------------------------------------


def items_of(
    count: int, chance: random.Random
) -> list[tuple[int, bytes, tuple[bytes, ...], tuple[bool, ...]]]:
    made = []
    for _ in range(count):
        buffers = tuple(chance.randbytes(chance.randrange(300)) for _ in range(chance.randrange(4)))
        readonly = tuple(chance.random() < 0.5 for _ in buffers)
        made.append((chance.randrange(2), chance.randbytes(chance.randrange(200)), buffers, readonly))
    return made


def plain(items: list[tuple[int, Any, Any, int, int]]) -> list[tuple[int, bytes, tuple[bytes, ...]]]:
    assert all((start, count) == (0, 0) for _, _, _, start, count in items)
    return [(status, bytes(data), tuple(map(bytes, views))) for status, data, views, _, _ in items]


@pytest.mark.parametrize("count", [0, 1, 2, 17, 300])
def test_frame_there_and_back(count: int) -> None:
    chance = random.Random(count)
    items = items_of(count, chance)
    frame = Frame(items)
    raw = frame.tobytes()
    assert len(raw) == frame.nbytes
    back = read_frame(bytearray(raw))
    assert plain(back) == [(status, data, buffers) for status, data, buffers, _ in items]
    flags = [tuple(view.readonly for view in views) for _, _, views, _, _ in back]
    assert flags == [readonly for _, _, _, readonly in items]
    assert all(
        view.readonly for _, _, views, _, _ in read_frame(raw) for view in views
    )  # bytes: nothing is writable
    padded = read_frame(raw + b"more than the frame")
    assert plain(padded) == plain(back)


def test_part_of_a_list_in_a_frame() -> None:
    ((status, data, views, start, count),) = read_frame(Frame([(3, b"list", (), (), 17, 4000)]).tobytes())
    assert (status, bytes(data), views, start, count) == (3, b"list", [], 17, 4000)


def test_frame_in_a_block_and_its_buffers_are_aligned() -> None:
    region = arena(64)
    items = [(0, b"pickle", (b"a" * 1000, b"", b"c" * 70_000), (False, False, True))]
    raw = Frame(items).tobytes()
    block = take(region, len(raw))
    memoryview(block)[:] = raw
    ((_, data, views, _, _),) = read_frame(block)
    assert (bytes(data), [view.nbytes for view in views]) == (b"pickle", [1000, 0, 70_000])
    del block, data
    assert region.used_bytes > 0  # the views keep it
    views.clear()
    assert region.used_bytes == 0
    for content in (b"a" * 1000, b"c" * 70_000):
        assert raw.index(content) % 64 == 0


@pytest.mark.parametrize("beyond", [0, 1, 63, 64, 4095, 4097, 8191])
@pytest.mark.parametrize("start", [0, 1, 40])
def test_large_frames_are_copied_whole(beyond: int, start: int) -> None:
    """They pass the caches: in lines and pairs of pages, of memory at any address and of any length."""
    whole = random.Random(beyond).randbytes((1 << 20) + start + beyond)
    piece = memoryview(whole)[start:]
    large = memoryview(bytes(32 << 20))
    raw = Frame([(0, b"p", (piece, large, piece), (False, False, True))]).tobytes()
    ((_, _, views, _, _),) = read_frame(raw)
    assert [view == wanted for view, wanted in zip(views, (piece, large, piece), strict=True)] == [True] * 3


def test_frame_of_buffers_that_are_not_contiguous() -> None:
    with pytest.raises(BufferError):
        Frame([(0, b"", (memoryview(bytearray(100))[::2],), (False,))])


def test_frame_holds_its_memory_until_it_is_dropped() -> None:
    raw = bytearray(b"q" * 5000)
    frame = Frame([(0, b"", (raw,), (False,))])
    with pytest.raises(BufferError):
        raw.append(1)
    del frame
    raw.append(1)


@pytest.mark.parametrize("length", range(9))
def test_frames_that_are_too_short(length: int) -> None:
    if length < 8:
        with pytest.raises(ValueError, match="malformed frame"):
            read_frame(bytes(length))
    else:
        assert read_frame(bytes(length)) == []


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<II", 2**32 - 1, 0),
        struct.pack("<II", 0, 2**32 - 1),
        struct.pack("<II", 2**32 - 1, 2**32 - 1) + bytes(1000),
        struct.pack("<II", 1, 0) + struct.pack("<QIIII", 2**64 - 1, 0, 0, 0, 0),
        struct.pack("<II", 1, 0) + struct.pack("<QIIII", 1, 0, 0, 0, 0),
        struct.pack("<II", 1, 0) + struct.pack("<QIIII", 0, 1, 0, 0, 0),
        struct.pack("<II", 2, 0) + struct.pack("<QIIII", 2**63, 0, 0, 0, 0) * 2 + bytes(100),
        struct.pack("<II", 1, 1)
        + struct.pack("<QIIII", 0, 1, 0, 0, 0)
        + struct.pack("<QQ", 2**64 - 1, 0)
        + bytes(100),
        struct.pack("<II", 1, 1)
        + struct.pack("<QIIII", 0, 1, 0, 0, 0)
        + struct.pack("<QQ", 2**64 - 64, 0)
        + bytes(100),
        struct.pack("<II", 1, 1)
        + struct.pack("<QIIII", 0, 2, 0, 0, 0)
        + struct.pack("<QQ", 1, 0)
        + bytes(100),
        struct.pack("<II", 1, 1)
        + struct.pack("<QIIII", 0, 2**32 - 1, 0, 0, 0)
        + struct.pack("<QQ", 1, 0)
        + bytes(100),
        struct.pack("<II", 2, 3)
        + struct.pack("<QIIII", 0, 2, 0, 0, 0) * 2
        + struct.pack("<QQ", 1, 0) * 3
        + bytes(300),
    ],
)
def test_frames_that_claim_too_much(raw: bytes) -> None:
    with pytest.raises(ValueError, match="malformed frame"):
        read_frame(raw)


def check_harmless(raw: bytes | bytearray) -> None:
    """Reading it raises ValueError, or gives items that lie inside of it."""
    try:
        items = read_frame(raw)
    except ValueError:
        return
    total = 0
    for _, data, views, _, _ in items:
        total += len(bytes(data))
        for view in views:
            total += len(bytes(view))
    assert total <= len(raw)


def flip(raw: bytearray, chance: random.Random) -> None:
    raw[chance.randrange(len(raw))] = chance.randrange(256)


def grow(raw: bytearray, chance: random.Random) -> None:
    """A field becomes a number that somebody may have forgotten to check."""
    width = chance.choice([4, 8])
    at = chance.randrange(max(1, (len(raw) - width) // 4)) * 4
    value = chance.choice(
        [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1, len(raw), len(raw) + 1]
    )
    raw[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")


def cut(raw: bytearray, chance: random.Random) -> None:
    del raw[chance.randrange(len(raw)) :]


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [flip, grow, cut]


@pytest.mark.parametrize("seed", range(8))
def test_malformed_frames_never_crash(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(4000):
        raw = bytearray(Frame(items_of(chance.randrange(6), chance)).tobytes())
        header = min(len(raw), 8 + 24 * 12)
        head, tail = raw[:header], raw[header:]
        for _ in range(chance.randrange(1, 4)):
            if head:
                chance.choice(MUTATIONS)(head, chance)
        check_harmless(head + tail)
        check_harmless(chance.randbytes(chance.randrange(200)))


def test_frame_that_changes_while_it_is_read() -> None:
    """Another process may write there: whatever is read must lie inside, whenever it was looked at."""
    raw = bytearray(Frame(items_of(20, random.Random(3))).tobytes())
    original = bytes(raw)
    stop = threading.Event()

    def scribble() -> None:
        chance = random.Random(4)
        view = memoryview(raw)
        while not stop.is_set():
            at = chance.randrange(8 + 24 * 20)
            view[at] = chance.randrange(256)
            if chance.random() < 0.3:
                view[:] = original

    with ThreadPoolExecutor(1) as thread:
        scribbler = thread.submit(scribble)
        for _ in range(20_000):
            try:
                for _, data, views, _, _ in read_frame(raw):
                    assert len(data) <= len(raw) and all(len(view) <= len(raw) for view in views)
            except ValueError:
                pass
        stop.set()
        scribbler.result()
