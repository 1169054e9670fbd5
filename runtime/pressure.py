"""Back-pressure: who submits large arguments faster than they are worked on waits for room in the region.

Only while the workers make progress, since that frees room without the user's help; and only in a thread that
may wait at all. Else the arguments stay in the host's own memory until they are leased.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Protocol

from runtime import _core, serializer

__all__ = ["Pressed", "Pressure"]

_STALLED = 1.0  # seconds without progress after which nobody waits
_NAP = 0.001  # seconds between two looks whether there was some


class Pressed(Protocol):
    """A runtime that is submitted to: a Supervisor."""

    arena: _core.Arena
    dispatcher: _core.Dispatcher

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """Its own."""

    @property
    def scaled(self) -> int:
        """Workers that there shall be."""

    @property
    def stopping(self) -> bool:
        """Whether it ends when nothing is left to do."""


class Pressure:
    """What one runtime knows of its own progress.

    Thread-safety: any thread; of what several note at once, one note counts.
    """

    def __init__(self, core: Pressed) -> None:
        self._core = core
        self._seen = (0, 0)
        self._since = self._looked = 0.0  # when that was new; when somebody looked last

    def place(self, task: _core.Task, payload: serializer.Payload) -> bool:
        """Lay the arguments of a new task out in the region. False: there is no room, and nobody should wait.

        Blocking: while tasks end, until there is room. When none has for a second, nobody waits, until one
        does. Signals are handled.
        """
        dispatcher = self._core.dispatcher
        if dispatcher.place(task, payload.data, payload.buffers, payload.readonly):
            return True
        if not self._may_wait(payload):
            return False
        tried = None
        while self._worked_on() and not self._stalled():
            if self._seen != tried:
                tried = self._seen
                if dispatcher.place(task, payload.data, payload.buffers, payload.readonly):
                    return True
            time.sleep(_NAP)
        return False

    def _worked_on(self) -> bool:
        """Whether there are tasks that end without the user's help, now or as soon as workers are ready."""
        core, dispatcher = self._core, self._core.dispatcher
        return bool((dispatcher.leased or dispatcher.waiting) and core.scaled and not core.stopping)

    def _progress(self) -> tuple[int, int]:
        """Moves when a task has ended, or a block was freed."""
        dispatcher = self._core.dispatcher
        return dispatcher.done + dispatcher.failed + dispatcher.vanished, self._core.arena.frees

    def _stalled(self) -> bool:
        """Whether nothing has moved for a second, all of which somebody has looked at."""
        seen, now = self._progress(), time.monotonic()
        if seen != self._seen or now - self._looked > _STALLED:
            self._seen, self._since = seen, now
        self._looked = now
        return now - self._since > _STALLED

    def _may_wait(self, payload: serializer.Payload) -> bool:
        """Whether there can be room at all, and this thread holds up nobody who would make it."""
        core = self._core
        if payload.nbytes > core.arena.max_bytes // 2:  # see Dispatcher.place
            return False
        if core.dispatcher.entered or threading.current_thread() in core.threads:
            return False
        asyncio = sys.modules.get("asyncio")
        return asyncio is None or asyncio._get_running_loop() is None
