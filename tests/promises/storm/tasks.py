"""What the storm runs in workers. Each task notes in the ledger that it starts and that it ends.

Workers import this module by name, so it imports little. A record's `what` is one of the numbers below, and
in its upper bits the attempt.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import time
import zlib

import recording
from recording import END, START

import runtime

WROTE, LOGGED, CHILD = 3, 4, 5  # a line is out; a log record is; this process is a task's descendant
BY_VALUE, NO_ROOM = 6, 7  # a large argument came piece by piece; an array did not find room in the region

log = logging.getLogger("storm")
kept: list[bytearray] = []
seen: dict[int, tuple[int, object]] = {}  # place -> (number, array): what is seen after its task
SEEN = 4  # places


class Refused(Exception):
    """An ordinary exception of a user."""


class Abandoned(BaseException):
    """One that `except Exception` does not catch."""


class Locked(Exception):
    """One that cannot be pickled."""

    def __init__(self, key):
        super().__init__(key)
        self.lock = threading.Lock()


class Hollow:
    """A result that the host cannot unpickle."""

    def __init__(self, key):
        self.key = key

    def __reduce__(self):
        return refuse, (self.key,)


def refuse(key):
    raise Refused(key)


def started(path, key):
    recording.record(path, key, START | runtime.current().attempt << 8)


def ended(path, key):
    recording.record(path, key, END | runtime.current().attempt << 8)


def spin_for(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def filled(key, nbytes):
    """So many bytes that belong to a key."""
    piece = key.to_bytes(8, "little")
    return (piece * (nbytes // 8 + 1))[:nbytes]


# ---- tasks that end as they should ---------------------------------------------------------------------


def plain(path, key, spin):
    started(path, key)
    spin_for(spin)
    ended(path, key)
    return key


def multiplied(by):
    """A function that only travels by value."""

    def run(path, key, spin):
        return plain(path, key, spin) * by

    return run


def large(path, key, data, nbytes):
    """A checksum of what came, which is spoiled then: no later attempt may see that. So many bytes back."""
    started(path, key)
    found = zlib.crc32(data)
    if isinstance(data, bytearray) and data:
        data[:8] = bytes(min(8, len(data)))
        data[-1] ^= 0xFF
    back = filled(key, nbytes)
    ended(path, key)
    return found, back


def item(path, key, spin, how, nbytes):
    """An item of a map: its key, or so many bytes of it."""
    started(path, key)
    if how == "raise":
        ended(path, key)
        raise Refused(key)
    if how == "hang":
        pause()
    if how in ("exit", "kill"):
        end_process(how)
    spin_for(spin)
    ended(path, key)
    if how == "born":
        array = runtime.current().empty(nbytes // 8 + 1, "i8")
        array[:] = key
        return array
    return filled(key, nbytes) if nbytes else key


def see(key, array):
    """Look at an array for longer, instead of an earlier one, which must be as it was."""
    number, earlier = seen.pop(key % SEEN, (0, None))
    if earlier is not None and not (earlier == number).all():
        raise MemoryError(f"{earlier} is seen in place of {number}")
    seen[key % SEEN] = int(array[0]), array


def unwrapped(thing):
    """The array that somebody has wrapped: see arrays.WRAPPINGS."""
    while not hasattr(thing, "dtype"):
        thing = thing["it"] if isinstance(thing, dict) else thing[-1]
    return thing


def pieced_together(array):
    """Whether its memory came piece by piece: else it lies in a block, or within a pickle."""
    while array.base is not None and hasattr(array.base, "dtype"):
        array = array.base
    return isinstance(array.base, memoryview) and isinstance(array.base.obj, bytearray)


def looking(path, key, keeps, *wrapped):
    """(number, size) of arrays that hold one number each."""
    started(path, key)
    arrays = [unwrapped(thing) for thing in wrapped]
    if any(map(pieced_together, arrays)):
        recording.record(path, key, BY_VALUE)
    found = [(int(array[0]), len(array)) if (array == array[0]).all() else array for array in arrays]
    if keeps:
        see(key, arrays[-1])
    ended(path, key)
    return found


def marking(path, key, array):
    """Changes the first place of an array that others see. How many are as they were, and it."""
    started(path, key)
    array[0] = -key
    found = 1 + int((array[1:] == key).sum())
    ended(path, key)
    return found


def giving_back(path, key, keeps, wrapped):
    started(path, key)
    array = unwrapped(wrapped)
    if keeps:
        see(key, array)
    ended(path, key)
    return array


def born(path, key, keeps, n):
    """An array that is made in the region."""
    started(path, key)
    array = runtime.current().empty(n, "i8")
    if not runtime._core.in_region(array):
        recording.record(path, key, NO_ROOM)
    array[:] = key
    if keeps:
        see(key, array)
    ended(path, key)
    return array


def let_go(spin):
    spin_for(spin)
    seen.clear()


def reporting(path, key, steps):
    """Says how far it is. The note tells of the same step and key: a mixture would be seen."""
    started(path, key)
    for step in range(steps):
        runtime.current().report(step, steps, f"{key} {step}")
        spin_for(0.0003)
    ended(path, key)
    return key


def chatting(path, key, lines):
    """Lines on stdout and records for the host's loggers. What is noted after each is out for good."""
    started(path, key)
    for n in range(lines):
        print(f"storm {key} {n}", flush=True)
        recording.record(path, key, WROTE)
        log.warning("storm %d %d", key, n)
        recording.record(path, key, LOGGED)
    ended(path, key)
    return key


def growing(path, key, nbytes):
    """Takes memory and keeps it, slowly enough for its size to be looked at."""
    started(path, key)
    kept.append(bytearray(b"x") * nbytes)
    spin_for(0.002)
    ended(path, key)
    return key


# ---- tasks that raise, or whose result does not travel -------------------------------------------------


def raising(path, key, how):
    started(path, key)
    ended(path, key)
    raise {
        "exception": Refused,
        "base": Abandoned,
        "exit": SystemExit,
        "interrupt": KeyboardInterrupt,
        "locked": Locked,
    }[how](key)


def returning(path, key, how):
    started(path, key)
    ended(path, key)
    return threading.Lock() if how == "lock" else Hollow(key)


def generating(path, key):
    """A generator function: its result cannot be pickled, and it never begins."""
    started(path, key)
    yield key


def refusing_until(path, key, attempt):
    started(path, key)
    ended(path, key)
    if runtime.current().attempt < attempt:
        raise Refused(key)
    return key


# ---- tasks that end their process, or hang -------------------------------------------------------------


def end_process(how):
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "abort": signal.SIGABRT}[how])
    while True:  # the signal is on its way
        pass


def dying(path, key, how):
    started(path, key)
    end_process(how)


def dying_until(path, key, attempt):
    started(path, key)
    if runtime.current().attempt < attempt:
        end_process("kill")
    ended(path, key)
    return key


def pause():
    while True:
        time.sleep(60)


def hanging(path, key, how):
    """Never returns; `how`: in Python, in C with the GIL, or with a child that hangs as well."""
    started(path, key)
    if how == "gil":
        ctypes.PyDLL(None).sleep(1000)
    if how == "child":
        child(path, key)
    pause()


# ---- tasks with descendants ----------------------------------------------------------------------------


def child(path, key, end=None):
    """The pid of a child that ends by itself, by calling end(), or hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            recording.record(path, key, CHILD)
            if end is None:
                pause()
            end()
        finally:
            os._exit(0)
    return pid


def forking(path, key, how):
    """Leave a child behind, or a grandchild in a session of its own; or wait for one."""
    started(path, key)
    if how == "wait":
        pid = child(path, key, lambda: time.sleep(0.003))
        os.waitpid(pid, 0)  # it may have been killed: so be it
    elif how == "leave":
        child(path, key)
    else:
        os.waitpid(child(path, key, lambda: daemon(path, key)), 0)
    ended(path, key)
    return key


def daemon(path, key):
    os.setsid()
    child(path, key)
