"""Leases: two workers, and a host with two threads: Python's (the GIL makes it one) and the deadline keeper.

    host       publish  take_back  cancel  drain (harvest, partial, kept)  collect_now  unload_now
               vacate  settle_now  open_slot
    keeper     overdue: look at the clock, word, start of the item, then kill_lease under the guard
    worker     claim  begin  end  commit  advance  finish  hand_over  keep  complete;  a view's end: unkeep
    world      crash: SIGKILL from outside, at any moment;  a signal that was sent arrives

The words, their values and the names of the steps are those of runtime/_layout.pxd, _records.pxd and of the
functions that each step names. Every step does at most one thing that another actor could see; what is
merged, and why that hides nothing, is in docs/model.md ("What is left out").

A tag is kept as what it is good for: whether a reference to an entry (a place in the ring, a record, what the
keeper has read) is of the entry's last lease. A new lease makes all older references stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tools.model.checker import Broken, Step, step
from tools.model.lease_state import (
    ALIVE,
    BY_HOST,
    CANCELLED,
    CANCELLING,
    DEAD,
    DIED,
    DOOMED,
    EMPTY,
    ENTRIES,
    IDLE,
    L_DONE,
    L_KILLED,
    L_LEASED,
    L_RUNNING,
    LATE,
    NOBODY,
    OF_BLOCKS,
    OPEN,
    OWN,
    PUT_DONE,
    PUT_KEEP,
    R_DONE,
    R_KEEP,
    RESULT,
    S_DYING,
    S_FREE,
    S_LIVE,
    T_IN_CHUNK,
    T_LEASED,
    T_OVER,
    T_WAITING,
    TIMED_OUT,
    X_FREEING,
    X_HOST,
    X_NONE,
    X_PUBLISHING,
    Lease,
    Scenario,
    Slot,
    Spec,
)
from tools.model.lease_workers import LeaseWorkers

__all__ = ["FAULTS", "SCENARIOS", "Leases", "model"]

FAULTS = {
    "kill-after-lost-race": "kill_lease signals although its CAS has lost against DONE",
    "free-before-death": "unload_now gives entry and arguments back while the killed process still lives",
    "sweep-before-harvest": "settle_now frees the dead worker's blocks before it harvests its DONE leases",
    "claim-by-store": "claim writes RUNNING without asking whether the word is still LEASED",
    "retry-before-death": "a task is retried after its deadline while the killed process still lives",
    "publish-after-done": "finish moves the block to PUBLISHING only after DONE",
    "clock-before-word": "overdue reads the start of the item before the word",
    "blame-the-waiting": "settle_task blames leases that were only LEASED",
    "answer-after-killed": "partial takes a result of a lease that was killed and resolved",
    "guessed-death": "a worker that was sent SIGKILL is taken for dead before its pidfd says so",
    "retry-without-end": "a task that dies with its worker is retried, attempts left or not",
    "put-back-delivered": "items of a chunk that were delivered are queued again with the rest",
    "kept-once": "kept holds a block once, however many views of it outlive their calls",
    "keep-after-done": "finish says only after DONE what the worker goes on seeing",
    "own-after-done": "finish hands the task's own block over only after DONE",
    "collect-without-drain": "collect_now harvests a DONE lease without a look at the outbox",
    "sweep-skips-keeps": "settle_now drops the records of what the dead worker went on seeing",
    "blame-the-neighbour": "blame counts a death that was for another task's sake against the one beside it",
    "unkeep-before-record": "a result does not hold the view of what it refers to until its record is put",
}


SCENARIOS = {
    "leases: deadline": Scenario((Spec(timeout=True), Spec())),  # and a neighbour: Spec()
    # a call that is run again after its deadline or a death
    "leases: retry": Scenario((Spec(timeout=True, retries=1, retry_timeouts=True), Spec())),
    "leases: cancel": Scenario((Spec(cancel=True, retries=1), Spec())),
    # two items of a map in one lease, results committed one by one or together
    "leases: chunk": Scenario((Spec(timeout=True, retries=1, batch=0), Spec(timeout=True, batch=0))),
    # two lanes of one process: a task that is killed takes the one beside it along
    "leases: lanes": Scenario((Spec(timeout=True), Spec(retries=1)), lanes=True),
    # views of the arguments outlive both attempts
    "leases: views": Scenario((Spec(keeps=True, raises=True, retries=1),), collects=True),
    # a view outlives its call, and the next result refers to what it shows
    "leases: references": Scenario((Spec(keeps=True), Spec(refers=True))),
    # a result that lies in a block of the worker's own, which goes on seeing it
    "leases: own": Scenario((Spec(own=True, sees=True), Spec(refers=True))),
}


class Leases(LeaseWorkers):
    """The steps. See the module."""

    # ---- what can happen -------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """Of the world, of each worker, of the keeper, of the host."""
        found: list[Step] = []
        for s, slot in enumerate(self.slots):
            one = s == 0 or not self.scenario.lanes  # else it happens to both, and was counted there
            if slot.process == ALIVE and self.crashes and one:
                found.append(Step(Leases.crash, (s,)))
            if slot.process == DOOMED and one:
                found.append(Step(Leases.signal_arrives, (s,)))
            if slot.process in (ALIVE, DOOMED):
                found += self.worker_steps(s, slot)
        found += self.keeper_steps()
        found += self.host_steps()
        return found

    def host_steps(self) -> Iterator[Step]:
        at, s = self.host
        if at != IDLE:
            yield Step(Leases.cancel_kills, (s,))
            return
        for s, slot in enumerate(self.slots):
            if slot.outbox and slot.state != S_FREE:
                yield Step(Leases.drain, (s,))
            if self.scenario.collects and slot.state == S_LIVE:
                if any(lease.state == L_DONE for lease in slot.leases):
                    yield Step(Leases.collect_now, (s,))
            if s and self.scenario.lanes:
                continue  # what follows happens to both
            if slot.state == S_LIVE and self.known_dead(slot) and slot.guard == OPEN:
                yield Step(Leases.vacate, (s,))
            if slot.state == S_DYING:
                yield Step(Leases.settle, (s,))
            if slot.state == S_FREE:
                yield Step(Leases.open_slot, (s,))
        for t, task in enumerate(self.tasks):
            if task.state == T_WAITING and self.leads(t):
                for s, slot in enumerate(self.slots):
                    if slot.state == S_LIVE and not slot.killing and len(slot.ring) < ENTRIES:
                        for e in range(ENTRIES):
                            if not any(o.slot == s and o.entry == e for o in self.tasks):
                                yield Step(Leases.publish, (t, s, e))
            elif task.state == T_LEASED:
                lease = self.slots[task.slot].leases[task.entry]
                if lease.state == L_LEASED:
                    yield Step(Leases.take_back, (t,))
                elif lease.state == L_KILLED:
                    yield Step(Leases.unload_now, (t,))
            if self.scenario.specs[t].cancel and not task.asked and task.state in (T_WAITING, T_LEASED):
                if task.state == T_WAITING or self.slots[task.slot].guard == OPEN:
                    yield Step(Leases.cancel, (t,))

    def known_dead(self, slot: Slot) -> bool:
        """Whether the pidfd of the process says that it is dead."""
        return slot.process == DEAD or (self.fault == "guessed-death" and slot.process == DOOMED)

    def leads(self, number: int) -> bool:
        """Whether a waiting item comes first of those of its batch that wait."""
        batch = self.scenario.specs[number].batch
        return batch < 0 or not any(
            task.state == T_WAITING and self.scenario.specs[t].batch == batch
            for t, task in enumerate(self.tasks[:number])
        )

    # ---- the host: leasing -----------------------------------------------------------------------------

    @step("_leasing.pyx:publish", "the host leases task {0} to worker {1} in entry {2}")
    def publish(self, number: int, s: int, e: int) -> None:
        slot, task, specs = self.slots[s], self.tasks[number], self.scenario.specs
        batch, count = specs[number].batch, 1
        while batch >= 0 and not task.alone and number + count < len(specs):
            member = self.tasks[number + count]
            if specs[number + count].batch != batch or member.state != T_WAITING or member.alone:
                break
            member.state = T_IN_CHUNK
            count += 1
        self.make_stale(s, e)
        slot.leases[e] = Lease(L_LEASED, 0, number)
        slot.ring.append((e, 1))
        task.state, task.slot, task.entry, task.count = T_LEASED, s, e, count
        task.delivered, task.claimed, task.killed, task.reason = 0, 0, -1, 0

    def make_stale(self, s: int, e: int) -> None:
        """The tag of an entry is raised: every reference to an earlier lease of it is stale from now on."""
        slot = self.slots[s]
        slot.ring = [(entry, fresh if entry != e else 0) for entry, fresh in slot.ring]
        slot.outbox = [
            record
            if record[0] in OF_BLOCKS or record[1] != e or record[2] == LATE
            else (*record[:2], 0, record[3])
            for record in slot.outbox
        ]
        if slot.hand == e:
            slot.fresh = 0
        if self.keeper[1:3] == [s, e]:
            self.keeper[3], self.keeper[5] = -1, 0

    @step("_leasing.pyx:take_back", "the host takes task {0} back")
    def take_back(self, number: int) -> None:
        task = self.tasks[number]
        self.slots[task.slot].leases[task.entry] = Lease()
        self.release(number)

    def release(self, number: int) -> None:
        """_leasing.pyx release, requeue, put_back: the entry is free; what has no outcome waits again."""
        task = self.tasks[number]
        for item in range(number, number + task.count):
            one = self.tasks[item]
            delivered = one.outcome and self.fault != "put-back-delivered"
            one.state = T_OVER if delivered else T_WAITING
        task.slot = task.entry = task.killed = -1
        task.count, task.delivered, task.claimed, task.reason = 1, 0, 0, 0

    @step("_dispatch.pyx:cancel", "the user cancels task {0}: taken back, or its word moved to KILLED")
    def cancel(self, number: int) -> None:
        task = self.tasks[number]
        task.asked = 1
        if task.state == T_WAITING:
            self.finish(number, CANCELLED)
            task.state = T_OVER
            return
        slot = self.slots[task.slot]
        lease = slot.leases[task.entry]
        if lease.state == L_LEASED:
            slot.leases[task.entry] = Lease()
            self.finish(number, CANCELLED)
            self.release(number)
        elif lease.state == L_RUNNING and slot.state == S_LIVE:
            lease.state = L_KILLED
            task.reason = 1
            for lane in self.lanes(task.slot):
                lane.guard = BY_HOST
            self.host = [CANCELLING, task.slot]

    @step("_dispatch.pyx:cancel", "the host sends SIGKILL to worker {0}, and lets the guard go")
    def cancel_kills(self, s: int) -> None:
        self.host = [IDLE, -1]
        self.signal(s)

    # ---- the host: what comes back ---------------------------------------------------------------------

    @step("_harvest.pyx:drain_now,process", "the host takes a record from the outbox of worker {0}")
    def drain(self, s: int) -> None:
        slot = self.slots[s]
        kind, entry, fresh, block = slot.outbox.pop(0)
        if kind in OF_BLOCKS:
            if kind == R_KEEP:
                self.keep_block(slot, entry)
            else:
                self.unkeep_block(slot, entry)
            return
        number = next((t for t, o in enumerate(self.tasks) if (o.slot, o.entry) == (s, entry)), -1)
        if fresh == LATE:
            return  # its lease was harvested before it came: it is counted as strange
        if number < 0 or not fresh:
            raise Broken("a record comes that makes no sense to the host")
        if kind == R_DONE:
            self.harvest(s, number)
        else:
            self.partial(number, block)

    def keep_block(self, slot: Slot, block: int) -> None:
        """_harvest.pyx kept, known: the host's block, or the worker's own, which is adopted."""
        if block >= OWN:
            for lease in slot.leases:
                if lease.task == block - OWN and lease.own == X_PUBLISHING:
                    lease.own = X_HOST
        if not self.held(block):
            raise Broken("a worker goes on seeing a block that is gone")
        if self.fault != "kept-once" or block not in slot.kept:
            slot.kept.append(block)

    def unkeep_block(self, slot: Slot, block: int) -> None:
        """_harvest.pyx unkept"""
        if block not in slot.kept:
            raise Broken("a worker goes on seeing nothing of a block of which it has not said that it does")
        slot.kept.remove(block)
        for lease in slot.leases:
            if lease.task == block - OWN and lease.own == X_HOST and block not in slot.kept:
                lease.own = X_FREEING

    @step(
        "_rescue.pyx:collect_now",
        "the host looks at the words of worker {0}'s leases, and harvests what is DONE",
    )
    def collect_now(self, s: int) -> None:
        slot = self.slots[s]
        done = [t for t, o in enumerate(self.tasks) if o.slot == s and slot.leases[o.entry].state == L_DONE]
        while slot.outbox and self.fault != "collect-without-drain":
            self.drain(s)
        for number in done:
            entry = self.tasks[number].entry
            if self.tasks[number].slot == s and slot.leases[entry].state == L_DONE:
                self.harvest(s, number)
                if slot.at in (PUT_KEEP, PUT_DONE) and slot.hand == entry:
                    slot.late = 1
                slot.outbox = [
                    (kind, at, LATE if (kind, at) == (R_DONE, entry) else fresh, block)
                    for kind, at, fresh, block in slot.outbox
                ]

    def harvest(self, s: int, number: int) -> None:
        """_harvest.pyx harvest: DONE -> FREE, the results of the last frame."""
        slot, task = self.slots[s], self.tasks[number]
        lease = slot.leases[task.entry]
        if lease.state != L_DONE or task.state != T_LEASED:
            return
        if lease.block != X_PUBLISHING:  # _harvest.pyx adopted
            raise Broken(f"the result of task {number} is lost: its block is not the worker's to hand over")
        if lease.item - task.delivered != lease.out:
            raise Broken(f"the frame of task {number} holds another number of results")
        if self.scenario.specs[number].own and lease.own not in (X_PUBLISHING, X_HOST):  # referred, known
            raise Broken(f"the result of task {number} lies in a block that is not there to be handed over")
        if lease.ref and not self.held(lease.ref - 1):
            raise Broken(f"the result of task {number} refers to a block that is gone")
        for item in range(number + task.delivered, number + lease.item):
            if self.scenario.specs[item].raises and self.tasks[item].attempt == 1:
                self.retried(item)
            else:
                self.finish(item, RESULT)
        slot.leases[task.entry] = Lease()
        self.release(number)

    def partial(self, number: int, block: int) -> None:
        """_harvest.pyx partial: an item of a chunk, ahead of the rest."""
        task = self.tasks[number]
        if task.state != T_LEASED and self.fault != "answer-after-killed":
            return  # after KILLED nothing else is an answer
        if block != X_PUBLISHING:
            raise Broken(
                f"a committed result of task {number} is lost: its block is not the worker's any more"
            )
        self.finish(number + task.delivered, RESULT)
        task.delivered += 1

    @step(
        "_harvest.pyx:unload_now", "the host resolves task {0}, which was killed, before its process is dead"
    )
    def unload_now(self, number: int) -> None:
        task = self.tasks[number]
        lease = self.slots[task.slot].leases[task.entry]
        spec = self.scenario.specs[number + lease.item]
        if spec.retry_timeouts and not task.reason and self.fault != "retry-before-death":
            return  # the next attempt waits until this process is dead
        task.state, task.killed = T_OVER, lease.item
        if task.delivered <= lease.item:
            self.answer_killed(number, lease.item)
        if self.fault == "free-before-death":
            self.slots[task.slot].leases[task.entry] = Lease()
            self.release(number)
        elif self.fault == "retry-before-death" and not task.outcome:
            task.state, task.slot, task.entry = T_WAITING, -1, -1

    def answer_killed(self, number: int, item: int) -> None:
        """OUTCOME_KILLED, and what collector.py act makes of it."""
        task, spec = self.tasks[number + item], self.scenario.specs[number + item]
        if self.tasks[number].reason:
            self.finish(number + item, CANCELLED)
        elif not (spec.retry_timeouts and self.retried(number + item)):
            self.finish(number + item, TIMED_OUT)
        task.losses += 1

    def retried(self, number: int) -> bool:
        """outcomes.py retried, _dispatch.pyx retry_now: whether it is tried once more."""
        task, spec = self.tasks[number], self.scenario.specs[number]
        if task.attempt > spec.retries and self.fault != "retry-without-end":
            return False
        if task.asked:
            self.finish(number, CANCELLED)
            return True
        task.attempt += 1
        task.alone = int(spec.batch >= 0)
        if spec.raises:
            task.losses += 1
        return True

    # ---- the host: slots -------------------------------------------------------------------------------

    @step("_slots.pyx:vacate", "the host has seen that worker {0} is dead: nothing of it is killed any more")
    def vacate(self, s: int) -> None:
        for slot in self.lanes(s):
            slot.state = S_DYING

    @step(
        "_harvest.pyx:settle_now,settle_task",
        "the host settles what worker {0} has left, and the slot is free",
    )
    def settle(self, s: int) -> None:
        lanes = range(len(self.slots)) if self.scenario.lanes else [s]
        for lane in lanes:
            if self.slots[lane].process != DEAD:
                raise Broken("a slot is swept while its process lives")
            if self.fault == "sweep-before-harvest":
                self.heap_sweep(lane)
            self.take_last(self.slots[lane], lane)
        held = [number for number, task in enumerate(self.tasks) if task.slot in lanes]
        for number in held:
            self.harvest(self.tasks[number].slot, number)
        for number in held:
            if self.tasks[number].entry >= 0:
                self.settle_task(self.tasks[number].slot, number)
        for lane in lanes:
            self.heap_sweep(lane)
            if any(lease != EMPTY for lease in self.slots[lane].leases):
                raise Broken("a slot is free, and something in it is not")
            self.slots[lane] = Slot(S_FREE, NOBODY, leases=self.slots[lane].leases)

    def take_last(self, slot: Slot, s: int) -> None:
        """_harvest.pyx take_last: the records that a dead worker has left."""
        while slot.outbox:
            if slot.outbox[0][0] in OF_BLOCKS and self.fault == "sweep-skips-keeps":
                slot.outbox.pop(0)
            else:
                self.drain(s)

    def settle_task(self, s: int, number: int) -> None:
        """_harvest.pyx settle_task: what it ran is blamed, what only waited waits again."""
        slot, task = self.slots[s], self.tasks[number]
        lease = slot.leases[task.entry]
        if task.state == T_LEASED and (lease.state != L_LEASED or self.fault == "blame-the-waiting"):
            self.blame(s, number)
        elif lease.state != L_LEASED:
            self.lost_with(number, lease.item)
        slot.leases[task.entry] = Lease(block=lease.block, own=lease.own)
        self.release(number)

    def heap_sweep(self, s: int) -> None:
        """_extent.pyx heap_sweep: every block that is still the worker's own is freed."""
        slot = self.slots[s]
        slot.part = X_NONE
        for lease in slot.leases:
            lease.block = lease.own = X_NONE
        slot.outbox = [(kind, entry, fresh, X_NONE) for kind, entry, fresh, _ in slot.outbox]

    def blame(self, s: int, number: int) -> None:
        """_harvest.pyx blame: only the item that ran answers."""
        task = self.tasks[number]
        lease = self.slots[s].leases[task.entry]
        item = lease.item
        self.lost_with(number, item)
        if task.delivered > item:
            return
        if lease.state == L_KILLED:
            self.answer_killed(number, item)
            return
        if not task.claimed:
            raise Broken(f"task {number} is blamed for a death, and was never started")
        if self.scenario.lanes and self.slots[s].killing and self.fault != "blame-the-neighbour":
            self.beside(number + item)
            return
        if not self.slots[s].crashed:
            raise Broken(
                f"task {number} is blamed for a death that the host has caused for another task's sake"
            )
        if not self.retried(number + item):
            self.finish(number + item, DIED)
        self.tasks[number + item].losses += 1

    def beside(self, number: int) -> None:
        """collector.py beside: it ran in a process that was killed for another task: again, not counted."""
        task, spec = self.tasks[number], self.scenario.specs[number]
        if task.begun > task.losses:
            task.begun -= 1  # this execution does not count
        if task.attempt > spec.retries:
            self.finish(number, DIED)
        elif task.asked:
            self.finish(number, CANCELLED)

    def lost_with(self, number: int, item: int) -> None:
        """Those that ran in this lease before `item` and were not delivered run once more."""
        for earlier in range(number + self.tasks[number].delivered, number + item):
            self.tasks[earlier].losses += 1

    @step("_slots.pyx:open_slot,occupy", "a new worker moves into slot {0}, and is ready")
    def open_slot(self, s: int) -> None:
        for lane in range(len(self.slots)) if self.scenario.lanes else [s]:
            self.slots[lane] = Slot(leases=self.slots[lane].leases)


def model(name: str, fault: str = "") -> partial[Leases]:
    """Makes worlds of a scenario."""
    return partial(Leases, SCENARIOS[name], fault)
