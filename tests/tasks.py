"""What tests of the runtime run in workers, and how they wait for each other without sleeping.

Workers import this module, so it imports little: no pytest, no numpy.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

PATIENCE = 30.0  # seconds until a condition that should come true counts as never


class Gate:
    """A place in a task where it says that it has come, and waits to be let on.

    The host: `gate.pass_through` is the function to submit, with `gate.path` first; `arrived()` waits for
    tasks to come, `open()` lets them on. When the host closes the gate, whoever waits goes on.
    """

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self.path = str(folder / name)
        self._ends = []
        for end in (".in", ".out"):
            os.mkfifo(self.path + end)
            self._ends.append(os.open(self.path + end, os.O_RDWR | os.O_CLOEXEC))
        self._text = b""

    def arrived(self, count: int = 1) -> list[int]:
        """The pids of the next `count` tasks that come."""
        deadline = time.monotonic() + PATIENCE
        while (came := self._text.count(b"\n")) < count:
            if not select.select([self._ends[0]], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{came} of {count} tasks came to the gate")
            self._text += os.read(self._ends[0], 4096)
        *lines, self._text = self._text.split(b"\n", count)
        return [int(line) for line in lines]

    def open(self, count: int = 1) -> None:
        """Let `count` tasks on, now or when they come."""
        os.write(self._ends[1], b"x" * count)

    def close(self) -> None:
        """Nobody waits here any more."""
        self.open(4096)
        for end in self._ends:
            os.close(end)
        self._ends = []


# ---- in workers ----------------------------------------------------------------------------------


def pass_through(path: str, value: Any = None) -> Any:
    """Say that this task has come to the gate, wait to be let on, return `value`."""
    with open(path + ".out", "rb", buffering=0) as let_on:
        with open(path + ".in", "wb", buffering=0) as came:
            came.write(b"%d\n" % os.getpid())
        let_on.read(1)
    return value


def log_line(path: str, value: Any) -> Any:
    """Append `value` as a line to a file: lines of several processes do not mix. Returns the value."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{value}\n".encode())
    return value


_ticks = itertools.count()


def tick(value: Any) -> tuple[int, int, Any]:
    """(pid, how many ticks came before it in this worker, value)."""
    return os.getpid(), next(_ticks), value


def echo(*args: Any) -> Any:
    """Its argument, or all of them."""
    return args[0] if len(args) == 1 else args


def add(*args: Any, **kwargs: Any) -> Any:
    """The sum of its arguments."""
    return sum(args) + sum(kwargs.values())


on_knock: Any = None  # what a test does when its process unpickles a Knocker


class Knocker:
    """Calls on_knock() when it is unpickled, and is "come" then."""

    def __reduce__(self) -> Any:
        return _knocked, ()


def _knocked() -> str:
    if on_knock is not None:
        on_knock()
    return "come"


def knocker(_: Any = None) -> Knocker:
    """A Knocker."""
    return Knocker()


class HangsWhenDropped:
    """Its destructor never returns, in a process other than the one that made it."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __del__(self) -> None:
        while os.getpid() != self.pid:
            time.sleep(1)


def none_left(nbytes: int, spare: int = 0) -> bytes:
    """So many bytes, when this process can have half as many more, and those to spare."""
    import resource

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = mapped + nbytes + nbytes // 2 + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return bytes(nbytes)


def write_as_list(pickle: bytes) -> None:
    """From now on this worker says of every list of plain results that this is its pickle."""
    from runtime import _series

    _series.dumps = lambda *_: pickle


def write_as_plain(data: bytes) -> None:
    """From now on this worker says of every result that is not plain that these are its bytes, and it is."""
    from runtime import _core
    from runtime.worker import Worker

    Worker.succeeded = lambda self, result: (_core.S_PLAIN, data, (), ())


def deliver_nothing() -> None:
    """From now on this worker ends chunks without having run anything."""
    from runtime.worker import Worker

    Worker.deliver = lambda self, entry, *_: self.port.finish(entry, [], 0)


def break_relinking() -> None:
    """From now on no global can be moved back in this worker, and each needs it."""
    from runtime import functions

    functions.relink = _broken
    functions.Links.stamp += 1


def _broken(_: Any) -> NoReturn:
    raise KeyError("broken")


def own_pid(*_: Any) -> int:
    """Whatever the arguments."""
    return os.getpid()


def pid_and(value: Any) -> tuple[int, Any]:
    """(pid, value)."""
    return os.getpid(), value


def throw(error: BaseException) -> NoReturn:
    """Raise it."""
    raise error


def throw_type(kind: type[BaseException], *args: Any) -> NoReturn:
    """Raise kind(*args)."""
    raise kind(*args)


def kill_self(number: int = signal.SIGKILL) -> NoReturn:
    """End this worker by a signal."""
    os.kill(os.getpid(), number)
    signal.pause()
    raise AssertionError("not reached")


def die_until(attempt: int) -> int:
    """Kill this worker, until the attempt of that number, which returns it."""
    import runtime

    if runtime.current().attempt < attempt:
        kill_self()
    return runtime.current().attempt


def die_once_at(value: int, fatal: int) -> int:
    """The value; the first attempt of one of them kills this worker."""
    import runtime

    if value == fatal and runtime.current().attempt == 1:
        kill_self()
    return value


def fail_until(attempt: int, kind: type[BaseException]) -> int:
    """Raise, until the attempt of that number, which returns it."""
    import runtime

    if runtime.current().attempt < attempt:
        raise kind(f"attempt {runtime.current().attempt}")
    return runtime.current().attempt


def hang_until(attempt: int) -> int:
    """Hang, until the attempt of that number, which returns it."""
    import runtime

    if runtime.current().attempt < attempt:
        threading.Event().wait()
    return runtime.current().attempt


def hang(*_: Any) -> NoReturn:
    """Wait for what never comes."""
    threading.Event().wait()
    raise AssertionError("not reached")


def log_and_hang_at(path: str, value: int, bad: int) -> int:
    """The value, which is logged; one of them hangs."""
    log_line(path, value)
    if value == bad:
        hang()
    return value


def spin(seconds: float) -> float:
    """Keep a processor busy for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


def hang_in_c() -> None:
    """Hang in C, with the GIL held."""
    ctypes.PyDLL(None).sleep(1000)


value_of_worker: Any = "not set"


def set_value(value: Any) -> None:
    """An initializer: sets a global."""
    global value_of_worker
    value_of_worker = value


def get_value() -> Any:
    """What the initializer set."""
    return value_of_worker


def nested() -> tuple[int, int, int, int]:
    """Make a Runtime in a worker: (its worker count, this pid, the pid of a task in it, its result)."""
    import runtime

    with runtime.Runtime() as inner:
        return (
            inner._max_workers,
            os.getpid(),
            inner.submit(os.getpid).result(),
            inner.submit(add, 20, 22).result(),
        )


def where() -> tuple[Any, ...]:
    """What runtime.current() says."""
    import runtime

    here = runtime.current()
    here.local["calls"] = here.local.get("calls", 0) + 1
    return here.number, here.slot, here.generation, here.thread, here.task, here.attempt, here.local["calls"]


class LoadsBadly:
    """An object that travels, and raises when it is unpickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return throw, (self.error,)


class DumpsBadly:
    """An object that raises when it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise type(self.error)(*self.error.args)  # a fresh one: its traceback keeps what submits it alive


class DumpsBadlyHere:
    """An object that is made in a worker, and raises when the worker pickles it."""

    def __reduce__(self) -> Any:
        raise ValueError("stays here")


class Tracked:
    """An object that can be referred to weakly, and travels."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class NeedsTwo(Exception):
    """An exception that pickles, and cannot be made again from its args."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left}-{right}")


class Locked(Exception):
    """An exception that cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Odd(BaseException):
    """A BaseException of a user's own."""


def outer_failure() -> NoReturn:
    """An exception with a cause."""
    try:
        inner_failure()
    except KeyError as error:
        raise ValueError("outer text") from error
    raise AssertionError("not reached")


def inner_failure() -> NoReturn:
    """The cause."""
    raise KeyError("inner text")


def make(kind: str) -> Any:
    """A result that makes trouble."""
    if kind == "lock":
        return threading.Lock()
    if kind == "generator":
        return (x for x in ())
    if kind == "dumps badly":
        return DumpsBadlyHere()
    if kind == "loads badly":
        return LoadsBadly(ValueError("not in the host"))
    if kind == "loads with SystemExit":
        return LoadsBadly(SystemExit(7))
    raise AssertionError(kind)


def recurse(depth: int = 0) -> int:
    """Without end."""
    return recurse(depth + 1)


def large_exception(nbytes: int) -> NoReturn:
    """An exception with a long text."""
    raise ValueError("x" * nbytes)


_left: list[Any] = []


def leave_a_dead_proxy_and_a_zombie() -> int:
    """Keep a proxy whose object is gone, and a child that has ended and was not waited for."""
    import weakref

    class Thing:
        pass

    thing = Thing()
    _left.append(weakref.proxy(thing))
    del thing
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return os.getpid()
