"""`Future`: what `submit` returns. That it makes its lock late is in _future."""

from __future__ import annotations

import concurrent.futures
from typing import Any, TypeVar

from runtime import _core

__all__ = ["Future"]

T = TypeVar("T")


class Future(_core.Promise, concurrent.futures.Future[T]):
    """What `submit` returns: a stdlib Future whose call can be taken back until a worker has claimed it.

    Thread-safety: every method, from any thread. Its lock is made when somebody first waits, or adds a
    callback; see _future.
    """

    def __init__(self) -> None:
        """A future that nobody fulfils yet; those of calls are made by `submit`."""

    def cancel(self) -> bool:
        """Cancel the call if no worker has started it. True: it never runs."""
        task, core = self._task, self._core
        if task is None or core is None:
            return super().cancel()  # settled, or made by hand: whoever made it notifies
        if not self.done():
            if core.dispatcher.cancel(task) != _core.CANCEL_DONE:
                return False
            core.tell()
            core.wake()
        return self.withdraw()

    def withdraw(self) -> bool:
        """The call never runs: tell those who wait. For the runtime itself; users call `cancel`."""
        if not super().cancel():
            return False
        self._task = None
        with self._condition:  # re-entrant; two threads may cancel at once, and only one may notify
            if self._state == "CANCELLED":
                self.set_running_or_notify_cancel()
        return True

    def running(self) -> bool:
        """Whether a worker is running the call now."""
        task, core = self._task, self._core
        if task is None or core is None:
            return super().running()
        return not self.done() and bool(core.dispatcher.running(task))

    def progress(self) -> tuple[float, float | None, str] | None:
        """The (done, total, note) that the call has reported last; None before the first report.

        It stays when the call has ended. A retry begins without one.
        """
        task, core = self._task, self._core
        if task is not None and core is not None:
            reported: tuple[float, float | None, str] | None = core.dispatcher.progress(task)
            if reported is not None:
                return reported
        return self.reported

    def __repr__(self) -> str:
        if self.running():  # which the stdlib's reads from a state that nobody sets here
            return f"<{type(self).__name__} at {id(self):#x} state=running>"
        return super().__repr__()

    def __reduce__(self) -> Any:
        raise TypeError("a Future belongs to its process; send its result() instead")
