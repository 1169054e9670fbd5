# cython: language_level=3
"""Equal blocks in shared memory: taking, giving back, sweeping, waiting. Format and words stand in the .pxd.

    take    hint -> CAS FREE -> OWNED(me).  Hint stale: search all words.  None free: sweep, search again.
    give    CAS OWNED(me, tag) -> FREE, leave a hint, wake a sleeper if there is one.
    sweep   CAS OWNED(row, tag) -> FREE for every row whose process is dead; then clear those rows.

Nothing here touches Python, keeps a lock, or needs a process to go on running.
"""
from libc.limits cimport INT_MAX
from libc.string cimport memset

from runtime._atomics cimport (
    a32_fetch_add_seq_cst, a32_load_acquire, a64_load_acquire, a64_store_relaxed, a64_store_release,
    fence_seq_cst, futex_wait, futex_wake,
)
from runtime._identity cimport identity_pid, is_dead, my_identity


cdef extern from *:
    void _Static_assert(bint holds) nogil           # C11: checked by the compiler, no code


cdef enum:
    LAPS = 1000                 # searches without a free block and without a still moment
    ROW_SETS = 64               # words of a set of rows, a bit each
    BATCH = 64                  # dead processes that one pass over the words handles

cdef uint64_t OWNED = 0x8000000000000000ULL


cdef void layout_holds() noexcept nogil:
    _Static_assert(sizeof(pool_about) == 64)
    _Static_assert(sizeof(pool_futex) == 64)
    _Static_assert(sizeof(pool_header) == 128 + 8 * OWNER_ROWS)
    _Static_assert(OWNER_ROWS <= 4096)              # 12 bits of the word
    _Static_assert(OWNER_ROWS == 64 * ROW_SETS)


cdef uint64_t pool_count_free(pool_t *p) noexcept nogil:
    cdef uint64_t i, free = 0
    for i in range(p.capacity):
        free += not word_owned(a64_load_relaxed(&p.words[i]))
    return free


cdef void pool_format(char *start, pool_t *p, uint64_t namespace) noexcept nogil:
    cdef pool_header *head = <pool_header *>start
    memset(start, 0, sizeof(pool_header) + 8 * p.capacity)
    head.about.magic = pool_magic()
    head.about.version = POOL_VERSION
    head.about.capacity = p.capacity
    head.about.block_bytes = p.block_bytes
    head.about.stride = p.stride
    head.about.namespace = namespace


# ---- owners ----------------------------------------------------------------------------------------

cdef pool_status pool_enroll(pool_t *p) noexcept nogil:
    cdef uint64_t me = my_identity()
    cdef int row = find_row(p, me)
    if row < 0:
        row = claim_row(p, me)
    if row < 0:
        clear_dead_rows(p)
        row = claim_row(p, me)
    if row < 0:
        return POOL_FULL
    # Begin at words that others do not touch, and on pages that we have mapped ourselves.
    a32_store_relaxed(&p.depth, 0)
    a32_store_relaxed(&p.cursor, <uint32_t>(<uint64_t>(9 * row) % p.capacity))
    # Two threads that come here at once may claim two rows. Both name this process: a block taken under
    # either is ours, and both are swept when we are dead.
    a64_store_relaxed(&p.row, OWNED | (<uint64_t>row << 51))
    a64_store_release(&p.identity, me)
    return POOL_OK


cdef int find_row(pool_t *p, uint64_t me) noexcept nogil:
    """The row that another pool object of this process has claimed, or -1."""
    cdef int row
    for row in range(OWNER_ROWS):
        if a64_load_acquire(&p.head.owners[row]) == me:
            return row
    return -1


cdef int claim_row(pool_t *p, uint64_t me) noexcept nogil:
    """A row that was nobody's, or -1. Begins at different places for different processes."""
    cdef int i, row
    for i in range(OWNER_ROWS):
        row = (identity_pid(me) + i) % OWNER_ROWS
        # A2 pairs with S2 in sweep_batch: every word with our row in it is written after this.
        if a64_load_relaxed(&p.head.owners[row]) == 0:
            if a64_cas_acq_rel(&p.head.owners[row], 0, me):                     # A2
                return row
    return -1


cdef void clear_dead_rows(pool_t *p) noexcept nogil:
    """Make room in a full owner table: also for processes that died without owning a block."""
    cdef uint64_t suspects[ROW_SETS]
    memset(suspects, 0xFF, sizeof(suspects))
    while sweep_batch(p, suspects) == BATCH:
        pass


cdef bint pool_sweep(pool_t *p) noexcept nogil:
    cdef uint64_t suspects[ROW_SETS]
    cdef uint64_t i, w
    cdef bint worth = False
    cdef int dead = BATCH
    memset(suspects, 0, sizeof(suspects))
    for i in range(p.capacity):
        w = a64_load_relaxed(&p.words[i])
        if word_owned(w):
            suspects[word_row(w) >> 6] |= <uint64_t>1 << (word_row(w) & 63)
        else:
            worth = True                    # another sweeper, or a giver, was here since the search
    while dead == BATCH:
        dead = sweep_batch(p, suspects)
        if dead > 0:
            worth = True
    return worth


cdef int sweep_batch(pool_t *p, uint64_t *suspects) noexcept nogil:
    """Free what up to BATCH dead processes own, then clear their rows; how many such there were.

    Let D be dead, in row r when we looked. We read a word w that says OWNED(r, t), then (S2) that row r
    still says D, then CAS w -> FREE(t). Why that never takes a block from a living process N:
      - N can own a block under r only after it has claimed r, and r was then 0, not D. D never comes back:
        it is dead, and identities are not used twice. If w was N's, S2 read after w sees N or a later
        value, because N claimed the row (A2) before it took the block (A1), and we leave w alone.
      - If w was D's, but another sweeper frees it, clears r, and N then claims r and takes that block, all
        between S2 and our CAS: the take raised the tag, and our CAS fails.
    Why nothing of D stays behind: D is dead, so no word becomes OWNED(r) by it any more; one whole pass
    after that sees every such word, and one that our CAS loses was freed by another sweeper. Only then is
    the row cleared, by a CAS that names D. Killed anywhere before, we leave row r naming D, and the next
    sweeper does the pass again; killed between two words, some are free already, which is where they belong.
    """
    cdef int rows[BATCH]
    cdef uint64_t names[BATCH]
    cdef uint64_t marked[ROW_SETS]
    cdef uint64_t me = my_identity()
    cdef uint64_t i, w, name, freed = 0
    cdef int r, k, count = 0
    memset(marked, 0, sizeof(marked))
    r = -1
    while r < OWNER_ROWS - 1 and count < BATCH:
        r += 1
        if suspects[r >> 6] >> (r & 63) == 0:
            r |= 63                         # no bit is left in this word
            continue
        if not (suspects[r >> 6] >> (r & 63)) & 1:
            continue
        name = a64_load_acquire(&p.head.owners[r])
        if name == 0 or name == me or not is_dead(name):
            suspects[r >> 6] &= ~(<uint64_t>1 << (r & 63))
            continue
        rows[count] = r
        names[count] = name
        marked[r >> 6] |= <uint64_t>1 << (r & 63)
        count += 1
    if count == 0:
        return 0
    for i in range(p.capacity):
        w = a64_load_acquire(&p.words[i])
        r = <int>word_row(w)
        if not word_owned(w) or not (marked[r >> 6] >> (r & 63)) & 1:
            continue
        k = 0
        while rows[k] != r:
            k += 1
        if a64_load_acquire(&p.head.owners[r]) == names[k]:                     # S2
            freed += a64_cas_seq_cst(&p.words[i], w, word_tag(w))               # R1, as in pool_give
    for k in range(count):
        a64_cas_acq_rel(&p.head.owners[rows[k]], names[k], 0)
        suspects[rows[k] >> 6] &= ~(<uint64_t>1 << (rows[k] & 63))
    while freed != 0 and a32_load_seq_cst(&p.head.futex.sleepers):              # W1
        pool_wake(p)
        freed -= 1
    return count


# ---- taking ----------------------------------------------------------------------------------------

cdef int64_t pool_search(pool_t *p, uint64_t *held) noexcept nogil:
    """Look at every word. "None" is said only when two laps in a row saw the same tags: each block was
    then held by one and the same take from its place in the first lap to its place in the second, so
    between the laps all were owned. (One lap is not enough: a free block may move behind its back.)
    """
    cdef uint64_t row = a64_load_relaxed(&p.row)
    cdef uint64_t _n, w, tags, before = 0
    cdef uint32_t i = a32_load_relaxed(&p.cursor)
    cdef int lap
    for lap in range(LAPS):
        tags = 0
        for _n in range(p.capacity):
            if i >= p.capacity:
                i = 0
            w = a64_load_acquire(&p.words[i])
            while not word_owned(w):
                if a64_cas_acq_rel(&p.words[i], w, row | word_tag(w + 1)):      # A1
                    a32_store_relaxed(&p.cursor, i + 1)
                    held[0] = row | word_tag(w + 1)
                    return i
                w = a64_load_acquire(&p.words[i])
            tags += word_tag(w)                     # tags only grow: equal sums are equal tags
            i += 1
        if lap > 0 and tags == before:
            return -1
        before = tags
    return -1           # never still, never free: somebody scribbles on the words; better than to spin


cdef int64_t pool_recover(pool_t *p, uint64_t *held) noexcept nogil:
    cdef int64_t i = -1
    while i < 0 and pool_sweep(p):
        i = pool_search(p, held)
    return i


cdef int64_t pool_take_or_sweep(pool_t *p, uint64_t *held) noexcept nogil:
    cdef int64_t i = pool_take(p, held)
    return i if i >= 0 else pool_recover(p, held)


# ---- waiting ---------------------------------------------------------------------------------------
#
#   waiter: s = sequence; sleepers = 1; fence (W2); search; none: sleep while sequence == s
#   giver:  word -> FREE (R1); sleepers (W1)? sequence += 1; wake one
#
# R1 and W1 are sequentially consistent, W2 is a fence: either W1 sees the waiter's 1, or the waiter's search
# sees the free word. The giver that sees 1 raises the sequence after R1: a waiter that read s before does
# not fall asleep, or is woken.
#
# Nobody counts the sleepers: a count would stay wrong for ever when one is killed. `sleepers` is cleared by
# a giver that woke nobody; it then raises the sequence again and wakes all, so who set the flag before the
# clearing looks again, and sets it anew; who sets it after leaves it set. A giver killed between the
# clearing and that wake-up costs the sleepers the rest of their 50 ms.

cdef void pool_wake(pool_t *p) noexcept nogil:
    a32_fetch_add_seq_cst(&p.head.futex.sequence, 1)
    if futex_wake(&p.head.futex.sequence, 1) > 0:
        return
    a32_store_relaxed(&p.head.futex.sleepers, 0)    # ordered before the next line by its release half
    a32_fetch_add_seq_cst(&p.head.futex.sequence, 1)
    futex_wake(&p.head.futex.sequence, INT_MAX)


cdef int64_t pool_wait(pool_t *p, uint64_t *held, int64_t patience) noexcept nogil:
    cdef uint32_t s = a32_load_acquire(&p.head.futex.sequence)
    cdef int64_t i
    a32_store_relaxed(&p.head.futex.sleepers, 1)
    fence_seq_cst()                                                             # W2
    i = pool_take_or_sweep(p, held)
    if i >= 0:
        return i
    futex_wait(&p.head.futex.sequence, s, patience if patience < SLICE_NS else SLICE_NS)
    return pool_take_or_sweep(p, held)
