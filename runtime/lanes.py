"""A worker with several threads: its main thread communicates, and each lane runs what is leased to its slot.

                    ┌─ main thread: hints, signals, the children, its size; wakes the lanes ─┐
    host ── hint ──►│   lane 0: slot n      look, run, answer; else sleep on its parked word │
                    │   lane 1: slot n+1    ...                                              │
                    └────────────────────────────────────────────────────────────────────────┘

A lane is to the host what a worker with one thread is: a ring, an outbox and leases of its own, and one
thread that claims them. So nothing about a lease is shared between threads. What they share is the process:
its memory, its GIL, its globals, how many items it may run, and its death.

The lanes are Python's threads, daemons, since one that hangs must not keep the process from ending. Whichever
thread the kernel gives a signal, Python's handler runs in the main thread, which is woken through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

from runtime import _core, serializer
from runtime.calls import Calls
from runtime.contexts import Context, Here
from runtime.loop import EXIT_DESCRIPTORS, Orders, Worker
from runtime.refs import resolve_with
from runtime.sockets import CrewLink

__all__ = ["Crew", "Lane"]

_IDLE = 2.0  # seconds that anybody here sleeps at most
_BUSY = 0.1  # the same for the main thread, while there is work: it looks after children and size


class Lane(Calls):
    """One thread and the slot that it serves. Thread-safety: for that thread."""

    def __init__(self, crew: Crew, number: int, port: _core.Runner) -> None:
        self.crew = crew
        self.port = port
        self.functions = crew.functions
        self.context = crew.context.lane(number)
        self.context.serve(port)
        self.ended = False
        self.thread = threading.Thread(target=self.run, name=f"runtime-lane-{number}", daemon=True)
        orders = crew.orders
        port.attend(self, self.context, self.functions, orders.host_pidfd, -1, EXIT_DESCRIPTORS)
        port.join(crew.common)

    def run(self) -> None:
        """The thread: until told to leave. A fault of ours ends the process."""
        ident = threading.get_ident()
        Here.lanes[ident] = self.context
        self.crew.ports[ident] = self.port
        self.port.adopt_thread()
        try:
            self.loop()
        except BaseException:
            if not Here.forked:
                sys.excepthook(*sys.exc_info())
            os._exit(1)
        self.ended = True
        self.crew.ring()

    def rest(self) -> None:
        """Sleep until the main thread wakes this one."""
        self.port.doze(int(_IDLE * 1e9))

    def check(self) -> None:
        """Now and then, between two tasks; what is the process's is the main thread's to look after."""
        self.port.flush()


class Crew(Worker):
    """A worker whose tasks run in lanes. Thread-safety: for the main thread, but for `ring` and `resolve`."""

    Link = CrewLink
    Cache = serializer.SharedCache
    link: CrewLink

    def __init__(self, arena: _core.Arena, orders: Orders, context: Context) -> None:
        super().__init__(arena, orders, context)
        context._report = None  # there is no task but in the lanes
        self.common = _core.Share(self.share)
        self.ports: dict[int, _core.Runner] = {}  # thread -> its own
        slots = range(orders.slot + 1, orders.slot + orders.threads)
        others = [_core.Runner(arena, slot, self.link.notifier(slot)) for slot in slots]
        self.lanes = [Lane(self, number, port) for number, port in enumerate((self.port, *others))]
        self.ran = 0  # the sum of the lanes' `left`, which falls with each item: what `busy` saw last
        self.bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        resolve_with(self.resolve)

    def resolve(self, block: int, tag: int, nbytes: int, flags: int) -> Any:
        """A block that a Ref refers to, for the lease of the lane that asks."""
        return self.ports.get(threading.get_ident(), self.port).resolve(block, tag, nbytes, flags)

    def ring(self) -> None:
        """Make the main thread look at everything."""
        with contextlib.suppress(OSError):  # full: it is on its way; closed by a task: it looks anyhow
            os.write(self.bell[1], b".")

    @property
    def worked(self) -> bool:
        """Whether any lane has run anything."""
        return any(lane.port.worked for lane in self.lanes)

    def ask_to_leave(self) -> None:
        """Every lane finishes what it runs. Also in SIGTERM's handler, whose pipe wakes the main thread."""
        for lane in self.lanes:
            lane.port.leaving = True
        self.port.leave()

    def loop(self) -> None:
        """Wake lanes and look after the process, until the last of them has left."""
        self.functions.leave()  # of the initializer
        self.link.watch(self.bell[0])
        signal.set_wakeup_fd(self.bell[1], warn_on_full_buffer=False)
        told = False
        for lane in self.lanes:
            lane.thread.start()
        while not all(lane.ended for lane in self.lanes):
            repeated = self.link.forget()
            if not told and any(
                lane.port.leaving for lane in self.lanes
            ):  # the last item is begun, or SIGTERM
                told = True
                self.ask_to_leave()
                self.notify()
            roused = sum([lane.port.rouse() for lane in self.lanes])
            if roused and repeated:
                self.port.rescued()  # a repeated hint was what it took to find them
            self.link.wait(_BUSY if self.busy() or roused else _IDLE)
            self.check()

    def busy(self) -> bool:
        """Whether any lane runs something, or has run anything since the last call: short tasks, one after
        another, are seldom met while they run, and lanes that are awake need no hint.
        """
        ran, self.ran = self.ran, sum(lane.port.left for lane in self.lanes)
        return ran != self.ran or any(lane.context.task is not None for lane in self.lanes)

    def check(self) -> None:
        """Now and then: see to the children, and whether this process may stay."""
        with contextlib.suppress(OSError):
            while len(os.read(self.bell[0], 4096)) == 4096:
                pass
        self.children.reap()
        if self.too_large():
            self.ask_to_leave()
