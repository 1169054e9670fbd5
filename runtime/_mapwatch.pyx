# cython: language_level=3
"""Who watches a map: the words by which writers know. Their moves stand in _maplayout.pxd, "Tombstones"."""
from libc.limits cimport INT_MAX
from libc.stdint cimport uint64_t

from runtime._atomics cimport (
    a32_fetch_add_seq_cst, a32_load_acquire, a32_load_seq_cst, a32_store_relaxed,
    a64_cas_seq_cst, a64_fetch_add_seq_cst, a64_load_relaxed, a64_load_seq_cst, a64_store_seq_cst, futex_wake,
)
from runtime._maplayout cimport GROUP, groups_of, map_bucket, map_t
from runtime._units cimport unit_row


cdef void map_tell(map_t *m, map_bucket *bucket) noexcept nogil:
    if map_watched(m):
        a64_fetch_add_seq_cst(&m.changes[(bucket - m.buckets) // GROUP], 1)
    wake(m)


cdef void map_tell_all(map_t *m) noexcept nogil:
    cdef uint64_t i
    if map_watched(m):
        for i in range(groups_of(m.mask + 1)):
            a64_fetch_add_seq_cst(&m.changes[i], 1)
    wake(m)


cdef inline void wake(map_t *m) noexcept nogil:
    if a32_load_seq_cst(&m.head.watchers) == 0:
        return
    a32_fetch_add_seq_cst(&m.head.sequence, 1)
    if futex_wake(&m.head.sequence, INT_MAX) > 0:
        return
    # As pool_wake: who set the flag before this line is woken, or does not fall asleep.
    a32_store_relaxed(&m.head.watchers, 0)
    a32_fetch_add_seq_cst(&m.head.sequence, 1)
    futex_wake(&m.head.sequence, INT_MAX)


cdef uint64_t watch_begin(map_t *m, uint64_t ns) noexcept nogil:
    cdef uint64_t me = a64_load_relaxed(&m.identity), row, w
    for row in range(m.row_count):
        if a64_load_relaxed(&m.rows[row].owner) == me and a64_cas_seq_cst(&m.looked[row], 0, ns):
            break
    else:
        row = unit_row(m, me)
        if row == m.row_count:
            return row
        a64_store_seq_cst(&m.looked[row], ns)
    while True:
        w = a64_load_seq_cst(&m.head.watching)
        if a64_cas_seq_cst(&m.head.watching, w, (w + 1) | 1):
            return row


cdef void watch_since(map_t *m, uint64_t row, uint64_t ns) noexcept nogil:
    a64_store_seq_cst(&m.looked[row], ns)
    if ns == 0:
        watch_ended(m)


cdef void watch_ended(map_t *m) noexcept nogil:
    cdef uint64_t w = a64_load_seq_cst(&m.head.watching)
    if w & 1 and watch_least(m) == ~<uint64_t>0:
        a64_cas_seq_cst(&m.head.watching, w, w + 1)


cdef void watch_dead(map_t *m, uint64_t row, uint64_t name) noexcept nogil:
    # Read first: of the row's next process it would be another ns.
    cdef uint64_t ns = a64_load_seq_cst(&m.looked[row])
    if ns != 0 and a64_load_seq_cst(&m.rows[row].owner) == name:
        a64_cas_seq_cst(&m.looked[row], ns, 0)


cdef uint64_t watch_least(map_t *m) noexcept nogil:
    cdef uint64_t least = ~<uint64_t>0, row, ns, high = a32_load_acquire(&m.head.high)
    for row in range(min(high, m.row_count)):
        ns = a64_load_seq_cst(&m.looked[row])
        if ns != 0 and ns < least:
            least = ns
    return least
