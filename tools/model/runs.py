"""Runs of extents, as `try_run`, `drop_tails` and `finish_free` take and free them, a word at a time.

What `blocks` and `growth` have in common. The words and the names of the steps are those of
runtime/_layout.pxd and runtime/_extent.pyx.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from tools.model.checker import World, step

# extent words, _layout.pxd
X_FREE, X_CLAIM, X_PRIVATE, X_PUBLISHING, X_HOST, X_FREEING, X_TAIL, X_HOLE = range(8)
X_NAMES = ("FREE", "CLAIM", "PRIVATE", "PUBLISHING", "HOST", "FREEING", "TAIL", "HOLE")

# what an actor does next; a model goes on from here
IDLE, TAKE_TAIL, OWN_HEAD, DROP_TAIL, DROP_HEAD = range(5)
OTHERS = 5


@dataclass(slots=True)
class Actor:
    """What somebody is in the middle of."""

    at: int = IDLE
    head: int = -1  # of the run in hand
    run: int = 0  # its extents
    tail: int = 0  # the next of them


class Runs(World):
    """Extent words, and who takes and frees runs of them."""

    FREE_HEAD: int  # what comes when all tails of a block are free
    fault: str
    words: list[list[int]]
    actors: list[Any]

    @abstractmethod
    def idle(self) -> Any:
        """An actor with nothing in hand."""

    def owner(self, a: int) -> int:
        """What the word of a head says of an actor."""
        return a

    def is_free(self, a: int, at: int) -> bool:
        """Whether an actor may take an extent."""
        return self.words[at][0] == X_FREE

    # ---- taking ----------------------------------------------------------------------------------------

    @step("_extent.pyx:try_run", "actor {0} claims extent {1}, as the head of {2}")
    def claim_head(self, a: int, head: int, run: int) -> None:
        self.words[head] = [X_CLAIM, self.owner(a)]
        self.actors[a] = actor = self.idle()
        actor.at = TAKE_TAIL if run > 1 else OWN_HEAD
        actor.head, actor.run, actor.tail = head, run, head + 1

    @step("_extent.pyx:try_run", "actor {0} takes the next tail, if it is free")
    def take_tail(self, a: int) -> None:
        actor = self.actors[a]
        if not self.is_free(a, actor.tail):
            actor.tail -= 1
            actor.at = DROP_TAIL if actor.tail > actor.head and self.fault != "head-first" else DROP_HEAD
            return
        self.words[actor.tail] = [X_TAIL, actor.head]
        actor.tail += 1
        if actor.tail == actor.head + actor.run:
            actor.at = OWN_HEAD

    @step("_extent.pyx:drop_tails", "actor {0} frees the last tail of its run")
    def drop_tail(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.tail] = [X_FREE, 0]
        actor.tail -= 1
        if actor.tail == actor.head:
            actor.at = DROP_HEAD
            if self.fault == "head-first":
                self.actors[a] = self.idle()

    @step("_extent.pyx:try_run", "actor {0} frees the head that it had claimed")
    def drop_head(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.head] = [X_FREE, 0]
        if self.fault == "head-first" and actor.tail > actor.head:
            actor.at = DROP_TAIL
        else:
            self.actors[a] = self.idle()

    # ---- freeing ---------------------------------------------------------------------------------------

    @step("_extent.pyx:finish_free,drop_tails", "actor {0} frees the last tail of its block")
    def free_tail(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.tail] = [X_FREE, 0]
        actor.tail -= 1
        if actor.tail == actor.head:
            actor.at = self.FREE_HEAD

    @step("_extent.pyx:finish_free", "actor {0} frees the head of its block")
    def free_head(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.head] = [X_FREE, 0]
        actor.at, actor.head, actor.run, actor.tail = IDLE, -1, 0, 0
