"""Back-pressure: who submits large arguments faster than they are worked on waits for room in the region.

Only while less and less of it is held, as the workers free room without the user's help, or while what they
free goes to tasks that wait already; and only in a thread that may wait at all. Else the arguments stay in
the host's own memory until they are leased.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from runtime import _core, serializer

__all__ = ["Pressed", "Pressure"]

_STALLED = 1.0  # seconds in which nothing was freed, after which nobody waits for long
_LONGEST = 10.0  # seconds that anybody waits: what is freed may never be enough
_DOUBT = 0.005  # seconds that they wait nevertheless, to see whether something is freed again
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
        # Bytes held, and frees so far, when nothing had been freed for a second; None: since then it was.
        self._stalled: tuple[int, int] | None = None

    def place(self, task: _core.Task, payload: serializer.Payload) -> bool:
        """Lay the arguments of a new task out in the region. False: no room, and nobody should wait for it.

        Blocking: as `wait`.
        """
        place = partial(self._core.dispatcher.place, task, payload.data, payload.buffers, payload.readonly)
        # More than a half: see Dispatcher.place.
        return place() or (payload.nbytes <= self._core.arena.max_bytes // 2 and self.wait(place))

    def wait(self, attempt: Callable[[], bool]) -> bool:
        """Try again whenever less of the region is held. False: no room, and nobody should wait for it.

        Blocking: until there is room, while less and less of the region is held, or what is freed goes to
        those that wait already. If that was not so for a second, nobody waits for long until it is. Signals
        are handled.
        """
        if not self._may_wait():
            return False
        arena = self._core.arena
        least, frees = arena.held, arena.frees
        stalled = self._stalled is not None and not self._moves(*self._stalled)
        if not stalled:
            self._stalled = None
        patience, since = _DOUBT if stalled else _STALLED, time.monotonic()
        end = since + _LONGEST
        while self._worked_on() and time.monotonic() < end:
            time.sleep(_NAP)
            if self._moves(least, frees):
                if arena.held < least and attempt():
                    return True
                least, frees, since = min(least, arena.held), arena.frees, time.monotonic()
                patience, self._stalled = _STALLED, None
            elif time.monotonic() - since > patience:
                self._stalled = least, frees
                return False
        return False

    def _moves(self, least: int, frees: int) -> bool:
        """Whether there is more room than then, or what was freed since went to those that waited before."""
        arena = self._core.arena
        return arena.held < least or bool(self._core.dispatcher.waiting and arena.frees != frees)

    def _worked_on(self) -> bool:
        """Whether there are tasks that end without the user's help, now or as soon as workers are ready."""
        core, dispatcher = self._core, self._core.dispatcher
        return bool((dispatcher.leased or dispatcher.waiting) and core.scaled and not core.stopping)

    def _may_wait(self) -> bool:
        """Whether this thread holds up nobody who would make room."""
        core = self._core
        if core.dispatcher.entered or threading.current_thread() in core.threads:
            return False
        asyncio = sys.modules.get("asyncio")
        return asyncio is None or asyncio._get_running_loop() is None
