"""What a service manager is told: sd_notify(3), in the few lines that it takes.

READY=1 when the first worker is ready; RELOADING=1 (with the time, for Type=notify-reload) and READY=1 around
a reload; STOPPING=1 before the end; WATCHDOG=1 while the supervisor's thread turns.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

__all__ = ["Notifier"]


class Notifier:
    """Sends to $NOTIFY_SOCKET; to nobody without it. Thread-safety: any thread. Blocking: never."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Takes the variables out of `environ`: workers are not the ones who are asked."""
        self._address = environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        mine = not pid or pid == str(os.getpid())
        self.interval = int(usec) / 2e6 if self._address and mine and usec.isdecimal() else 0.0
        """Seconds between two signs of life that are asked for; 0: none are."""

    def ready(self, status: str = "") -> None:
        """It serves: at the start, and after each reload."""
        self._send("READY=1", f"STATUS={status}" if status else "")

    def reloading(self) -> None:
        """A reload begins. Say `ready` at its end, however it ends."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It ends."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """A sign of life."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        text = "\n".join(line for line in lines if line)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), self._address)
