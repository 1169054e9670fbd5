"""Heirs: how a zygote that was forked from the host is replaced, though the host has threads by then.

    host                        zygote                      heir
      │ ◄── {"heir"} + connection  │                           │
      │                            │ ──fork──────────────────► │
      │ ◄── {"here", pid} + its pidfd ─────────────────────────│   waits; has forked nothing
      │                            ✗                           │
      │ {"lead", preload, …} ────────────────────────────────► │   makes the next heir, then serves
      ✗  host's pidfd                                        ✗ │   as a zygote does

The heir is made 50 ms after the start, since the first workers come first, or before the first import if
something is to be preloaded: an import may fail, or leave a thread behind that forbids forking. A zygote that
dies without one, or together with it, cannot be replaced. The host has the way to the heir before there is
one, so the zygote may die at any moment: either the heir says that it is there, or the connection has ended.
"""

from __future__ import annotations

import abc
import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from runtime import _core
from runtime.channels import readable
from runtime.wire import REPORT_BYTES, decode_report

__all__ = ["Heirs"]

_AFTER = 0.05  # seconds after which an heir is made
_AGAIN = 1.0  # seconds until the next attempt, when there was no process to be had


class Heirs(abc.ABC):
    """A zygote's dealings with its heir, and the heir's own wait. For the one thread of its process."""

    connection: socket.socket
    host_pidfd: int
    settings: dict[str, Any]
    poller: select.poll
    quitting: bool

    def __init__(self) -> None:
        self.keeps_heir = False  # it was forked from the host
        self.heir: tuple[int, int] | None = None  # (pidfd, pid)
        self.heir_at = 0.0  # monotonic time at which the next one is made

    @abc.abstractmethod
    def fork_child(self) -> int:
        """As os.fork."""

    @abc.abstractmethod
    def report(self, what: str, fds: Sequence[int] = (), **fields: Any) -> None:
        """Tell the host."""

    @abc.abstractmethod
    def let_go(self) -> None:
        """In a child: close what is the zygote's."""

    @abc.abstractmethod
    def lead(self) -> None:
        """Serve as a zygote. Never returns."""

    @abc.abstractmethod
    def leave(self) -> None:
        """End every descendant, and this process. Never returns."""

    def until_heir(self) -> float | None:
        """Milliseconds until an heir is due, which is made if it is; None: there is one, or none is kept."""
        if not self.keeps_heir or self.heir is not None:
            return None
        now = time.monotonic()
        if self.heir_at == 0.0:
            self.heir_at = now + _AFTER
        if now >= self.heir_at and self.make_heir():
            return None
        return max(1.0, (self.heir_at - now) * 1000)

    def make_heir(self) -> bool:
        """Send the host the way to a spare zygote, then fork it.

        False: there is no process to be had, now.
        """
        self.heir_at = time.monotonic() + _AGAIN
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        except OSError:
            return False
        try:
            self.report("heir", [ours.fileno()])
            pid = self.fork_child()
            if pid == 0:
                ours.close()
                self.become_heir(theirs)
            pidfd = _core.pidfd_open(pid)
            self.heir = (pidfd, pid)
            self.heir_at = 0.0
            self.poller.register(pidfd, select.POLLIN)
            return True
        except OSError:
            return False
        finally:
            ours.close()
            theirs.close()

    def become_heir(self, connection: socket.socket) -> None:
        """In the child: wait for the host's word. Never returns."""
        try:
            self.let_go()
            _core.become_subreaper()
            self.connection = connection
            own = _core.pidfd_open(os.getpid())
            self.report("here", [own], pid=os.getpid())
            os.close(own)
            self.poller = select.poll()
            self.poller.register(connection, select.POLLIN)
            self.poller.register(self.host_pidfd, select.POLLIN)
            while True:
                self.poller.poll()
                if readable(self.host_pidfd, 0):
                    self.leave()
                data = self.connection.recv(REPORT_BYTES)
                order = decode_report(data) if data else {"what": "quit"}
                if order["what"] == "lead":
                    self.settings["preload"], self.settings["imports"] = order["preload"], order["imports"]
                    self.make_heir()
                    self.lead()
                self.quitting = bool(data)
                self.leave()
        finally:
            os._exit(1)

    def bury_heir(self) -> None:
        """The heir has died: the next one is made soon."""
        assert self.heir is not None
        pidfd, pid = self.heir
        self.heir = None
        self.poller.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
