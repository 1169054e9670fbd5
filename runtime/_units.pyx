# cython: language_level=3
"""Rows, units and pins: who owns which part of a map. The words and their moves stand in _maplayout.pxd."""
from libc.stdint cimport uint32_t, uint64_t

from runtime._atomics cimport (
    a32_cas_relaxed, a32_load_acquire, a32_load_relaxed, a32_store_relaxed, a64_cas_acq_rel, a64_cas_seq_cst,
    a64_load_acquire, a64_load_relaxed, a64_load_seq_cst, a64_store_relaxed, a64_store_release, a64_t,
    fence_release,
)
from runtime._identity cimport my_identity
from runtime._maplayout cimport (
    MAP_NO_ROW, MAP_OK, PINS, RECENT, U_FREE, U_LOCK, U_PUBLISHED, U_TAIL, U_TAKEN, map_about, map_block,
    map_bucket, map_chunk, map_header, map_row, map_status, map_t, unit_field, unit_raised, unit_state,
    unit_word,
)


cdef extern from *:
    void _Static_assert(bint holds) nogil           # C11: checked by the compiler, no code


cdef void layout_holds() noexcept nogil:
    _Static_assert(sizeof(map_about) == 64)
    _Static_assert(sizeof(map_header) == 256)
    _Static_assert(sizeof(map_row) == 64)
    _Static_assert(sizeof(map_bucket) == 64)
    _Static_assert(sizeof(map_block) == 32)
    _Static_assert(sizeof(map_chunk) == 128)


# ---- rows ------------------------------------------------------------------------------------------

cdef map_status unit_enroll(map_t *m) noexcept nogil:
    cdef uint64_t me = my_identity(), row
    for row in range(m.row_count):
        if a64_load_acquire(&m.rows[row].owner) == me:
            break
    else:
        row = unit_row(m, me)
        if row == m.row_count:
            return MAP_NO_ROW
    a32_store_relaxed(&m.depth, 0)
    # Each begins far from the others, at words and units that they do not touch: by the golden section.
    a32_store_relaxed(&m.cursor, <uint32_t>((row * 0x9E3779B1ULL & 0xFFFFFFFFULL) * m.count >> 32))
    # Two threads that come here at once may claim two rows: both name this process.
    a64_store_relaxed(&m.row, row)
    a64_store_release(&m.identity, me)
    return MAP_OK


cdef uint64_t unit_row(map_t *m, uint64_t me) noexcept nogil:
    # The lowest: those who look at all rows look at few.
    cdef uint64_t row
    cdef uint32_t high
    for row in range(m.row_count):
        if a64_load_relaxed(&m.rows[row].owner) != 0:
            continue
        while True:
            high = a32_load_acquire(&m.head.high)
            if high > row or a32_cas_relaxed(&m.head.high, high, <uint32_t>row + 1):
                break
        if a64_cas_seq_cst(&m.rows[row].owner, 0, me):
            return row
    return m.row_count


# ---- units -----------------------------------------------------------------------------------------

cdef uint64_t unit_search(map_t *m, uint64_t n) noexcept nogil:
    """From the cursor once around. A run that somebody else cuts is given back, and the search goes on
    behind the cut."""
    cdef uint64_t i = a32_load_relaxed(&m.cursor), looked = 0, got, w
    cdef uint64_t row = a64_load_relaxed(&m.row)
    if n == 0 or n > m.count:
        return NOWHERE
    while looked < m.count + n:
        if i + n > m.count:             # no run goes around the end
            looked += m.count - i if i < m.count else 0
            i = 0
            if looked >= m.count + n:
                return NOWHERE
        got = free_run(m, i, n)
        if got == n:
            w = a64_load_acquire(&m.words[i])
            if unit_state(w) == U_FREE:
                if a64_cas_acq_rel(&m.words[i], w, unit_word(U_TAKEN, row, unit_raised(w))):
                    got = take_tails(m, i, n)
                    if got == n:
                        a32_store_relaxed(&m.cursor, <uint32_t>(i + n))
                        fence_release()
                        return i
                    unit_free(m, i)
                    a32_store_relaxed(&m.depth, 0)
            else:
                got = 0
        looked += got + 1
        i += got + 1
    return NOWHERE


cdef uint64_t free_run(map_t *m, uint64_t i, uint64_t n) noexcept nogil:
    """How many units from i on are free, up to n."""
    cdef uint64_t k
    for k in range(n):
        if unit_state(a64_load_relaxed(&m.words[i + k])) != U_FREE:
            return k
    return n


cdef uint64_t take_tails(map_t *m, uint64_t head, uint64_t n) noexcept nogil:
    """The units behind a head that we hold: n, or how many there are up to one that is not free."""
    cdef uint64_t k, w
    for k in range(1, n):
        w = a64_load_acquire(&m.words[head + k])
        if unit_state(w) != U_FREE:
            return k
        if not a64_cas_acq_rel(&m.words[head + k], w, unit_word(U_TAIL, head, unit_raised(w))):
            return k
    return n


cdef uint64_t run_length(map_t *m, uint64_t head) noexcept nogil:
    """Of a block; right while its head does not change."""
    cdef uint64_t n = 1, w
    while head + n < m.count:
        w = a64_load_acquire(&m.words[head + n])
        if unit_state(w) != U_TAIL or unit_field(w) != head:
            return n
        n += 1
    return n


cdef void unit_free(map_t *m, uint64_t b) noexcept nogil:
    """Tails in descending order, so that what is left of them is always a prefix; the head last."""
    cdef uint64_t n = run_length(m, b), k, w
    for k in range(n - 1, 0, -1):
        w = a64_load_relaxed(&m.words[b + k])
        a64_store_release(&m.words[b + k], unit_word(U_FREE, 0, w))
    w = a64_load_relaxed(&m.words[b])
    a64_store_release(&m.words[b], unit_word(U_FREE, 0, w))
    if n == 1:
        remember(m, b)


cdef inline void remember(map_t *m, uint64_t b) noexcept nogil:
    cdef uint32_t depth = a32_load_relaxed(&m.depth)
    if depth < RECENT:
        a32_store_relaxed(&m.recent[depth], <uint32_t>b)
        a32_store_relaxed(&m.depth, depth + 1)


cdef bint unit_free_published(map_t *m, uint64_t b, uint64_t word) noexcept nogil:
    # Read before the CAS, which says that it was right: tails of a published block do not change.
    cdef uint64_t n
    if unit_state(word) != U_PUBLISHED and unit_state(word) != U_LOCK:
        return False
    n = run_length(m, b)
    if n > 1:
        if not a64_cas_acq_rel(&m.words[b], word, unit_word(U_TAKEN, a64_load_relaxed(&m.row), word)):
            return False
        unit_free(m, b)
        return True
    if not a64_cas_acq_rel(&m.words[b], word, unit_word(U_FREE, 0, word)):
        return False
    remember(m, b)
    return True


# ---- pins ------------------------------------------------------------------------------------------

cdef uint64_t pin_word(uint64_t identity, uint64_t b) noexcept nogil:
    # 40 bits that differ from process to process of a row, but for chance.
    return (identity % 1099511627689ULL + 1) << 24 | b


cdef a64_t *unit_pin(map_t *m, uint64_t b) noexcept nogil:
    cdef uint64_t row = a64_load_relaxed(&m.row), mask = a64_load_relaxed(&m.head.pinners)
    cdef uint64_t word = pin_word(a64_load_relaxed(&m.identity), b)
    cdef int i
    while not (mask >> (row & 63)) & 1:
        if a64_cas_seq_cst(&m.head.pinners, mask, mask | (<uint64_t>1 << (row & 63))):
            break
        mask = a64_load_relaxed(&m.head.pinners)
    for i in range(PINS):
        if a64_load_relaxed(&m.rows[row].pins[i]) == 0:
            if a64_cas_seq_cst(&m.rows[row].pins[i], 0, word):
                return &m.rows[row].pins[i]
    return NULL


cdef bint unit_pinned(map_t *m, uint64_t b) noexcept nogil:
    """To be called after the block was unnamed by a sequentially consistent CAS."""
    cdef uint64_t mask, row, high, pin
    cdef int i
    # All of these are sequentially consistent, and so are the CAS that has unnamed the block and, in who
    # pins, the CAS of the pin and the second look at the entry: he sees it unnamed, or we see the pin.
    mask = a64_load_seq_cst(&m.head.pinners)
    if mask == 0:
        return False
    high = a32_load_acquire(&m.head.high)
    if high > m.row_count:
        high = m.row_count
    for row in range(high):
        if not (mask >> (row & 63)) & 1:
            continue
        for i in range(PINS):
            pin = a64_load_seq_cst(&m.rows[row].pins[i])
            if pin != 0 and pin & 0xFFFFFF == b:
                return True
    return False
