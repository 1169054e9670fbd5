# cython: language_level=3
"""The host's side of leases: what waits, who runs what, what came back, what a dead worker leaves.

    submit ──► waiting ──pump──► LEASED ──worker──► RUNNING ──worker──► DONE ──drain──► outcomes
                  ▲                │ take back          │ deadline, cancel
                  └────────────────┘                    ▼
                  ▲                                   KILLED
                  └───────── settle: the sweep of a dead slot ─────────► outcomes

Everything here runs under the GIL and releases it nowhere, and calls no Python code but C containers:
so a method is atomic to every other Python thread, and a signal handler cannot cut it in two. What can
still come in between is a destructor, run by the garbage collector at an allocation, that submits or
cancels: it finds `busy` set and leaves its wish in the inbox, which whoever is inside empties before
leaving. The only other thread is the deadline keeper (_threads), ordered by the guards.

Should a destructor let another thread in, that one defers to the inbox in the same way, so no method
ever waits. Outcomes collect in a list of tuples; unpickling and futures are the collector's business.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport *
from runtime._harvest cimport Harvest
from runtime._layout cimport *
from runtime._lease cimport outbox_waiting, park
from runtime._leasing cimport T_CANCELLED, T_LEASED, T_OVER, T_WAITING, Batch, SlotTable, Span, Task
from runtime._future cimport Promise
from runtime._leasing import OUTCOME_ABANDONED, OUTCOME_FRAME
from runtime._extent cimport Arena, HostBlock
from runtime._frame cimport S_VALUE, Frame
from runtime._threads cimport guard_acquire, guard_release, guard_t, kill_lease

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


cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long arg2, unsigned long arg3, unsigned long arg4, unsigned long arg5)
    int PR_SET_TIMERSLACK, PR_GET_TIMERSLACK

# A processor that has fallen idle takes longer to be woken by another one than by its own timer. So who had
# to wake a worker, and waits for a short call, sleeps in naps for as long as that may take.
cdef int64_t DOZE = 300_000                 # ns of naps
cdef int64_t NAP = 20_000                   # ns
cdef int64_t SHARP = 1_000                  # ns by which a nap may be late
cdef int64_t BACKSTOP = 50_000_000          # ns: futex waits are bounded, so a lost wake-up only costs time


cdef void look_around(Arena arena, int64_t until) noexcept nogil:
    cdef uint32_t i, _k
    cdef slot_t *slot
    while True:
        for i in range(arena.slots):
            slot = arena.slot(i)
            if a64_load_acquire(&slot.outbox_tail) != a64_load_relaxed(&slot.outbox_head):
                return
        for _k in range(16):
            cpu_relax()
        if now_ns() >= until:
            return


cdef class Dispatcher(Harvest):
    """Queue, leases and slots of one runtime.

    Thread-safety: every method may be called from any thread. Fork-safety: none; the caller checks the pid.
    Blocking: never.
    """

    cdef int work(self) except -1:
        """Do what the inbox asks, lease what can be leased; at once, or leave it to who is inside."""
        if self.busy:
            return 0
        self.busy = True
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
            self.retry_now(<Task>subject)
        elif what == DO_RETRY_ITEM:
            self.retry_item_now(<Batch>subject, (<tuple>entry)[2])
        elif what == DO_FORGET:
            self.forget(<Task>subject)
        elif what == DO_DROP:
            self.drop_now(<Batch>subject)
        else:
            self.abandon_now(subject)
        return 0

    def submit(self, Task task not None):
        """Queue a call; it is leased at once if a worker has credit. False: the runtime has ended."""
        return self.enter(task)

    def place(self, Task task not None, bytes data, tuple buffers, tuple readonly):
        """Lay the arguments of a new task out in the region at once: one copy, made without the GIL.

        False: nothing was done. Only up to half of the region is taken by what waits; the rest is for what
        runs, and what it gives back.
        """
        cdef Frame frame = Frame([(S_VALUE, data, buffers, readonly)])
        cdef HostBlock block
        if self.closed or self.arena.held + frame.nbytes > self.arena.data_bytes // 2:
            return False
        task.fn_block = self.function_block(task.fn)
        if task.fn_block is None:
            return False
        block = HostBlock.take(self.arena, frame.nbytes)
        if block is None:
            return False
        with nogil:
            frame.copy(block.data, 0, frame.nbytes)
        task.block = block
        task.data = None
        return True

    cdef bint enter(self, Task task) except -1:
        if self.closed:
            return False
        self.numbers += 1
        task.number = self.numbers
        self.waiting += 1
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

    def retry(self, Task task not None):
        """Queue a call once more, ahead of the others."""
        self.inbox.append((DO_RETRY, task))
        self.work()

    cdef int retry_now(self, Task task) except -1:
        task.state = T_WAITING
        task.reason = ""
        task.attempt += 1
        self.waiting += 1
        return self.enqueue(task, True)

    def retry_item(self, Task task not None, uint64_t item):
        """Queue an item of a chunk once more, ahead of the others and alone."""
        cdef Span span = task.one(item)
        span.attempts += 1
        span.alone = True
        self.inbox.append((DO_RETRY_ITEM, task.batch, span))
        self.work()

    cdef int retry_item_now(self, Batch batch, Span span) except -1:
        if batch.dropped:
            self.vanished += 1
            return 0
        batch.pending.appendleft(span)
        batch.waiting += 1
        self.waiting += 1
        return self.enqueue(batch, True)

    def cancel(self, Task task not None, bint running=False, str reason="cancelled"):
        """Take a task back, or with `running` kill what runs it. CANCEL_*."""
        cdef lease_t *lease
        cdef guard_t *guard
        cdef uint64_t word
        cdef int result = 0
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
        if task.state != T_LEASED:
            return CANCEL_NO
        lease = self.arena.lease(task.slot, task.entry)
        guard = &self.keeper.guards[task.slot]
        guard_acquire(guard)
        word = a64_load_acquire(&lease.word)
        if l_tag(word) == task.tag and l_state(word) == L_LEASED and a64_cas_acq_rel(
                &lease.word, word, lease_word(L_FREE, 0, task.tag)):
            result = 1
        elif running and l_tag(word) == task.tag:
            word = a64_load_acquire(&lease.word)    # it may just have been claimed
            if kill_lease(guard, lease, word):
                result = 2
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

    def drop(self, Batch batch not None):
        """Nobody wants the rest of a batch: forget what has not started."""
        if not self.inert:
            batch.dropped = True
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
                        self.cancel(<Task>held)
        return 0

    def announcements(self):
        """Slots to tell that there are leases in their ring; each is returned once."""
        if not self.announce:
            return ()
        fresh = set()                               # first: what an allocation lets in must not get lost
        told, self.announce = self.announce, fresh
        return tuple(told)

    def told(self, uint32_t index):
        """A message has announced the leases of a slot."""
        cdef SlotTable table = self.slots[index]
        self.by_message += table.untold
        table.untold = 0

    def repetitions(self):
        """Slots to tell once more; each is returned once."""
        if not self.repeat:
            return ()
        fresh = set()
        told, self.repeat = self.repeat, fresh
        return tuple(told)

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

    # ---- who looks at the outboxes ----

    def unread(self):
        """Whether a worker has left something that was not taken in."""
        cdef uint32_t i
        cdef SlotTable table
        for i in range(self.arena.slots):
            table = self.slots[i]
            if table.state == S_LIVE and outbox_waiting(self.arena.slot(i), table.outbox_head):
                return True
        return False

    def drain_everything(self):
        """Take in what every worker has finished."""
        self.inbox.append((DO_DRAIN_ALL, None))
        self.work()

    def park(self):
        """The collector is about to sleep: from now on it must be told. False: there is something to do.

        While a user's thread sleeps on the parked word, that one is told, and tells the collector.
        """
        if not self.arena.lanes or self.arena.head == NULL:
            return True
        self.asleep = True
        if self.sleeping_for is None:
            park(&self.arena.head.parked, PARKED)
        if self.outcomes or self.unread():
            self.unpark()
            return False
        return True

    def unpark(self):
        """The collector is awake."""
        if self.arena.lanes and self.arena.head != NULL:
            self.asleep = False
            if self.sleeping_for is None:
                a32_store_relaxed(&self.arena.head.parked, AWAKE)

    @property
    def untold(self):
        """Whether there is something to do, of which the sleeping collector was not told."""
        return (self.arena.lanes and self.arena.head != NULL and self.sleeping_for is None
                and a32_load_relaxed(&self.arena.head.parked) == PARKED and self.unread())

    def lost(self):
        """Something was found that nobody had told of, though somebody should have."""
        self.rescued += 1

    def watch(self):
        """Look at the outboxes for a moment, without the GIL. Whether there is something in one."""
        if self.arena.spin == 0 or self.leased == 0 or self.arena.head == NULL:
            return False
        self.look_until(now_ns() + self.arena.spin)
        return self.unread()

    cdef int look_until(self, int64_t until) except -1:
        """Until an outbox has something in it, or the time has come. Without the GIL."""
        self.arena.lookers += 1                     # the tables stay mapped
        with nogil:
            look_around(self.arena, until)
        self.stop_looking()
        return 0

    cdef int stop_looking(self) except -1:
        """The tables may go: if the runtime has ended meanwhile, now."""
        self.arena.lookers -= 1
        if self.arena.ending:
            self.arena.release()
        return 0

    def await_call(self, Task task not None, int64_t patience):
        """A thread that needs this call takes results in by itself: that spares a wake-up, or all of them.

        For a moment it watches; then it sleeps on the parked word, where the worker wakes it: no I/O thread,
        no collector in between. One thread can sleep so; a second one comes back after its moment, and
        waits for the collector. patience: nanoseconds, negative for ever. Raises: what a signal handler does.
        """
        cdef int64_t now = now_ns()
        cdef int64_t until = now + self.arena.spin
        cdef int64_t end = now + patience
        cdef int64_t dozing = now + DOZE if task.woke and self.call_ns < DOZE else 0
        cdef int64_t nap
        cdef int slack
        if not self.arena.lanes or self.inert or self.arena.head == NULL:
            return
        # Not after a worker had to be woken (it would be put on the processor that this keeps busy), and
        # not if calls take longer than such a moment.
        if task.state == T_LEASED and not task.woke and self.call_ns < self.arena.spin:
            if self.sleeping_for is None:
                a32_store_relaxed(&self.arena.head.parked, AWAKE)
            while task.state == T_LEASED and self.arena.head != NULL and now_ns() < until:
                self.look_until(until)
                self.drain_everything()
                if self.noisy():
                    self.tell()                     # of what is not this thread's
        if self.sleeping_for is None:
            self.sleeping_for = task
            slack = prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0)
            if dozing and slack > SHARP:
                prctl(PR_SET_TIMERSLACK, <unsigned long>SHARP, 0, 0, 0)
            try:
                while (task.state == T_LEASED or task.state == T_WAITING) and self.arena.head != NULL:
                    now = now_ns()
                    if patience >= 0 and now >= end:
                        break
                    nap = BACKSTOP if now >= dozing else NAP
                    self.sleep_here(min(nap, end - now) if patience >= 0 else nap)
                    PyErr_CheckSignals()
            finally:
                if dozing and slack > SHARP:
                    prctl(PR_SET_TIMERSLACK, <unsigned long>slack, 0, 0, 0)
                self.sleeping_for = None
                self.hand_back()

    cdef int sleep_here(self, int64_t ns) except -1:
        """Until a worker has put something into its outbox, or the task that is slept for is over."""
        cdef bint late = False
        park(&self.arena.head.parked, PARKED_HERE)
        if not self.unread():
            late = self.wait_here(ns)
            # A worker may be about to wake us: what is lost is what it does not tell in all that time.
            if late and ns == BACKSTOP and self.unread() and self.wait_here(BACKSTOP):
                self.lost()
        self.drain_everything()
        if self.noisy():
            self.tell()                             # whoever else has something to do now
        return 0

    cdef bint wait_here(self, int64_t ns) except -1:
        """Sleep on the parked word. Whether nobody has taken it back in that time."""
        cdef bint late
        if self.arena.head == NULL:
            return False
        self.arena.lookers += 1                     # the word stays mapped
        with nogil:
            late = futex_wait(&self.arena.head.parked, PARKED_HERE, ns)
            late = late and a32_load_relaxed(&self.arena.head.parked) == PARKED_HERE
        self.stop_looking()
        return late

    cdef int hand_back(self) except -1:
        """The thread looks no more: whoever did before is told from now on."""
        if self.arena.head == NULL:
            return 0
        if self.asleep:
            park(&self.arena.head.parked, PARKED)
            if self.unread():
                self.drain_everything()
        else:
            a32_store_relaxed(&self.arena.head.parked, AWAKE)
        return 0

    def fulfil(self, Task task not None, read):
        """Set the future of a call whose result has come in: read(exporter) is its value.

        Not if anybody else waits for it: callbacks run in the collector. Python code runs in `read` alone,
        and when that raises, the outcome stays for the collector. So wherever Ctrl-C strikes, nothing is
        lost. Raises: KeyboardInterrupt; all else that `read` raises is the collector's to deal with.
        """
        cdef Promise future = task.future
        cdef bint fulfilled = False
        cdef Py_ssize_t i
        cdef tuple outcome
        for i in range(len(self.outcomes)):
            outcome = <tuple>self.outcomes[i]
            if outcome[1] is task:
                break
        else:
            return
        if future is None or future.watched() or outcome[0] != OUTCOME_FRAME:
            return
        self.outcomes.pop(i)
        try:
            fulfilled = future.fulfil(read(outcome[4]))
        except KeyboardInterrupt:                   # Ctrl-C, in all likelihood, not the result's doing
            raise
        except BaseException:
            pass
        finally:
            if fulfilled:
                self.done += 1
            else:
                self.outcomes.append(outcome)

    def take_outcomes(self):
        """What has come in since the last call."""
        cdef list outcomes = self.outcomes
        self.nudged = False
        self.outcomes = []
        return outcomes

    @property
    def has_outcomes(self):
        """Whether there is something for the collector."""
        return len(self.outcomes) > 0

    def take_news(self):
        """Whether the collector must be told of outcomes; True once until it has taken them."""
        if self.nudged or not self.outcomes:
            return False
        self.nudged = True
        return True

    @property
    def quiet(self):
        """Whether nobody has to be told of anything."""
        return not self.noisy()

    cdef bint noisy(self) except -1:
        return (len(self.announce) > 0 or len(self.repeat) > 0
                or (not self.nudged and len(self.outcomes) > 0))

    def open_slot(self, uint32_t number, uint32_t generation):
        """A free slot, made LIVE for a new process; -1: none is free."""
        cdef uint32_t i
        cdef slot_t *slot
        cdef SlotTable table
        for i in range(self.arena.slots):
            slot = self.arena.slot(i)
            table = self.slots[i]
            if table.state == S_FREE:
                table.state = S_LIVE
                table.incarnation += 1
                table.ring_tail = 0
                table.outbox_head = 0
                table.suspect = False
                table.acted = False
                table.untold = 0
                a64_store_relaxed(&slot.rescued, 0)
                slot.incarnation = table.incarnation
                slot.number = number
                slot.generation = generation
                slot.failure_bytes = 0
                a32_store_relaxed(&slot.control, 0)
                a64_store_relaxed(&slot.ring_tail, 0)
                a64_store_relaxed(&slot.ring_head, 0)
                a64_store_relaxed(&slot.outbox_tail, 0)
                a64_store_relaxed(&slot.outbox_head, 0)
                a32_store_relaxed(&slot.phase, P_BOOT)
                a32_store_relaxed(&slot.running, 0)
                a64_store_relaxed(&slot.tasks_done, 0)
                a32_store_relaxed(&slot.turn, 0)
                a32_store_relaxed(&slot.parked, AWAKE)
                a32_store_release(&slot.state, S_LIVE)
                return i
        return -1

    def occupy(self, uint32_t index, int pidfd):
        """A process lives in the slot: its leases may be killed through this pidfd."""
        cdef guard_t *guard = &self.keeper.guards[index]
        guard_acquire(guard)
        guard.pidfd = pidfd
        guard.killing = False
        guard.armed = True
        guard_release(guard)

    def vacate(self, uint32_t index):
        """The process is gone: nothing is signalled through its pidfd any more, which is returned."""
        cdef guard_t *guard = &self.keeper.guards[index]
        cdef int pidfd
        cdef SlotTable table = self.slots[index]
        guard_acquire(guard)
        pidfd = guard.pidfd
        guard.pidfd = -1
        guard.armed = False
        guard_release(guard)
        table.ready = False
        table.state = S_DYING
        a32_store_release(&self.arena.slot(index).state, S_DYING)
        return pidfd

    def worked(self, uint32_t index):
        """Whether the process in a slot has done any of its work, or was killed for it.

        From the words, not from the worker's hints: it may have been killed between the two.
        """
        cdef uint64_t word
        if self.keeper.guards[index].killing or a64_load_relaxed(&self.arena.slot(index).tasks_done):
            return True
        for task in (<SlotTable>self.slots[index]).tasks:
            if task is not None:
                word = a64_load_acquire(&self.arena.lease(index, (<Task>task).entry).word)
                if l_state(word) != L_LEASED and l_state(word) != L_FREE:
                    return True
        return False

    def signal(self, uint32_t index, int number):
        """Send a signal to the process in a slot. False: there is none."""
        return not self.inert and self.send_signal(index, number)

    def incarnation(self, uint32_t index):
        """Counts the processes that lived in a slot."""
        return (<SlotTable>self.slots[index]).incarnation

    def phase(self, uint32_t index):
        """What the worker in a slot says of itself: P_*; anything else reads as P_BOOT."""
        cdef uint32_t phase
        if index >= self.arena.slots:               # the runtime has ended
            return P_LEAVING
        phase = a32_load_acquire(&self.arena.slot(index).phase)
        return phase if phase <= P_LEAVING else P_BOOT

    def failure(self, uint32_t index):
        """The pickled exception that a worker left when it could not start."""
        cdef uint64_t n = self.arena.slot(index).failure_bytes
        n = min(n, self.arena.bounce_bytes)
        return PyBytes_FromStringAndSize(self.arena.bounce(index), <Py_ssize_t>n)

    def make_ready(self, uint32_t index):
        """Lease to this slot from now on."""
        (<SlotTable>self.slots[index]).ready = True
        (<SlotTable>self.slots[index]).draining = False
        self.work()

    def stop_slot(self, uint32_t index):
        """Lease nothing more to a slot; its worker finishes what it runs and leaves."""
        (<SlotTable>self.slots[index]).draining = True
        a32_store_release(&self.arena.slot(index).control, C_STOP)
        self.inbox.append((DO_UNLOAD, index))       # what it has not started goes to the others
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
        """Resolve the leases of a slot that were killed, without waiting for the death of its process.

        After KILLED nothing else is an answer; but results that a chunk had delivered before count.
        """
        if self.keeper.guards[index].killing:
            self.inbox.append((DO_UNLOAD, index))
            self.work()

    def rescan(self):
        """The backstop: find what a lost hint would have told. Called every 100 ms while work is out.

        It acts on what it sees unchanged for the third time in a row: results are taken in; leases that a
        worker does not look at (it may be stopped) go to another one, or are announced again. What counts as
        rescued is only what no hint tells of afterwards: the others were late.
        """
        cdef uint32_t i
        cdef uint64_t head, place
        cdef bint unread, unseen
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
            head = table.outbox_head
            place = a64_load_relaxed(&slot.ring_head)
            unread = outbox_waiting(slot, head) != 0
            unseen = table.ring_tail != place and a32_load_relaxed(&slot.running) == 0
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
            elif table.inflight and self.others(i):
                table.suspect = True
                table.suspect_at = place
                self.inbox.append((DO_UNLOAD, i))
                self.work()
            else:
                self.repeat.add(i)

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
            for block in table.kept.values():
                total += (<HostBlock>block).nbytes
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
        return self.accepted <= self.done + self.failed + self.vanished

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

    def counts(self):
        """For tests: (blocks kept for views in workers, leases out, announcements due)."""
        cdef SlotTable table
        cdef uint64_t kept = 0, inflight = 0
        for table in self.slots:
            kept += <uint64_t>len(table.kept)
            inflight += table.inflight
        return kept, inflight, len(self.announce)
