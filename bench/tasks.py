"""The functions that contenders run, in a module of their own: every pool can pickle them by name."""

from __future__ import annotations

import os
import socket
from typing import Any, TypeVar

T = TypeVar("T")


def nothing() -> None:
    """A task that costs nothing."""


def same(value: T) -> T:
    """What it gets."""
    return value


def ends(array: Any) -> int:
    """The sum of the first and the last element: reads next to nothing of what it gets."""
    return int(array[0]) + int(array[-1])


def check_in(address: str) -> int:
    """Tell the listener at `address` (of a Unix socket) our pid, stay until it answers; the pid."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as host:
        host.connect(address)
        host.sendall(os.getpid().to_bytes(8, "little"))
        host.recv(1)
    return os.getpid()
