# cython: language_level=3
"""A worker's end of its slot: claims leases, reads arguments, delivers results.

One lease, step by step (the words are in _layout.pxd; each step may be the last, see the sweep in _harvest):

    claim()    take a place from the ring; LEASED -> RUNNING(0) by CAS. Lost: taken back, skip it.
    frame()    the arguments: inline, a view of their block, or piece by piece through the bounce block
    begin()    the item's clock starts
    advance()  RUNNING(i) -> RUNNING(i+1) by CAS. Lost: killed, exit.
    commit()   results so far: block PRIVATE -> PUBLISHING, then the record that names it, then the next item
    finish()   the last results: block or inline or bounce; RUNNING -> DONE by CAS; then the record.
               Lost: killed, claim nothing more and exit.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.string cimport memcpy
from posix.time cimport nanosleep, timespec
from posix.unistd cimport getpid

from runtime._frame cimport BlockSlice
from runtime._views cimport BlockView, is_seen


cdef int64_t ROOM_PATIENCE = 50_000_000     # ns to look for room before a payload travels by value
cdef int64_t GROWTH_PATIENCE = 2_000_000_000    # the same, while the host has not answered the wish for it
cdef int64_t NAP = 500_000                  # ns between two looks whether there is room, or a place
cdef int64_t COMING = 1_000_000             # ns that one watches more for what the host has told of, at most
cdef int64_t WAKING = 4                     # times as long that one watches who has woken a thread
cdef int64_t BACKSTOP = 50_000_000          # ns: futex waits are bounded, so a lost wake-up only costs time


cdef void nap(int64_t ns) noexcept nogil:
    cdef timespec t
    t.tv_sec = 0
    t.tv_nsec = ns
    nanosleep(&t, NULL)


cdef class Share:
    """What the lanes of a process have in common. Thread-safety: no method lets the GIL go.

    left: items that may still be begun, negative: any number.
    """

    def __init__(self, int64_t left):
        self.left = left

    cdef bint take(self) noexcept:
        """One item is begun. False: there is none left."""
        if self.left > 0:
            self.left -= 1
            return True
        return self.left < 0

    cdef void give_back(self) noexcept:
        """It was not."""
        if self.left >= 0:
            self.left += 1

    cdef bint sit(self) noexcept:
        """Be the one lane that watches its ring: each keeps a processor busy. False: another one is."""
        if self.watching:
            return False
        self.watching = True
        return True


cdef class WorkerPort(Viewer):
    """A worker's end of its slot.

    Thread-safety: for the worker's main thread, or its lane's; `rouse` for any; the views it hands out may be
    dropped in any thread.
    Fork-safety: for the process that made it; in a fork of it `owned` is False and nothing may be called.
    Blocking: `finish` and `commit` wait while the outbox is full, or for the host to take a piece.
    """

    def __init__(self, Arena arena, uint32_t index, notify):
        self.arena = arena
        self.index = index
        self.slot = arena.slot(index)
        self.ring = arena.ring(index)
        self.records = arena.records(index)
        self.ring_mask = arena.leases - 1
        self.outbox_mask = arena.outbox - 1
        self.unkept = []
        self.notify = notify
        self.thread = PyThread_get_thread_ident()

    @property
    def owned(self):
        """Whether this process is the worker itself, not a fork of it."""
        return self.arena.pid == getpid()

    @property
    def incarnation(self):
        """The count of processes that lived in this slot, this one included."""
        return self.slot.incarnation

    @property
    def worked(self):
        """Whether an item has been finished here."""
        return a64_load_relaxed(&self.slot.tasks_done) > 0

    @property
    def stopping(self):
        """Whether the host wants no further claim."""
        return (a32_load_acquire(&self.slot.control) & C_STOP) != 0

    cdef lease_t *lease(self, uint32_t entry) noexcept nogil:
        return self.arena.lease(self.index, entry)

    # ---- phases ----

    def ready(self):
        """From now on the host leases to this worker."""
        a32_store_release(&self.slot.phase, P_READY)

    def leave(self):
        """This worker claims nothing more and exits of its own will."""
        a32_store_release(&self.slot.phase, P_LEAVING)

    def fail(self, bytes pickle):
        """The worker cannot start: leave the pickled exception where the host finds it."""
        cdef uint64_t n = <uint64_t>len(pickle)
        if n > self.arena.bounce_bytes:
            raise ValueError(f"the failure takes {n} bytes; there is room for {self.arena.bounce_bytes}")
        memcpy(self.arena.bounce(self.index), <char *>pickle, n)
        self.slot.failure_bytes = n
        a32_store_release(&self.slot.phase, P_FAILED)

    # ---- a lease ----

    cdef int64_t claim(self) noexcept nogil:
        """Claim the next lease: its entry, or -1 when the ring is empty."""
        cdef int64_t place
        cdef uint32_t entry
        cdef lease_t *lease
        cdef uint64_t word
        while True:
            place = ring_take(self.slot, self.ring, self.ring_mask)
            if place < 0:
                return -1
            entry = <uint32_t>place & self.ring_mask
            lease = self.lease(entry)
            word = a64_load_acquire(&lease.word)
            if l_state(word) != L_LEASED or ring_place(entry, l_tag(word)) != <uint32_t>place:
                continue                        # taken back: its place stayed behind
            if a64_cas_acq_rel(&lease.word, word, lease_word(L_RUNNING, 0, l_tag(word))):
                a32_store_release(&self.slot.running, entry + 1)
                self.pushed = self.woke = False
                return entry

    def describe(self, uint32_t entry):
        """(function id, whether the function leads the frame) of a lease."""
        cdef lease_t *lease = self.lease(entry)
        return lease.fn, lease.fn_body == 0

    def function(self, uint32_t entry):
        """The function's pickle, from its block."""
        cdef lease_t *lease = self.lease(entry)
        return PyBytes_FromStringAndSize(self.arena.base + lease.fn_body, <Py_ssize_t>lease.fn_bytes)

    def frame(self, uint32_t entry):
        """The frame of the arguments, as something with a buffer."""
        cdef lease_t *lease = self.lease(entry)
        if lease.where == AT_INLINE:
            return PyBytes_FromStringAndSize(lease.inline_, <Py_ssize_t>lease.body_bytes)
        if lease.where == AT_BLOCK:
            return self.show(lease.body, lease.body_tag, lease.body_bytes, 0, lease.flags & F_PRIVATE_VIEW)
        return self.receive(entry)

    cdef receive(self, uint32_t entry):
        """Fetch the arguments' frame through the bounce block, a piece for each turn of the host."""
        cdef lease_t *lease = self.lease(entry)
        cdef uint64_t total = lease.body_bytes
        cdef uint64_t got = 0
        cdef uint64_t n
        cdef uint32_t turn
        cdef record_t record
        cdef char *dest
        out = bytearray(total)
        dest = PyByteArray_AS_STRING(out)
        while got < total:
            n = min(self.arena.bounce_bytes, total - got)
            turn = a32_load_relaxed(&self.slot.turn)
            record = record_t(R_ASK, entry, a64_load_relaxed(&lease.word), 0, 0, n, got)
            self.put(&record)
            self.wait_turn(turn)
            with nogil:
                memcpy(dest + got, self.arena.bounce(self.index), n)
            got += n
        return out

    cdef void begin(self, lease_t *lease, int64_t now) noexcept nogil:
        """The item's clock starts: its timeout counts from here."""
        a64_store_release(&lease.started, <uint64_t>now)
        if lease.submitted:
            self.count_wait(now - <int64_t>lease.submitted)
            lease.submitted = 0

    cdef void count_wait(self, int64_t ns) noexcept nogil:
        """A call has waited so long, from its submission to its start."""
        ns = max(ns, 0)                         # the clock was read before it was submitted
        count_time(self.slot.waited, <uint64_t>ns, 1)
        a64_store_relaxed(&self.slot.waited_ns, a64_load_relaxed(&self.slot.waited_ns) + <uint64_t>ns)

    cdef int64_t stop(self, lease_t *lease, uint64_t items) noexcept nogil:
        """The clock stops, before the word moves on. It ran for so many items. The time."""
        cdef int64_t now = now_ns()
        cdef int64_t took = now - <int64_t>a64_load_relaxed(&lease.started)
        lease.out_ns += took
        # In this order: who reads `busy`, `started` and `busy` again never counts this time twice.
        a64_store_release(&lease.started, 0)                    # B1 pairs with B2 in Slots.busy_ns
        a64_store_release(&self.slot.busy, a64_load_relaxed(&self.slot.busy) + <uint64_t>took)
        count_time(self.slot.ran, <uint64_t>took // items if items > 1 else <uint64_t>took, items)
        return now

    cdef int64_t end(self, lease_t *lease, uint64_t items) noexcept nogil:
        """An item has ended: the clock stops. It ran for this one and those since it was read last. The time.
        """
        a64_store_relaxed(&self.slot.tasks_done, a64_load_relaxed(&self.slot.tasks_done) + 1)
        return self.stop(lease, items)

    cdef bint advance(self, lease_t *lease) noexcept nogil:
        """RUNNING(i) -> RUNNING(i+1). False: the host has killed this lease; exit."""
        cdef uint64_t word = a64_load_relaxed(&lease.word)
        return l_state(word) == L_RUNNING and a64_cas_acq_rel(
            &lease.word, word, lease_word(L_RUNNING, l_item(word) + 1, l_tag(word)))

    def commit(self, uint32_t entry, list items, uint64_t count):
        """Deliver the outcomes of `count` items ahead of the rest. False: no room, keep them for `finish`."""
        cdef Frame frame = self.lay_out(items)
        cdef uint64_t at = 0, tag = 0
        cdef record_t record
        if not self.take_room(frame.nbytes, False, &at, &tag):
            return False
        self.fill(frame, at)
        if self.arena.frozen:
            self.await_forks()
        self.hand_over(frame)
        record = record_t(R_PARTIAL, entry, a64_load_relaxed(&self.lease(entry).word), self.offset_of(at),
                          tag, frame.nbytes, count)
        heap_publish(&self.arena.heap, at, tag, self.index)
        self.put(&record)
        return True

    def finish(self, uint32_t entry, list items, uint64_t count):
        """Deliver the last outcomes and end the lease. `count`: how many of its items were run in all.

        False: the host has killed this lease; claim nothing more and exit.
        """
        cdef lease_t *lease = self.lease(entry)
        cdef Frame frame = self.lay_out(items)
        cdef uint64_t at = 0, tag = 0
        lease.out_bytes = frame.nbytes
        if frame.nbytes <= INLINE_BYTES:
            frame.copy(lease.inline_, 0, frame.nbytes)
            lease.out_where = AT_INLINE
        else:
            if self.take_room(frame.nbytes, True, &at, &tag):
                self.fill(frame, at)
                heap_publish(&self.arena.heap, at, tag, self.index)
                lease.out_body = self.offset_of(at)
                lease.out_tag = tag
                lease.out_where = AT_BLOCK
            else:
                self.offer(entry, frame)
                lease.out_where = AT_BOUNCE
        self.hand_over(frame)
        self.close_views(frame)
        return self.complete(entry, count)

    cdef Frame lay_out(self, list items):
        """Outcomes as a frame; by value what something else in this worker sees, and may change later."""
        cdef Frame frame
        cdef list parts = [
            one for item in items for one in <tuple>(<tuple>item)[2] if isinstance(one, BlockSlice)]
        cdef BlockSlice part
        cdef BlockView view
        for part in parts:
            view = <BlockView>part.holder
            part.by_value = not view.access and (view.kept or is_seen(view, parts, self.opened))
        frame = Frame(items)
        frame.parts = parts
        return frame

    cdef int hand_over(self, Frame frame) except -1:
        """Blocks of this slot that outcomes lie in become the host's: PRIVATE -> PUBLISHING, before the
        record that leads to them is written. Killed here, the sweep frees them.
        """
        cdef BlockSlice part
        cdef BlockView view
        for part in frame.parts:
            view = <BlockView>part.holder
            if view.own and not part.by_value:
                heap_publish(&self.arena.heap, self.arena.index_of(view.body), view.tag, self.index)
                view.own = False
        return 0

    cdef int close_views(self, Frame frame) except -1:
        """The lease ends: tell the host what this worker still sees, before DONE."""
        cdef BlockView view
        while self.opened:
            view = <BlockView>self.opened.pop()
            self.keep(view, frame.parts)
        return 0

    cdef int keep(self, BlockView view, list parts) except -1:
        """If something in this worker still sees a block of the host's: tell it."""
        cdef record_t record = record_t(R_KEEP, 0, 0, view.body, view.tag, 0, 0)
        if not view.kept and is_seen(view, parts, None):
            view.kept = True                    # first: it may go while this waits for a place in the outbox
            self.put(&record)
        return 0

    def empty(self, nbytes):
        """A block of this worker's own, uninitialised; None: there is no room, for 50 ms, or while the host
        sees to it that there is some; and always in a fork. For any thread.
        """
        cdef uint64_t at = 0, tag = 0
        if not self.owned or nbytes > self.arena.max_bytes or not self.take_room(nbytes, True, &at, &tag):
            return None
        return self.create(at, tag, nbytes)

    cdef bint complete(self, uint32_t entry, uint64_t count) except -1:
        """RUNNING(i) -> DONE(count), and the record of it. False: the host has killed this lease."""
        cdef lease_t *lease = self.lease(entry)
        cdef uint64_t word, done
        cdef record_t record
        if self.arena.frozen:
            self.await_forks()
        word = a64_load_relaxed(&lease.word)
        done = lease_word(L_DONE, count, l_tag(word))
        # D1 pairs with the acquire in the host's harvest: who sees DONE sees the result's words.
        if l_state(word) != L_RUNNING or not a64_cas_acq_rel(&lease.word, word, done):
            return False
        a32_store_release(&self.slot.running, 0)
        record = record_t(R_DONE, entry, done, 0, 0, 0, count)
        self.put(&record)
        return True

    cdef int await_forks(self) except -1:
        """Another thread forks, and its child copies what it shows of the region: until it has, no lease ends
        here whose blocks it may see. See forking.py; that takes two seconds at most.
        """
        self.clock = 0
        while self.arena.frozen:
            with nogil:
                nap(NAP)
            PyErr_CheckSignals()
        return 0

    cdef uint64_t offset_of(self, uint64_t at) noexcept:
        return self.arena.extents_at + at * EXTENT

    cdef fill(self, Frame frame, uint64_t at):
        cdef char *dest = self.arena.heap.extents + at * EXTENT
        if frame.nbytes < 65536:
            frame.copy(dest, 0, frame.nbytes)
        else:
            with nogil:
                frame.copy(dest, 0, frame.nbytes)

    cdef offer(self, uint32_t entry, Frame frame):
        """Send a result's frame through the bounce block; the host takes a piece and gives the turn back."""
        cdef lease_t *lease = self.lease(entry)
        cdef uint64_t sent = 0
        cdef uint64_t n
        cdef uint32_t turn
        cdef record_t record
        while sent < frame.nbytes:
            n = min(self.arena.bounce_bytes, frame.nbytes - sent)
            with nogil:
                frame.copy(self.arena.bounce(self.index), sent, n)
            turn = a32_load_relaxed(&self.slot.turn)
            record = record_t(R_OFFER, entry, a64_load_relaxed(&lease.word), 0, 0, n, sent)
            self.put(&record)
            self.wait_turn(turn)
            sent += n

    cdef int wait_turn(self, uint32_t seen) except -1:
        """Until the host has served the piece that was asked for or offered."""
        cdef int64_t until = now_ns() + self.arena.spin
        with nogil:
            while a32_load_acquire(&self.slot.turn) == seen and now_ns() < until:
                cpu_relax()
        while a32_load_acquire(&self.slot.turn) == seen:
            with nogil:
                futex_wait(&self.slot.turn, seen, BACKSTOP)
            PyErr_CheckSignals()
        return 0

    cdef int take_room(self, uint64_t nbytes, bint patient, uint64_t *at, uint64_t *tag) except -1:
        """A private block of this slot. False: no room, for up to 50 ms if patient, or while the host sees to
        it that there is some.
        """
        cdef int64_t found, until, now = 0
        cdef uint64_t frees
        if nbytes > self.arena.capacity * EXTENT:
            return False
        frees = a64_load_relaxed(self.arena.heap.frees)
        if self.was_full and frees == self.full_at:
            return False                        # searched in vain, and nothing was freed since
        until = now_ns() + ROOM_PATIENCE
        while True:
            self.arena.counted()
            with nogil:
                found = heap_take(&self.arena.heap, nbytes, self.index, tag)
            if found >= 0:
                at[0] = <uint64_t>found
                self.was_full = False
                return True
            if self.arena.grows and now < until:
                self.wish(nbytes)
            with nogil:
                if not patient or not self.await_room(
                        frees, until, until + GROWTH_PATIENCE if self.arena.grows else until):
                    self.was_full = True
                    self.full_at = frees
                    return False
            frees = a64_load_relaxed(self.arena.heap.frees)
            now = now_ns()

    cdef int wish(self, uint64_t nbytes) except -1:
        """Tell the host that there is no room for so many bytes: the region may grow."""
        if a64_load_relaxed(&self.arena.head.wanted) < nbytes:  # of two that cross one is lost: a hint
            a64_store_relaxed(&self.arena.head.wanted, nbytes)
        if PyThread_get_thread_ident() == self.thread:
            return self.tell()
        self.untold = True                      # a socket belongs to one thread: the next message tells
        return 0

    cdef bint await_room(self, uint64_t frees, int64_t until, int64_t last) noexcept nogil:
        """Until something was freed. False: not until then, or until the host has answered the wish."""
        cdef int64_t now
        while a64_load_relaxed(self.arena.heap.frees) == frees:
            now = now_ns()
            if now >= last or (now >= until and a64_load_relaxed(&self.arena.head.wanted) == 0):
                return False
            nap(NAP)
        return now_ns() < last

    # ---- the outbox ----

    cdef int put(self, record_t *record) except -1:
        """Publish a record and tell the host if it sleeps; waits while the outbox is full, drops nothing."""
        while not outbox_put(self.slot, self.records, self.outbox_mask, record):
            self.clock = 0
            self.notify()
            with nogil:
                nap(NAP)
            PyErr_CheckSignals()
        self.tell()
        return 0

    cdef int tell(self) except -1:
        """Tell the host to look at the outbox, unless it is awake and will."""
        cdef uint32_t how = must_tell(&self.arena.head.parked) if self.arena.lanes else PARKED
        if how == PARKED_HERE:
            self.woke = True
            futex_wake(&self.arena.head.parked, 1)
        elif how != AWAKE:
            self.pushed = True
            self.notify()
        return 0

    cdef unkeep(self, uint64_t body, uint64_t tag):
        """The last view of an argument block is gone. Called from destructors: it never waits."""
        self.unkept.append((body, tag))
        self.flush()

    def flush(self):
        """Publish the records of released views, as far as the outbox has room.

        It tells nobody: destructors run in any thread and a socket belongs to one. The next message does.
        """
        cdef record_t record
        while self.unkept and not self.arena.frozen:    # what a child is still to copy stays the host's
            body, tag = self.unkept[len(self.unkept) - 1]
            record = record_t(R_UNKEEP, 0, 0, body, tag, 0, 0)
            if not outbox_put(self.slot, self.records, self.outbox_mask, &record):
                break
            self.unkept.pop()
            self.untold = True

    def tell_untold(self):
        """Tell of records that were published without a hint."""
        if self.untold:
            self.untold = False
            self.tell()

    # ---- waiting ----

    @property
    def unseen(self):
        """Whether there is something in the ring."""
        return ring_waiting(self.slot)

    def rescued(self):
        """Leases were found that no hint had announced."""
        a64_store_relaxed(&self.slot.rescued, a64_load_relaxed(&self.slot.rescued) + 1)

    def watch(self):
        """Look at the ring for a moment, or while the host says that something is coming, without the GIL.
        Whether there is something in it.

        Not after the host had to be woken: it would be put on the processor that this would keep busy.
        """
        cdef int64_t until, now
        cdef uint32_t _k
        if self.arena.spin == 0 or self.pushed or (self.share is not None and not self.share.sit()):
            return False
        with nogil:
            until = now_ns() + self.arena.spin * (WAKING if self.woke else 1)
            while not ring_waiting(self.slot):
                for _k in range(16):
                    cpu_relax()
                now = now_ns()
                if now >= until and now >= min(<int64_t>a64_load_relaxed(&self.slot.coming), until + COMING):
                    break
        if self.share is not None:
            self.share.watching = False
        return ring_waiting(self.slot)

    def park(self):
        """From now on the host sends a message with a lease. False: there is one already, do not sleep."""
        park(&self.slot.parked, PARKED)
        if ring_waiting(self.slot):
            self.unpark()
            return False
        return True

    def adopt_thread(self):
        """This thread is the one that claims here, from now on."""
        self.thread = PyThread_get_thread_ident()

    def doze(self, int64_t ns):
        """A lane: sleep until its process's main thread wakes it, for so many nanoseconds at most.

        The main thread is told of leases by a message; it knows from the words whom that is for.
        """
        park(&self.slot.parked, PARKED)
        if not self.wanted():
            with nogil:
                futex_wait(&self.slot.parked, PARKED, ns)
        self.unpark()

    def rouse(self):
        """The main thread: wake the lane, if it sleeps and is wanted. Whether it did."""
        if not self.wanted():
            return False
        a32_cas_relaxed(&self.slot.parked, PARKED, AWAKE)   # it may be about to sleep: then it does not
        return futex_wake(&self.slot.parked, 1) > 0

    cdef bint wanted(self) noexcept:
        """Whether there is something in the ring, or nothing more to be claimed."""
        return (self.leaving or ring_waiting(self.slot)
                or (a32_load_acquire(&self.slot.control) & C_STOP) != 0)

    def unpark(self):
        """The worker is awake and looks at its ring before it sleeps again."""
        a32_store_relaxed(&self.slot.parked, AWAKE)
