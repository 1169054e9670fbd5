# cython: language_level=3
"""What came back from workers, and what the dead leave: outboxes, results, the sweep of a slot.

A worker is not trusted: what is read from shared memory is copied once, then checked, and the host's own
records (Task, SlotTable) decide. A record that makes no sense is counted and dropped.
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.signal cimport SIGKILL
from libc.string cimport memcpy

from runtime._atomics cimport *
from runtime._arena cimport HostBlock, first_lane
from runtime._extent cimport heap_adopt, heap_run, heap_sweep
from runtime._frame cimport S_PLAIN, SINGLE_HEAD, frame_refs, read_single
from runtime._layout cimport *
from runtime._lease cimport outbox_take, outbox_waiting
from runtime._records cimport T_LEASED, T_OVER, T_WAITING, SlotTable
from runtime._plain cimport plain_loads
from runtime._report cimport read_report
from runtime._leasing import (
    OUTCOME_DIED, OUTCOME_FRAME, OUTCOME_KILLED, OUTCOME_LOST, OUTCOME_NEIGHBOUR)
from runtime._threads cimport guard_acquire, guard_of, guard_release, guard_t


cdef uint64_t NO_MEMORY = 0xFFFFFFFFFFFFFFFFULL     # inbound_total: the host has none for the rest


cdef class Harvest(Leasing):
    """Takes in what workers leave in their outboxes and lease tables."""

    cdef int drain_now(self, uint32_t index) except -1:
        cdef record_t record
        cdef slot_t *slot = self.arena.slot(index)
        cdef SlotTable table = self.slots[index]
        cdef uint64_t waiting = outbox_waiting(slot, table.outbox_head)
        if waiting > self.arena.outbox:             # no outbox holds so many: the worker has run wild
            self.strange()
            self.send_signal(index, SIGKILL)
            return 0
        while waiting:
            outbox_take(slot, self.arena.records(index), &table.outbox_head, self.arena.outbox - 1, &record)
            self.process(index, table, &record)
            waiting -= 1
        self.stuck.pop(index, None)
        return 0

    cdef bint drain_all(self) except -1:
        """Take in what every worker has finished. Whether there was anything; not without lanes, where a
        message says what to look at.
        """
        cdef uint32_t i
        cdef bint found = False
        cdef SlotTable table
        if not self.arena.lanes:
            return False
        for i in range(self.arena.slots):
            table = <SlotTable>self.slots[i]
            if table.state == S_LIVE and outbox_waiting(self.arena.slot(i), table.outbox_head):
                self.drain_now(i)
                found = True
        return found

    cdef int process(self, uint32_t index, SlotTable table, record_t *record) except -1:
        cdef Task task
        if record.kind == R_UNKEEP:
            return self.unkept(table, (record.body, record.tag))
        if record.kind == R_KEEP:
            return self.kept(index, table, record.body, record.tag)
        if record.entry >= self.arena.leases or table.tasks[record.entry] is None:
            return self.strange()
        task = <Task>table.tasks[record.entry]
        if l_tag(record.word) != task.tag:
            return self.strange()
        if record.kind == R_DONE:
            self.harvest(index, task)
        elif record.kind == R_PARTIAL:
            self.partial(index, task, record)
        elif record.kind == R_ASK:
            self.serve(index, task, record)
        elif record.kind == R_OFFER:
            self.accept(index, task, record)
        else:
            self.strange()
        return 0

    cdef int kept(self, uint32_t index, SlotTable table, uint64_t body, uint64_t tag) except -1:
        """A view of a block outlives its lease; the worker says so before the lease is DONE, so it lives."""
        cdef HostBlock block = self.known(index, body, tag)
        if block is None:
            return self.strange()
        held = table.kept.get((body, tag))
        table.kept[body, tag] = (block, 1 if held is None else (<tuple>held)[1] + 1)
        return 0

    cdef int unkept(self, SlotTable table, tuple key) except -1:
        """The last view that has outlived one of the leases of this block is gone."""
        held = table.kept.pop(key, None)
        if held is None:
            return self.strange()
        if (<tuple>held)[1] > 1:
            table.kept[key] = ((<tuple>held)[0], (<tuple>held)[1] - 1)
        return 0

    cdef HostBlock known(self, uint32_t index, uint64_t body, uint64_t tag):
        """A block that a worker names: the host's, or its own, which is adopted; None: neither."""
        cdef HostBlock block = self.arena.block_at(body, tag)
        return block if block is not None else self.adopted(index, body, tag, 0)

    cdef dict referred(self, uint32_t index, exporter):
        """The blocks that a result refers to, {(offset, tag): block}; None: it refers to none. What is its
        worker's own among them is the host's from now on: so one that is dropped is looked at, too.
        """
        cdef Py_buffer buffer
        cdef set found
        cdef HostBlock block
        cdef dict blocks = None
        PyObject_GetBuffer(exporter, &buffer, PyBUF_SIMPLE)
        try:
            found = frame_refs(<const char *>buffer.buf, <uint64_t>buffer.len)
        finally:
            PyBuffer_Release(&buffer)
        if found is not None:
            blocks = {}
            for key in found:
                block = self.known(index, key[0], key[1])
                if block is not None:           # else whoever reads the frame says what is missing
                    blocks[key] = block
        return blocks

    cdef int strange(self) noexcept:
        """A record that makes no sense: counted, dropped."""
        self.malformed += 1
        return 0

    cdef object adopted(self, uint32_t index, uint64_t body, uint64_t tag, uint64_t nbytes):
        """The block that a record names, now the host's; or None: it is not what the record says.
        nbytes: what is used of it; 0: all.
        """
        cdef uint64_t at, run
        if body < self.arena.extents_at or (body - self.arena.extents_at) % EXTENT:
            return None
        at = (body - self.arena.extents_at) // EXTENT
        if not heap_adopt(&self.arena.heap, at, tag, index):
            return None
        run = heap_run(&self.arena.heap, at) * EXTENT
        block = HostBlock.wrap(self.arena, at, tag, nbytes if nbytes else run)
        return block if nbytes <= run else None     # its destructor frees it

    cdef int partial(self, uint32_t index, Task task, record_t *record) except -1:
        """Items of a chunk that are finished ahead of the rest."""
        exporter = self.adopted(index, record.body, record.tag, record.bytes)
        if task.state != T_LEASED:
            return 0                                # killed before this came: after that nothing is an answer
        blocks = self.referred(index, exporter) if exporter is not None else None
        if exporter is None or task.batch is None or record.count > task.count - task.delivered:
            return self.strange()
        self.outcomes.append((OUTCOME_FRAME, task, task.delivered, record.count, exporter, blocks))
        task.delivered += record.count
        self.leased -= record.count
        return 0

    cdef int harvest(self, uint32_t index, Task task) except -1:
        """DONE -> FREE: take the result, keep what a view still needs, give the entry back."""
        cdef lease_t *lease = self.arena.lease(index, task.entry)
        cdef uint64_t word = a64_load_acquire(&lease.word)      # pairs with D1
        cdef lease_t copy                       # the worker may scribble: look once, use the copy
        cdef uint64_t ran, delivered = task.delivered
        cdef object exporter = None
        cdef dict blocks = None
        cdef list found = []
        cdef bint plain = False
        if l_state(word) != L_DONE or l_tag(word) != task.tag or task.state != T_LEASED:
            return 0
        memcpy(&copy, lease, <size_t>(<char *>&lease.reported - <char *>lease))
        if a64_load_relaxed(&lease.reported) and task.future is not None:
            task.future.reported = read_report(lease)
        ran = l_item(word)
        if copy.out_where == AT_INLINE and copy.out_bytes <= INLINE_BYTES:
            memcpy(copy.inline_, lease.inline_, copy.out_bytes)
            plain = self.plain_result(task, &copy, found)
            if not plain:
                exporter = PyBytes_FromStringAndSize(copy.inline_, <Py_ssize_t>copy.out_bytes)
        elif copy.out_where == AT_BLOCK:
            exporter = self.adopted(index, copy.out_body, copy.out_tag, copy.out_bytes)
        elif copy.out_where == AT_BOUNCE and task.inbound is not None:
            if task.inbound_total == <uint64_t>len(task.inbound):
                exporter = task.inbound
            else:
                self.referred(index, task.inbound)          # so that they are let go of
        if exporter is not None:
            blocks = self.referred(index, exporter)
        self.over(task, T_OVER)
        a64_store_release(&lease.word, lease_word(L_FREE, 0, task.tag))
        if copy.out_where == AT_BOUNCE and task.inbound is not None and task.inbound_total == NO_MEMORY:
            if not delivered < ran <= task.count:
                ran = task.count
            self.outcomes.append((OUTCOME_LOST, task, delivered, ran, None))
            if task.batch is not None:
                self.put_back(task, ran, -1)
            self.release(task)
            return 0
        if (exporter is None and not plain) or ran > task.count or ran <= delivered:
            self.outcomes.append((OUTCOME_LOST, task, delivered, task.count,
                                  "its worker wrote a malformed result"))
            self.release(task)
            return self.strange()
        if task.batch is not None:
            task.batch.measured(copy.out_ns, ran)
            self.outcomes.append((OUTCOME_FRAME, task, delivered, ran - delivered, exporter, blocks))
            self.put_back(task, ran, -1)
        else:
            self.call_ns = 0.9 * self.call_ns + 0.1 * copy.out_ns if self.call_ns > 0 else copy.out_ns
            if plain and task.future.fulfil(found[0]):
                self.done += 1
                task.retries = 0                    # so `release` forgets it
            else:
                if plain:                           # somebody has begun to wait while it was loaded
                    exporter = PyBytes_FromStringAndSize(copy.inline_, <Py_ssize_t>copy.out_bytes)
                self.outcomes.append((OUTCOME_FRAME, task, 0, 1, exporter, blocks))
        self.release(task)
        return 0

    cdef bint plain_result(self, Task task, lease_t *copy, list found) except -1:
        """Load the result of a call that is short and plain, if nobody waits on the lock of its future."""
        if (task.batch is not None or task.future.watched() or copy.out_bytes > INLINE_BYTES
                or read_single(copy.inline_, copy.out_bytes) != S_PLAIN):
            return False
        try:
            found.append(plain_loads(copy.inline_ + SINGLE_HEAD, <Py_ssize_t>(copy.out_bytes - SINGLE_HEAD)))
        except BaseException:
            return False                            # not what it says: the collector tells the user
        return True

    cdef int serve(self, uint32_t index, Task task, record_t *record) except -1:
        """The worker waits for a piece of the arguments' frame."""
        cdef slot_t *slot = self.arena.slot(index)
        if (task.by_value is None or record.bytes > self.arena.bounce_bytes
                or record.count > task.by_value.nbytes or record.bytes > task.by_value.nbytes - record.count):
            return self.strange()
        task.by_value.copy(self.arena.bounce(index), record.count, record.bytes)
        a32_fetch_add_acq_rel(&slot.turn, 1)
        futex_wake(&slot.turn, 1)
        return 0

    cdef int accept(self, uint32_t index, Task task, record_t *record) except -1:
        """The worker has put a piece of the result's frame into the bounce block."""
        cdef slot_t *slot = self.arena.slot(index)
        cdef lease_t *lease = self.arena.lease(index, task.entry)
        if record.bytes > self.arena.bounce_bytes:
            return self.strange()
        if record.count == 0:
            task.inbound = bytearray()
            task.inbound_total = lease.out_bytes
        if task.inbound is None:
            return self.strange()
        # It grows with what has come, not with what was announced, or a worker that runs wild could make the
        # host reserve a terabyte. One that misses a piece stays incomplete, and the harvest fails the task.
        if (record.count == <uint64_t>len(task.inbound) and task.inbound_total != NO_MEMORY
                and record.bytes <= task.inbound_total - record.count):
            try:
                PyByteArray_Resize(task.inbound, <Py_ssize_t>(record.count + record.bytes))
            except MemoryError:
                task.inbound_total = NO_MEMORY      # later pieces are dropped
                # The first one says to which blocks the result refers.
                PyByteArray_Resize(
                    task.inbound, <Py_ssize_t>min(record.count, <uint64_t>self.arena.bounce_bytes))
            else:
                memcpy(PyByteArray_AS_STRING(task.inbound) + record.count, self.arena.bounce(index),
                       record.bytes)
        a32_fetch_add_acq_rel(&slot.turn, 1)
        futex_wake(&slot.turn, 1)
        return 0

    cdef int settle_now(self, uint32_t index, information) except -1:
        """All slots of the process together: what any of them had finished counts before one is blamed."""
        cdef uint32_t i, ran = 0
        cdef uint32_t end = index + self.arena.threads
        cdef uint64_t state
        cdef Task task, culprit = None
        cdef list held
        for i in range(index, end):
            self.take_last(i)
        held = [pair[1] for pair in sorted(
            [(<Task>t).number, t] for i in range(index, end) for t in (<SlotTable>self.slots[i]).tasks
            if t is not None)]
        for entry in held:
            task = <Task>entry
            state = l_state(a64_load_acquire(&self.arena.lease(task.slot, task.entry).word))
            if state == L_DONE:
                self.harvest(task.slot, task)
            ran += state == L_RUNNING
            if culprit is None and (state == L_KILLED or task.killed):
                culprit = task
        for entry in reversed(held):                # the oldest ends up at the very front of the queue
            task = <Task>entry
            if (<SlotTable>self.slots[task.slot]).tasks[task.entry] is task:
                self.settle_task(task, information, ran, culprit)
        for i in range(index, end):
            self.sweep(i)
        return 0

    cdef int take_last(self, uint32_t index) except -1:
        """The records that a dead worker has left."""
        cdef SlotTable table = self.slots[index]
        cdef slot_t *slot = self.arena.slot(index)
        cdef record_t record
        cdef uint64_t waiting = outbox_waiting(slot, table.outbox_head)
        table.ready = False
        while 0 < waiting <= self.arena.outbox:
            outbox_take(slot, self.arena.records(index), &table.outbox_head, self.arena.outbox - 1, &record)
            if record.kind != R_ASK and record.kind != R_OFFER:     # nobody waits for a piece any more
                self.process(index, table, &record)
            waiting -= 1
        return 0

    cdef int sweep(self, uint32_t index) except -1:
        """No lease of a slot has an outcome to come: what its worker held and owned is given back."""
        cdef SlotTable table = self.slots[index]
        cdef slot_t *slot = self.arena.slot(index)
        cdef a64_t *word
        cdef uint32_t i
        for i in range(self.arena.leases):          # a worker that ran wild may have left nonsense anywhere
            word = &self.arena.lease(index, i).word
            if l_state(a64_load_relaxed(word)) != L_FREE:
                a64_store_relaxed(word, lease_word(L_FREE, 0, 0))
        table.kept.clear()
        table.draining = False
        heap_sweep(&self.arena.heap, index)
        self.announce.discard(index)
        self.repeat.discard(index)
        self.stuck.pop(index, None)
        self.rescued += a64_load_relaxed(&slot.rescued)
        a64_store_relaxed(&slot.rescued, 0)
        a32_store_release(&slot.state, S_FREE)
        table.state = S_FREE
        return 0

    cdef int settle_task(self, Task task, information, uint32_t ran, Task culprit) except -1:
        """What becomes of a lease that a dead worker has not finished."""
        cdef lease_t *lease = self.arena.lease(task.slot, task.entry)
        cdef uint64_t word = a64_load_acquire(&lease.word)
        a64_store_release(&lease.word, lease_word(L_FREE, 0, task.tag))
        if task.state != T_LEASED:                  # its outcome is known: killed, or cancelled just now
            if task.killed and task.batch is not None:
                self.put_back(task, task.delivered, task.killed_item)
            self.release(task)
        elif l_state(word) == L_LEASED:
            task.state = T_WAITING
            self.waiting += task.count
            self.release(task)
            self.requeue(task)
        else:
            self.blame(task, word, information, ran, culprit)
        return 0

    cdef int blame(self, Task task, uint64_t word, information, uint32_t ran, Task culprit) except -1:
        """The process died, or was killed, while it ran this: only the item that ran answers for it.

        ran: tasks that ran in it. culprit: the one that it was killed for; another one is its neighbour.
        """
        cdef uint64_t item = l_item(word) if task.batch is not None else 0
        cdef bint killed = l_state(word) == L_KILLED
        self.keep_report(task)
        self.over(task, T_OVER)
        if task.batch is not None:
            self.put_back(task, task.delivered, <int64_t>item)
        if task.batch is None or task.delivered <= item < task.count:
            if killed:
                self.outcomes.append((OUTCOME_KILLED, task, item, task.reason))
            elif self.arena.threads > 1 and guard_of(self.keeper, task.slot).killing:
                self.outcomes.append((OUTCOME_NEIGHBOUR, task, item, information, culprit))
            else:
                self.outcomes.append((OUTCOME_DIED, task, item, information, ran))
        self.release(task)
        return 0

    cdef int keep_report(self, Task task) except -1:
        """The last report of a call is its future's before the entry is reused."""
        cdef lease_t *lease = self.arena.lease(task.slot, task.entry)
        if task.future is not None and a64_load_relaxed(&lease.reported):
            task.future.reported = read_report(lease)
        return 0

    cdef int unload_now(self, uint32_t index) except -1:
        """Give leases of a slot that have not started to other workers; resolve those that were killed."""
        cdef SlotTable table = self.slots[index]
        cdef uint64_t word, item
        cdef Task task
        self.drain_now(index)
        for entry in reversed(self.take_back(index, self.arena.leases)):
            self.requeue(<Task>entry)
        for entry in table.tasks:
            if entry is None or (<Task>entry).state != T_LEASED:
                continue
            task = <Task>entry
            word = a64_load_acquire(&self.arena.lease(index, task.entry).word)
            if l_state(word) != L_KILLED or l_tag(word) != task.tag:
                continue
            if task.retry_timeouts and not task.reason:
                continue                            # the next attempt waits until this process is dead
            item = l_item(word) if task.batch is not None else 0
            # What is answered now is not asked of the word again: a worker that runs wild may change it.
            task.killed = True
            task.killed_item = <int64_t>item
            self.keep_report(task)
            self.over(task, T_OVER)
            if task.batch is None or task.delivered <= item < task.count:
                self.outcomes.append((OUTCOME_KILLED, task, item, task.reason))
        return 0

    cdef bint send_signal(self, uint32_t index, int number) noexcept:
        """A signal to the process in a slot. False: there is none."""
        cdef guard_t *guard = guard_of(self.keeper, index)
        cdef bint sent = False
        guard_acquire(guard)
        if guard.armed and guard.pidfd >= 0:
            sent = sys_pidfd_send_signal(guard.pidfd, number) == 0
            if number == SIGKILL:
                (<SlotTable>self.slots[first_lane(self.arena, index)]).signalled = True
        guard_release(guard)
        return sent
