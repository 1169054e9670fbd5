# cython: language_level=3
"""What waits, and how it is leased to workers, taken back, and put back. All of it is the host's own.

A queue entry is a Task (a call) or a Batch (the items of a map that are not leased). `pump` leases from the
head of the queue while a worker has credit; a Batch gives off a chunk at a time, sized by how long its items
take. When nothing waits, an idle worker gets half of what the fullest one has not started.

Rules for all that runs here, see _dispatch.pyx: no Python code, no waiting; and since a destructor may run at
any allocation, an entry is popped before it is worked on and looked at again before it is published.
"""
from collections import deque
from heapq import heappop, heappush

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.string cimport memcpy

from runtime._atomics cimport *
from runtime._layout cimport *
from runtime._frame cimport S_PLAIN, S_VALUE, SINGLE_HEAD, write_single
from runtime._lease cimport must_tell, ring_place, ring_put, ring_room
from runtime._records cimport T_CANCELLED, T_LEASED, T_OVER, T_WAITING, SlotTable, Span
from runtime._threads cimport guard_of

cdef int64_t ROOM_PATIENCE = 50_000_000     # ns a task waits for room before it travels by value
cdef int64_t GROWTH_PATIENCE = 2_000_000_000    # the same, while the region may grow
cdef uint64_t CHUNK_BYTES = 256 << 10       # bytes of a chunk, unless a single item is larger
cdef double AHEAD_NS = 2_000_000            # ns of work ahead of a worker, if that is two calls or more
cdef uint32_t DEPTH = 64                    # leases ahead while it is unknown how long a call takes
cdef uint32_t CHUNK_DEPTH = 2               # chunks ahead per worker: one runs, one waits
cdef uint32_t FUNCTIONS = 256               # function pickles kept in the region
cdef int64_t FUNCTION_BYTES = 256 << 10     # bytes of one, at most

# what an outcome tuple begins with
OUTCOME_FRAME = 0           # (.., task, first item, items, exporter of the frame, what it refers to)
OUTCOME_DIED = 1            # (.., task, item, information that settle() was given, tasks that ran then)
OUTCOME_KILLED = 2          # (.., task, item, reason)
OUTCOME_LOST = 3            # (.., task, first item, end, what went wrong; None: no memory in the host)
OUTCOME_ABANDONED = 4       # (.., task or None, batch or None, its entries, whether they count as cancelled)
OUTCOME_NEIGHBOUR = 5       # (.., task, item, information, the task that its process was killed for or None)


cdef class Leasing:
    """Queue and leases of one runtime; the base of Harvest and Dispatcher."""

    def __init__(self, Arena arena, DeadlineKeeper keeper):
        self.arena = arena
        self.keeper = keeper
        self.slots = [SlotTable(arena.leases) for _ in range(arena.slots)]
        self.levels = {}
        self.order = []
        self.inbox = deque()
        self.delayed = []
        self.functions = {}
        self.announce = set()
        self.repeat = set()
        self.outcomes = []
        self.stuck = {}
        self.tags = <uint64_t *>PyMem_Calloc(arena.room * arena.leases, sizeof(uint64_t))
        if self.tags == NULL:
            raise MemoryError("no memory for the table of tags")

    def __dealloc__(self):
        PyMem_Free(self.tags)

    cdef int enqueue(self, entry, bint front) except -1:
        """Put a task or a batch into the queue of its priority."""
        cdef int priority
        if isinstance(entry, Batch):
            if (<Batch>entry).queued or not (<Batch>entry).pending:
                return 0
            (<Batch>entry).queued = True
            priority = (<Batch>entry).priority
        else:
            priority = (<Task>entry).priority
        queue = self.levels.get(priority)
        if queue is None:
            queue = self.levels[priority] = deque()
            self.order = sorted(self.levels, reverse=True)
        if front:
            queue.appendleft(entry)
        else:
            queue.append(entry)
        return 0

    cdef int put_off(self, entry, Span span, int64_t delay) except -1:
        """Queue a task, or an item of a batch, ahead of the others, but not before so many nanoseconds."""
        if delay <= 0:
            return self.requeue_now(entry, span)
        self.put_offs += 1                          # so that two entries never compare more than numbers
        heappush(self.delayed, (now_ns() + delay, self.put_offs, entry, span))
        return 0

    cdef int requeue_now(self, entry, Span span) except -1:
        if span is None:
            return self.enqueue(entry, True) if (<Task>entry).state == T_WAITING else 0
        if not (<Batch>entry).dropped:              # else it was counted when that happened
            (<Batch>entry).pending.appendleft(span)
            self.enqueue(entry, True)
        return 0

    cdef int take_due(self, int64_t until) except -1:
        """Queue what was put off and whose time has come by then."""
        cdef tuple due
        while self.delayed and (<tuple>self.delayed[0])[0] <= until:
            due = <tuple>heappop(self.delayed)
            self.requeue_now(due[2], due[3])
        return 0

    cdef int forget(self, Task task) except -1:
        """Let go of what a task holds; its blocks are freed unless a view still needs them."""
        task.data = None
        task.buffers = None
        task.named = None
        task.block = None
        task.fn_block = None
        task.by_value = None
        task.inbound = None
        return 0

    cdef void over(self, Task task, int state) noexcept:
        """The last state of a task; a thread that sleeps until then is woken."""
        task.state = state
        if self.sleeping_for is task and self.arena.head != NULL:
            a32_store_relaxed(&self.arena.head.parked, AWAKE)
            futex_wake(&self.arena.head.parked, 1)

    cdef int release(self, Task task) except -1:
        """The lease word is FREE: give the entry back."""
        cdef SlotTable table = self.slots[task.slot]
        if table.tasks[task.entry] is not task:
            return 0                                # done before: a wish that came twice
        table.tasks[task.entry] = None
        table.free.append(task.entry)
        table.inflight -= 1
        self.leased -= task.count - task.delivered
        if task.batch is not None:
            table.chunks -= 1
        if task.timeout:
            self.keeper.disarm()
        task.by_value = None
        task.inbound = None
        if task.state == T_CANCELLED or (task.state == T_OVER and task.retries == 0):
            self.forget(task)                       # else the collector may want it once more
        return 0

    cdef uint32_t depth(self) noexcept:
        """Leases that a worker may have: about 2 ms of work, the rest keeps its order in the queue."""
        if self.call_ns <= 0:
            return min(DEPTH, self.arena.leases)
        if self.call_ns * self.arena.leases <= AHEAD_NS:
            return self.arena.leases
        return max(2, <uint32_t>(AHEAD_NS / self.call_ns))

    cdef bint drain_all(self) except -1:
        """Take in what workers have finished; see Harvest."""
        return False

    cdef int64_t pick(self, uint32_t depth) except -2:
        """The ready slot with the fewest leases, below `depth`; -1: none has credit."""
        cdef SlotTable table
        cdef int64_t best = -1
        cdef uint32_t i, least = depth
        if self.arena.threads > 1:
            return self.pick_lane(depth)
        for i in range(self.arena.slots):
            table = self.slots[i]
            if table.inflight < least and self.takes(i, table):
                best = i
                least = table.inflight
                if least == 0:
                    break
        return best

    cdef int64_t pick_lane(self, uint32_t depth) except -2:
        """As `pick`; of lanes with as few leases, one whose process has fewer: it has a GIL of its own."""
        cdef SlotTable table
        cdef int64_t best = -1, lane
        cdef uint32_t first, i, few, load
        cdef uint32_t least = depth, lightest = 0
        for first in range(0, self.arena.slots, self.arena.threads):
            if not (<SlotTable>self.slots[first]).ready:
                continue
            lane = -1
            few = depth
            load = 0
            for i in range(first, first + self.arena.threads):
                table = self.slots[i]
                load += table.inflight
                if table.inflight < few and self.takes(i, table):
                    lane = i
                    few = table.inflight
            if lane >= 0 and (few < least or (few == least and load < lightest)):
                best = lane
                least = few
                lightest = load
        return best

    cdef bint takes(self, uint32_t index, SlotTable table) except -1:
        """Whether a slot may be leased to."""
        if not table.ready or table.draining or self.room(index) == 0:
            return False
        if guard_of(self.keeper, index).killing:
            return False
        if table.suspect and a64_load_relaxed(&self.arena.slot(index).ring_head) == table.suspect_at:
            return False                            # it has not moved since leases were taken back from it
        table.suspect = False
        return True

    cdef int pump(self) except -1:
        """Lease from the head of the queue while a worker has credit."""
        cdef int64_t slot
        cdef Task task
        cdef Batch batch
        cdef uint32_t workers = 0
        cdef SlotTable table
        for table in self.slots:
            workers += table.ready and not table.draining
        if workers == 0 or self.closed or self.paused:
            return 0
        for priority in self.order:
            queue = self.levels[priority]
            while queue:
                entry = queue.popleft()             # first: a destructor may look at the queue at any time
                if isinstance(entry, Task):
                    task = <Task>entry
                    if task.state != T_WAITING:
                        continue
                    slot = self.pick(self.depth())
                    if slot < 0 and self.drain_all():
                        slot = self.pick(self.depth())
                    if slot < 0 or not self.lease(task, <uint32_t>slot):
                        queue.appendleft(task)
                        return 0
                else:
                    batch = <Batch>entry
                    if not batch.pending:
                        batch.queued = False
                        continue
                    queue.appendleft(batch)         # it stays at the front until it is empty
                    slot = self.pick(CHUNK_DEPTH)
                    if slot < 0 and self.drain_all():
                        slot = self.pick(CHUNK_DEPTH)
                    if slot < 0:
                        return 0
                    task = self.cut(batch, workers)
                    if task is not None and not self.lease(task, <uint32_t>slot):
                        self.uncut(task)
                        return 0
        self.balance()
        return 0

    cdef Task cut(self, Batch batch, uint32_t workers):
        """Make a chunk of a batch's next items."""
        cdef Task task = Task.__new__(Task)
        cdef uint32_t n = batch.chunk(workers)
        cdef uint64_t nbytes = 0
        cdef Span span
        cdef list spans = []
        self.numbers += 1
        task.number = self.numbers
        task.fn = batch.fn
        task.batch = batch
        task.timeout = batch.timeout
        task.priority = batch.priority
        task.state = T_WAITING
        task.private_view = batch.retryable
        task.retry_timeouts = batch.retry_timeouts
        task.reason = ""
        while n and batch.pending:
            span = <Span>batch.pending.popleft()
            if (span.alone or nbytes >= CHUNK_BYTES) and spans:
                batch.pending.appendleft(span)      # an item that must be alone ends the chunk before it
                break
            if span.count > n:
                batch.pending.appendleft(span.part(n, span.count - n))
                span = span.part(0, n)
            spans.append(span)
            nbytes += span.nbytes
            n -= span.count
            task.count += span.count
            batch.waiting -= span.count
            if span.alone:
                break
        if not spans:
            return None                             # a destructor has dropped the batch meanwhile
        task.spans = spans
        task.attempt = (<Span>spans[0]).attempts
        return task

    cdef int uncut(self, Task task) except -1:
        """Put the items of a chunk that did not start back to the front."""
        cdef Batch batch = task.batch
        if batch.dropped:
            self.waiting -= task.count
            self.vanished += task.count
        else:
            batch.pending.extendleft(reversed(task.spans))
            batch.waiting += task.count
        self.forget(task)
        return 0

    cdef HostBlock function_block(self, fn):
        """The block that holds a function's pickle, or None when there is no room for it."""
        cdef HostBlock block = self.functions.pop(fn.id, None)
        cdef bytes data
        if block is None:
            if len(self.functions) >= FUNCTIONS:
                self.functions.pop(next(iter(self.functions)))
            data = fn.data
            if len(data) > FUNCTION_BYTES or len(data) * 16 > self.arena.data_bytes:
                return None                         # it would crowd out the arguments: leads the frame
            block = HostBlock.take(self.arena, <uint64_t>len(data))
            if block is None:
                return None
            memcpy(block.data, <char *>data, <size_t>len(data))
        self.functions[fn.id] = block               # last in the order of use
        return block

    cdef bint hopes(self, uint64_t nbytes) noexcept:
        """Whether a frame that found no room waits for the region to grow. That is the collector's, since it
        takes time; see Waiting.make_room.
        """
        cdef int64_t now = now_ns()
        if not self.arena.hopeful(nbytes):
            return False
        if self.starved_since == 0:
            self.starved_since = now
        if now - self.starved_since >= GROWTH_PATIENCE:
            return False
        self.wanted = max(self.wanted, nbytes)
        return True

    cdef bint starved(self):
        """Whether a frame that found no room shall wait for some: then nothing is leased now."""
        cdef int64_t now = now_ns()
        cdef uint64_t frees = a64_load_relaxed(self.arena.heap.frees)
        if self.was_full and frees == self.full_at or self.leased == 0:
            return False                            # nothing was freed since, or nothing can be
        if self.starved_since == 0:
            self.starved_since = now
        if now - self.starved_since < ROOM_PATIENCE:
            return True
        self.was_full = True
        self.full_at = frees
        self.starved_since = 0
        return False

    cdef bint lease(self, Task task, uint32_t index) except -1:
        """Lease a task to a slot. False: it waits for room. What cannot be laid out has failed by then."""
        try:
            return self.publish(task, index)
        except Exception as error:
            self.waiting -= task.count
            self.over(task, T_OVER)
            what = f"it could not be laid out: {type(error).__name__}: {error}"
            self.outcomes.append((OUTCOME_LOST, task, 0, task.count, what))
            return True

    cdef uint32_t room(self, uint32_t index) except? 0xFFFFFFFF:
        """Leases that a slot can take."""
        cdef SlotTable table = self.slots[index]
        cdef uint32_t places = ring_room(self.arena.slot(index), table.ring_tail, self.arena.leases - 1)
        return min(places, <uint32_t>len(table.free))

    cdef bint publish(self, Task task, uint32_t index) except -1:
        """Fill a lease entry of a slot with a task and move its word to LEASED."""
        cdef SlotTable table = self.slots[index]
        cdef slot_t *slot = self.arena.slot(index)
        cdef uint32_t number
        cdef uint64_t at
        cdef lease_t *lease
        cdef Frame frame = None
        cdef HostBlock block = task.block
        cdef uint32_t where = AT_BLOCK
        cdef uint64_t nbytes = 0
        cdef uint32_t status = S_VALUE
        if task.fn_block is None:
            task.fn_block = self.function_block(task.fn)
        if block is None and type(task.data) is bytes and not task.buffers and task.fn_block is not None:
            status = S_PLAIN if task.plain else S_VALUE
            nbytes = SINGLE_HEAD + <uint64_t>PyBytes_GET_SIZE(task.data)
            if nbytes <= INLINE_BYTES:
                where = AT_INLINE
        if block is None and where != AT_INLINE:
            frame = self.framed(task)
            if frame.nbytes <= INLINE_BYTES:
                where = AT_INLINE
            else:
                block = HostBlock.take(self.arena, frame.nbytes)
                while block is None and len(self.functions) > 1:
                    self.functions.pop(next(iter(self.functions)))  # functions used long ago give way
                    block = HostBlock.take(self.arena, frame.nbytes)
                if block is not None:
                    frame.copy(block.data, 0, frame.nbytes)
                elif (frame.nbytes <= self.arena.capacity * EXTENT
                        and (self.hopes(frame.nbytes) or self.starved())):
                    return False
                else:
                    where = AT_BOUNCE
        if where != AT_BOUNCE:
            self.starved_since = 0
        if self.room(index) == 0:
            return False
        if task.state != T_WAITING or (task.batch is not None and task.batch.dropped):
            return self.skipped(task)               # cancelled by a destructor while we allocated

        # From here on nothing can fail or be interrupted. The entry is FREE, so the worker does not look.
        number = <uint32_t>table.free.pop()
        lease = self.arena.lease(index, number)
        a64_store_relaxed(&lease.started, 0)
        a64_store_relaxed(&lease.reported, 0)
        lease.task = task.number
        lease.fn = <uint64_t>task.fn.id
        lease.kind = KIND_CHUNK if task.batch is not None else KIND_CALL
        lease.attempt = task.attempt
        lease.flags = (F_PRIVATE_VIEW if task.private_view else 0) | (F_TIMED if task.timeout else 0)
        lease.where = where
        lease.out_where = AT_NOWHERE
        lease.out_ns = 0
        lease.submitted = <uint64_t>task.submitted
        task.submitted = 0
        if task.fn_block is not None:
            lease.fn_body = task.fn_block.offset
            lease.fn_bytes = task.fn_block.nbytes
        else:
            lease.fn_body = 0
            lease.fn_bytes = 0
        if where == AT_BLOCK:
            task.block = block
            lease.body = block.offset
            lease.body_tag = block.tag
            lease.body_bytes = block.nbytes
        else:
            lease.body = 0
            lease.body_bytes = nbytes if frame is None else frame.nbytes
            if frame is None:
                write_single(lease.inline_, status, PyBytes_AS_STRING(task.data), nbytes - SINGLE_HEAD)
            elif where == AT_INLINE:
                frame.copy(lease.inline_, 0, frame.nbytes)
            else:
                task.by_value = frame
        task.slot = index
        task.entry = number
        at = index * self.arena.leases + number
        self.tags[at] += 1
        task.tag = self.tags[at] & 0xFFFFFFFFFFULL
        task.state = T_LEASED
        task.delivered = 0
        table.tasks[number] = task
        table.inflight += 1
        if task.batch is not None:
            table.chunks += 1
        self.waiting -= task.count
        self.leased += task.count
        self.keeper.timeouts[at] = task.timeout
        if task.timeout:
            self.keeper.arm()
        a64_store_release(&lease.word, lease_word(L_LEASED, 0, task.tag))
        ring_put(slot, self.arena.ring(index), &table.ring_tail, self.arena.leases - 1,
                 ring_place(number, task.tag))
        task.woke = not self.arena.lanes or must_tell(&slot.parked) != AWAKE
        if task.woke:
            table.untold += task.count
            self.announce.add(index)
        else:
            self.by_lane += task.count
        return True

    cdef Frame framed(self, Task task):
        """The frame of a task; the function leads it if there is no room for its block."""
        cdef list items
        cdef Span span
        if task.batch is not None:
            items = [span.framed() for span in task.spans]
        else:
            items = [(S_PLAIN if task.plain else S_VALUE, task.data, task.buffers, task.readonly)]
        if task.fn_block is None:
            items.insert(0, (S_VALUE, task.fn.data, (), ()))
        return Frame(items)

    cdef bint skipped(self, Task task) except -1:
        """A task that is not wanted any more is not leased."""
        if task.state == T_WAITING:                 # its batch was dropped
            self.over(task, T_CANCELLED)
            self.waiting -= task.count
            self.vanished += task.count
        self.forget(task)
        return True

    cdef int balance(self) except -1:
        """Nothing waits: an idle worker gets half of what the fullest one has not started."""
        cdef SlotTable table
        cdef int64_t idle, full
        cdef uint32_t i, most
        cdef Task task
        cdef list back
        while True:
            idle = self.pick(1)
            if idle < 0:
                return 0
            full = -1
            most = 1
            for i in range(self.arena.slots):
                table = self.slots[i]
                if table.ready and table.inflight > most:
                    most = table.inflight
                    full = i
            if full < 0:
                return 0
            back = self.take_back(<uint32_t>full, min(most // 2, self.room(<uint32_t>idle)))
            if not back:
                return 0
            for task in back:
                if not self.lease(task, <uint32_t>idle):
                    self.requeue(task)

    cdef list take_back(self, uint32_t index, uint32_t most):
        """Leases of a slot that have not started, the youngest first, back to WAITING; in order of age."""
        cdef SlotTable table = self.slots[index]
        cdef Task task
        cdef lease_t *lease
        cdef list back = []
        held = sorted([(<Task>t).number, t] for t in table.tasks if t is not None)
        while held and <uint32_t>len(back) < most:
            task = <Task>held.pop()[1]
            lease = self.arena.lease(index, task.entry)
            if task.state == T_LEASED and a64_cas_acq_rel(
                    &lease.word, lease_word(L_LEASED, 0, task.tag), lease_word(L_FREE, 0, task.tag)):
                task.state = T_WAITING
                self.waiting += task.count
                self.release(task)
                back.append(task)
        back.reverse()
        return back

    cdef int requeue(self, Task task) except -1:
        """A task that never started goes back to the front of the queue."""
        if task.batch is not None:
            self.uncut(task)
            self.enqueue(task.batch, True)
        else:
            self.enqueue(task, True)
        return 0

    cdef int put_back(self, Task task, uint64_t first, int64_t without) except -1:
        """Items of a chunk from `first` on, but for `without`, go back to the front of their batch."""
        cdef Batch batch = task.batch
        cdef Span span
        cdef list rest = []
        cdef uint64_t at = 0, begin, end, count = 0
        for span in task.spans:
            begin, end = max(first, at), at + span.count
            if without >= 0 and begin <= <uint64_t>without < end:
                if begin < <uint64_t>without:
                    rest.append(span.part(<uint32_t>(begin - at), <uint32_t>(<uint64_t>without - begin)))
                begin = <uint64_t>without + 1
            if begin < end:
                rest.append(span.part(<uint32_t>(begin - at), <uint32_t>(end - begin)))
            at = end
        for span in rest:
            count += span.count
        if batch.dropped:
            self.vanished += count
        elif rest:
            batch.pending.extendleft(reversed(rest))
            batch.waiting += count
            self.waiting += count
            self.enqueue(batch, True)
        return 0
