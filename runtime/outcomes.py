"""Outcomes: what has become of a task, and what that means for its future or its map.

Unpickled, retried, or final. Whoever completes (collector.py) calls `settle` with each outcome that the
dispatcher has; a future whose lock somebody holds gets its own a little later.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Protocol

from runtime import _core, serializer
from runtime.errors import (
    BrokenRuntime,
    RemoteError,
    RuntimeFailure,
    TaskCancelled,
    TaskTimeout,
    WorkerDied,
)
from runtime.refs import resolver
from runtime.retries import HISTORY, retry_delay

__all__ = ["LOCKED", "Death", "Outcomes", "Sink", "again"]

LOCKED = 0.001  # seconds between two looks at a future whose outcome is there and whose lock somebody has
NEIGHBOUR = "neighbour"  # the reason of who died with a worker that was killed for another task

log = logging.getLogger("runtime")


class Sink(Protocol):
    """Who takes the results of a map's items."""

    retries: int
    retry_on: tuple[type[BaseException], ...]

    def deliver(self, index: int, values: list[Any]) -> None:
        """The results of items index .. index+len(values)-1; the list is the sink's from now on."""

    def fail(self, span: _core.Span, error: BaseException) -> None:
        """The outcome of the first item of a span is an exception."""


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended, as the supervisor knows it; each task that it ran gets a WorkerDied of it."""

    pid: int | None
    number: int
    exitcode: int | None
    signal: int | None
    reason: str
    rss: int | None
    stack: str = ""

    def blamed(self, attempts: int, task: str, history: tuple[str, ...], beside: str = "") -> WorkerDied:
        """The exception of a task that the worker was running. beside: why it was killed for another one."""
        return WorkerDied(
            self.pid, self.number, self.exitcode, self.signal, NEIGHBOUR if beside else self.reason, attempts,
            self.stack, self.rss, task=task, history=history, beside=beside,
        )  # fmt: skip

    def among(self, ran: int) -> Death:
        """The same for one of so many tasks that ran: nobody knows whose doing it was."""
        if ran < 2:
            return self
        reason = f"{self.reason}; {ran} tasks were running in it, and any of them may be the cause"
        return replace(self, reason=reason)

    def line(self) -> str:
        """For the history of a task."""
        return f"pid {self.pid}: {self.reason}"


def again(error: BrokenRuntime) -> BrokenRuntime:
    """The same failure for one more caller: raising one object twice would tie their frames together."""
    copy = BrokenRuntime(str(error))
    copy.__cause__ = error.__cause__
    return copy


class Outcomes:
    """Settles the outcomes of one runtime.

    Thread-safety: `settle` is for one thread at a time; `conclude`, `conclude_late` and `read` for any.
    """

    def __init__(self, dispatcher: _core.Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.broken: BrokenRuntime | None = None  # set when no task can run any more: what they are told
        self.unattended = False  # nobody comes by for `late` any more
        self._half = dispatcher.arena.max_bytes // 2
        # (future, ok, value): outcomes of futures whose lock somebody else has; see Promise.conclude
        self.late: deque[tuple[Any, bool | None, Any]] = deque()
        self._finishing = False  # a thread is there for them, after the end

    def settle(self, kind: int, task: Any, *rest: Any) -> None:
        """Act on one outcome. Never raises, whatever user code does that unpickling or a callback runs."""
        try:
            self.act(kind, task, *rest)
        except BaseException:
            log.exception("an outcome could not be delivered")

    def act(self, kind: int, task: Any, *rest: Any) -> None:
        """What an outcome means for its future, or its map."""
        if kind == _core.OUTCOME_FRAME:
            self.deliver(task, *rest)
        elif kind == _core.OUTCOME_DIED:
            item, death, ran = rest
            self.died(task, item, death.among(ran))
        elif kind == _core.OUTCOME_NEIGHBOUR:
            self.beside(task, *rest)
        elif kind == _core.OUTCOME_KILLED:
            item, reason = rest
            if reason:  # cancelled by the user: final, whatever retry_on says
                self.finish(task, item, False, self.killed(task, reason))
            else:
                self.fail_or_retry(task, item, self.killed(task, reason))
        elif kind == _core.OUTCOME_ABANDONED:
            self.abandoned(task, *rest)
        else:
            first, end, what = rest
            for item in range(first, end):
                error = (
                    MemoryError("the task has ended, but the host has no memory for its result")
                    if what is None
                    else RuntimeFailure(f"the task was lost: {what}")
                )
                self.finish(task, item, False, error)

    def deliver(self, task: _core.Task, first: int, count: int, exporter: Any, blocks: Any) -> None:
        """Results of items first .. first+count-1, in a frame, and the blocks that it refers to."""
        try:
            items = _core.read_frame(self.stored(exporter), resolver(blocks))
        except Exception as error:
            self.unreadable(task, first, first + count, error)
            return
        del exporter, blocks
        end = first + count
        items.reverse()
        while items and first < end:
            first += self.arrived(task, first, end - first, *items.pop())
        if items or first != end:
            self.unreadable(task, first, end, ValueError("it holds another number of items"))

    def stored(self, exporter: Any) -> Any:
        """The frame, in private memory if the region is half full: that is for what is under way."""
        if isinstance(exporter, _core.HostBlock) and self.dispatcher.arena.held > self._half:
            with contextlib.suppress(MemoryError):
                return bytearray(exporter)
        return exporter

    def read(self, exporter: Any, blocks: Any) -> Any:
        """What a call has returned. Raises if it is not as simple as that, or if it cannot be unpickled."""
        ((status, data, views, _, _),) = _core.read_frame(self.stored(exporter), resolver(blocks))
        if status == _core.S_ERROR:
            raise ValueError("it has raised")
        return _unpacked(status, data, views)

    def unreadable(self, task: _core.Task, first: int, end: int, error: BaseException) -> None:
        """A worker has written what makes no sense."""
        for item in range(first, end):
            self.finish(task, item, False, RuntimeFailure(f"the result cannot be read: {error}"))

    def arrived(
        self, task: _core.Task, item: int, most: int, status: int, data: memoryview, views: Any, start: int,
        count: int,
    ) -> int:  # fmt: skip
        """One result, or several in one pickle, that are not unpickled yet; how many."""
        if count and task.batch is not None:
            try:
                if count > most:
                    raise ValueError(f"{count} results where at most {most} can be")
                values = _core.read_series(status, data, start, count)
            except BaseException as error:
                self.unreadable(task, item, item + 1, error)
                return 1
            self.dispatcher.note(count, 0)
            for index, n in task.stretches(item, count):
                task.batch.sink.deliver(index, values if n == len(values) else values[:n])
                if n < len(values):
                    del values[:n]
            return count
        if status == _core.S_ERROR:
            self.fail_or_retry(task, item, serializer.load_exception(data, views))
            return 1
        try:
            ok, value = True, _unpacked(status, data, views)
        except BaseException as error:
            ok, value = (
                False,
                _noted(error, "The task ended, but its result could not be unpickled in the host."),
            )
        self.finish(task, item, ok, value)
        value = None  # a traceback knows this frame: the two would keep each other, and the result's block
        return 1

    def fail_or_retry(self, task: _core.Task, item: int, error: BaseException) -> None:
        """An exception: the outcome, unless it is one to retry on."""
        kinds = task.future.retry_on if task.batch is None else task.batch.sink.retry_on
        try:
            retry = isinstance(error, kinds) or (isinstance(error, RemoteError) and error.stands_for(kinds))
        except BaseException:  # a metaclass of the user's
            log.exception("retry_on could not be compared with %s", type(error))
            retry = False
        if not (retry and self.retried(task, item, task.history(item))):
            self.finish(task, item, False, error)

    def retried(
        self, task: _core.Task, item: int, deaths: tuple[str, ...] = (), counted: bool = True
    ) -> bool:
        """Run it once more, if an attempt is left: the first time at once, then later and later.

        deaths: how its attempts died so far. counted: this one does; else the next one is at once.
        """
        if self.broken is not None:
            return False
        delay = int(retry_delay(task.attempts(item)) * 1e9) if counted else 0
        if task.batch is None:
            if not task.retries:
                return False
            task.retries -= counted
            self.dispatcher.retry(task, delay, deaths, counted)
        else:
            if task.attempts(item) > task.batch.sink.retries:
                return False
            self.dispatcher.retry_item(task, item, delay, deaths, counted)
        return True

    def died(self, task: _core.Task, item: int, death: Death) -> None:
        """Its worker died while it ran this: again, or WorkerDied."""
        deaths = (*task.history(item), death.line())[-HISTORY:]
        if not self.retried(task, item, deaths):
            self.lost(task, item, death, deaths)

    def beside(self, task: _core.Task, item: int, death: Death, culprit: _core.Task | None) -> None:
        """Its worker was killed for another task: again, at no cost if it may be run again; or WorkerDied."""
        if death.signal not in (None, signal.SIGKILL):  # it crashed before the kill came
            self.died(task, item, death)
        elif not self.retried(task, item, task.history(item), False):
            what = "another task" if culprit is None else _name(culprit)
            how = "was cancelled" if culprit is None or culprit.reason else "ran longer than its timeout"
            self.lost(task, item, death, task.history(item), f"{what}, which ran beside it, {how}")

    def lost(
        self, task: _core.Task, item: int, death: Death, deaths: tuple[str, ...], beside: str = ""
    ) -> None:
        """It ends with its worker. beside: why that was killed for another task."""
        if self.broken is not None:
            self.finish(task, item, False, again(self.broken))
        else:
            error = death.blamed(task.attempts(item), _name(task), deaths, beside)
            self.finish(task, item, False, error)

    def abandoned(self, task: Any, batch: Any, spans: Any, cancelled: bool) -> None:
        """It never started, and never will."""
        count = 1 if batch is None else sum(span.count for span in spans)
        if cancelled:
            self.dispatcher.vanish(count)
        else:
            self.dispatcher.note(0, count)
        if batch is None and cancelled:
            self.conclude(task.future, None, None)
        elif batch is None:
            self.conclude(task.future, False, self.ended())
        else:
            for span in spans:
                for one in span.singles():
                    error = concurrent.futures.CancelledError() if cancelled else self.ended()
                    batch.sink.fail(one, error)

    def ended(self) -> BrokenRuntime:
        """What a task is told that will not run."""
        return again(self.broken) if self.broken is not None else BrokenRuntime("the runtime has ended")

    def killed(self, task: _core.Task, reason: str) -> BaseException:
        """What a killed task is told."""
        if self.broken is not None:
            return again(self.broken)
        if reason:
            return TaskCancelled()
        return TaskTimeout(
            f"the task ran longer than its timeout of {task.timeout / 1e9:g} s, so its worker was killed"
        )

    def finish(self, task: _core.Task, item: int, ok: bool, value: Any) -> None:
        """The final outcome of a task or an item. Nothing that user code does keeps it from being counted."""
        self.dispatcher.note(int(ok), int(not ok))
        if task.batch is None:
            self.conclude(task.future, ok, value)
        elif ok:
            task.batch.sink.deliver(task.item(item).first, [value])
        else:
            task.batch.sink.fail(task.item(item), value)

    def conclude(self, future: Any, ok: bool | None, value: Any) -> None:
        """Set a future, to a value, an exception (ok is False), or cancelled (None); at once, or soon."""
        if not self.concluded(future, ok, value):
            self.late.append((future, ok, value))
            if self.unattended:
                self.finish_late()

    @staticmethod
    def concluded(future: Any, ok: bool | None, value: Any) -> bool:
        """Whether a future has its outcome now; not while another thread has its lock."""
        try:
            done: bool = future.conclude(ok, value)
        except BaseException:  # of a callback: the stdlib guards against Exception, not SystemExit
            log.exception("a callback of a future raised")
            done = True
        if done:
            task, future._task = future._task, None  # it knows the future: the two would keep each other
            if task is not None:
                task.part()
        return done

    def conclude_late(self) -> None:
        """Set the futures whose lock was taken, if it is not any more. Several threads may be here."""
        for _ in range(len(self.late)):
            try:
                one = self.late.popleft()
            except IndexError:  # another thread has it
                return
            if not self.concluded(*one):
                self.late.append(one)

    def finish_late(self) -> None:
        """The runtime has ended. What was late may wait for who waits for that end: a thread stays for it.

        One, however many are late. If there can be none, whoever tells of something next does it.
        """

        def run() -> None:
            while self.late:
                self.conclude_late()
                time.sleep(LOCKED)
            self._finishing = False
            self.finish_late()  # for what came after the last look

        self.conclude_late()
        if self.late and not self._finishing:
            self._finishing = True
            try:
                threading.Thread(target=run, name="runtime-late", daemon=True).start()
            except RuntimeError:
                self._finishing = False
                log.error("no thread can be made for the %d futures whose locks are held", len(self.late))


def _name(task: _core.Task) -> str:
    said = getattr(task.future, "said", "")  # of a task that the user has not submitted
    return said or f"task {task.number} ({task.fn.module}.{task.fn.name})"


def _unpacked(status: int, data: memoryview, views: list[memoryview]) -> Any:
    return _core.unpack_plain(data) if status == _core.S_PLAIN else serializer.loads(data, views)


def _noted(error: BaseException, note: str) -> BaseException:
    with contextlib.suppress(BaseException):
        error.add_note(note)
    return error
