"""What runs in the workers of test_recycling and test_restarts: importing this brings no pytest along."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import evil

import runtime


def noted(path: str, value: int) -> int:
    evil.append(path, f"{os.getpid()}\n")
    return value


def noted_until(path: str, attempt: int) -> int:
    """Raise until the attempt of that number."""
    evil.append(path, f"{os.getpid()}\n")
    if runtime.current().attempt < attempt:
        raise ValueError(attempt)
    return attempt


kept: list[bytearray] = []


def grow(nbytes: int) -> int:
    """Take memory and keep it."""
    kept.append(bytearray(b"x") * nbytes)
    return os.getpid()


def grow_slowly(nbytes: int) -> int:
    """So slowly that the size is looked at."""
    threading.Event().wait(0.002)
    return grow(nbytes)


def own_limit() -> float:
    from runtime.worker import Worker

    (limit,) = [it.max_rss for it in gc.get_objects() if isinstance(it, Worker)]
    assert limit is not None
    return float(limit)


def leave_late(path: str) -> int:
    import atexit

    atexit.register(evil.wait_for, path, path + ".leaving")
    return os.getpid()


def terminate_a_child() -> int:
    """The signal that a forked child has ended by, after SIGTERM."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    os.kill(pid, signal.SIGTERM)
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_a_pool(method: str) -> list[int]:
    """What a library may do that does not know where it runs."""
    import concurrent.futures
    import multiprocessing

    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        first = pool.map(abs, range(-5, 0))
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        return first + list(executor.map(abs, range(-5, 0)))


def plan(path: str, fatal: str) -> None:
    """An initializer: the n-th process ends at once if the n-th letter of `fatal` is an x."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"%d\n" % os.getpid())
    n = os.fstat(descriptor).st_size
    os.close(descriptor)
    count = len(Path(path).read_text().split())
    assert n
    if fatal[count - 1 : count] == "x":
        os._exit(3)


def fails_without(path: str, how: str) -> None:
    """An initializer."""
    if not os.path.exists(path):
        evil.misbehave(how)


def second_fails(path: str) -> None:
    if runtime.current().number == 1:
        os._exit(3)
