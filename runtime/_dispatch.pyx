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
cimport cython
from collections import deque
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.signal cimport SIGKILL
from libc.string cimport memcpy

from runtime._atomics cimport *
from runtime._extent cimport (Arena, HostBlock, heap_adopt, heap_free, heap_publish, heap_run, heap_sweep, heap_take)
from runtime._frame cimport Frame
from runtime._layout cimport *
from runtime._lease cimport outbox_take, outbox_waiting, ring_place, ring_put, ring_room
from runtime._threads cimport DeadlineKeeper, guard_acquire, guard_release, guard_t, kill_lease

cdef int64_t ROOM_PATIENCE = 50_000_000     # ns a task waits for room before it travels by value
cdef int64_t CHUNK_NS = 2_000_000           # ns of work that a chunk aims at
cdef uint32_t MAX_CHUNK = 1024              # items of a chunk, at most
cdef uint32_t DEPTH = 64                    # leases ahead per worker, at most
cdef uint32_t CHUNK_DEPTH = 2               # chunks ahead per worker: one runs, one waits
cdef uint32_t FUNCTIONS = 256               # function pickles kept in the region

# Task.state
cdef enum:
    T_WAITING = 0           # in the queue, or on its way there
    T_LEASED = 1            # a lease entry holds it
    T_OVER = 2              # its outcome was handed out
    T_CANCELLED = 3         # it was cancelled and never started

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

# what an outcome tuple begins with
OUTCOME_FRAME = 0           # (.., task, first item, items, exporter of the frame, how many items ran or -1)
OUTCOME_DIED = 1            # (.., task, item or -1, information that settle() was given)
OUTCOME_KILLED = 2          # (.., task, item, reason)
OUTCOME_LOST = 3            # (.., task, item, what went wrong)
OUTCOME_ABANDONED = 4       # (.., task or None, batch or None, its entries, whether they count as cancelled)

CANCEL_NO = 0               # it has started, or is over
CANCEL_DONE = 1             # it never started and never will
CANCEL_KILLED = 2           # it had started; its worker is being killed


cdef class Batch:
    """The items of one map that are not leased yet, with what all of them share."""
    cdef readonly object fn                 # FunctionRef
    cdef readonly object sink               # who gets the items' results
    cdef readonly int64_t timeout
    cdef readonly int priority
    cdef readonly bint retryable            # items may be run again
    cdef readonly bint retry_timeouts       # also after their timeout
    cdef uint32_t fixed                     # items per chunk, 0: adaptive
    cdef double item_ns                     # running mean of an item's time
    cdef object pending                     # deque of (index, item, attempts so far, alone)
    cdef bint queued, dropped

    def __init__(self, fn, sink, int64_t timeout=0, int priority=0, bint retryable=False,
                 bint retry_timeouts=False, uint32_t chunksize=0):
        self.fn = fn
        self.sink = sink
        self.timeout = timeout
        self.priority = priority
        self.retryable = retryable
        self.retry_timeouts = retry_timeouts
        self.fixed = chunksize
        self.pending = deque()

    @property
    def waiting(self):
        """Items that are not leased."""
        return len(self.pending)

    cdef uint32_t chunk(self, uint32_t workers):
        """Items for the next chunk: about 2 ms of work, and towards the end a fair share of what is left."""
        cdef uint32_t left = <uint32_t>len(self.pending)
        cdef uint32_t n
        if self.fixed:
            return min(self.fixed, left)
        if self.item_ns <= 0:
            return 1
        n = MAX_CHUNK if self.item_ns * MAX_CHUNK < CHUNK_NS else <uint32_t>(CHUNK_NS / self.item_ns)
        return max(1, min(n, left, max(1, left // (2 * workers))))

    cdef void measured(self, int64_t ns, uint64_t items):
        cdef double each = <double>ns / items if items else 0
        if each > 0:
            self.item_ns = each if self.item_ns <= 0 else 0.7 * self.item_ns + 0.3 * each


cdef class Task:
    """One lease's worth of work: a call, or a chunk of a batch. Host-private."""
    cdef readonly uint64_t number
    cdef readonly object future             # of a call; None for a chunk
    cdef readonly object fn                 # FunctionRef
    cdef readonly Batch batch               # of a chunk; None for a call
    cdef readonly list entries              # of a chunk: what was popped from batch.pending
    cdef readonly uint32_t attempt          # times it was leased and claimed, this one included
    cdef readonly int priority
    cdef public uint32_t retries            # further attempts that are allowed
    cdef readonly int64_t timeout
    cdef list items                         # [(status, data, buffers, readonly)], frozen
    cdef HostBlock block                    # the frame, if it is in the region already
    cdef HostBlock fn_block
    cdef Frame by_value                     # the frame, while it travels through the bounce block
    cdef object inbound                     # bytearray: the result's frame, arriving by value
    cdef uint64_t inbound_got
    cdef uint32_t slot, entry
    cdef uint64_t tag
    cdef uint64_t delivered                 # items of the chunk whose results were taken
    cdef int state
    cdef bint private_view                  # another attempt may follow: it must see the original
    cdef bint retry_timeouts                # a killed attempt may be followed by another, once its process is dead
    cdef str reason                         # why it was killed, "" for the deadline

    def __init__(self, fn, future, list items, int64_t timeout=0, int priority=0, uint32_t retries=0,
                 bint retry_timeouts=False, HostBlock block=None):
        self.fn = fn
        self.future = future
        self.items = items
        self.timeout = timeout
        self.priority = priority
        self.retries = retries
        self.private_view = retries > 0
        self.retry_timeouts = retry_timeouts
        self.block = block
        self.attempt = 1
        self.reason = ""


@cython.final
cdef class SlotTable:
    """Host-private bookkeeping of one slot."""
    cdef list tasks                         # entry -> Task or None
    cdef list free                          # entry numbers
    cdef dict kept                          # (head, tag) -> HostBlock that a worker's view still needs
    cdef set early                          # (head, tag) released before its lease was harvested
    cdef uint32_t inflight                  # leases out
    cdef uint32_t chunks                    # of them, chunks
    cdef bint ready, draining
    cdef bint suspect                       # leases were taken back from it: it did not look at them
    cdef uint64_t suspect_at                # ring_head at that time
    # What the host writes into the slot is decided from these, never read back: a worker may run wild.
    cdef uint32_t state                     # S_*
    cdef uint64_t incarnation, ring_tail, outbox_head

    def __init__(self, uint32_t leases):
        self.tasks = [None] * leases
        self.free = list(range(leases - 1, -1, -1))
        self.kept = {}
        self.early = set()


cdef class Dispatcher:
    """Queue, leases and slots of one runtime.

    Thread-safety: every method may be called from any thread. Fork-safety: none; the caller checks the pid.
    Blocking: never.
    """
    cdef readonly Arena arena
    cdef readonly DeadlineKeeper keeper
    cdef list slots                         # SlotTable
    cdef dict levels                        # priority -> deque of Task and Batch
    cdef list order                         # priorities that have ever been used, highest first
    cdef object inbox                       # deque of Task, Batch and (bookkeeping) tuples
    cdef bint busy, closed, inert
    cdef uint64_t *tags                     # per slot and entry: the tag of its last lease
    cdef dict functions                     # function id -> HostBlock, in order of use
    cdef set announce                       # slots that got leases and have not been told
    cdef int64_t starved_since              # monotonic ns: a task at the head found no room; 0: none does
    cdef uint64_t full_at                   # arena.frees when patience ran out last
    cdef bint was_full
    cdef uint64_t numbers
    cdef readonly uint64_t waiting          # tasks and items not leased
    cdef readonly uint64_t leased           # tasks and items leased, running included
    cdef readonly uint64_t by_message, rescued, malformed
    cdef readonly uint64_t accepted         # tasks and items ever taken on
    cdef readonly uint64_t vanished         # of them, cancelled before they started, or dropped
    cdef readonly uint64_t done, failed     # of them, ended; what the collector says
    cdef list outcomes                      # what the collector has not taken yet
    cdef dict stuck                         # slot -> what the last rescan saw

    def __init__(self, Arena arena, DeadlineKeeper keeper):
        self.arena = arena
        self.keeper = keeper
        self.slots = [SlotTable(arena.leases) for _ in range(arena.slots)]
        self.levels = {}
        self.order = []
        self.inbox = deque()
        self.functions = {}
        self.announce = set()
        self.outcomes = []
        self.stuck = {}
        self.tags = <uint64_t *>PyMem_Calloc(arena.slots * arena.leases, sizeof(uint64_t))
        if self.tags == NULL:
            raise MemoryError("no memory for the table of tags")

    def __dealloc__(self):
        PyMem_Free(self.tags)

    # ---- entering ------------------------------------------------------------------------------------

    cdef int work(self) except -1:
        """Do what the inbox asks, lease what can be leased; at once, or leave it to who is inside."""
        if self.busy:
            return 0
        self.busy = True
        try:
            while True:
                while self.inbox:
                    self.take_in(self.inbox.popleft())
                self.pump()
                if not self.inbox:
                    return 0
        finally:
            self.busy = False

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

    def submit(self, Task task not None):
        """Queue a call; it is leased at once if a worker has credit. False: the runtime has ended."""
        if self.closed:
            return False
        self.numbers += 1
        task.number = self.numbers
        self.waiting += 1
        self.accepted += 1
        self.inbox.append(task)
        self.work()
        return True

    def add_items(self, Batch batch not None, list items):
        """Queue items (index, item) of a batch. False: the runtime has ended."""
        if self.closed:
            return False
        if batch.dropped:
            return True
        for index, item in items:
            batch.pending.append((index, item, 1, False))
        self.waiting += <uint64_t>len(items)
        self.accepted += <uint64_t>len(items)
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

    def retry_item(self, Batch batch not None, tuple entry not None):
        """Queue an item of a batch once more, ahead of the others and alone in its chunk."""
        self.inbox.append((DO_RETRY_ITEM, batch, entry))
        self.work()

    cdef int retry_item_now(self, Batch batch, tuple entry) except -1:
        if batch.dropped:
            self.vanished += 1
            return 0
        index, item, attempts, _ = entry
        batch.pending.appendleft((index, item, attempts + 1, True))
        self.waiting += 1
        return self.enqueue(batch, True)

    # ---- cancelling ----------------------------------------------------------------------------------

    def cancel(self, Task task not None, bint running=False, str reason="cancelled"):
        """Take a task back, or with `running` kill what runs it. CANCEL_*."""
        cdef lease_t *lease
        cdef guard_t *guard
        cdef uint64_t word
        cdef int result = 0
        if self.inert:
            return CANCEL_NO
        if task.state == T_WAITING:
            task.state = T_CANCELLED                # the queue skips it
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
            task.state = T_CANCELLED
            self.vanished += <uint64_t>len(task.entries) if task.batch is not None else 1
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
        self.waiting -= <uint64_t>len(batch.pending)
        self.vanished += <uint64_t>len(batch.pending)
        batch.pending.clear()
        for table in self.slots:
            if table.chunks:
                for held in list(table.tasks):
                    if held is not None and (<Task>held).batch is batch:
                        self.cancel(<Task>held)
        return 0

    cdef int forget(self, Task task) except -1:
        """Let go of what a task holds; its blocks are freed unless a view still needs them."""
        task.items = None
        task.block = None
        task.fn_block = None
        task.by_value = None
        task.inbound = None
        return 0

    cdef int release(self, Task task) except -1:
        """The lease word is FREE: give the entry back."""
        cdef SlotTable table = self.slots[task.slot]
        if table.tasks[task.entry] is not task:
            return 0                                # done before: a wish that came twice
        table.tasks[task.entry] = None
        table.free.append(task.entry)
        table.inflight -= 1
        self.leased -= len(task.entries) - task.delivered if task.batch is not None else 1
        if task.batch is not None:
            table.chunks -= 1
        if task.timeout:
            self.keeper.disarm()
        task.by_value = None
        task.inbound = None
        if task.state == T_CANCELLED or (task.state == T_OVER and task.retries == 0):
            self.forget(task)                       # else the collector may want it once more
        return 0

    # ---- leasing -------------------------------------------------------------------------------------

    cdef int64_t pick(self, uint32_t depth) except -2:
        """The ready slot with the fewest leases, below `depth`; -1: none has credit."""
        cdef SlotTable table
        cdef int64_t best = -1
        cdef uint32_t i, least = depth
        for i in range(self.arena.slots):
            table = self.slots[i]
            if (table.ready and not table.draining and table.inflight < least
                    and not self.keeper.guards[i].killing and self.room(i) > 0):
                if table.suspect and a64_load_relaxed(&self.arena.slot(i).ring_head) == table.suspect_at:
                    continue                        # it has not moved since leases were taken back from it
                table.suspect = False
                best = i
                least = table.inflight
                if least == 0:
                    break
        return best

    cdef int pump(self) except -1:
        """Lease from the head of the queue while a worker has credit."""
        cdef int64_t slot
        cdef Task task
        cdef Batch batch
        cdef uint32_t workers = 0
        cdef SlotTable table
        for table in self.slots:
            workers += table.ready and not table.draining
        if workers == 0 or self.closed:
            return 0
        for priority in self.order:
            queue = self.levels[priority]
            while queue:
                entry = queue.popleft()             # first: a destructor may look at the queue at any time
                if isinstance(entry, Task):
                    task = <Task>entry
                    if task.state != T_WAITING:
                        continue
                    slot = self.pick(min(DEPTH, self.arena.leases))
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
        cdef list entries = []
        cdef list items = []
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
            entry = batch.pending[0]
            if (<tuple>entry)[3] and entries:
                break                               # an item that must be alone ends the chunk before it
            batch.pending.popleft()
            entries.append(entry)
            items.append((<tuple>entry)[1])
            n -= 1
            if (<tuple>entry)[3]:
                break
        if not entries:
            return None                             # a destructor has dropped the batch meanwhile
        task.entries = entries
        task.items = items
        task.attempt = (<tuple>entries[0])[2]
        return task

    cdef int uncut(self, Task task) except -1:
        """Put the items of a chunk that did not start back to the front."""
        cdef Batch batch = task.batch
        if batch.dropped:
            self.waiting -= <uint64_t>len(task.entries)
            self.vanished += <uint64_t>len(task.entries)
        else:
            batch.pending.extendleft(reversed(task.entries))
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
            if len(data) * 16 > self.arena.data_bytes:
                return None                         # it would crowd out the arguments: leads the frame
            block = HostBlock.take(self.arena, <uint64_t>len(data))
            if block is None:
                return None
            memcpy(block.data, <char *>data, <size_t>len(data))
        self.functions[fn.id] = block               # last in the order of use
        return block

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
        """Lease a task to a slot. False: it waits for room. What cannot be laid out fails, and is done with."""
        try:
            return self.publish(task, index)
        except Exception as error:
            self.waiting -= <uint64_t>len(task.entries) if task.batch is not None else 1
            task.state = T_OVER
            self.outcomes.append((OUTCOME_LOST, task, 0, f"it could not be laid out: {type(error).__name__}: {error}"))
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
        cdef lease_t *lease
        cdef Frame frame = None
        cdef HostBlock block = task.block
        cdef uint32_t where = AT_BLOCK
        cdef uint64_t items = <uint64_t>len(task.entries) if task.batch is not None else 1
        if task.fn_block is None:
            task.fn_block = self.function_block(task.fn)
        if block is None:
            if task.fn_block is None:
                frame = Frame([(0, task.fn.data, (), ())] + task.items)
            else:
                frame = Frame(task.items)
            if frame.nbytes <= INLINE_BYTES:
                where = AT_INLINE
            else:
                block = HostBlock.take(self.arena, frame.nbytes)
                if block is not None:
                    frame.copy(block.data, 0, frame.nbytes)
                elif frame.nbytes <= self.arena.data_bytes and self.starved():
                    return False
                else:
                    where = AT_BOUNCE
        if where != AT_BOUNCE:
            self.starved_since = 0
        if self.room(index) == 0:
            return False
        if task.state != T_WAITING or (task.batch is not None and task.batch.dropped):
            return self.skipped(task, items)        # cancelled by a destructor while we allocated

        # From here on nothing can fail or be interrupted. The entry is FREE, so the worker does not look.
        number = <uint32_t>table.free.pop()
        lease = self.arena.lease(index, number)
        a64_store_relaxed(&lease.started, 0)
        lease.task = task.number
        lease.fn = <uint64_t>task.fn.id
        lease.kind = KIND_CHUNK if task.batch is not None else KIND_CALL
        lease.attempt = task.attempt
        lease.flags = F_PRIVATE_VIEW if task.private_view else 0
        lease.where = where
        lease.out_where = AT_NOWHERE
        lease.out_flags = 0
        lease.out_ns = 0
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
            lease.body_bytes = frame.nbytes
            if where == AT_INLINE:
                frame.copy(lease.inline_, 0, frame.nbytes)
            else:
                task.by_value = frame
        task.slot = index
        task.entry = number
        self.tags[index * self.arena.leases + number] += 1
        task.tag = self.tags[index * self.arena.leases + number] & 0xFFFFFFFFFFULL
        task.state = T_LEASED
        task.delivered = 0
        table.tasks[number] = task
        table.inflight += 1
        if task.batch is not None:
            table.chunks += 1
        self.waiting -= items
        self.leased += items
        self.keeper.timeouts[index * self.arena.leases + number] = task.timeout
        if task.timeout:
            self.keeper.arm()
        a64_store_release(&lease.word, lease_word(L_LEASED, 0, task.tag))
        ring_put(slot, self.arena.ring(index), &table.ring_tail, self.arena.leases - 1,
                 ring_place(number, task.tag))
        self.by_message += items
        self.announce.add(index)
        return True

    cdef bint skipped(self, Task task, uint64_t items) except -1:
        """A task that is not wanted any more is not leased."""
        if task.state == T_WAITING:                 # its batch was dropped
            task.state = T_CANCELLED
            self.waiting -= items
            self.vanished += items
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
                self.waiting += <uint64_t>len(task.entries) if task.batch is not None else 1
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

    def announcements(self):
        """Slots to tell that there are leases in their ring; each is returned once."""
        if not self.announce:
            return ()
        told = tuple(self.announce)
        self.announce.clear()
        return told

    # ---- harvesting ----------------------------------------------------------------------------------

    def drain(self, uint32_t index):
        """Process a slot's outbox."""
        self.inbox.append((DO_DRAIN, index))
        self.work()

    cdef int drain_now(self, uint32_t index) except -1:
        cdef record_t record
        cdef slot_t *slot = self.arena.slot(index)
        cdef SlotTable table = self.slots[index]
        cdef uint64_t waiting = outbox_waiting(slot, table.outbox_head)
        if waiting > self.arena.outbox:             # no outbox holds so many: the worker has run wild
            self.strange()
            self.signal(index, SIGKILL)
            return 0
        while waiting:
            outbox_take(slot, self.arena.records(index), &table.outbox_head, self.arena.outbox - 1, &record)
            self.process(index, &record)
            waiting -= 1
        self.stuck.pop(index, None)
        return 0

    def take_outcomes(self):
        """What has come in since the last call."""
        cdef list outcomes = self.outcomes
        self.outcomes = []
        return outcomes

    @property
    def has_outcomes(self):
        """Whether there is something for the collector."""
        return len(self.outcomes) > 0

    cdef int process(self, uint32_t index, record_t *record) except -1:
        cdef SlotTable table = self.slots[index]
        cdef Task task
        if record.kind == R_UNKEEP:
            key = (record.body, record.tag)
            if table.kept.pop(key, None) is None:
                table.early.add(key)
            return 0
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

    cdef int strange(self) noexcept:
        """A record that makes no sense: counted, dropped."""
        self.malformed += 1
        return 0

    cdef object adopted(self, uint32_t index, uint64_t body, uint64_t tag, uint64_t nbytes):
        """The block that a record names, now the host's; or None: it is not what the record says."""
        cdef uint64_t at
        if body < self.arena.extents_at or (body - self.arena.extents_at) % EXTENT:
            return None
        at = (body - self.arena.extents_at) // EXTENT
        if not heap_adopt(&self.arena.heap, at, tag, index):
            return None
        block = HostBlock.wrap(self.arena, at, tag, nbytes)
        if nbytes > heap_run(&self.arena.heap, at) * EXTENT:
            return None                             # its destructor frees it
        return block

    cdef int partial(self, uint32_t index, Task task, record_t *record) except -1:
        """Items of a chunk that are finished ahead of the rest."""
        exporter = self.adopted(index, record.body, record.tag, record.bytes)
        if task.state != T_LEASED:
            return 0                                # killed before this came: after that nothing is an answer
        if exporter is None or task.batch is None or record.count > len(task.entries) - task.delivered:
            return self.strange()
        self.outcomes.append((OUTCOME_FRAME, task, task.delivered, record.count, exporter, -1))
        task.delivered += record.count
        self.leased -= record.count
        return 0

    cdef int harvest(self, uint32_t index, Task task) except -1:
        """DONE -> FREE: take the result, keep what a view still needs, give the entry back."""
        cdef SlotTable table = self.slots[index]
        cdef lease_t *lease = self.arena.lease(index, task.entry)
        cdef uint64_t word = a64_load_acquire(&lease.word)      # pairs with D1
        cdef lease_t copy                       # the worker may scribble: look once, use the copy
        cdef uint64_t ran, items, delivered = task.delivered
        cdef object exporter = None
        if l_state(word) != L_DONE or l_tag(word) != task.tag or task.state != T_LEASED:
            return 0
        memcpy(&copy, lease, sizeof(lease_t))
        ran = l_item(word)
        items = <uint64_t>len(task.entries) if task.batch is not None else 1
        if copy.out_where == AT_INLINE and copy.out_bytes <= INLINE_BYTES:
            exporter = PyBytes_FromStringAndSize(copy.inline_, <Py_ssize_t>copy.out_bytes)
        elif copy.out_where == AT_BLOCK:
            exporter = self.adopted(index, copy.out_body, copy.out_tag, copy.out_bytes)
        elif copy.out_where == AT_BOUNCE and task.inbound is not None and task.inbound_got == len(task.inbound):
            exporter = task.inbound
        if copy.out_flags & F_KEPT and task.block is not None:
            key = (task.block.offset, task.block.tag)
            if key in table.early:
                table.early.discard(key)
            else:
                table.kept[key] = task.block
        task.state = T_OVER
        a64_store_release(&lease.word, lease_word(L_FREE, 0, task.tag))
        if exporter is None or ran > items or ran < delivered:
            self.outcomes.append((OUTCOME_LOST, task, delivered, "its worker wrote a malformed result"))
            self.release(task)
            return self.strange()
        if task.batch is not None:
            task.batch.measured(copy.out_ns, ran)
            self.outcomes.append((OUTCOME_FRAME, task, delivered, ran - delivered, exporter, ran))
            self.put_back(task, ran, -1)
        else:
            self.outcomes.append((OUTCOME_FRAME, task, 0, 1, exporter, 1))
        self.release(task)
        return 0

    cdef int put_back(self, Task task, uint64_t first, int64_t without) except -1:
        """Items of a chunk from `first` on, but for `without`, go back to the front of their batch."""
        cdef Batch batch = task.batch
        cdef list rest = [entry for i, entry in enumerate(task.entries) if i >= first and i != without]
        if batch.dropped:
            self.vanished += <uint64_t>len(rest)
        elif rest:
            batch.pending.extendleft(reversed(rest))
            self.waiting += <uint64_t>len(rest)
            self.enqueue(batch, True)
        return 0

    cdef int serve(self, uint32_t index, Task task, record_t *record) except -1:
        """The worker waits for a piece of the arguments' frame."""
        cdef slot_t *slot = self.arena.slot(index)
        if (task.by_value is None or record.bytes > self.arena.bounce_bytes or record.count > task.by_value.nbytes
                or record.bytes > task.by_value.nbytes - record.count):
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
            try:
                task.inbound = bytearray(lease.out_bytes)
            except (MemoryError, OverflowError):
                task.inbound = bytearray()          # the harvest finds it incomplete and fails the task
            task.inbound_got = 0
        if task.inbound is None:
            return self.strange()
        if record.count == task.inbound_got and record.bytes <= len(task.inbound) - task.inbound_got:
            memcpy(PyByteArray_AS_STRING(task.inbound) + record.count, self.arena.bounce(index), record.bytes)
            task.inbound_got += record.bytes
        a32_fetch_add_acq_rel(&slot.turn, 1)
        futex_wake(&slot.turn, 1)
        return 0

    # ---- slots ---------------------------------------------------------------------------------------

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
        cdef guard_t *guard = &self.keeper.guards[index]
        cdef bint sent = False
        if self.inert:
            return False
        guard_acquire(guard)
        if guard.armed and guard.pidfd >= 0:
            sent = sys_pidfd_send_signal(guard.pidfd, number) == 0
        guard_release(guard)
        return sent

    def incarnation(self, uint32_t index):
        """Counts the processes that lived in a slot."""
        return (<SlotTable>self.slots[index]).incarnation

    def phase(self, uint32_t index):
        """What the worker in a slot says of itself: P_*; anything else reads as P_BOOT."""
        cdef uint32_t phase = a32_load_acquire(&self.arena.slot(index).phase)
        return phase if phase <= P_LEAVING else P_BOOT

    def failure(self, uint32_t index):
        """The pickled exception that a worker left when it could not start."""
        cdef uint64_t n = self.arena.slot(index).failure_bytes
        return PyBytes_FromStringAndSize(self.arena.bounce(index), <Py_ssize_t>min(n, self.arena.bounce_bytes))

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

    cdef int settle_now(self, uint32_t index, information) except -1:
        cdef SlotTable table = self.slots[index]
        cdef slot_t *slot = self.arena.slot(index)
        cdef record_t record
        cdef Task task
        cdef uint64_t waiting = outbox_waiting(slot, table.outbox_head)
        table.ready = False
        while 0 < waiting <= self.arena.outbox:
            outbox_take(slot, self.arena.records(index), &table.outbox_head, self.arena.outbox - 1, &record)
            if record.kind == R_DONE or record.kind == R_PARTIAL:
                self.process(index, &record)
            waiting -= 1
        held = [pair[1] for pair in sorted([(<Task>t).number, t] for t in table.tasks if t is not None)]
        for entry in held:
            task = <Task>entry
            if l_state(a64_load_acquire(&self.arena.lease(index, task.entry).word)) == L_DONE:
                self.harvest(index, task)
        for entry in reversed(held):                # the oldest ends up at the very front of the queue
            task = <Task>entry
            if table.tasks[task.entry] is task:
                self.settle_task(index, task, information)
        table.kept.clear()
        table.early.clear()
        table.draining = False
        heap_sweep(&self.arena.heap, index)
        self.announce.discard(index)
        self.stuck.pop(index, None)
        a32_store_release(&slot.state, S_FREE)
        table.state = S_FREE
        return 0

    cdef int settle_task(self, uint32_t index, Task task, information) except -1:
        """What becomes of a lease that a dead worker has not finished."""
        cdef lease_t *lease = self.arena.lease(index, task.entry)
        cdef uint64_t word = a64_load_acquire(&lease.word)
        a64_store_release(&lease.word, lease_word(L_FREE, 0, task.tag))
        if task.state != T_LEASED:                  # its outcome is known: killed, or cancelled just now
            if l_state(word) == L_KILLED and task.batch is not None:
                self.put_back(task, task.delivered, <int64_t>l_item(word))
            self.release(task)
        elif l_state(word) == L_LEASED:
            task.state = T_WAITING
            self.waiting += <uint64_t>len(task.entries) if task.batch is not None else 1
            self.release(task)
            self.requeue(task)
        else:
            self.blame(task, word, information)
        return 0

    cdef int blame(self, Task task, uint64_t word, information) except -1:
        """The process died, or was killed, while it ran this: only the item that ran answers for it."""
        cdef uint64_t item = l_item(word) if task.batch is not None else 0
        cdef bint killed = l_state(word) == L_KILLED
        task.state = T_OVER
        if task.batch is not None:
            self.put_back(task, task.delivered, <int64_t>item)
        if task.batch is None or task.delivered <= item < <uint64_t>len(task.entries):
            if killed:
                self.outcomes.append((OUTCOME_KILLED, task, item, task.reason))
            else:
                self.outcomes.append((OUTCOME_DIED, task, item, information))
        self.release(task)
        return 0

    def killed(self, uint32_t index):
        """Resolve the leases of a slot that were killed, without waiting for the death of its process.

        After KILLED nothing else is an answer; but results that a chunk had delivered before count.
        """
        if self.keeper.guards[index].killing:
            self.inbox.append((DO_UNLOAD, index))
            self.work()

    cdef int unload_now(self, uint32_t index) except -1:
        """Give the leases of a slot that have not started to other workers, and resolve those that were killed."""
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
            task.state = T_OVER
            if task.batch is None or task.delivered <= item < <uint64_t>len(task.entries):
                self.outcomes.append((OUTCOME_KILLED, task, item, task.reason))
        return 0

    # ---- looking -------------------------------------------------------------------------------------

    def rescan(self):
        """The backstop: find what a lost hint would have told. Called every 100 ms while work is out.

        What is seen unchanged for the third time in a row counts as rescued. Leases of a worker that does
        not look at its ring (it may be stopped) go to another one, if there is one.
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
            self.rescued += 1
            if unread:
                self.drain(i)
            elif table.inflight and self.others(i):
                table.suspect = True
                table.suspect_at = place
                self.inbox.append((DO_UNLOAD, i))
                self.work()
            else:
                self.announce.add(i)

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
                    self.waiting -= <uint64_t>len(rest)
                    self.outcomes.append((OUTCOME_ABANDONED, None, entry, rest, cancelled))
                elif (<Task>entry).state == T_WAITING:
                    (<Task>entry).state = T_CANCELLED if cancelled else T_OVER
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
        if not self.closed and self.accepted <= self.done + self.failed + self.vanished:
            self.close()
        return self.closed

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
        """What is to be seen of a slot: (incarnation, phase, tasks done, task number that runs or None, leases)."""
        cdef slot_t *slot = self.arena.slot(index)
        cdef SlotTable table = self.slots[index]
        cdef uint32_t running = a32_load_acquire(&slot.running)
        number = None
        if 0 < running <= self.arena.leases and table.tasks[running - 1] is not None:
            if self.running(<Task>table.tasks[running - 1]):
                number = (<Task>table.tasks[running - 1]).number
        return slot.incarnation, self.phase(index), a64_load_relaxed(&slot.tasks_done), number, table.inflight

    def counts(self):
        """(blocks kept for views in workers, leases out, announcements due)."""
        cdef SlotTable table
        cdef uint64_t kept = 0, inflight = 0
        for table in self.slots:
            kept += <uint64_t>len(table.kept)
            inflight += table.inflight
        return kept, inflight, len(self.announce)
