"""What happens to a region when a process that uses it forks: the host of a Runtime, or a worker in a task.

By os.fork, by multiprocessing's "fork", by a library's.

    before    the parent frees no block from here on; in a worker no task ends, in whatever thread
    child     the region becomes private and every page that a view may show is copied; then it says so
    parent    waits for that word, for a moment, and frees again

So the child's views keep showing what they showed, whatever the parent does; the parent does not notice
the child at all; and the child's copy of the Runtime is inert.

The zygote imports this ahead of the user's modules: in a worker's child their handlers run after these.
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from itertools import chain
from typing import Protocol

from runtime import _core

__all__ = ["watch"]

_CHILD = 2000  # milliseconds that a child has to copy what its views show


class _User(Protocol):
    """Who uses a region in the process `pid`."""

    pid: int
    arena: _core.Arena

    def forked(self) -> None:
        """In a child: the region becomes private, and nothing here is in use any more."""


_users: weakref.WeakSet[_User] = weakref.WeakSet()
# The forks under way in a thread: pipe, whose blocks are held. The innermost is the last: a handler of the
# user's, which runs between ours and the fork itself, may fork, too.
_under_way: dict[int, list[tuple[int, int, list[_core.Arena]]]] = {}


def watch(user: _User) -> None:
    """From now on forks are looked after."""
    _users.add(user)


def _before() -> None:
    here = os.getpid()
    arenas = [user.arena for user in list(_users) if user.pid == here and user.arena.showing]
    reading = writing = -1
    if arenas:
        try:
            reading, writing = os.pipe()
        except OSError:  # no descriptor to be had: the child copies, nobody waits for it
            arenas = []
        for arena in arenas:
            arena.freeze()
    _under_way.setdefault(threading.get_ident(), []).append((reading, writing, arenas))


def _in_parent() -> None:
    forks = _under_way.get(threading.get_ident())
    if not forks:  # this was imported in the middle of a fork
        return
    reading, writing, arenas = forks.pop()
    if not forks:
        del _under_way[threading.get_ident()]
    if arenas:
        os.close(writing)
        poller = select.poll()
        poller.register(reading, select.POLLIN)
        try:
            poller.poll(_CHILD)  # also ends when the child has ended, or when there was none
        finally:  # a signal handler may raise
            os.close(reading)
            for arena in arenas:
                arena.thaw()


def _in_child() -> None:
    for user in list(_users):
        user.forked()
    forks = _under_way.pop(threading.get_ident(), [])
    if forks and forks[-1][2]:
        os.write(forks[-1][1], b".")
    for reading, writing, arenas in chain(forks, *_under_way.values()):
        if arenas:
            os.close(writing)
            os.close(reading)
    _under_way.clear()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
