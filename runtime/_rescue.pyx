# cython: language_level=3
"""The backstop of hints: what one that is lost, a worker that is stopped, or one that writes nonsense leaves.
"""
from libc.signal cimport SIGKILL
from libc.stdint cimport uint32_t, uint64_t

from runtime._atomics cimport *
from runtime._layout cimport *
from runtime._lease cimport outbox_waiting
from runtime._leasing cimport DO_COLLECT, DO_DRAIN, DO_DRAIN_ALL, DO_UNLOAD
from runtime._records cimport T_LEASED, SlotTable, Task


cdef class Rescue(Waiting):
    """Finds what no hint tells of."""

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
