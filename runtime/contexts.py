"""What code in a worker asks of where it runs: `runtime.current()`.

A worker has one Context; with several threads each lane has its own beside it. Code in another thread of such
a worker, one that a task has started, finds that of the worker, which has no task.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from runtime import _core
from runtime.errors import RuntimeFailure
from runtime.state import SharedState
from runtime.store import new_array

__all__ = ["Context", "Here", "current"]


class Context:
    """What `runtime.current()` returns in a worker: who runs this, and for whom.

    number: the worker's number. slot: its row in the region. generation: of the code. thread: of the
    worker, from 0. task: number of the running task. attempt: 1 for its first. local: a dict that lives
    as long as the worker. log: a logger named after the worker.
    """

    __slots__ = (
        "_report",
        "_take",
        "attempt",
        "generation",
        "local",
        "log",
        "number",
        "slot",
        "task",
        "thread",
    )

    def __init__(self, number: int, slot: int, generation: int) -> None:
        self.number = number
        self.slot = slot
        self.generation = generation
        self.thread = 0
        self.task: int | None = None
        self.attempt = 0
        self.local: dict[Any, Any] = {}
        self._report: Callable[[Any, Any, Any], None] | None = None
        self._take: Callable[[int], Any] | None = None
        self.log = logging.getLogger(f"runtime.worker.{number}")

    def serve(self, port: _core.Runner) -> None:
        """Its task is the one that this port runs."""
        self._report = port.report
        self._take = port.empty

    def lane(self, thread: int) -> Context:
        """That of one thread of this worker: `local` is one for all."""
        lane = Context(self.number, self.slot + thread, self.generation)
        lane.thread, lane.local = thread, self.local
        return lane

    def report(self, done: float, total: float | None = None, note: str = "") -> None:
        """Say how far the running task is: `Future.progress()` in the host shows the newest report.

        done, total: numbers that are not negative, ints below 2**63. note: of its UTF-8, 69 bytes travel.
        It costs less than a microsecond: nothing is sent. While no task runs, and in an item of a map,
        nobody sees it. Raises: TypeError, ValueError, OverflowError for what is no such number or text.
        """
        if self._report is not None:
            self._report(done, total, note)

    def empty(self, shape: int | tuple[int, ...], dtype: Any = float) -> Any:
        """A new array in the region, uninitialised: returned from the task, it is not copied.

        When there is no room, it lies in ordinary memory. shape, dtype, errors: as `Runtime.empty`.
        """
        return new_array(self._take or (lambda nbytes: None), shape, dtype)

    @property
    def state(self) -> SharedState:
        """What all processes of the runtime share: the same as `Runtime.state`; see docs/state.md.

        Raises: RuntimeFailure if some worker had written over it before this one's zygote was started.
        """
        if Here.state is None:
            raise RuntimeFailure(
                "the state of this runtime cannot be used: a worker has written over its header"
            )
        return Here.state

    def __repr__(self) -> str:
        return f"<worker {self.number}, task {self.task}, attempt {self.attempt}>"


class Here:
    """What this process is."""

    worker: Context | None = None
    arena: _core.Arena | None = None  # of that worker
    state: SharedState | None = None  # of its runtime
    forked = False  # a task has forked, and this is the child: it may not touch what the worker owns
    lanes: dict[int, Context] = {}  # noqa: RUF012  # thread -> its own

    @classmethod
    def context(cls) -> Context | None:
        """Of this thread."""
        return cls.lanes.get(threading.get_ident(), cls.worker) if cls.lanes else cls.worker


def current() -> Context:
    """The worker, task and attempt that this code runs in. Raises: RuntimeError outside of a worker."""
    found = Here.context()
    if found is None or Here.forked:
        raise RuntimeError("runtime.current() is for code that runs in a worker; this process is none")
    return found
