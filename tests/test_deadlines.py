"""Deadlines that the host cannot see to itself, and those that meet the end of what they are for.

The first: user code in the host holds the GIL in C, for as long as the test wants. The second: a storm of
tasks that end at about the time at which they are killed; the loser of that race takes nobody with it.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import subprocess
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evil
import pytest
import tasks
from watching import Host, alive, all_ready, read_pids, send, settled, shut_down_clean, stopped, until

from runtime import Future, Runtime, TaskTimeout, _core, serializer

TIMEOUT = 0.5
PROMISED = 0.1  # seconds from a deadline to the kill

HOST = """
import ctypes, os, sys, runtime, tasks
how, path = sys.argv[1:]
rt = runtime.Runtime(1, timeout=0.5 if how == "runtime" else None)
pid = rt.submit(tasks.own_pid).result()
if how in ("map", "unordered"):
    view = rt.options(timeout=0.5)
    run = view.map if how == "map" else view.map_unordered
    results = run(tasks.log_and_hang_at, [path] * 9, range(9), [4] * 9, return_exceptions=True)
    def outcome():
        return sorted(type(value).__name__ for value in results)
else:
    view = rt if how == "runtime" else rt.options(timeout=0.5)
    future = view.submit(tasks.log_and_hang_at, path, 4, 4)
    def outcome():
        return type(future.exception()).__name__
while not os.path.exists(path) or "4" not in open(path).read().split():
    pass
print(pid, flush=True)
ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)  # holds the GIL until a byte comes
print(outcome(), flush=True)
print(rt.submit(abs, -3).result(), flush=True)
rt.shutdown()
"""


@pytest.fixture
def host() -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(*args: str) -> Host:
        made.append(Host(HOST, *args))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("how", ["call", "runtime", "map", "unordered"])
def test_a_host_that_holds_the_gil_in_c_keeps_no_deadline_waiting(
    host: Callable[..., Host], tmp_path: Path, how: str
) -> None:
    script = host(how, str(tmp_path / "log"))
    (pid,) = script.pids()
    began = time.monotonic()
    fd = os.pidfd_open(pid)
    try:
        assert select.select([fd], [], [], 30)[0], "the worker lives on"
        took = time.monotonic() - began
    finally:
        os.close(fd)
    # The host has not got on meanwhile: it waits for this byte.
    script.process.stdin.write("x")
    script.process.stdin.flush()
    assert took < TIMEOUT + 10 * PROMISED
    said = script.line()
    assert said == ("TaskTimeout" if how in ("call", "runtime") else str(["TaskTimeout", *["int"] * 8]))
    assert script.line() == "3"
    assert script.process.wait(20) == 0


def storm(rt: Runtime, path: Path, count: int) -> Counter[str]:
    """Tasks that end within a keeper's period of their deadline, each followed by two innocents."""
    draw = random.Random(count)
    view = rt.options(timeout=0.02)
    near, innocent = [], []
    for i in range(count):
        near.append(view.submit(evil.counted, str(path), f"near{i}", draw.uniform(0.018, 0.031)))
        innocent += [rt.submit(evil.counted, str(path), f"innocent{2 * i + k}") for k in range(2)]
    kinds: Counter[str] = Counter()
    for i, future in enumerate(near):
        error = future.exception(100)
        assert error is None or type(error) is TaskTimeout
        assert error is not None or future.result() == f"near{i}"
        kinds["late" if error else "in time"] += 1
    for i, future in enumerate(innocent):
        assert future.result(100) == f"innocent{i}"
    ran = Counter(tuple(line.split()[:2]) for line in path.read_text().splitlines())
    assert all(ran["S", f"innocent{i}"] == 1 for i in range(2 * count)), (
        "an innocent ran twice, or was killed"
    )
    assert all(ran["S", f"near{i}"] == 1 for i in range(count))
    assert rt.stats().failed == kinds["late"]
    settled(rt)
    return kinds


def test_timeouts_near_the_end_of_tasks(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    rt = factory(2, preload="evil")
    kinds = storm(rt, tmp_path / "log", 80)
    assert kinds["late"] and kinds["in time"], f"no race at all: {kinds}"
    shut_down_clean(rt)


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_a_thousand_timeouts_near_the_end_of_tasks(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    late = 0
    for lap in range(60):
        rt = factory(2, preload="evil")
        late += storm(rt, tmp_path / f"log{lap}", 80)["late"]
        shut_down_clean(rt)
        if late >= 1000:
            break
    print(f"{late} were killed")
    assert late >= 1000


def test_timeouts_near_the_end_of_items(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    """The same in the chunks of a map: the neighbours of an item that was late are delivered."""
    rt = factory(2, preload="tasks")
    draw = random.Random(5)
    spins = [draw.uniform(0.018, 0.031) if i % 4 == 0 else 0.0 for i in range(120)]
    got = list(rt.options(timeout=0.02).map(tasks.spin, spins, chunksize=8, return_exceptions=True))
    assert len(got) == 120
    for spin, value in zip(spins, got, strict=True):
        assert value == spin or (spin > 0 and type(value) is TaskTimeout)
    assert sum(type(value) is TaskTimeout for value in got) > 0
    assert rt.stats().failed == sum(type(value) is TaskTimeout for value in got)
    settled(rt)


# ---- a payload that crosses ----------------------------------------------------------------------

LARGE = 32 << 20  # bytes; the region has one MiB, so this goes by value, in more than a hundred pieces
CROSSING = 1.0  # seconds: the timeout of what crosses


def clock(rt: Runtime, slot: int) -> int:
    """Nanoseconds of user code: the same twice in a row when the clock stands."""
    return int(rt._core.dispatcher.busy_ns(slot))


@pytest.mark.parametrize("way", ["arguments", "result"])
def test_a_worker_that_is_stopped_as_a_payload_crosses(
    factory: Callable[..., Runtime], tmp_path: Path, way: str
) -> None:
    """No clock runs there, but the deadline holds: who shows no sign of life is ended, nobody else."""
    rt = factory(2, region_size="1MiB", region_max="1MiB", preload="evil")
    all_ready(rt)
    go = tmp_path / "go"
    innocent = rt.submit(evil.wait_for, str(go), str(tmp_path / "started"))
    until(innocent.running, "it runs")
    here = tmp_path / "here"
    view = rt.options(timeout=CROSSING)
    future = (
        view.submit(len, bytes(LARGE)) if way == "arguments" else view.submit(evil.Large, str(here), LARGE)
    )
    if way == "result":
        read_pids(here)  # it is being pickled
    (worker,) = until(
        lambda: [
            it
            for it in rt.workers()
            if it.task is not None and it.started and it.slot != busy_slot(rt, innocent)
        ],
        "it is claimed",
    )
    stood = clock(rt, worker.slot)
    while way == "result" and stood != (stood := clock(rt, worker.slot)):
        pass  # until it is pickled
    send(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: stopped(worker.pid) or not alive(worker.pid), "it has stopped")
    assert not future.done() and clock(rt, worker.slot) == stood, "it crosses no more"
    assert type(future.exception(30)) is TaskTimeout
    until(lambda: not alive(worker.pid), "it is gone")
    assert CROSSING <= time.monotonic() - began < CROSSING + 0.25 + 10 * PROMISED
    go.touch()
    assert innocent.exception(30) is None
    assert rt.submit(abs, -1).result(30) == 1
    settled(rt)


def busy_slot(rt: Runtime, future: Any) -> int:
    """The slot of the worker that runs it."""
    (slot,) = [it.slot for it in rt.workers() if it.task is not None and it.task == future._task.number]
    return slot if slot is not None else -1


def test_a_host_that_is_slow_is_not_the_tasks_fault(factory: Callable[..., Runtime]) -> None:
    """Arguments cross by value, and the host, which would send the next piece, holds the GIL in C."""
    rt = factory(1, region_size="1MiB", region_max="1MiB")
    all_ready(rt)
    future = rt.options(timeout=CROSSING).submit(len, bytes(LARGE))
    until(lambda: rt.workers()[0].task is not None, "it is claimed")
    before = rt.workers()[0].pid
    ctypes.PyDLL(None).usleep(int(2.5 * CROSSING * 1e6))
    assert future.result(30) == LARGE
    assert rt.workers()[0].pid == before


def test_a_wait_for_the_host_is_not_the_next_calls_time() -> None:
    """A call begins where the last one ended, by the same look at the clock, unless its worker waited."""
    arena, bell = _core.Arena.create(64 * 4096, 1, 8, 1, 4096), os.eventfd(0)
    dispatcher = _core.Dispatcher(arena, _core.DeadlineKeeper(arena, bell))
    table, pause, calls = serializer.FunctionTable(), 0.1, 4

    def notify() -> None:
        """The outbox holds one record: from the second call on, its worker waits for the host."""
        time.sleep(pause)
        dispatcher.drain(slot)

    slot = dispatcher.open_slot(0, 1)
    port, functions = _core.Runner(arena, slot, notify), serializer.FunctionCache()
    port.attend(types.SimpleNamespace(check=lambda: None), types.SimpleNamespace(), functions, bell, -1, 1)
    ref, payload = serializer.pack_call(table, abs, (-1,), {})
    functions.load(ref.id, ref.data)
    try:
        port.ready()
        dispatcher.make_ready(slot)
        futures = [Future() for _ in range(calls)]
        for future in futures:
            task = _core.Task(ref, future)
            task.hold(payload.data, payload.buffers, payload.readonly)
            assert dispatcher.submit(task)
        assert port.serve() == -1
        dispatcher.drain_everything()
        assert [future.result(0) for future in futures] == [1] * calls
        assert dispatcher.busy_ns(slot) * 1e-9 < pause
    finally:
        dispatcher.vacate(slot)
        dispatcher.settle(slot, None)
        dispatcher.close()
        arena.release()
        os.close(bell)


def test_the_next_worker_in_a_slot_has_all_of_its_time() -> None:
    """Its lease has the word of the one that the last worker was ended for, and as many records are out."""
    arena, bell = _core.Arena.create(64 * 4096, 1, 4, 16, 4096), os.eventfd(0)
    keeper = _core.DeadlineKeeper(arena, bell)
    dispatcher = _core.Dispatcher(arena, keeper)
    table = serializer.FunctionTable()
    thread = threading.Thread(target=keeper.run)

    def lease() -> _core.Task:
        ref, payload = serializer.pack_call(table, abs, (-1,), {})
        task = _core.Task(ref, Future(), timeout=1_000_000)
        task.hold(payload.data, payload.buffers, payload.readonly)
        assert dispatcher.submit(task)
        return task

    def life(cancelled: int) -> float:
        """Seconds from the claim of a lease, after so many that were taken back, to the worker's end."""
        slot = dispatcher.open_slot(0, 1)
        port = _core.Runner(arena, slot, lambda: None)
        port.attend(None, types.SimpleNamespace(), {}, bell, -1, 1)
        dispatcher.make_ready(slot)
        with subprocess.Popen(["sleep", "60"]) as child:
            pidfd = os.pidfd_open(child.pid)
            dispatcher.occupy(slot, pidfd)
            for task in [lease() for _ in range(cancelled)]:
                assert dispatcher.cancel(task) == _core.CANCEL_DONE
            lease()
            began = time.monotonic()
            assert port.serve() >= 0  # claimed, and its clock stands
            child.wait(30)
        dispatcher.vacate(slot)
        os.close(pidfd)
        dispatcher.settle(slot, None)
        dispatcher.take_outcomes()
        return time.monotonic() - began

    thread.start()
    try:
        assert [life(n) >= 0.25 for n in (1, 2)] == [True, True]
    finally:
        keeper.stop()
        thread.join()
        dispatcher.close()
        arena.release()
        os.close(bell)
