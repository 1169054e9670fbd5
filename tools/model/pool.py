"""MemoryPool: processes that take and give equal blocks, die at any step, and sweep up after each other.

    process    pool_enroll (claim_row)  pool_take  pool_give
               sweep_batch: read a row, its process is dead · of each word: read it, read the row
               again, word -> FREE by CAS · clear the row by CAS
    world      kills a process at any moment; a new one comes, which is never one that was there before

The words and the names of the steps are those of runtime/_slab.pxd and _slab.pyx. Nobody supervises: whoever
lives may sweep, several at once. A tag is kept as what it is good for: a take makes every word that was read
before it stale.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, fields
from functools import partial

from tools.model.checker import Broken, Step, World, numbers_of, step

__all__ = ["FAULTS", "Pool", "model"]

WORDS = 2  # blocks
ROWS = 2  # of the owner table: fewer than processes, so they are used again
PROCESSES = 3  # that ever live, each with an identity of its own
FIRST = 2  # of them, those that live at the start; the last one comes when the rows may be full

UNBORN, ALIVE, DEAD = range(3)
FREE = -1  # a word; else the row of its owner
NOBODY = -1  # a row; else the number of a process
# what a process does next, in a sweep
IDLE, READ_WORD, READ_ROW, FREE_WORD, CLEAR_ROW = range(5)

FAULTS = {
    "tag-not-raised": "a take does not raise the tag, so a sweeper's old word still fits",
    "row-not-read-again": "sweep_batch does not look at the row again after it has read a word",
    "row-cleared-first": "sweep_batch clears the row before it has freed the words",
}


@dataclass(slots=True)
class Process:
    """What a process knows."""

    life: int = UNBORN
    row: int = -1
    holds: int = 0  # bits: the blocks that it has taken and not given
    at: int = IDLE
    dead: int = -1  # the process that it sweeps up after,
    of: int = -1  # in this row
    word: int = 0  # the next word
    fresh: int = 0  # whether nobody has taken that block since it was read


ROW = numbers_of(Process)


class Pool(World):
    """One state of a pool. See the module."""

    def __init__(self, fault: str = "", state: bytes | None = None) -> None:
        self.fault = fault
        numbers = array("b", state or b"").tolist()
        self.words = numbers[:WORDS] or [FREE] * WORDS
        self.owners = numbers[WORDS : WORDS + ROWS] or [NOBODY] * ROWS
        size, at = len(fields(Process)), WORDS + ROWS
        self.processes = [Process(*numbers[at + size * p : at + size * (p + 1)]) for p in range(PROCESSES)]
        if state is None:
            for process in self.processes[:FIRST]:
                process.life = ALIVE

    def raw(self) -> bytes:
        """All fields in a row."""
        out = [*self.words, *self.owners]
        for process in self.processes:
            out += ROW(process)
        return array("b", out).tobytes()

    freeze = raw

    def shown(self) -> dict[str, str]:
        """For traces."""
        words = {f"block {i}": "FREE" if row == FREE else f"OWNED({row})" for i, row in enumerate(self.words)}
        rows = {f"row {r}": "0" if p == NOBODY else f"process {p}" for r, p in enumerate(self.owners)}
        return {**words, **rows}

    def check(self) -> None:
        """A block is free, or held by who lives in its row, or its row names a process that is dead."""
        for p, process in enumerate(self.processes):
            for i in range(WORDS):
                if process.life == ALIVE and process.holds >> i & 1 and self.words[i] != process.row:
                    raise Broken(f"block {i} is taken from process {p}, which lives")
        for i, row in enumerate(self.words):
            if row == FREE:
                continue
            owner = self.owners[row]
            if owner == NOBODY or (
                self.processes[owner].life == ALIVE and not self.processes[owner].holds >> i & 1
            ):
                raise Broken(f"block {i} is lost: nobody who lives knows of it, and no row says who is dead")

    def ended(self) -> bool:
        """Every block is free, and nobody is in the middle of anything."""
        return self.words == [FREE] * WORDS and all(
            p.life != ALIVE or (p.at == IDLE and not p.holds) for p in self.processes
        )

    def steps(self) -> list[Step]:
        """Of each process, and of the world."""
        found: list[Step] = []
        alive = sum(process.life == ALIVE for process in self.processes)
        for p, process in enumerate(self.processes):
            if process.life == UNBORN and (p == 0 or self.processes[p - 1].life != UNBORN):
                found.append(Step(Pool.born, (p,)))
            if process.life != ALIVE:
                continue
            if alive > 1:  # the last one is left to tidy up
                found.append(Step(Pool.die, (p,)))
            if process.at != IDLE:
                found.append(Step(SWEEP[process.at], (p,)))
                continue
            for r, owner in enumerate(self.owners):
                if process.row < 0 and owner == NOBODY:
                    found.append(Step(Pool.claim_row, (p, r)))
                elif owner not in (NOBODY, p) and self.processes[owner].life == DEAD:
                    found.append(Step(Pool.sweep, (p, r)))
            for i, row in enumerate(self.words):
                if process.holds >> i & 1:
                    found.append(Step(Pool.give, (p, i)))
                elif process.row >= 0 and row == FREE:
                    found.append(Step(Pool.take, (p, i)))
        return found

    @step("", "process {0} is killed")
    def die(self, p: int) -> None:
        self.processes[p] = Process(DEAD)

    @step("", "process {0} comes")
    def born(self, p: int) -> None:
        self.processes[p].life = ALIVE

    @step("_slab.pyx:pool_enroll,claim_row", "process {0} claims row {1}")
    def claim_row(self, p: int, r: int) -> None:
        self.owners[r] = p
        self.processes[p].row = r

    @step("_slab.pxd:pool_take", "process {0} takes block {1}")
    def take(self, p: int, i: int) -> None:
        process = self.processes[p]
        self.words[i] = process.row
        process.holds |= 1 << i
        for other in self.processes:
            if other.word == i and self.fault != "tag-not-raised":
                other.fresh = 0

    @step("_slab.pxd:pool_give", "process {0} gives block {1} back")
    def give(self, p: int, i: int) -> None:
        self.words[i] = FREE
        self.processes[p].holds &= ~(1 << i)

    # ---- sweep_batch -----------------------------------------------------------------------------------

    @step("_slab.pyx:sweep_batch", "process {0} reads row {1}, whose process is dead")
    def sweep(self, p: int, r: int) -> None:
        process = self.processes[p]
        process.dead, process.of, process.word, process.fresh = self.owners[r], r, 0, 0
        process.at = CLEAR_ROW if self.fault == "row-cleared-first" else READ_WORD

    @step("_slab.pyx:sweep_batch", "process {0} reads the next word")
    def read_word(self, p: int) -> None:
        process = self.processes[p]
        if self.words[process.word] != process.of:
            self.next_word(process)
            return
        process.fresh = 1
        process.at = FREE_WORD if self.fault == "row-not-read-again" else READ_ROW

    def next_word(self, process: Process) -> None:
        process.word, process.fresh, process.at = process.word + 1, 0, READ_WORD
        if process.word == WORDS:
            process.word, process.at = 0, CLEAR_ROW
            if self.fault == "row-cleared-first":
                self.done(process)

    def done(self, process: Process) -> None:
        process.at, process.dead, process.of, process.word, process.fresh = IDLE, -1, -1, 0, 0

    @step("_slab.pyx:sweep_batch", "process {0} reads the row again: does it still name the dead one?")
    def read_row(self, p: int) -> None:
        process = self.processes[p]
        if self.owners[process.of] == process.dead:
            process.at = FREE_WORD
        else:
            self.next_word(process)

    @step("_slab.pyx:sweep_batch", "process {0} frees the block, if its word is the one that was read")
    def free_word(self, p: int) -> None:
        process = self.processes[p]
        if process.fresh and self.words[process.word] == process.of:
            self.words[process.word] = FREE
        self.next_word(process)

    @step("_slab.pyx:sweep_batch", "process {0} clears the row, if it still names the dead one")
    def clear_row(self, p: int) -> None:
        process = self.processes[p]
        if self.owners[process.of] == process.dead:
            self.owners[process.of] = NOBODY
        if self.fault == "row-cleared-first":
            process.at = READ_WORD
        else:
            self.done(process)


SWEEP = {
    READ_WORD: Pool.read_word, READ_ROW: Pool.read_row, FREE_WORD: Pool.free_word, CLEAR_ROW: Pool.clear_row,
}  # fmt: skip


def model(fault: str = "") -> partial[Pool]:
    """Makes worlds of it."""
    return partial(Pool, fault)
