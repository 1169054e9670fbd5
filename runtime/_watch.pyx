# cython: language_level=3
"""Watching a map: which keys have changed since one last looked.

A cell's version only grows, so the sum of a bucket's versions grows with each change: a watch keeps one sum
a bucket, and reads only the buckets whose sum is another. It knows the versions of keys that it has shown.
A key that is gone has left a tombstone ("Tombstones" in _maplayout.pxd), also one that was never shown:

    open    looked = now; watching: odd              from here on deletions leave tombstones
    look    began = now; fence; read what has changed; looked = the earliest `began` of this process's watches
    met     tombstones that were seen; ripe: those that had all been met at `since`
    empty   every row has looked = 0, or since `since`: nobody needs what is ripe

Nobody is written to but those who sleep:

    watcher: s = sequence; watchers = 1; fence; look at all buckets; nothing: sleep while sequence == s
    writer:  cell CAS; changes of its group += 1; watchers? sequence += 1; wake     (map_tell)

While the sequence is that s nobody has told of anything, so one need not look again; and when it is not, a
glance at the groups whose counter is another shows what they have told of. Who was killed before he told
is left out: a sweep tells for him, and without one a look at everything every half second. Only that counts
as `looked`.
"""
cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from runtime._atomics cimport (
    a32_load_acquire, a32_store_relaxed, a64_load_acquire, a64_load_relaxed, a64_t, fence_acquire,
    fence_seq_cst, futex_wait, now_ns,
)
from runtime._identity cimport identity_word
from runtime._map cimport map_cell, map_empty
from runtime._maplayout cimport (
    BURIED, GROUP, K_VALUE, block_at, cell_block, groups_of, map_block, map_bucket, map_key, map_t,
)
from runtime._mapaccess cimport key_of
from runtime._mapsweep cimport SWEEP_DEAD, tidy_bucket
from runtime._mapwatch cimport watch_begin, watch_least, watch_since
from runtime._state cimport StateMap

from runtime.errors import RegionFull


cdef enum:
    SLICE_NS = 50000000         # ns, the longest sleep
    AGAIN_NS = 500000000        # ns after which one looks though nobody has told of anything

cdef a64_t *own = identity_word()


cdef class Watchers:
    """The watches that are open by one StateMap, and the tombstones that they have met.

    Thread-safety: under the GIL; nothing here lets go of it.
    """
    cdef uint64_t identity      # of their process: in a fork none is open, until it looks
    cdef uint64_t row           # while `looks` is not empty: theirs alone
    cdef dict looks             # a watch's number -> ns at which its last look began
    cdef dict met               # a tombstone's word -> {bucket, its cell}
    cdef dict ripe
    cdef uint64_t since

    def __cinit__(self):
        self.looks, self.met, self.ripe = {}, {}, {}

    cdef int of(self, uint64_t identity) except -1:
        if self.identity != identity:
            self.looks, self.met, self.ripe = {}, {}, {}
            self.identity = identity
        return 0

    cdef int looked(self, map_t *m, uintptr_t watch, uint64_t began) except -1:
        """That watch has looked at everything; it has begun then."""
        self.of(a64_load_relaxed(&m.identity))
        if self.looks:
            self.looks[watch] = began
            watch_since(m, self.row, min(list(self.looks.values())))
        else:
            self.row = watch_begin(m, began)
            if self.row == m.row_count:
                raise RegionFull(f"the {self.row} rows of the map are taken, and a watch needs one")
            self.looks[watch] = began
        if not self.ripe and self.met:
            self.ripe, self.met = self.met, self.ripe
            self.since = now_ns()
        if self.ripe and watch_least(m) >= self.since:
            self.empty(m)
        return 0

    cdef int empty(self, map_t *m) except -1:
        cdef map_bucket *bucket
        cdef a64_t *cell
        cdef uint64_t place
        ripe, self.ripe = self.ripe, {}
        for word, where in ripe.items():
            place = where
            bucket = &m.buckets[place >> 10]
            cell = map_cell(m, bucket, place & 1023)
            if cell != NULL:
                map_empty(m, bucket, cell, word)
        return 0

    cdef int meet(self, map_t *m, uint64_t i) except -1:
        """The tombstones of a bucket."""
        cdef map_bucket *bucket = &m.buckets[i]
        cdef map_block *block
        cdef uint64_t at = 0, w
        cdef bint tomb
        cdef a64_t *cell = map_cell(m, bucket, 0)
        while cell != NULL:
            w = a64_load_acquire(cell)
            if cell_block(w) and cell_block(w) <= m.count:
                block = block_at(m, cell_block(w) - 1)
                tomb = block.kind == K_VALUE and block.expires == BURIED
                fence_acquire()
                if tomb and a64_load_relaxed(cell) == w and w not in self.ripe:
                    self.met[w] = i << 10 | at
            at += 1
            cell = map_cell(m, bucket, at)
        return 0

    cdef int close(self, map_t *m, uintptr_t watch) except -1:
        if self.looks.pop(watch, None) is not None:
            watch_since(m, self.row, min(list(self.looks.values()), default=0))
        return 0


@cython.no_gc                   # it is needed whole when it ends, and is in no cycle
cdef class StateWatch:
    """What has changed since it was made: see SharedState.watch. Thread-safety: one thread looks."""
    cdef StateMap state
    cdef object prefix
    cdef dict known             # bucket -> {key: version; negative: that of its end}
    cdef dict ends              # bucket -> ns at which the first of its known keys is over
    cdef uint64_t soonest       # of `ends`
    cdef list found             # what was seen, and is to be shown: also when there was no memory to go on
    cdef uint64_t *sums         # of buckets; and behind them of groups, the counter of changes seen last
    cdef uint64_t *changes
    cdef bint closed
    cdef bint heard             # `watchers` was set before the last look, and `sequence` read before that
    cdef uint32_t sequence
    cdef uint64_t again         # ns at which it is time for another one in any case

    def __cinit__(self, StateMap state not None, prefix):
        cdef map_key start
        cdef Watchers fresh = Watchers.__new__(Watchers)
        key_of(prefix, K_VALUE, &start)
        state.ready()
        if state.watchers is None:
            state.watchers = fresh
        self.state = state
        self.prefix = prefix
        self.known = {}
        self.ends = {}
        self.found = []
        self.soonest = ~<uint64_t>0
        self.sums = <uint64_t *>calloc(state.m.mask + 1 + groups_of(state.m.mask + 1), sizeof(uint64_t))
        if self.sums == NULL:
            raise MemoryError("no memory for a watch")
        self.changes = self.sums + state.m.mask + 1
        self.watchers().looked(&state.m, <uintptr_t><void *>self, <uint64_t>now_ns())
        self.look()

    def __dealloc__(self):
        if self.state is not None:
            self.close()
        free(self.sums)

    cdef Watchers watchers(self):
        return <Watchers>self.state.watchers

    def close(self):
        """It looks no more: nothing is kept for it. From any thread."""
        self.closed = True
        if self.state.region.base != NULL and self.watchers().identity == a64_load_relaxed(own):
            self.watchers().close(&self.state.m, <uintptr_t><void *>self)

    cdef uint64_t sum_of(self, uint64_t i) noexcept nogil:
        """Sequentially consistent enough: a fence stands between the flags and these loads."""
        cdef uint64_t at = 0, total = 0
        cdef a64_t *cell = map_cell(&self.state.m, &self.state.m.buckets[i], 0)
        while cell != NULL:
            total += a64_load_acquire(cell) >> 24
            at += 1
            cell = map_cell(&self.state.m, &self.state.m.buckets[i], at)
        return total

    def look(self):
        """[(key, version, value or None)] of what has changed since the last look."""
        cdef uint64_t began = <uint64_t>now_ns()
        self.begin(began)
        self.scan(0, self.state.m.mask + 1)
        if not self.closed:
            self.watchers().looked(&self.state.m, <uintptr_t><void *>self, began)
        return self.seen()

    cdef list glance(self):
        """The same of what others have told of."""
        cdef uint64_t i, count, buckets = self.state.m.mask + 1
        self.begin(<uint64_t>now_ns())
        for i in range(groups_of(buckets)):
            count = a64_load_acquire(&self.state.m.changes[i])      # before its buckets are read
            if count != self.changes[i]:
                self.scan(i * GROUP, min((i + 1) * GROUP, buckets))
                self.changes[i] = count
        return self.seen()

    cdef list seen(self):
        found, self.found = self.found, []
        return found

    cdef int begin(self, uint64_t now) except -1:
        """Of a look or a glance. What is over, and nobody has changed it."""
        self.state.ready()
        fence_seq_cst()                         # after the clock was read, and `watchers` set
        if self.soonest <= now:
            for bucket, end in list(self.ends.items()):
                if end <= now:
                    self.compare(bucket)
            self.soonest = min(list(self.ends.values()), default=~<uint64_t>0)
        return 0

    cdef int scan(self, uint64_t i, uint64_t end) except -1:
        """Buckets from i on; the region is open at the end."""
        cdef uint64_t total = 0
        while True:
            self.state.check()
            self.state.region.enter()
            with nogil:
                i = self.changed(i, end, &total)
            self.state.region.leave()
            if i == end:
                return self.state.check()
            self.compare(i)
            self.sums[i] = total
            i += 1

    cdef uint64_t changed(self, uint64_t i, uint64_t end, uint64_t *total) noexcept nogil:
        """The first bucket from i on whose sum is another; `end`: there is none."""
        while i < end:
            total[0] = self.sum_of(i)           # before the cells are read: a later change is another sum
            if total[0] != self.sums[i]:
                break
            i += 1
        return i

    cdef int compare(self, uint64_t i) except -1:
        """The keys of a bucket as they are, and as they were."""
        cdef map_key start
        cdef dict before = self.known.get(i, {})
        cdef dict now = {}
        cdef list found = []
        cdef uint64_t end = ~<uint64_t>0
        self.state.check()
        key_of(self.prefix, K_VALUE, &start)
        # What is over gets a tombstone, so its end has a version of its own.
        tidy_bucket(&self.state.m, &self.state.m.buckets[i], now_ns(), SWEEP_DEAD)
        for key, version, value, expires in self.state.bucket_items(i, &start):
            if value is None and expires != BURIED:
                end = 0                         # since a moment: the next look sees how it ends
                if key in before:
                    now[key] = before[key]
                continue
            if expires > BURIED:
                end = min(end, <uint64_t>expires)
            now[key] = -version if value is None else version
            if before.get(key) != now[key]:
                found.append((key, version, value))
        newest = a64_load_relaxed(&self.state.m.buckets[i].counter)
        for key, version in before.items():     # without a tombstone, for which there was no room
            if key not in now and version > 0:
                found.append((key, newest, None))
        self.watchers().meet(&self.state.m, i)
        self.ends.pop(i, None)
        if end != ~<uint64_t>0:
            self.ends[i] = end
            self.soonest = min(self.soonest, end)
        if now:
            self.known[i] = now
        else:
            self.known.pop(i, None)
        self.found += found
        return 0

    def wait(self, double seconds):
        """As look(), after at most so many seconds (and at most 50 ms) of waiting for a change."""
        cdef map_t *m = &self.state.m
        cdef int64_t patience = SLICE_NS if seconds > 0.05 else <int64_t>(seconds * 1e9)
        cdef list found = self.news()
        if found or patience <= 0:
            return found
        self.state.check()
        self.state.region.enter()
        with nogil:
            futex_wait(&m.head.sequence, self.sequence, patience)
        self.state.region.leave()
        return self.news()

    cdef list news(self):
        """What there is to see; from then on `watchers` is set, so that who comes later tells."""
        cdef map_t *m = &self.state.m
        cdef uint64_t now = <uint64_t>now_ns()
        cdef uint32_t s
        cdef bint counted = self.watchers().identity == a64_load_relaxed(own)      # a fork of it is not yet
        self.state.check()
        s = a32_load_acquire(&m.head.sequence)
        if self.heard and counted and s == self.sequence and now < min(self.again, self.soonest):
            return []
        a32_store_relaxed(&m.head.watchers, 1)
        if self.heard and counted and now < self.again:
            self.heard = False
            found = self.glance()
        else:
            self.heard = False
            found = self.look()
            self.again = now + AGAIN_NS
        self.heard, self.sequence = True, s
        return found
