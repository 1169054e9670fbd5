# cython: language_level=3
"""What waits, and who gets it. See _leasing.pyx."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from runtime._arena cimport Arena, HostBlock
from runtime._frame cimport Frame
from runtime._records cimport Batch, SlotTable, Span, Task
from runtime._threads cimport DeadlineKeeper


# what a deferred wish in Leasing.inbox begins with
cdef enum:
    DO_RELEASE
    DO_DRAIN
    DO_UNLOAD
    DO_SETTLE
    DO_RETRY
    DO_RETRY_ITEM
    DO_FORGET
    DO_DROP
    DO_ABANDON
    DO_DRAIN_ALL
    DO_TAKE_DUE
    DO_COLLECT


cdef class Leasing:
    cdef readonly Arena arena
    cdef readonly DeadlineKeeper keeper
    cdef list slots                         # SlotTable
    cdef dict levels                        # priority -> deque of Task and Batch
    cdef list order                         # priorities that have ever been used, highest first
    cdef object inbox                       # deque of Task, Batch and (bookkeeping) tuples
    cdef list delayed                       # heap of (monotonic ns, number, Task or Batch, Span or None)
    cdef uint64_t put_offs                  # entries it has ever had
    cdef bint busy, closed, inert
    cdef bint paused                        # nothing is leased for now: there shall be no workers
    cdef unsigned long inside               # the thread that made it busy
    cdef uint64_t *tags                     # per slot and entry: the tag of its last lease
    cdef dict functions                     # function id -> HostBlock, in order of use
    cdef set announce                       # slots that got leases and have not been told
    cdef set repeat                         # slots to be told once more
    cdef int64_t starved_since              # monotonic ns: a task at the head found no room; 0: none does
    cdef uint64_t full_at                   # arena.frees when patience ran out last
    cdef uint64_t wanted                    # bytes that a task at the head finds no room for; 0: none
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
    cdef int put_off(self, entry, Span span, int64_t delay) except -1
    cdef int requeue_now(self, entry, Span span) except -1
    cdef int take_due(self, int64_t until) except -1
    cdef int forget(self, Task task) except -1
    cdef void over(self, Task task, int state) noexcept
    cdef int release(self, Task task) except -1
    cdef int64_t pick(self, uint32_t depth) except -2
    cdef int64_t pick_lane(self, uint32_t depth) except -2
    cdef bint takes(self, uint32_t index, SlotTable table) except -1
    cdef int pump(self) except -1
    cdef Task cut(self, Batch batch, uint32_t workers)
    cdef int uncut(self, Task task) except -1
    cdef int put_back(self, Task task, uint64_t first, int64_t without) except -1
    cdef HostBlock function_block(self, fn)
    cdef uint32_t depth(self) noexcept
    cdef bint drain_all(self) except -1
    cdef bint starved(self)
    cdef bint hopes(self, uint64_t nbytes) noexcept
    cdef bint lease(self, Task task, uint32_t index) except -1
    cdef int balance(self) except -1
    cdef list take_back(self, uint32_t index, uint32_t most)
    cdef int requeue(self, Task task) except -1
    cdef bint skipped(self, Task task) except -1
    cdef Frame framed(self, Task task)
    cdef uint32_t room(self, uint32_t index) except? 0xFFFFFFFF
    cdef bint publish(self, Task task, uint32_t index) except -1
