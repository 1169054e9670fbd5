# cython: language_level=3
"""A map key -> bytes in a region, read and written by any thread of any process, without a lock.

What lies in the region, each part from a 64-byte boundary:

    map_header      geometry, limits, futex
    rows            one map_row per process that uses the map
    looked          one a64_t per row: what its process watches, see "Tombstones"
    changes         one a64_t per GROUP buckets: raised after a change of one, if somebody watches; a hint, as
                    one may be killed between the two
    words           one a64_t per unit: the only truth about who owns it
    buckets         one map_bucket each; their number is a power of two and never changes
    units           `unit_bytes` each: blocks are runs of them

Blocks. A block is a head unit and the TAIL units right behind it that name the head. Its bytes are a
map_block, the key, padding to 8 bytes, the value. A unit's word is {tag 37 | field 24 | state 3}:

    FREE(tag)       -> TAKEN(row, tag + 1)    a taker, of a head
    FREE(tag)       -> TAIL(head, tag + 1)    the taker that holds TAKEN on the head, ascending
    TAKEN(row, t)   -> PUBLISHED(t), LOCK(t)  that owner, when an entry (or a chain) names the block; LOCK if
                                            it is
                                              a lock's
    PUBLISHED(t), LOCK(t) -> TAKEN(row, t)    who frees a block of several units that nothing names
    PUBLISHED(t), LOCK(t) -> FREE(t)          who frees a block of one unit that nothing names
    TAIL(head, t)   -> FREE(t)                the owner of the head, descending
    TAKEN(row, t)   -> FREE(t)                the owner, when its tails are free
    TAKEN(r, t)     -> TAKEN(me, t)           a sweeper, when the process in row r is dead

TAKEN says only "that process must decide": while it writes the block and while it frees it. Killed at any
instruction, the tails are a prefix of the run, and a sweeper that has made the head its own decides by one
question: does something name the block? Yes: PUBLISHED. No: free. A block is complete before anything names
it.

Entries. A bucket has 5 cells, and a chain of chunks with 11 more each: cells never move, chunks are
never freed. A cell is {version 40 | block 24}: the block's number + 1, or 0 for an empty cell. Versions come
from the bucket's counter, taken after the cell was read, so a cell's only grow, also over deletions; and no
two cell words are ever equal.

    {v, a}  -> {v', b}      replace: a set, add, compare_and_set of a key that is there
    {v, a}  -> {v', t}      somebody watches: a delete, or an item whose time is over, leaves a tombstone
    {v, a}  -> {v', 0}      nobody does; or a tombstone that all have seen
    {v, 0}  -> {v', b}      only as the bucket's pending insertion says, see below

A key must not get two cells, so insertions of a bucket go one by one through its `pending` word,
{tag 30 | cell 10 | block 24}:

    {t, ., 0} -> {t + 1, cell, b}   who saw tag t, then looked at all cells and did not find the key, and
                                    has seen this cell empty
    {t, c, b} -> {t, c, 0}          anybody, when cell c has got b

Whoever meets a pending insertion finishes it. Helpers read the cell, then `pending` again: if that still says
so, an empty cell is one that has not got b yet; for nobody empties the cell of a pending insertion before he
has ended that. A helper that is late loses the CAS by the version in its cell word. So a writer that is
killed, or stopped, hinders nobody, and what it has begun to insert is there or is not.

Who unnames a block frees it, if it is PUBLISHED by then; if it is still TAKEN, its owner moves it on to
PUBLISHED, *then* looks whether it is still named, and frees it if not. Either the one or the other sees both.

Readers write nothing: they read a cell, copy, and read the cell again. If it is the same word, the block was
named all the while, and nobody has touched it.

Pins. Who wants a block to stay (a view; a lock while it is taken) writes {nonce 40 | block 24} into his row,
fence, and looks at the cell again. Who frees: unname, fence, look at all pins, leave what is pinned. Unpin:
clear, fence, and free the block if it is PUBLISHED, unnamed, and pinned by nobody else. The nonce comes from
the process's identity, so that a late sweeper cannot clear the pin of the row's next process.

Tombstones. A watch must see a key that was set and deleted between two of its looks, so what goes while
somebody watches (`watching` is odd) is replaced by a block with the key alone, over since BURIED: reads take
it for absent, a set replaces it. It is emptied when every watch has begun a look after somebody had seen it
named: `looked` of a row is the ns at which the last look of the watches of one mapping began, of the one that
is behind the others; 0: none is open. When nobody watches any more, it is what else is over; when room is
short, it goes at once, and a watch that never saw the key does not hear of it.

    looked    0 -> ns               a mapping of the row's process, CAS; it alone moves it then, ns -> ns', 0
              ns -> 0               a sweeper, if the row still is a dead one's
    watching  w -> w + 1 or + 2     who opens a watch, after `looked`: to an odd number that is new
              odd w -> w + 1        who read w, then found no row that has looked

Rows. `owner`: 0 -> identity by that process, CAS; identity -> 0 by a sweeper, CAS, when that process is dead
and no word, lock or pin names its row any more.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from runtime._atomics cimport (
    a32_t, a64_load_acquire, a64_load_relaxed, a64_t, fence_acquire, words_load,
)


cdef enum:
    MAP_VERSION = 2             # raised with every change of the format
    UNIT_BYTES = 128            # of small maps; larger ones double it until BLOCKS suffice
    MAX_UNITS = 0xFFFFF0        # 24 bits of a cell, but 0
    MAX_KEY = 1024              # bytes
    PINS = 7                    # of a process
    CELLS = 5                   # of a bucket
    GROUP = 64                  # buckets that have one counter of changes
    CHUNK_CELLS = 11            # of a chunk
    MAX_CELLS = 1024            # of a bucket with its chain: 10 bits of `pending`
    RECENT = 32                 # units that a process remembers to have freed

cdef enum:                      # unit words
    U_FREE = 0
    U_TAKEN = 1
    U_PUBLISHED = 2
    U_TAIL = 3
    U_LOCK = 4

cdef enum:
    BURIED = 1                  # map_block.expires of a tombstone

cdef enum:                      # map_block.kind: what a key means; each has keys of its own
    K_VALUE = 1
    K_LOCK = 2                  # a user's lock
    K_ONCE = 3                  # the lock of get_or_set
    K_CHUNK = 4                 # cells of a bucket's chain

cdef struct map_about:          # written once, before region_state.at names the map
    uint64_t magic              # map_magic()
    uint64_t version            # MAP_VERSION
    uint64_t namespace          # inode of the PID namespace in which the rows mean something; 0: unknown
    uint64_t units              # how many
    uint64_t unit_bytes         # bytes of each, a power of two
    uint64_t buckets            # how many, a power of two
    uint64_t rows               # how many
    uint64_t max_items          # 0: no limit

cdef struct map_header:
    map_about about             # line 0
    # line 1: bits of rows (modulo 64) whose process has ever pinned; set before the first pin, never cleared
    a64_t pinners
    a32_t high                  # rows from here on were never used; raised before a row is claimed
    uint32_t spare1[13]
    # line 2: items, if there is a limit. Raised before an insertion, lowered after an erasure: too high by
    # those who were killed in between, until the limit is reached and somebody counts.
    a64_t items
    a64_t cursor                # bucket where the next look for what is over begins
    uint64_t spare2[6]
    # line 3: changes. `sequence` is raised by a writer that saw `watchers`; who watches sleeps on it.
    a32_t sequence
    a32_t watchers              # 1: somebody may sleep. Cleared by a writer that found nobody
    a64_t watching              # odd: some process has a watch open
    uint64_t spare3[6]

cdef struct map_row:
    a64_t owner                 # 0, or an identity
    a64_t pins[7]               # 0, or {nonce 40 | block 24}; written by that process, and by the sweep

cdef struct map_bucket:
    a64_t counter               # the version given last, 64 bits: monotone; cells keep its low 40
    a64_t pending               # the insertion under way
    a64_t next                  # 0, or the first chunk's block + 1; set once
    a64_t cells[5]

cdef struct map_block:          # written by its owner before it is named; then nobody writes it
    uint64_t hash               # of key and kind
    uint32_t key_bytes
    uint32_t kind
    uint64_t value_bytes
    int64_t expires             # ns of CLOCK_MONOTONIC; 0: never; BURIED

cdef struct map_chunk:          # in a block of one unit
    map_block block             # hash: of the key for which it was made, so it leads to the bucket
    a64_t next                  # as in map_bucket
    a64_t cells[11]

ctypedef struct map_t:          # one process's access to a map; in private memory
    map_header *head
    map_row *rows
    a64_t *looked
    a64_t *changes
    a64_t *words
    map_bucket *buckets
    char *units
    uint64_t count              # units
    uint64_t unit_bytes
    uint64_t mask               # buckets - 1
    uint64_t row_count
    uint64_t max_items
    a64_t identity              # who may write with this struct: valid while equal to identity_word()
    a64_t row                   # number of its row
    # Hints, written by any thread of the process without care: a lost or doubled one costs a search.
    a32_t depth                 # entries in `recent`
    a32_t cursor                # where the next search begins
    a32_t writes                # counts to the next look for what is over
    a32_t recent[32]            # single units freed last, the latest on top

ctypedef struct map_key:
    const char *data
    uint64_t bytes
    uint64_t hash
    uint32_t kind

ctypedef struct map_place:      # where a key is, or could be
    a64_t *cell                 # the key's, when found
    uint64_t word               # what it was
    uint64_t block
    a64_t *vacant               # an empty cell, or NULL
    uint64_t vacant_at          # its number in the bucket

cdef enum map_status:
    MAP_OK = 0
    MAP_ABSENT = 1              # no such key
    MAP_OTHER = 2               # the value is not the one expected
    MAP_NOT_NUMBER = 3          # it has not 8 bytes
    MAP_OVERFLOW = 4
    MAP_NO_ROOM = 5             # no run of free units is long enough
    MAP_MANY_ITEMS = 6          # max_items are there
    MAP_MANY_CELLS = 7          # a bucket's chain is at its end
    MAP_NO_ROW = 8              # all rows belong to living processes
    MAP_AGAIN = 9               # it changed while it was read


cdef inline uint64_t groups_of(uint64_t buckets) noexcept nogil:
    return (buckets + GROUP - 1) // GROUP

cdef inline uint64_t map_magic() noexcept nogil:
    return 0x314554415453544DULL

cdef inline uint64_t unit_state(uint64_t w) noexcept nogil:
    return w & 7

cdef inline uint64_t unit_field(uint64_t w) noexcept nogil:
    return (w >> 3) & 0xFFFFFF

cdef inline uint64_t unit_word(uint64_t state, uint64_t field, uint64_t tagged) noexcept nogil:
    """A word with the tag of `tagged`."""
    return (tagged & 0xFFFFFFFFF8000000ULL) | (field << 3) | state

cdef inline uint64_t unit_raised(uint64_t w) noexcept nogil:
    return w + (<uint64_t>1 << 27)

cdef inline uint64_t cell_block(uint64_t w) noexcept nogil:
    """Number + 1 of the block, or 0."""
    return w & 0xFFFFFF

cdef inline uint64_t cell_version(uint64_t w) noexcept nogil:
    return w >> 24

cdef inline map_block *block_at(map_t *m, uint64_t b) noexcept nogil:
    return <map_block *>(m.units + b * m.unit_bytes)

cdef inline char *block_value(map_block *block) noexcept nogil:
    return <char *>block + sizeof(map_block) + ((block.key_bytes + 7) & ~<uint64_t>7)

cdef inline uint64_t mixed(uint64_t h) noexcept nogil:
    h ^= h >> 32
    h *= 0xD6E8FEB86659FD93ULL
    h ^= h >> 32
    h *= 0xD6E8FEB86659FD93ULL
    return h ^ (h >> 32)

cdef inline uint64_t hash_of(const char *data, uint64_t n, uint32_t kind) noexcept nogil:
    """Eight bytes a step; each is multiplied and folded, so that all bits reach all bits."""
    cdef uint64_t h = 0x9E3779B97F4A7C15ULL * (n + 1) ^ kind, part
    while n >= 8:
        memcpy(&part, data, 8)
        h = (h ^ part) * 0xFF51AFD7ED558CCDULL
        h ^= h >> 32
        data += 8
        n -= 8
    if n:
        part = 0
        while n:
            n -= 1
            part = part << 8 | <unsigned char>data[n]
        h = (h ^ part) * 0xFF51AFD7ED558CCDULL
    return mixed(h)

cdef inline map_key map_key_of(const char *data, uint64_t n, uint32_t kind) noexcept nogil:
    cdef map_key k
    k.data = data
    k.bytes = n
    k.kind = kind
    k.hash = hash_of(data, n, kind)
    return k

cdef inline bint block_holds(map_t *m, uint64_t b, map_key *k) noexcept nogil:
    """That block has this key. A guess until its cell was read again: it may be overwritten meanwhile."""
    cdef map_block *block
    if b >= m.count:
        return False
    block = block_at(m, b)
    return (
        block.hash == k.hash and block.key_bytes == k.bytes and block.kind == k.kind
        and sizeof(map_block) + k.bytes <= (m.count - b) * m.unit_bytes
        and memcmp(<char *>block + sizeof(map_block), k.data, k.bytes) == 0
    )

cdef inline bint look_at_cell(map_t *m, a64_t *cell, uint64_t at, map_key *k,
                              map_place *place) noexcept nogil:
    cdef uint64_t w
    cdef bint holds
    while True:
        w = a64_load_acquire(cell)
        if cell_block(w) == 0:
            if place.vacant == NULL:
                place.vacant = cell
                place.vacant_at = at
            return False
        holds = block_holds(m, cell_block(w) - 1, k)
        fence_acquire()
        if a64_load_relaxed(cell) == w:
            if holds:
                place.cell = cell
                place.word = w
                place.block = cell_block(w) - 1
            return holds

cdef inline bint still(map_place *place) noexcept nogil:
    """What was read from the block until now is right."""
    fence_acquire()
    return a64_load_relaxed(place.cell) == place.word

cdef inline void copy_out(char *to, const char *source, uint64_t n) noexcept nogil:
    """`to` and `source` are 8-aligned; others may overwrite `source`."""
    cdef uint64_t whole = n & ~<uint64_t>7, rest
    words_load(to, source, whole)
    if n != whole:
        words_load(&rest, source + whole, 8)
        memcpy(to + whole, &rest, n - whole)

cdef inline bint value_fits(map_t *m, uint64_t b, uint64_t key_bytes, uint64_t value_bytes) noexcept nogil:
    """A length that was read from the block lies in the region."""
    cdef uint64_t room = (m.count - b) * m.unit_bytes
    cdef uint64_t before = sizeof(map_block) + ((key_bytes + 7) & ~<uint64_t>7)
    return before <= room and value_bytes <= room - before
