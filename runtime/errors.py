"""The exception tree. Every class survives pickle and deepcopy, and no message is empty."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BrokenRuntime",
    "KernelFailed",
    "LockTimeout",
    "RegionFull",
    "ReloadFailed",
    "RemoteError",
    "RuntimeFailure",
    "StaleBlock",
    "TaskCancelled",
    "TaskTimeout",
    "WorkerDied",
]


class RuntimeFailure(Exception):
    """Base of all failures that the runtime itself reports."""

    default = "the runtime failed"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or self.default)


class _Record(RuntimeFailure):
    """A failure with fields: `fields` names the constructor's arguments, in order."""

    fields: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in self.fields}
        return type(self), tuple(getattr(self, f) for f in self.fields), state


class WorkerDied(_Record):
    """The worker process that ran the task ended before the task did.

    pid, number: of the worker. exitcode: its exit status, or None when unknown or when
    a signal ended it. signal: the number of that signal, or None. reason: the likely cause
    in words. attempts: how often the task had been started. stack: the worker's Python
    stack at the crash, or "". rss: its largest resident size in bytes, or None. task: its number
    and function. history: how the attempts died that did, a line each, the last ones. beside: why the
    worker was killed for another task that ran in it; then reason is "neighbour".
    """

    fields = ("pid", "number", "exitcode", "signal", "reason", "attempts", "stack", "rss")

    def __init__(
        self,
        pid: int | None = None,
        number: int | None = None,
        exitcode: int | None = None,
        signal: int | None = None,
        reason: str = "",
        attempts: int = 1,
        stack: str = "",
        rss: int | None = None,
        *,
        task: str = "",
        history: tuple[str, ...] = (),
        beside: str = "",
    ) -> None:
        self.pid, self.number, self.exitcode, self.signal = pid, number, exitcode, signal
        self.reason, self.attempts, self.stack, self.rss = reason, attempts, stack, rss
        self.task, self.history, self.beside = task, tuple(history), beside
        what = task or "this task"
        text = f"worker {number} (pid {pid}) died while it ran {what}: {reason or 'cause unknown'}"
        if beside:
            text += f": it was killed because {beside}"
        if attempts > 1:
            text += f"; the task was started {attempts} times"
        if len(self.history) > 1:
            text += "\n" + "\n".join(f"    {line}" for line in self.history)
        if stack:
            text += "\n" + stack
        super().__init__(text)

    def __reduce__(self) -> tuple[Any, ...]:
        kind, values, state = super().__reduce__()
        named = {name: state.pop(name) for name in ("task", "history", "beside")}
        return _made, (kind, values, named), state


def _made(kind: type[WorkerDied], values: tuple[Any, ...], named: dict[str, Any]) -> WorkerDied:
    """The same failure again: pickle calls nothing by keywords."""
    return kind(*values, **named)


class TaskTimeout(RuntimeFailure, TimeoutError):
    """The task ran longer than its `timeout`; its worker was killed and replaced."""

    default = "the task ran longer than its timeout"


class TaskCancelled(RuntimeFailure, concurrent.futures.CancelledError):
    """The task was cancelled after it had started; its worker was killed and replaced."""

    default = "the task was cancelled while it ran"


class RegionFull(RuntimeFailure, MemoryError):
    """The request can never fit into the region, or the system has no memory left for it."""

    default = "the shared-memory region has no room for this request"


class StaleBlock(RuntimeFailure, ValueError):
    """The block was released before, or belongs to somebody else."""

    default = "the block is not owned by this handle any more"


class KernelFailed(_Record):
    """A native kernel returned a non-zero code: which, in which grain, at which byte offset."""

    fields = ("code", "grain", "offset")

    def __init__(self, code: int = 0, grain: int = 0, offset: int = 0) -> None:
        self.code, self.grain, self.offset = code, grain, offset
        super().__init__(f"the kernel returned code {code} in grain {grain}, at byte offset {offset}")


class ReloadFailed(RuntimeFailure):
    """The new code did not start; the old generation goes on serving."""

    default = "the reload failed and was rolled back"


class LockTimeout(RuntimeFailure, TimeoutError):
    """The lock was not free within the timeout."""

    default = "the lock was not free within the timeout"


class RemoteError(_Record):
    """Stands for an exception of a task that could not be pickled: its type, text and traceback.

    lineage: its type and the bases of that, by name.
    """

    fields = ("type_name", "text", "traceback")
    lineage: tuple[str, ...] = ()

    def __init__(self, type_name: str = "", text: str = "", traceback: str = "") -> None:
        self.type_name, self.text, self.traceback = type_name, text, traceback
        super().__init__(f"{type_name or 'an exception'}: {text or '(no text)'}")

    def stands_for(self, kinds: Iterable[type[BaseException]]) -> bool:
        """Whether what could not be pickled was of one of these types, as far as names can tell."""
        return not {full_name(kind) for kind in kinds}.isdisjoint(self.lineage)


def full_name(kind: type) -> str:
    """A type as tracebacks name it."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class BrokenRuntime(RuntimeFailure, concurrent.futures.BrokenExecutor):
    """No worker can be started, so no task can run: the message says why."""

    default = "the runtime is broken: no worker could be started"


def remote_traceback(text: str) -> BaseException:
    """The cause of an exception that was raised in another process: as the stdlib's process pool shows it."""
    import importlib

    process = importlib.import_module("concurrent.futures.process")  # pulls in multiprocessing, so not sooner
    cause: BaseException = process._RemoteTraceback(f'\n"""\n{text}"""')
    return cause
