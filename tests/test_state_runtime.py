"""The state of a Runtime: the host and its workers, whatever ends meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sealing
from watching import all_ready, run_script, send, until

import runtime
from runtime import Change, LockTimeout, RegionFull, Runtime, WorkerDied


def add(key: str, times: int) -> int:
    state = runtime.current().state
    for _ in range(times):
        state.add(key)
    return os.getpid()


@pytest.mark.parametrize("options", [{}, {"threads": 2}, {"start_method": "fork"}], ids=str)
def test_host_and_workers_share_it(options: dict[str, Any], tmp_path: Path) -> None:
    text = f"""
        import runtime

        def task(i):
            state = runtime.current().state
            return state.get("a"), state.add("n", i)

        with runtime.Runtime(2, **{options!r}) as rt:
            rt.state.set("a", b"1")
            print({{a for a, _ in rt.map(task, range(100))}}, rt.state.add("n", 0))
            items = rt.submit(lambda: runtime.current().state.items()).result()
            print(rt.state is rt.state, len(rt.state), items)
        try:
            rt.state.get("a")
        except ValueError as error:
            print(error)
    """
    assert run_script(tmp_path, text).splitlines() == [
        "{b'1'} 4950",
        "True 2 [('a', b'1'), ('n', b'V\\x13\\x00\\x00\\x00\\x00\\x00\\x00')]",
        "the region is closed",
    ]


def test_it_outlives_workers_and_zygotes(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    first = {rt.submit(add, "n", 10).result() for _ in range(3)}
    for pid in all_ready(rt).values():
        send(pid, signal.SIGKILL)
    until(lambda: not first & set(all_ready(rt).values()), "they are replaced")
    assert rt.submit(add, "n", 10).result() not in first
    assert rt._core._zygote is not None
    zygote = rt._core._zygote.pid
    send(zygote, signal.SIGKILL)
    until(lambda: rt._core._zygote is not None and rt._core._zygote.pid != zygote, "another one leads")
    rt.scale(3)
    pids = until(lambda: len(ready := set(all_ready(rt).values())) == 3 and ready, "a new worker")
    until(lambda: rt.submit(add, "m", 1).result() in pids - first)
    assert rt.state.add("n", 0) == 40


def test_limits(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, state_max_items=3, state_max_bytes="4KiB")

    def fill(count: int, size: int) -> int:
        with contextlib.suppress(RegionFull):
            for i in range(count):
                runtime.current().state.set(f"key {i}", bytes(size))
        return len(runtime.current().state)

    assert rt.submit(fill, 10, 1).result() == 3
    with pytest.raises(RegionFull, match="max_items is 3"):
        rt.state.set("another", b"")
    with pytest.raises(RegionFull, match="of its 4096 bytes"):
        rt.state.set("key 0", bytes(5000))
    assert rt.state.get("key 0") == b"\0"
    rt = factory(1)
    value = bytes(1 << 20)
    for i in range(8):
        rt.state.set(f"large {i}", value)
    assert (
        rt.submit(lambda: sum(len(v) for _, v in runtime.current().state.items("large"))).result() == 8 << 20
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"state_max_items": 0}, ValueError, "state_max_items must be >= 1"),
        ({"state_max_bytes": 100}, ValueError, "state_max_bytes must be 1,024 to"),
        ({"state_max_bytes": "1PiB"}, ValueError, "state_max_bytes"),
        ({"state_max_bytes": "512GiB"}, RegionFull, "memory are available"),
    ],
)
def test_limits_that_are_none(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Runtime(1, **options)


def test_it_does_not_travel(pool: Runtime) -> None:
    for attempt in (lambda: pickle.dumps(pool.state), lambda: pool.submit(len, pool.state).result()):
        with pytest.raises(TypeError, match=r"runtime\.current\(\)\.state"):
            attempt()
    with pytest.raises(RuntimeError, match="is for code that runs in a worker"):
        runtime.current()


def test_a_forked_child_of_a_task_holds_nothing(pool: Runtime) -> None:
    """It shares the state as a process of its own; what its parent holds it cannot give back."""

    def task() -> bool:
        state = runtime.current().state
        with state.lock("a"):
            child = os.fork()
            if child == 0:
                state.set("forked", b"here")
                os._exit(0)
            os.waitpid(child, 0)
            return state.get("forked") == b"here"

    assert pool.submit(task).result()
    with pool.state.lock("a", 0) as lock:
        assert not lock.inherited


def test_the_lock_of_a_dead_worker_passes_on_to_the_host(factory: Callable[..., Runtime]) -> None:
    """At once: the supervisor says so, nobody has to ask."""
    rt = factory(1)
    holding = rt.submit(sealing.hold, "key")
    holder = int(until(lambda: rt.state.get("holder"), "it is held"))
    with pytest.raises(LockTimeout):
        rt.state.lock("key", 0).acquire()
    send(holder, signal.SIGKILL)
    assert isinstance(holding.exception(30), WorkerDied)
    with rt.state.lock("key", 0) as lock:
        assert lock.inherited


def test_coroutines_of_several_processes(factory: Callable[..., Runtime]) -> None:
    async def count(state: Any) -> None:
        async with state.alock("n"):
            n = int(await state.aget("n", b"0"))
            await asyncio.sleep(0)
            await state.aset("n", str(n + 1).encode())

    async def crowd(state: Any, size: int) -> None:
        await asyncio.gather(*[count(state) for _ in range(size)])

    rt = factory(2)
    others = [rt.submit(lambda: asyncio.run(crowd(runtime.current().state, 33))) for _ in range(2)]
    asyncio.run(crowd(rt.state, 34))
    assert [other.result() for other in others] == [None, None]
    assert rt.state.get("n") == b"100"


def test_the_host_watches_what_workers_change(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    watch = rt.state.watch("done/")
    for _ in rt.map_unordered(lambda i: runtime.current().state.set(f"done/{i}", b"%d" % i), range(20)):
        pass
    seen = [next(watch) for _ in range(20)]
    watch.close()
    assert all(isinstance(change, Change) for change in seen)
    assert {change.key: change.value for change in seen} == {f"done/{i}": b"%d" % i for i in range(20)}


def test_a_thousand_watchers(pool: Runtime) -> None:
    """Each looks at all buckets, and there are 32,768."""
    watches = [pool.state.watch("config") for _ in range(1000)]
    pool.submit(lambda: runtime.current().state.set("config", b"1")).result()
    pool.submit(lambda: runtime.current().state.set("config", b"2")).result()
    assert {next(watch).value for watch in watches} == {b"2"}
    for watch in watches:
        watch.close()
    pool.state.delete("config")


def test_a_worker_that_has_written_over_it(factory: Callable[..., Runtime]) -> None:
    """Those who come later are told; tasks that do not use it run."""

    def scribble() -> None:
        runtime.current().state.region.store_u64(0, 1)  # the magic of the map

    rt = factory(1, max_tasks_per_child=1)
    rt.submit(scribble).result()
    zygote = rt._core._zygote
    assert zygote is not None
    send(zygote.pid, signal.SIGKILL)
    until(lambda: rt._core._zygote not in (None, zygote), "another one leads")
    until(lambda: rt.submit(os.getppid).result() != zygote.pid, "its workers are there")
    with pytest.raises(runtime.RuntimeFailure, match="has written over its header"):
        rt.submit(lambda: runtime.current().state).result()


def test_get_or_set_runs_its_factory_once(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)

    def make() -> bytes:
        runtime.current().state.add("made")
        return b"x"

    values = rt.map(lambda _: runtime.current().state.get_or_set("once", make), range(50))
    assert set(values) == {b"x"} and rt.state.add("made", 0) == 1


def test_threads_of_the_host(pool: Runtime) -> None:
    threads = [threading.Thread(target=lambda: [pool.state.add("t") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    pool.submit(add, "t", 500).result()
    for thread in threads:
        thread.join()
    assert pool.state.add("t", 0) == 2500
