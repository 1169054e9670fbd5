"""The collector: turns what workers leave in their outboxes into results of futures.

One thread, one loop: watch the outboxes or sleep until a hint comes, drain them all, complete what came out
(outcomes.py: unpickle, set the future, run its callbacks), tell workers of new leases. Every 100 ms, while
work is out, it looks at everything itself: a hint may be lost, a result may not. What is plain and watched by
nobody was set by the dispatcher before, and a thread in `result()` takes its own (`expect`).
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from runtime import _core
from runtime.outcomes import LOCKED, Outcomes
from runtime.sockets import HostLink
from runtime.wire import Hint, HintKind

__all__ = ["Collector", "Watcher"]

_RESCAN = 0.1  # seconds between two looks at everything while work is out
_ROOM = 0.05  # the same, while a task waits for room in the region
_IDLE = 2.0  # the same, while nothing is out
_GREETING = 0.001  # the same, while a worker waits for its welcome, or somebody for the region to grow
_LOOK = HintKind.LOOK  # an enum's member takes its time to be looked up
_TICK = 0.001  # what a wait may fall short of: zmq counts in milliseconds
_POLL = 0.001  # seconds after which hints are read even if the outboxes alone keep the collector busy
_WORTH = 2  # times in a row that watching the outboxes may be in vain


class Watcher(Protocol):
    """What the collector tells the supervisor."""

    @property
    def stopping(self) -> bool:
        """Whether it waits for the end of everything."""

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
        dispatcher.tell = self.tell
        self.outcomes = Outcomes(dispatcher)
        self.stopped = False  # the thread ends, or has ended
        self._threads = dispatcher.arena.threads
        self._worth = 0
        self._polled = 0.0
        self._busy = 0.0  # when something was last seen to be out
        self._hello: dict[int, set[int]] = {}  # slot -> kinds of greeting that came
        self._welcome: set[int] = set()  # slots whose welcome could not be sent yet

    def run(self) -> None:
        """The thread."""
        dispatcher = self.dispatcher
        looked = time.monotonic()
        while not self.stopped:
            self.wait()
            dispatcher.drain_everything()
            dispatcher.take_retries()
            dispatcher.make_room()
            dispatcher.arena.trim()
            now = time.monotonic()
            if now - looked >= (_ROOM if dispatcher.urgent else _RESCAN):
                looked = now
                dispatcher.rescan()
                dispatcher.arena.restate()
                if dispatcher.leased or dispatcher.waiting:  # a worker's word of being ready may be lost
                    self.watcher.look(-1)
            self.complete()
            self.outcomes.conclude_late()
            self.announce()
            if self.watcher.stopping:
                self.watcher.wake()
            for slot in list(self._welcome):
                self.welcome(slot)

    def stop(self) -> None:
        """End the thread when it looks next; whoever tells of something completes it then."""
        self.stopped = self.outcomes.unattended = True

    def wait(self) -> None:
        """Until there is something to do, or to look whether there is.

        First by watching the outboxes, if that was worth it lately; then asleep in zmq.
        """
        now = time.monotonic()
        if self._worth > 0 and now - self._polled < _POLL:
            if self.dispatcher.watch():
                self._worth = _WORTH
                return
            self._worth -= 1
        patience = self.patience()
        due = self.dispatcher.retry_in
        hurried = False
        if due is not None and due < patience:  # a retry is due before
            hurried, patience = True, due + _TICK
        if patience and not self.dispatcher.park():
            patience = 0.0
        hints = self.link.poll(patience)
        self._polled = time.monotonic()
        late = patience and not hurried and not hints and self._polled - now >= patience
        if late and patience >= _RESCAN and self.dispatcher.untold:
            # A worker may be about to tell: what is lost is what it does not tell in all that time.
            hints = self.link.poll(patience)
            if not hints and self.dispatcher.untold:
                self.dispatcher.lost()
        self.dispatcher.unpark()
        for hint in hints:
            self.obey(hint)
            self._worth = _WORTH

    def patience(self) -> float:
        """Seconds to wait for a hint."""
        if self.dispatcher.has_outcomes:
            return 0.0
        if self._welcome or self.dispatcher.cramped:
            return _GREETING
        if self.outcomes.late:
            return LOCKED
        if self.dispatcher.urgent:
            return _ROOM
        if self.dispatcher.leased or self.dispatcher.waiting:
            self._busy = self._polled
        # A little longer than that: tasks that come one by one should not wait for a lost hint either.
        return _RESCAN if self._polled - self._busy < _IDLE else _IDLE

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

    def greeted(self, slot: int) -> bool:
        """Whether the worker in a slot is connected, both ways."""
        return len(self._hello.get(slot, ())) == 2 and slot not in self._welcome

    def forget(self, slot: int) -> None:
        """The process in a slot is gone."""
        self._hello.pop(slot, None)
        self._welcome.discard(slot)

    def announce(self) -> None:
        """Tell workers of leases in their rings."""
        slots = self.dispatcher.announcements()
        if self._threads > 1:
            self.announce_lanes(slots)
            return
        for slot in slots:
            if self.link.send(_LOOK, slot, self.dispatcher.incarnation(slot)):
                self.dispatcher.told(slot)
        for slot in self.dispatcher.repetitions():
            self.link.send(HintKind.AGAIN, slot, self.dispatcher.incarnation(slot))

    def announce_lanes(self, slots: tuple[int, ...]) -> None:
        """One message for all lanes of a process, which are neighbours: it finds out whom that is for."""
        for kind, lanes in ((_LOOK, slots), (HintKind.AGAIN, self.dispatcher.repetitions())):
            processes: dict[int, list[int]] = {}
            for lane in lanes:
                processes.setdefault(lane - lane % self._threads, []).append(lane)
            for slot, announced in processes.items():
                if self.link.send(kind, slot, self.dispatcher.incarnation(slot)) and kind == _LOOK:
                    for lane in announced:
                        self.dispatcher.told(lane)

    # ---- completing ----------------------------------------------------------------------------------

    def complete(self) -> None:
        """Complete everything that has come in. Whatever user code raises here, no outcome is left out."""
        while came := self.dispatcher.take_outcomes():
            came.reverse()
            while came:  # popped one by one, so that no reference outlives its completion
                self.outcomes.settle(*came.pop())
            self.announce()

    def expect(self, future: Any, timeout: float | None) -> None:
        """A thread needs the result of a future within so many seconds: it may take it in by itself."""
        task = future._task
        if task is None:
            return
        try:
            self.dispatcher.await_call(task, -1 if timeout is None else int(min(timeout, 1e9) * 1e9))
            self.dispatcher.fulfil(task, self.outcomes.read)
        finally:
            self.tell()

    def tell(self) -> None:
        """After the dispatcher was called: tell workers of new leases, and the collector of outcomes."""
        if not self.dispatcher.quiet:
            self.announce()
            if self.dispatcher.take_news():
                if self.stopped:  # the collector has ended: nobody else does it any more
                    self.complete()
                else:
                    self.link.wake()
        if self.watcher.stopping:
            self.watcher.wake()
