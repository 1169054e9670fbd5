# cython: language_level=3
"""The compiled door: what Python files may import of the compiled modules, and nothing else of them.

    _region    SharedRegion                          a mapped file, bounds-checked, atomic words at offsets
    _pool      MemoryPool, Block                     equal blocks with one owner each
    _extent                                          blocks of any size: runs of extents
    _arena     Arena, HostBlock                      a runtime's region: tables, and the host's blocks
    _growth    GrowingArena                          one that gets memory as it is needed, and gives it back
    _frame     Frame, BlockSlice, read_frame         how pickles and their buffers lie in a block
    _lease, _runner  Runner, Share                   a worker's end of its slot, and its inner loop
    _report                                          reports of progress in a lease
    _plain     unpack_plain                          values that take the short way
    _series    read_series                           several plain values in one piece
    _future    Promise                               what a Future is made of
    _kernel    JobBlock, run_grains, ...             a kernel's job: its grains, who has claimed which
    _builtin                                         the kernels that come with the package
    _threads   DeadlineKeeper, watch_host, ...       native threads that need no GIL
    _records   Task, Batch, Span                     what the host notes about work
    _leasing                                         what waits, and how it is leased
    _harvest                                         what came back, and what the dead leave
    _slots                                           the life of a slot, and what it holds
    _waiting                                         who sleeps, who must be told
    _rescue                                          what no hint tells of
    _dispatch  Dispatcher                            the door to the five above
    _submit    Submitter                             the short way of submit
    _stacks    next_question                         how a worker hears that its stacks are wanted
    _bell      Bell, Outlet, Recent, replaced        what any thread may do, without a lock
    _shaped    Shaped                                a flat buffer with a format and a shape
    _mapaccess                                       how a process gets at a map in a region
    _statelock StateLock                             a lock of it, by name
    _state     StateMap                              a map that all processes share
    _watch     StateWatch                            what has changed in it
    _stdio     line_buffer_stdio, flush_stdio        what C keeps of a worker's output
    _stream    Stream                                the iterator of a map
"""

from runtime._builtin import (
    __pyx_capi__ as BUILTINS,
    combine_count,
    combine_crc32,
    combine_histogram,
    combine_minmax,
    combine_sum,
)
from runtime._bell import Bell, Outlet, Recent, replaced
from runtime._dispatch import CANCEL_DONE, CANCEL_KILLED, CANCEL_NO, Dispatcher, JobHold
from runtime._arena import Arena, HostBlock, in_region, note_losses
from runtime._frame import BlockSlice, Frame, read_frame
from runtime._frame cimport S_ERROR as _S_ERROR, S_PLAIN as _S_PLAIN, S_VALUE as _S_VALUE
from runtime._future import Promise
from runtime._growth import GrowingArena
from runtime._layout cimport P_FAILED as _FAILED, P_LEAVING as _LEAVING, P_READY as _READY
from runtime._lease import Share
from runtime._identity import memfd_create, pidfd_open, pidfd_send_signal
from runtime._kernel import (
    PAGE_BYTES,
    JobBlock,
    address_of,
    copy_bytes,
    locate_shared,
    place_of,
    read_capsule,
    run_grains,
)
from runtime._leasing import (
    OUTCOME_ABANDONED,
    OUTCOME_DIED,
    OUTCOME_FRAME,
    OUTCOME_KILLED,
    OUTCOME_LOST,
    OUTCOME_NEIGHBOUR,
)
from runtime._plain import unpack_plain
from runtime._pool import Block, MemoryPool
from runtime._records import Batch, Span, Task
from runtime._region import SharedRegion
from runtime._runner import LEASE_LOST, Runner
from runtime._series import read_series
from runtime._shaped import Shaped
from runtime._stacks import next_question
from runtime._state import StateMap
from runtime._statelock import StateLock
from runtime._stdio import flush_stdio, line_buffer_stdio
from runtime._stream import Stream
from runtime._submit import Submitter
from runtime._threads import DeadlineKeeper, become_subreaper, kill_descendants, watch_host
from runtime._watch import StateWatch

PHASE_READY, PHASE_FAILED, PHASE_LEAVING = _READY, _FAILED, _LEAVING
S_VALUE, S_ERROR, S_PLAIN = _S_VALUE, _S_ERROR, _S_PLAIN
