"""A runtime of supervised worker processes over shared memory, behind a concurrent.futures Executor.

>>> import runtime
>>> with runtime.Runtime(2) as rt:
...     list(rt.map(abs, [-1, -2, -3]))
[1, 2, 3]
"""

from runtime import machine

try:
    machine.check()  # before anything compiled is loaded
    from runtime._core import Block, MemoryPool, SharedRegion
    from runtime.errors import (
        BrokenRuntime,
        KernelFailed,
        LockTimeout,
        RegionFull,
        ReloadFailed,
        RemoteError,
        RuntimeFailure,
        StaleBlock,
        TaskCancelled,
        TaskTimeout,
        WorkerDied,
    )
    from runtime.executor import Future, Runtime, Stats, WorkerInfo
    from runtime.lifecycle import WorkerStatus
    from runtime.worker import current
except Exception as error:
    from runtime.cli import broken

    if not broken.keep(error):
        raise

__version__ = "0.1.0"

__all__ = [
    "Block",
    "BrokenRuntime",
    "Future",
    "KernelFailed",
    "LockTimeout",
    "MemoryPool",
    "RegionFull",
    "ReloadFailed",
    "RemoteError",
    "Runtime",
    "RuntimeFailure",
    "SharedRegion",
    "StaleBlock",
    "Stats",
    "TaskCancelled",
    "TaskTimeout",
    "WorkerDied",
    "WorkerInfo",
    "WorkerStatus",
    "current",
]
