"""What threads of the user's may wait for.

The rule of the house: **a thread of the user's holds no lock that a thread of ours wants.** Python runs
signal handlers in the main thread between any two bytecodes, also while it holds a lock; a handler that then
waits for the runtime, in `result()` or `shutdown()` say, would wait for ever. So what users call goes by what
is atomic under the GIL: compiled methods without bytecode inside, one store of a name, the C methods of
built-in types.
"""

from __future__ import annotations

import threading

__all__ = ["SLICE", "Latch"]

SLICE = 1.0
"""Seconds that a user's thread waits for a lock at a time.

CPython looks for signals, lets the GIL go, and then waits; while other threads want the GIL that takes a
moment, and a Ctrl-C that comes in it would be seen when the wait is over.
"""


class Latch:
    """An event that happens once.

    Unlike threading.Event it is no lock that a handler could find taken by the wait that it interrupts.
    Thread-safety: every method, from any thread, also in a signal handler. Blocking: only `wait`.
    """

    def __init__(self) -> None:
        self._open = False
        self._gate = threading.Lock()  # held until it is open; who gets it hands it on
        self._gate.acquire()

    def set(self) -> None:
        """From now on it has happened. For one thread."""
        if not self._open:
            self._open = True
            self._gate.release()

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._open

    def wait(self, timeout: float) -> bool:
        """Until it has happened, or so many seconds. Whether it has."""
        if not self._open and self._gate.acquire(timeout=timeout):
            self._gate.release()
        return self._open
