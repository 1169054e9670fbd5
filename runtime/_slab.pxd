# cython: language_level=3
"""Equal blocks of a region, taken and given back by any thread of any process.

What lies in the region, from a 64-byte boundary at its high end:

    pool_header     geometry, futex, owner table
    words           one a64_t per block: the only truth about it. Packed, because a search reads them all;
                    processes begin to search in different lines
    blocks          `stride` bytes each

A block's word is {owned 1 | row 12 | tag 51}:

    FREE(tag)           -> OWNED(row, tag + 1)  pool_take, by a process that has claimed that row
    OWNED(row, tag)     -> FREE(tag)            pool_give by the owner, with the word it took; or
                                                pool_sweep by anyone, when the process in that row is dead

So at every instruction a block is free, or owned by a process that can be asked whether it lives. The
tag makes each take unique: who holds an old word loses the CAS.

An owner row is 0 or the identity of a process (_identity.pxd):

    0 -> identity       pool_enroll, by that process, before its first take
    identity -> 0       pool_sweep by anyone, when that process is dead and owns no block any more
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport (
    a32_load_relaxed, a32_load_seq_cst, a32_store_relaxed, a32_t,
    a64_cas_acq_rel, a64_cas_seq_cst, a64_load_relaxed, a64_t,
)


cdef enum:
    POOL_VERSION = 1            # raised with every change of the format
    SLICE_NS = 50000000         # ns, the longest sleep: what a lost wake-up or an unswept owner costs at most
    OWNER_ROWS = 4096           # processes that can use one pool at a time
    RECENT = 32                 # blocks that a process remembers to have given back

cdef struct pool_about:         # line 0, written once, before region_pool.at names the pool
    uint64_t magic              # pool_magic()
    uint64_t version            # POOL_VERSION
    uint64_t capacity           # blocks
    uint64_t block_bytes        # usable bytes of a block
    uint64_t stride             # bytes from one block to the next
    uint64_t namespace          # inode of the PID namespace in which the rows mean something; 0: unknown
    uint64_t spare[2]

cdef struct pool_futex:         # line 1
    # Raised by a giver or sweeper that saw `sleepers`; who waits for a block sleeps on it.
    a32_t sequence
    # 1: somebody may sleep. Set by waiters, cleared by a giver that found nobody asleep.
    a32_t sleepers
    uint32_t spare[14]

cdef struct pool_header:
    pool_about about
    pool_futex futex
    a64_t owners[4096]          # OWNER_ROWS rows


ctypedef struct pool_t:         # one process's access to a pool; in private memory
    pool_header *head           # in the region
    a64_t *words                # in the region
    char *blocks                # block 0, in the region
    uint64_t capacity           # blocks, as checked at attach
    uint64_t block_bytes        # usable bytes of a block
    uint64_t stride             # bytes from one block to the next
    # Who may take with this struct: valid while equal to identity_word(). Set after `row`.
    a64_t identity
    a64_t row                   # OWNED | row, as it stands in a word of ours
    # Hints, written by any thread of the process without care: a lost or doubled one costs a search.
    a32_t depth                 # entries in `recent`, 0 .. RECENT
    a32_t cursor                # where the next search begins, < capacity
    a32_t recent[32]            # blocks given back last, the latest on top: their pages are warm


cdef enum pool_status:
    POOL_OK = 0
    POOL_STALE = -1             # the word has changed: that block is not held with this word any more
    POOL_FULL = -2              # all rows of the owner table belong to living processes


# ---- for nogil code. The caller keeps the region open ------------------------------------------------

# Claim a row for this process. To be called once per process, and again after fork:
# `if a64_load_acquire(&p.identity) != a64_load_relaxed(identity_word())`. POOL_OK or POOL_FULL.
cdef pool_status pool_enroll(pool_t *p) noexcept nogil
# What pool_take does when its hint fails. -1 means: at one moment of the search no block was free.
cdef int64_t pool_search(pool_t *p, uint64_t *held) noexcept nogil
# After a take that found none: free the blocks of dead processes, and look again. Makes system calls.
cdef int64_t pool_recover(pool_t *p, uint64_t *held) noexcept nogil
# pool_take, then pool_recover.
cdef int64_t pool_take_or_sweep(pool_t *p, uint64_t *held) noexcept nogil
# Free the blocks of dead processes; True if a search may now find a block. May run in several processes at
# once, may be killed anywhere.
cdef bint pool_sweep(pool_t *p) noexcept nogil
# Wait up to `patience` ns, but at most 50 ms, for a block. Its index or -1.
cdef int64_t pool_wait(pool_t *p, uint64_t *held, int64_t patience) noexcept nogil
cdef void pool_wake(pool_t *p) noexcept nogil


cdef inline uint64_t pool_magic() noexcept nogil:
    return 0x314C4F4F504D5452ULL

cdef inline bint word_owned(uint64_t w) noexcept nogil:
    return w >> 63 != 0

cdef inline uint64_t word_row(uint64_t w) noexcept nogil:
    return (w >> 51) & 0xFFFULL

cdef inline uint64_t word_tag(uint64_t w) noexcept nogil:
    return w & 0x7FFFFFFFFFFFFULL


cdef inline int64_t pool_take(pool_t *p, uint64_t *held) noexcept nogil:
    """Take a free block: its index, and in `held` the word that gives it back. -1: none was free."""
    cdef uint32_t depth = a32_load_relaxed(&p.depth)
    cdef uint32_t i
    cdef uint64_t w, taken
    if depth != 0:
        i = a32_load_relaxed(&p.recent[depth - 1])
        a32_store_relaxed(&p.depth, depth - 1)
        # Relaxed: only the CAS counts. A1 pairs with R1 in pool_give: we see what the last owner wrote.
        w = a64_load_relaxed(&p.words[i])
        taken = a64_load_relaxed(&p.row) | word_tag(w + 1)
        if not word_owned(w) and a64_cas_acq_rel(&p.words[i], w, taken):      # A1
            held[0] = taken
            return i
    return pool_search(p, held)


cdef inline pool_status pool_give(pool_t *p, uint64_t i, uint64_t held) noexcept nogil:
    """Give block `i` back, with the word that pool_take returned. POOL_STALE: it is not held so."""
    cdef uint32_t depth
    # R1. Sequentially consistent: W1, the load of `sleepers`, may not pass it (see pool_wait).
    if not a64_cas_seq_cst(&p.words[i], held, word_tag(held)):                  # R1
        return POOL_STALE
    depth = a32_load_relaxed(&p.depth)
    if depth < RECENT:
        a32_store_relaxed(&p.recent[depth], <uint32_t>i)
        a32_store_relaxed(&p.depth, depth + 1)
    else:
        a32_store_relaxed(&p.recent[RECENT - 1], <uint32_t>i)
    if a32_load_seq_cst(&p.head.futex.sleepers):                                # W1
        pool_wake(p)
    return POOL_OK


# ---- for who sets up a pool ------------------------------------------------------------------------

# Write an empty pool over whatever is there: old data, or the work of a formatter that was killed.
cdef void pool_format(char *start, pool_t *p, uint64_t namespace) noexcept nogil
cdef uint64_t pool_count_free(pool_t *p) noexcept nogil
