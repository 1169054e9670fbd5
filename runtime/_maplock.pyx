# cython: language_level=3
"""Locks by name. The word and its moves stand in the .pxd."""
from libc.limits cimport INT_MAX
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport (
    a32_t, a64_cas_seq_cst, a64_load_acquire, a64_load_relaxed, a64_load_seq_cst, a64_store_release, a64_t,
    futex_wait, futex_wake, now_ns,
)
from runtime._identity cimport is_dead
from runtime._map cimport map_empty, map_ensure, map_unpin
from runtime._maplayout cimport (
    MAP_AGAIN, MAP_OK, block_at, block_value, map_key, map_place, map_row, map_status, map_t,
)
from runtime._units cimport unit_pin


cdef uint64_t TAG = 0xFFFFFFE0


cdef inline uint64_t taken(map_t *m, uint64_t w, uint64_t flags) noexcept nogil:
    """The word of our holding after `w`."""
    return (w + 32) & TAG | a64_load_relaxed(&m.row) << 32 | L_HELD | flags


cdef map_status lock_take(map_t *m, map_key *k, int64_t since, int64_t patience,
                          lock_hold *hold) noexcept nogil:
    cdef map_place place
    cdef map_status status
    cdef a64_t *pin
    cdef a64_t *word
    while True:
        status = map_ensure(m, k, 8, &place)
        if status != MAP_OK:
            return status
        pin = unit_pin(m, place.block)
        if pin == NULL:                 # all are in use, by threads of ours: sleep on nothing, and come again
            nap(patience)
            return MAP_AGAIN
        if a64_load_seq_cst(place.cell) != place.word:
            map_unpin(m, pin)
            continue
        word = <a64_t *>block_value(block_at(m, place.block))
        if a64_load_acquire(word) & L_DEAD:
            map_empty(m, &m.buckets[k.hash & m.mask], place.cell, place.word)
            map_unpin(m, pin)
            continue
        if try_or_sleep(m, word, since, patience, hold):
            a64_store_release(pin, 0)   # ours: nobody reclaims it
            return MAP_OK
        map_unpin(m, pin)
        if a64_load_relaxed(word) & L_DEAD and patience == 0:
            continue
        return MAP_AGAIN


cdef void nap(int64_t patience) noexcept nogil:
    cdef a32_t nothing
    if patience:
        futex_wait(&nothing, (<uint32_t *>&nothing)[0], 1000000)


cdef bint try_or_sleep(map_t *m, a64_t *word, int64_t since, int64_t patience,
                       lock_hold *hold) noexcept nogil:
    """True: it is ours. Else we have said that we wait (but at the first try), and slept for a slice if there
    is patience."""
    cdef uint64_t w, wanted
    cdef int64_t waited = 0, slice
    cdef bint slept = False
    while True:
        w = a64_load_acquire(word)
        if w & L_DEAD:
            return False
        if since > 0:
            waited = now_ns() - since
        if not w & L_HELD and (not w & L_HANDOFF or waited >= FAIR_NS or since < 0):
            if a64_cas_seq_cst(word, w, taken(m, w, L_WAITED if since > 0 else 0)):
                hold.word = word
                hold.held = taken(m, w, 0)
                hold.inherited = w & L_INHERITED != 0
                return True
            continue
        if since <= 0 or slept:
            return inherit(m, word, w, hold)
        if w & L_HELD:
            wanted = w | L_WAITED
            if waited >= FAIR_NS:
                wanted |= L_HANDOFF
            if wanted != w:
                if not a64_cas_seq_cst(word, w, wanted):
                    continue
                w = wanted
        slice = LOCK_SLICE_NS if waited >= FAIR_NS else FAIR_NS - waited
        if patience:
            futex_wait(<a32_t *>word, <uint32_t>w, patience if patience < slice else slice)
        slept = True


cdef bint inherit(map_t *m, a64_t *word, uint64_t w, lock_hold *hold) noexcept nogil:
    """Take it from a dead holder."""
    cdef uint64_t row = w >> 32, owner
    if not w & L_HELD or row >= m.row_count:
        return False
    owner = a64_load_acquire(&m.rows[row].owner)
    # As in the sweep: the word was read before we see that the row still names the dead one, so it is his.
    if owner == 0 or not is_dead(owner) or a64_load_acquire(&m.rows[row].owner) != owner:
        return False
    if not a64_cas_seq_cst(word, w, taken(m, w, w & (L_WAITED | L_HANDOFF))):
        return False
    hold.word = word
    hold.held = taken(m, w, 0)
    hold.inherited = True
    return True


cdef bint lock_give(lock_hold *hold) noexcept nogil:
    cdef uint64_t w
    while True:
        w = a64_load_acquire(hold.word)
        if w & ~<uint64_t>(L_WAITED | L_HANDOFF) != hold.held:
            return False
        if a64_cas_seq_cst(hold.word, w, w & TAG | (w & L_HANDOFF if w & L_WAITED else 0)):
            break
    # From here on the block may be another's: waking somebody for nothing does no harm.
    if w & L_WAITED:
        futex_wake(<a32_t *>hold.word, INT_MAX if w & L_HANDOFF else 1)
    return True


cdef void lock_pass_on(a64_t *word, uint64_t row, map_row *rows, uint64_t dead) noexcept nogil:
    cdef uint64_t w = a64_load_acquire(word)
    while w & L_HELD and w >> 32 == row and a64_load_acquire(&rows[row].owner) == dead:
        if a64_cas_seq_cst(word, w, w & TAG | w & L_HANDOFF | L_INHERITED):
            futex_wake(<a32_t *>word, INT_MAX)
            return
        w = a64_load_acquire(word)


cdef bint lock_retire(a64_t *word) noexcept nogil:
    cdef uint64_t w = a64_load_acquire(word)
    return w & ~TAG == 0 and a64_cas_seq_cst(word, w, w | L_DEAD)
