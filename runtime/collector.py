"""The collector: turns what workers leave in their outboxes into results of futures.

One thread, one loop: wait for hints, drain the outboxes they name, complete what came out (unpickle, set
the future, run its callbacks), tell workers of new leases. Every 100 ms, while work is out, it looks at
everything itself: a hint may be lost, a result may not.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

from runtime import _core, serializer
from runtime.errors import BrokenRuntime, RuntimeFailure, TaskCancelled, TaskTimeout, WorkerDied
from runtime.sockets import HostLink
from runtime.wire import Hint, HintKind

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Collector", "Death", "Sink"]

_RESCAN = 0.1  # seconds between two looks at everything while work is out
_ROOM = 0.05  # the same, while a task waits for room in the region
_IDLE = 2.0  # the same, while nothing is out
_GREETING = 0.001  # the same, while a worker waits for its welcome

log = logging.getLogger("runtime")


class Sink(Protocol):
    """Who takes the results of a map's items."""

    retries: int

    def deliver(self, index: int, ok: bool, value: Any) -> None:
        """The outcome of item `index`; the first one counts."""


class Death(RuntimeFailure):
    """How a worker ended, as the supervisor knows it; turned into a WorkerDied for each task it ran."""

    def __init__(
        self,
        pid: int | None,
        number: int,
        exitcode: int | None,
        signal: int | None,
        reason: str,
        rss: int | None,
    ) -> None:
        super().__init__(reason)
        self.pid, self.number, self.exitcode, self.signal, self.reason, self.rss = (
            pid,
            number,
            exitcode,
            signal,
            reason,
            rss,
        )

    def blamed(self, attempts: int) -> WorkerDied:
        """The exception of a task that the worker was running."""
        return WorkerDied(
            self.pid, self.number, self.exitcode, self.signal, self.reason, attempts, "", self.rss
        )


class Lifecycle(Protocol):
    """What the collector tells the supervisor."""

    def look(self, slot: int) -> None:
        """A worker may have changed its phase."""

    def wake(self) -> None:
        """Something has ended."""


class Collector:
    """Completes futures.

    Thread-safety: `run` belongs to one thread; `announce`, `fail` and `retry` may be called from any.
    """

    def __init__(self, dispatcher: _core.Dispatcher, link: HostLink, lifecycle: Lifecycle) -> None:
        self.dispatcher = dispatcher
        self.link = link
        self.lifecycle = lifecycle
        self.broken: str | None = None  # set when the runtime was ended by force: what tasks are told
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
                    self.lifecycle.look(-1)
            self.complete()
            self.announce()
            for slot in list(self._welcome):
                self.welcome(slot)
        self.complete()

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
            self.dispatcher.drain(slot)
            self.lifecycle.look(slot)
        elif hint.kind in (HintKind.HELLO, HintKind.CONTROL):
            came = self._hello.setdefault(slot, set())
            came.add(hint.kind)
            if len(came) == 2:
                del self._hello[slot]
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
            self.link.send(HintKind.LOOK, slot, self.dispatcher.incarnation(slot))

    # ---- outcomes ------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Complete everything that has come in."""
        while outcomes := self.dispatcher.take_outcomes():
            outcomes.reverse()
            while outcomes:  # popped one by one, so that no reference outlives its completion
                try:
                    self.settle(*outcomes.pop())
                except Exception:
                    log.exception("a completion failed")
            self.announce()
            self.lifecycle.wake()

    def settle(self, kind: int, task: _core.Task, *rest: Any) -> None:
        """Act on one outcome."""
        if kind == _core.OUTCOME_FRAME:
            self.deliver(task, *rest)
        elif kind == _core.OUTCOME_DIED:
            self.died(task, *rest)
        elif kind == _core.OUTCOME_KILLED:
            item, reason = rest
            self.finish(task, item, False, self.killed(task, reason))
        else:
            first, what = rest
            for item in range(first, 1 if task.batch is None else len(task.entries)):
                self.finish(task, item, False, RuntimeFailure(f"the task's result was lost: {what}"))

    def deliver(self, task: _core.Task, first: int, count: int, exporter: Any, ran: int) -> None:
        """Results of items first .. first+count-1, in a frame."""
        if isinstance(exporter, _core.HostBlock) and self.dispatcher.arena.held > self._half:
            exporter = bytearray(exporter)  # the region is for what is under way, not for what is stored
        try:
            items = _core.read_frame(exporter)
            if len(items) != count:
                raise ValueError(f"the frame holds {len(items)} items, not {count}")
        except ValueError as error:
            for item in range(first, first + count):
                self.finish(
                    task, item, False, RuntimeFailure(f"the worker wrote a malformed result: {error}")
                )
            return
        del exporter
        items.reverse()
        while items:
            status, data, views = items.pop()
            if status:
                self.raised(task, first, serializer.load_exception(data, views))
            else:
                try:
                    value = serializer.loads(data, views)
                except BaseException as error:
                    error.add_note("The task ended, but its result could not be unpickled in the host.")
                    self.finish(task, first, False, error)
                else:
                    self.finish(task, first, True, value)
                    del value
            del data, views
            first += 1

    def raised(self, task: _core.Task, item: int, error: BaseException) -> None:
        """The task's own exception: its outcome, unless it is one to retry on."""
        if task.batch is None:
            future: Any = task.future
            if task.retries and isinstance(error, future.retry_on):
                task.retries -= 1
                self.dispatcher.retry(task)
                return
        elif isinstance(error, task.batch.sink.retry_on) and task.entries[item][2] <= task.batch.sink.retries:
            self.dispatcher.retry_item(task.batch, task.entries[item])
            return
        self.finish(task, item, False, error)

    def died(self, task: _core.Task, item: int, death: Death) -> None:
        """Its worker died while it ran this: again, or WorkerDied."""
        if self.broken is not None:
            self.finish(task, item, False, BrokenRuntime(self.broken))
        elif task.batch is None:
            if task.retries:
                task.retries -= 1
                self.dispatcher.retry(task)
            else:
                self.finish(task, 0, False, death.blamed(task.attempt))
        else:
            entry = task.entries[item]
            if entry[2] <= task.batch.sink.retries:
                self.dispatcher.retry_item(task.batch, entry)
            else:
                self.finish(task, item, False, death.blamed(entry[2]))

    def killed(self, task: _core.Task, reason: str) -> BaseException:
        """What a killed task is told."""
        if self.broken is not None:
            return BrokenRuntime(self.broken)
        if reason:
            return TaskCancelled()
        return TaskTimeout(
            f"the task ran longer than its timeout of {task.timeout / 1e9:g} s, so its worker was killed"
        )

    def finish(self, task: _core.Task, item: int, ok: bool, value: Any) -> None:
        """The final outcome of a task or an item."""
        self.dispatcher.note(int(ok), int(not ok))
        if task.batch is not None:
            task.batch.sink.deliver(task.entries[item][0], ok, value)
            return
        future = task.future
        assert future is not None
        self.resolve(future, ok, value)

    @staticmethod
    def resolve(future: Future[Any], ok: bool, value: Any) -> None:
        """Set a future; one that was settled before keeps its outcome."""
        if future.done():
            return
        if ok:
            future.set_result(value)
        else:
            future.set_exception(value)

    def fail_rest(self, rest: list[tuple[Any, Any]], error: BaseException) -> None:
        """Fail what the dispatcher has abandoned."""
        for entry, items in rest:
            if items is None:
                self.dispatcher.note(0, 1)
                self.resolve(entry.future, False, error)
            else:
                self.dispatcher.note(0, len(items))
                for item in items:
                    entry.sink.deliver(item[0], False, error)
