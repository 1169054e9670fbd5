# cython: language_level=3
"""Blocks: runs of extents in the region. The protocol of the words stands in _layout.pxd.

Why a kill leaves nothing behind: a taker marks the head CLAIM(slot) first and then its tails in
ascending order; a releaser marks the head FREEING(slot) first, frees the tails in descending order and
the head last. So at every instruction the tails of a head are the X_TAIL words right behind it that name
it, a prefix of the run, and the head names the process to ask. The sweep of a dead slot walks the words
and frees each run whose head names that slot; it may be killed and begun again.

Tails carry no owner: only who holds the head in CLAIM or FREEING touches them, so plain stores do there.
"""
from libc.stdint cimport int64_t, uint64_t

from runtime._atomics cimport *
from runtime._layout cimport *


# ---- taking ------------------------------------------------------------------------------------------

cdef void drop_tails(heap_t *heap, uint64_t at, uint64_t run) noexcept nogil:
    """Free the tails of a run whose head we hold, last one first."""
    cdef uint64_t i = at + run - 1
    while i > at:
        # X1 pairs with X2 in try_run: who takes this extent sees all that its owner did to it before.
        a64_store_release(&heap.words[i], word_of(X_FREE, 0, a64_load_relaxed(&heap.words[i]) >> 31))
        i -= 1


cdef int64_t try_run(heap_t *heap, uint64_t at, uint64_t run, uint64_t owner, uint64_t *tag) noexcept nogil:
    """Take extents at .. at+run-1. -1: taken; else the index of the extent that was not free."""
    cdef uint64_t w = a64_load_relaxed(&heap.words[at])
    cdef uint64_t i, t, final_state
    if x_state(w) != X_FREE:
        return <int64_t>at
    t = x_tag(w) + 1
    if not a64_cas_acq_rel(&heap.words[at], w, word_of(X_CLAIM, owner, t)):     # X2
        return <int64_t>at
    i = at + 1
    while i < at + run:
        w = a64_load_relaxed(&heap.words[i])
        if x_state(w) != X_FREE or not a64_cas_acq_rel(&heap.words[i], w, word_of(X_TAIL, at, x_tag(w) + 1)):
            drop_tails(heap, at, i - at)
            a64_store_release(&heap.words[at], word_of(X_FREE, 0, t))
            return <int64_t>i
        i += 1
    final_state = X_HOST if owner == NO_SLOT else X_PRIVATE
    a64_store_release(&heap.words[at], word_of(final_state, owner, t))
    tag[0] = t & 0x1FFFFFFFFULL
    return -1


cdef int64_t heap_take(heap_t *heap, uint64_t nbytes, uint64_t owner, uint64_t *tag) noexcept nogil:
    """First fit from the hint, then from the start. The head's index, or -1: no room now."""
    cdef uint64_t run = (nbytes + EXTENT - 1) // EXTENT
    cdef uint64_t at, free, lap
    cdef int64_t clash
    if run == 0:
        run = 1
    if run > heap.count:
        return -1
    for lap in range(2):
        at = heap.hint if lap == 0 else 0
        while at + run <= heap.count:
            # Look before taking: a CAS on an extent of somebody else's cache line is not free.
            free = 0
            while free < run and x_state(a64_load_relaxed(&heap.words[at + free])) == X_FREE:
                free += 1
            if free < run:
                at += free + 1
                continue
            clash = try_run(heap, at, run, owner, tag)
            if clash < 0:
                heap.hint = at + run if at + run < heap.count else 0
                return <int64_t>at
            at = <uint64_t>clash + 1
        if heap.hint == 0:
            break
    return -1


# ---- freeing and handing over ------------------------------------------------------------------------

cdef uint64_t heap_run(heap_t *heap, uint64_t at) noexcept nogil:
    """How many extents belong to the head at `at`: itself and the tails behind it that name it."""
    cdef uint64_t i = at + 1
    cdef uint64_t w
    while i < heap.count:
        w = a64_load_relaxed(&heap.words[i])
        if x_state(w) != X_TAIL or x_field(w) != at:
            break
        i += 1
    return i - at


cdef void finish_free(heap_t *heap, uint64_t at) noexcept nogil:
    """The head is ours, in FREEING or CLAIM: free its tails, then the head."""
    cdef uint64_t tag = x_tag(a64_load_relaxed(&heap.words[at]))
    drop_tails(heap, at, heap_run(heap, at))
    a64_store_release(&heap.words[at], word_of(X_FREE, 0, tag))
    a64_fetch_add_relaxed(heap.frees, 1)        # a hint that something was freed; orders nothing
    heap.hint = at                              # last in, first out: these pages are mapped and warm


cdef bint heap_free(heap_t *heap, uint64_t at, uint64_t tag, uint64_t state, uint64_t owner) noexcept nogil:
    """Free the block {at, tag} that is in `state` and owned by `owner`; False: it is not, nothing done."""
    if at >= heap.count:
        return False
    if not a64_cas_acq_rel(&heap.words[at], word_of(state, owner, tag), word_of(X_FREEING, owner, tag)):
        return False
    finish_free(heap, at)
    return True


cdef bint heap_publish(heap_t *heap, uint64_t at, uint64_t tag, uint64_t slot) noexcept nogil:
    """PRIVATE(slot) -> PUBLISHING(slot), before the record that names the block is written."""
    return a64_cas_acq_rel(&heap.words[at], word_of(X_PRIVATE, slot, tag), word_of(X_PUBLISHING, slot, tag))


cdef bint heap_adopt(heap_t *heap, uint64_t at, uint64_t tag, uint64_t slot) noexcept nogil:
    """PUBLISHING(slot) -> HOST, by the host, with the tag that the record carries."""
    if at >= heap.count:
        return False
    return a64_cas_acq_rel(&heap.words[at], word_of(X_PUBLISHING, slot, tag), word_of(X_HOST, NO_SLOT, tag))


cdef uint64_t heap_sweep(heap_t *heap, uint64_t slot) noexcept nogil:
    """Free all that a dead slot owned; the records that name blocks were processed before. How many.

    Only the host calls it, after the death is confirmed, so nobody else moves a word that names the slot.
    """
    cdef uint64_t i = 0
    cdef uint64_t n = 0
    cdef uint64_t w
    while i < heap.count:
        w = a64_load_acquire(&heap.words[i])
        if x_field(w) == slot and (x_state(w) == X_CLAIM or x_state(w) == X_PRIVATE
                                   or x_state(w) == X_PUBLISHING or x_state(w) == X_FREEING):
            finish_free(heap, i)
            n += 1
        i += 1
    return n


cdef uint64_t heap_used(heap_t *heap) noexcept nogil:
    """Extents that somebody owns: a snapshot."""
    cdef uint64_t i, n = 0
    for i in range(heap.count):
        n += not vacant(a64_load_relaxed(&heap.words[i]))
    return n


cdef uint64_t heap_largest(heap_t *heap) noexcept nogil:
    cdef uint64_t i, run = 0, best = 0
    for i in range(heap.count):
        run = run + 1 if vacant(a64_load_relaxed(&heap.words[i])) else 0
        if run > best:
            best = run
    return best
