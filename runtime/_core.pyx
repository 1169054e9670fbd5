# cython: language_level=3
"""The compiled door: what Python files may import of the compiled modules, and nothing else of them.

    _region    SharedRegion                          a mapped file, bounds-checked, atomic words at offsets
    _pool      MemoryPool, Block                     equal blocks with one owner each
    _extent    Arena, HostBlock                      a runtime's region: tables, and blocks of any size
    _frame     Frame, read_frame                     how pickles and their buffers lie in a block
    _lease     WorkerPort                            a worker's end of its slot
    _threads   DeadlineKeeper, watch_host, ...       native threads that need no GIL
    _leasing   Task, Batch                           what waits, and how it is leased
    _harvest                                         what came back, and what the dead leave
    _dispatch  Dispatcher                            the door to the three above; slots
"""

from runtime._dispatch import CANCEL_DONE, CANCEL_KILLED, CANCEL_NO, Dispatcher
from runtime._extent import Arena, HostBlock
from runtime._frame import Frame, read_frame
from runtime._layout cimport (
    INLINE_BYTES as _INLINE_BYTES,
    LAYOUT_VERSION as _LAYOUT_VERSION,
    P_BOOT as _BOOT,
    P_FAILED as _FAILED,
    P_LEAVING as _LEAVING,
    P_READY as _READY,
    KIND_CHUNK as _CHUNK,
)
from runtime._lease import WorkerPort
from runtime._leasing import (
    OUTCOME_ABANDONED,
    OUTCOME_DIED,
    OUTCOME_FRAME,
    OUTCOME_KILLED,
    OUTCOME_LOST,
    Batch,
    Task,
)
from runtime._pool import Block, MemoryPool
from runtime._region import SharedRegion
from runtime._threads import DeadlineKeeper, become_subreaper, kill_descendants, watch_host

INLINE_BYTES = _INLINE_BYTES
LAYOUT_VERSION = _LAYOUT_VERSION
PHASE_BOOT, PHASE_READY, PHASE_FAILED, PHASE_LEAVING = _BOOT, _READY, _FAILED, _LEAVING
KIND_CHUNK = _CHUNK
