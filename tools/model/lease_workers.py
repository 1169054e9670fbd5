"""The steps of workers, of the world around them, and of the host's deadline keeper. See leases.py."""

from __future__ import annotations

from collections.abc import Iterator

from tools.model.checker import Broken, Step, step
from tools.model.lease_state import (
    ADVANCE,
    ALIVE,
    ASLEEP,
    BEGIN,
    BY_KEEPER,
    CLAIM,
    COMPLETE,
    DEAD,
    DOOMED,
    END,
    HAND_OVER,
    KILL,
    L_DONE,
    L_KILLED,
    L_LEASED,
    L_RUNNING,
    LATE,
    LOOK,
    OPEN,
    OWN,
    PUBLISH,
    PUT_DONE,
    PUT_KEEP,
    PUT_PART,
    R_DONE,
    R_KEEP,
    R_PARTIAL,
    R_UNKEEP,
    READ_CLOCK,
    READ_WORD,
    S_LIVE,
    SIGNAL,
    SLEEPING,
    X_NONE,
    X_PRIVATE,
    X_PUBLISHING,
    Lease,
    LeaseState,
    Slot,
    Spec,
)

TOO_LATE = ("keep-after-done", "own-after-done")  # faults: the host is told of blocks after DONE


class LeaseWorkers(LeaseState):
    """All that does not happen under the host's GIL."""

    def worker_steps(self, s: int, slot: Slot) -> Iterator[Step]:
        if slot.at != LOOK or slot.ring:
            if slot.at == END and slot.leases[slot.hand].item + 1 < self.tasks[slot.runs].count:
                yield Step(LeaseWorkers.end_and_commit, (s,))
                yield Step(LeaseWorkers.end_and_go_on, (s,))
            else:
                yield Step(WORKER[slot.at], (s,))
        for block in sorted(set(slot.views)):
            if self.may_go(slot, block):
                yield Step(LeaseWorkers.unkeep, (s, block))

    def may_go(self, slot: Slot, block: int) -> bool:
        """Whether nothing of the lease under way holds the view of a block."""
        telling = (HAND_OVER, PUT_KEEP, COMPLETE) if self.fault in TOO_LATE else (HAND_OVER, PUT_KEEP)
        if slot.at in telling and block % OWN == slot.runs:
            return False  # the host is just being told of it
        return slot.at <= END or block + 1 != slot.ref or self.fault == "unkeep-before-record"

    def keeper_steps(self) -> Iterator[Step]:
        at, s, _, _, _, _ = self.keeper
        if at == ASLEEP:
            for s, slot in enumerate(self.slots):
                for e, lease in enumerate(slot.leases):
                    if slot.state == S_LIVE and lease.started and self.spec(lease).timeout:
                        yield Step(LeaseWorkers.deadline_passes, (s, e))
        elif at != KILL or self.slots[s].guard == OPEN:
            yield Step(KEEPER[at])

    def spec(self, lease: Lease) -> Spec:
        """Of the item that a lease is at."""
        return self.scenario.specs[lease.task + max(lease.started - 1, 0)]

    # ---- the world -------------------------------------------------------------------------------------

    @step("", "worker {0} is killed from outside")
    def crash(self, s: int) -> None:
        self.crashes -= 1
        for slot in self.lanes(s):
            slot.crashed = 1
        self.dead(s)

    @step("", "the SIGKILL for worker {0} arrives")
    def signal_arrives(self, s: int) -> None:
        self.dead(s)

    def dead(self, s: int) -> None:
        """The process is gone, and with it all that was its own: what it knew, and its views."""
        for slot in self.lanes(s):
            slot.process, slot.at, slot.hand, slot.fresh, slot.runs, slot.sent = DEAD, LOOK, -1, 0, -1, 0
            slot.views, slot.ref, slot.late = [], 0, 0

    # ---- a worker --------------------------------------------------------------------------------------

    @step("_lease.pxd:ring_take", "worker {0} takes a place from its ring")
    def ring_take(self, s: int) -> None:
        slot = self.slots[s]
        slot.hand, slot.fresh = slot.ring.pop(0)
        slot.at = CLAIM

    @step("_lease.pyx:claim", "worker {0} claims what the place names, if it is still LEASED")
    def claim(self, s: int) -> None:
        slot = self.slots[s]
        lease = slot.leases[slot.hand]
        if self.fault != "claim-by-store" and not (slot.fresh and lease.state == L_LEASED):
            slot.at, slot.hand, slot.fresh = LOOK, -1, 0
            return
        lease.state, lease.item = L_RUNNING, 0
        slot.runs, slot.sent, slot.at = lease.task, 0, BEGIN
        self.tasks[lease.task].claimed = 1

    @step("_lease.pyx:begin", "worker {0} reads the arguments and begins to run")
    def begin(self, s: int) -> None:
        slot = self.slots[s]
        lease = slot.leases[slot.hand]
        lease.started = 1 + lease.item
        number = slot.runs + lease.item
        task, spec = self.tasks[number], self.scenario.specs[number]
        if task.begun > task.losses:
            raise Broken(f"task {number} runs again, although no worker was lost with it")
        if spec.batch < 0 and task.begun > spec.retries:
            raise Broken(f"task {number} runs more often than its attempts allow")
        task.begun += 1
        slot.at = END

    @step("_lease.pyx:end,finish", "worker {0} has run it, and moves a block with the result to PUBLISHING")
    def end(self, s: int) -> None:
        slot = self.slots[s]
        lease = slot.leases[slot.hand]
        lease.started, lease.block = 0, X_PUBLISHING
        lease.out = lease.item + 1 - slot.sent
        spec = self.scenario.specs[slot.runs]
        if spec.own:  # _lease.pyx:empty, while it ran
            lease.own, slot.ref = X_PRIVATE, 1 + OWN + slot.runs
        elif spec.refers and slot.views:
            lease.ref = slot.ref = 1 + min(slot.views)
        if spec.keeps or spec.sees:
            slot.views.append(slot.runs + OWN * spec.sees)
        if self.fault == "publish-after-done":
            lease.block = X_PRIVATE
        slot.at = COMPLETE if self.fault in TOO_LATE else self.after_end(spec)

    @staticmethod
    def after_end(spec: Spec) -> int:
        return HAND_OVER if spec.own else PUT_KEEP if spec.keeps else COMPLETE

    @step("_lease.pyx:hand_over", "worker {0} moves the block that the task has made to PUBLISHING")
    def hand_over(self, s: int) -> None:
        slot = self.slots[s]
        slot.leases[slot.hand].own = X_PUBLISHING
        slot.at = PUT_KEEP if self.scenario.specs[slot.runs].sees else self.told(slot)

    @step("_lease.pyx:keep", "worker {0} puts a record of what it goes on seeing into its outbox")
    def put_keep(self, s: int) -> None:
        slot = self.slots[s]
        slot.outbox.append((R_KEEP, slot.runs + OWN * self.scenario.specs[slot.runs].sees, 1, 0))
        slot.at = self.told(slot)

    def told(self, slot: Slot) -> int:
        """What comes when the host knows of all blocks."""
        return PUT_DONE if self.fault in TOO_LATE else COMPLETE

    @step("_lease.pyx:complete", "worker {0} moves RUNNING to DONE; if that fails it was killed, and exits")
    def complete(self, s: int) -> None:
        slot = self.slots[s]
        lease = slot.leases[slot.hand]
        if lease.state != L_RUNNING:
            self.dead(s)
            return
        lease.state = L_DONE
        lease.item += 1
        slot.at = PUBLISH if self.fault == "publish-after-done" else PUT_DONE
        if self.fault in TOO_LATE:
            slot.at = self.after_end(self.scenario.specs[slot.runs])
            slot.at = PUT_DONE if slot.at == COMPLETE else slot.at

    @step("", "worker {0} moves the result's block to PUBLISHING only now")
    def publish_late(self, s: int) -> None:
        slot = self.slots[s]
        slot.leases[slot.hand].block = X_PUBLISHING
        slot.at = PUT_DONE

    @step("_lease.pyx:complete", "worker {0} puts the record of it into its outbox")
    def put_done(self, s: int) -> None:
        slot = self.slots[s]
        slot.outbox.append((R_DONE, slot.hand, LATE if slot.late else 1, 0))
        slot.at, slot.hand, slot.fresh, slot.runs, slot.sent = LOOK, -1, 0, -1, 0
        slot.ref = slot.late = 0

    @step(
        "_lease.pyx:end,commit", "worker {0} has run an item, and moves a block with its result to PUBLISHING"
    )
    def end_and_commit(self, s: int) -> None:
        slot = self.slots[s]
        slot.leases[slot.hand].started = 0
        slot.part, slot.at = X_PUBLISHING, PUT_PART

    @step("_lease.pyx:end", "worker {0} has run an item, and keeps its result for later")
    def end_and_go_on(self, s: int) -> None:
        slot = self.slots[s]
        slot.leases[slot.hand].started = 0
        slot.at = ADVANCE

    @step("_lease.pyx:commit", "worker {0} puts the record of the commit into its outbox")
    def put_part(self, s: int) -> None:
        slot = self.slots[s]
        slot.outbox.append((R_PARTIAL, slot.hand, 1, slot.part))
        slot.part, slot.at = X_NONE, ADVANCE
        slot.sent = slot.leases[slot.hand].item + 1

    @step(
        "_lease.pyx:advance", "worker {0} moves on to the next item; if that fails it was killed, and exits"
    )
    def advance(self, s: int) -> None:
        slot = self.slots[s]
        lease = slot.leases[slot.hand]
        if lease.state != L_RUNNING:
            self.dead(s)
            return
        lease.item += 1
        slot.at = BEGIN

    @step("_lease.pyx:unkeep", "in worker {0} the last view of block {1} goes")
    def unkeep(self, s: int, block: int) -> None:
        slot = self.slots[s]
        slot.views.remove(block)
        slot.outbox.append((R_UNKEEP, block, 1, 0))

    # ---- the host's deadline keeper --------------------------------------------------------------------

    @step("_threads.pyx:look", "the keeper looks at the clock: what lease {0}.{1} runs is late by it")
    def deadline_passes(self, s: int, e: int) -> None:
        # What starts after this look at the clock is not late by it: its start is greater than `now`.
        self.keeper = [READ_WORD, s, e, self.slots[s].leases[e].started - 1, -1, 0]
        if self.fault == "clock-before-word":
            self.keeper[0] = READ_CLOCK

    @step("_threads.pyx:overdue", "the keeper reads the word")
    def read_word(self) -> None:
        _, s, e, late, _, _ = self.keeper
        lease = self.slots[s].leases[e]
        if lease.state != L_RUNNING:
            self.keeper_sleeps()
            return
        after = KILL if self.fault == "clock-before-word" else READ_CLOCK
        self.keeper = [after, s, e, late, lease.item, 1]

    @step("_threads.pyx:overdue", "the keeper reads when the item started")
    def read_clock(self) -> None:
        _, s, e, late, item, fresh = self.keeper
        if late < 0 or self.slots[s].leases[e].started != late + 1:
            self.keeper_sleeps()  # nothing runs there, or what runs has started later
            return
        after = READ_WORD if self.fault == "clock-before-word" else KILL
        self.keeper = [after, s, e, late, item, fresh]

    @step(
        "_threads.pyx:overdue,kill_lease",
        "the keeper, under the guard, moves RUNNING to KILLED, if it still can",
    )
    def kill_lease(self) -> None:
        _, s, e, late, item, fresh = self.keeper
        slot = self.slots[s]
        lease = slot.leases[e]
        if slot.state == S_LIVE and fresh and lease.state == L_RUNNING and lease.item == item:
            if late != item:
                raise Broken("an item is killed whose deadline has not passed")
            lease.state = L_KILLED
        elif slot.state != S_LIVE or self.fault != "kill-after-lost-race":
            self.keeper_sleeps()
            return
        self.keeper = [SIGNAL, s, e, -1, -1, 0]
        for lane in self.lanes(s):
            lane.guard = BY_KEEPER

    @step("_threads.pyx:kill_lease", "the keeper sends SIGKILL, and lets the guard go")
    def send_kill(self) -> None:
        s = self.keeper[1]
        self.keeper_sleeps()
        self.signal(s)

    def keeper_sleeps(self) -> None:
        self.keeper = list(SLEEPING)

    def signal(self, s: int) -> None:
        """kill_lease, its last lines."""
        for slot in self.lanes(s):
            slot.killing, slot.guard = 1, OPEN
            if slot.process == ALIVE:
                slot.process = DOOMED


WORKER = {
    HAND_OVER: LeaseWorkers.hand_over, PUT_KEEP: LeaseWorkers.put_keep,
    LOOK: LeaseWorkers.ring_take, CLAIM: LeaseWorkers.claim, BEGIN: LeaseWorkers.begin, END: LeaseWorkers.end,
    PUT_PART: LeaseWorkers.put_part, ADVANCE: LeaseWorkers.advance, PUBLISH: LeaseWorkers.publish_late,
    COMPLETE: LeaseWorkers.complete, PUT_DONE: LeaseWorkers.put_done,
}  # fmt: skip
KEEPER = {
    READ_WORD: LeaseWorkers.read_word, READ_CLOCK: LeaseWorkers.read_clock,
    KILL: LeaseWorkers.kill_lease, SIGNAL: LeaseWorkers.send_kill,
}  # fmt: skip
