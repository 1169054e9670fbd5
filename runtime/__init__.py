"""A runtime of supervised worker processes over shared memory, behind a concurrent.futures Executor.

>>> import runtime
>>> with runtime.Runtime(2) as rt:
...     list(rt.map(abs, [-1, -2, -3]))
[1, 2, 3]
"""

from typing import TYPE_CHECKING, Any

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
    from runtime.service import ServiceContext
    from runtime.worker import current
except Exception as error:
    from runtime.cli import broken

    if not broken.keep(error):
        raise

if TYPE_CHECKING:
    from runtime.executor import Runtime
    from runtime.figures import Stats, WorkerInfo
    from runtime.future import Future
    from runtime.kernels import Kernel
    from runtime.lifecycle import WorkerStatus
    from runtime.refs import Ref
    from runtime.reloads import ReloadReport
    from runtime.state import Change, SharedState

# The host's side, imported when it is asked for: a zygote and its workers start sooner without it.
_HOST = {
    "Change": "state",
    "Future": "future",
    "Kernel": "kernels",
    "Ref": "refs",
    "ReloadReport": "reloads",
    "Runtime": "executor",
    "SharedState": "state",
    "Stats": "figures",
    "WorkerInfo": "figures",
    "WorkerStatus": "lifecycle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOST:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOST[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "Block",
    "BrokenRuntime",
    "Change",
    "Future",
    "Kernel",
    "KernelFailed",
    "LockTimeout",
    "MemoryPool",
    "Ref",
    "RegionFull",
    "ReloadFailed",
    "ReloadReport",
    "RemoteError",
    "Runtime",
    "RuntimeFailure",
    "ServiceContext",
    "SharedRegion",
    "SharedState",
    "StaleBlock",
    "Stats",
    "TaskCancelled",
    "TaskTimeout",
    "WorkerDied",
    "WorkerInfo",
    "WorkerStatus",
    "current",
]
