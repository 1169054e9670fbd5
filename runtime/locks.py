"""Locks that a signal handler may find held by its own thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["let_go"]


@contextlib.contextmanager
def let_go(*locks: threading.RLock) -> Iterator[None]:
    """Without those of the locks that this thread holds.

    Python runs a signal handler between any two bytecodes of the main thread, also while that holds a lock of
    ours. A handler that waits for the end of a runtime waits for threads that want the lock.
    """
    held = [(lock, lock._release_save()) for lock in locks if lock._is_owned()]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for lock, state in held:
            lock._acquire_restore(state)  # type: ignore[attr-defined]
