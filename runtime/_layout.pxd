# cython: language_level=3
"""The shared-memory format of a runtime's region: every word, who writes it, every value it may take.

    offset 0   arena_t            sizes and offsets of what follows; written once, before anyone else looks
    slots      slot_t + ring + outbox + leases + bounce, one stride per slot
    words      one a64_t per extent: the only truth about who owns it
    extents    EXTENT bytes each: where blocks live

Words and extents are laid out for all that the region may ever hold; the first arena_t.extents have memory,
the others are a hole in the file, as are slots that were not needed yet. See _growth.pyx.

Offsets count from the start of the region's data. Nothing here is a pointer, so every process may map
the region where it likes. A word that two processes write has its protocol written beside it.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._atomics cimport a32_t, a64_load_relaxed, a64_store_relaxed, a64_t


cdef extern from *:
    uint32_t __builtin_clzll(uint64_t) noexcept nogil


cdef enum:
    LAYOUT_VERSION = 7
    PAGE = 4096
    EXTENT = 4096           # bytes of one extent: a page, so that a block can be mapped by itself
    INLINE_BYTES = 320      # bytes of payload that fit into the lease entry itself
    NOTE_BYTES = 69         # bytes of the note of a report
    MAX_LEASES = 256        # entries of a lease table, at most
    BUCKETS = 16            # of a histogram of times: 0: up to 1.024 µs, k: up to 4^k times that, 15: longer
    TIMED = 64              # of calls one in so many is timed from its submission to its start
    NO_SLOT = 0xFFFFFFF     # in an extent word: owned by the host, no slot


# ---- extent words: {state 3 | field 28 | tag 33} ---------------------------------------------------
# field: the owner's slot, or for X_TAIL the index of the head. The tag is raised when an extent is
# taken, so a stale reference {block, tag} fails. A block is a head and the X_TAIL words right behind it
# that name that head: its length is read from the words, stored nowhere.
#
#   FREE    -> CLAIM(s)        taker, CAS on the head first, then on the tails in ascending order
#   FREE    -> TAIL(h)         the taker that holds CLAIM on h
#   CLAIM   -> PRIVATE(s)      that taker, when the run is whole (a host's block: -> HOST at once)
#   PRIVATE -> PUBLISHING(s)   a worker, before it writes the record that names the block
#   PUBLISHING(s) -> HOST      the host only, with the record's tag
#   PRIVATE, HOST -> FREEING   the owner; then tails -> FREE in descending order, the head -> FREE last
#   CLAIM(s), PRIVATE(s), PUBLISHING(s), FREEING(s) -> FREE   the host's sweep of a dead slot s
#   HOST, TAIL -> HOLE         the host's trim, when it has given the memory of a run that it took back
#   HOLE    -> FREE            the host's growth, when it has memory again
#
# Killed at any instruction, the head says whose run it is, and the tails are a prefix of the run.
cdef enum:
    X_FREE = 0
    X_CLAIM = 1
    X_PRIVATE = 2
    X_PUBLISHING = 3
    X_HOST = 4
    X_FREEING = 5
    X_TAIL = 6
    X_HOLE = 7              # no memory behind it: to those who take, not free


# ---- lease words: {state 3 | item 21 | tag 40} -------------------------------------------------------
# item: the index of the item that runs, 0 for a single call. It is in the word so that a kill meant for
# item i can never hit item i + 1: the worker moves on by CAS.
#
#   FREE -> LEASED             host: the entry is filled, the tag raised
#   LEASED -> FREE             host: taken back or cancelled
#   LEASED -> RUNNING(0)       worker: claimed, before it reads anything
#   RUNNING(i) -> RUNNING(i+1) worker: item i is finished
#   RUNNING(i) -> DONE(j)      worker: j items were run; the result words are filled
#   RUNNING(i) -> KILLED(i)    host: deadline or cancel; it then kills the process
#   DONE -> FREE               host: harvested
#   KILLED, RUNNING -> FREE    host, in the sweep, once the process's death is confirmed
cdef enum:
    L_FREE = 0
    L_LEASED = 1
    L_RUNNING = 2
    L_DONE = 3
    L_KILLED = 4

# lease_t.kind
cdef enum:
    KIND_CALL = 0           # one call: the frame holds one item
    KIND_CHUNK = 1          # several items of a map: one function, an item each

# where a payload is (lease_t.where, lease_t.out_where)
cdef enum:
    AT_NOWHERE = 0
    AT_INLINE = 1           # in lease_t.inline_
    AT_BLOCK = 2            # in the block that body/out_body names
    AT_BOUNCE = 3           # travels by value, piece by piece, through the slot's bounce block

# lease_t.flags, written by the host at the lease
cdef enum:
    F_PRIVATE_VIEW = 1      # another attempt may follow: the worker must not write into the original
    F_TIMED = 2             # an item has a deadline: the clock is started for each


# ---- reports: what the user's code says of its progress -----------------------------------------------
# lease_t.reported counts the reports of the lease; report n lies in reports[n & 1]. The worker fills the
# place of n + 1, then raises the count: so it never writes over the newest whole report, and killed at any
# instruction it leaves either the one before or the new one. A reader copies the place of n and looks at the
# count again: if that has not moved, the copy is whole, since all that was written meanwhile went to the
# other place. If it has, the reader takes the newer one, a bounded number of times; nobody waits for anybody.

# report_t.done_kind, total_kind
cdef enum:
    V_NONE = 0              # none was given
    V_INT = 1               # an int64_t
    V_FLOAT = 2             # a double

ctypedef struct report_t:
    uint64_t done           # the bits of the value. Worker, as the rest
    uint64_t total
    unsigned char done_kind
    unsigned char total_kind
    unsigned char note_bytes
    char note[NOTE_BYTES]   # UTF-8, cut between two characters


ctypedef struct lease_t:
    a64_t word              # the lease word, above
    a64_t started           # monotonic ns at which the user's code began; 0: the clock stands. Worker
    uint64_t task           # the host's number of the task, for messages. Host
    uint64_t fn             # the function's id, > 0. Host
    uint64_t fn_body        # offset of the block that holds the function's pickle, 0: leads the frame. Host
    uint64_t fn_bytes       # its length. Host
    uint32_t kind           # KIND_*. Host
    uint32_t attempt        # 1 for the first. Host
    uint32_t flags          # F_PRIVATE_VIEW, F_TIMED. Host
    uint32_t where          # AT_* of the arguments' frame. Host
    uint64_t body           # offset of the arguments' block. Host
    uint64_t body_tag       # and its tag
    uint64_t body_bytes     # bytes of the arguments' frame. Host
    uint32_t out_where      # AT_* of the result's frame. Worker, before DONE
    uint32_t spare2
    uint64_t out_body       # offset of the result's block. Worker, before DONE
    uint64_t out_tag        # and its tag
    uint64_t out_bytes      # bytes of the result's frame
    int64_t out_ns          # ns that the items of this lease ran, in all
    a64_t reported          # reports of this lease so far, see above. Host, 0 at the lease; then the worker
    report_t reports[2]
    uint64_t submitted      # monotonic ns at which the call was accepted, 0: not timed. Host; then the worker
    char inline_[INLINE_BYTES]  # the arguments' frame; after the claim the worker may put the result's here


# ---- the outbox: records from worker to host ---------------------------------------------------------
cdef enum:
    R_DONE = 1              # entry: the lease is DONE
    R_PARTIAL = 2           # entry: `count` items more are finished, their frame is in the block
    R_UNKEEP = 3            # body, tag: the last view of that block is gone
    R_ASK = 4               # entry: the worker waits for `bytes` of the arguments' frame from `count` on
    R_OFFER = 5             # entry: `bytes` of the result's frame from `count` on are in the bounce block
    R_KEEP = 6              # body, tag: a view of that block outlives the lease that ends next

ctypedef struct record_t:
    uint32_t kind           # R_*
    uint32_t entry          # number of the lease entry
    uint64_t word           # the lease word when the record was written: its tag says which lease
    uint64_t body           # offset of a block
    uint64_t tag            # and its tag
    uint64_t bytes          # bytes of the frame in it, or of the piece
    uint64_t count          # items; for R_ASK and R_OFFER the offset of the piece in the frame


# ---- Parking -------------------------------------------------------------------------------------------
# Whoever waits (a worker for its ring, the host for the outboxes) watches the memory for a moment, then
# sleeps. Its parked word says which, so that only one that sleeps is woken:
#
#   waiter:    parked = P · fence · look once more · sleep · parked = AWAKE · look at everything
#   producer:  put · fence · parked != AWAKE?  then swap it to AWAKE, and who wins wakes the waiter
#
# Of a put and a look that cross, one sees the other: that is what the two fences are for (each stands
# between a store and a load of another word). That holds also when the word goes from one P to another, or
# when the swap fails. AWAKE means: a wake-up is on its way, or the waiter looks again before it sleeps. A
# producer that is killed between swap and wake-up leaves a sleeper behind: the host is then woken by that
# death, or by its own backstop; for a stopped one there is the rescan.
cdef enum:
    AWAKE = 0
    PARKED = 1              # asleep in zmq: send a message; or a lane, whose main thread is: send that one
    PARKED_HERE = 2         # a thread of the host that needs a result sleeps on this very word: futex_wake


# ---- slots -------------------------------------------------------------------------------------------
# A worker has arena_t.threads slots: slot g*threads + k is lane k of process g. Each is one consumer with a
# ring, an outbox and leases of its own. What is said of the process (phase, failure_bytes) stands in lane 0.
#
# slot_t.state, written by the host alone, for those who look from outside (the host itself goes by its own
# copy): S_FREE -> S_LIVE -> S_DYING -> S_FREE, the last step at the end of the sweep
cdef enum:
    S_FREE = 0
    S_LIVE = 1
    S_DYING = 2

# slot_t.phase, written by the worker alone
cdef enum:
    P_BOOT = 0              # forked, not ready yet
    P_READY = 1             # takes leases
    P_FAILED = 2            # the initializer or an import raised: the bounce block holds the pickle
    P_LEAVING = 3           # claims nothing more and exits of its own will

# bits of slot_t.control, written by the host alone
cdef enum:
    C_STOP = 1              # claim nothing more, finish the running item, exit

ctypedef struct slot_t:
    # line 0: the host's
    a32_t state             # S_*
    a32_t control           # C_* bits; PUB only says "look here"
    uint64_t incarnation    # counts the processes that lived in this slot: a message of an earlier one fails
    uint32_t number         # the worker's number, what users see
    uint32_t generation
    char pad0[40]
    # line 1: the host's
    a64_t ring_tail         # places written so far; a place names a lease: {tag 24 | entry 8}
    a64_t coming            # ns of CLOCK_MONOTONIC until which the host copies arguments of a lease. A hint
    char pad1[48]
    # line 2: the worker's
    a64_t ring_head         # places read so far
    char pad2[56]
    # line 3: the worker's
    a64_t outbox_tail       # records written so far
    char pad3[56]
    # line 4: the host's
    a64_t outbox_head       # records read so far
    char pad4[56]
    # line 5: the worker's
    a32_t phase             # P_*
    a32_t running           # 1 + the entry that is claimed, 0: idle. A hint for deadlines and workers()
    a64_t tasks_done        # items finished; never goes backwards
    uint64_t failure_bytes  # length of the pickle in the bounce block at P_FAILED
    a64_t rescued           # times that leases were found by a repeated hint, the first one being lost
    a64_t busy              # ns in user code, of items that have ended; never goes backwards
    char pad5[24]
    # line 6: the host's. The bounce block belongs to the worker until it asks or offers, then to the host
    # until it has moved `turn`. One record is out at a time; see receive and offer in _lease.pyx
    a32_t turn              # futex: the number of pieces the host has served
    char pad6[60]
    # line 7: the worker's, but whoever tells it takes the word back; see "Parking" above
    a32_t parked
    char pad7[60]
    # lines 8 to 12: the worker's; how many items ran for how long, and calls waited. A kill loses one of them
    a64_t ran[BUCKETS]
    a64_t waited[BUCKETS]
    a64_t waited_ns         # in all
    char pad8[56]


ctypedef struct arena_t:
    uint64_t magic
    uint32_t version
    uint32_t slots          # slots in the table
    uint32_t leases         # entries per lease table; a power of two
    uint32_t outbox         # records per outbox; a power of two
    uint64_t bounce_bytes   # bytes of a slot's bounce block
    uint64_t slots_at       # offset of the first slot
    uint64_t slot_stride    # bytes from one slot to the next
    uint64_t words_at       # offset of the extent words
    uint64_t extents_at     # offset of extent 0
    a64_t extents           # how many there are by now. Host, which goes by its own count; it only rises
    uint32_t lanes          # 1: parked words are heeded; 0: every put is announced by a message
    uint32_t spin           # ns that a waiter watches the memory before it sleeps
    uint64_t capacity       # extents that are laid out
    uint64_t least          # extents that it began with: if these are all, it never grows
    uint32_t threads        # slots of one process, its lanes: neighbours, opened and swept together
    uint32_t spare
    char pad0[PAGE - 104]
    a64_t frees             # blocks freed so far, by anyone: who found no room waits for it to move
    char pad1[56]
    a32_t parked            # the host's; see "Parking" above
    char pad2[60]
    a64_t wanted            # bytes that a worker finds no room for. Workers; the host answers with 0
    char pad3[56]


cdef inline uint64_t word_of(uint64_t state, uint64_t field, uint64_t tag) noexcept nogil:
    return state | (field << 3) | (tag << 31)

cdef inline uint64_t x_state(uint64_t w) noexcept nogil:
    return w & 7

cdef inline uint64_t x_field(uint64_t w) noexcept nogil:
    return (w >> 3) & 0xFFFFFFFULL

cdef inline uint64_t x_tag(uint64_t w) noexcept nogil:
    return w >> 31

cdef inline uint64_t lease_word(uint64_t state, uint64_t item, uint64_t tag) noexcept nogil:
    return state | (item << 3) | (tag << 24)

cdef inline uint64_t l_state(uint64_t w) noexcept nogil:
    return w & 7

cdef inline uint64_t l_item(uint64_t w) noexcept nogil:
    return (w >> 3) & 0x1FFFFFULL

cdef inline uint64_t l_tag(uint64_t w) noexcept nogil:
    return w >> 24


cdef inline uint32_t bucket_of(uint64_t ns) noexcept nogil:
    """Of a histogram of times."""
    cdef uint32_t bits = 64 - __builtin_clzll(ns | 1)
    return 0 if bits <= 10 else min((bits - 9) // 2, <uint32_t>(BUCKETS - 1))

cdef inline void count_time(a64_t *row, uint64_t ns, uint64_t count) noexcept nogil:
    """So many of this length. For the one thread that writes there."""
    cdef a64_t *at = &row[bucket_of(ns)]
    a64_store_relaxed(at, a64_load_relaxed(at) + count)
