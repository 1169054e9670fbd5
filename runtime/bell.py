"""How a thread that sleeps in poll() is woken by another one."""

from __future__ import annotations

import contextlib
import os
import threading

__all__ = ["Bell"]


class Bell:
    """An eventfd that any thread may ring, also after it was closed."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.inert = False  # in a fork of the host
        self._lock = threading.RLock()  # a destructor that is run inside may ring again

    def ring(self) -> None:
        """Make a poll on the descriptor return."""
        if self.inert:
            return
        with self._lock:
            if self.fd >= 0:
                with contextlib.suppress(OSError):  # full; or it was closed under us, see let_go
                    os.eventfd_write(self.fd, 1)

    @property
    def lock(self) -> threading.RLock:
        """For `let_go`."""
        return self._lock

    def silence(self) -> None:
        """Take back what was rung."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """No ring reaches the descriptor any more, which may be somebody else's soon."""
        with self._lock:
            fd, self.fd = self.fd, -1
        os.close(fd)
