"""What happens to a Runtime when its host forks (os.fork, multiprocessing's "fork", a library's).

    before    the parent frees no block from here on
    child     the region becomes private and every page that a view may show is copied; then it says so
    parent    waits for that word, for a moment, and frees again

So the child's views keep showing what they showed, whatever the parent does; the parent does not notice
the child at all; and the child's copy of the Runtime is inert.
"""

from __future__ import annotations

import os
import select
import threading
import weakref

from runtime.supervisor import Supervisor

__all__ = ["living", "watch"]

_CHILD = 2000  # milliseconds that a child has to copy what its views show

_supervisors: weakref.WeakSet[Supervisor] = weakref.WeakSet()
_under_way: dict[int, tuple[int, int, list[Supervisor]]] = {}  # thread -> pipe, whose blocks are held


def watch(core: Supervisor) -> None:
    """From now on forks are looked after."""
    _supervisors.add(core)


def living() -> list[Supervisor]:
    """Those of this process."""
    return [core for core in list(_supervisors) if core.pid == os.getpid()]


def _before() -> None:
    cores = [core for core in living() if core.arena.held]
    if cores:
        try:
            reading, writing = os.pipe()
        except OSError:  # no descriptor to be had: the child copies, nobody waits for it
            return
        for core in cores:
            core.arena.freeze()
        _under_way[threading.get_ident()] = (reading, writing, cores)


def _in_parent() -> None:
    reading, writing, cores = _under_way.pop(threading.get_ident(), (-1, -1, []))
    if cores:
        os.close(writing)
        poller = select.poll()
        poller.register(reading, select.POLLIN)
        poller.poll(_CHILD)  # also ends when the child has ended, or when there was none
        os.close(reading)
        for core in cores:
            core.arena.thaw()


def _in_child() -> None:
    for core in list(_supervisors):
        core.forked()
    reading, writing, cores = _under_way.pop(threading.get_ident(), (-1, -1, []))
    _under_way.clear()
    if cores:
        os.write(writing, b".")
        os.close(writing)
        os.close(reading)


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
