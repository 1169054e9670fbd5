"""The children of a worker: which of them its tasks made, and which it adopted as their subreaper.

A task that forks twice leaves a grandchild that becomes the worker's child when its parent ends. Nobody
waits for such a one, so the worker does, between tasks. A child that a task made itself is the task's to
wait for: its exit status must not be taken from it.

    before    a word that both will share; which children the thread that forks has
    child     writes its pid into the word, before it returns to the task
    parent    notes the child that the word names; while it names none, each child that has come since

No handler of a fork is told the child's pid. Of those that have come one is the child; others may have been
adopted meanwhile. A child that is ended before it has written has forked nothing.
"""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
import time

__all__ = ["Children", "children_of"]

_SEARCH_EVERY = 1.0  # seconds between two searches behind a zombie that a task may still wait for
_STARTERS = ("subprocess", "multiprocessing.popen_fork")  # whose Popen runs no handlers of a fork


class _Thread(threading.local):
    def __init__(self) -> None:
        # The forks under way: word, children before. The innermost is the last: a handler, too, may fork.
        self.forks: list[tuple[memoryview[int], set[int]]] = []


class Children:
    """Thread-safety: `reap` belongs to the worker's main thread; any thread may fork meanwhile."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._thread = _Thread()
        # Forked by Python code in this process: pid -> the word that says whether it was; None: it was.
        self._forked: dict[int, memoryview[int] | None] = {}
        self._searched = 0.0
        self._pause = 0.0
        os.register_at_fork(before=self._look, after_in_child=self._tell, after_in_parent=self._note)

    def _look(self) -> None:
        if os.getpid() == self._pid:  # what a child forks is not ours
            self._thread.forks.append((_word(), set(children_of(threading.get_native_id()))))

    def _tell(self) -> None:
        forks = self._thread.forks
        if forks and os.getppid() == self._pid:  # else the pid is that of another namespace
            forks[-1][0][0] = os.getpid()
        forks.clear()

    def _note(self) -> None:
        if not self._thread.forks:
            return
        word, before = self._thread.forks.pop()
        come = set(children_of(threading.get_native_id())) - before
        told = word[0]  # read last: if it is empty, nothing that the child forked is among those that came
        if told:
            self._forked[told] = None
        elif len(come) == 1:
            self._forked[come.pop()] = None
        else:
            for pid in come:
                self._forked.setdefault(pid, word)

    def reap(self) -> None:
        """Wait for the adopted ones that have ended. Costs a system call when there is none."""
        if _ended(os.P_ALL, 0) and time.monotonic() - self._searched > self._pause:
            # First who has ended: a thread that ends later passes on children that it has noted by then.
            ended = [pid for pid in children_of(os.getpid()) if _ended(os.P_PID, pid)]
            own = self._own()
            for pid in ended:
                if pid not in own:
                    _wait(pid)
            # What is left is for a task to wait for; it hides nothing, but is found again each time.
            self._pause = _SEARCH_EVERY if own.intersection(ended) else 0.0
            self._searched = time.monotonic()

    def _own(self) -> set[int]:
        """Children that a task made: forked, or behind a Popen object that lives."""
        for pid, word in self._forked.copy().items():
            if (word is not None and word[0] not in (0, pid)) or not os.path.exists(f"/proc/{pid}"):
                self._forked.pop(pid, None)
        popens = (getattr(sys.modules.get(name), "Popen", None) for name in _STARTERS)
        kinds = tuple(kind for kind in popens if kind is not None)  # none yet while a module is imported
        if not kinds:
            return set(self._forked)
        # One whose arguments were refused has no pid.
        behind = {getattr(it, "pid", None) for it in gc.get_objects() if issubclass(type(it), kinds)}
        return {pid for pid in behind if pid is not None}.union(self._forked)


def _word() -> memoryview[int]:
    """A number that a forked child can set for its parent; 0 for good where no memory can be had for it."""
    try:
        return memoryview(mmap.mmap(-1, 4)).cast("i")
    except OSError:
        return memoryview(bytearray(4)).cast("i")


def _ended(kind: int, pid: int) -> int:
    """A child that has ended and was not waited for, or 0. It stays as it is."""
    try:
        found = os.waitid(kind, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return found.si_pid if found is not None else 0


def _wait(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def children_of(thread: int) -> list[int]:
    """Pids of the children that a thread of this process has made, or adopted; [] if they cannot be read."""
    try:
        with open(f"/proc/self/task/{thread}/children") as file:
            return [int(text) for text in file.read().split()]
    except OSError:
        return []
