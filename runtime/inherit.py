"""What a zygote that is forked from the host inherits, and what it must not keep.

A fork copies one thread. So the host must have no other: a lock that another one held would stay locked for
ever. Everything else of the host is there by copy-on-write, which is the point; but

    callbacks    atexit, weakref.finalize, multiprocessing's: they are for the host's end, not for a worker's
    garbage      is frozen: no finalizer of what the host has dropped runs a second time
    signals      handlers, the wakeup descriptor and the mask are the host's
    descriptors  that are not ours are overlaid by /dev/null: whoever holds the write end of a user's pipe
                 hides its end from others
    log handlers show in the host what tasks log, if that is forwarded: here a record would stop at them
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Collection

__all__ = ["forget_handlers", "forget_host", "has_threads", "refuse_threads"]

_THREAD_END = 0.5  # seconds for a thread that was joined to vanish


def has_threads() -> bool:
    """Whether there is a thread beside this one. A thread that was joined may take a moment to be gone."""
    deadline = time.monotonic() + _THREAD_END
    while len(os.listdir("/proc/self/task")) > 1:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.001)
    return False


def refuse_threads() -> None:
    """Raises: RuntimeError that names the threads, if this process has any but one."""
    if not has_threads() and threading.active_count() == 1:  # in this order: one of ours may be ending
        return
    names = {thread.native_id: f"{thread.name!r}" for thread in threading.enumerate()}
    others = [
        names.get(int(entry)) or _native(entry)
        for entry in sorted(os.listdir("/proc/self/task"), key=int)
        if int(entry) != threading.get_native_id()
    ]
    raise RuntimeError(
        f'start_method="fork" needs a host with one thread; this one has {len(others)} more: '
        f"{', '.join(others)}. A lock that one of them holds would stay locked in the workers for ever. Make "
        "the Runtime before they start (importing numpy starts some, unless OMP_NUM_THREADS=1), end them "
        'first, or use start_method="exec" with preload='
    )


def _native(entry: str) -> str:
    """A thread that is not Python's; by default it has the program's name."""
    try:
        with open(f"/proc/self/task/{entry}/comm", errors="replace") as file:
            return f"{file.read().strip()!r} (native)"
    except OSError:
        return f"thread {entry}"


def forget_host(keep: Collection[int]) -> None:
    """In the forked zygote, at once, with every signal blocked: leave alone what is the host's.

    keep: descriptors that are ours.
    """
    gc.freeze()
    _forget_callbacks()
    _overlay_descriptors({1, 2, *keep})
    _own_streams()


_handlers: list[list[logging.Handler]] = []  # the host's, kept: no finalizer of theirs shall run here


def forget_handlers() -> None:
    """In the forked zygote: loggers as in a fresh interpreter, but for levels and filters."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):  # else it stands for a parent that nobody has asked for
            _handlers.append(logger.handlers)
            logger.handlers = []
            logger.propagate = True


def _forget_callbacks() -> None:
    atexit._clear()
    registry = getattr(weakref.finalize, "_registry", None)
    if isinstance(registry, dict):  # an entry that is gone is not called, however its object ends
        registry.clear()
        weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    util = sys.modules.get("multiprocessing.util")
    if util is not None:  # as its own children begin
        process = sys.modules["multiprocessing.process"]
        process._children = set()  # type: ignore[attr-defined]
        util._finalizer_registry.clear()
        util._run_after_forkers()
        atexit.register(util._exit_function)


def _overlay_descriptors(keep: Collection[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        if fd not in keep and fd != null:
            with contextlib.suppress(OSError):  # that of the listing is closed by now
                os.fstat(fd)
                os.dup2(null, fd, inheritable=fd == 0)
    if 0 not in keep:
        os.dup2(null, 0)
    os.close(null)


def _own_streams() -> None:
    """sys.stdin is empty; what a task prints goes where the host's descriptors 1 and 2 lead."""
    sys.stdin = os.fdopen(0, closefd=False)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        with contextlib.suppress(OSError):
            try:
                same = getattr(sys, name).fileno() == fd
            except (AttributeError, OSError, ValueError):
                same = False
            if not same:
                os.fstat(fd)
                setattr(sys, name, os.fdopen(fd, "w", 1, errors="backslashreplace", closefd=False))
