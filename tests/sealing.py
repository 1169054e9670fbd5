"""Values of a SharedState that carry their own checksum, and who writes them. Workers import this."""

from __future__ import annotations

import os
import random
import time
import zlib

import runtime
from runtime import SharedState


def sealed(key: str, n: int, size: int) -> bytes:
    """A value that says whose it is and whether it is whole."""
    body = f"{key}:{n}:".encode() + random.randbytes(size)
    return zlib.crc32(body).to_bytes(4, "little") + body


def check_sealed(key: str, value: bytes) -> None:
    assert zlib.crc32(value[4:]) == int.from_bytes(value[:4], "little"), "torn"
    assert value[4:].startswith(f"{key}:".encode()), "another key's"


def writer(state: SharedState, seed: int, watches: bool = False) -> None:
    """Sets, deletes, inserts until its parent is gone, and reads what others wrote."""
    chance, parent = random.Random(seed), os.getppid()
    watch = state.watch("key ") if watches else None
    n = 0
    while os.getppid() == parent:
        n += 1
        key = f"key {chance.randrange(24)}"
        move = chance.random()
        if move < 0.6:
            state.set(key, sealed(key, n, chance.choice((8, 60, 150, 700))))
        elif move < 0.7:
            state.delete(key)
        elif move < 0.8:
            state.set(key, sealed(key, n, 30), ttl=0.0005)
        elif (value := state.get(key)) is not None:
            check_sealed(key, value)
        if watch is not None and move < 0.2:
            for changed, _, value in watch._watch.look():
                if value is not None:
                    check_sealed(changed, value)
            if move < 0.01:
                watch.close()
                watch = state.watch("key ")
        state.add(f"ops {seed}")


def chunks(state: SharedState) -> int:
    """How many chunks the chains have, read from the format."""
    region = state.region
    rows, buckets = region.load_u64(48), region.load_u64(40)
    at = 256 + 72 * rows + (buckets + 63) // 64 * 8 + 63 & ~63
    units, width = region.load_u64(24), region.load_u64(32)
    first = at + 64 * buckets + (8 * units + 63 & ~63)
    count = 0
    for i in range(buckets):
        link = region.load_u64(at + 64 * i + 16)
        while link:
            count += 1
            link = region.load_u64(first + (link - 1) * width + 32)
    return count


# ---- tasks ----------------------------------------------------------------------------------------------


def write(seed: int) -> None:
    """`writer`, in a worker."""
    writer(runtime.current().state, seed)


def hold(key: str) -> None:
    """Take a lock, say so, keep it for ever."""
    state = runtime.current().state
    with state.lock(key):
        state.set("holder", str(os.getpid()).encode())
        while True:
            time.sleep(60)


def wait_for(key: str) -> tuple[float, bool]:
    """When the lock was there, and whether it was inherited."""
    state = runtime.current().state
    state.set("waiting", b"")
    with state.lock(key, 60) as lock:
        return time.monotonic(), lock.inherited
