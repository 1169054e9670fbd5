"""asubmit and amap: results, errors, what a cancel stops, loops that come and go."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import tasks
from tasks import Gate, pass_through
from watching import all_ready, idle, run_script, settled, shut_down_clean, until

import runtime
from runtime import Runtime, TaskCancelled, TaskTimeout, WorkerDied, asynchronous


def log_then_hang(path: str, value: Any) -> None:
    tasks.log_line(path, value)
    tasks.hang()


def logged(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


async def soon(condition: Callable[[], Any]) -> None:
    """Until a condition holds, with the loop running."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def listed(results: AsyncIterator[Any]) -> list[Any]:
    return [value async for value in results]


# ---- asubmit -------------------------------------------------------------------------------------


def test_result_and_keywords(pool: Runtime) -> None:
    async def main() -> None:
        assert await pool.asubmit(tasks.add, 1, 2, x=3) == 6
        assert await pool.options(timeout=20, priority=2).asubmit(abs, -1) == 1
        assert await asyncio.gather(*(pool.asubmit(abs, -i) for i in range(500))) == list(range(500))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("call", "kind"),
    [((tasks.throw_type, ValueError, "x"), ValueError), ((threading.Lock,), TypeError)],
)  # fmt: skip
def test_what_a_call_raises(pool: Runtime, call: tuple[Any, ...], kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        asyncio.run(pool.asubmit(*call))


def test_cancelled_when_the_call_has_failed_already(pool: Runtime) -> None:
    """Arguments that cannot be pickled fail the future at once; the cancel comes before that was told."""

    async def main() -> None:
        task = asyncio.create_task(pool.asubmit(len, threading.Lock()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_submit_that_refuses(factory: Callable[..., Runtime], pool: Runtime) -> None:
    rt = factory(1)
    rt.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        asyncio.run(rt.asubmit(abs, 1))
    with pytest.raises(TypeError, match="callable"):
        asyncio.run(pool.asubmit(3))  # type: ignore[arg-type]


def test_a_worker_that_dies_and_a_deadline(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)

    async def main() -> None:
        with pytest.raises(WorkerDied):
            await rt.asubmit(tasks.kill_self)
        with pytest.raises(TaskTimeout):
            await rt.options(timeout=0.1).asubmit(tasks.hang)
        assert await rt.options(retries=1).asubmit(tasks.die_until, 2) == 2

    asyncio.run(main())


def test_nothing_is_submitted_before_it_is_awaited(pool: Runtime) -> None:
    before = pool.stats().done
    pool.asubmit(abs, 1).close()
    assert pool.stats().done == before and idle(pool)


def test_a_call_that_has_not_started_is_cancelled(pool: Runtime, gate: Gate, tmp_path: Path) -> None:
    path = tmp_path / "log"

    async def main() -> None:
        held = [asyncio.create_task(pool.asubmit(pass_through, gate.path, i)) for i in range(2)]
        await asyncio.sleep(0)
        await asyncio.to_thread(gate.arrived, 2)
        waiting = asyncio.create_task(pool.asubmit(tasks.log_line, str(path), 1))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.open(2)
        assert await asyncio.gather(*held) == [0, 1]

    asyncio.run(main())
    assert logged(path) == []


def test_a_call_that_runs_is_killed(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    rt = factory(1)
    path = tmp_path / "log"
    (before,) = all_ready(rt).values()

    async def main() -> None:
        task = asyncio.create_task(rt.asubmit(log_then_hang, str(path), "here"))
        await soon(lambda: logged(path))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await rt.asubmit(abs, -1) == 1

    asyncio.run(main())
    assert before not in all_ready(rt).values()
    settled(rt)
    shut_down_clean(rt)


def test_timeouts_and_groups_of_asyncio_stop_the_code(
    factory: Callable[..., Runtime], tmp_path: Path
) -> None:
    rt = factory(2)
    path = tmp_path / "log"
    all_ready(rt)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await rt.asubmit(tasks.hang)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(rt.asubmit(tasks.hang), 0.3)
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(rt.asubmit(log_then_hang, str(path), 1))
                await soon(lambda: logged(path))
                group.create_task(rt.asubmit(tasks.throw_type, KeyError))
        assert [type(error) for error in caught.value.exceptions] == [KeyError]
        assert await rt.asubmit(abs, -1) == 1

    asyncio.run(main())
    until(lambda: idle(rt), "what hung is gone")


def test_cancelled_by_somebody_else(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1)

    async def main() -> None:
        held = asyncio.create_task(rt.asubmit(pass_through, gate.path))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(rt.asubmit(abs, 1))
        await asyncio.sleep(0)
        await asyncio.to_thread(gate.arrived)
        rt.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(CancelledError):  # not asyncio's: this task was not cancelled
            await waiting
        gate.open()
        await held

    asyncio.run(main())


def test_a_loop_that_ends_first(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    """asyncio.run cancels what is left; a loop that is only closed leaves it to the collector of garbage."""
    rt = factory(1)
    path = tmp_path / "log"

    async def leave() -> None:
        leave.task = asyncio.create_task(rt.asubmit(log_then_hang, str(path), 1))  # type: ignore[attr-defined]
        await soon(lambda: logged(path))

    asyncio.run(leave())
    assert leave.task.cancelled()  # type: ignore[attr-defined]
    until(lambda: idle(rt), "the code is stopped")

    loop = asyncio.new_event_loop()
    coroutine = rt.asubmit(log_then_hang, str(path), 2)
    first = loop.create_task(coroutine)
    loop.run_until_complete(soon(lambda: len(logged(path)) == 2))
    loop.close()
    first._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()
    until(lambda: idle(rt), "the code is stopped")
    del first
    gc.collect()


def test_a_result_for_a_loop_that_is_closed_is_dropped(
    factory: Callable[..., Runtime], gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    rt = factory(1)
    loop = asyncio.new_event_loop()
    coroutine = rt.asubmit(pass_through, gate.path)
    task = loop.create_task(coroutine)

    async def arrived() -> None:
        await asyncio.to_thread(gate.arrived)

    loop.run_until_complete(arrived())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.open()
    until(lambda: rt.stats().done == 1, "the call has ended")
    assert not caplog.records
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine.close()


def test_several_loops_at_once(pool: Runtime) -> None:
    got: list[Any] = []

    def run(number: int) -> None:
        async def main() -> list[int]:
            one = await asyncio.gather(*(pool.asubmit(tasks.add, number, i) for i in range(100)))
            return [*one, *await listed(pool.amap(abs, range(100)))]

        got.append((number, asyncio.run(main())))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [(n, [n + i for i in range(100)] + list(range(100))) for n in range(4)]


def test_no_thread_is_made(pool: Runtime) -> None:
    before = threading.active_count()

    async def main() -> int:
        calls = [asyncio.create_task(pool.asubmit(abs, -i)) for i in range(200)]
        async for _ in pool.amap(abs, range(200)):
            assert threading.active_count() <= before
        await asyncio.gather(*calls)
        return threading.active_count()

    assert asyncio.run(main()) <= before


def test_the_loop_goes_on_meanwhile(pool: Runtime, gate: Gate) -> None:
    """While every worker is at the gate, and more is submitted than they could take."""

    async def main() -> None:
        held = [asyncio.create_task(pool.asubmit(pass_through, gate.path)) for _ in range(2)]
        more = [asyncio.create_task(pool.asubmit(abs, -i)) for i in range(2000)]
        mapped = asyncio.create_task(listed(pool.amap(abs, range(50_000))))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not any(task.done() for task in (*held, mapped))
        await asyncio.to_thread(gate.arrived, 2)
        gate.open(2)
        assert await asyncio.gather(*more) == list(range(2000))
        assert await mapped == list(range(50_000))

    asyncio.run(main())


def test_no_cycle_keeps_an_error(pool: Runtime) -> None:
    async def main() -> None:
        try:
            await pool.asubmit(tasks.throw_type, KeyError)
        except KeyError:
            pass

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kept = [thing for thing in gc.garbage if isinstance(thing, KeyError)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not kept


# ---- amap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [None, 1, 7])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_order(pool: Runtime, chunksize: int | None, count: int) -> None:
    assert asyncio.run(listed(pool.amap(abs, range(count), chunksize=chunksize))) == list(range(count))
    assert asyncio.run(listed(pool.amap(abs, iter(range(count)), chunksize=chunksize))) == list(range(count))


def test_several_inputs_and_options(pool: Runtime) -> None:
    got = asyncio.run(listed(pool.options(priority=1).amap(tasks.add, range(5), range(9))))
    assert got == [0, 2, 4, 6, 8]


def test_endless_input_has_a_window(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)  # its own: what runs at the end is killed
    taken = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(None)
            yield len(taken)

    async def main() -> None:
        results = rt.amap(abs, endless(), buffersize=16)
        assert [await results.__anext__() for _ in range(40)] == list(range(1, 41))
        await results.aclose()

    asyncio.run(main())
    assert len(taken) <= 40 + 16 + 1
    until(lambda: idle(rt), "the rest is cancelled")


def test_bad_arguments_are_refused_at_the_call(pool: Runtime) -> None:
    with pytest.raises(TypeError):
        pool.amap(3, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunksize"):
        pool.amap(abs, [1], chunksize=0)
    with pytest.raises(TypeError):
        pool.amap(abs, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        pool.amap(abs, 5, progress=True)  # type: ignore[arg-type]


def test_an_error_ends_it_and_names_the_item(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)

    async def main() -> list[Any]:
        got = []
        results = rt.amap(fail_at_five, range(1000), chunksize=1)
        with pytest.raises(ValueError, match="five") as caught:
            async for value in results:
                got.append(value)
        assert "item 5" in caught.value.__notes__[0]
        assert await listed(results) == []
        return got

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]
    settled(rt)


def fail_at_five(value: int) -> int:
    if value == 5:
        raise ValueError("five")
    return value


def test_return_exceptions(pool: Runtime) -> None:
    got = asyncio.run(listed(pool.amap(fail_at_five, range(8), return_exceptions=True)))
    assert [type(v) if isinstance(v, Exception) else v for v in got] == [0, 1, 2, 3, 4, ValueError, 6, 7]


def test_an_error_of_the_input_comes_behind_the_results(pool: Runtime) -> None:
    def broken() -> Iterator[int]:
        yield from range(3)
        raise OSError("no more")

    async def main() -> None:
        results = pool.amap(abs, broken())
        assert [await results.__anext__() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="no more"):
            await results.__anext__()

    asyncio.run(main())


def test_its_timeout(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)

    async def main() -> None:
        results = rt.amap(tasks.hang, [1], timeout=0.2)
        with pytest.raises(TimeoutError, match="within its timeout"):
            await results.__anext__()

    asyncio.run(main())
    until(lambda: idle(rt), "what hung is stopped")


@pytest.mark.parametrize("how", ["aclose", "break", "cancel", "wait_for"])
def test_leaving_it_stops_what_runs_and_what_waits(
    factory: Callable[..., Runtime], tmp_path: Path, how: str
) -> None:
    rt = factory(2)
    path = tmp_path / "log"
    before = set(all_ready(rt).values())

    async def first_then_hang() -> None:
        async for _ in rt.amap(one_then_hang, [str(path)] * 100, range(100), chunksize=1):
            await soon(lambda: len(logged(path)) == 3)
            break

    async def main() -> None:
        if how == "break":
            await first_then_hang()
            return
        results = rt.amap(one_then_hang, [str(path)] * 100, range(100), chunksize=1)
        assert await results.__anext__() == 0
        await soon(lambda: len(logged(path)) == 3)
        if how == "aclose":
            await results.aclose()
            await results.aclose()
        elif how == "cancel":
            task = asyncio.ensure_future(results.__anext__())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(results.__anext__(), 0.1)
        assert await listed(results) == []

    asyncio.run(main())
    gc.collect()
    until(lambda: idle(rt), "all of it is stopped")
    assert len(logged(path)) == 3
    assert not before & set(all_ready(rt).values()), "both hung, so both were killed"
    settled(rt)
    shut_down_clean(rt)


def one_then_hang(path: str, value: int) -> int:
    """The first item is done at once, every other one hangs."""
    tasks.log_line(path, value)
    if value:
        tasks.hang()
    return value


def test_aclose_wakes_who_iterates(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)

    async def main() -> None:
        results = rt.amap(tasks.hang, [1])
        task = asyncio.create_task(listed(results))
        await soon(lambda: rt.stats().running)
        with pytest.raises(RuntimeError, match="another task"):
            await results.__anext__()
        await results.aclose()
        assert await task == []

    asyncio.run(main())


def test_never_iterated_it_takes_nothing(pool: Runtime) -> None:
    taken = iter(range(5))
    results = pool.amap(abs, taken)
    del results
    assert list(taken) == list(range(5))
    assert idle(pool)


def test_shutdown_of_the_runtime_meanwhile(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)

    async def main() -> None:
        results = rt.amap(abs, iter(range(10_000)))
        assert await results.__anext__() == 0
        rt.kill_workers()
        with pytest.raises((runtime.BrokenRuntime, RuntimeError)):
            await listed(results)

    asyncio.run(main())


def test_large_items_do_not_hold_the_loop(pool: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input is taken in slices: between two of them the loop has its turn."""
    monkeypatch.setattr(asynchronous, "_SLICE", 0.0)  # a turn for each chunk
    items = [bytes(300_000)] * 400
    turns = 0

    async def main() -> int:
        nonlocal turns
        task = asyncio.create_task(listed(pool.amap(len, items)))
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert task.result() == [300_000] * 400
        return turns

    assert asyncio.run(main()) >= 10


def test_asyncio_is_not_loaded_by_others(tmp_path: Path) -> None:
    said = run_script(
        tmp_path,
        """
        import sys, runtime
        with runtime.Runtime(1) as rt:
            list(rt.map(abs, range(3)))
        print('asyncio' in sys.modules, 'rich' in sys.modules)
        """,
    )
    assert said.split() == ["False", "False"]


def test_cancel_is_told_apart(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    """A future that `cancel(running=True)` has ended raises TaskCancelled in who awaits it."""
    rt = factory(1)

    async def main() -> None:
        future = rt.submit(tasks.hang)
        await soon(future.running)
        assert rt.cancel(future, running=True)
        with pytest.raises(TaskCancelled):
            await asyncio.to_thread(future.result)

    asyncio.run(main())


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
def test_an_item_cannot_end_the_iteration(pool: Runtime, kind: type[BaseException]) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match=f"item 0 of the map raised {kind.__name__}"):
            await listed(pool.amap(tasks.throw_type, [kind], ["x"]))

    asyncio.run(main())
