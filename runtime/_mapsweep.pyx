# cython: language_level=3
"""What the dead leave in a map, and what is over.

    dead    TAKEN(r) -> TAKEN(me), then: named? PUBLISHED, else free.  PUBLISHED and not named -> free: the
            dead may have unnamed it.  HELD(r) -> free, inherited.
            pins of r -> 0, and what they alone have kept is freed.  At last the row -> 0.
    over    items whose time has passed: as by delete; locks that are idle, tombstones that nobody waits for

Why a word of a living process is never taken: see sweep_batch in _slab.pyx, where rows and words are alike.
"""
from libc.stdint cimport int64_t, uint64_t

from runtime._atomics cimport (
    a32_load_acquire, a64_cas_seq_cst, a64_fetch_add_relaxed, a64_load_acquire, a64_load_relaxed,
    a64_load_seq_cst, a64_t, fence_acquire, now_ns,
)
from runtime._identity cimport is_dead, my_identity
from runtime._map cimport map_cell, map_empty, map_names, map_release, map_remove, map_settle, map_unpin
from runtime._maplayout cimport (
    BURIED, K_LOCK, K_ONCE, K_VALUE, MAX_KEY, PINS, U_LOCK, U_PUBLISHED, U_TAKEN, block_at, block_value,
    cell_block, map_block, map_bucket, map_t, unit_field, unit_state, unit_word, value_fits,
)
from runtime._maplock cimport L_DEAD, L_HELD, lock_pass_on, lock_retire
from runtime._mapwatch cimport map_tell_all, map_watched, watch_dead, watch_ended
from runtime._units cimport pin_word, unit_pin


cdef enum:
    BATCH = 64                  # dead processes that one pass over the words handles
    TIDY = 8                    # buckets that one look for what is over handles

ctypedef struct dead_t:
    uint64_t rows[64]
    uint64_t names[64]
    bint keep[64]               # something of it is left
    int count


cdef uint64_t map_sweep(map_t *m, sweep_t extent) noexcept nogil:
    cdef uint64_t freed = 0, i
    cdef uint64_t row = 0, high = a32_load_acquire(&m.head.high)
    cdef dead_t dead
    cdef uint64_t name, me = my_identity()
    # Without a row of our own we can only clear rows of those who left nothing.
    cdef bint enrolled = a64_load_acquire(&m.identity) == me
    if high > m.row_count:
        high = m.row_count
    while row < high:
        dead.count = 0
        while row < high and dead.count < BATCH:
            name = a64_load_acquire(&m.rows[row].owner)
            if name != 0 and name != me and is_dead(name):
                dead.rows[dead.count] = row
                dead.names[dead.count] = name
                dead.keep[dead.count] = False
                dead.count += 1
            row += 1
        if dead.count:
            freed += sweep_batch(m, &dead, enrolled)
            map_tell_all(m)             # they may have changed something, and not told
    watch_ended(m)                      # who closed the last one may have been killed before he said so
    if extent != SWEEP_DEAD and enrolled:
        for i in range(m.mask + 1):
            freed += tidy_bucket(m, &m.buckets[i], now_ns(), extent)
    return freed


cdef int place_of(dead_t *dead, uint64_t row) noexcept nogil:
    cdef int k
    for k in range(dead.count):
        if dead.rows[k] == row:
            return k
    return -1


cdef uint64_t sweep_batch(map_t *m, dead_t *dead, bint enrolled) noexcept nogil:
    cdef uint64_t i, w, freed = 0
    cdef int k
    for i in range(m.count):
        w = a64_load_acquire(&m.words[i])
        if unit_state(w) == U_TAKEN:
            k = place_of(dead, unit_field(w))
            if k < 0 or a64_load_acquire(&m.rows[dead.rows[k]].owner) != dead.names[k]:
                sweep_lock(m, dead, i, enrolled)    # its maker has not come to say that it is a lock
            elif not enrolled:
                dead.keep[k] = True
            elif a64_cas_seq_cst(&m.words[i], w, unit_word(U_TAKEN, a64_load_relaxed(&m.row), w)):
                map_settle(m, i)
                # A lock that one thread of the dead was making, and another one has taken already.
                sweep_lock(m, dead, i, True)
                freed += 1
        elif unit_state(w) == U_LOCK or unit_state(w) == U_PUBLISHED:
            if unit_state(w) == U_LOCK:
                sweep_lock(m, dead, i, enrolled)
            # Who has unnamed it may have been killed before he freed it. It is named once: never again.
            if not map_names(m, i):
                map_release(m, i, w)
                freed += 1
    for k in range(dead.count):
        watch_dead(m, dead.rows[k], dead.names[k])
        if sweep_pins(m, dead.rows[k], dead.names[k], enrolled) and not dead.keep[k]:
            a64_cas_seq_cst(&m.rows[dead.rows[k]].owner, dead.names[k], 0)
    return freed


cdef a64_t *lock_word(map_t *m, uint64_t i) noexcept nogil:
    """Of the block at unit i, if that looks like a lock."""
    cdef map_block *block = block_at(m, i)
    cdef uint64_t key_bytes = block.key_bytes
    if block.kind != K_LOCK and block.kind != K_ONCE:
        return NULL
    if key_bytes > MAX_KEY or not value_fits(m, i, key_bytes, 8):
        return NULL
    return <a64_t *>(<char *>block + sizeof(map_block) + ((key_bytes + 7) & ~<uint64_t>7))


cdef void sweep_lock(map_t *m, dead_t *dead, uint64_t i, bint enrolled) noexcept nogil:
    cdef a64_t *word = lock_word(m, i)
    cdef a64_t *pin
    cdef uint64_t held
    cdef int k
    if word == NULL:
        return
    held = a64_load_acquire(word)
    k = place_of(dead, held >> 32)
    if k < 0 or not held & L_HELD:
        return
    if not enrolled:
        dead.keep[k] = True
        return
    # Another sweeper may have passed it on, and somebody reclaimed it: pinned and named it is a lock.
    pin = unit_pin(m, i)
    if pin == NULL:
        dead.keep[k] = True             # all pins are in use: the next sweep
        return
    if map_names(m, i):
        lock_pass_on(lock_word(m, i), dead.rows[k], m.rows, dead.names[k])
    map_unpin(m, pin)


cdef bint sweep_pins(map_t *m, uint64_t row, uint64_t name, bint enrolled) noexcept nogil:
    """True: there are none any more."""
    cdef uint64_t pin, b, w
    cdef int i
    for i in range(PINS):
        pin = a64_load_acquire(&m.rows[row].pins[i])
        b = pin & 0xFFFFFF
        if pin == 0 or pin != pin_word(name, b):
            continue
        if not enrolled:
            return False
        if a64_cas_seq_cst(&m.rows[row].pins[i], pin, 0) and b < m.count:
            w = a64_load_seq_cst(&m.words[b])
            if (unit_state(w) == U_PUBLISHED or unit_state(w) == U_LOCK) and not map_names(m, b):
                map_release(m, b, w)
    return True


cdef uint64_t tidy_bucket(map_t *m, map_bucket *bucket, int64_t now, sweep_t extent) noexcept nogil:
    cdef uint64_t at = 0, w, freed = 0
    cdef a64_t *cell
    cdef map_block *block
    cdef uint64_t kind
    cdef int64_t expires
    while True:
        cell = map_cell(m, bucket, at)
        if cell == NULL:
            return freed
        at += 1
        w = a64_load_acquire(cell)
        if cell_block(w) == 0 or cell_block(w) > m.count:
            continue
        block = block_at(m, cell_block(w) - 1)
        kind = block.kind
        expires = block.expires
        fence_acquire()
        if a64_load_relaxed(cell) != w:
            continue
        if kind == K_VALUE:
            if expires == BURIED:
                if extent == SWEEP_ALL or not map_watched(m):
                    freed += map_empty(m, bucket, cell, w)
            elif expires != 0 and expires <= now:
                freed += map_remove(m, bucket, cell, w)
        elif extent != SWEEP_DEAD and (kind == K_LOCK or kind == K_ONCE):
            freed += reclaim(m, bucket, cell, w)


cdef bint reclaim(map_t *m, map_bucket *bucket, a64_t *cell, uint64_t w) noexcept nogil:
    """Erase a lock that nobody uses."""
    cdef uint64_t b = cell_block(w) - 1
    cdef a64_t *pin = unit_pin(m, b)
    cdef a64_t *word
    cdef bint done = False
    if pin == NULL:
        return False
    if a64_load_seq_cst(cell) == w:
        word = <a64_t *>block_value(block_at(m, b))
        if a64_load_acquire(word) & L_DEAD or lock_retire(word):
            done = map_empty(m, bucket, cell, w)
    map_unpin(m, pin)
    return done


cdef void map_tidy(map_t *m, int64_t now) noexcept nogil:
    cdef uint64_t i = a64_fetch_add_relaxed(&m.head.cursor, TIDY), k
    for k in range(<uint64_t>TIDY):
        tidy_bucket(m, &m.buckets[(i + k) & m.mask], now, SWEEP_DEAD)
