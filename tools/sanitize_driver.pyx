# cython: language_level=3, cdivision=True, boundscheck=False
"""Host and workers as threads of one process, without the GIL: what ThreadSanitizer can see.

Compiled with the modules, into the sanitizer's copy of the package alone; tools/sanitize_threads.py starts
the threads and checks the ends. Each function is one actor, with its own hints (heap_t, pool_t) and cursors,
as a process would have. What shared memory holds between actors is written and read plainly here, as the
runtime does, so that an edge that is missing is a race. What needs a Python object in the runtime is done
here step by step in the same order, and says what it stands for.
"""
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from runtime._atomics cimport *
from runtime._arena cimport Arena
from runtime._extent cimport (
    heap_adopt, heap_free, heap_publish, heap_run, heap_sweep, heap_t, heap_take, heap_used,
)
from runtime._layout cimport *
from runtime._lease cimport (
    WorkerPort, must_tell, outbox_put, outbox_take, outbox_waiting, park, ring_place, ring_put, ring_room,
    ring_waiting, slot_renew,
)
from runtime._pool cimport MemoryPool
from runtime._report cimport copy_report, write_report
from runtime._slab cimport (
    POOL_OK, pool_give, pool_sweep, pool_t, pool_take, pool_take_or_sweep, pool_wait,
)
from runtime._threads cimport DeadlineKeeper, guard_acquire, guard_release, guard_t, kill_lease

cdef enum:
    NAP_NS = 2000000            # the longest sleep of an actor that finds nothing
    MOST = 4                    # extents of a block
    SLOTS = 8
    ENTRIES = 8                 # of a lease table

cdef uint64_t GHOST = (<uint64_t>4194303 << 42) | 77   # a process that never was, and the first of many


cdef inline uint64_t draw(uint64_t *seed, uint64_t below) noexcept nogil:
    seed[0] ^= seed[0] << 13
    seed[0] ^= seed[0] >> 7
    seed[0] ^= seed[0] << 17
    return seed[0] % below


cdef void fill(char *at, uint64_t nbytes, uint64_t value) noexcept nogil:
    cdef uint64_t i
    for i in range(nbytes // 8):
        (<uint64_t *>at)[i] = value + i


cdef void fill_block(heap_t *heap, int64_t at, uint64_t nbytes, uint64_t value) noexcept nogil:
    """Something in each of its extents."""
    cdef uint64_t i
    for i in range((nbytes + EXTENT - 1) // EXTENT):
        fill(heap.extents + (<uint64_t>at + i) * EXTENT, 64, value)


cdef bint block_holds(heap_t *heap, uint64_t at, uint64_t nbytes, uint64_t value) noexcept nogil:
    cdef uint64_t i
    for i in range((nbytes + EXTENT - 1) // EXTENT):
        if not holds(heap.extents + (at + i) * EXTENT, 64, value):
            return False
    return True


cdef bint holds(char *at, uint64_t nbytes, uint64_t value) noexcept nogil:
    cdef uint64_t i
    for i in range(nbytes // 8):
        if (<uint64_t *>at)[i] != value + i:
            return False
    return True


# ---- the pool ----------------------------------------------------------------------------------------

cdef pool_t process_of(MemoryPool pool, uint32_t cursor) noexcept:
    """What another process would have of it. Word by word: other threads use the one of this process."""
    cdef pool_t own
    own.head = pool.p.head
    own.words = pool.p.words
    own.blocks = pool.p.blocks
    own.capacity = pool.p.capacity
    own.block_bytes = pool.p.block_bytes
    own.stride = pool.p.stride
    a64_store_relaxed(&own.identity, a64_load_relaxed(&pool.p.identity))
    a64_store_relaxed(&own.row, a64_load_relaxed(&pool.p.row))
    a32_store_relaxed(&own.depth, 0)
    a32_store_relaxed(&own.cursor, <uint32_t>(cursor % pool.p.capacity))
    return own


def use_pool(MemoryPool pool not None, uint64_t seed, int64_t times, bint apart):
    """Take and give back so many times; `apart`: with hints of its own, as in another process.

    Each owner leaves a pattern that the next one must find whole. (Times it was not, blocks taken.)
    """
    cdef pool_t own = process_of(pool, <uint32_t>seed)
    cdef pool_t *p = &own if apart else &pool.p
    cdef uint64_t held = 0, mark
    cdef int64_t taken = 0, torn = 0, i
    cdef char *block
    if pool.p.block_bytes < 64:
        raise ValueError("blocks of 64 bytes or more, please")
    with nogil:
        while taken < times:
            i = pool_take(p, &held)
            if i < 0:
                i = pool_wait(p, &held, NAP_NS) if draw(&seed, 2) else pool_take_or_sweep(p, &held)
            if i < 0:
                continue
            block = p.blocks + <uint64_t>i * p.stride
            mark = (<uint64_t *>block)[0]
            torn += not holds(block, 64, mark)
            fill(block, 64, draw(&seed, 1 << 40))
            torn += pool_give(p, <uint64_t>i, held) != POOL_OK
            taken += 1
    return torn, taken


def ready_pool(MemoryPool pool not None):
    """Every block begins with a whole pattern."""
    cdef uint64_t i
    for i in range(pool.p.capacity):
        fill(pool.p.blocks + i * pool.p.stride, 64, i)


def die_in_pool(MemoryPool pool not None, int64_t times):
    """Processes that claim a row, take a block and die, one after another. Blocks that they died with."""
    cdef pool_t own = process_of(pool, 0)
    cdef uint64_t held = 0, me = a64_load_relaxed(&pool.p.identity), row = 0
    cdef int64_t died = 0
    with nogil:
        while died < times:
            row = (row + 1) % 64
            if not a64_cas_acq_rel(&own.head.owners[row], 0, me):
                pool_sweep(&own)                        # of one that nobody has swept yet
                continue
            a64_store_relaxed(&own.row, (<uint64_t>1 << 63) | (row << 51))
            if pool_take(&own, &held) < 0:
                a64_cas_acq_rel(&own.head.owners[row], me, 0)   # a sweep looks at who owns a block alone
                continue
            died += 1
            # Each under a name of its own: a sweeper relies on that no identity comes back.
            a64_cas_acq_rel(&own.head.owners[row], me, GHOST + <uint64_t>died)
        pool_sweep(&own)
    return died


# ---- blocks of any size, records, parking ------------------------------------------------------------

def make_blocks(Arena arena not None, uint32_t slot, uint64_t seed, int64_t times, bint dies):
    """A worker: takes blocks, keeps some for itself, hands the others over by records. Blocks handed over.

    Dead in the end, with blocks of its own, if it `dies`; the host sees its phase, as it would see the pidfd.
    """
    cdef heap_t heap = arena.heap
    cdef slot_t *self = arena.slot(slot)
    cdef record_t *records = arena.records(slot)
    cdef record_t record
    cdef uint64_t tag = 0, nbytes, mark
    cdef int64_t at, done = 0, given = 0
    with nogil:
        a32_store_release(&self.phase, P_READY)
        while done < times:
            nbytes = EXTENT * (1 + draw(&seed, MOST)) - 8 * draw(&seed, 9)
            at = heap_take(&heap, nbytes, slot, &tag)
            if at < 0:
                cpu_relax()
                continue
            done += 1
            mark = draw(&seed, 1 << 40)
            fill_block(&heap, at, nbytes, mark)
            if draw(&seed, 4) == 0:
                heap_free(&heap, at, tag, X_PRIVATE, slot)
                continue
            record = record_t(R_PARTIAL, 0, mark, at, tag, nbytes, 0)
            heap_publish(&heap, at, tag, slot)
            while not outbox_put(self, records, arena.outbox - 1, &record):
                wake(arena)
                cpu_relax()
            given += 1
            wake(arena)
        if dies:
            while heap_take(&heap, EXTENT, slot, &tag) < 0:
                cpu_relax()
            at = heap_take(&heap, EXTENT, slot, &tag)
            if at >= 0:
                heap_publish(&heap, at, tag, slot)
        a32_store_release(&self.phase, P_FAILED if dies else P_LEAVING)
        wake(arena)
    return given


cdef void wake(Arena arena) noexcept nogil:
    """WorkerPort.tell: one that sleeps here is woken."""
    if must_tell(&arena.head.parked) != AWAKE:
        futex_wake(&arena.head.parked, 1)


def take_blocks(Arena arena not None, uint32_t slots, uint64_t seed):
    """The host: adopts what the records name, looks at it, frees it; sweeps the dead. Until all have left.

    (Blocks, of which not whole, swept, sleeps that only their end has ended.)
    """
    cdef heap_t heap = arena.heap
    cdef uint64_t heads[SLOTS]
    cdef bint gone[SLOTS]
    cdef record_t record
    cdef uint32_t i, left = slots, phase
    cdef uint64_t taken = 0, torn = 0, swept = 0, late = 0, tag = 0, nbytes
    cdef int64_t at
    cdef bint found
    assert slots <= SLOTS
    for i in range(slots):
        heads[i] = 0
        gone[i] = False
    with nogil:
        while left:
            found = False
            for i in range(slots):
                phase = a32_load_acquire(&arena.slot(i).phase)
                while outbox_waiting(arena.slot(i), heads[i]):
                    outbox_take(arena.slot(i), arena.records(i), &heads[i], arena.outbox - 1, &record)
                    found = True
                    taken += 1
                    if not heap_adopt(&heap, record.body, record.tag, i):
                        torn += 1
                        continue
                    torn += heap_run(&heap, record.body) * EXTENT < record.bytes
                    torn += not block_holds(&heap, record.body, record.bytes, record.word)
                    torn += not heap_free(&heap, record.body, record.tag, X_HOST, NO_SLOT)
                if not gone[i] and phase >= P_FAILED:
                    swept += heap_sweep(&heap, i)
                    gone[i] = True
                    left -= 1
                    found = True
            if draw(&seed, 3) == 0:
                nbytes = EXTENT * (1 + draw(&seed, MOST))
                at = heap_take(&heap, nbytes, NO_SLOT, &tag)
                if at >= 0:
                    fill_block(&heap, at, nbytes, tag)
                    torn += not block_holds(&heap, at, nbytes, tag)
                    torn += not heap_free(&heap, at, tag, X_HOST, NO_SLOT)
            if not found and left:
                late += nothing_came(arena, slots, heads)
    return taken, torn, swept, late


cdef bint nothing_came(Arena arena, uint32_t slots, uint64_t *heads) noexcept nogil:
    """Waiting.sleep_here: park, look once more, sleep. Whether a record came that nobody had told of."""
    cdef uint32_t i
    park(&arena.head.parked, PARKED_HERE)
    for i in range(slots):
        if outbox_waiting(arena.slot(i), heads[i]):
            return False
    if not futex_wait(&arena.head.parked, PARKED_HERE, NAP_NS):
        return False
    for i in range(slots):
        if outbox_waiting(arena.slot(i), heads[i]):
            # One who is about to tell has all the time of a second sleep for it.
            futex_wait(&arena.head.parked, PARKED_HERE, 1000 * <int64_t>NAP_NS)
            return a32_load_relaxed(&arena.head.parked) == PARKED_HERE
    return False


# ---- leases ------------------------------------------------------------------------------------------

def work(WorkerPort port not None, uint64_t seed):
    """A worker: claims what is leased to it, reports, answers, until it is stopped. (Leases, of which torn.)

    When a lease of its own was killed it is dead, and says so; a new process moves in when the host says so.
    """
    cdef uint32_t slot = port.index
    cdef slot_t *self = port.slot
    cdef Arena arena = port.arena
    cdef uint64_t ran = 0, torn = 0
    cdef int64_t entry
    with nogil:
        a32_store_release(&self.phase, P_READY)
        while not a32_load_acquire(&self.control) & C_STOP:
            entry = port.claim()
            if entry < 0:
                park(&self.parked, PARKED_HERE)
                if not ring_waiting(self) and not a32_load_acquire(&self.control) & C_STOP:
                    futex_wait(&self.parked, PARKED_HERE, NAP_NS)
                a32_store_relaxed(&self.parked, AWAKE)
                continue
            ran += 1
            if not run_lease(port, arena, slot, <uint32_t>entry, &seed, &torn):
                a32_store_release(&self.phase, P_FAILED)
                wake(arena)
                while a32_load_acquire(&self.phase) == P_FAILED and not a32_load_acquire(&self.control):
                    cpu_relax()
        a32_store_release(&self.phase, P_LEAVING)
    return ran, torn


cdef bint run_lease(WorkerPort port, Arena arena, uint32_t slot, uint32_t entry, uint64_t *seed,
                    uint64_t *torn) noexcept nogil:
    """Runner.call and chunk: arguments, reports, items, the result. False: the host has killed the lease."""
    cdef lease_t *lease = arena.lease(slot, entry)
    cdef report_t report
    cdef record_t record
    cdef uint64_t word, done, mark = lease.task
    cdef uint32_t item, turn
    torn[0] += lease.fn != mark + 1
    if lease.where == AT_BOUNCE:
        # WorkerPort.receive
        turn = a32_load_relaxed(&port.slot.turn)
        record = record_t(R_ASK, entry, a64_load_relaxed(&lease.word), 0, 0, 128, 0)
        send(port, arena, &record)
        while a32_load_acquire(&port.slot.turn) == turn:
            futex_wait(&port.slot.turn, turn, NAP_NS)
            if a32_load_acquire(&port.slot.control) & C_STOP:
                return False
        torn[0] += not holds(arena.bounce(slot), 128, mark)
    else:
        torn[0] += not holds(lease.inline_, 128, mark)
    for item in range(<uint32_t>lease.body_bytes):
        if item and not port.advance(lease):
            return False
        port.begin(lease, now_ns())
        report.done = report.total = mark + item
        report.done_kind = report.total_kind = V_INT
        report.note_bytes = 8
        memcpy(report.note, &report.done, 8)
        write_report(lease, &report)
        port.end(lease, 1)
    fill(lease.inline_, 128, mark + 7)
    lease.out_bytes = 128
    lease.out_where = AT_INLINE
    # WorkerPort.complete
    word = a64_load_relaxed(&lease.word)
    done = lease_word(L_DONE, lease.body_bytes, l_tag(word))
    if l_state(word) != L_RUNNING or not a64_cas_acq_rel(&lease.word, word, done):
        return False
    a32_store_release(&port.slot.running, 0)
    record = record_t(R_DONE, entry, done, 0, 0, 0, 1)
    send(port, arena, &record)
    return True


cdef void send(WorkerPort port, Arena arena, record_t *record) noexcept nogil:
    """WorkerPort.put"""
    while not outbox_put(port.slot, port.records, port.outbox_mask, record):
        wake(arena)
        cpu_relax()
    wake(arena)


ctypedef struct seat_t:         # the host's own notes of a slot: Task and SlotTable
    uint64_t ring_tail, outbox_head
    uint64_t tags[ENTRIES]
    uint64_t tasks[ENTRIES]     # 0: the entry is free
    uint64_t heads


def lead(Arena arena not None, DeadlineKeeper keeper not None, uint32_t slots, uint64_t seed, int64_t tasks):
    """The host: leases, takes back, harvests, settles the dead, until so many tasks have an outcome.

    (Done, killed, taken back, torn.)
    """
    cdef seat_t seats[SLOTS]
    cdef uint32_t i, entry
    cdef uint64_t number = 0
    cdef uint64_t counts[4]
    cdef seat_t *seat
    cdef slot_t *slot
    cdef record_t record
    cdef bint found
    assert slots <= SLOTS and arena.leases == ENTRIES
    for i in range(slots):
        seats[i].ring_tail = seats[i].outbox_head = 0
        for entry in range(<uint32_t>ENTRIES):
            seats[i].tags[entry] = seats[i].tasks[entry] = 0
        set_armed(&keeper.guards[i], True)
    for i in range(4):
        counts[i] = 0
    with nogil:
        while counts[0] + counts[1] < <uint64_t>tasks:
            found = False
            for i in range(slots):
                seat = &seats[i]
                slot = arena.slot(i)
                while outbox_waiting(slot, seat.outbox_head):
                    outbox_take(slot, arena.records(i), &seat.outbox_head, arena.outbox - 1, &record)
                    found = True
                    if record.kind == R_ASK:
                        fill(arena.bounce(i), 128, seat.tasks[record.entry])
                        a32_fetch_add_acq_rel(&slot.turn, 1)
                        futex_wake(&slot.turn, 1)
                    else:
                        harvest(arena, i, seat, record.entry, counts)
                if a32_load_acquire(&slot.phase) == P_FAILED:
                    settle(arena, keeper, i, seat, counts)
                    found = True
                elif a32_load_acquire(&slot.phase) == P_READY:
                    for entry in range(<uint32_t>ENTRIES):
                        if seat.tasks[entry] == 0 and ring_room(slot, seat.ring_tail, ENTRIES - 1):
                            number += 1000
                            lease_to(arena, keeper, i, entry, seat, number, &seed)
                    if draw(&seed, 8) == 0:
                        take_back(arena, i, <uint32_t>draw(&seed, ENTRIES), seat, counts)
                    look_in(arena.lease(i, <uint32_t>draw(&seed, ENTRIES)), counts)
            if not found:
                park(&arena.head.parked, PARKED_HERE)
                futex_wait(&arena.head.parked, PARKED_HERE, 200000)
        for i in range(slots):
            set_armed(&keeper.guards[i], False)
            a32_store_release(&arena.slot(i).control, C_STOP)
            if must_tell(&arena.slot(i).parked) != AWAKE:
                futex_wake(&arena.slot(i).parked, 1)
    return counts[0], counts[1], counts[2], counts[3]


cdef void set_armed(guard_t *guard, bint armed) noexcept nogil:
    """Slots.occupy and vacate; there is no process, so nobody is signalled."""
    guard_acquire(guard)
    guard.pidfd = -1
    guard.armed = armed
    guard.killing = False
    guard_release(guard)


cdef void lease_to(Arena arena, DeadlineKeeper keeper, uint32_t index, uint32_t entry, seat_t *seat,
                   uint64_t number, uint64_t *seed) noexcept nogil:
    """Leasing.publish"""
    cdef lease_t *lease = arena.lease(index, entry)
    a64_store_relaxed(&lease.started, 0)
    a64_store_relaxed(&lease.reported, 0)
    lease.task = number
    lease.fn = number + 1
    lease.where = AT_BOUNCE if draw(seed, 5) == 0 else AT_INLINE
    lease.body_bytes = 1 + draw(seed, 3)
    lease.out_where = AT_NOWHERE
    lease.out_ns = 0
    fill(lease.inline_, 128, number)
    seat.tags[entry] += 1
    seat.tasks[entry] = number
    a64_store_release(&lease.word, lease_word(L_LEASED, 0, seat.tags[entry]))
    ring_put(arena.slot(index), arena.ring(index), &seat.ring_tail, ENTRIES - 1,
             ring_place(entry, seat.tags[entry]))
    if must_tell(&arena.slot(index).parked) != AWAKE:
        futex_wake(&arena.slot(index).parked, 1)


cdef void harvest(Arena arena, uint32_t index, seat_t *seat, uint32_t entry, uint64_t *counts) noexcept nogil:
    """Harvest.harvest"""
    cdef lease_t *lease = arena.lease(index, entry)
    cdef uint64_t word = a64_load_acquire(&lease.word)
    if l_state(word) != L_DONE or l_tag(word) != seat.tags[entry] or seat.tasks[entry] == 0:
        return
    counts[3] += lease.out_bytes != 128 or not holds(lease.inline_, 128, seat.tasks[entry] + 7)
    counts[0] += 1
    seat.tasks[entry] = 0
    a64_store_release(&lease.word, lease_word(L_FREE, 0, seat.tags[entry]))


cdef void take_back(Arena arena, uint32_t index, uint32_t entry, seat_t *seat,
                    uint64_t *counts) noexcept nogil:
    """Leasing.take_back: LEASED -> FREE, unless the worker was quicker."""
    cdef uint64_t tag = seat.tags[entry]
    if seat.tasks[entry] and a64_cas_acq_rel(
            &arena.lease(index, entry).word, lease_word(L_LEASED, 0, tag), lease_word(L_FREE, 0, tag)):
        seat.tasks[entry] = 0
        counts[2] += 1


cdef void look_in(lease_t *lease, uint64_t *counts) noexcept nogil:
    """Dispatcher.progress: a report is whole, whoever writes the next one."""
    cdef report_t copy
    if a64_load_relaxed(&lease.reported) and copy_report(lease, &copy):
        counts[3] += copy.total != copy.done or copy.note_bytes != 8


cdef void settle(Arena arena, DeadlineKeeper keeper, uint32_t index, seat_t *seat,
                 uint64_t *counts) noexcept nogil:
    """Slots.vacate, Harvest.settle_now, Slots.open_slot: the process is dead, another one moves in."""
    cdef slot_t *slot = arena.slot(index)
    cdef uint32_t entry
    set_armed(&keeper.guards[index], False)
    for entry in range(<uint32_t>ENTRIES):
        harvest(arena, index, seat, entry, counts)
        if seat.tasks[entry]:
            counts[1] += 1
            seat.tasks[entry] = 0
            a64_store_release(&arena.lease(index, entry).word, lease_word(L_FREE, 0, seat.tags[entry]))
    seat.ring_tail = seat.outbox_head = 0
    slot_renew(slot)
    set_armed(&keeper.guards[index], True)
    a32_store_release(&slot.phase, P_READY)


def keep(Arena arena not None, DeadlineKeeper keeper not None, uint32_t slots, uint64_t seed, int64_t kills):
    """The deadline keeper: looks at what runs, and kills some of it, until all have left."""
    cdef uint32_t i, running, left
    cdef int64_t killed = 0
    cdef uint64_t word
    cdef lease_t *lease
    with nogil:
        while True:
            left = 0
            for i in range(slots):
                left += a32_load_acquire(&arena.slot(i).phase) != P_LEAVING
                running = a32_load_acquire(&arena.slot(i).running)
                if not 0 < running <= arena.leases or killed >= kills:
                    continue
                lease = arena.lease(i, running - 1)
                word = a64_load_acquire(&lease.word)
                # DeadlineKeeper.overdue
                if l_state(word) != L_RUNNING or a64_load_acquire(&lease.started) == 0 or draw(&seed, 50):
                    continue
                guard_acquire(&keeper.guards[i])
                killed += kill_lease(&keeper.guards[i], lease, word)
                guard_release(&keeper.guards[i])
            if left == 0:
                break
    return killed


def used_extents(Arena arena not None):
    """Extents that are not free."""
    return heap_used(&arena.heap)


# ---- reports -----------------------------------------------------------------------------------------

def write_reports(Arena arena not None, int64_t times):
    """A worker that reports on and on, in the first lease of slot 0."""
    cdef lease_t *lease = arena.lease(0, 0)
    cdef report_t report
    cdef int64_t i
    with nogil:
        for i in range(1, times + 1):
            report.done = report.total = <uint64_t>i
            report.done_kind = report.total_kind = V_INT
            report.note_bytes = NOTE_BYTES
            fill(report.note + 5, 64, <uint64_t>i)      # 8-aligned
            write_report(lease, &report)


def read_reports(Arena arena not None, int64_t times):
    """The host, which looks until the last one is there. (Looks, of which torn or older than the last.)"""
    cdef lease_t *lease = arena.lease(0, 0)
    cdef report_t copy
    cdef uint64_t looks = 0, torn = 0, last = 0
    with nogil:
        while last < <uint64_t>times:
            if copy_report(lease, &copy):
                looks += 1
                torn += (copy.total != copy.done or not holds(copy.note + 5, 64, copy.done)
                         or copy.done < last)
                last = copy.done
    return looks, torn


# ---- what a sanitizer has to find --------------------------------------------------------------------

def plant_race(Arena arena not None, int64_t times):
    """Two threads in here: the same word, plainly. They wait for one another, in no order that counts."""
    cdef uint64_t *word = <uint64_t *>arena.heap.extents
    cdef a64_t *here = &arena.heap.words[1]
    cdef int64_t _i
    with nogil:
        a64_fetch_add_relaxed(here, 1)
        while a64_load_relaxed(here) < 2:
            cpu_relax()
        for _i in range(times):
            word[0] += 1


def plant_relaxed(Arena arena not None, bint gives, int64_t times):
    """A block handed over by a relaxed store: right on x86, and a race all the same."""
    cdef uint64_t *block = <uint64_t *>(arena.heap.extents + EXTENT)
    cdef a64_t *turn = &arena.heap.words[0]
    cdef uint64_t i, total = 0
    with nogil:
        for i in range(<uint64_t>times):
            if gives:
                while a64_load_acquire(turn) != 2 * i:
                    cpu_relax()
                block[0] = i
                a64_store_relaxed(turn, 2 * i + 1)      # a64_store_release is what it takes
            else:
                while a64_load_acquire(turn) != 2 * i + 1:
                    cpu_relax()
                total += block[0]
                a64_store_release(turn, 2 * i + 2)
    return total


def plant_overflow(Py_ssize_t nbytes):
    """A byte behind the end of what was allocated."""
    cdef char *at = <char *>PyMem_Malloc(<size_t>nbytes)
    cdef char found
    if at == NULL:
        raise MemoryError("no memory to plant anything in")
    at[nbytes] = 1
    found = at[nbytes]
    PyMem_Free(at)
    return found


def plant_shift(int by):
    """A shift by more than a word has."""
    cdef int one = 1
    return one << by
