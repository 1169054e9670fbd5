"""Worlds of a SharedState: a process sets, adds, deletes, locks, sweeps; a survivor looks at what is left."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Callable
from typing import Any

from runtime import _core
from runtime.errors import LockTimeout, RegionFull
from tools.stepkill.engine import Verdict

SIZE = 1 << 15
HEAD, ROW, BUCKET, WIDTH = 256, 64, 64, 128  # sizeof(map_header), map_row, map_bucket; a unit
WATCHING = 200  # offset of map_header.watching
NUMBER = (7).to_bytes(8, "little")
LONG = bytes(range(250)) * 2  # several units
MANY = 16  # cells of a bucket with one chunk
FULL = 5  # cells of a bucket without a chain


class Look:
    """The format of a map, as far as an audit needs it."""

    def __init__(self, region: _core.SharedRegion) -> None:
        self.load = region.load_u64
        self.units, self.buckets, self.rows = (self.load(at) for at in (24, 40, 48))
        self.buckets_at = HEAD + (ROW + 8) * self.rows + (self.buckets + 63) // 64 * 8 + 63 & ~63
        self.units_at = self.buckets_at + BUCKET * self.buckets + (8 * self.units + 63) // 64 * 64

    def bucket_in_use(self) -> int:
        """Of the one key that is there."""
        return next(i for i in range(self.buckets) if any(self.cells(i)))

    def cells(self, bucket: int) -> list[int]:
        return [self.load(self.buckets_at + BUCKET * bucket + 24 + 8 * i) & 0xFFFFFF for i in range(FULL)]

    def chunks(self) -> int:
        count = 0
        for i in range(self.buckets):
            link = self.load(self.buckets_at + BUCKET * i + 16)
            while link:
                count += 1
                link = self.load(self.units_at + (link - 1) * WIDTH + 32)
        return count

    def leave_taken(self, store: Callable[[int, int], None], row: int) -> None:
        """Two blocks that this row's process was writing, one of two units; and one that is named already."""
        words = self.buckets_at + BUCKET * self.buckets
        for head, tails in ((self.units - 6, 0), (self.units - 4, 1)):
            store(words + 8 * head, 1 << 27 | row << 3 | 1)
            for k in range(tails):
                store(words + 8 * (head + 1 + k), 1 << 27 | head << 3 | 3)
        named = next(cell for i in range(self.buckets) for cell in self.cells(i) if cell) - 1
        store(words + 8 * named, self.load(words + 8 * named) & ~((1 << 27) - 1) | row << 3 | 1)

    def owners(self) -> list[int]:
        return [owner for row in range(self.rows) if (owner := self.load(HEAD + ROW * row))]


@functools.cache
def neighbours() -> tuple[str, ...]:
    """Keys of one bucket, one more than it and a chunk have cells for."""
    found: dict[int, list[str]] = {}
    for i in range(100_000):
        with _core.SharedRegion.create(SIZE) as region:
            _core.StateMap.create(region).set(f"k{i}", b"")
            keys = found.setdefault(Look(region).bucket_in_use(), [])
        keys.append(f"k{i}")
        if len(keys) > MANY:
            return tuple(keys)
    raise AssertionError("the hash does not mix")


class StateWorld:
    """A map with some keys. act: what is done, a method below. before: the value of "key"; None: no key.

    others: keys of the same bucket that are there, too. over: the time of "key" is over. dead: a process was
    killed with blocks, pins, a watch, and the lock of "key". limit: max_items.
    reuse: the process has freed two units before, which it takes first. watched: the one that lives watches.
    gone: "key" was deleted.
    """

    def __init__(self, act: str, before: bytes | None = None, *, others: int = 0, over: bool = False,
                 dead: bool = False, limit: int | None = None,
                 reuse: bool = False, watched: bool = False, gone: bool = False) -> None:  # fmt: skip
        self.how, self.before, self.limit, self.reuse = act, before, limit, reuse
        self.act = getattr(self, act)
        self.key, *rest = reversed(neighbours())
        self.others = rest[:others]
        self.region = _core.SharedRegion.create(SIZE)
        self.memory = mmap.mmap(self.region.fd, os.fstat(self.region.fd).st_size)
        self.state = _core.StateMap.create(self.region, max_items=limit)
        self.whole = self.state.bytes_free()
        self.watch = _core.StateWatch(self.state, "") if watched else None
        for key in self.others:
            self.state.set(key, key.encode())
        if before is not None:
            self.state.set(self.key, before, ttl=1e-9 if over else None)
        if gone:
            self.state.delete(self.key)
        self.allowed: set[bytes | None] = {None if over or gone else before}
        self.lock: Any = None
        if act == "wait_for_lock":
            self.lock = self.state.lock(self.key)
            self.lock.acquire()
        if dead:
            self.state.sweep()  # this process has a row, the dead one the next
            self.die()

    def die(self) -> None:
        pid = os.fork()
        if not pid:
            lock = self.state.lock(self.key)
            lock.acquire()
            _kept = self.state.get(self.key, view=True), _core.StateWatch(self.state, "")
            os._exit(0)
        os.waitpid(pid, 0)
        Look(self.region).leave_taken(self.region.store_u64, 1)

    # ---- in the process that dies ----

    def prepare(self) -> None:
        self.state.delete("a row of its own")
        if self.reuse:
            for key in ("spare", "another"):
                self.state.set(key, b"")
            for key in ("spare", "another"):
                self.state.delete(key)
        if self.how == "unlock":
            self.lock = self.state.lock(self.key)
            self.lock.acquire()
        if self.how in ("end_watch", "watch_on"):
            self.mine = _core.StateWatch(self.state, "")
            self.state.set("gone", b"")
            self.state.delete("gone")
        if self.how == "begin_another_watch":
            other = _core.StateMap.open(_core.SharedRegion.from_fd(self.region.fd))
            self.first = _core.StateWatch(other, "")

    def set_short(self) -> None:
        with contextlib.suppress(RegionFull):
            self.state.set(self.key, b"new")

    def set_long(self) -> None:
        self.state.set(self.key, LONG)

    def add(self) -> None:
        with contextlib.suppress(TypeError):  # somebody has set it to what is no number
            self.state.add(self.key, 5)

    def swap(self) -> None:
        self.state.compare_and_set(self.key, self.before, b"new")

    def swap_other(self) -> None:
        self.state.compare_and_set(self.key, b"other", b"new")

    def delete(self) -> None:
        self.state.delete(self.key)

    def look(self) -> None:
        self.state.get(self.key)

    def view(self) -> None:
        self.state.get(self.key, view=True)

    def sweep(self) -> None:
        self.state.sweep()

    def begin_watch(self) -> None:
        self.mine = _core.StateWatch(self.state, "")

    def begin_another_watch(self) -> None:
        """By a mapping of its own."""
        self.begin_watch()

    def end_watch(self) -> None:
        self.mine.close()

    def watch_on(self) -> None:
        """The third look empties what the first has seen."""
        for _ in range(3):
            self.mine.look()

    def take_lock(self) -> None:
        self.state.lock(self.key).acquire(0)

    def wait_for_lock(self) -> None:
        with contextlib.suppress(LockTimeout):
            self.state.lock(self.key).acquire(0.003)

    def unlock(self) -> None:
        self.lock.release()

    # ---- in the one that lives ----

    def meddle(self) -> None:
        """Another process sets the key at this moment."""
        self.state.set(self.key, b"meddled")

    def after(self) -> set[bytes | None]:
        """What the key may be, before and after the operation, and what a meddler has made of it."""
        done: dict[str, bytes | None] = {
            "set_short": b"new",
            "set_long": LONG,
            "add": (12 if self.before == NUMBER and None not in self.allowed else 5).to_bytes(8, "little"),
            "swap": b"new",
            "delete": None,
        }
        return {*self.allowed, b"meddled", *([done[self.how]] if self.how in done else [])}

    def recover(self) -> None:
        if self.how == "wait_for_lock":
            self.lock.release()
        self.state.sweep()

    def audit(self) -> Verdict:
        """The key is old or new, others are as they were, its lock can be taken, all units are free then."""
        wrong = int(self.state.get(self.key) not in self.after())
        wrong += any(self.state.get(key) != key.encode() for key in self.others)
        try:
            lock = self.state.lock(self.key)
            lock.acquire(0)
            lock.release()
        except Exception:
            wrong += 1
        if len(self.others) == self.limit:
            self.state.delete(self.others.pop())
        self.state.set(self.key, b"last")
        doubled = int(len(self.state.items(self.key)) != 1)
        for key in (self.key, *self.others):
            wrong += not self.state.delete(key)
        wrong += self.state.get(self.key) is not None
        if self.watch is not None:
            shown = {key: value for key, _, value in self.watch.look()}
            wrong += any(key not in shown or shown[key] is not None for key in (self.key, *self.others))
            self.watch.close()
        self.state.sweep()
        look = Look(self.region)
        wrong += look.load(WATCHING) & 1
        free = self.state.bytes_free() + WIDTH * look.chunks()
        wrong += len(look.owners()) != 1
        return Verdict(wrong + (free < self.whole), doubled + (free > self.whole))

    def close(self) -> None:
        self.lock = self.watch = None
        self.memory.close()
        self.region.close()
