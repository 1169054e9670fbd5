# cython: language_level=3
"""What the host notes about work: items of maps, tasks, slots. See _records.pyx."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._arena cimport HostBlock
from runtime._frame cimport Frame
from runtime._future cimport Promise


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
    cdef readonly tuple deaths              # how earlier attempts died, a line each, the last ones; or None
    cdef uint32_t status                    # what `data` holds; S_VALUE: one item by itself
    cdef uint32_t start                     # position of the first one in the series
    cdef bytes data                         # a series, shared with other parts of it
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
    cdef bint ruthless                      # what runs of it is killed, too, when it is dropped
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
    cdef int64_t submitted                  # ns at which it was, if that is counted and it was not leased yet
    cdef object data                        # of a call: its pickle, see Frame; None: it is in `block`
    cdef bint plain                         # `data` is no pickle, see _plain
    cdef tuple buffers, readonly            # out-of-band buffers of it, frozen
    cdef tuple named                        # blocks whose offsets `data` names: they live as long
    cdef HostBlock block                    # the frame, if it is in the region already
    cdef HostBlock fn_block
    cdef Frame by_value                     # the frame, while it travels through the bounce block
    cdef object inbound                     # bytearray: the result's frame, arriving by value
    cdef uint64_t inbound_total             # bytes that it will have; all ones: the host has no memory for it
    cdef uint32_t slot, entry
    cdef uint64_t tag
    cdef uint64_t delivered                 # items of the chunk whose results were taken
    cdef int state
    cdef bint woke                          # its worker had to be woken by a message
    cdef bint private_view                  # another attempt may follow: it must see the original
    cdef bint retry_timeouts                # after its deadline too, once the killed process is dead
    cdef bint killed                        # it was resolved while its process was still to die
    cdef int64_t killed_item                # by this item of the chunk
    cdef readonly str reason                # why it was killed, "" for the deadline
    cdef bint unwanted                      # cancelled when its attempt could not be stopped: no further one
    cdef readonly tuple deaths              # as of a Span

    cdef Span one(self, uint64_t item)


cdef class SlotTable:
    cdef list tasks                         # entry -> Task or None
    cdef list free                          # entry numbers
    cdef dict kept                          # (head, tag) -> (HostBlock, leases whose views still need it)
    cdef uint32_t inflight                  # leases out
    cdef uint32_t chunks                    # of them, chunks
    cdef uint64_t untold                    # tasks and items leased since the worker was told last
    cdef bint ready, draining
    cdef bint signalled                     # SIGKILL was sent to the process by the host
    cdef bint acted                         # the rescan took results in ahead of their hint
    cdef uint32_t nonsense                  # rescans in a row that found what no worker could have written
    cdef bint suspect                       # leases were taken back from it: it did not look at them
    cdef uint64_t suspect_at                # ring_head at that time
    # What the host writes into the slot is decided from these, never read back: a worker may run wild.
    cdef uint32_t state                     # S_*
    cdef uint64_t incarnation, ring_tail, outbox_head
    cdef uint32_t number                    # of the worker, as users see it
    cdef bint counted                       # what its process does counts for that number: until it is dead
