"""Tasks that fork, held at a moment of the fork: preloaded, so that a worker's handlers run after these."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from runtime import forking, worker

_importer = os.getpid()


def preloaded() -> bool:
    """Whether the handlers here were registered before this worker was made."""
    return os.getpid() != _importer


class Hold:
    """What the next fork runs on either side of it, once, before the worker notes the child."""

    parent: Callable[[], object] | None = None
    child: Callable[[], object] | None = None


def _in_parent() -> None:
    hold, Hold.parent, Hold.child = Hold.parent, None, None
    if hold is not None:
        hold()


def _in_child() -> None:
    hold, Hold.parent, Hold.child = Hold.child, None, None
    if hold is not None:
        hold()


os.register_at_fork(after_in_parent=_in_parent, after_in_child=_in_child)


def fork(status: int) -> int:
    """A child that ends at once."""
    child = os.fork()
    if child == 0:
        os._exit(status)
    return child


def fork_late(meanwhile: Callable[[], object]) -> int:
    """A child that comes to nothing before its parent is back from the fork; exit code 3."""
    reading, writing = os.pipe()
    Hold.parent, Hold.child = meanwhile, lambda: os.read(reading, 1)
    child = fork(3)
    os.write(writing, b".")
    os.close(reading)
    os.close(writing)
    return child


def fork_twice(go: int, told: int, end: int, status: int) -> int:
    """A child that forks, and ends by a byte of `go`; what it forked tells its pid when it was adopted, and
    ends by a byte of `end`.
    """
    child = os.fork()
    if child == 0:
        middle = os.getpid()
        if os.fork():
            os.read(go, 1)
            os._exit(status)
        while os.getppid() == middle:
            time.sleep(0.001)
        os.write(told, b"%d\n" % os.getpid())
        os.read(end, 1)
        os._exit(0)
    return child


class Pipes:
    """Of `fork_twice`, with the ends that are the worker's."""

    def __init__(self) -> None:
        (self.go, self._go), (self._told, self.told), (self.end, self._end) = (os.pipe() for _ in range(3))
        self.orphan = 0

    def let_go(self) -> None:
        """Until the one forked last was adopted."""
        os.write(self._go, b".")
        self.orphan = int(os.read(self._told, 32))

    def close(self) -> None:
        """It ends."""
        os.write(self._end, b".")
        for fd in (self.go, self._go, self._told, self.told, self.end, self._end):
            os.close(fd)


def orphan() -> int:
    pipes = Pipes()
    child = fork_twice(pipes.go, pipes.told, pipes.end, 0)
    pipes.let_go()
    os.waitpid(child, 0)
    pipes.close()
    return pipes.orphan


# ---- children with their exit codes, and an orphan that came meanwhile ---------------------------


def forks_again() -> tuple[dict[int, int], int]:
    """The child has forked and ended before its parent is back from the fork."""
    pipes = Pipes()
    Hold.parent = pipes.let_go
    child = fork_twice(pipes.go, pipes.told, pipes.end, 3)
    pipes.close()
    return {child: 3}, pipes.orphan


def beside_an_orphan() -> tuple[dict[int, int], int]:
    """One that another child forked is adopted during a fork whose child has not come to anything yet."""
    pipes = Pipes()
    middle = fork_twice(pipes.go, pipes.told, pipes.end, 0)
    child = fork_late(pipes.let_go)
    os.waitpid(middle, 0)
    pipes.close()
    return {child: 3}, pipes.orphan


def killed_at_once() -> tuple[dict[int, int], int]:
    """The child is killed before it can tell anything."""
    Hold.child = signal.pause
    child = fork(3)
    os.kill(child, signal.SIGKILL)
    return {child: -signal.SIGKILL}, orphan()


def without_memory() -> tuple[dict[int, int], int]:
    """There is no page to be had for what the child tells."""
    whole = mmap.mmap

    def fails(*args: object) -> None:
        raise OSError("no memory")

    mmap.mmap = fails  # type: ignore[misc, assignment]
    try:
        child = fork(3)
    finally:
        mmap.mmap = whole  # type: ignore[misc]
    return {child: 3}, orphan()


def while_a_thread_forks() -> tuple[dict[int, int], int]:
    def in_a_thread(work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    return _while_forking(in_a_thread)


def while_a_handler_forks() -> tuple[dict[int, int], int]:
    return _while_forking(lambda work: work())


def _while_forking(run: Callable[[Callable[[], None]], None]) -> tuple[dict[int, int], int]:
    """Another fork is run during a fork; there is an orphan already."""
    pipes = Pipes()
    middle = fork_twice(pipes.go, pipes.told, pipes.end, 0)
    pipes.let_go()
    os.waitpid(middle, 0)
    children: dict[int, int] = {}
    children[fork_late(lambda: run(lambda: children.update({fork(4): 4})))] = 3
    pipes.close()
    return children, pipes.orphan


_kept: list[multiprocessing.process.BaseProcess] = []


def by_multiprocessing() -> tuple[dict[int, int], int]:
    return _by_multiprocessing("fork")


def by_spawning() -> tuple[dict[int, int], int]:
    return _by_multiprocessing("spawn")


def _by_multiprocessing(how: str) -> tuple[dict[int, int], int]:
    process = multiprocessing.get_context(how).Process(target=os._exit, args=(3,))
    process.start()
    assert process.pid is not None
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    _kept.append(process)
    return {process.pid: 3}, orphan()


_failed: list[TypeError] = []


def beside_a_popen_that_failed() -> tuple[dict[int, int], int]:
    """The error keeps an object that never came to a pid."""
    try:
        subprocess.Popen(["true"], bufsize="refused")  # type: ignore[call-overload]
    except TypeError as error:
        _failed.append(error)
    return {fork(3): 3}, orphan()


def exit_code(pid: int) -> int | None:
    """Wait for a child of an earlier task."""
    for process in _kept:
        if process.pid == pid:
            process.join()
            return process.exitcode
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- what a child sees of the region -------------------------------------------------------------


def sees(array: Any) -> bytes:
    """What a child finds in an argument that its parent changes as soon as it is back from the fork."""
    (told, tell), (waited, go_on) = os.pipe(), os.pipe()
    parent, thread = os.getpid(), threading.get_native_id()
    whole = worker._leaver.forked

    def late() -> None:
        """Not before the parent waits, be it for this or for the child's end."""
        deadline = time.monotonic() + 1
        while fields_of(parent, thread)[0] != b"S" and time.monotonic() < deadline:
            pass
        whole()

    def change() -> None:
        array[:] = 2
        os.write(go_on, b".")

    array[:] = 1
    Hold.parent, Hold.child = change, lambda: os.read(waited, 1)
    worker._leaver.forked = late
    try:
        child = os.fork()
        if child == 0:
            os.write(tell, bytes(array.astype("u1")[::512]))
            os._exit(0)
    finally:
        del worker._leaver.forked
    os.waitpid(child, 0)
    found = os.read(told, 100)
    for fd in (told, tell, waited, go_on):
        os.close(fd)
    return found


def fork_slowly(array: Any, held: str, copied: str) -> int:
    """Fork; the child says that it is there, and takes its time until it has a copy of what it shows."""
    whole = worker._leaver.forked

    def slowly() -> None:
        open(held, "w").close()
        time.sleep(0.5)  # the parent is to do what it does meanwhile
        whole()
        open(copied, "w").close()

    worker._leaver.forked = slowly
    try:
        child = os.fork()
        if child == 0:
            os._exit(int(array.sum()) != array.size)
    finally:
        del worker._leaver.forked
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def return_when(path: str, array: Any) -> int:
    """Return as soon as there is such a file."""
    while not os.path.exists(path):
        time.sleep(0.001)
    return int(array.sum())


def fields_of(pid: int, thread: int) -> list[bytes]:
    """The fields of a thread's state, from the letter on."""
    with open(f"/proc/{pid}/task/{thread}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def says_nothing(array: Any, wait: int, child: Callable[[], object]) -> int:
    """Of a child that does this before it has come to anything, where its parent waits so many milliseconds
    for it: how many descriptors the fork has left.
    """
    before = os.listdir("/proc/self/fd")
    usual = forking._CHILD
    worker._leaver.forked, forking._CHILD = child, wait
    try:
        pid = fork(3)
    finally:
        del worker._leaver.forked
        forking._CHILD = usual
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/fd")) - len(before)
