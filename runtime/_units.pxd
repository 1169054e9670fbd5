# cython: language_level=3
"""Rows, units and pins of a map, for nogil code; the caller keeps the region open. Format: _maplayout.pxd."""
from libc.stdint cimport uint32_t, uint64_t

from runtime._atomics cimport (
    a32_load_relaxed, a32_store_relaxed, a64_cas_acq_rel, a64_load_relaxed, a64_t, fence_release,
)
from runtime._maplayout cimport (
    RECENT, U_FREE, U_TAKEN, map_status, map_t, unit_raised, unit_state, unit_word,
)


cdef enum:
    NOWHERE = 0x7FFFFFFF

# A row for this process, if it has none: `identity` != identity_word(). MAP_OK or MAP_NO_ROW.
cdef map_status unit_enroll(map_t *m) noexcept nogil
# A row that was nobody's, for this process; row_count: there is none.
cdef uint64_t unit_row(map_t *m, uint64_t me) noexcept nogil
# A run of n units, TAKEN by this process, or NOWHERE.
cdef uint64_t unit_search(map_t *m, uint64_t n) noexcept nogil
# Free a run that is TAKEN by this process.
cdef void unit_free(map_t *m, uint64_t b) noexcept nogil
# Free a run that is PUBLISHED or LOCK with this very word; False: it is not.
cdef bint unit_free_published(map_t *m, uint64_t b, uint64_t word) noexcept nogil
# The block number + nonce that a row holds while its process wants b to stay.
cdef uint64_t pin_word(uint64_t identity, uint64_t b) noexcept nogil
# A pin for b in a row of ours: where; NULL: all are in use. A full fence.
cdef a64_t *unit_pin(map_t *m, uint64_t b) noexcept nogil
cdef bint unit_pinned(map_t *m, uint64_t b) noexcept nogil


cdef inline uint64_t unit_take(map_t *m, uint64_t n) noexcept nogil:
    """A run of n units, TAKEN by this process, or NOWHERE. What is in there may be read by others still."""
    cdef uint32_t depth = a32_load_relaxed(&m.depth)
    cdef uint32_t i
    cdef uint64_t w
    if n == 1 and depth != 0:
        i = a32_load_relaxed(&m.recent[depth - 1])
        a32_store_relaxed(&m.depth, depth - 1)
        w = a64_load_relaxed(&m.words[i])
        if unit_state(w) == U_FREE:
            if a64_cas_acq_rel(&m.words[i], w, unit_word(U_TAKEN, a64_load_relaxed(&m.row), unit_raised(w))):
                fence_release()         # pairs with `still`: who reads what we write sees the entry changed
                return i
    return unit_search(m, n)
