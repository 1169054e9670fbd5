# cython: language_level=3
"""The operations of a map. The words and their moves stand in _maplayout.pxd.

    put     take a block, write it; found: CAS the cell, free the old block.  Not found: CAS `pending`, help.
    erase   as put, with a tombstone; if nobody watches: end a pending insertion; CAS the cell to empty; free
    help    cell empty, and still pending: CAS the cell.  CAS `pending` to none

What can be met half done: a pending insertion (anybody ends it), a TAKEN block (its owner's, or the sweep's).
"""
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from runtime._atomics cimport (
    a64_cas_seq_cst, a64_fetch_add_seq_cst, a64_load_acquire, a64_load_relaxed, a64_load_seq_cst,
    a64_store_seq_cst, a64_t, fence_acquire, now_ns, words_load,
)
from runtime._maplayout cimport (
    BURIED, CELLS, CHUNK_CELLS, K_CHUNK, K_VALUE, MAP_ABSENT, MAP_AGAIN, MAP_MANY_CELLS, MAP_MANY_ITEMS,
    MAP_NOT_NUMBER, MAP_NO_ROOM, MAP_OK, MAP_OTHER, MAP_OVERFLOW, MAX_CELLS, MAX_KEY, U_LOCK, U_PUBLISHED,
    block_at, block_value, cell_block, look_at_cell, map_block, map_bucket, map_chunk, map_key, map_key_of,
    map_place, map_status, map_t, still, unit_state, unit_word, value_fits,
)
from runtime._mapwatch cimport map_tell, map_watched
from runtime._units cimport NOWHERE, unit_free, unit_free_published, unit_pinned, unit_take


# ---- cells -----------------------------------------------------------------------------------------

cdef map_chunk *chunk_after(map_t *m, a64_t *link) noexcept nogil:
    """The chunk that `next` names, or NULL."""
    cdef uint64_t at = a64_load_acquire(link)
    return NULL if at == 0 or at > m.count else <map_chunk *>block_at(m, at - 1)


cdef a64_t *map_cell(map_t *m, map_bucket *bucket, uint64_t at) noexcept nogil:
    cdef map_chunk *chunk
    if at < CELLS:
        return &bucket.cells[at]
    at -= CELLS
    chunk = chunk_after(m, &bucket.next)
    while chunk != NULL and at >= CHUNK_CELLS:
        at -= CHUNK_CELLS
        chunk = chunk_after(m, &chunk.next)
    return NULL if chunk == NULL else &chunk.cells[at]


cdef bint map_find_on(map_t *m, map_bucket *bucket, map_key *k, map_place *place) noexcept nogil:
    """All cells again, and an insertion under way, which may be this key's, is ended first: so what a process
    was killed over is there from the first time on that somebody looks for it."""
    cdef map_chunk *chunk
    cdef uint64_t p = a64_load_acquire(&bucket.pending), at = 0, i
    if cell_block(p):
        map_help(m, bucket, p)
    place.vacant = NULL
    for i in range(<uint64_t>CELLS):
        if look_at_cell(m, &bucket.cells[i], i, k, place):
            return True
    at = CELLS
    chunk = chunk_after(m, &bucket.next)
    while chunk != NULL and at < MAX_CELLS:
        for i in range(<uint64_t>CHUNK_CELLS):
            if look_at_cell(m, &chunk.cells[i], at + i, k, place):
                return True
        at += CHUNK_CELLS
        chunk = chunk_after(m, &chunk.next)
    return False


cdef inline uint64_t cell_naming(map_bucket *bucket, uint64_t named) noexcept nogil:
    """The next word of a cell of this bucket; `named` is a block + 1, or 0. To be called after the cell's
    word was read: so it is newer than that."""
    return (a64_fetch_add_seq_cst(&bucket.counter, 1) + 1) << 24 | named


cdef void map_help(map_t *m, map_bucket *bucket, uint64_t p) noexcept nogil:
    cdef a64_t *cell = map_cell(m, bucket, (p >> 24) & (MAX_CELLS - 1))
    cdef uint64_t w
    if cell != NULL:
        w = a64_load_seq_cst(cell)
        if a64_load_seq_cst(&bucket.pending) != p:
            return
        # While it is pending nobody empties the cell: empty is not yet filled.
        if cell_block(w) == 0:
            a64_cas_seq_cst(cell, w, cell_naming(bucket, cell_block(p)))
    a64_cas_seq_cst(&bucket.pending, p, p & ~<uint64_t>0xFFFFFF)


cdef map_status grow(map_t *m, map_bucket *bucket, uint64_t hash) noexcept nogil:
    """One more chunk at the end of the bucket's chain; somebody else's is as good as ours."""
    cdef uint64_t b = unit_take(m, 1), cells = CELLS
    cdef a64_t *link = &bucket.next
    cdef map_chunk *chunk
    if b == NOWHERE:
        return MAP_NO_ROOM
    chunk = <map_chunk *>block_at(m, b)
    memset(chunk, 0, sizeof(map_chunk))
    chunk.block.hash = hash
    chunk.block.kind = K_CHUNK
    while True:
        if a64_load_acquire(link) != 0:
            cells += CHUNK_CELLS
            chunk = chunk_after(m, link)
            if chunk == NULL or cells + CHUNK_CELLS > MAX_CELLS:
                unit_free(m, b)
                return MAP_MANY_CELLS
            link = &chunk.next
        elif a64_cas_seq_cst(link, 0, b + 1):
            a64_store_seq_cst(&m.words[b], unit_word(U_PUBLISHED, 0, a64_load_relaxed(&m.words[b])))
            return MAP_OK
        else:
            unit_free(m, b)             # another process was faster, and made room
            return MAP_OK


# ---- blocks ----------------------------------------------------------------------------------------

cdef inline uint64_t new_block(map_t *m, map_key *k, uint64_t n, int64_t expires) noexcept nogil:
    """A block of ours with the key and room for a value, or NOWHERE."""
    cdef uint64_t key_room = (k.bytes + 7) & ~<uint64_t>7
    cdef uint64_t need = sizeof(map_block) + key_room + n, b
    cdef map_block *block
    b = unit_take(m, (need + m.unit_bytes - 1) // m.unit_bytes)
    if b == NOWHERE:
        return b
    block = block_at(m, b)
    block.hash = k.hash
    block.key_bytes = <uint32_t>k.bytes
    block.kind = k.kind
    block.value_bytes = n
    block.expires = expires
    memcpy(<char *>block + sizeof(map_block), k.data, k.bytes)
    return b


cdef void map_release(map_t *m, uint64_t b, uint64_t word) noexcept nogil:
    if not unit_pinned(m, b):
        unit_free_published(m, b, word)


cdef inline void publish(map_t *m, uint64_t b, uint64_t state, a64_t *cell) noexcept nogil:
    """A block of ours that was named in this cell. Then look again: who has replaced it meanwhile has left it
    to us, as it was TAKEN."""
    cdef uint64_t word = unit_word(state, 0, a64_load_relaxed(&m.words[b]))
    a64_store_seq_cst(&m.words[b], word)
    if cell_block(a64_load_seq_cst(cell)) != b + 1:
        map_release(m, b, word)


cdef bint map_names(map_t *m, uint64_t b) noexcept nogil:
    cdef map_block *block = block_at(m, b)
    cdef map_bucket *bucket = &m.buckets[block.hash & m.mask]
    cdef uint64_t p = a64_load_seq_cst(&bucket.pending), at, i
    cdef bint chunks = block.kind == K_CHUNK
    cdef a64_t *link = &bucket.next
    cdef map_chunk *chunk
    if cell_block(p) == b + 1:
        map_help(m, bucket, p)
    for i in range(<uint64_t>CELLS):
        if cell_block(a64_load_seq_cst(&bucket.cells[i])) == b + 1:
            return True
    at = CELLS
    while at < MAX_CELLS:
        if chunks and a64_load_seq_cst(link) == b + 1:
            return True
        chunk = chunk_after(m, link)
        if chunk == NULL:
            return False
        for i in range(<uint64_t>CHUNK_CELLS):
            if cell_block(a64_load_seq_cst(&chunk.cells[i])) == b + 1:
                return True
        link = &chunk.next
        at += CHUNK_CELLS
    return False


cdef void map_settle(map_t *m, uint64_t b) noexcept nogil:
    cdef uint64_t kind, word
    if not map_names(m, b):
        unit_free(m, b)
        return
    kind = block_at(m, b).kind
    word = unit_word(U_PUBLISHED if kind == K_VALUE or kind == K_CHUNK else U_LOCK, 0,
                     a64_load_relaxed(&m.words[b]))
    a64_store_seq_cst(&m.words[b], word)
    if not map_names(m, b):
        map_release(m, b, word)


cdef void map_unpin(map_t *m, a64_t *pin) noexcept nogil:
    cdef uint64_t b = a64_load_relaxed(pin) & 0xFFFFFF, word
    a64_store_seq_cst(pin, 0)
    if b < m.count:
        word = a64_load_seq_cst(&m.words[b])
        # Published and not named: it was unnamed while pinned, and will never be named again.
        if (unit_state(word) == U_PUBLISHED or unit_state(word) == U_LOCK) and not map_names(m, b):
            map_release(m, b, word)


# ---- items -----------------------------------------------------------------------------------------

cdef uint64_t map_count(map_t *m, int64_t now) noexcept nogil:
    cdef uint64_t i, at, w, n = 0
    cdef a64_t *cell
    cdef map_block *block
    cdef bint counts
    for i in range(m.mask + 1):
        at = 0
        while True:
            cell = map_cell(m, &m.buckets[i], at)
            if cell == NULL:
                break
            at += 1
            while True:
                w = a64_load_acquire(cell)
                if cell_block(w) == 0 or cell_block(w) > m.count:
                    break
                block = block_at(m, cell_block(w) - 1)
                counts = block.kind == K_VALUE and (block.expires == 0 or block.expires > now)
                fence_acquire()
                if a64_load_relaxed(cell) == w:
                    n += counts
                    break
    return n


cdef bint reserve_item(map_t *m) noexcept nogil:
    cdef uint64_t before
    cdef int _turn
    for _turn in range(2):
        before = a64_fetch_add_seq_cst(&m.head.items, 1)
        if before < m.max_items:
            return True
        a64_fetch_add_seq_cst(&m.head.items, <uint64_t>-1)
        # It counts those, too, who were killed on the way: only a count of what is there says no.
        before = a64_load_acquire(&m.head.items)
        a64_cas_seq_cst(&m.head.items, before, map_count(m, BURIED))
    return False


cdef inline void drop_item(map_t *m, uint64_t kind) noexcept nogil:
    if m.max_items != 0 and kind == K_VALUE:
        a64_fetch_add_seq_cst(&m.head.items, <uint64_t>-1)


cdef inline bint swap(map_t *m, map_bucket *bucket, map_place *place, uint64_t b) noexcept nogil:
    """Our block b in the place of another one."""
    # The old block's tag is read before the CAS: as long as the cell names it, it is that block's. If it is
    # TAKEN still, it may be PUBLISHED by the time that it is unnamed: then its owner has looked too early.
    cdef uint64_t old = unit_word(U_PUBLISHED, 0, a64_load_acquire(&m.words[place.block]))
    if not a64_cas_seq_cst(place.cell, place.word, cell_naming(bucket, b + 1)):
        return False
    publish(m, b, U_PUBLISHED, place.cell)
    map_release(m, place.block, old)
    map_tell(m, bucket)
    return True


cdef map_status swap_counted(map_t *m, map_bucket *bucket, map_place *place, uint64_t b) noexcept nogil:
    """The same where items are counted, which tombstones are not."""
    cdef bint counted = block_at(m, place.block).expires != BURIED      # right if the CAS succeeds
    cdef bint counts = block_at(m, b).expires != BURIED
    cdef bint done
    if counts and not counted and not reserve_item(m):
        return MAP_MANY_ITEMS
    done = swap(m, bucket, place, b)
    if counted != counts and counted == done:           # the old one was, or the new one is not to be
        drop_item(m, K_VALUE)
    return MAP_OK if done else MAP_AGAIN


cdef inline map_status replace(map_t *m, map_bucket *bucket, map_place *place, uint64_t b) noexcept nogil:
    """MAP_OK, MAP_MANY_ITEMS, or MAP_AGAIN: look for the key anew."""
    if m.max_items != 0:
        return swap_counted(m, bucket, place, b)
    return MAP_OK if swap(m, bucket, place, b) else MAP_AGAIN


cdef map_status insert(map_t *m, map_bucket *bucket, uint64_t p, map_place *place, uint64_t b) noexcept nogil:
    """Our block b in an empty cell; MAP_AGAIN: look for the key anew. `p` was read before that was done."""
    cdef map_block *block = block_at(m, b)
    cdef uint64_t kind = block.kind
    cdef uint64_t wanted
    cdef map_status status
    if place.vacant == NULL:
        status = grow(m, bucket, block.hash)
        return MAP_AGAIN if status == MAP_OK else status
    if m.max_items != 0 and kind == K_VALUE and not reserve_item(m):
        return MAP_MANY_ITEMS
    wanted = ((p >> 34) + 1) << 34 | place.vacant_at << 24 | (b + 1)
    if not a64_cas_seq_cst(&bucket.pending, p, wanted):
        drop_item(m, kind)
        return MAP_AGAIN
    map_help(m, bucket, wanted)
    if kind == K_VALUE:
        publish(m, b, U_PUBLISHED, place.vacant)
        map_tell(m, bucket)
    else:
        publish(m, b, U_LOCK, place.vacant)
    return MAP_OK


cdef map_status compare(map_t *m, map_place *place, const char *expected, uint64_t n,
                        bint *over) noexcept nogil:
    """MAP_OK: the value is that. MAP_OTHER, MAP_AGAIN. `over`: its time is over, it counts as absent."""
    cdef map_block *block = block_at(m, place.block)
    cdef int64_t expires = block.expires
    cdef bint same = False
    if expected != NULL and block.value_bytes == n and value_fits(m, place.block, block.key_bytes, n):
        same = memcmp(block_value(block), expected, n) == 0
    if not still(place):
        return MAP_AGAIN
    over[0] = expires != 0 and expires <= now_ns()
    return MAP_OK if same or (over[0] and expected == NULL) else MAP_OTHER


cdef map_status map_put(map_t *m, map_key *k, const char *value, uint64_t n, int64_t expires,
                        bint conditional, const char *expected, uint64_t expected_bytes) noexcept nogil:
    cdef map_bucket *bucket = &m.buckets[k.hash & m.mask]
    cdef uint64_t b = new_block(m, k, n, expires), p
    cdef map_place place
    cdef map_status status = MAP_AGAIN
    cdef bint over = False
    if b == NOWHERE:
        return MAP_NO_ROOM
    memcpy(block_value(block_at(m, b)), value, n)
    while True:
        p = a64_load_acquire(&bucket.pending)
        if cell_block(p):
            map_help(m, bucket, p)
        elif map_find(m, k, &place):
            status = MAP_OK
            if conditional:
                status = compare(m, &place, expected, expected_bytes, &over)
                if over and expected != NULL and status == MAP_OK:
                    status = MAP_OTHER
            if status == MAP_OK:
                status = replace(m, bucket, &place, b)
            if status == MAP_OK:
                return status
            if status != MAP_AGAIN:
                break
        elif conditional and expected != NULL:
            status = MAP_OTHER
            break
        else:
            status = insert(m, bucket, p, &place, b)
            if status == MAP_OK:
                return status
            if status != MAP_AGAIN:
                break
    unit_free(m, b)
    return status


cdef map_status add_to(map_t *m, map_place *place, int64_t n, int64_t *sum, int64_t *expires) noexcept nogil:
    """What the sum would be."""
    cdef map_block *block = block_at(m, place.block)
    cdef uint64_t width = block.value_bytes
    cdef int64_t before = 0
    expires[0] = block.expires
    if width == 8:
        words_load(&before, block_value(block), 8)
    if not still(place):
        return MAP_AGAIN
    if expires[0] != 0 and expires[0] <= now_ns():
        expires[0] = before = 0
    elif width != 8:
        return MAP_NOT_NUMBER
    if (n > 0 and before > INT64_MAX - n) or (n < 0 and before < INT64_MIN - n):
        return MAP_OVERFLOW
    sum[0] = before + n
    return MAP_OK


cdef map_status map_add(map_t *m, map_key *k, int64_t n, int64_t *result) noexcept nogil:
    cdef map_bucket *bucket = &m.buckets[k.hash & m.mask]
    cdef uint64_t b = new_block(m, k, 8, 0), p
    cdef map_place place
    cdef map_status status
    cdef map_block *block
    if b == NOWHERE:
        return MAP_NO_ROOM
    block = block_at(m, b)
    while True:
        p = a64_load_acquire(&bucket.pending)
        if cell_block(p):
            map_help(m, bucket, p)
            continue
        if map_find(m, k, &place):
            status = add_to(m, &place, n, result, &block.expires)
            if status == MAP_OK:
                memcpy(block_value(block), result, 8)
                status = replace(m, bucket, &place, b)
                if status == MAP_OK:
                    return status
        else:
            block.expires = 0
            result[0] = n
            memcpy(block_value(block), result, 8)
            status = insert(m, bucket, p, &place, b)
            if status == MAP_OK:
                return MAP_OK
        if status != MAP_AGAIN:
            unit_free(m, b)
            return status


cdef bint map_empty(map_t *m, map_bucket *bucket, a64_t *cell, uint64_t word) noexcept nogil:
    cdef uint64_t b = cell_block(word) - 1
    cdef uint64_t kind = block_at(m, b).kind
    cdef int64_t expires = block_at(m, b).expires
    cdef uint64_t old = unit_word(  # as in replace()
        U_PUBLISHED if kind == K_VALUE else U_LOCK, 0, a64_load_acquire(&m.words[b]))
    # Read after the cell was: a pending insertion of this very cell is over before it is emptied. Another one
    # cannot begin, as long as the cell is full.
    cdef uint64_t p = a64_load_seq_cst(&bucket.pending)
    if cell_block(p):
        map_help(m, bucket, p)
    if not a64_cas_seq_cst(cell, word, cell_naming(bucket, 0)):
        return False
    map_release(m, b, old)
    if kind == K_VALUE and expires != BURIED:
        drop_item(m, kind)
        map_tell(m, bucket)
    return True


cdef bint map_remove(map_t *m, map_bucket *bucket, a64_t *cell, uint64_t word) noexcept nogil:
    cdef map_block *block = block_at(m, cell_block(word) - 1)
    cdef uint64_t bytes = block.key_bytes, tomb
    cdef map_place place
    cdef map_key k
    cdef char key[MAX_KEY]
    if not map_watched(m):
        return map_empty(m, bucket, cell, word)
    place.cell, place.word, place.block = cell, word, cell_block(word) - 1
    if bytes > MAX_KEY or not value_fits(m, place.block, bytes, 0):
        return False
    memcpy(key, <char *>block + sizeof(map_block), bytes)
    if not still(&place):
        return False
    k = map_key_of(key, bytes, K_VALUE)
    tomb = new_block(m, &k, 0, BURIED)
    if tomb == NOWHERE:
        return map_empty(m, bucket, cell, word)
    if replace(m, bucket, &place, tomb) != MAP_OK:
        unit_free(m, tomb)
        return False
    return True


cdef map_status map_erase(map_t *m, map_key *k) noexcept nogil:
    cdef map_bucket *bucket = &m.buckets[k.hash & m.mask]
    cdef map_place place
    cdef int64_t expires
    while map_find(m, k, &place):
        expires = block_at(m, place.block).expires
        if expires == BURIED:
            if still(&place):
                return MAP_ABSENT
        elif map_remove(m, bucket, place.cell, place.word):
            return MAP_ABSENT if expires != 0 and expires <= now_ns() else MAP_OK
    return MAP_ABSENT


cdef map_status map_ensure(map_t *m, map_key *k, uint64_t n, map_place *place) noexcept nogil:
    cdef map_bucket *bucket = &m.buckets[k.hash & m.mask]
    cdef uint64_t b = NOWHERE, p
    cdef map_status status = MAP_AGAIN
    while not map_find(m, k, place):
        p = a64_load_acquire(&bucket.pending)
        if cell_block(p) or map_find(m, k, place):
            continue
        if b == NOWHERE:
            b = new_block(m, k, n, 0)
            if b == NOWHERE:
                return MAP_NO_ROOM
            memset(block_value(block_at(m, b)), 0, n)
        status = insert(m, bucket, p, place, b)
        if status == MAP_OK:
            b = NOWHERE
        elif status != MAP_AGAIN:
            break
    if b != NOWHERE:
        unit_free(m, b)
    return MAP_OK if status == MAP_AGAIN else status
