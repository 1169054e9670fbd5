"""Worlds of a MemoryPool: a process takes or gives back a block, or sweeps; a survivor looks at what is left.

The primitives are called as nogil code calls them, by their address, with a pool_t of our own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

from runtime import _core
from tools.stepkill.engine import Verdict
from tools.stepkill.shipped import native

BLOCK = 64  # bytes
ROWS = 4096
HEAD = 128 + 8 * ROWS  # sizeof(pool_header)
SLEEPERS = 64 + 4  # offset of futex.sleepers in it
OWNED = 1 << 63
GONE = 1  # a start time that no living process has: with a pid, the identity of a dead one


class Pool(ctypes.Structure):
    """pool_t of _slab.pxd."""

    _fields_ = (
        ("head", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("capacity", ctypes.c_uint64),
        ("block_bytes", ctypes.c_uint64),
        ("stride", ctypes.c_uint64),
        ("identity", ctypes.c_uint64),
        ("row", ctypes.c_uint64),
        ("depth", ctypes.c_uint32),
        ("cursor", ctypes.c_uint32),
        ("recent", ctypes.c_uint32 * 32),
    )


POOL = ctypes.POINTER(Pool)
WORD = ctypes.POINTER(ctypes.c_uint64)


class PoolWorld:
    """A pool of a few blocks. This process has a row of its own; so has the one that dies, if it needs one.

    act: what it does, one of the methods below. owned: the words' owners: "-" nobody, "m" this process,
    "a" and "b" two dead processes, "x" one more for each of them, "c" the one that will die.
    """

    def __init__(self, act: str, owned: str = "---", *, recent: tuple[int, ...] = (), cursor: int = 0,
                 sleepers: bool = False, fill: bool = False) -> None:  # fmt: skip
        self.how = act
        self.act = getattr(self, act)
        self.owned, self.recent, self.cursor = owned, recent, cursor
        self.capacity = len(owned)
        size = (HEAD + 8 * self.capacity + 63) // 64 * 64 + BLOCK * self.capacity
        self.region = _core.SharedRegion.create(size)
        self.memory = mmap.mmap(self.region.fd, os.fstat(self.region.fd).st_size)
        self.pool = _core.MemoryPool(self.capacity, BLOCK, region=self.region)
        self.head = self.number(64 + 8)  # region_pool.at
        self.words = self.head + HEAD
        self.p = self.pool_of_this_process()
        self.calls()
        self.mine = {i for i, owner in enumerate(owned) if owner == "m"}
        rows = {"m": self.p.row & ~OWNED, "a": self.free_row(7) << 51, "b": self.free_row(200) << 51}
        for name, start in (("a", GONE), ("b", GONE + 1)):
            if name in owned:
                self.set_row(rows[name] >> 51, os.getpid() << 42 | start)
        for i, owner in enumerate(owned):
            if owner in rows:
                self.set_number(self.words + 8 * i, OWNED | rows[owner] | 1)
            elif owner == "x":
                row = self.free_row(300)
                self.set_row(row, GONE + i)  # of no pid: dead without a look at /proc
                self.set_number(self.words + 8 * i, OWNED | row << 51 | 1)
        if sleepers:
            self.memory[self.head + SLEEPERS] = 1
        if fill:  # the first rows nobody's that could be, the others this process's
            for row in range(ROWS):
                self.set_row(row, GONE + row if row < 64 else self.p.identity)
        self.held = ctypes.c_uint64()
        self.block: Any = None
        if act.startswith("format"):
            self.unmake()

    def unmake(self) -> None:
        """No pool, and old bytes where it will be; half made by a dead process, if so wished."""
        self.memory[self.head : self.head + HEAD] = b"\xaa" * HEAD
        self.set_number(64, os.getpid() << 42 | GONE if self.how == "format_of_the_dead" else 0)
        self.set_number(64 + 8, 0)

    def calls(self) -> None:
        self.enroll = native("_slab", "pool_enroll", ctypes.c_int, POOL)
        self.take = native("_slab", "pool_take_or_sweep", ctypes.c_int64, POOL, WORD)
        self.waiting = native("_slab", "pool_wait", ctypes.c_int64, POOL, WORD, ctypes.c_int64)
        self.sweep = native("_slab", "pool_sweep", ctypes.c_int, POOL)
        self.clear = native("_slab", "clear_dead_rows", None, POOL)

    def pool_of_this_process(self) -> Pool:
        """As MemoryPool.attach does it."""
        self.pin = ctypes.c_char.from_buffer(self.memory)
        base = ctypes.addressof(self.pin)
        blocks = base + self.head + (HEAD + 8 * self.capacity + 63) // 64 * 64
        pool = Pool(base + self.head, base + self.words, blocks, self.capacity, BLOCK, BLOCK)
        native("_slab", "pool_enroll", ctypes.c_int, POOL)(pool)
        return pool

    # ---- words ----

    def number(self, offset: int) -> int:
        return int.from_bytes(self.memory[offset : offset + 8], "little")

    def set_number(self, offset: int, value: int) -> None:
        self.memory[offset : offset + 8] = value.to_bytes(8, "little")

    def set_row(self, row: int, identity: int) -> None:
        self.set_number(self.head + 128 + 8 * row, identity)

    def free_row(self, row: int) -> int:
        """`row`, or the next one that is nobody's."""
        while self.number(self.head + 128 + 8 * row):
            row += 1
        return row

    # ---- in the process that dies ----

    def prepare(self) -> None:
        if self.how not in ("first_enroll", "format", "format_of_the_dead"):
            self.enroll(self.p)
        self.p.depth = len(self.recent)
        self.p.recent[: len(self.recent)] = self.recent
        self.p.cursor = self.cursor
        for i, owner in enumerate(self.owned):
            if owner == "c":
                self.set_number(self.words + 8 * i, self.p.row | 1)
        if self.how in ("drop_block", "drop_stale", "drop_last", "release"):
            self.block = self.pool.acquire()
        if self.how == "drop_last":
            del self.pool
        if self.how == "acquire" and self.recent:
            _core.Block.release(self.pool.acquire())  # type: ignore[arg-type]
        if self.how == "drop_many":
            self.block = [self.pool.acquire() for _ in range(self.capacity)]
        if self.how == "drop_stale":
            self.set_number(self.words + 8 * self.number_of(self.block), 5)

    def number_of(self, block: Any) -> int:
        offset: int = block.offset + 4096 - self.head - (HEAD + 8 * self.capacity + 63) // 64 * 64
        return offset // BLOCK

    def take_block(self) -> None:
        self.take(self.p, self.held)

    def wait_for_block(self) -> None:
        self.waiting(self.p, self.held, 1_000_000)

    def first_enroll(self) -> None:
        self.p.identity = 0
        self.enroll(self.p)

    def second_enroll(self) -> None:
        self.enroll(self.p)

    def sweep_dead(self) -> None:
        self.sweep(self.p)

    def acquire(self) -> None:
        self.block = self.pool.acquire()

    def release(self) -> None:
        self.block.release()

    def drop_block(self) -> None:
        del self.block

    drop_many = drop_stale = drop_last = drop_block
    take_block_again = take_block

    def format(self) -> None:
        _core.MemoryPool(self.capacity, BLOCK, region=self.region)

    format_of_the_dead = format

    # ---- in the survivor ----

    def meddle(self) -> None:
        """Another process is faster: it takes the first free block, or all rows but one, or it sweeps."""
        if self.how == "sweep_dead":
            self.sweep(self.p)
        elif self.how == "first_enroll":
            for row in range(ROWS):
                if row != 99 and self.number(self.head + 128 + 8 * row) == 0:
                    self.set_row(row, self.p.identity)
        elif self.how == "take_block_again":
            self.p.depth = self.p.cursor = 0
            taken = self.take(self.p, self.held)
            self.set_number(self.words + 8 * taken, self.held.value & ~(0xFFF << 51 | OWNED))
        else:
            self.p.depth = self.p.cursor = 0
            taken = self.take(self.p, self.held)
            self.mine.add(taken)

    def recover(self) -> None:
        if self.how.startswith("format"):
            del self.pin
            self.pool = _core.MemoryPool(self.capacity, BLOCK, region=self.region)
            self.p = self.pool_of_this_process()
        self.sweep(self.p)

    def audit(self) -> Verdict:
        """All blocks but those of this process can be taken, once each, and no row names the dead."""
        blocks = []
        while (block := self.pool.acquire()) is not None:
            blocks.append(block)
            if len(blocks) > 2 * self.capacity:
                break
        found = [self.number_of(block) for block in blocks]
        expected = set(range(self.capacity)) - self.mine
        doubled = len(found) - len(set(found)) + len(set(found) & self.mine)
        lost = len(expected - set(found))
        for block in blocks:
            block.release()
        del blocks
        self.clear(self.p)
        for row in range(ROWS):
            identity = self.number(self.head + 128 + 8 * row)
            lost += identity not in (0, self.p.identity)
        lost += self.pool.available != len(expected)
        return Verdict(lost, doubled)

    def close(self) -> None:
        self.block = None
        del self.pin
        self.memory.close()
        del self.pool
        self.region.close()
