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
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport *
from runtime._layout cimport *
from runtime._lease cimport must_tell
from runtime._leasing cimport (
    DO_ABANDON, DO_COLLECT, DO_DRAIN, DO_DRAIN_ALL, DO_DROP, DO_FORGET, DO_RELEASE, DO_RETRY, DO_RETRY_ITEM,
    DO_SETTLE, DO_TAKE_DUE, DO_UNLOAD,
)
from runtime._leasing import OUTCOME_ABANDONED
from runtime._records cimport T_CANCELLED, T_LEASED, T_OVER, T_WAITING, Batch, SlotTable, Span, Task
from runtime._arena cimport HostBlock
from runtime._frame cimport COLD_BYTES, S_VALUE, BlockSlice, Frame
from runtime._threads cimport guard_acquire, guard_of, guard_release, guard_t, kill_lease

CANCEL_NO = 0               # it has started, or is over
CANCEL_DONE = 1             # it never started and never will
CANCEL_KILLED = 2           # it had started; its worker is being killed

# Bytes that are copied while the worker that will read them is waking up, at most; fewer than the least of
# them are copied before it would be awake, or has fallen asleep.
cdef uint64_t ROUSE_BYTES = 1 << 20
cdef uint64_t ROUSE_LEAST = 128 << 10
cdef uint64_t COPIED_PER_NS = 4     # bytes, of a slow machine
cdef int TRIES = 4          # times that others may be quicker to take the room that was made
cdef int CHASE = 100        # looks at a chunk that is to be killed and goes on from item to item


cdef class Dispatcher(Rescue):
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

    def make_ready(self, uint32_t index):
        """Lease to the process in this slot from now on."""
        for table in self.slots[index:index + self.arena.threads]:
            (<SlotTable>table).ready = True
            (<SlotTable>table).draining = False
        self.work()

    def pause(self, bint paused):
        """Lease nothing more, or go on. What was leased before may still be started."""
        self.paused = paused
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
