# cython: language_level=3
"""What waits and who runs it: the host-private records, and the class that leases. See _leasing.pyx."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._extent cimport Arena, HostBlock
from runtime._frame cimport Frame
from runtime._future cimport Promise
from runtime._threads cimport DeadlineKeeper


# Task.state
cdef enum:
    T_WAITING = 0           # in the queue, or on its way there
    T_LEASED = 1            # a lease entry holds it
    T_OVER = 2              # its outcome was handed out
    T_CANCELLED = 3         # it was cancelled and never started


cdef class Span:
    """Consecutive items of a map, pickled together or one by one."""
    cdef readonly uint64_t first            # index in the map of the first one
    cdef readonly uint32_t count            # how many
    cdef readonly uint32_t attempts         # which attempt of theirs this is, from 1
    cdef uint32_t status                    # S_LIST, S_CALLS: part of `data`; S_VALUE: one item by itself
    cdef uint32_t start                     # position of the first one in the list
    cdef bytes data                         # a pickled list, shared with other parts of it
    cdef tuple item                         # of S_VALUE: (0, pickle, buffers, readonly)
    cdef bint alone                         # runs in a chunk by itself
    cdef readonly object shown              # how a note on its error names it; None: by its value

    cdef Span part(self, uint32_t offset, uint32_t count)
    cdef tuple framed(self)


cdef class Batch:
    cdef readonly object fn                 # FunctionRef
    cdef readonly object sink               # who gets the items' results
    cdef readonly int64_t timeout
    cdef readonly int priority
    cdef readonly bint retryable            # items may be run again
    cdef readonly bint retry_timeouts       # also after their timeout
    cdef uint32_t fixed                     # items per chunk, 0: adaptive
    cdef double ran_ns, ran_items           # time and number of items that ran, older ones count half as much
    cdef object pending                     # deque of Span
    cdef readonly uint64_t waiting          # items in it
    cdef bint queued, dropped

    cdef uint32_t chunk(self, uint32_t workers)
    cdef void measured(self, int64_t ns, uint64_t items)


cdef class Task:
    cdef readonly uint64_t number
    cdef readonly Promise future            # of a call; None for a chunk
    cdef readonly object fn                 # FunctionRef
    cdef readonly Batch batch               # of a chunk; None for a call
    cdef readonly list spans                # of a chunk: what it holds
    cdef readonly uint64_t count            # items: 1 for a call
    cdef readonly uint32_t attempt          # times it was leased and claimed, this one included
    cdef readonly int priority
    cdef public uint32_t retries            # further attempts that are allowed
    cdef readonly int64_t timeout
    cdef bytes data                         # of a call: its pickle; None: it is in `block`
    cdef bint plain                         # `data` is no pickle, see _plain
    cdef tuple buffers, readonly            # out-of-band buffers of it, frozen
    cdef HostBlock block                    # the frame, if it is in the region already
    cdef HostBlock fn_block
    cdef Frame by_value                     # the frame, while it travels through the bounce block
    cdef object inbound                     # bytearray: the result's frame, arriving by value
    cdef uint64_t inbound_got
    cdef uint32_t slot, entry
    cdef uint64_t tag
    cdef uint64_t delivered                 # items of the chunk whose results were taken
    cdef int state
    cdef bint woke                          # its worker had to be woken by a message
    cdef bint private_view                  # another attempt may follow: it must see the original
    cdef bint retry_timeouts                # after its deadline too, once the killed process is dead
    cdef str reason                         # why it was killed, "" for the deadline

    cdef Span one(self, uint64_t item)


cdef class SlotTable:
    cdef list tasks                         # entry -> Task or None
    cdef list free                          # entry numbers
    cdef dict kept                          # (head, tag) -> HostBlock that a worker's view still needs
    cdef set early                          # (head, tag) released before its lease was harvested
    cdef uint32_t inflight                  # leases out
    cdef uint32_t chunks                    # of them, chunks
    cdef uint64_t untold                    # tasks and items leased since the worker was told last
    cdef bint ready, draining
    cdef bint acted                         # the rescan took results in ahead of their hint
    cdef bint suspect                       # leases were taken back from it: it did not look at them
    cdef uint64_t suspect_at                # ring_head at that time
    # What the host writes into the slot is decided from these, never read back: a worker may run wild.
    cdef uint32_t state                     # S_*
    cdef uint64_t incarnation, ring_tail, outbox_head


cdef class Leasing:
    cdef readonly Arena arena
    cdef readonly DeadlineKeeper keeper
    cdef list slots                         # SlotTable
    cdef dict levels                        # priority -> deque of Task and Batch
    cdef list order                         # priorities that have ever been used, highest first
    cdef object inbox                       # deque of Task, Batch and (bookkeeping) tuples
    cdef bint busy, closed, inert
    cdef uint64_t *tags                     # per slot and entry: the tag of its last lease
    cdef dict functions                     # function id -> HostBlock, in order of use
    cdef set announce                       # slots that got leases and have not been told
    cdef set repeat                         # slots to be told once more
    cdef int64_t starved_since              # monotonic ns: a task at the head found no room; 0: none does
    cdef uint64_t full_at                   # arena.frees when patience ran out last
    cdef bint was_full
    cdef uint64_t numbers
    cdef readonly uint64_t waiting          # tasks and items not leased
    cdef readonly uint64_t leased           # tasks and items leased, running included
    cdef readonly uint64_t by_lane          # of those leased so far, found by a worker that was awake
    cdef readonly uint64_t by_message       # and announced by a message
    cdef readonly uint64_t rescued, malformed
    cdef double call_ns                     # running mean of a call's time; 0: unknown
    cdef readonly uint64_t accepted         # tasks and items ever taken on
    cdef readonly uint64_t vanished         # of them, cancelled before they started, or dropped
    cdef readonly uint64_t done, failed     # of them, ended; what the collector says
    cdef list outcomes                      # what the collector has not taken yet
    cdef Task sleeping_for                  # a thread sleeps on the parked word until this task is over
    cdef dict stuck                         # slot -> what the last rescan saw

    cdef int enqueue(self, entry, bint front) except -1
    cdef int forget(self, Task task) except -1
    cdef void over(self, Task task, int state) noexcept
    cdef int release(self, Task task) except -1
    cdef int64_t pick(self, uint32_t depth) except -2
    cdef int pump(self) except -1
    cdef Task cut(self, Batch batch, uint32_t workers)
    cdef int uncut(self, Task task) except -1
    cdef int put_back(self, Task task, uint64_t first, int64_t without) except -1
    cdef HostBlock function_block(self, fn)
    cdef uint32_t depth(self) noexcept
    cdef bint drain_all(self) except -1
    cdef bint starved(self)
    cdef bint lease(self, Task task, uint32_t index) except -1
    cdef int balance(self) except -1
    cdef list take_back(self, uint32_t index, uint32_t most)
    cdef int requeue(self, Task task) except -1
    cdef bint skipped(self, Task task) except -1
    cdef Frame framed(self, Task task)
    cdef uint32_t room(self, uint32_t index) except? 0xFFFFFFFF
    cdef bint publish(self, Task task, uint32_t index) except -1
