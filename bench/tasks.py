"""The functions that contenders run, in a module of their own: every pool can pickle them by name."""

from __future__ import annotations

import os
import socket
import time
from functools import lru_cache
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


def first(array: Any) -> int:
    """Its first element: reads nothing else of what it gets."""
    return int(array[0])


def total(array: Any) -> int:
    """The sum of its elements: reads all that it gets."""
    return int(array.sum())


def timed_total(array: Any) -> tuple[int, float]:
    """The sum of its elements, and the seconds that this took."""
    began = time.perf_counter()
    found = int(array.sum())
    return found, time.perf_counter() - began


def full(count: int) -> Any:
    """A new array of so many words, all 7, in ordinary memory."""
    import numpy as np

    return np.full(count, 7, np.uint64)


def born_full(count: int) -> tuple[Any, float]:
    """The same, made in the region, and the seconds that this took. Only in a worker of ours."""
    import runtime

    began = time.perf_counter()
    array = runtime.current().empty(count, "uint64")
    array.fill(7)
    return array, time.perf_counter() - began


def born(count: int) -> Any:
    """An array of so many words, made in the region; only its first and last are set."""
    import runtime

    array = runtime.current().empty(count, "uint64")
    array[0] = array[-1] = 7
    return array


def kept(count: int) -> Any:
    """As `full`, made once and returned each time."""
    return _newest(count)


_newest = lru_cache(maxsize=1)(full)


def check_in(address: str) -> int:
    """Tell the listener at `address` (of a Unix socket) our pid, stay until it answers; the pid."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as host:
        host.connect(address)
        host.sendall(os.getpid().to_bytes(8, "little"))
        host.recv(1)
    return os.getpid()


def spin(seconds: float) -> None:
    """Take so much CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def leave_a_line(path: str, key: int) -> None:
    """Work for a millisecond, and note in a file that it was done."""
    with open(path, "ab", buffering=0) as file:
        file.write(b"%d\n" % key)
    spin(0.001)
