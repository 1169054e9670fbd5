# cython: language_level=3
"""The host's side of leases: what waits, who runs what, what came back, what a dead worker leaves.

    submit ──► waiting ──pump──► LEASED ──worker──► RUNNING ──worker──► DONE ──drain──► outcomes
                  ▲                │ take back          │ deadline, cancel
                  └────────────────┘                    ▼
                  ▲                                   KILLED
                  └───────── settle: the sweep of a dead slot ─────────► outcomes

Everything here runs under the GIL, and calls no Python code but C containers: so a method is atomic to
every other Python thread, and a signal handler cannot cut it in two. (Two parts let the GIL go, where no
bookkeeping is half done: `place`, while the region grows and while it copies, and the waiting in _waiting.)
What can still come in between is a destructor, run by the garbage collector at an allocation, that submits or
cancels: it finds `busy` set and leaves its wish in the inbox, which whoever is inside empties before leaving.
The only other thread is the deadline keeper (_threads), ordered by the guards.

Should a destructor let another thread in, that one defers to the inbox in the same way, so no method
here ever waits. Outcomes collect in a list of tuples; unpickling and futures are the collector's business.
"""
cimport cython
from cpython.pythread cimport PyThread_get_thread_ident
from libc.signal cimport SIGKILL
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport *
from runtime._layout cimport *
from runtime._lease cimport must_tell, outbox_waiting
from runtime._records cimport T_CANCELLED, T_LEASED, T_OVER, T_WAITING, Batch, SlotTable, Span, Task
from runtime._leasing import OUTCOME_ABANDONED
from runtime._extent cimport HostBlock
from runtime._frame cimport COLD_BYTES, S_VALUE, BlockSlice, Frame
from runtime._report cimport read_report
from runtime._threads cimport guard_acquire, guard_of, guard_release, guard_t, kill_lease

CANCEL_NO = 0               # it has started, or is over
CANCEL_DONE = 1             # it never started and never will
CANCEL_KILLED = 2           # it had started; its worker is being killed

# what a deferred wish in the inbox begins with
cdef enum:
    DO_RELEASE = 0
    DO_DRAIN = 1
    DO_UNLOAD = 2
    DO_SETTLE = 3
    DO_RETRY = 4
    DO_RETRY_ITEM = 5
    DO_FORGET = 6
    DO_DROP = 7
    DO_ABANDON = 8
    DO_DRAIN_ALL = 9
    DO_TAKE_DUE = 10
    DO_COLLECT = 11


# Bytes that are copied while the worker that will read them is waking up, at most; fewer than the least of
# them are copied before it would be awake, or has fallen asleep.
cdef uint64_t ROUSE_BYTES = 1 << 20
cdef uint64_t ROUSE_LEAST = 128 << 10
cdef uint64_t COPIED_PER_NS = 4     # bytes, of a slow machine
cdef int TRIES = 4          # times that others may be quicker to take the room that was made
cdef int CHASE = 100        # looks at a chunk that is to be killed and goes on from item to item


cdef class Dispatcher(Waiting):
    """Queue, leases and slots of one runtime.

    Thread-safety: every method may be called from any thread. Fork-safety: none; the caller checks the pid.
    Blocking: only `watch`, `await_call`.
    """

    cdef int work(self) except -1:
        """Do what the inbox asks, lease what can be leased; at once, or leave it to who is inside."""
        if self.busy:
            return 0
        self.busy = True
        self.inside = PyThread_get_thread_ident()
        self.arena.lookers += 1                     # a destructor may let in who ends the runtime
        try:
            while True:
                while self.inbox:
                    self.take_in(self.inbox.popleft())
                self.pump()
                if not self.inbox:
                    return 0
        finally:
            self.busy = False
            self.stop_looking()

    cdef int take_in(self, entry) except -1:
        """A Task or Batch to queue, or a tuple (what to do, arguments...) that was deferred."""
        if not isinstance(entry, tuple):
            return self.enqueue(entry, False)
        what = (<tuple>entry)[0]
        subject = (<tuple>entry)[1]
        if what == DO_RELEASE:
            self.release(<Task>subject)
        elif what == DO_DRAIN:
            self.drain_now(subject)
        elif what == DO_DRAIN_ALL:
            self.drain_all()
        elif what == DO_UNLOAD:
            self.unload_now(subject)
        elif what == DO_SETTLE:
            self.settle_now(subject, (<tuple>entry)[2])
        elif what == DO_RETRY:
            self.retry_now(<Task>subject, (<tuple>entry)[2], (<tuple>entry)[3])
        elif what == DO_RETRY_ITEM:
            self.retry_item_now(<Batch>subject, (<tuple>entry)[2], (<tuple>entry)[3])
        elif what == DO_FORGET:
            self.forget(<Task>subject)
        elif what == DO_DROP:
            self.drop_now(<Batch>subject)
        elif what == DO_COLLECT:
            self.collect_now(subject)
        elif what == DO_TAKE_DUE:
            self.take_due(subject)
        else:
            self.abandon_now(subject)
        return 0

    def submit(self, Task task not None):
        """Queue a call; it is leased at once if a worker has credit. False: the runtime has ended."""
        return self.enter(task)

    def place(self, Task task not None, data, tuple buffers, tuple readonly):
        """Lay the arguments of a new task out in the region at once: one copy, made without the GIL.

        The region grows for them.
        False: nothing was done. Only up to half of the region is taken by what waits; the rest is for what
        runs, and what it gives back.
        """
        cdef Frame frame = Frame([(S_VALUE, data, buffers, readonly)])
        cdef HostBlock block
        cdef uint64_t first = 0
        if frame.nbytes <= INLINE_BYTES:                # all that is large lies in the region already
            task.hold(data, buffers, readonly)
            return True
        if self.closed or self.arena.held + frame.nbytes > self.arena.capacity * EXTENT // 2:
            return False
        block = self.room_for(task, frame.nbytes)
        if block is None:
            return False
        if self.arena.held >= COLD_BYTES:               # a block is used again when as much was written since
            frame.cold = True
        if frame.nbytes > ROUSE_BYTES:
            first = frame.nbytes - ROUSE_BYTES
            with nogil:
                frame.copy(block.data, 0, first)
        if frame.nbytes >= ROUSE_LEAST:
            self.rouse(frame.nbytes - first)
        with nogil:
            frame.copy(block.data + first, first, frame.nbytes - first)
        task.block = block
        task.data = None
        # What the frame refers to stays as long as the task.
        task.buffers = tuple([part for part in buffers if isinstance(part, BlockSlice)])
        return True

    cdef HostBlock room_for(self, Task task, uint64_t nbytes):
        """A block for the arguments of a task, whose function has one; None: there is no room."""
        cdef HostBlock block = None
        cdef int _k
        for _k in range(TRIES):
            if task.fn_block is None:
                task.fn_block = self.function_block(task.fn)
            if task.fn_block is not None:
                block = HostBlock.take(self.arena, nbytes)
            # Growing takes time: not in a destructor that runs in the middle of the bookkeeping.
            if block is not None or self.within() or not self.arena.grow(nbytes):
                break
        return block

    cdef int rouse(self, uint64_t nbytes) except -1:
        """Wake an idle worker, or keep it awake, for a lease that comes when nbytes are copied."""
        cdef int64_t index = self.pick(1)
        cdef slot_t *slot
        if index < 0:
            return 0
        slot = self.arena.slot(<uint32_t>index)
        a64_store_relaxed(&slot.coming, <uint64_t>now_ns() + nbytes // COPIED_PER_NS + self.arena.spin)
        if must_tell(&slot.parked) != AWAKE:
            self.announce.add(index)
            self.tell()
        return 0

    cdef bint enter(self, Task task) except -1:
        if self.closed:
            return False
        self.numbers += 1
        task.number = self.numbers
        self.waiting += 1
        if self.accepted % TIMED == 0:
            task.submitted = now_ns()
        self.accepted += 1
        self.inbox.append(task)
        self.work()
        return True

    def add(self, Batch batch not None, Span span not None):
        """Queue items of a batch. False: the runtime has ended."""
        if self.closed:
            return False
        if batch.dropped:
            return True
        batch.pending.append(span)
        batch.waiting += span.count
        self.waiting += span.count
        self.accepted += span.count
        self.inbox.append(batch)
        self.work()
        return True

    def retry(self, Task task not None, int64_t delay=0, tuple deaths=None, bint counted=True):
        """Queue a call once more, ahead of the others, but not before so many nanoseconds.

        Meanwhile it counts as waiting, and can be cancelled. deaths: how its attempts died so far. counted:
        it is another attempt; else the last one was cut short through no fault of its own.
        """
        task.deaths = deaths
        self.inbox.append((DO_RETRY, task, delay, counted))
        self.work()

    cdef int retry_now(self, Task task, int64_t delay, bint counted) except -1:
        if task.unwanted or self.closed:
            self.over(task, T_CANCELLED if task.unwanted else T_OVER)
            self.forget(task)
            self.outcomes.append((OUTCOME_ABANDONED, task, None, None, task.unwanted))
            return 0
        task.state = T_WAITING
        task.reason = ""
        task.attempt += counted
        if task.future is not None:
            task.future.reported = None
        self.waiting += 1
        return self.put_off(task, None, delay)

    def retry_item(self, Task task not None, uint64_t item, int64_t delay=0, tuple deaths=None,
                   bint counted=True):
        """Queue an item of a chunk once more, ahead of the others and alone, but not before so many
        nanoseconds. deaths, counted: as of `retry`.
        """
        cdef Span span = task.one(item)
        span.attempts += counted
        span.alone = True
        span.deaths = deaths
        self.inbox.append((DO_RETRY_ITEM, task.batch, span, delay))
        self.work()

    cdef int retry_item_now(self, Batch batch, Span span, int64_t delay) except -1:
        if batch.dropped:
            self.vanished += 1
            return 0
        if self.closed:
            self.outcomes.append((OUTCOME_ABANDONED, None, batch, [span], False))
            return 0
        batch.waiting += 1
        self.waiting += 1
        return self.put_off(batch, span, delay)

    @property
    def retry_in(self):
        """Seconds until the next retry that was put off is due; None: there is none."""
        if not self.delayed:
            return None
        return max(0, (<tuple>self.delayed[0])[0] - now_ns()) * 1e-9

    def take_retries(self):
        """Queue the retries that are due."""
        if self.delayed:
            self.inbox.append((DO_TAKE_DUE, now_ns()))
            self.work()

    def cancel(self, Task task not None, bint running=False, str reason="cancelled"):
        """Take a task back, or with `running` kill what runs it. CANCEL_*."""
        cdef lease_t *lease
        cdef guard_t *guard
        cdef uint64_t word
        cdef int result = 0
        cdef int _k
        if self.inert:
            return CANCEL_NO
        if task.state == T_WAITING:
            self.over(task, T_CANCELLED)            # the queue skips it
            self.waiting -= 1
            self.vanished += 1
            self.inbox.append((DO_FORGET, task))    # not now: whoever is inside may be looking at it
            self.work()
            return CANCEL_DONE
        if task.state == T_CANCELLED:
            return CANCEL_DONE                      # a caller that was interrupted asks again
        if running:
            task.unwanted = True                    # whatever comes of this attempt, no other one follows
        if task.state != T_LEASED:
            return CANCEL_NO
        lease = self.arena.lease(task.slot, task.entry)
        guard = guard_of(self.keeper, task.slot)
        guard_acquire(guard)
        word = a64_load_acquire(&lease.word)
        if l_tag(word) == task.tag and l_state(word) == L_LEASED and a64_cas_acq_rel(
                &lease.word, word, lease_word(L_FREE, 0, task.tag)):
            result = 1
        elif running:
            word = a64_load_acquire(&lease.word)    # it may just have been claimed
            for _k in range(CHASE):
                if l_tag(word) != task.tag or l_state(word) != L_RUNNING:
                    break
                if kill_lease(guard, lease, word):
                    result = 2
                    break
                word = a64_load_acquire(&lease.word)    # a chunk has gone on to its next item: that one, then
        guard_release(guard)
        if result == 1:
            self.over(task, T_CANCELLED)
            self.vanished += task.count
            self.inbox.append((DO_RELEASE, task))   # the entry is reused once its bookkeeping is done
            self.work()
            return CANCEL_DONE
        if result == 2:
            task.reason = reason
            return CANCEL_KILLED
        return CANCEL_NO

    def drop(self, Batch batch not None, bint running=False):
        """Nobody wants the rest of a batch: forget what has not started, and with `running` kill what has."""
        if not self.inert:
            batch.dropped = True
            batch.ruthless = running
            self.inbox.append((DO_DROP, batch))
            self.work()

    cdef int drop_now(self, Batch batch) except -1:
        cdef SlotTable table
        self.waiting -= batch.waiting
        self.vanished += batch.waiting
        batch.waiting = 0
        batch.pending.clear()
        for table in self.slots:
            if table.chunks:
                for held in list(table.tasks):
                    if held is not None and (<Task>held).batch is batch:
                        self.cancel(<Task>held, batch.ruthless)
        return 0

    def drain(self, uint32_t index, bint hinted=False):
        """Process a slot's outbox. `hinted`: the worker's hint says so."""
        cdef SlotTable table = self.slots[index]
        if hinted and table.acted:
            # The rescan was ahead of this hint. If it left nothing to find, the hint was late, not lost.
            table.acted = False
            if outbox_waiting(self.arena.slot(index), table.outbox_head) == 0:
                self.rescued -= 1
        self.inbox.append((DO_DRAIN, index))
        self.work()

    cdef int drain_out(self) except -1:
        self.inbox.append((DO_DRAIN_ALL, None))
        return self.work()

    def make_ready(self, uint32_t index):
        """Lease to the process in this slot from now on."""
        for table in self.slots[index:index + self.arena.threads]:
            (<SlotTable>table).ready = True
            (<SlotTable>table).draining = False
        self.work()

    def stop_slot(self, uint32_t index):
        """Lease nothing more to the process in a slot; it finishes what it runs and leaves."""
        cdef uint32_t i
        for i in range(index, index + self.arena.threads):
            (<SlotTable>self.slots[i]).draining = True
            a32_store_release(&self.arena.slot(i).control, C_STOP)
            self.inbox.append((DO_UNLOAD, i))       # what it has not started goes to the others
        self.work()

    def settle(self, uint32_t index, information):
        """The sweep of a slot whose process and descendants are dead; then it is free again.

        In this order, so that what the dead worker had finished counts: its records, its DONE leases,
        what it was running (blamed), what it had not started (leased again, at no cost), what its views
        held, what it owned. Every step can be repeated.
        """
        self.inbox.append((DO_SETTLE, index, information))
        self.work()

    def killed(self, uint32_t index):
        """Resolve the leases of a process that were killed, without waiting for its death; what it has not
        started goes to others.

        After KILLED nothing else is an answer; but results that a chunk had delivered before count.
        """
        cdef uint32_t i
        if guard_of(self.keeper, index).killing:
            for i in range(index, index + self.arena.threads):
                self.inbox.append((DO_UNLOAD, i))
            self.work()

    def rescan(self):
        """The backstop: find what a lost hint would have told. Called every 100 ms while work is out.

        It acts on what it sees unchanged for the third time in a row: results are taken in; leases that a
        worker does not look at (it may be stopped) go to another one, or are announced again. What counts as
        rescued is only what no hint tells of afterwards: the others were late.
        """
        cdef uint32_t i
        cdef uint64_t head, place
        cdef bint unread, unseen, idle
        cdef slot_t *slot
        cdef SlotTable table
        self.work()                                 # a task that waited for room looks again
        for i in range(self.arena.slots):
            table = self.slots[i]
            slot = self.arena.slot(i)
            if not table.ready:
                continue
            if self.arena.lanes and outbox_waiting(slot, table.outbox_head):
                self.drain(i)                       # it came while the collector was awake: no hint is due
            # While a destructor has let us in, the bookkeeping of who is inside may be half done.
            table.nonsense = table.nonsense + 1 if not self.busy and self.wild(i) else 0
            if table.nonsense == 3:
                self.strange()
                self.send_signal(i, SIGKILL)        # what it holds would never have an outcome
                continue
            head = table.outbox_head
            place = a64_load_relaxed(&slot.ring_head)
            idle = not self.occupied(i)
            unread = outbox_waiting(slot, head) != 0
            # A place that the worker has taken and not acted on counts, too: its slot is out of order.
            unseen = idle and (table.ring_tail != place or table.inflight)
            if unread and self.arena.records(i)[head & (self.arena.outbox - 1)].kind == R_UNKEEP:
                self.drain(i)                       # it comes without a hint
                continue
            if not unread and not unseen:
                self.stuck.pop(i, None)
                continue
            seen = (head if unread else None, place if unseen else None)
            before, times = self.stuck.get(i, (None, 0))
            times = times + 1 if before == seen else 1
            self.stuck[i] = (seen, times)
            if times < 3:
                continue
            if unread:
                self.rescued += 1
                self.drain(i)
                table.acted = True
            elif table.inflight and (table.ring_tail == place or self.others(i)):
                table.suspect = table.ring_tail != place
                table.suspect_at = place
                self.inbox.append((DO_COLLECT, i))
                self.inbox.append((DO_UNLOAD, i))
                self.work()
            else:
                self.repeat.add(i)

    cdef int collect_now(self, uint32_t index) except -1:
        """Take in leases that are DONE and whose records never came: their worker wrote over its outbox."""
        cdef Task task
        for held in list((<SlotTable>self.slots[index]).tasks):
            if held is not None:
                task = <Task>held
                if l_state(a64_load_acquire(&self.arena.lease(index, task.entry).word)) == L_DONE:
                    self.drain_now(index)           # what its views keep was said before it was DONE
                    self.harvest(index, task)
        return 0

    cdef bint wild(self, uint32_t index) except -1:
        """Whether a slot says what no step of a worker could have made of it: it writes where it likes."""
        cdef SlotTable table = self.slots[index]
        cdef slot_t *slot = self.arena.slot(index)
        cdef uint64_t word
        if (a64_load_relaxed(&slot.ring_tail) != table.ring_tail
                or a64_load_relaxed(&slot.outbox_head) != table.outbox_head
                or table.ring_tail - a64_load_acquire(&slot.ring_head) > self.arena.leases):
            return True
        for held in table.tasks:
            if held is not None and (<Task>held).state == T_LEASED:
                word = a64_load_acquire(&self.arena.lease(index, (<Task>held).entry).word)
                if l_tag(word) != (<Task>held).tag or not L_LEASED <= l_state(word) <= L_KILLED:
                    return True
                if l_state(word) == L_RUNNING and (<Task>held).timeout:
                    # The keeper looks where the worker says that it is; the deadline holds if it lies, too.
                    self.keeper.overdue(index, (<Task>held).entry, now_ns(), -1)
        return False

    cdef bint occupied(self, uint32_t index) except -1:
        """Whether the worker in a slot is at a lease, as it says and the word of that lease says, too."""
        cdef uint32_t running = a32_load_acquire(&self.arena.slot(index).running)
        cdef uint64_t state
        if not 0 < running <= self.arena.leases:
            return False
        state = l_state(a64_load_acquire(&self.arena.lease(index, running - 1).word))
        return state == L_RUNNING or state == L_KILLED

    cdef bint others(self, uint32_t index) except -1:
        """Whether a worker in another slot could take leases."""
        cdef uint32_t i
        cdef SlotTable table
        for i in range(self.arena.slots):
            table = self.slots[i]
            if i != index and table.ready and not table.draining and not table.suspect and self.room(i):
                return True
        return False

    @property
    def rescues(self):
        """Leases and results that only the rescan found, their hints being lost."""
        cdef uint64_t total = self.rescued
        cdef uint32_t i
        for i in range(self.arena.slots):
            total += a64_load_relaxed(&self.arena.slot(i).rescued)
        return total

    @property
    def urgent(self):
        """Whether a task waits for room: look again soon."""
        return self.starved_since != 0

    def note(self, uint64_t done, uint64_t failed):
        """The collector says: so many tasks and items have ended."""
        self.done += done
        self.failed += failed

    def vanish(self, uint64_t count):
        """So many of what was abandoned were cancelled."""
        self.vanished += count

    @property
    def pinned_bytes(self):
        """Bytes of argument blocks that views in workers keep."""
        cdef SlotTable table
        cdef uint64_t total = 0
        for table in self.slots:
            for held in table.kept.values():
                total += (<HostBlock>(<tuple>held)[0]).nbytes
        return total

    def refuse(self):
        """A task that could not even be queued: accepted and failed."""
        self.accepted += 1
        self.failed += 1

    def abandon(self, bint cancelled):
        """Everything that waits gets its outcome now: cancelled, or else that the runtime is broken."""
        if not self.inert:
            self.inbox.append((DO_ABANDON, bool(cancelled)))
            self.work()

    cdef int abandon_now(self, cancelled) except -1:
        cdef uint32_t i
        for i in range(self.arena.slots):
            for entry in self.take_back(i, self.arena.leases):
                self.requeue(<Task>entry)
        self.take_due(0x7FFFFFFFFFFFFFFFLL)
        for queue in self.levels.values():
            while queue:
                entry = queue.popleft()
                if isinstance(entry, Batch):
                    (<Batch>entry).queued = False
                    rest = list((<Batch>entry).pending)
                    (<Batch>entry).pending.clear()
                    self.waiting -= (<Batch>entry).waiting
                    (<Batch>entry).waiting = 0
                    self.outcomes.append((OUTCOME_ABANDONED, None, entry, rest, cancelled))
                elif (<Task>entry).state == T_WAITING:
                    self.over(<Task>entry, T_CANCELLED if cancelled else T_OVER)
                    self.forget(<Task>entry)
                    self.waiting -= 1
                    self.outcomes.append((OUTCOME_ABANDONED, entry, None, None, cancelled))
        return 0

    def close(self):
        """Nothing is accepted or leased any more."""
        self.closed = True
        self.functions.clear()

    def close_if_idle(self):
        """Close, if everything that was accepted has ended. Whether it is closed."""
        if not self.closed and self.idle:
            self.close()
        return self.closed

    @property
    def idle(self):
        """Whether everything that was accepted has ended."""
        return self.jobs == 0 and self.accepted <= self.done + self.failed + self.vanished

    def disown(self):
        """In a fork of the host: nothing done here may reach a process of the parent's."""
        self.inert = True

    def running(self, Task task not None):
        """Whether a worker has claimed the task and has not finished it."""
        cdef uint64_t word
        if task.state != T_LEASED:
            return False
        word = a64_load_acquire(&self.arena.lease(task.slot, task.entry).word)
        return l_tag(word) == task.tag and l_state(word) == L_RUNNING

    def progress(self, Task task not None):
        """What a task that is leased has reported last; None: nothing."""
        cdef lease_t *lease
        if task.state != T_LEASED or self.inert or task.slot >= self.arena.slots:
            return None
        lease = self.arena.lease(task.slot, task.entry)
        if l_tag(a64_load_acquire(&lease.word)) != task.tag or a64_load_relaxed(&lease.reported) == 0:
            return None
        return read_report(lease)

    def look(self, uint32_t index):
        """Of a slot: (incarnation, phase, tasks done, number of the task that runs or None, leases)."""
        cdef slot_t *slot
        cdef SlotTable table = self.slots[index]
        cdef uint32_t running
        number = None
        if index >= self.arena.slots:               # the runtime has ended
            return table.incarnation, P_BOOT, 0, None, 0
        slot = self.arena.slot(index)
        running = a32_load_acquire(&slot.running)
        if 0 < running <= self.arena.leases and table.tasks[running - 1] is not None:
            if self.running(<Task>table.tasks[running - 1]):
                number = (<Task>table.tasks[running - 1]).number
        return slot.incarnation, self.phase(index), a64_load_relaxed(&slot.tasks_done), number, table.inflight

    def tasks_in(self, uint32_t index):
        """Numbers of the tasks that the process in a slot runs, the one that has run longest first."""
        cdef uint32_t i, running
        found = []
        for i in range(index, min(index + self.arena.threads, self.arena.slots)):
            number = self.look(i)[3]
            if number is not None:
                running = a32_load_acquire(&self.arena.slot(i).running)
                began = 0                           # its clock stands: it has just begun, or has just ended
                if 0 < running <= self.arena.leases:
                    began = a64_load_acquire(&self.arena.lease(i, running - 1).started)
                found.append((began or 0xFFFFFFFFFFFFFFFF, number))
        return [number for _, number in sorted(found)]

    def counts(self):
        """For tests: (blocks kept for views in workers, leases out, announcements due)."""
        cdef SlotTable table
        cdef uint64_t kept = 0, inflight = 0
        for table in self.slots:
            kept += <uint64_t>len(table.kept)
            inflight += table.inflight
        return kept, inflight, len(self.announce)


@cython.final
@cython.no_gc_clear
cdef class JobHold:
    """While it lives the runtime is not idle: a job was accepted, and may submit more tasks.

    An object, so that a signal handler that raises at any bytecode leaves none behind.
    """
    cdef Dispatcher dispatcher

    def __cinit__(self, Dispatcher dispatcher not None):
        self.dispatcher = dispatcher
        dispatcher.jobs += 1

    def __dealloc__(self):
        if self.dispatcher is not None:
            self.dispatcher.jobs -= 1
