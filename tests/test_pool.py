"""MemoryPool and Block: the canon of a concurrent structure, misuse, forks, and owners that are killed.

"Exactly once" is checked in the shared memory itself: whoever has taken a block swaps its first word from
0 to a mark of his own, and back before he gives it away. If two had the same block, one of them would
find the other's mark.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from marks import FORKS_BESIDE_THREADS
from watching import fork, join

from runtime import Block, MemoryPool, RegionFull, SharedRegion, StaleBlock

ROOT = Path(sys.modules["runtime"].__file__ or "").resolve().parent.parent
HEAD = 128 + 8 * 4096  # bytes of a pool before its words: two lines and the owner table

pytestmark = FORKS_BESIDE_THREADS


# ---- tools ---------------------------------------------------------------------------------------


def kill(*pids: int) -> None:
    """SIGKILL children of ours, and see them dead."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def take(pool: MemoryPool, timeout: float | None = 0) -> Block:
    block = pool.acquire(timeout)
    assert block is not None
    return block


def drain(pool: MemoryPool) -> list[Block]:
    """All blocks that are free."""
    blocks = []
    while (block := pool.acquire()) is not None:
        blocks.append(block)
    return blocks


def use(pool: MemoryPool, block: Block, mark: int) -> None:
    """Fails if somebody else uses this block at the same time."""
    assert pool.region.compare_exchange_u64(block.offset, 0, mark)
    assert pool.region.compare_exchange_u64(block.offset, mark, 0)


@pytest.fixture
def pool() -> Iterator[MemoryPool]:
    pool = MemoryPool(8, 256)
    yield pool
    assert pool.available == 8
    pool.region.close()


@pytest.fixture
def board() -> Iterator[SharedRegion]:
    """Words through which test processes agree on when to go on."""
    with SharedRegion.create(4096) as board:
        yield board


def reach(board: SharedRegion, offset: int, value: int) -> None:
    """Wait until a word of the board is at least `value`."""
    while board.load_u64(offset) < value:
        os.sched_yield()


def head_of(pool: MemoryPool) -> int:
    """Where the pool's header begins in its region: see _slab.pxd."""
    stride = (pool.block_size + 63) // 64 * 64
    page = 4096 if pool.block_size % 4096 == 0 else 64
    blocks = (HEAD + 8 * pool.capacity + page - 1) // page * page
    return (pool.region.size - blocks - pool.capacity * stride) & ~4095


def hang() -> None:
    while True:
        signal.pause()


# ---- the canon -----------------------------------------------------------------------------------


def test_smoke(pool: MemoryPool) -> None:
    assert (pool.capacity, pool.block_size, pool.available) == (8, 256, 8)
    block = take(pool)
    assert block.size == 256
    assert pool.available == 7
    block.write(3, b"hello")
    assert block.read(3, 5) == b"hello"
    assert len(block.read()) == 256
    assert block.read(250) == bytes(6)
    assert pool.region.read_at(block.offset + 3, 5) == b"hello"
    pool.release(block)
    assert pool.available == 8
    assert "8" in repr(pool)
    assert "released" in repr(block)


@pytest.mark.parametrize(("capacity", "size"), [(1, 1), (1, 4096), (3, 100), (7, 64), (64, 4097), (1000, 8)])
def test_capacity_is_exact_and_blocks_do_not_overlap(capacity: int, size: int) -> None:
    pool = MemoryPool(capacity, size)
    blocks = drain(pool)
    assert len(blocks) == capacity
    assert pool.available == 0
    assert pool.acquire() is None
    ranges = sorted((block.offset, block.offset + block.size) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] <= pool.region.size
    assert all(block.offset % (4096 if size == 4096 else 64) == 0 for block in blocks)
    for number, block in enumerate(blocks):
        block.write(0, number.to_bytes(4, "little")[:size] * (size // min(size, 4)))
    for number, block in enumerate(blocks):
        assert block.read(0, min(size, 4)) == number.to_bytes(4, "little")[:size]
        block.release()
    assert pool.available == capacity


@pytest.mark.parametrize(
    ("capacity", "size", "error"),
    [
        (0, 1, ValueError),
        (1, 0, ValueError),
        (-1, 1, ValueError),
        (1, -1, ValueError),
        (2**32, 1, ValueError),
        (1, 2**64, ValueError),
        (2**31, 2**31, ValueError),
        (2**64, 2**64, ValueError),
        (True, 1, TypeError),
        (1, True, TypeError),
        (1.0, 1, TypeError),
        ("1", 1, TypeError),
        (1, None, TypeError),
    ],
)
def test_bad_sizes(capacity: object, size: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        MemoryPool(capacity, size)  # type: ignore[arg-type]


def test_more_than_there_is_memory() -> None:
    with pytest.raises(RegionFull, match="needs"):
        MemoryPool(1 << 20, 1 << 26)


def test_last_in_first_out(pool: MemoryPool) -> None:
    """What was given back last has its pages mapped and warm."""
    blocks = drain(pool)
    offsets = [block.offset for block in blocks]
    for block in blocks:
        pool.release(block)
    assert [block.offset for block in drain(pool)] == offsets[::-1]


def test_one_block_passes_back_and_forth() -> None:
    pool = MemoryPool(1, 8)
    for round in range(1000):
        with take(pool) as block:
            assert pool.acquire() is None
            assert block.read(0, 8) == round.to_bytes(8, "little")
            block.write(0, (round + 1).to_bytes(8, "little"))
    assert pool.available == 1


def work(pool: MemoryPool, seed: int, rounds: int, most: int) -> None:
    """Take and give back up to `most` blocks at a time, in random order."""
    choose = random.Random(seed)
    held: list[Block] = []
    for _ in range(rounds):
        if held and (len(held) == most or choose.random() < 0.5):
            block = held.pop(choose.randrange(len(held)))
            assert pool.region.compare_exchange_u64(block.offset, seed, 0)
            pool.release(block)
        elif (taken := pool.acquire()) is not None:
            assert pool.region.compare_exchange_u64(taken.offset, 0, seed)
            held.append(taken)
    for block in held:
        assert pool.region.compare_exchange_u64(block.offset, seed, 0)
        pool.release(block)


@pytest.mark.parametrize(("capacity", "most"), [(1, 1), (2, 2), (5, 4), (64, 20)])
def test_many_to_many_exactly_once(capacity: int, most: int) -> None:
    """Threads and processes at once, all on one pool."""
    pool = MemoryPool(capacity, 64)
    failures: list[BaseException] = []

    def thread(seed: int) -> None:
        try:
            work(pool, seed, 4000, most)
        except BaseException as error:
            failures.append(error)

    children = [fork(lambda seed=seed: work(pool, seed, 4000, most)) for seed in (101, 102, 103)]
    threads = [threading.Thread(target=thread, args=(seed,)) for seed in (1, 2, 3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    join(*children)
    assert failures == []
    assert pool.available == capacity


def test_none_means_that_none_was_free(board: SharedRegion) -> None:
    """As many blocks as users, each of whom holds one at a time: there is always a free one to be found,
    also when it moves behind the back of the search."""
    users = 4
    pool = MemoryPool(users, 8)

    def user() -> None:
        board.fetch_add_u64(0, 1)
        reach(board, 0, users)
        for _ in range(20_000):
            take(pool).release()

    join(*(fork(user) for _ in range(users)))
    assert pool.available == users


# ---- waiting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, -math.inf])
def test_bad_timeouts(pool: MemoryPool, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        pool.acquire(timeout)
    assert pool.available == 8


@pytest.mark.parametrize("timeout", ["1", b"", [], object()])
def test_timeouts_are_numbers(pool: MemoryPool, timeout: object) -> None:
    with pytest.raises(TypeError):
        pool.acquire(timeout)  # type: ignore[arg-type]
    assert pool.available == 8


@pytest.mark.parametrize("timeout", [0, 0.0, False, 1, 1.5, 1e300, math.inf, None, 10**12])
def test_a_free_block_needs_no_waiting(pool: MemoryPool, timeout: float | None) -> None:
    take(pool, timeout).release()
    take(pool, timeout=timeout).release()  # type: ignore[call-arg]


@pytest.mark.parametrize("timeout", [0, 0.0, 0.001, 0.12])
def test_a_full_pool_gives_none_after_the_timeout(timeout: float) -> None:
    pool = MemoryPool(1, 8)
    with take(pool):
        start = time.monotonic()
        assert pool.acquire(timeout) is None
        assert time.monotonic() - start >= timeout


def test_a_release_wakes_a_waiter_of_another_process(board: SharedRegion) -> None:
    """Ping-pong on pools of one block: a lost wake-up would cost 50 ms, and there are 1000 chances."""
    rounds = 500
    ping, pong = MemoryPool(1, 8), MemoryPool(1, 8)

    def child() -> None:
        mine = take(pong)
        board.store_u64(0, 1)
        for _ in range(rounds):
            theirs = take(ping, None)
            mine.release()
            reach(board, 8, board.load_u64(16) + 1)  # the parent has taken pong
            board.fetch_add_u64(16, 1)
            theirs.release()
            mine = take(pong, None)
        mine.release()

    mine = take(ping)
    pid = fork(child)
    reach(board, 0, 1)
    start = time.monotonic()
    for _ in range(rounds):
        mine.release()
        theirs = take(pong, None)
        board.fetch_add_u64(8, 1)
        mine = take(ping, None)
        theirs.release()
    mine.release()
    join(pid)
    assert time.monotonic() - start < 0.010 * 2 * rounds


def test_many_waiters_all_get_their_turn() -> None:
    pool = MemoryPool(2, 8)
    got: list[int] = []

    def waiter(number: int) -> None:
        for _ in range(50):
            with take(pool, None) as block:
                use(pool, block, number)
        got.append(number)

    held = drain(pool)
    threads = [threading.Thread(target=waiter, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    children = [fork(lambda number=number: waiter(number)) for number in range(101, 105)]
    for block in held:
        block.release()
    for thread in threads:
        thread.join()
    join(*children)
    assert sorted(got) == list(range(1, 9))
    assert pool.available == 2


def test_waiting_lets_other_threads_run() -> None:
    pool = MemoryPool(1, 8)
    held = [take(pool)]
    threading.Thread(target=lambda: held.pop().release()).start()
    take(pool, None).release()


def test_a_signal_ends_the_wait() -> None:
    class Enough(Exception):
        pass

    def enough(*_: object) -> None:
        raise Enough

    pool = MemoryPool(1, 8)
    block = take(pool)
    old = signal.signal(signal.SIGALRM, enough)
    try:
        with pytest.raises(Enough):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            pool.acquire(None)
    finally:
        signal.signal(signal.SIGALRM, old)
    block.release()
    assert pool.available == 1


def test_ctrl_c_ends_the_wait(board: SharedRegion) -> None:
    pool = MemoryPool(1, 8)

    def child() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            board.store_u64(0, 1)
            pool.acquire(None)
        except KeyboardInterrupt:
            board.store_u64(8, 1)

    with take(pool):
        pid = fork(child)
        reach(board, 0, 1)
        os.kill(pid, signal.SIGINT)
        join(pid)
    assert board.load_u64(8) == 1


def test_a_waiter_gets_the_block_of_an_owner_that_is_killed(board: SharedRegion) -> None:
    """Nobody releases here, nobody wakes: the waiter itself finds the owner dead."""
    pool = MemoryPool(1, 8)

    def holder() -> None:
        block = take(pool)
        board.store_u64(0, 1)
        hang()
        block.release()

    pid = fork(holder)
    reach(board, 0, 1)
    assert pool.acquire(0.06) is None, "its owner lives"
    threading.Thread(target=kill, args=(pid,)).start()
    take(pool, None).release()
    assert pool.available == 1


# ---- misuse --------------------------------------------------------------------------------------


def test_double_release(pool: MemoryPool) -> None:
    block = take(pool)
    block.release()
    with pytest.raises(StaleBlock, match="before"):
        block.release()
    with pytest.raises(StaleBlock):
        pool.release(block)
    assert pool.available == 8


def test_a_stale_block_never_gives_back_the_next_owners(pool: MemoryPool) -> None:
    stale = take(pool)
    stale.release()
    fresh = take(pool)
    with pytest.raises(StaleBlock):
        pool.release(stale)
    assert pool.available == 7
    fresh.write(0, b"mine")
    del stale
    gc.collect()
    assert pool.available == 7
    fresh.release()


def test_every_use_after_release_is_an_error(pool: MemoryPool) -> None:
    block = take(pool)
    block.release()
    for call in (
        lambda: block.read(),
        lambda: block.read(0, 1),
        lambda: block.write(0, b"x"),
        lambda: memoryview(block),
        lambda: bytes(block),
        lambda: block.size,
        lambda: block.offset,
        lambda: block.__enter__(),
    ):
        with pytest.raises(StaleBlock):
            call()


def test_a_block_of_another_pool(pool: MemoryPool) -> None:
    other = MemoryPool(8, 256)
    block = take(other)
    with pytest.raises(ValueError, match="another pool") as caught:
        pool.release(block)
    assert not isinstance(caught.value, StaleBlock)
    assert other.available == 7
    other.release(block)


@pytest.mark.parametrize("thing", [None, 7, b"block", object()])
def test_what_is_not_a_block(pool: MemoryPool, thing: object) -> None:
    with pytest.raises(TypeError):
        pool.release(thing)  # type: ignore[arg-type]


def test_a_word_that_somebody_else_has_changed(pool: MemoryPool) -> None:
    """A process that scribbles over the words: an error, no crash, no other block harmed."""
    block = take(pool)
    words = [head_of(pool) + HEAD + 8 * i for i in range(8)]
    owned = [at for at in words if pool.region.load_u64(at) >> 63]
    assert len(owned) == 1
    pool.region.fetch_add_u64(owned[0], 1)
    with pytest.raises(StaleBlock, match="not owned"):
        block.release()
    pool.region.store_u64(owned[0], 0)


def test_blocks_are_made_by_acquire_alone() -> None:
    with pytest.raises(TypeError, match="acquire"):
        Block()
    empty = Block.__new__(Block)
    with pytest.raises(StaleBlock):
        empty.read()
    with pytest.raises(StaleBlock):
        empty.release()
    with pytest.raises(TypeError):
        MemoryPool()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        MemoryPool(1, 1, region=b"region")  # type: ignore[arg-type]


def test_no_pickle_no_copy(pool: MemoryPool) -> None:
    with take(pool) as block:
        for thing in (pool, block):
            for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="cannot be pickled"):
                    attempt(thing)


OUTSIDE = [(-1, 1), (0, -1), (0, 257), (256, 1), (257, 0), (2**63 - 1, 2**63 - 1), (2**64, 1), (1, 2**64)]


@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
def test_outside_of_a_block(pool: MemoryPool, offset: int, length: int) -> None:
    low, block = take(pool), take(pool)
    with pytest.raises(ValueError):
        block.read(offset, length)
    if 0 <= length < 1000:
        with pytest.raises(ValueError):
            block.write(offset, b"\xff" * length)
    if offset > 256:
        with pytest.raises(ValueError):
            block.read(offset)
    assert block.read() == low.read() == bytes(256)
    assert block.read(256) == block.read(256, 0) == b""
    block.write(256, b"")


def test_arguments_that_run_code_cannot_pull_the_block_away(pool: MemoryPool) -> None:
    class Releases:
        def __index__(self) -> int:
            block.release()
            return 0

    block = take(pool)
    with pytest.raises(StaleBlock):
        block.read(Releases())  # type: ignore[arg-type]
    block = take(pool)
    with pytest.raises(StaleBlock):
        block.write(Releases(), b"x")  # type: ignore[arg-type]
    assert pool.available == 8


# ---- views and lifetimes -------------------------------------------------------------------------


def test_a_block_is_a_buffer(pool: MemoryPool) -> None:
    with take(pool) as block:
        view = memoryview(block)
        assert (view.nbytes, view.readonly, view.format) == (256, False, "B")
        view[:5] = b"hello"
        assert block.read(0, 5) == b"hello"
        with pytest.raises(BufferError, match="1 memoryviews"):
            block.release()
        with pytest.raises(BufferError):
            pool.release(block)
        assert pool.available == 7
        view.release()


def test_the_end_of_a_with_block(pool: MemoryPool) -> None:
    with take(pool) as block:
        assert pool.available == 7
    assert pool.available == 8
    with take(pool) as block:
        block.release()  # early is fine
    with pytest.raises(KeyError), take(pool):
        raise KeyError
    assert pool.available == 8
    with pytest.raises(BufferError):
        with take(pool) as block:
            view = memoryview(block)
    del view, block
    assert pool.available == 8


def test_a_dropped_block_goes_back(pool: MemoryPool) -> None:
    take(pool)
    assert pool.available == 8
    blocks = drain(pool)
    assert len(blocks) == 8
    blocks.clear()
    assert pool.available == 8


def test_a_view_keeps_block_pool_and_region() -> None:
    pool = MemoryPool(2, 64)
    region = pool.region
    view = memoryview(take(pool))
    assert pool.available == 1
    del pool
    view[:4] = b"keep"
    assert region.read_at(region.size - 128, 128).count(b"keep") == 1
    del region
    assert bytes(view[:4]) == b"keep"
    del view
    assert "runtime-region" not in Path("/proc/self/maps").read_text()


def test_a_region_with_blocks_in_use_stays_open() -> None:
    region = SharedRegion.create(1 << 20)
    pool = MemoryPool(2, 64, region=region)
    block = take(pool)
    with pytest.raises(BufferError, match="blocks"):
        region.close()
    block.release()
    region.close()
    for call in (lambda: pool.acquire(), lambda: pool.acquire(1), lambda: pool.available):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pytest.raises(ValueError, match="closed"):
        MemoryPool(2, 64, region=region)
    assert (pool.capacity, pool.block_size) == (2, 64)
    assert "closed" in repr(pool)


def test_a_thread_that_waits_keeps_the_region_open(board: SharedRegion) -> None:
    region = SharedRegion.create(1 << 20)
    pool = MemoryPool(1, 64, region=region)
    block = take(pool)
    outcome: list[object] = []

    def wait() -> None:
        board.store_u64(0, 1)
        try:
            outcome.append(pool.acquire(0.3))
        except ValueError as error:  # closed before it began to wait
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    reach(board, 0, 1)
    address = region.view(block.offset, 1)
    with pytest.raises(BufferError):
        region.close()
    del address, block  # the waiter may have it now
    thread.join()
    outcome.clear()
    region.close()


# ---- in a region of the caller's -----------------------------------------------------------------


def test_the_low_offsets_stay_the_callers() -> None:
    with SharedRegion.create(1 << 20) as region:
        region.write_at(0, b"\xaa" * (1 << 20))  # and old data does not matter
        pool = MemoryPool(16, 1024, region=region)
        assert pool.region is region
        blocks = drain(pool)
        assert len(blocks) == 16
        low = min(block.offset for block in blocks) - HEAD - 4096
        assert low > (1 << 20) - HEAD - 16 * 1024 - 3 * 4096
        for block in blocks:
            block.write(0, b"\x55" * 1024)
        assert region.read_at(0, low) == b"\xaa" * low
        region.write_at(0, b"\xbb" * low)
        assert all(block.read() == b"\x55" * 1024 for block in blocks)
        del block
        blocks.clear()
        assert pool.available == 16


def test_a_region_that_is_too_small() -> None:
    with SharedRegion.create(40_000) as region:
        with pytest.raises(
            ValueError, match=r"has 40000 bytes; 1024 blocks of 64 bytes need (\d+)"
        ) as caught:
            MemoryPool(1024, 64, region=region)
        assert region.read_at(0, 40_000) == bytes(40_000)
        needed = int(str(caught.value).split()[-1])
    with SharedRegion.create(needed) as region:
        assert MemoryPool(1024, 64, region=region).available == 1024
    with SharedRegion.create(needed - 1) as region:
        with pytest.raises(ValueError):
            MemoryPool(1024, 64, region=region)
        assert MemoryPool(1, 64, region=region).available == 1


def test_a_second_pool_on_the_region_is_the_same_pool() -> None:
    with SharedRegion.create(1 << 20) as region:
        first = MemoryPool(4, 64, region=region)
        block = take(first)
        again = MemoryPool(4, 64, region=region)
        assert again.available == 3
        again.release(block)  # a block of the same pool, by another door
        assert first.available == 4
        for other in ((5, 64), (4, 65), (1, 1)):
            with pytest.raises(ValueError, match="already has a pool of 4 blocks of 64 bytes"):
                MemoryPool(*other, region=region)
        with SharedRegion.from_fd(region.fd) as mapping:
            elsewhere = MemoryPool(4, 64, region=mapping)
            mine, theirs = take(first), take(elsewhere)
            assert mine.offset != theirs.offset
            theirs.write(0, b"seen")
            assert region.read_at(theirs.offset, 4) == b"seen"
            with pytest.raises(ValueError, match="another pool"):
                first.release(theirs)
            theirs.release()
            mine.release()
            assert elsewhere.available == 4


def test_a_named_pool_from_a_fresh_interpreter() -> None:
    name = f"runtime-test-pool-{os.getpid()}"
    with SharedRegion.create(1 << 20, name=name) as region:
        try:
            pool = MemoryPool(4, 64, region=region)
            mine = take(pool)
            code = f"""
from runtime import *
region = SharedRegion.open({name!r})
pool = MemoryPool(4, 64, region=region)
assert pool.available == 3
blocks = [pool.acquire() for _ in range(4)]
assert blocks.pop() is None
blocks[0].write(0, b"from outside")
print(blocks[0].offset, flush=True)
import os
os.kill(os.getpid(), 9)
"""
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
            assert done.returncode == -9
            assert region.read_at(int(done.stdout), 12) == b"from outside"
            assert len(drain(pool)) == 3
            mine.release()
            assert pool.available == 4
        finally:
            region.unlink()


def test_a_damaged_pool_header() -> None:
    with SharedRegion.create(1 << 20) as region:
        at = head_of(MemoryPool(4, 64, region=region))
        assert (region.load_u64(at + 16), region.load_u64(at + 24)) == (4, 64)
        for field, value, message in (
            (0, 1, "magic 0x1"),
            (8, 2, "version 2"),
            (16, 2**63, "already has a pool of 9223372036854775808"),
            (32, 2**63, "damaged"),
            (40, 1, "PID namespace"),
        ):
            old = region.load_u64(at + field)
            region.store_u64(at + field, value)
            with pytest.raises(ValueError, match=message):
                MemoryPool(4, 64, region=region)
            region.store_u64(at + field, old)
        header = os.pread(region.fd, 128, 0)
        for bad in (8, 4095, 4097, 2**63, 2**64 - 64, 4096 + (1 << 20), 4096 + (1 << 20) - 64):
            os.pwrite(region.fd, bad.to_bytes(8, "little"), 72)
            with pytest.raises(ValueError, match="damaged"):
                MemoryPool(4, 64, region=region)
        os.pwrite(region.fd, header, 0)
        assert MemoryPool(4, 64, region=region).available == 4


def test_many_processes_format_at_once(board: SharedRegion) -> None:
    processes = 6

    def child() -> None:
        for round in range(1, 21):
            reach(board, 0, round)
            region = SharedRegion.open(f"{name}-{round}")
            pool = MemoryPool(processes + 1, 64, region=region)
            block = take(pool)
            use(pool, block, 1)
            board.fetch_add_u64(8, 1)
            reach(board, 8, round * processes)
            block.release()

    name = f"runtime-test-format-{os.getpid()}"
    children = [fork(child) for _ in range(processes)]
    regions = []
    try:
        for round in range(1, 21):
            regions.append(SharedRegion.create(1 << 17, name=f"{name}-{round}"))
            board.store_u64(0, round)
            pool = MemoryPool(processes + 1, 64, region=regions[-1])
            reach(board, 8, round * processes)
            assert pool.acquire() is not None
    finally:
        for region in regions:
            region.unlink()
        join(*children)


def test_an_unfinished_format_is_taken_over(board: SharedRegion) -> None:
    with SharedRegion.create(1 << 20) as region:
        region.write_at(0, b"\xff" * (1 << 20))
        # What a formatter leaves that is killed before it has published: its claim.
        pid = fork(lambda: None)
        start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        join(pid)
        os.pwrite(region.fd, (pid << 42 | start).to_bytes(8, "little"), 64)
        pool = MemoryPool(4, 64, region=region)
        assert pool.available == 4
        assert os.pread(region.fd, 8, 64) == bytes(8), "the claim is given back"


# ---- forks ---------------------------------------------------------------------------------------


def test_parent_and_child_own_what_they_take_themselves(board: SharedRegion) -> None:
    pool = MemoryPool(4, 64)
    mine = take(pool)

    def child() -> None:
        own = [take(pool), take(pool)]
        assert mine.offset not in [block.offset for block in own]
        own[0].release()
        board.store_u64(0, 1)
        reach(board, 0, 2)

    pid = fork(child)
    reach(board, 0, 1)
    assert pool.available == 2
    board.store_u64(0, 2)
    join(pid)
    assert pool.available == 3, "what the child did not release comes back"
    mine.release()
    assert pool.available == 4


def test_an_inherited_block_is_inert(board: SharedRegion) -> None:
    pool = MemoryPool(2, 100_000)
    holder = [take(pool)]
    holder[0].write(0, b"parent")
    old_view = memoryview(holder[0])

    def look() -> None:
        block = holder[0]
        assert block.read(0, 6) == b"parent"
        assert len(block.read()) == block.size
        view = memoryview(block)
        assert view.readonly
        assert bytes(view[:6]) == b"parent"
        for call in (block.release, lambda: pool.release(block), lambda: block.write(0, b"child!")):
            with pytest.raises(ValueError, match=f"process {os.getppid()}") as caught:
                call()
            assert not isinstance(caught.value, StaleBlock)
        with block:
            pass  # leaving does nothing either

    def child() -> None:
        nonlocal old_view
        look()
        del old_view
        holder.clear()
        gc.collect()
        assert pool.available == 1, "dropping did nothing"
        board.store_u64(0, 1)

    join(fork(child))
    assert board.load_u64(0) == 1
    assert pool.available == 1
    assert holder[0].read(0, 6) == b"parent"
    del old_view
    holder[0].release()


def test_an_inherited_block_that_the_parent_releases(board: SharedRegion) -> None:
    pool = MemoryPool(1, 64)
    block = take(pool)

    def child() -> None:
        reach(board, 0, 1)
        for call in (block.read, lambda: memoryview(block), lambda: block.offset):
            with pytest.raises(StaleBlock, match="has released"):
                call()

    pid = fork(child)
    block.release()
    again = take(pool)
    board.store_u64(0, 1)
    join(pid)
    again.release()


def test_a_grandchild(board: SharedRegion) -> None:
    pool = MemoryPool(3, 64)
    mine = take(pool)

    def grandchild() -> None:
        assert len(drain(pool)) == 1

    def child() -> None:
        block = take(pool)
        join(fork(grandchild))
        assert pool.available == 1
        block.release()

    join(fork(child))
    assert pool.available == 2
    mine.release()


def test_fork_while_threads_use_the_pool() -> None:
    pool = MemoryPool(16, 64)
    stop = threading.Event()

    def busy(seed: int) -> None:
        while not stop.is_set():
            work(pool, seed, 100, 3)

    threads = [threading.Thread(target=busy, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(10, 40):
            join(fork(lambda seed=seed: work(pool, seed, 100, 3)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert pool.available == 16


# ---- owners that are killed ----------------------------------------------------------------------


def test_killed_owners(board: SharedRegion) -> None:
    pool = MemoryPool(10, 64)
    mine = take(pool)

    def owner() -> None:
        blocks = [take(pool), take(pool), take(pool)]
        board.fetch_add_u64(0, 1)
        hang()
        blocks.clear()

    children = [fork(owner) for _ in range(3)]
    reach(board, 0, 3)
    assert pool.acquire() is None
    assert pool.available == 0
    kill(children[0])
    assert pool.available == 3
    kill(*children[1:])
    assert len(drain(pool)) == 9
    assert mine.read(0, 1) == b"\0"
    mine.release()
    assert pool.available == 10


def test_a_zombie_is_dead_and_a_stopped_process_is_not(board: SharedRegion) -> None:
    pool = MemoryPool(2, 64)

    def owner() -> None:
        block = take(pool)
        board.fetch_add_u64(0, 1)
        hang()
        block.release()

    zombie, stopped = fork(owner), fork(owner)
    reach(board, 0, 2)
    os.kill(stopped, signal.SIGSTOP)
    os.waitid(os.P_PID, stopped, os.WSTOPPED)
    os.kill(zombie, signal.SIGKILL)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    assert pool.available == 1
    block = take(pool)
    assert pool.acquire(0.06) is None
    os.waitpid(zombie, 0)
    kill(stopped)
    take(pool).release()
    block.release()


def test_an_owner_whose_main_thread_is_gone_lives(board: SharedRegion) -> None:
    """The kernel then shows the process as a zombie, but with threads."""
    pool = MemoryPool(1, 64)
    code = f"""
import ctypes, threading
from runtime import MemoryPool, SharedRegion
region, board = SharedRegion.from_fd({pool.region.fd}), SharedRegion.from_fd({board.fd})
pool = MemoryPool(1, 64, region=region)
block = pool.acquire()
def rest():
    while "State:\\tZ" not in open("/proc/self/status").read():
        pass
    board.store_u64(0, 1)
    while board.load_u64(0) == 1:
        pass
    block.release()
    board.store_u64(0, 3)
    while True:
        pass
threading.Thread(target=rest).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    fds = (pool.region.fd, board.fd)
    process = subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=fds, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    reach(board, 0, 1)
    assert pool.acquire(0.06) is None
    board.store_u64(0, 2)
    reach(board, 0, 3)
    take(pool).release()
    process.kill()
    process.wait()


@pytest.mark.timeout(60)
def test_hundreds_of_kills_lose_no_block() -> None:
    """Each child is killed somewhere among its takes, releases, sweeps and waits; survivors go on."""
    pool = MemoryPool(12, 64)
    choose = random.Random(1)
    for round in range(60):
        children = [fork(lambda seed=seed: churn(pool, seed)) for seed in range(5)]
        pause = choose.random() * 0.01
        end = time.monotonic() + pause
        while time.monotonic() < end:
            drain(pool)
        kill(*children)
        blocks = drain(pool)
        assert len(blocks) == 12, f"round {round}"
        assert len({block.offset for block in blocks}) == 12
        del blocks


def churn(pool: MemoryPool, seed: int) -> None:
    """Take, give back, drop, wait, for ever. Without marks: a killed user would leave his behind."""
    choose = random.Random(seed * os.getpid())
    held: list[Block] = []
    while True:
        if choose.random() < 0.5 and held:
            held.pop().release()
        elif len(held) < 4:
            block = pool.acquire(choose.choice((0, 0, 0.001)))
            if block is not None:
                held.append(block)
        else:
            held.clear()


def test_owners_that_die_by_themselves_one_after_another() -> None:
    """More processes than the owner table has rows come and go: rows are used again."""
    pool = MemoryPool(2, 64)
    region = pool.region
    base = head_of(pool)
    mine = region.load_u64(base + 128 + 8 * (os.getpid() % 4096))
    assert mine >> 42 == os.getpid()
    dead = fork(lambda: None)
    start = int(Path(f"/proc/{dead}/stat").read_text().rpartition(")")[2].split()[19])
    join(dead)
    for row in range(4096):
        region.compare_exchange_u64(base + 128 + 8 * row, 0, dead << 42 | start)
    block = take(pool)
    join(fork(lambda: take(pool).release()))
    assert sum(region.load_u64(base + 128 + 8 * row) == 0 for row in range(4096)) == 4094
    # And when all rows belong to the living, that is an error which says so.
    for row in range(4096):
        region.compare_exchange_u64(base + 128 + 8 * row, 0, mine)

    def late() -> None:
        with pytest.raises(RegionFull, match="4096 living processes"):
            pool.acquire()

    for row in range(4096):  # the child's, which has ended by now
        if region.load_u64(base + 128 + 8 * row) != mine:
            region.store_u64(base + 128 + 8 * row, mine)
    join(fork(late))
    block.release()


def test_a_reused_pid_is_another_process() -> None:
    """An owner with the pid of a living process, but another start time, is dead."""
    pool = MemoryPool(2, 64)
    region = pool.region
    base = head_of(pool)
    row = (os.getpid() + 1) % 4096
    region.store_u64(base + 128 + 8 * row, os.getpid() << 42 | 1)
    region.store_u64(base + HEAD, 1 << 63 | row << 51 | 5)
    assert pool.available == 2
    assert region.load_u64(base + HEAD) == 5, "free, and the tag is kept"
    assert region.load_u64(base + 128 + 8 * row) == 0


# ---- leaks ---------------------------------------------------------------------------------------


def test_nothing_leaks() -> None:
    def in_use() -> tuple[int, int]:
        gc.collect()
        return sys.getallocatedblocks(), len(Path("/proc/self/maps").read_text().splitlines())

    def everything() -> None:
        with SharedRegion.create(1 << 17) as region:
            pool = MemoryPool(8, 64, region=region)
            for block in drain(pool):
                memoryview(block)[:4] = b"data"
                block.read()
                block.write(0, b"x")
                with pytest.raises(ValueError):
                    block.read(-1)
            del block
            with pytest.raises(ValueError):
                MemoryPool(9, 64, region=region)
        MemoryPool(3, 64).acquire()

    for _ in range(100):  # what is made once is made by then
        everything()
    grown = []
    for _ in range(3):  # other tests' threads and caches may take some meanwhile, a leak takes some each time
        blocks, mappings = in_use()
        for _ in range(100):
            everything()
        more_blocks, more_mappings = in_use()
        grown.append((more_blocks - blocks, more_mappings - mappings))
    assert min(blocks for blocks, _ in grown) < 30, grown
    assert min(mappings for _, mappings in grown) < 4, grown
