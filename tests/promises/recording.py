"""A ledger on disk that tasks write themselves: who started and who ended what, in one order.

A record has 16 bytes and is appended by one write(2) to a file opened with O_APPEND: records of all
processes come one after another, and as none crosses the border of a page, SIGKILL leaves it out or in, never
half.
"""

from __future__ import annotations

import os
import signal
import struct
import time
from typing import NamedTuple

RECORD = struct.Struct("<QII")  # key, pid, what
START, END = 1, 2

_open: dict[str, int] = {}


class Entry(NamedTuple):
    key: int
    pid: int
    what: int


def record(path: str, key: int, what: int) -> None:
    fd = _open.get(path)
    if fd is None:
        mine = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fd = _open.setdefault(path, mine)
        if fd != mine:  # another thread was quicker
            os.close(mine)
        for other in list(_open):  # of an earlier round: one ledger at a time
            if other != path and (old := _open.pop(other, None)) is not None:
                os.close(old)
    os.write(fd, RECORD.pack(key, os.getpid(), what))


def recorded(path: str, key: int, spin: float = 0.0) -> int:
    """A task: its records, with so many seconds of work in between."""
    record(path, key, START)
    if spin:
        end = time.perf_counter() + spin
        while time.perf_counter() < end:
            pass
    record(path, key, END)
    return key


def poison(path: str, key: int, how: str) -> None:
    """A task that ends its process."""
    record(path, key, START)
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSEGV)
    while True:  # the signal is on its way
        pass


def poison_or_recorded(path: str, key: int, how: str) -> int:
    """The same, as items of one map: `how` is empty for the innocents."""
    if how:
        poison(path, key, how)
    return recorded(path, key)


def entries(path: str) -> list[Entry]:
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        return [Entry(*fields) for fields in RECORD.iter_unpack(file.read())]
