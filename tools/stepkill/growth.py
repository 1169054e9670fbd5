"""Worlds of a region that grows: the host gives memory to holes, adds extents, or takes memory away.

The host alone does that, so it is the host that dies; a worker of this process lives on and takes what it
finds free, and then a next host takes the region over. What either is given must have memory: so extents that
are not holes are counted, against the pages that the file has. A block of the dead host's may have none: who
takes the region over gives it some before it is freed.
"""

from __future__ import annotations

import mmap
import os

from runtime import _core, memory
from tools.stepkill.engine import Verdict
from tools.stepkill.extents import DYING, HOLE, HOST, HOSTS, OTHER, PAGE, TAIL, U64, Words

BLOCK = 512  # bytes that one of st_blocks stands for
SPARED = memory.SPARED


class Tables:
    """What of a region is copied and put back: all but the extents, and how many pages have memory.

    Read and written as a file: to look at a hole through a mapping would give it a page.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd, self.nbytes = fd, nbytes
        self.told: int | None = None  # pages of the region that this is made a copy of

    @property
    def pages(self) -> int:
        """That have memory."""
        return os.fstat(self.fd).st_blocks * BLOCK // PAGE if self.told is None else self.told

    def __getitem__(self, _: slice) -> bytes:
        return os.pread(self.fd, self.nbytes, 0) + self.pages.to_bytes(8, "little")

    def __setitem__(self, _: slice, data: bytes) -> None:
        os.pwrite(self.fd, data[:-8], 0)
        self.told = int.from_bytes(data[-8:], "little")


class GrowthWorld:
    """A region of a few extents that may have more.

    begin, most: extents that it begins with, and may have. grown: that it has grown to. trimmed: whole pieces
    of it have been made holes. taken: an extent that another process has. need: extents in a row that `grow`
    is to find. allowed: extents that there is memory for, in one go. other: the extent that another process
    takes meanwhile.
    """

    def __init__(self, act: str, *, begin: int = 1, most: int = 600, grown: int = 0, trimmed: bool = False,
                 taken: int | None = None, need: int = 1, allowed: int | None = None,
                 other: int = 0) -> None:  # fmt: skip
        self.act = getattr(self, act)
        self.need, self.allowed, self.other = need, allowed, other
        self.arena = _core.GrowingArena.create(begin * PAGE, 2, 4, 4, PAGE, True, 0, 0, most * PAGE)
        whole = mmap.mmap(self.arena.fd, os.fstat(self.arena.fd).st_size)
        self.words = Words(whole)
        self.memory = Tables(self.arena.fd, PAGE + self.words.extents_at)
        self.fixed = self.memory.pages - begin - self.of_words(begin)
        if grown and not self.arena.grow(grown * PAGE):
            raise MemoryError(self.arena.refusal)
        self.arena.trim(0)  # from here on it knows what is free
        if trimmed and not self.arena.trim(0):
            raise MemoryError("nothing could be given back")
        self.busy: set[int] = set()
        if taken is not None:
            self.take(taken)

    @staticmethod
    def of_words(count: int) -> int:
        """Pages that the words of so many extents take."""
        return -(-8 * count // PAGE)

    def prepare(self) -> None:
        self.arena.adopt_process()
        if self.allowed is not None:
            room = SPARED + self.allowed * PAGE
            memory.memory_room = lambda root="/": (room, "a test")

    def grow(self) -> None:
        self.arena.grow(self.need * PAGE)

    def trim(self) -> None:
        self.arena.trim(0)

    def meddle(self) -> None:
        """A worker takes an extent that is being looked at."""
        self.take(self.other)

    def take(self, at: int) -> None:
        self.words.recount()
        self.words.heap.hint = at
        self.busy.add(self.words.take(self.words.heap, 1, OTHER, U64()))

    def recover(self) -> None:
        """Is there memory for what a worker may take by now? Then a next host moves in."""
        words = self.words
        words.recount()
        states = [words.get(i) for i in range(words.count)]
        dead = {i for i, (state, owner, _) in enumerate(states) if state == HOSTS and owner == HOST}
        backed = sum([
            state != HOLE and i not in dead and not (state == TAIL and owner in dead)
            for i, (state, owner, _) in enumerate(states)
        ])  # fmt: skip
        self.missing = self.memory.pages < self.fixed + self.of_words(words.count) + backed
        words.sweep(words.heap, HOST)
        words.sweep(words.heap, DYING)
        words.free_dead_hosts()

    def audit(self) -> Verdict:
        found = self.words.audit(self.busy)
        return found._replace(lost=found.lost + self.missing)

    def close(self) -> None:
        self.words.close()
        self.words.memory.close()
        self.arena.release()
