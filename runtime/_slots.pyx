# cython: language_level=3
"""The life of a slot: a process moves in, says how it is, and is signalled, until it is gone.

The sweep behind it is in _harvest.pyx; whether it is leased to, and what becomes of that, in _dispatch.pyx.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from runtime._atomics cimport *
from runtime._arena cimport Arena, HostBlock, first_lane
from runtime._layout cimport *
from runtime._lease cimport slot_renew
from runtime._records cimport T_LEASED, SlotTable, Task
from runtime._report cimport read_report
from runtime._threads cimport guard_acquire, guard_of, guard_release, guard_t


cdef class Slots(Harvest):
    """Processes in slots, as the supervisor opens and closes them."""

    def __cinit__(self, Arena arena, *args):
        self.tallies = <tally_t *>PyMem_Calloc(arena.room, sizeof(tally_t))
        if self.tallies == NULL:
            raise MemoryError("no memory for the table of numbers")

    def __dealloc__(self):
        PyMem_Free(self.tallies)

    def add_slots(self, uint32_t slots):
        """Have so many slots from now on, or as many as another caller wants. Raises: as Arena.add_slots.

        The tables come first: until the arena counts a slot, nobody looks at its part of the region. If the
        runtime ends meanwhile, nothing comes of it.
        """
        while <uint32_t>len(self.slots) < min(slots, self.arena.room):
            self.slots.append(SlotTable(self.arena.leases))
        self.arena.lookers += 1                     # the region stays mapped
        try:
            self.arena.add_slots(slots)
        finally:
            self.stop_looking()

    cdef int stop_looking(self) except -1:
        """The tables may go: if the runtime has ended meanwhile, now."""
        self.arena.lookers -= 1
        if self.arena.ending:
            self.arena.release()
        return 0

    def open_slot(self, uint32_t number, uint32_t generation):
        """The first of the free slots that were made LIVE for a new process; -1: there are none."""
        cdef uint32_t i, k
        for i in range(0, self.arena.slots, self.arena.threads):
            if (<SlotTable>self.slots[i]).state == S_FREE:      # then all of its process are
                for k in range(i, i + self.arena.threads):
                    self.open_lane(k, number, generation)
                return i
        return -1

    cdef int open_lane(self, uint32_t index, uint32_t number, uint32_t generation) except -1:
        cdef slot_t *slot = self.arena.slot(index)
        cdef SlotTable table = self.slots[index]
        table.state = S_LIVE
        table.incarnation += 1
        table.ring_tail = 0
        table.outbox_head = 0
        table.suspect = False
        table.nonsense = 0
        table.acted = False
        table.untold = 0
        table.number = number
        table.counted = number < self.arena.room
        a64_store_relaxed(&slot.rescued, 0)
        slot.incarnation = table.incarnation
        slot.number = number
        slot.generation = generation
        slot.failure_bytes = 0
        a32_store_relaxed(&slot.control, 0)
        slot_renew(slot)
        a32_store_relaxed(&slot.phase, P_BOOT)
        a64_store_relaxed(&slot.tasks_done, 0)
        a64_store_relaxed(&slot.busy, 0)
        memset(slot.ran, 0, sizeof(slot.ran))
        memset(slot.waited, 0, sizeof(slot.waited))
        a64_store_relaxed(&slot.waited_ns, 0)
        table.signalled = False
        a32_store_release(&slot.state, S_LIVE)
        return 0

    def occupy(self, uint32_t index, int pidfd):
        """A process lives in the slots from `index` on: its leases may be killed through this pidfd."""
        cdef guard_t *guard = guard_of(self.keeper, index)
        cdef uint32_t i
        for i in range(index, index + self.arena.threads):
            self.keeper.standing[i].word = 0    # of the last one: words of two entries may be alike
        guard_acquire(guard)
        guard.pidfd = pidfd
        guard.killing = False
        guard.armed = True
        guard_release(guard)

    def vacate(self, uint32_t index):
        """The process is gone: nothing is signalled through its pidfd any more, which is returned."""
        cdef guard_t *guard = guard_of(self.keeper, index)
        cdef int pidfd
        cdef uint32_t i
        cdef SlotTable table
        guard_acquire(guard)
        pidfd = guard.pidfd
        guard.pidfd = -1
        guard.armed = False
        guard_release(guard)
        for i in range(index, index + self.arena.threads):
            table = self.slots[i]
            if table.counted:
                self.tallies[table.number].tasks += a64_load_relaxed(&self.arena.slot(i).tasks_done)
                self.tallies[table.number].busy += self.busy_ns(i)
                self.add_times(i, &self.times)
                table.counted = False
            table.ready = False
            table.state = S_DYING
            a32_store_release(&self.arena.slot(i).state, S_DYING)
        return pidfd

    def worked(self, uint32_t index):
        """Whether the process in a slot has done any of its work, or was killed for it."""
        cdef uint32_t i
        if guard_of(self.keeper, index).killing:
            return True
        for i in range(index, index + self.arena.threads):
            if self.lane_worked(i):
                return True
        return False

    cdef bint lane_worked(self, uint32_t index) except -1:
        """From the words, not from the worker's hints: it may have been killed between the two."""
        cdef uint64_t word
        if a64_load_relaxed(&self.arena.slot(index).tasks_done):
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

    def sent_kill(self, uint32_t index):
        """Whether the process in a slot, or the last one, was sent SIGKILL by us."""
        return (guard_of(self.keeper, index).killing
                or (<SlotTable>self.slots[first_lane(self.arena, index)]).signalled)

    cpdef uint64_t busy_ns(self, uint32_t index) except? 0xFFFFFFFFFFFFFFFF:
        """Nanoseconds that the worker in a slot has spent in user code, what runs now included.

        Whatever it writes there, it is no longer than the machine has been up: sums of it overflow nowhere.
        """
        cdef slot_t *slot
        cdef uint64_t busy, ended, now, started = 0
        cdef uint32_t running
        if index >= self.arena.slots:               # the runtime has ended
            return 0
        slot = self.arena.slot(index)
        busy = a64_load_acquire(&slot.busy)
        running = a32_load_acquire(&slot.running)
        if 0 < running <= self.arena.leases:
            started = a64_load_acquire(&self.arena.lease(index, running - 1).started)   # B2
        ended = a64_load_acquire(&slot.busy)
        now = <uint64_t>now_ns()
        if ended != busy:                           # it ended between the two: all of it is counted by now
            busy = ended
        elif 0 < started < now:
            busy += now - started
        return min(busy, now)

    cdef list counted_of(self, uint32_t number):
        """Slots whose processes are a worker number's, and are not in its tally yet."""
        cdef uint32_t i
        return [i for i in range(self.arena.slots)
                if (<SlotTable>self.slots[i]).counted and (<SlotTable>self.slots[i]).number == number]

    def tasks_of(self, uint32_t number):
        """Items that the processes of a worker number have finished; it never goes backwards."""
        if number >= self.arena.room:
            return 0
        slots = self.counted_of(number)
        living = [a64_load_relaxed(&self.arena.slot(i).tasks_done) for i in slots]
        return self.tallies[number].tasks + sum(living)

    def busy_of(self, uint32_t number):
        """Nanoseconds that the processes of a worker number have spent in user code; never backwards."""
        cdef uint64_t total
        if number >= self.arena.room:
            return 0
        slots = self.counted_of(number)
        total = self.tallies[number].busy + sum([self.busy_ns(i) for i in slots])
        self.tallies[number].shown = max(self.tallies[number].shown, total)
        return self.tallies[number].shown

    cdef void add_times(self, uint32_t index, times_t *times) noexcept:
        """What the process in a slot has counted. Whatever it has written there, sums wrap."""
        cdef slot_t *slot = self.arena.slot(index)
        cdef uint32_t k
        for k in range(<uint32_t>BUCKETS):
            times.ran[k] += a64_load_relaxed(&slot.ran[k])
            times.waited[k] += a64_load_relaxed(&slot.waited[k])
        times.waited_ns += a64_load_relaxed(&slot.waited_ns)

    def histograms(self):
        """(items by the time that they ran, calls by the time that they waited, ns that these waited in all).

        By bucket, see BUCKETS. Of all processes that there were, and none of it goes backwards. Of calls one
        in TIMED is counted.
        """
        cdef times_t now = self.times
        cdef uint32_t i, k
        for i in range(self.arena.slots):
            if (<SlotTable>self.slots[i]).counted:
                self.add_times(i, &now)
        for k in range(<uint32_t>BUCKETS):
            self.shown.ran[k] = max(self.shown.ran[k], now.ran[k])
            self.shown.waited[k] = max(self.shown.waited[k], now.waited[k])
        self.shown.waited_ns = max(self.shown.waited_ns, now.waited_ns)
        return ([self.shown.ran[k] for k in range(<uint32_t>BUCKETS)],
                [self.shown.waited[k] for k in range(<uint32_t>BUCKETS)], self.shown.waited_ns)

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

    # ---- what is asked -----------------------------------------------------------------------------------

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

    @property
    def pinned_bytes(self):
        """Bytes of argument blocks that views in workers keep."""
        cdef SlotTable table
        cdef uint64_t total = 0
        for table in self.slots:
            for held in table.kept.values():
                total += (<HostBlock>(<tuple>held)[0]).nbytes
        return total
