"""Tasks that write nonsense into the shared memory of their runtime. Workers import this by name."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import time

import evil

HEAD = struct.Struct("<QIIIIQQQQQQ")  # arena_t
SLOT, RECORD, LEASE = 832, 48, 640
PAGE = 4096
FREE, CLAIM, PRIVATE, PUBLISHING, FREEING = 0, 1, 2, 3, 5
PARTS = ("leases", "outbox", "slot", "blocks", "header")
CONSTANT, SHARED = range(0, HEAD.size + 32, 8), range(PAGE, PAGE + 192, 64)  # words of arena_t
ENDS = ("return", "exit", "hang", "hang", "raise")
OWN_LINES = (128, 192, 320, 324, 328, 336, 344, 352, 384, 448)  # words of slot_t that a worker has write for


def data_at() -> int:
    """Where this process maps the data of the region."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, mode, offset, *_ = line.split()
            if "/memfd:runtime" in line and mode.startswith("rw-s") and int(offset, 16) == 0:
                return int(span.partition("-")[0], 16) + PAGE
    raise LookupError("this process maps no region")


def honest(value: int) -> tuple[int, int]:
    return value, value * value


class Slot:
    """The worker's own slot, and the words of the extents, as addresses."""

    def __init__(self) -> None:
        import runtime

        self.base = base = data_at()
        head = HEAD.unpack(ctypes.string_at(base, HEAD.size))
        self.index = runtime.current().slot
        self.leases, self.outbox = head[3], head[4]
        self.at = base + head[6] + head[7] * self.index
        self.records = self.at + SLOT + 4 * self.leases
        self.table = self.records + RECORD * self.outbox
        self.words, self.extents = base + head[8], head[10]


def put(at: int, value: int) -> None:
    ctypes.c_uint64.from_address(at).value = value % 2**64


def nonsense(draw: random.Random) -> int:
    return draw.choice((0, 1, 2, 3, 4, 7, 255, 2**32, 2**63, 2**64 - 1, draw.getrandbits(64)))


def write_one(slot: Slot, part: str, draw: random.Random) -> None:
    if part == "leases":
        at = slot.table + LEASE * draw.randrange(slot.leases) + 8 * draw.choice((0, 0, draw.randrange(80)))
        old = ctypes.c_uint64.from_address(at).value
        put(at, draw.choice((nonsense(draw), old & ~7 | draw.randrange(8))))
    elif part == "outbox":
        put(slot.records + 8 * draw.randrange(RECORD * slot.outbox // 8), nonsense(draw))
        if draw.random() < 0.1:
            tail = ctypes.c_uint64.from_address(slot.at + 192)
            tail.value += draw.choice((1, 1, 2, slot.outbox + 1))
    elif part == "slot":
        put(slot.at + draw.choice(OWN_LINES) // 8 * 8, nonsense(draw))
    elif part == "header":
        at = draw.choice((draw.choice(CONSTANT), draw.choice(SHARED), draw.randrange(-PAGE, 0, 8)))
        put(slot.base + at, nonsense(draw))
    else:
        # What is nobody's, and only as the owner that it is: else it writes into the blocks of innocents,
        # which no table can keep it from.
        at = slot.words + 8 * draw.randrange(slot.extents)
        old = ctypes.c_uint64.from_address(at).value
        if old & 7 == FREE:
            state = draw.choice((CLAIM, PRIVATE, PUBLISHING, FREEING))
            put(at, (old >> 31) + draw.randrange(3) << 31 | slot.index << 3 | state)


def scribble(path: str, seed: str, part: str, writes: int) -> str:
    """So many words of nonsense, here and there; then any end."""
    evil.note(path)
    draw = random.Random(seed)
    slot = Slot()
    for _ in range(writes):
        write_one(slot, part, draw)
        if draw.random() < 0.01:
            time.sleep(0.001)
    end = draw.choice(ENDS)
    if end == "exit":
        os._exit(3)
    if end == "hang":
        time.sleep(60)
    if end == "raise":
        raise ValueError("scribbled")
    return "scribbled"
