# cython: language_level=3
"""Who waits for workers and how it is woken; who must be told of what has come in.

Two wait on the host's side: the collector, and a thread that needs a result. Each watches the outboxes for a
moment, then sleeps: the collector in zmq, the thread on the parked word itself ("Parking" in _layout.pxd).
One thread at a time sleeps so; while it does, it stands in for the collector.

Unlike what stands below and above this, the methods here that watch or sleep release the GIL meanwhile, and
`await_call` and `fulfil` call Python code: `tell`, `read`, signal handlers. So what they know of the runtime
is looked at again afterwards; `lookers` keeps the tables mapped, but without them `arena.head` may be gone.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t, uint32_t

from runtime._atomics cimport *
from runtime._arena cimport Arena
from runtime._future cimport Promise
from runtime._layout cimport *
from runtime._lease cimport outbox_waiting, park
from runtime._records cimport T_LEASED, T_WAITING, SlotTable, Task
from runtime._leasing import OUTCOME_FRAME


cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long arg2, unsigned long arg3, unsigned long arg4, unsigned long arg5)
    int PR_SET_TIMERSLACK, PR_GET_TIMERSLACK

# A processor that has fallen idle takes longer to be woken by another one than by its own timer. So who had
# to wake a worker, and waits for a short call, sleeps in naps for as long as that may take.
cdef int64_t DOZE = 300_000                 # ns of naps
cdef int64_t NAP = 20_000                   # ns
cdef int64_t SHARP = 1_000                  # ns by which a nap may be late
cdef uint64_t WISH = 1 << 30                # bytes that a worker may have made: it may have run wild
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


cdef class Waiting(Slots):
    """Waits for outboxes, and says who must be told of leases and outcomes."""

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
        self.drain_out()

    cdef int drain_out(self) except -1:
        """Take in what every worker has finished; at once, or leave it to who is inside; see Dispatcher."""
        return 0

    def park(self):
        """The collector is about to sleep: from now on it must be told. False: there is something to do.

        While a user's thread sleeps on the parked word, that one is told, and tells the collector.
        """
        if not self.arena.lanes or self.arena.head == NULL:
            return True
        self.asleep = True
        if self.sleeping_for is None:
            park(&self.arena.head.parked, PARKED)
        if self.outcomes or self.unread() or self.wishes():
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

    # ---- who finds no room ----

    cdef bint wishes(self) noexcept:
        """Whether somebody has found no room, and the region can be seen to."""
        return (self.wanted or (self.arena.head != NULL and a64_load_relaxed(&self.arena.head.wanted))
                ) and not self.arena.growing

    @property
    def cramped(self):
        """Whether somebody waits for the region to grow."""
        return self.wishes() or self.arena.growing

    def make_room(self):
        """For the collector: grow the region for those who have found no room: a task that is to be leased,
        workers with results. What they want is a hint: they look again.
        """
        cdef uint64_t wish, nbytes
        if not self.wishes():
            return
        wish = a64_load_relaxed(&self.arena.head.wanted) if self.arena.head != NULL else 0
        nbytes = max(self.wanted, min(wish, WISH, self.arena.capacity * EXTENT))
        try:
            self.arena.grow(nbytes)
        finally:
            self.wanted = 0
            if self.arena.head != NULL and wish:
                a64_cas_acq_rel(&self.arena.head.wanted, wish, 0)
        self.work()

    cdef int work(self) except -1:
        """Lease what can be leased; at once, or leave it to who is inside; see Dispatcher."""
        return 0

    cdef bint within(self) noexcept:
        """Whether this thread is in the middle of the bookkeeping: in a destructor that runs there."""
        return self.busy and self.inside == PyThread_get_thread_ident()

    @property
    def entered(self):
        """Whether this thread is in the middle of the bookkeeping, and so must not wait."""
        return self.within()

    def must_not_wait(self):
        """Raises: RuntimeError when this thread is in the middle of the bookkeeping, which nobody else can
        finish: in a destructor that ran there, or in a signal handler that ran in that.

        For a wait with a timeout, too, as Thread.join of the thread itself: it would hold up the whole
        runtime for that time, and what it is for could not come; a loop of such waits would never end.
        """
        if self.within():
            raise RuntimeError(
                "waiting here would never end: this is a destructor (or a signal handler that interrupted "
                "one) that Python runs in the middle of the runtime's own work; that goes on when it "
                "returns. Note what is to be done, and do it elsewhere"
            )

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
        self.must_not_wait()
        if not self.arena.lanes or self.inert or self.arena.head == NULL:
            return
        # Not after a worker had to be woken (it would be put on the processor that this keeps busy), and
        # not if calls take longer than such a moment.
        if task.state == T_LEASED and not task.woke and self.call_ns < self.arena.spin:
            if self.sleeping_for is None:
                a32_store_relaxed(&self.arena.head.parked, AWAKE)
            while task.state == T_LEASED and self.arena.head != NULL and now_ns() < until:
                self.look_until(until)
                self.drain_out()
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
        if not self.unread() and (self.nudged or not self.wishes()):
            late = self.wait_here(ns)
            # A worker may be about to wake us: what is lost is what it does not tell in all that time.
            if late and ns == BACKSTOP and self.unread() and self.wait_here(BACKSTOP):
                self.lost()
        self.drain_out()
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
                self.drain_out()
        else:
            a32_store_relaxed(&self.arena.head.parked, AWAKE)
        return 0

    # ---- who must be told of what ----

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
            fulfilled = future.fulfil(read(outcome[4], outcome[5]))
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
        """Whether the collector must be told of something; True once until it has taken outcomes."""
        if self.nudged or not (self.outcomes or self.wishes()):
            return False
        self.nudged = True
        return True

    @property
    def quiet(self):
        """Whether nobody has to be told of anything."""
        return not self.noisy()

    cdef bint noisy(self) except -1:
        return (len(self.announce) > 0 or len(self.repeat) > 0
                or (not self.nudged and (len(self.outcomes) > 0 or self.wishes())))
