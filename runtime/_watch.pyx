# cython: language_level=3
"""Watching a map: which keys have changed since one last looked.

A cell's version only grows, so the sum of a bucket's versions grows with each change: a watch keeps one sum
a bucket, and reads only the buckets whose sum is another. It knows the versions of keys that it has shown,
so it sees deletions and items whose time is over. Nothing is written but the flag that somebody sleeps:

    watcher: s = sequence; watchers = 1; fence; look at all buckets; nothing: sleep while sequence == s
    writer:  cell CAS; watchers? sequence += 1; wake        (map_tell)

A writer killed before he wakes costs a sleeper the rest of its 50 ms.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from runtime._atomics cimport (
    a32_load_acquire, a32_store_relaxed, a64_load_acquire, a64_load_relaxed, a64_t, fence_seq_cst, futex_wait,
    now_ns,
)
from runtime._map cimport map_cell
from runtime._maplayout cimport K_VALUE, map_bucket, map_key, map_t
from runtime._mapaccess cimport key_of
from runtime._mapsweep cimport tidy_bucket
from runtime._state cimport StateMap


cdef enum:
    SLICE_NS = 50000000         # ns, the longest sleep


cdef class StateWatch:
    """What has changed since it was made: see SharedState.watch. Thread-safety: one thread at a time."""
    cdef StateMap state
    cdef object prefix
    cdef dict known             # bucket -> {key: version}
    cdef uint64_t *sums

    def __cinit__(self, StateMap state not None, prefix):
        cdef map_key start
        key_of(prefix, K_VALUE, &start)
        state.check()
        self.state = state
        self.prefix = prefix
        self.known = {}
        self.sums = <uint64_t *>calloc(state.m.mask + 1, sizeof(uint64_t))
        if self.sums == NULL:
            raise MemoryError("no memory for a watch")
        self.look()

    def __dealloc__(self):
        free(self.sums)

    cdef uint64_t sum_of(self, uint64_t i) noexcept nogil:
        """Sequentially consistent enough: the fence stands between the flag and these loads."""
        cdef uint64_t at = 0, total = 0
        cdef a64_t *cell = map_cell(&self.state.m, &self.state.m.buckets[i], 0)
        while cell != NULL:
            total += a64_load_acquire(cell) >> 24
            at += 1
            cell = map_cell(&self.state.m, &self.state.m.buckets[i], at)
        return total

    def look(self):
        """[(key, version, value or None)] of what has changed since the last look."""
        cdef uint64_t i = 0, buckets = self.state.m.mask + 1
        cdef map_bucket *bucket
        cdef map_key start
        cdef list found = []
        key_of(self.prefix, K_VALUE, &start)
        for known in list(self.known):          # the time of a key may be over, and nobody has changed it
            if self.over(known):
                self.state.ready()
                bucket = &self.state.m.buckets[<uint64_t>known]
                tidy_bucket(&self.state.m, bucket, now_ns(), False)     # so its end has a version of its own
                self.compare(known, &start, found)
        while True:
            self.state.check()
            self.state.region.enter()
            with nogil:
                i = self.changed(i, buckets)
            self.state.region.leave()
            if i == buckets:
                return found
            self.compare(i, &start, found)
            i += 1

    cdef uint64_t changed(self, uint64_t i, uint64_t end) noexcept nogil:
        """The first bucket from i on whose sum is another, which is noted; `end`: there is none."""
        cdef uint64_t total
        while i < end:
            total = self.sum_of(i)
            if total != self.sums[i]:
                self.sums[i] = total            # before the cells are read: a later change is another sum
                break
            i += 1
        return i

    cdef bint over(self, uint64_t i) except -1:
        for key in self.known[i]:
            if key not in self.state:
                return True
        return False

    cdef int compare(self, uint64_t i, map_key *start, list found) except -1:
        """The keys of a bucket as they are, and as they were."""
        cdef dict before = self.known.pop(i, {})
        cdef dict now = {}
        cdef uint64_t newest
        for key, version, value in self.state.bucket_items(i, start, True):
            now[key] = version
            if before.get(key) != version:
                found.append((key, version, value))
        newest = a64_load_relaxed(&self.state.m.buckets[i].counter)
        for key in before:
            if key not in now:
                found.append((key, newest, None))
        if now:
            self.known[i] = now
        return 0

    def wait(self, double seconds):
        """As look(), after at most so many seconds (and at most 50 ms) of waiting for a change."""
        cdef map_t *m = &self.state.m
        cdef uint32_t s
        cdef int64_t patience = SLICE_NS if seconds > 0.05 else <int64_t>(seconds * 1e9)
        self.state.check()
        s = a32_load_acquire(&m.head.sequence)
        a32_store_relaxed(&m.head.watchers, 1)
        fence_seq_cst()
        found = self.look()
        if found or patience <= 0:
            return found
        self.state.region.enter()
        with nogil:
            futex_wait(&m.head.sequence, s, patience)
        self.state.region.leave()
        return self.look()
