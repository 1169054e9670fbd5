"""Worlds of extents: a worker, or the host, takes, frees, hands over or sweeps runs; a survivor looks.

The functions of _extent are called with a heap_t of our own over the words of a real arena.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from runtime import _core
from tools.stepkill.engine import Verdict
from tools.stepkill.shipped import native

PAGE = 4096
HOST = 0xFFFFFFF  # NO_SLOT of _layout.pxd
COUNT_AT = 64  # arena_t.extents
DYING, OTHER = 0, 1  # slots: of the process that dies, of this one
FREE, CLAIM, PRIVATE, PUBLISHING, HOSTS, FREEING, TAIL, HOLE = range(8)  # X_* of _layout.pxd

# What an extent of a world's picture is: (state, owner); "t" belongs to the head before it.
PICTURE = {
    "p": (PRIVATE, DYING),
    "c": (CLAIM, DYING),
    "u": (PUBLISHING, DYING),
    "f": (FREEING, DYING),
    "C": (CLAIM, HOST),
    "F": (FREEING, HOST),
    "h": (HOSTS, HOST),
    "m": (PRIVATE, OTHER),
}


class Heap(ctypes.Structure):
    """heap_t of _extent.pxd."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("extents", ctypes.c_void_p),
        ("count", ctypes.c_uint64),
        ("frees", ctypes.c_void_p),
        ("hint", ctypes.c_uint64),
    )


HEAP = ctypes.POINTER(Heap)
U64, WORD = ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)


class Words:
    """The extent words of an arena, by number, and the functions that move them."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.words_at, self.extents_at, self.count = map(self.field, (48, 56, COUNT_AT))
        self.pin = ctypes.c_char.from_buffer(memory)
        base = ctypes.addressof(self.pin) + PAGE
        self.heap = Heap(base + self.words_at, base + self.extents_at, self.count, base + PAGE)
        self.take = native("_extent", "heap_take", ctypes.c_int64, HEAP, U64, U64, WORD)
        self.free = native("_extent", "heap_free", ctypes.c_int, HEAP, U64, U64, U64, U64)
        self.publish = native("_extent", "heap_publish", ctypes.c_int, HEAP, U64, U64, U64)
        self.adopt = native("_extent", "heap_adopt", ctypes.c_int, HEAP, U64, U64, U64)
        self.sweep = native("_extent", "heap_sweep", U64, HEAP, U64)

    def field(self, at: int) -> int:
        """A number of arena_t."""
        return int.from_bytes(self.memory[PAGE + at : PAGE + at + 8], "little")

    def recount(self) -> None:
        """The region may have grown."""
        self.count = self.heap.count = self.field(COUNT_AT)

    def get(self, index: int) -> tuple[int, int, int]:
        """(state, field, tag)"""
        at = PAGE + self.words_at + 8 * index
        word = int.from_bytes(self.memory[at : at + 8], "little")
        return word & 7, word >> 3 & 0xFFFFFFF, word >> 31

    def put(self, index: int, state: int, field: int, tag: int) -> None:
        at = PAGE + self.words_at + 8 * index
        self.memory[at : at + 8] = (state | field << 3 | tag << 31).to_bytes(8, "little")

    def free_dead_hosts(self) -> None:
        """What only a host's end would give back: blocks that it owned when it was killed."""
        for i in range(self.count):
            state, field, tag = self.get(i)
            if state == HOSTS:
                self.free(self.heap, i, tag, state, field)

    def audit(self, busy: set[int]) -> Verdict:
        """All extents but holes and the busy ones can be taken, once each, and given back."""
        tag = U64()
        taken: list[tuple[int, int]] = []
        self.heap.hint = 0
        while (at := self.take(self.heap, 1, OTHER, tag)) >= 0 and len(taken) <= self.count:
            taken.append((at, tag.value))
        found = [at for at, _ in taken]
        holes = {i for i in range(self.count) if self.get(i)[0] == HOLE}
        expected = set(range(self.count)) - busy - holes
        doubled = len(found) - len(set(found)) + len(set(found) & (busy | holes))
        lost = len(expected - set(found))
        for at, held in taken:
            lost += not self.free(self.heap, at, held, PRIVATE, OTHER)
        free = {i for i in range(self.count) if self.get(i)[0] == FREE}
        return Verdict(lost + len(expected - free), doubled)

    def close(self) -> None:
        del self.pin


class HeapWorld:
    """An arena of a few extents, owned as a picture says: "-" free, "t" a tail, the others see PICTURE."""

    def __init__(self, act: str, owned: str = "------", *, pages: int = 1, hint: int = 0, owner: int = DYING,
                 at: int | None = None, other: int = 0) -> None:  # fmt: skip
        self.how, self.pages, self.hint, self.owner, self.other = act, pages, hint, owner, other
        self.act = getattr(self, act)
        self.arena = _core.Arena.create(len(owned) * PAGE, 2, 4, 4, PAGE)
        self.memory = mmap.mmap(self.arena.fd, os.fstat(self.arena.fd).st_size)
        self.words = Words(self.memory)
        self.busy: set[int] = set()
        head, kept = 0, False
        for i, what in enumerate(owned):
            if what == "t":
                self.words.put(i, TAIL, head, 3)
            elif what != "-":
                head, kept = i, what == "m" or (what == "h" and owner != HOST)
                self.words.put(i, *PICTURE[what], 5)
            else:
                kept = False
                self.words.put(i, FREE, 0, 1)
            if kept:
                self.busy.add(i)
        self.tag = U64()
        # The block that is moved: one of the dying process's.
        mine = [i for i, what in enumerate(owned) if what in "puh" and i not in self.busy]
        self.at = at if at is not None else mine[0] if mine else 0
        self.state = self.words.get(self.at)[0] if self.at < self.words.count else PRIVATE

    def prepare(self) -> None:
        self.words.heap.hint = self.hint

    def take(self) -> None:
        nbytes = self.pages * PAGE
        self.words.take(self.words.heap, nbytes - 1 if nbytes else 0, self.owner, self.tag)

    def free(self) -> None:
        self.words.free(self.words.heap, self.at, 5, self.state, self.owner)

    def publish(self) -> None:
        self.words.publish(self.words.heap, self.at, 5, self.owner)

    def adopt(self) -> None:
        self.words.adopt(self.words.heap, self.at, 5, DYING)

    def sweep(self) -> None:
        self.words.sweep(self.words.heap, self.owner)

    def meddle(self) -> None:
        """Another process takes an extent that is being looked at."""
        self.words.heap.hint = self.other
        taken = self.words.take(self.words.heap, 1, OTHER, self.tag)
        self.busy.add(taken)

    def recover(self) -> None:
        """The host's sweep of a worker; if it was the host that died, what a next one could do."""
        self.words.sweep(self.words.heap, DYING)
        if self.owner == HOST or self.how == "adopt":
            self.words.sweep(self.words.heap, HOST)
            self.words.free_dead_hosts()

    def audit(self) -> Verdict:
        return self.words.audit(self.busy)

    def close(self) -> None:
        self.words.close()
        self.memory.close()
        self.arena.release()
