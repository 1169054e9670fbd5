"""Growth: extents get memory and lose it, while two others take and free runs among them.

    taker      heap_take (try_run, drop_tails)  uses its block  heap_free (finish_free): worker or host
    grower     fill: memory, HOLE -> FREE  extend: memory, the count  punch: heap_take, discard, -> HOLE

One thread of the host at a time grows or trims (`growing`), so that is one actor; all others are takers.
Who dies is in `blocks`: to a taker, a sweep is one more that frees.
"""

from __future__ import annotations

from array import array
from functools import partial

from tools.model.checker import Broken, Step, numbers_of, step
from tools.model.runs import (
    DROP_HEAD,
    DROP_TAIL,
    IDLE,
    OTHERS,
    OWN_HEAD,
    TAKE_TAIL,
    X_FREE,
    X_FREEING,
    X_HOLE,
    X_HOST,
    X_NAMES,
    X_TAIL,
    Actor,
    Runs,
)  # fmt: skip

__all__ = ["FAULTS", "Growth", "model"]

ROW = numbers_of(Actor)
EXTENTS, BEGIN = 4, 2  # laid out; that there are at first
RUNS = (1, 2)  # lengths of blocks, in extents
TAKERS, GROWER = 2, 2  # actors 0 and 1; the third one

# what an actor does next, besides what takes a run
USE, FREE_TAIL, FREE_HEAD, DISCARD, MAKE_HOLE, FILL, COUNT = range(OTHERS, OTHERS + 7)

FAULTS = {
    "trim-unclaimed": "a free run loses its memory before it was taken",
    "hole-is-free": "a taker takes a hole, as if it were free",
    "fill-before-memory": "a hole is FREE before it has memory again",
    "count-before-memory": "new extents are counted before they have memory",
}


class Growth(Runs):
    """One state of the extents and their memory. See the module."""

    FREE_HEAD = FREE_HEAD

    def __init__(self, fault: str = "", state: bytes | None = None) -> None:
        self.fault = fault
        if state is None:
            self.count = BEGIN
            self.words = [[X_FREE, 0] for _ in range(EXTENTS)]
            self.memory = [int(i < BEGIN) for i in range(EXTENTS)]
            self.actors = [Actor() for _ in range(TAKERS + 1)]
            return
        take = iter(array("b", state)).__next__
        self.count = take()
        self.words = [[take(), take()] for _ in range(EXTENTS)]
        self.memory = [take() for _ in range(EXTENTS)]
        self.actors = [Actor(*[take() for _ in range(4)]) for _ in range(TAKERS + 1)]

    def raw(self) -> bytes:
        """All fields in a row."""
        out = [self.count, *[number for word in self.words for number in word], *self.memory]
        for actor in self.actors:
            out += ROW(actor)
        return array("b", out).tobytes()

    def freeze(self) -> bytes:
        """The takers have no order; words do not name them."""
        self.actors[:TAKERS] = sorted(self.actors[:TAKERS], key=ROW)
        return self.raw()

    def shown(self) -> dict[str, str]:
        """For traces."""
        found = {"count": str(self.count)}
        for i, (state, of) in enumerate(self.words):
            whose = f"({of})" if state == X_TAIL else ""
            found[f"extent {i}"] = X_NAMES[state] + whose + ("" if self.memory[i] else ", no memory")
        return found

    # ---- what must hold --------------------------------------------------------------------------------

    def check(self) -> None:
        """What is FREE, or in use, has memory; whoever has a block has every word of it."""
        for i in range(self.count):
            if self.words[i][0] == X_FREE and not self.memory[i]:
                raise Broken(f"extent {i} is free to be taken, and has no memory")
        for a, actor in enumerate(self.actors):
            if actor.at not in (USE, DISCARD):
                continue
            tails = self.words[actor.head + 1 : actor.head + actor.run]
            if self.words[actor.head][0] != X_HOST or any(word != [X_TAIL, actor.head] for word in tails):
                raise Broken(f"block {actor.head} is actor {a}'s, and its words say otherwise")
            if actor.at == USE and not all(self.memory[actor.head : actor.head + actor.run]):
                raise Broken(f"block {actor.head} is in use, and has no memory")

    def ended(self) -> bool:
        """Nobody holds anything, and every extent is free, with memory."""
        return (
            all(actor.at == IDLE for actor in self.actors) and self.count == EXTENTS
            and all(word[0] == X_FREE for word in self.words) and all(self.memory)
        )  # fmt: skip

    # ---- what can happen -------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Of each actor."""
        found: list[Step] = []
        for a, actor in enumerate(self.actors):
            if actor.at == IDLE:
                for head in range(self.count):
                    for run in RUNS:
                        if head + run <= self.count and self.is_free(a, head):
                            found.append(Step(Growth.claim_head, (a, head, run)))
            else:
                found.append(Step(ACTS[actor.at], (a,)))
        if self.actors[GROWER].at == IDLE:
            for at in range(self.count):
                if self.words[at][0] == X_HOLE:
                    found.append(Step(Growth.supply, (at,)))
            if self.count < EXTENTS:
                found.append(Step(Growth.supply, (self.count,)))
        return found

    def idle(self) -> Actor:
        return Actor()

    def owner(self, a: int) -> int:
        return 0

    def is_free(self, a: int, at: int) -> bool:
        hole = self.fault == "hole-is-free" and a != GROWER and self.words[at][0] == X_HOLE
        return hole or super().is_free(a, at)

    # ---- taking and freeing ------------------------------------------------------------------------------

    @step("_extent.pyx:try_run", "actor {0} claims extent {1}, as the head of {2}")
    def claim_head(self, a: int, head: int, run: int) -> None:
        if a == GROWER and self.fault == "trim-unclaimed":
            self.memory[head] = 0
        super().claim_head(a, head, run)

    @step("_extent.pyx:try_run", "actor {0} has the whole run: it is its own")
    def own_head(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.head] = [X_HOST, 0]
        actor.tail = actor.head + actor.run - 1
        actor.at = DISCARD if a == GROWER else USE

    @step("_extent.pyx:heap_free", "actor {0} begins to free its block")
    def heap_free(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.head] = [X_FREEING, 0]
        actor.at = FREE_TAIL if actor.run > 1 else FREE_HEAD

    # ---- giving back -------------------------------------------------------------------------------------

    @step("_growth.pyx:punch; _region.pyx:_discard", "actor {0} gives the memory of its run back")
    def discard(self, a: int) -> None:
        actor = self.actors[a]
        for i in range(actor.head, actor.head + actor.run):
            self.memory[i] = 0
        actor.at = MAKE_HOLE

    @step("_growth.pyx:punch", "actor {0} moves the last extent of its run to HOLE, the head after its tails")
    def make_hole(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.tail] = [X_HOLE, 0]
        actor.tail -= 1
        if actor.tail < actor.head:
            self.actors[a] = Actor()

    # ---- growing -----------------------------------------------------------------------------------------

    @step("_growth.pyx:supply", "the grower gets memory for extent {0}")
    def supply(self, at: int) -> None:
        new = at == self.count
        self.actors[GROWER] = Actor(COUNT if new else FILL, at)
        if self.fault != ("count-before-memory" if new else "fill-before-memory"):
            self.memory[at] = 1
        elif new:
            self.extend(GROWER)
        else:
            self.fill(GROWER)

    @step("_growth.pyx:fill", "actor {0} moves the extent from HOLE to FREE")
    def fill(self, a: int) -> None:
        self.words[self.actors[a].head] = [X_FREE, 0]
        self.actors[a] = Actor()

    @step("_growth.pyx:extend", "actor {0} counts the new extent")
    def extend(self, a: int) -> None:
        at = self.actors[a].head
        self.words[at] = [X_FREE, 0]
        self.count = at + 1
        self.actors[a] = Actor()


ACTS = {
    TAKE_TAIL: Growth.take_tail, OWN_HEAD: Growth.own_head, DROP_TAIL: Growth.drop_tail,
    DROP_HEAD: Growth.drop_head, USE: Growth.heap_free, FREE_TAIL: Growth.free_tail,
    FREE_HEAD: Growth.free_head, DISCARD: Growth.discard, MAKE_HOLE: Growth.make_hole,
    FILL: Growth.fill, COUNT: Growth.extend,
}  # fmt: skip


def model(fault: str = "") -> partial[Growth]:
    """Makes worlds of it."""
    return partial(Growth, fault)
