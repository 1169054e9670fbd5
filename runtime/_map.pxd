# cython: language_level=3
"""The operations of a map, for nogil code; the caller keeps the region open. Format: _maplayout.pxd."""
from libc.stdint cimport int64_t, uint64_t

from runtime._atomics cimport a64_load_acquire, a64_t
from runtime._maplayout cimport (
    CELLS, cell_block, look_at_cell, map_bucket, map_key, map_place, map_status, map_t,
)


# Finish the bucket's pending insertion `p`.
cdef void map_help(map_t *m, map_bucket *bucket, uint64_t p) noexcept nogil
# Does a cell, a chain or a pending insertion name the block? Its bytes are read as they are.
cdef bint map_names(map_t *m, uint64_t b) noexcept nogil
# Set: `expected` NULL; else only if the value is that (value_bytes of it), or, `absent`, if there is none.
cdef map_status map_put(map_t *m, map_key *k, const char *value, uint64_t n, int64_t expires,
                        bint conditional, const char *expected, uint64_t expected_bytes) noexcept nogil
# The sum goes to `result`.
cdef map_status map_add(map_t *m, map_key *k, int64_t n, int64_t *result) noexcept nogil
cdef map_status map_erase(map_t *m, map_key *k) noexcept nogil
# A block without a value of its own for that key, if it has none: for locks. MAP_OK: the key is at `place`.
cdef map_status map_ensure(map_t *m, map_key *k, uint64_t n, map_place *place) noexcept nogil
# Empty this cell of the bucket if it still is `word`; the block is freed.
cdef bint map_empty(map_t *m, map_bucket *bucket, a64_t *cell, uint64_t word) noexcept nogil
# An item that this cell names as `word` goes: a tombstone is left if somebody watches. False: it is another.
cdef bint map_remove(map_t *m, map_bucket *bucket, a64_t *cell, uint64_t word) noexcept nogil
# How many items are there, without those that are over at `now`.
cdef uint64_t map_count(map_t *m, int64_t now) noexcept nogil
# The n-th cell of a bucket; NULL: there are fewer.
cdef a64_t *map_cell(map_t *m, map_bucket *bucket, uint64_t at) noexcept nogil
# Take a pin back, and free the block if it was kept by that alone.
cdef void map_unpin(map_t *m, a64_t *pin) noexcept nogil
# Free a block that was unnamed, if it is PUBLISHED with the tag of `word` and nobody has pinned it.
cdef void map_release(map_t *m, uint64_t b, uint64_t word) noexcept nogil
# The block of `b`, TAKEN(me): PUBLISHED if something names it, else free.
cdef void map_settle(map_t *m, uint64_t b) noexcept nogil
# map_find where a bucket's five cells do not answer: the chain, and an insertion under way.
cdef bint map_find_on(map_t *m, map_bucket *bucket, map_key *k, map_place *place) noexcept nogil


cdef inline bint map_find(map_t *m, map_key *k, map_place *place) noexcept nogil:
    """Where the key is; or False, and then it was absent at some moment of the call.

    The key has one cell at a time. If it had cell c at the start and we find something else there, it was
    erased since; if it had none at the start, it was absent then.
    """
    cdef map_bucket *bucket = &m.buckets[k.hash & m.mask]
    cdef uint64_t at
    place.vacant = NULL
    for at in range(<uint64_t>CELLS):
        if look_at_cell(m, &bucket.cells[at], at, k, place):
            return True
    if a64_load_acquire(&bucket.next) == 0 and cell_block(a64_load_acquire(&bucket.pending)) == 0:
        return False
    return map_find_on(m, bucket, k, place)
