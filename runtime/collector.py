"""The collector: turns what workers leave in their outboxes into results of futures.

One thread, one loop: wait for hints, drain the outboxes they name, complete what came out (unpickle, set
the future, run its callbacks), tell workers of new leases. Every 100 ms, while work is out, it looks at
everything itself: a hint may be lost, a result may not.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from runtime import _core, serializer
from runtime.errors import BrokenRuntime, RuntimeFailure, TaskCancelled, TaskTimeout, WorkerDied
from runtime.sockets import HostLink
from runtime.wire import Hint, HintKind

__all__ = ["Collector", "Death", "Sink", "again"]

_RESCAN = 0.1  # seconds between two looks at everything while work is out
_ROOM = 0.05  # the same, while a task waits for room in the region
_IDLE = 2.0  # the same, while nothing is out
_GREETING = 0.001  # the same, while a worker waits for its welcome

log = logging.getLogger("runtime")


class Sink(Protocol):
    """Who takes the results of a map's items."""

    retries: int
    retry_on: tuple[type[BaseException], ...]

    def deliver(self, index: int, ok: bool, value: Any) -> None:
        """The outcome of item `index`; the first one counts."""


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended, as the supervisor knows it; each task that it ran gets a WorkerDied of it."""

    pid: int | None
    number: int
    exitcode: int | None
    signal: int | None
    reason: str
    rss: int | None

    def blamed(self, attempts: int) -> WorkerDied:
        """The exception of a task that the worker was running."""
        return WorkerDied(
            self.pid, self.number, self.exitcode, self.signal, self.reason, attempts, "", self.rss
        )


def again(error: BrokenRuntime) -> BrokenRuntime:
    """The same failure for one more caller: raising one object twice would tie their frames together."""
    copy = BrokenRuntime(str(error))
    copy.__cause__ = error.__cause__
    return copy


class Watcher(Protocol):
    """What the collector tells the supervisor."""

    def look(self, slot: int) -> None:
        """A worker may have changed its phase."""

    def wake(self) -> None:
        """Something has ended."""


class Collector:
    """Completes futures.

    Thread-safety: `run` belongs to one thread; `announce` may be called from any.
    """

    def __init__(self, dispatcher: _core.Dispatcher, link: HostLink, watcher: Watcher) -> None:
        self.dispatcher = dispatcher
        self.link = link
        self.watcher = watcher
        self.broken: BrokenRuntime | None = None  # set when no task can run any more: what they are told
        self.stopped = False
        self._half = dispatcher.arena.data_bytes // 2
        self._hello: dict[int, set[int]] = {}  # slot -> kinds of greeting that came
        self._welcome: set[int] = set()  # slots whose welcome could not be sent yet

    def run(self) -> None:
        """The thread."""
        last = time.monotonic()
        while not self.stopped:
            for hint in self.link.poll(self.patience()):
                self.obey(hint)
            now = time.monotonic()
            if now - last >= (_ROOM if self.dispatcher.urgent else _RESCAN):
                last = now
                self.dispatcher.rescan()
                if self.dispatcher.leased:
                    self.watcher.look(-1)
            self.complete()
            self.announce()
            for slot in list(self._welcome):
                self.welcome(slot)

    def patience(self) -> float:
        """Seconds to wait for a hint."""
        if self.dispatcher.has_outcomes:
            return 0.0
        if self._welcome:
            return _GREETING
        if self.dispatcher.urgent:
            return _ROOM
        return _RESCAN if self.dispatcher.leased or self.dispatcher.waiting else _IDLE

    def obey(self, hint: Hint) -> None:
        """Look where a hint points; one from a process that is gone is counted and dropped."""
        slot = hint.slot
        if slot >= self.dispatcher.arena.slots or hint.incarnation != self.dispatcher.incarnation(slot):
            self.link.strangers += 1
        elif hint.kind == HintKind.LOOK:
            self.dispatcher.drain(slot, True)
            self.watcher.look(slot)
        elif hint.kind in (HintKind.HELLO, HintKind.CONTROL):
            came = self._hello.setdefault(slot, set())
            came.add(hint.kind)
            if len(came) == 2:
                self.welcome(slot)
        else:
            self.link.strangers += 1

    def welcome(self, slot: int) -> None:
        """Tell a worker that it is connected; again soon if its PULL is not there yet."""
        self._welcome.discard(slot)
        if self.link.is_open(slot) and not self.link.send(
            HintKind.WELCOME, slot, self.dispatcher.incarnation(slot)
        ):
            self._welcome.add(slot)

    def forget(self, slot: int) -> None:
        """The process in a slot is gone."""
        self._hello.pop(slot, None)
        self._welcome.discard(slot)

    def announce(self) -> None:
        """Tell workers of leases in their rings."""
        for slot in self.dispatcher.announcements():
            if self.link.send(HintKind.LOOK, slot, self.dispatcher.incarnation(slot)):
                self.dispatcher.told(slot)
        for slot in self.dispatcher.repetitions():
            self.link.send(HintKind.AGAIN, slot, self.dispatcher.incarnation(slot))

    # ---- outcomes ------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Complete everything that has come in. Whatever user code raises here, no outcome is left out."""
        while outcomes := self.dispatcher.take_outcomes():
            outcomes.reverse()
            while outcomes:  # popped one by one, so that no reference outlives its completion
                try:
                    self.settle(*outcomes.pop())
                except BaseException:
                    log.exception("an outcome could not be delivered")
            self.announce()
            self.watcher.wake()

    def settle(self, kind: int, task: Any, *rest: Any) -> None:
        """Act on one outcome."""
        if kind == _core.OUTCOME_FRAME:
            self.deliver(task, *rest)
        elif kind == _core.OUTCOME_DIED:
            self.died(task, *rest)
        elif kind == _core.OUTCOME_KILLED:
            item, reason = rest
            if reason:  # cancelled by the user: final, whatever retry_on says
                self.finish(task, item, False, self.killed(task, reason))
            else:
                self.fail_or_retry(task, item, self.killed(task, reason))
        elif kind == _core.OUTCOME_ABANDONED:
            self.abandoned(task, *rest)
        else:
            first, what = rest
            for item in range(first, 1 if task.batch is None else len(task.entries)):
                self.finish(task, item, False, RuntimeFailure(f"the task was lost: {what}"))

    def deliver(self, task: _core.Task, first: int, count: int, exporter: Any, ran: int) -> None:
        """Results of items first .. first+count-1, in a frame."""
        try:
            if isinstance(exporter, _core.HostBlock) and self.dispatcher.arena.held > self._half:
                with contextlib.suppress(MemoryError):
                    exporter = bytearray(
                        exporter
                    )  # the region is for what is under way, not for what is stored
            items = _core.read_frame(exporter)
            if len(items) != count:
                raise ValueError(f"the frame holds {len(items)} items, not {count}")
        except Exception as error:
            for item in range(first, first + count):
                self.finish(task, item, False, RuntimeFailure(f"the result cannot be read: {error}"))
            return
        del exporter
        items.reverse()
        while items:
            self.arrived(task, first, *items.pop())
            first += 1

    def arrived(self, task: _core.Task, item: int, status: int, data: memoryview, views: Any) -> None:
        """One result, still pickled."""
        if status:
            self.fail_or_retry(task, item, serializer.load_exception(data, views))
            return
        try:
            ok, value = True, serializer.loads(data, views)
        except BaseException as error:
            ok, value = (
                False,
                _noted(error, "The task ended, but its result could not be unpickled in the host."),
            )
        self.finish(task, item, ok, value)

    def fail_or_retry(self, task: _core.Task, item: int, error: BaseException) -> None:
        """An exception: the outcome, unless it is one to retry on."""
        try:
            retry = isinstance(
                error, task.future.retry_on if task.batch is None else task.batch.sink.retry_on
            )
        except BaseException:  # a metaclass of the user's
            log.exception("retry_on could not be compared with %s", type(error))
            retry = False
        if not (retry and self.retried(task, item)):
            self.finish(task, item, False, error)

    def retried(self, task: _core.Task, item: int) -> bool:
        """Run it once more, if an attempt is left."""
        if self.broken is not None:
            return False
        if task.batch is None:
            if not task.retries:
                return False
            task.retries -= 1
            self.dispatcher.retry(task)
        else:
            entry = task.entries[item]
            if entry[2] > task.batch.sink.retries:
                return False
            self.dispatcher.retry_item(task.batch, entry)
        return True

    def died(self, task: _core.Task, item: int, death: Death) -> None:
        """Its worker died while it ran this: again, or WorkerDied."""
        if self.retried(task, item):
            return
        attempts = task.attempt if task.batch is None else task.entries[item][2]
        error = death.blamed(attempts) if self.broken is None else again(self.broken)
        self.finish(task, item, False, error)

    def abandoned(self, task: Any, batch: Any, entries: Any, cancelled: bool) -> None:
        """It never started, and never will."""
        if cancelled:
            self.dispatcher.vanish(1 if batch is None else len(entries))
        else:
            self.dispatcher.note(0, 1 if batch is None else len(entries))
        if batch is None and cancelled:
            self.guarded(task.future.withdraw)
        elif batch is None:
            self.resolve(task.future, False, self.ended())
        else:
            for entry in entries:
                error = concurrent.futures.CancelledError() if cancelled else self.ended()
                batch.sink.deliver(entry[0], False, error)

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
        if task.batch is not None:
            task.batch.sink.deliver(task.entries[item][0], ok, value)
            return
        self.resolve(task.future, ok, value)

    def resolve(self, future: Any, ok: bool, value: Any) -> None:
        """Set a future; one that was settled before keeps its outcome."""
        if not future.done():
            self.guarded(future.set_result if ok else future.set_exception, value)
        future._task = None  # its task knows the future: without this the two would keep each other

    @staticmethod
    def guarded(function: Callable[..., object], *args: Any) -> None:
        """Call what runs callbacks of the user's: the stdlib guards against Exception, not SystemExit."""
        try:
            function(*args)
        except BaseException:
            log.exception("a callback of a future raised")


def _noted(error: BaseException, note: str) -> BaseException:
    with contextlib.suppress(BaseException):
        error.add_note(note)
    return error
