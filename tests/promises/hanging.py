"""Tasks that never end, and note when they began."""

from __future__ import annotations

import os
import time


def began(path: str) -> None:
    """The own pid and the time, by one atomic append."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(fd, f"{os.getpid()} {time.monotonic()!r}\n".encode())
    os.close(fd)


def sleep(path: str) -> None:
    began(path)
    while True:
        time.sleep(60)


def spin(path: str) -> None:
    began(path)
    while True:
        pass


def wait_for_a_lock(path: str) -> None:
    import threading

    lock = threading.Lock()
    lock.acquire()
    began(path)
    lock.acquire()


def swallow(path: str) -> None:
    """Whatever is raised in it."""
    began(path)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass


def pause_with_gil(path: str) -> None:
    import ctypes

    began(path)
    while True:
        ctypes.PyDLL(None).pause()


def match_with_gil(path: str) -> None:
    import re

    began(path)
    re.match(r"(a|aa)+$", "a" * 200 + "b")


def power_with_gil(path: str) -> None:
    began(path)
    3 ** (3**18)


PYTHON = (sleep, spin, wait_for_a_lock, swallow)
HOLDING_THE_GIL = (pause_with_gil, match_with_gil, power_with_gil)
