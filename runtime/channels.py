"""What lies between one worker and its host beside the region, made by the zygote around the fork.

    worker 1 (stdout)   ──pipe──►  out       text
    worker 2 (stderr)   ──pipe──►  err       text
    worker records      ──socket─► records   log records and warnings, one message each; the other way
                                             round: the number of a question for stacks
    worker stack        ──memfd──  stack     Python stacks: what a process wrote there outlives it

The zygote closes every end as soon as the host has its own, so no other worker holds one: the worker's death
is the end of each stream, unless a child of a task lives on. The host bounds that (relay.py).
"""

from __future__ import annotations

import os
import select
import socket
import threading

from runtime import _core

__all__ = ["Channels", "HostEnds", "readable"]


def readable(fd: int, seconds: float | None) -> bool:
    """Whether there is something to read, or an end; of a pidfd: whether the process has ended.

    Blocking: so many seconds at most; None: until it is so. Unlike select(), for descriptors over 1023 too.
    """
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(None if seconds is None else seconds * 1000))


class Channels:
    """Both ends of one worker's channels. In the zygote, from before the fork until the host has its own.

    Raises: OSError when there is no descriptor left; then nothing stays open.
    """

    def __init__(self) -> None:
        self.host: list[int] = []  # out, err, records, stack: as HostEnds takes them
        self._worker: list[int] = []  # out, err, records
        try:
            for _ in range(2):
                reading, writing = os.pipe()
                self.host.append(reading)
                self._worker.append(writing)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.host.append(ours.detach())
            self._worker.append(theirs.detach())
            self.host.append(_core.memfd_create(b"runtime-stack"))
        except OSError:
            self.close()
            raise

    def enter(self) -> tuple[socket.socket, int]:
        """In the new worker: its ends take their places. The records' socket and the stacks' file."""
        out, err, records = self._worker
        *others, stack = self.host
        os.dup2(out, 1)
        os.dup2(err, 2)
        for fd in (out, err, *others):
            os.close(fd)
        return _blocking(records), stack

    def close(self) -> None:
        """In the zygote: the worker and the host have theirs."""
        for fd in (*self.host, *self._worker):
            os.close(fd)


def _blocking(fd: int) -> socket.socket:
    """The socket, whatever default timeout the user has set for sockets."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
    made.settimeout(None)
    return made


class HostEnds:
    """The host's ends for one worker.

    out, err, records: belong to the relay, which closes them. stack: the supervisor's, who closes it after
    the worker's death. Who asks for stacks takes duplicates of the last two.
    """

    COUNT = 4

    def __init__(self, number: int, fds: list[int]) -> None:
        self.number = number
        self.out, self.err, records, self.stack = fds
        self.records = _blocking(records)
        self.asking = 0  # threads that wait for stacks in the file
        self.heard: tuple[int, float, int] | None = None  # the last question that the worker is known to have
        #                              heard, and not to have answered: number, monotonic seconds, position
        self.signalling = threading.Lock()  # held by the one that reads what a signal makes the worker write
