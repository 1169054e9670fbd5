"""Blocks: two workers and the host take runs of four extents, hand them over and free them, all at once.

    worker     heap_take (try_run, drop_tails)  heap_publish  the record that names the block
    host       heap_take  heap_adopt  heap_free (finish_free)  of a dead worker: its records, then heap_sweep
    world      crash: SIGKILL of a worker, at any moment, any number of times; a new one takes its slot

The words and the names of the steps are those of runtime/_layout.pxd and runtime/_extent.pyx. A step reads
or writes one extent word. Nothing is counted, so nothing ends: the checker walks until it has seen it all.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields
from functools import partial

from tools.model.checker import Broken, Step, numbers_of, step
from tools.model.runs import (
    DROP_HEAD,
    DROP_TAIL,
    IDLE,
    OTHERS,
    OWN_HEAD,
    TAKE_TAIL,
    X_CLAIM,
    X_FREE,
    X_FREEING,
    X_HOST,
    X_NAMES,
    X_PRIVATE,
    X_PUBLISHING,
    X_TAIL,
    Runs,
)  # fmt: skip
from tools.model.runs import Actor as Taker

__all__ = ["FAULTS", "Blocks", "model"]

EXTENTS = 4
RUNS = (1, 3)  # lengths of blocks, in extents
HELD = 2  # blocks that the host holds at a time, at most
HOST = 2  # the third actor; in a word, its number stands for NO_SLOT

# what an actor does next, besides what takes a run
PUBLISH, PUT, FREE_TAIL, FREE_HEAD, DEAD = range(OTHERS, OTHERS + 5)

FAULTS = {
    "head-first": "a taker that finds no room frees the head before the tails that it has",
    "record-before-publishing": "the record is written before the block is PUBLISHING",
    "sweep-before-records": "the dead worker's blocks are freed before its records are read",
    "sweep-forgets-published": "heap_sweep leaves blocks that are PUBLISHING",
    "sweep-of-the-living": "a slot is swept while its process lives",
}


@dataclass(slots=True)
class Actor(Taker):
    """What a worker, or the host, is in the middle of."""

    sweep: int = -1  # the host: the slot that it sweeps
    place: int = 0  # and the extent that it looks at next


ROW, ACTOR = numbers_of(Actor), len(fields(Actor))
LISTS = 2 * EXTENTS + 3 * ACTOR  # where they begin in a frozen state


class Blocks(Runs):
    """One state of the extents. See the module."""

    FREE_HEAD = FREE_HEAD

    def __init__(self, fault: str = "", state: bytes | None = None) -> None:
        self.fault = fault
        if state is None:
            self.words = [[X_FREE, 0] for _ in range(EXTENTS)]
            self.actors = [Actor() for _ in range(3)]
            self.records: list[list[tuple[int, int]]] = [[], []]  # of each worker: (head, run)
            self.blocks: list[tuple[int, int]] = []  # HostBlock: (head, run)
        else:
            self.thaw(state)

    # ---- as bytes --------------------------------------------------------------------------------------

    def thaw(self, state: bytes) -> None:
        """Read what `raw` has written."""
        numbers = array("b", state).tolist()
        self.words = [numbers[i : i + 2] for i in range(0, 2 * EXTENTS, 2)]
        self.actors = [Actor(*numbers[i : i + ACTOR]) for i in range(2 * EXTENTS, LISTS, ACTOR)]
        take = iter(numbers[LISTS:]).__next__
        self.records = [[(take(), take()) for _ in range(take())] for _ in range(2)]
        self.blocks = [(take(), take()) for _ in range(take())]

    def raw(self) -> bytes:
        """All fields in a row, each list behind its length."""
        out = [number for word in self.words for number in word]
        for actor in self.actors:
            out += ROW(actor)
        for blocks in (*self.records, self.blocks):
            out.append(len(blocks))
            for block in blocks:
                out += block
        return array("b", out).tobytes()

    def freeze(self) -> bytes:
        """The workers have no order, nor have the host's blocks."""
        self.blocks.sort()
        one = self.raw()
        self.swap()
        other = self.raw()
        if one < other:
            self.swap()
        return min(one, other)

    def swap(self) -> None:
        """The same state with the workers renamed."""
        self.actors[:2] = reversed(self.actors[:2])
        self.records.reverse()
        for word in self.words:
            if word[0] not in (X_FREE, X_TAIL) and word[1] != HOST:
                word[1] = 1 - word[1]
        if self.actors[HOST].sweep >= 0:
            self.actors[HOST].sweep = 1 - self.actors[HOST].sweep

    def shown(self) -> dict[str, str]:
        """For traces."""
        found = {}
        for i, (state, of) in enumerate(self.words):
            whose = "" if state == X_FREE else f"({of})" if state == X_TAIL or of != HOST else "(host)"
            found[f"extent {i}"] = X_NAMES[state] + whose
        for s, records in enumerate(self.records):
            found[f"outbox {s}"] = " ".join(f"block {head}" for head, _ in records)
        return found

    # ---- what must hold --------------------------------------------------------------------------------

    def check(self) -> None:
        """Whoever thinks that a block is its own has every word of it, and nobody else has one of them."""
        held = [
            (a, actor.head, actor.run) for a, actor in enumerate(self.actors) if actor.at in (PUBLISH, PUT)
        ]
        held += [(s, *record) for s, records in enumerate(self.records) for record in records]
        held += [(HOST, *block) for block in self.blocks]
        for owner, head, run in held:
            state, of = self.words[head]
            tails = self.words[head + 1 : head + run]
            mine = state == X_HOST if owner == HOST else state in (X_PRIVATE, X_PUBLISHING)
            if not mine or of != owner or any(word != [X_TAIL, head] for word in tails):
                whose = "the host" if owner == HOST else f"worker {owner}"
                raise Broken(f"block {head} is {whose}'s, and its words say otherwise")

    def ended(self) -> bool:
        """Nobody holds anything, and every extent is free."""
        return (
            all(actor.at == IDLE and actor.sweep < 0 for actor in self.actors)
            and not self.blocks and not any(self.records)
            and all(word[0] == X_FREE for word in self.words)
        )  # fmt: skip

    # ---- what can happen -------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Of each actor."""
        found: list[Step] = []
        for a, actor in enumerate(self.actors):
            if a != HOST and actor.at != DEAD:
                found.append(Step(Blocks.crash, (a,)))
            if actor.at == IDLE and actor.sweep < 0 and (a != HOST or len(self.blocks) < HELD):
                for head in range(EXTENTS):
                    for run in RUNS:
                        if head + run <= EXTENTS and self.words[head][0] == X_FREE:
                            found.append(Step(Blocks.claim_head, (a, head, run)))
            elif actor.at in ACTS:
                found.append(Step(ACTS[actor.at], (a,)))
        host = self.actors[HOST]
        if host.at == IDLE and host.sweep < 0:
            for s, records in enumerate(self.records):
                if records:
                    found.append(Step(Blocks.heap_adopt, (s,)))
                if self.actors[s].at == DEAD or self.fault == "sweep-of-the-living":
                    found.append(Step(Blocks.settle, (s,)))
            for which in range(len(self.blocks)):
                found.append(Step(Blocks.heap_free, (which,)))
        elif host.at == IDLE:
            found.append(Step(Blocks.heap_sweep, (host.sweep,)))
        return found

    @step("", "worker {0} is killed")
    def crash(self, a: int) -> None:
        self.actors[a] = Actor(DEAD)

    # ---- taking ----------------------------------------------------------------------------------------

    def idle(self) -> Actor:
        return Actor()

    @step("_extent.pyx:try_run", "actor {0} has the whole run: it is its own")
    def own_head(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.head] = [X_HOST if a == HOST else X_PRIVATE, a]
        if a == HOST:
            self.blocks.append((actor.head, actor.run))
            self.actors[a] = Actor()
        else:
            actor.at = PUT if self.fault == "record-before-publishing" else PUBLISH

    # ---- handing over ----------------------------------------------------------------------------------

    @step("_extent.pyx:heap_publish", "worker {0} moves its block to PUBLISHING")
    def heap_publish(self, a: int) -> None:
        actor = self.actors[a]
        self.words[actor.head] = [X_PUBLISHING, a]
        actor.at = PUT
        if self.fault == "record-before-publishing":
            self.actors[a] = Actor()

    @step("_lease.pyx:commit,complete", "worker {0} writes the record that names its block")
    def put(self, a: int) -> None:
        actor = self.actors[a]
        self.records[a].append((actor.head, actor.run))
        if self.fault == "record-before-publishing":
            actor.at = PUBLISH
        else:
            self.actors[a] = Actor()

    @step(
        "_harvest.pyx:process,adopted; _extent.pyx:heap_adopt",
        "the host takes a record of worker {0}, and its block",
    )
    def heap_adopt(self, s: int) -> None:
        head, run = self.records[s].pop(0)
        if self.words[head] != [X_PUBLISHING, s]:
            raise Broken(f"a record of worker {s} names a block that is not there to be handed over")
        self.words[head] = [X_HOST, HOST]
        self.blocks.append((head, run))

    # ---- freeing ---------------------------------------------------------------------------------------

    @step("_extent.pyx:heap_free", "the host begins to free its block number {0}")
    def heap_free(self, which: int) -> None:
        head, _ = self.blocks.pop(which)
        self.words[head] = [X_FREEING, HOST]
        self.finish_free(head)

    def finish_free(self, head: int) -> None:
        """heap_run: the tails right behind the head that name it. Nobody else can change that."""
        end = head + 1
        while end < EXTENTS and self.words[end] == [X_TAIL, head]:
            end += 1
        host = self.actors[HOST]
        host.head, host.run, host.tail = head, end - head, end - 1
        host.at = FREE_TAIL if host.run > 1 else FREE_HEAD

    # ---- the sweep -------------------------------------------------------------------------------------

    @step("_harvest.pyx:settle_now", "the host settles worker {0}: first its records, then the sweep")
    def settle(self, s: int) -> None:
        if self.fault != "sweep-before-records":
            while self.records[s]:
                self.heap_adopt(s)
        self.actors[HOST].sweep = s

    @step(
        "_extent.pyx:heap_sweep",
        "the host looks at the next extent, and frees it if it is a head of worker {0}",
    )
    def heap_sweep(self, s: int) -> None:
        host = self.actors[HOST]
        if host.place == EXTENTS:
            if self.fault == "sweep-before-records":
                while self.records[s]:
                    self.heap_adopt(s)
            self.actors[HOST] = Actor()
            if self.actors[s].at == DEAD:
                self.actors[s] = Actor()  # a new process lives in the slot
            return
        state, of = self.words[host.place]
        forgotten = state == X_PUBLISHING and self.fault == "sweep-forgets-published"
        if of == s and state in (X_CLAIM, X_PRIVATE, X_PUBLISHING, X_FREEING) and not forgotten:
            self.finish_free(host.place)
        host.place += 1


ACTS = {
    TAKE_TAIL: Blocks.take_tail, OWN_HEAD: Blocks.own_head, DROP_TAIL: Blocks.drop_tail,
    DROP_HEAD: Blocks.drop_head, PUBLISH: Blocks.heap_publish, PUT: Blocks.put,
    FREE_TAIL: Blocks.free_tail, FREE_HEAD: Blocks.free_head,
}  # fmt: skip


def model(fault: str = "") -> partial[Blocks]:
    """Makes worlds of it."""
    return partial(Blocks, fault)
