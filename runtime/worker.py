"""A worker process, from its fork to its end: what it adopts, its signals, its forks, its goodbye.

What it does in between is in loop.py; with several threads in lanes.py; in service.py if that is a service.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading

from runtime import _core, forwarding, limits, serializer, stacks
from runtime.calls import EXIT_KILLED, Leave
from runtime.contexts import Context, Here, current
from runtime.lanes import Crew
from runtime.loop import EXIT_DESCRIPTORS, EXIT_FAILED, EXIT_HOST_GONE, EXIT_ORPHANED, Orders, Worker
from runtime.service import EXIT_SERVICE, ServiceWorker
from runtime.state import SharedState

__all__ = [
    "EXIT_DESCRIPTORS",
    "EXIT_FAILED",
    "EXIT_HOST_GONE",
    "EXIT_KILLED",
    "EXIT_ORPHANED",
    "EXIT_SERVICE",
    "Context",
    "Orders",
    "Worker",
    "current",
    "main",
    "reset_signals",
]


def main(arena: _core.Arena, state: SharedState | None, orders: Orders) -> None:
    """Be a worker, from the fork on. Never returns."""
    code = 1
    try:
        arena.adopt_process()
        limits.in_worker = True
        stacks.leave_stacks(orders.records, orders.stack)
        forwarding.adopt_streams()
        reset_signals()
        _reseed()
        _prefer_for_oom()
        _core.become_subreaper()
        arguments = (orders.host_pidfd, -1, EXIT_HOST_GONE, orders.folder, orders.zygote_pid)
        threading.Thread(
            target=_core.watch_host, args=arguments, name="runtime-host-watch", daemon=True
        ).start()
        os.register_at_fork(before=_before_fork, after_in_parent=_unmask, after_in_child=_after_fork)
        Here.worker = context = Context(orders.number, orders.slot, orders.generation)
        Here.arena, Here.state = arena, state
        if orders.levels is not None:
            forwarding.forward_records(orders.records, Here.context, orders.levels)
        serializer.adopt_main()
        kind = ServiceWorker if orders.service is not None else Worker if orders.threads == 1 else Crew
        worker = kind(arena, orders, context)
        _on_term(worker)
        worker.start()
        code = worker.run()
        worker.link.close()
    except BaseException:  # a fault of ours: the traceback is all that can be given
        if not Here.forked:
            sys.excepthook(*sys.exc_info())
    finally:
        if not Here.forked:
            _goodbye(orderly=code in (0, 1))
        os._exit(code)


_LEAVERS = (signal.SIGTERM, signal.SIGUSR2)
# Thread -> its masks from before the forks under way; the innermost is the last: a handler, too, may fork.
_masks: dict[int, list[set[signal.Signals | int]]] = {}


def _before_fork() -> None:
    """CPython drops a signal that comes while a fork is under way; the child's SIGTERM shall wait instead."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _LEAVERS)
    _masks.setdefault(threading.get_ident(), []).append(mask)


def _unmask() -> None:
    masks = _masks.get(threading.get_ident())
    if masks:
        mask = masks.pop()
        if not masks:
            del _masks[threading.get_ident()]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork() -> None:
    """In a child that a task forked: SIGTERM ends it. The region is its own already, see forking.py."""
    signal.set_wakeup_fd(-1)
    for number in _LEAVERS:
        if signal.getsignal(number) is _leave:  # a task may have set its own
            signal.signal(number, signal.SIG_DFL)
    masks = _masks.get(threading.get_ident())
    if masks:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks[0])
    _masks.clear()
    stacks.forked()


def reset_signals() -> None:
    """Handlers that the host or a preloaded module has set are for the program they came from."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # Ctrl-C goes to the whole group; the host decides. A handler, since SIG_IGN would survive exec.
    signal.signal(signal.SIGINT, _nothing)
    signal.set_wakeup_fd(-1)


def _nothing(number: int, frame: object) -> None:
    """SIGINT does nothing here."""


_leaver: Worker | None = None  # who leaves when SIGTERM comes


def _on_term(worker: Worker) -> None:
    global _leaver
    _leaver = worker
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGUSR2, _leave)


def _leave(number: int, frame: object) -> None:
    worker = _leaver
    if worker is None or Here.forked:
        return
    worker.ask_to_leave()
    if worker.waiting:
        raise Leave


def _reseed() -> None:
    """Each worker draws its own random numbers (CPython reseeds `random` at a fork itself)."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _prefer_for_oom() -> None:
    """When memory runs out, the kernel should end a worker, not the host."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as file:
        score = int(file.read())
        file.seek(0)
        file.write(str(min(score + 300, 1000)))


def _goodbye(orderly: bool) -> None:
    """What an interpreter does at its end: join threads, unless it failed; run callbacks; flush."""
    try:
        if orderly:
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    forwarding.flush()
    _core.kill_descendants()
