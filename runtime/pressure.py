"""Back-pressure: who submits large arguments faster than they are worked on waits for room in the region.

Only while less and less of it is held, as the workers free room without the user's help; and only in a thread
that may wait at all. Else the arguments stay in the host's own memory until they are leased.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Protocol

from runtime import _core, serializer

__all__ = ["Pressed", "Pressure"]

_STALLED = 1.0  # seconds in which nothing was freed, after which nobody waits
_NAP = 0.001  # seconds between two looks whether something was


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
    """Whether one runtime makes room.

    Thread-safety: any thread; of what several note at once, one note counts.
    """

    def __init__(self, core: Pressed) -> None:
        self._core = core
        self._stalled: int | None = None  # bytes held when nothing had been freed for a second; None: it was

    def place(self, task: _core.Task, payload: serializer.Payload) -> bool:
        """Lay the arguments of a new task out in the region. False: no room, and nobody should wait for it.

        Blocking: while less and less of the region is held, until there is room. If that was not so for a
        second, nobody waits until it is. Signals are handled.
        """
        dispatcher, arena = self._core.dispatcher, self._core.arena
        if dispatcher.place(task, payload.data, payload.buffers, payload.readonly):
            return True
        if not self._may_wait(payload):
            return False
        least = arena.held
        if self._stalled is not None and least >= self._stalled:
            return False
        self._stalled = None
        since = time.monotonic()
        while self._worked_on():
            time.sleep(_NAP)
            if arena.held < least:
                least, since = arena.held, time.monotonic()
                if dispatcher.place(task, payload.data, payload.buffers, payload.readonly):
                    return True
            elif time.monotonic() - since > _STALLED:
                self._stalled = least
                return False
        return False

    def _worked_on(self) -> bool:
        """Whether there are tasks that end without the user's help, now or as soon as workers are ready."""
        core, dispatcher = self._core, self._core.dispatcher
        return bool((dispatcher.leased or dispatcher.waiting) and core.scaled and not core.stopping)

    def _may_wait(self, payload: serializer.Payload) -> bool:
        """Whether there can be room at all, and this thread holds up nobody who would make it."""
        core = self._core
        if payload.nbytes > core.arena.max_bytes // 2:  # see Dispatcher.place
            return False
        if core.dispatcher.entered or threading.current_thread() in core.threads:
            return False
        asyncio = sys.modules.get("asyncio")
        return asyncio is None or asyncio._get_running_loop() is None
