"""What the model of leases is made of: the words, what hangs on them, and what must hold in every state.

The steps are in leases.py.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields
from operator import length_hint

from tools.model.checker import Broken, World

# lease words, _layout.pxd
L_FREE, L_LEASED, L_RUNNING, L_DONE, L_KILLED = range(5)
L_NAMES = ("FREE", "LEASED", "RUNNING", "DONE", "KILLED")
# slot_t.state, _layout.pxd
S_FREE, S_LIVE, S_DYING = range(3)
# Task.state, _records.pxd; the last one is of this model: an item of a chunk that another item leads
T_WAITING, T_LEASED, T_OVER, T_CANCELLED, T_IN_CHUNK = range(5)
# records, _layout.pxd
R_DONE, R_PARTIAL, R_UNKEEP, R_KEEP = 1, 2, 3, 6
OF_BLOCKS = (R_UNKEEP, R_KEEP)  # they name a block, the others a lease
# extent words, _layout.pxd, of the worker's blocks; tools/model/blocks.py looks closer. 0: there is none
X_NONE, X_PRIVATE, X_PUBLISHING, X_HOST, X_FREEING = 0, 2, 3, 4, 5
X_NAMES = {X_NONE: "-", X_PRIVATE: "PRIVATE", X_PUBLISHING: "PUBLISHING", X_HOST: "HOST", X_FREEING: "freed"}
LATE = 2  # instead of fresh: a record of a lease that was harvested before it was put
OWN = 8  # block OWN + t was made by task t in the region; block t holds the arguments of task t

# of this model: the process in a slot
NOBODY, ALIVE, DOOMED, DEAD = range(4)
P_NAMES = ("none", "alive", "alive, SIGKILL on its way", "dead")
# where a worker is: what it does next
LOOK, CLAIM, BEGIN, END, PUT_PART, ADVANCE, PUBLISH, HAND_OVER, PUT_KEEP, COMPLETE, PUT_DONE = range(11)
# what the host is in the middle of
IDLE, CANCELLING = range(2)
# where the keeper is
ASLEEP, READ_WORD, READ_CLOCK, KILL, SIGNAL = range(5)
SLEEPING = (ASLEEP, -1, -1, -1, -1, 0)  # at, slot, entry, item that is late, item of the word, fresh
# who holds a slot's guard
OPEN, BY_KEEPER, BY_HOST = range(3)
# outcomes
PENDING, RESULT, DIED, TIMED_OUT, CANCELLED = range(5)
OUTCOMES = ("pending", "result", "WorkerDied", "TaskTimeout", "cancelled")

ENTRIES = 2  # of a lease table: one runs, one waits behind it


@dataclass(slots=True)
class Lease:
    """lease_t: the word, and those fields on which something depends."""

    state: int = L_FREE
    item: int = 0
    task: int = -1  # whose arguments lie in it
    started: int = 0  # 1 + the item whose clock runs, 0: it stands
    block: int = X_NONE  # of the result: the word of the block that out_body names
    out: int = 0  # items whose results are in the final frame
    own: int = X_NONE  # the word of a block that the task has made itself, to which the frame refers
    ref: int = 0  # 1 + a block of an earlier lease to which the frame refers

    def word(self) -> str:
        item = f"({self.item})" if self.state in (L_RUNNING, L_DONE, L_KILLED) else ""
        return L_NAMES[self.state] + item


@dataclass(slots=True)
class Slot:
    """slot_t, the process in it, and what the host notes about it (SlotTable, guard_t)."""

    state: int = S_LIVE
    process: int = ALIVE
    crashed: int = 0  # it was killed from outside, not by the host
    killing: int = 0  # guard_t.killing
    guard: int = OPEN  # guard_t.lock
    at: int = LOOK
    hand: int = -1  # the entry that the worker has taken from its ring
    fresh: int = 0  # whether that place is of the entry's last lease
    runs: int = -1  # the task that the worker believes to run
    sent: int = 0  # items of it that were committed
    part: int = X_NONE  # the word of the block of a commit under way
    ref: int = 0  # 1 + what the outcome under way refers to: it holds the view of that (BlockSlice.holder)
    late: int = 0  # the lease whose record is not put yet was harvested without it
    ring: list[tuple[int, int]] = field(default_factory=list)  # (entry, fresh)
    # (kind, entry or block that is named, fresh, word of the results' block)
    outbox: list[tuple[int, int, int, int]] = field(default_factory=list)
    views: list[int] = field(default_factory=list)  # blocks that the process sees beyond a lease
    kept: list[int] = field(default_factory=list)  # SlotTable.kept: blocks
    leases: list[Lease] = field(default_factory=list)


@dataclass(slots=True)
class Task:
    """Task, and what has become of it. The first item of a chunk leads it: slot .. reason are its own."""

    state: int = T_WAITING
    slot: int = -1
    entry: int = -1
    count: int = 1
    delivered: int = 0
    claimed: int = 0  # a worker has claimed this lease
    killed: int = -1  # the item by which it was resolved while its process was still to die
    reason: int = 0  # 1: it was killed because it was cancelled
    asked: int = 0  # the user has cancelled it: no further attempt (Task.unwanted)
    attempt: int = 1
    alone: int = 0
    begun: int = 0  # executions
    losses: int = 0  # of them, those that left no result or one to retry on
    outcome: int = PENDING


@dataclass(frozen=True)
class Spec:
    """A task, or an item of a map. Those with the same `batch` >= 0 go out in one chunk."""

    timeout: bool = False
    retries: int = 0
    retry_timeouts: bool = False
    cancel: bool = False  # the user cancels it at some moment, running or not
    keeps: bool = False  # a view of its arguments outlives the call
    raises: bool = False  # its first attempt raises what it is retried on
    own: bool = False  # its result lies in a block that it has made in the region
    sees: bool = False  # and the worker goes on seeing that
    refers: bool = False  # its result refers to what the worker sees since an earlier call, if it does
    batch: int = -1


@dataclass(frozen=True)
class Scenario:
    """What the users and the world may do."""

    specs: tuple[Spec, ...]
    crashes: int = 1  # processes that are killed from outside, at most
    collects: bool = False  # the host looks for leases that are DONE without a record
    lanes: bool = False  # both slots are of one process: they live, are killed and are swept together


class LeaseState(World):
    """One state of leases, slots and tasks."""

    def __init__(self, scenario: Scenario, fault: str = "", state: bytes | None = None) -> None:
        self.scenario, self.fault = scenario, fault
        if state is None:
            self.slots = [Slot(leases=[Lease() for _ in range(ENTRIES)]) for _ in range(2)]
            self.tasks = [Task() for _ in scenario.specs]
            self.host = [IDLE, -1]  # what it does, slot
            self.keeper = list(SLEEPING)
            self.crashes = scenario.crashes
        else:
            self.thaw(state)

    # ---- as bytes --------------------------------------------------------------------------------------

    def thaw(self, state: bytes) -> None:
        """Read what `raw` has written."""
        numbers = array("b", state).tolist()
        self.crashes, self.host, self.keeper = numbers[0], numbers[1:3], numbers[3:9]
        self.tasks, at = [], 9
        for _ in self.scenario.specs:
            self.tasks.append(Task(*numbers[at : at + TASK]))
            at += TASK
        first, at = thaw_slot(numbers, at)
        second, at = thaw_slot(numbers, at)
        self.slots = [first, second]

    def raw(self) -> bytes:
        """All fields in a row."""
        return self.written([frozen_slot(slot) for slot in self.slots])

    def written(self, slots: list[list[int]]) -> bytes:
        out = [self.crashes, *self.host, *self.keeper]
        for t in self.tasks:
            out += (t.state, t.slot, t.entry, t.count, t.delivered, t.claimed, t.killed, t.reason, t.asked,
                    t.attempt, t.alone, t.begun, t.losses, t.outcome)  # fmt: skip
        for slot in slots:
            out += slot
        return array("b", out).tobytes()

    def freeze(self) -> bytes:
        """Slots have no order, nor have the entries of one: the smallest of the names that they may have."""
        for number, slot in enumerate(self.slots):
            if swapped(slot):
                self.swap_entries(number)
        slots = [frozen_slot(slot) for slot in self.slots]
        if slots[1] < slots[0]:
            slots.reverse()
            self.slots.reverse()
            for task in self.tasks:
                if task.slot >= 0:
                    task.slot = 1 - task.slot
            for owner in (self.host, self.keeper):
                if owner[1] >= 0:
                    owner[1] = 1 - owner[1]
        return self.written(slots)

    def swap_entries(self, number: int) -> None:
        """The same state with the two entries of a slot renamed."""
        slot = self.slots[number]
        slot.leases.reverse()
        slot.ring = [(1 - entry, fresh) for entry, fresh in slot.ring]
        slot.outbox = [(r[0], r[1] if r[0] in OF_BLOCKS else 1 - r[1], r[2], r[3]) for r in slot.outbox]
        if slot.hand >= 0:
            slot.hand = 1 - slot.hand
        for task in self.tasks:
            if task.slot == number:
                task.entry = 1 - task.entry
        if self.keeper[1] == number:
            self.keeper[2] = 1 - self.keeper[2]

    def shown(self) -> dict[str, str]:
        """For traces."""
        found = {}
        for s, slot in enumerate(self.slots):
            found[f"worker {s}"] = P_NAMES[slot.process]
            for e, lease in enumerate(slot.leases):
                of = f" task {lease.task}" if lease.task >= 0 else ""
                found[f"lease {s}.{e}"] = lease.word() + of
                found[f"block of {s}.{e}"] = X_NAMES[lease.block]
                found[f"own block of {s}.{e}"] = X_NAMES[lease.own]
            found[f"ring {s}"] = " ".join(f"{e}{'' if fresh else ' (stale)'}" for e, fresh in slot.ring)
            kinds = {R_DONE: "DONE", R_PARTIAL: "PARTIAL", R_UNKEEP: "UNKEEP", R_KEEP: "KEEP"}
            found[f"outbox {s}"] = " ".join(f"{kinds[r[0]]}:{r[1]}" for r in slot.outbox)
            found[f"kept {s}"] = " ".join(map(str, slot.kept))
        for t, task in enumerate(self.tasks):
            if task.outcome:
                found[f"task {t}"] = OUTCOMES[task.outcome]
        return found

    def lanes(self, s: int) -> list[Slot]:
        """The slots of the process in slot s."""
        return self.slots if self.scenario.lanes else [self.slots[s]]

    # ---- what must hold --------------------------------------------------------------------------------

    def check(self) -> None:
        """Properties of every state."""
        running: set[int] = set()
        for slot in self.slots:
            if slot.process not in (ALIVE, DOOMED):
                continue
            runs = BEGIN <= slot.at <= COMPLETE and not slot.late
            if runs:
                if slot.runs in running:
                    raise Broken(f"two workers run task {slot.runs} at the same time")
                running.add(slot.runs)
                if slot.leases[slot.hand].task != slot.runs:
                    raise Broken(f"the entry of task {slot.runs} is given back while a worker runs it")
            for block in (*slot.views, *([slot.runs] if runs else [])):
                if not self.held(block):
                    what = f"arguments of task {block}" if block < OWN else f"pages of task {block - OWN}"
                    raise Broken(f"the {what} are freed while a worker has a view of them")
        held = [(t.slot, t.entry) for t in self.tasks if t.entry >= 0]
        if len(held) != len(set(held)):
            raise Broken("two tasks hold the same entry")
        for s, slot in enumerate(self.slots):
            for e, lease in enumerate(slot.leases):
                if lease.state != L_FREE and (s, e) not in held:
                    raise Broken(f"lease {s}.{e} is {lease.word()}, and no task of the host's holds it")

    def held(self, block: int) -> bool:
        """Whether a block is not free: the host has a reference to it, or it is its worker's still."""
        if any(block in slot.kept for slot in self.slots):
            return True
        if block >= OWN:
            word = self.own_word(block)
            return word not in (X_NONE, X_FREEING)
        task = self.tasks[block]
        return task.entry >= 0 or task.state in (T_WAITING, T_IN_CHUNK)

    def own_word(self, block: int) -> int:
        """Of a block that a task has made, as long as its lease is not harvested."""
        of = [lease.own for slot in self.slots for lease in slot.leases if lease.task == block - OWN]
        return next(filter(None, of), X_NONE)

    def ended(self) -> bool:
        """Every task has its outcome; every entry, block and view has come back; every slot has a worker."""
        return (
            all(t.outcome and t.entry < 0 for t in self.tasks)
            and self.host[0] == IDLE and self.keeper[0] == ASLEEP
            and all(
                s.state == S_LIVE and s.process == ALIVE and s.at == LOOK
                and s.guard == OPEN and not s.killing and s.part == X_NONE and not s.late
                and not (s.ring or s.outbox or s.views or s.kept)
                and all(lease == EMPTY for lease in s.leases)
                for s in self.slots
            )
        )  # fmt: skip

    def finish(self, number: int, outcome: int) -> None:
        """The outcome of a task or an item, once."""
        if self.tasks[number].outcome != PENDING:
            raise Broken(f"task {number} gets a second outcome")
        self.tasks[number].outcome = outcome


EMPTY = Lease()


# ---- a slot as numbers -----------------------------------------------------------------------------------

TASK, SLOT, LEASE = len(fields(Task)), 13, len(fields(Lease))


def frozen_slot(s: Slot) -> list[int]:
    """All fields of a slot in a row; then the lists, each behind its length, if any has something in it."""
    out = [s.state, s.process, s.crashed, s.killing, s.guard, s.at, s.hand, s.fresh, s.runs, s.sent, s.part,
           s.ref, s.late]  # fmt: skip
    for x in s.leases:
        out += (x.state, x.item, x.task, x.started, x.block, x.out, x.own, x.ref)
    if not (s.ring or s.outbox or s.views or s.kept):
        out.append(0)
        return out
    out.append(1)
    for tuples in (s.ring, s.outbox):
        out.append(len(tuples))
        for one in tuples:
            out += one
    for blocks in (s.views, s.kept):
        out.append(len(blocks))
        out += blocks
    return out


def thaw_slot(numbers: list[int], at: int) -> tuple[Slot, int]:
    """A slot of what frozen_slot has written, and where that ends."""
    end = at + SLOT + 2 * LEASE
    plain, second = numbers[at : at + SLOT], end - LEASE
    leases = [Lease(*numbers[at + SLOT : second]), Lease(*numbers[second:end])]
    if not numbers[end]:
        return Slot(*plain, [], [], [], [], leases), end + 1  # type: ignore[call-arg, arg-type]
    left = iter(numbers[end + 1 :])
    take = left.__next__
    ring = [(take(), take()) for _ in range(take())]
    outbox = [(take(), take(), take(), take()) for _ in range(take())]
    views, kept = ([take() for _ in range(take())] for _ in range(2))
    slot = Slot(*plain, ring, outbox, views, kept, leases)  # type: ignore[call-arg, arg-type]
    return slot, len(numbers) - length_hint(left)


def swapped(slot: Slot) -> bool:
    """Whether the entries of a slot stand in the other order than the one they are stored in."""
    first, second = slot.leases
    if first.state != second.state or first.task != second.task:
        return (second.state, second.task) < (first.state, first.task)
    if slot.hand >= 0:
        return slot.hand == 0
    if slot.ring:
        return slot.ring[0][0] == 0
    return next((record[1] == 0 for record in slot.outbox if record[0] not in OF_BLOCKS), False)
