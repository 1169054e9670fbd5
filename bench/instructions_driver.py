"""What bench/instructions.py runs under valgrind: host and worker in one thread, from submit to result.

    submit ─► lease ─► claim ─► run ─► complete ─► harvest ─► future.result()

All of it is the shipped code, compiled and Python; the process of a worker, its sockets and its supervisor
are left out, as tests/test_model.py does. Nothing forks, sleeps, or spins.
"""

from __future__ import annotations

import os
import socket
import sys
from types import SimpleNamespace
from typing import Any

from tasks import nothing

from runtime import Future, _core, serializer
from runtime.children import Children
from runtime.collector import Collector
from runtime.sockets import Paths
from runtime.worker import Context, Orders, Worker

BURST = 32  # tasks that are submitted before the worker runs them


class Loop(Worker):
    """A worker's loop without its process."""

    def __init__(self, arena: Any, slot: int, host: int) -> None:
        unused, _ = socket.socketpair()
        self.orders = Orders(
            slot, 0, 1, Paths("", "", ""), host, 0, None, None, None, b"", (), unused, 0, None
        )
        self.port = _core.Runner(arena, slot, lambda: None)
        self.max_rss = None
        self.share = -1
        self.functions = serializer.FunctionCache()
        self.children = Children()
        self.port.attend(self, Context(0, slot, 1), self.functions, host, self.share, 1)

    def check(self) -> None:
        """Due every 10 ms; valgrind's are short. How much it costs is counted by itself."""


class World:
    """A runtime's parts in one thread, with two slots, one of them live."""

    def __init__(self) -> None:
        self.arena = _core.Arena.create(4 << 20, 6, 256, 1024, 256 << 10)
        self.bell = os.eventfd(0)
        self.keeper = _core.DeadlineKeeper(self.arena, self.bell)
        self.dispatcher = _core.Dispatcher(self.arena, self.keeper)
        link: Any = SimpleNamespace(send=lambda *_: True, wake=lambda: None)
        watcher: Any = SimpleNamespace(stopping=False)
        self.collector = Collector(self.dispatcher, link, watcher)
        core = SimpleNamespace(
            dispatcher=self.dispatcher, tell=self.collector.tell, expect=self.collector.expect
        )
        table = serializer.FunctionTable()
        self.submitter = _core.Submitter(self.dispatcher, Future, core, table.plain)
        slot = self.dispatcher.open_slot(0, 1)
        self.loop = Loop(self.arena, slot, self.bell)
        self.loop.port.ready()
        self.dispatcher.make_ready(slot)
        # The first call of a function goes the long way, and leaves it loaded on both sides.
        ref, payload = serializer.pack_call(table, nothing, (), {})
        first = Future()
        task = _core.Task(ref, first, 0, 0, 0, False)
        task.hold(payload.data, (), ())
        assert self.dispatcher.submit(task)
        entry = self.loop.port.serve()
        if entry >= 0:
            self.loop.execute(entry)
        self.dispatcher.drain_everything()
        self.collector.complete()
        assert first.result(0) is None

    def burst(self) -> None:
        submit = self.submitter.submit
        futures = [submit(None, nothing, (), {}) for _ in range(BURST)]
        while not futures[-1].done():
            assert self.loop.port.serve() == -1
            self.dispatcher.drain_everything()
        for future in futures:
            assert future.result(0) is None

    def close(self) -> None:
        self.dispatcher.vacate(0)
        self.dispatcher.settle(0, None)
        self.dispatcher.close()
        self.arena.release()
        os.close(self.bell)


def main() -> None:
    bursts, checks = map(int, sys.argv[1:])
    world = World()
    for _ in range(bursts):
        world.burst()
    for _ in range(checks):
        Worker.check(world.loop)
    assert world.dispatcher.done >= bursts * BURST
    assert world.dispatcher.malformed == 0
    world.close()
    print(bursts * BURST)


if __name__ == "__main__":
    main()
