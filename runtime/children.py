"""The children of a worker: which of them its tasks made, and which it adopted as their subreaper.

A task that forks twice leaves a grandchild that becomes the worker's child when its parent ends. Nobody
waits for such a one, so the worker does, between tasks. A child that a task made itself is the task's to
wait for: its exit status must not be taken from it.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time

__all__ = ["Children", "children_of"]

_SEARCH_EVERY = 1.0  # seconds between two searches behind a zombie that a task may still wait for


class Children:
    """Thread-safety: `reap` belongs to the worker's main thread."""

    def __init__(self) -> None:
        self._forked: set[int] = set()  # by os.fork and its kin, in this process
        self._searched = 0.0
        self._pause = 0.0
        self._before: set[int] = set()
        os.register_at_fork(before=self._look, after_in_parent=self._note)

    def _look(self) -> None:
        self._before = set(children_of(threading.get_native_id()))

    def _note(self) -> None:
        self._forked |= set(children_of(threading.get_native_id())) - self._before

    def reap(self) -> None:
        """Wait for the adopted ones that have ended. Costs a system call when there is none."""
        if _ended(os.P_ALL, 0) and time.monotonic() - self._searched > self._pause:
            own = self._own()
            ended = [pid for pid in children_of(os.getpid()) if _ended(os.P_PID, pid)]
            for pid in ended:
                if pid not in own:
                    _wait(pid)
            # What is left is for a task to wait for; it hides nothing, but is found again each time.
            self._pause = _SEARCH_EVERY if own.intersection(ended) else 0.0
            self._searched = time.monotonic()

    def _own(self) -> set[int]:
        """Children that a task made: forked, or behind a Popen object that lives."""
        self._forked = {pid for pid in self._forked if os.path.exists(f"/proc/{pid}")}
        subprocess = sys.modules.get("subprocess")
        if subprocess is None:
            return set(self._forked)
        return self._forked | {it.pid for it in gc.get_objects() if issubclass(type(it), subprocess.Popen)}


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
