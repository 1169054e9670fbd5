"""Tasks and objects that misbehave on request, for the crash matrix and its kin.

Workers import this module by name, so it imports next to nothing itself. What misbehaves first notes
the pid of the process it does so in, so that a test knows whom the runtime has to name.
"""

from __future__ import annotations

import os
import signal
import sys
import time

EXIT_CODE = 37  # of os._exit and of sys.exit here
PATIENCE = 30.0  # seconds after which a task gives up waiting for a test that has failed

# ---- ways to misbehave ---------------------------------------------------------------------------


class Refused(Exception):
    """An ordinary exception of a user."""


class Abandoned(BaseException):
    """One that `except Exception` does not catch."""


def recurse(n: int = 0) -> int:
    return recurse(n + 1) + 1


def misbehave(action: str) -> None:
    if action == "raise":
        raise Refused("evil")
    if action == "raise-base":
        raise Abandoned("evil")
    if action == "sys.exit":
        sys.exit(EXIT_CODE)
    if action == "os._exit":
        os._exit(EXIT_CODE)
    if action == "segfault":
        import ctypes

        ctypes.string_at(0)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        while True:  # the signal is on its way
            pass
    if action == "recursion":
        recurse()
    raise AssertionError(f"{action} let the process go on")


RAISING = {"raise": Refused, "raise-base": Abandoned, "sys.exit": SystemExit, "recursion": RecursionError}
DEADLY = {  # -> (exitcode, signal) of the worker
    "os._exit": (EXIT_CODE, None),
    "segfault": (None, signal.SIGSEGV),
    "kill": (None, signal.SIGKILL),
}


def note(path: str) -> None:
    """Leave this process's pid in a file, with one atomic append."""
    append(path, f"{os.getpid()}\n")


def append(path: str, line: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


# ---- moments -------------------------------------------------------------------------------------


def act(action: str, path: str) -> object:
    """Misbehave while running, and while being unpickled."""
    note(path)
    misbehave(action)
    return None


class AtPickling:
    """Misbehaves when it is pickled."""

    def __init__(self, action: str, path: str) -> None:
        self.action, self.path = action, path

    def __reduce__(self):
        return act(self.action, self.path)


class AtUnpickling:
    """Misbehaves when it is unpickled, in a process other than `spare`."""

    def __init__(self, action: str, path: str, spare: int = 0) -> None:
        self.action, self.path, self.spare = action, path, spare

    def __reduce__(self):
        return arrive, (self.action, self.path, self.spare)


def arrive(action: str, path: str, spare: int) -> object:
    return AtUnpickling(action, path, spare) if os.getpid() == spare else act(action, path)


class Large:
    """A result of so many bytes, that notes the pid when it is pickled."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size = path, size

    def __reduce__(self):
        note(self.path)
        return bytes, (bytes(self.size),)


class PicklingError(Exception):
    """An exception that misbehaves when it is pickled."""

    def __init__(self, action: str, path: str) -> None:
        super().__init__(f"evil text of {action}")
        self.action, self.path = action, path

    def __reduce__(self):
        return act(self.action, self.path)


class UnpicklingError(Exception):
    """An exception that misbehaves when it is unpickled, in a process other than `spare`."""

    def __init__(self, action: str, path: str, spare: int = 0) -> None:
        super().__init__(f"evil text of {action}")
        self.action, self.path, self.spare = action, path, spare

    def __reduce__(self):
        return raised_again, (self.action, self.path, self.spare)


def raised_again(action: str, path: str, spare: int) -> object:
    return UnpicklingError(action, path, spare) if os.getpid() == spare else act(action, path)


def take(argument: object) -> object:
    return argument


def give(kind: str, action: str, path: str, here_too: bool = False) -> object:
    """Return an object that misbehaves later; unless `here_too`, only in another process."""
    if kind == "AtPickling":
        return AtPickling(action, path)
    return AtUnpickling(action, path, 0 if here_too else os.getpid())


def throw(kind: str, action: str, path: str, here_too: bool = False) -> None:
    """The same for an exception."""
    if kind == "PicklingError":
        raise PicklingError(action, path)
    raise UnpicklingError(action, path, 0 if here_too else os.getpid())


# ---- tasks that tests can follow -----------------------------------------------------------------


def square(x: int) -> int:
    return x * x


def counted(path: str, key: object, spin: float = 0.0) -> object:
    """Say when it starts and when it ends; `spin` seconds of work in between."""
    append(path, f"S {key} {os.getpid()}\n")
    end = time.monotonic() + spin
    while time.monotonic() < end:
        pass
    append(path, f"E {key} {os.getpid()}\n")
    return key


def counted_poison(path: str, key: object) -> None:
    append(path, f"S {key} {os.getpid()}\n")
    misbehave("kill")


def wait_for(path: str, started: str = "") -> int:
    """Note the own pid in `started`, then wait until `path` exists."""
    if started:
        note(started)
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody made {path}")
        time.sleep(0.005)
    return os.getpid()


def hang(started: str) -> None:
    """Never return; SIGTERM does not interrupt it for long either."""
    note(started)
    while True:
        time.sleep(60)


def hang_with_gil(started: str) -> None:
    """Never return to the interpreter: no handler runs, no other thread gets the GIL."""
    import ctypes

    note(started)
    ctypes.PyDLL(None).pause()
    while True:
        ctypes.PyDLL(None).sleep(60)


def hang_with_children(started: str, how: str) -> None:
    """Leave a `sleep` behind, and hang. The files get the worker's pid and the child's."""
    import subprocess

    note(started)
    if how == "plain":
        note_child(started, subprocess.Popen(["sleep", "600"]).pid)
    elif how == "session":
        note_child(started, subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
    else:  # a daemon: forked twice, its parent has ended
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.write(writing, f"{os.getpid()}\n".encode())
            os.execvp("sleep", ["sleep", "600"])
        os.wait()
        note_child(started, int(os.read(reading, 32)))
    while True:
        time.sleep(60)


def note_child(path: str, pid: int) -> None:
    append(path, f"{pid}\n")


def leave_child() -> int:
    import subprocess

    return subprocess.Popen(["sleep", "600"]).pid


# ---- tasks that are rude to their process --------------------------------------------------------


def fork_and_return() -> int:
    """The child comes back from the task, as the parent does."""
    os.fork()
    return os.getpid()


def fork_and_leave(how: str) -> int:
    """The child leaves by an exception, or for good; the parent waits for it and returns."""
    child = os.fork()
    if child == 0:
        misbehave(how)
    os.waitpid(child, 0)
    return os.getpid()


def fork_an_orphan() -> int:
    """Two forks: the grandchild ends after its parent has, so that nobody here waits for it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild:
            os._exit(0)
        while os.getppid() == child:
            time.sleep(0.001)
        os.write(writing, f"{os.getpid()}\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
    pid = int(os.read(reading, 32))
    os.close(reading)
    os.close(writing)
    return pid


def start_thread(daemon: bool, path: str) -> int:
    import threading

    threading.Thread(target=wait_for, args=(path,), daemon=daemon).start()
    return os.getpid()


def close_all(low: int) -> int:
    """Close descriptors that are not the task's own."""
    os.closerange(low, 4096)
    return os.getpid()


def change_directory(path: str) -> str:
    os.chdir(path)
    return os.getcwd()


def big_exception(nbytes: int) -> None:
    raise ValueError("x" * nbytes)


def make_lambda(n: int):
    return lambda x: x + n


def own_children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(text) for text in file.read().split()]
