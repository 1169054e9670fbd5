# cython: language_level=3
"""A region that grows while it is used, and gives back what is not used any more. The host alone does both.

Words and extents are laid out for the most that there may be (_layout.pxd), and every process maps all of it:
so growing is to reserve memory in the file, and then to say so; offsets stay valid, nobody remaps.

    grow   a free run is wanted: HOLEs that lie in one get memory again, HOLE -> FREE; else extents are added
           at the end: memory for their words, for them, the words, the count (X4), in this order
    trim   what was free at two looks, some seconds apart, and was not taken in between: the run is taken as
           a block of the host's, its memory given back, HOST -> HOLE

Memory is reserved before it is used (memory.reserve): a memory file has no limit of its own, and who touches
a page that nobody has reserved may be killed for it. One thread at a time is here; the GIL is let go while
the kernel works. Whoever comes meanwhile is told that there is no room, but for `take`: that waits, as its
answer is for good.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t, uint64_t
from posix.unistd cimport getpid, usleep

from runtime._atomics cimport *
from runtime._arena cimport Arena, HostBlock, round_up
from runtime._extent cimport heap_free, heap_t, heap_take
from runtime._layout cimport *

from runtime.errors import RegionFull
from runtime.memory import memory_room


cdef uint64_t BEYOND = (64 << 20) // EXTENT     # extents that a growth adds to what is needed, at most
cdef uint64_t PIECE = (1 << 20) // EXTENT       # extents that are given back together, or not at all
cdef uint64_t BITE = 16 * PIECE                 # extents that are given back by one call, at most
cdef int64_t LOOK = 5_000_000_000               # ns between two looks at what is free
cdef int64_t PAUSE = 1_000_000_000              # ns until memory is asked for again that was not there
cdef unsigned int NAP = 20                      # µs between two looks whether another thread has grown it
cdef int TRIES = 8                              # times that others may be quicker to take what was made


cdef uint64_t extents_of(uint64_t nbytes) noexcept nogil:
    return max(<uint64_t>1, nbytes // EXTENT + (nbytes % EXTENT != 0))


cdef class GrowingArena(Arena):
    """An arena that grows, up to `max_bytes`.

    Thread-safety: every method, from any thread. Fork-safety: in a fork it neither grows nor shrinks.
    Blocking: `grow` and `take` while memory is reserved, 6 GiB take about a second; `take` also while another
    thread does that, or gives memory back.
    """

    @classmethod
    def create(cls, *args):
        """As Arena.create. What it is made with is never given back."""
        cdef GrowingArena self = super().create(*args)
        self.idle = {}
        self.refusal = ""
        return self

    # ---- growing -------------------------------------------------------------------------------------

    cdef bint hopeful(self, uint64_t nbytes) noexcept:
        """Whether `grow` may succeed: there is something left, and it was not refused just now."""
        cdef uint64_t need = extents_of(nbytes)
        if self.base == NULL or self.ending or self.private or self.pid != getpid() or need > self.capacity:
            return False
        if self.heap.count == self.capacity and self.holes == 0:
            return False
        if self.refused == 0 or need < self.refused:
            return True
        if self.crowded:
            return a64_load_relaxed(self.heap.frees) != self.refused_frees
        return now_ns() - self.refused_at >= PAUSE

    def grow(self, uint64_t nbytes):
        """Make room for a free run of so many bytes. Whether there is one, until somebody takes it.

        False also while another thread grows. `refusal` says why. Raises: what a signal handler does.
        """
        cdef uint64_t need = extents_of(nbytes)
        if self.growing or not self.hopeful(nbytes):
            return False
        self.growing = True
        self.grower = PyThread_get_thread_ident()
        self.lookers += 1                       # the region stays mapped
        try:
            return self.make_room(need)
        except (MemoryError, OSError) as error:
            self.refuse(need, str(error), False)
            return False
        finally:
            self.growing = False
            self.lookers -= 1
            if self.ending:
                self.release()

    cdef int refuse(self, uint64_t need, str why, bint crowded) except -1:
        self.refusal = why
        self.crowded = crowded
        self.refused = need
        self.refused_at = now_ns()
        self.refused_frees = a64_load_relaxed(self.heap.frees)
        return 0

    cdef bint make_room(self, uint64_t need) except -1:
        """Give memory to holes in a run that is long enough, else add extents."""
        cdef uint64_t run = 0, more, wish
        cdef int64_t at = self.find(need, &run)
        if at >= 0:
            try:
                self.fill(<uint64_t>at, min(run, self.step(need)))
            except RegionFull:
                self.fill(<uint64_t>at, need)   # as much as that may be there
        else:
            more = need - run                   # what is free at the end counts
            if more > self.capacity - self.heap.count:
                self.refuse(need, f"the region may have {self.capacity * EXTENT} bytes (region_max), and no "
                                  f"run of {need * EXTENT} in it is free", True)
                return False
            self.fill(self.heap.count - run, run)
            wish = min(self.step(more), self.capacity - self.heap.count)
            try:
                self.extend(wish)
            except RegionFull:
                if wish == more:
                    raise
                self.extend(more)
        self.refused = 0
        return True

    cdef uint64_t step(self, uint64_t need) noexcept:
        """Extents to get at once: what is needed, or as many as there are, but at most 64 MiB beyond."""
        return max(need, min(self.backed(), need + BEYOND))

    cdef uint64_t backed(self) noexcept:
        """Extents that have memory."""
        return self.heap.count - self.holes

    cdef int64_t find(self, uint64_t need, uint64_t *found) noexcept nogil:
        """The first run that nobody owns and that is long enough, and its length; -1: none, and that of the
        last one.
        """
        cdef uint64_t i, w, run = 0
        for i in range(self.heap.count):
            w = a64_load_relaxed(&self.heap.words[i])
            if x_state(w) == X_FREE or x_state(w) == X_HOLE:
                run += 1
                continue
            if run >= need:
                found[0] = run
                return <int64_t>(i - run)
            run = 0
        found[0] = run
        return <int64_t>(self.heap.count - run) if run >= need else -1

    cdef int fill(self, uint64_t at, uint64_t run) except -1:
        """Memory for the holes among extents at .. at+run-1; then they are FREE. Raises: RegionFull.

        By whole pieces, as it was given back: a piece that is half a hole would never be free as a whole.
        """
        cdef uint64_t last = min((at + run + PIECE - 1) // PIECE * PIECE, self.heap.count)
        cdef uint64_t begin, end = at // PIECE * PIECE, i
        cdef bint grew = False
        while end < last:
            begin = end
            while end < last and x_state(a64_load_relaxed(&self.heap.words[end])) == X_HOLE:
                end += 1
            if end == begin:
                end += 1
                continue
            self.supply(self.extents_at + begin * EXTENT, self.extents_at + end * EXTENT)
            for i in range(begin, end):
                a64_store_release(&self.heap.words[i],
                                  word_of(X_FREE, 0, x_tag(a64_load_relaxed(&self.heap.words[i]))))
            self.holes -= end - begin
            grew = True
        if grew:
            self.growths += 1
            a64_fetch_add_relaxed(self.heap.frees, 1)   # who found no room looks again
        return 0

    cdef int extend(self, uint64_t more) except -1:
        """So many extents more. Raises: RegionFull."""
        cdef uint64_t i, count = self.heap.count + more
        cdef uint64_t begin = round_up(self.words_at + 8 * self.heap.count, PAGE)
        cdef uint64_t end = round_up(self.words_at + 8 * count, PAGE)
        self.supply(begin, end)
        try:
            self.supply(self.extents_at + self.heap.count * EXTENT, self.extents_at + count * EXTENT)
        except BaseException:
            if begin < end:
                self.region._discard(begin, end)
            raise
        for i in range(self.heap.count, count):
            a64_store_relaxed(&self.heap.words[i], word_of(X_FREE, 0, 0))   # a worker may have run wild there
        self.heap.count = count
        a64_store_release(&self.head.extents, count)    # X4 pairs with X3
        self.growths += 1
        a64_fetch_add_relaxed(self.heap.frees, 1)       # who found no room looks again
        return 0

    def supply(self, uint64_t begin, uint64_t end):
        """Memory for a part of the region that has none. Raises: RegionFull; it still has none then."""
        if begin >= end:
            return
        try:
            self.region._supply(begin, end)
        except BaseException:
            self.region._discard(begin, end)
            raise

    def take(self, nbytes):
        """A new block of the host; the region grows for it. Raises: RegionFull when there is no room."""
        cdef HostBlock block = None
        cdef int tries = TRIES if nbytes <= self.max_bytes else 0
        while tries > 0:
            block = HostBlock.take(self, nbytes)
            if block is not None:
                break
            if self.wait_for_other():
                continue                        # there may be room by now
            if not self.grow(nbytes):
                break
            tries -= 1
        if block is None:
            room, limit = memory_room()
            why = f"; {self.refusal}" if self.refused else ""
            raise RegionFull(
                f"no room for {nbytes} bytes: of {self.data_bytes} bytes for blocks {self.used_bytes} are in "
                f"use, the region may grow to {self.max_bytes} (region_max), {room} bytes of memory are "
                f"available (limit: {limit}){why}"
            )
        return block

    cdef bint wait_for_other(self) except -1:
        """Wait while another thread grows or trims. False: none does, or it is this one, below a handler."""
        if not self.growing or self.grower == PyThread_get_thread_ident():
            return False
        while self.growing:
            with nogil:
                usleep(NAP)
            PyErr_CheckSignals()
        return True

    # ---- giving back ---------------------------------------------------------------------------------

    def trim(self, int64_t every=LOOK):
        """Give back what nobody has used since the last look, down to what the region began with. Bytes.

        To be called now and then: it looks if the last time was so many ns ago, and if the region has grown.
        """
        cdef int64_t now = now_ns()
        cdef uint64_t before = self.holes
        if (self.growing or self.frozen or self.ending or self.private or self.base == NULL
                or self.pid != getpid() or now - self.looked < every):
            return 0
        self.looked = now
        if self.backed() <= self.least:
            self.idle = {}
            return 0
        self.growing = True
        self.grower = PyThread_get_thread_ident()
        self.lookers += 1                       # the region stays mapped
        try:
            self.drain(self.unused())
        finally:
            self.growing = False
            self.lookers -= 1
            if self.ending:
                self.release()
        return (self.holes - before) * EXTENT

    def unused(self):
        """Runs of whole pieces that were free at the last look, too, and not taken since, longest first.

        A tag is raised whenever its extent is taken, so the sum tells.
        """
        cdef uint64_t i, at, w, total, first = 0, length = 0
        cdef dict idle = {}
        cdef list runs = []
        for at in range(0, self.heap.count - self.heap.count % PIECE, PIECE):
            total = 0
            for i in range(at, at + PIECE):
                w = a64_load_acquire(&self.heap.words[i])
                if x_state(w) != X_FREE:
                    break
                total += x_tag(w)
            else:
                idle[at] = total
        for key, tags in idle.items():          # in ascending order
            if self.idle.get(key) != tags:
                continue
            if length and key != first + length:
                runs.append((length, first))
                length = 0
            if length == 0:
                first = key
            length += PIECE
        if length:
            runs.append((length, first))
        self.idle = idle
        runs.sort(reverse=True)
        return runs

    cdef int drain(self, list runs) except -1:
        """Give the memory of runs back, as long as more is left than the region began with."""
        cdef uint64_t at, end, bite
        for length, first in runs:
            at = first
            end = at + min(<uint64_t>length, (self.backed() - self.least) // PIECE * PIECE)
            while at < end and not self.frozen:
                bite = min(end - at, BITE)
                if not self.punch(at, bite):
                    break
                at += bite
        return 0

    cdef bint punch(self, uint64_t at, uint64_t run) except -1:
        """Give the memory of a free run back. False: it is not free any more, or this cannot be done."""
        cdef uint64_t i, tag = 0
        cdef uint64_t begin = self.extents_at + at * EXTENT
        cdef heap_t here = self.heap            # its search ends where the run does
        cdef int64_t found
        here.hint = at
        here.count = at + run
        found = heap_take(&here, run * EXTENT, NO_SLOT, &tag)
        if found != <int64_t>at:
            if found >= 0:
                heap_free(&here, <uint64_t>found, tag, X_HOST, NO_SLOT)
            return False
        if not self.region._discard(begin, begin + run * EXTENT):
            heap_free(&self.heap, at, tag, X_HOST, NO_SLOT)
            return False
        i = at + run
        while i > at:                           # the head last, as it is freed
            i -= 1
            a64_store_release(&self.heap.words[i],
                              word_of(X_HOLE, 0, x_tag(a64_load_relaxed(&self.heap.words[i]))))
        self.holes += run
        self.refused = 0                        # there is memory again
        return True
