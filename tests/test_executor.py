"""The executor: submit, futures, options, cancelling, ending; what the stdlib's do, and what they do not.

Tests that end no worker share one Runtime, whose workers are ready before the first of them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from concurrent.futures.process import _RemoteTraceback
from pathlib import Path
from typing import Any

import pytest
import tasks
from tasks import Gate, pass_through
from watching import environment, idle, pids, ready, run, run_script, until

import runtime
from runtime import BrokenRuntime, RemoteError, Runtime, TaskCancelled, TaskTimeout, WorkerDied, WorkerStatus


def occupied(rt: Runtime, gate: Gate) -> list[runtime.Future[Any]]:
    """Every worker of `rt` waits at the gate."""
    held = [rt.submit(pass_through, gate.path) for _ in range(rt._max_workers)]
    gate.arrived(rt._max_workers)
    return held


# ---- submit and results ----------------------------------------------------------------------------


def test_submit_returns_what_the_function_returns(pool: Runtime) -> None:
    assert pool.submit(tasks.add, 1, 2, third=3, fourth=4).result() == 10
    assert pool.submit(len, "four").result() == 4
    assert pool.submit(tasks.echo, None).result() is None


def test_keyword_arguments_may_have_any_name(pool: Runtime) -> None:
    assert pool.submit(dict, self=1, fn=2, args=3, kwargs=4, future=5).result() == {
        "self": 1, "fn": 2, "args": 3, "kwargs": 4, "future": 5,
    }  # fmt: skip


def test_every_task_runs_in_a_worker(pool: Runtime) -> None:
    ran_in = {f.result() for f in [pool.submit(os.getpid) for _ in range(500)]}
    ran_in |= set(pool.map(lambda _: os.getpid(), range(500)))
    assert ran_in <= pids(pool)
    assert os.getpid() not in ran_in


def test_both_workers_take_part(pool: Runtime, gate: Gate) -> None:
    held = [pool.submit(pass_through, gate.path) for _ in range(2)]
    assert set(gate.arrived(2)) == pids(pool)
    gate.open(2)
    assert [f.result() for f in held] == [None, None]


def test_submit_needs_a_callable(pool: Runtime) -> None:
    with pytest.raises(TypeError, match="callable"):
        future = pool.submit(42)  # type: ignore[arg-type]
        future.result()  # the stdlib's executors fail here


def test_a_future_is_one_of_the_stdlibs(pool: Runtime) -> None:
    future = pool.submit(abs, -1)
    assert isinstance(future, concurrent.futures.Future)
    assert isinstance(future, runtime.Future)
    assert isinstance(pool, concurrent.futures.Executor)
    assert future.result() == future.result(timeout=0) == 1
    assert future.exception() is None
    assert future.done() and not future.running() and not future.cancelled()
    assert "finished" in repr(future)


def test_result_with_a_timeout(pool: Runtime, gate: Gate) -> None:
    future = pool.submit(pass_through, gate.path, 5)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0)
    gate.open()
    assert future.result() == 5


def test_a_thousand_results_out_of_order(pool: Runtime) -> None:
    futures = [(i, pool.submit(tasks.echo, i)) for i in range(1000)]
    random.Random(5).shuffle(futures)
    assert all(future.result() == i for i, future in futures)


@pytest.mark.timeout(120)
def test_100_000_tasks_before_any_is_collected(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    before = pool.stats()
    futures = [pool.submit(abs, -i) for i in range(100_000)]
    stats = pool.stats()
    assert stats.queued + stats.leased == 100_000
    assert stats.done == before.done
    gate.open(2)
    assert [f.result() for f in futures] == list(range(100_000))
    assert [f.result() for f in held] == [None, None]
    assert pool.stats().rescued == before.rescued


def test_from_many_threads(pool: Runtime) -> None:
    def use(thread: int) -> int:
        futures = [pool.submit(tasks.add, thread * 1000, i) for i in range(200)]
        return sum(f.result() != thread * 1000 + i for i, f in enumerate(futures))

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(use, range(8))) == [0] * 8


def test_many_threads_wait_for_one_future(pool: Runtime, gate: Gate) -> None:
    future = pool.submit(pass_through, gate.path, "seen")
    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(future.result) for _ in range(8)]
        gate.arrived()
        gate.open()
        assert {f.result() for f in waiting} == {"seen"}


def test_many_runtimes_in_one_process(factory: Callable[..., Runtime]) -> None:
    several = [factory(1, name=None) for _ in range(4)]
    futures = [(i, rt, rt.submit(tasks.pid_and, i)) for i in range(50) for rt in several]
    found: dict[int, set[int]] = {}
    for i, rt, future in futures:
        pid, value = future.result()
        assert value == i
        found.setdefault(id(rt), set()).add(pid)
    assert all(len(seen) == 1 for seen in found.values())
    assert len(set().union(*found.values())) == 4
    several[0].shutdown()
    assert several[1].submit(abs, -1).result() == 1


# ---- arguments that are frozen, or cannot travel -----------------------------------------------------


@pytest.mark.parametrize("size", [3, 100_000], ids=["in the pickle", "out of band"])
def test_arguments_are_frozen_at_submit(pool: Runtime, gate: Gate, size: int) -> None:
    held = occupied(pool, gate)
    listed, raw = [1, 2, 3], bytearray(b"a" * size)
    first = pool.submit(tasks.echo, listed, raw)
    many = [pool.submit(tasks.echo, listed, raw) for _ in range(100)]  # more than are leased ahead
    listed.append(4)
    raw[:] = b"b" * size
    gate.open(2)
    for future in (first, *many):
        assert future.result() == ([1, 2, 3], b"a" * size)
    assert [f.result() for f in held] == [None, None]


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        (threading.Lock(), TypeError),
        ((x for x in ()), TypeError),
        (tasks.DumpsBadly(ZeroDivisionError("no")), ZeroDivisionError),
        (tasks.DumpsBadly(SystemExit(3)), SystemExit),
    ],
    ids=["lock", "generator", "raises", "SystemExit"],
)
def test_arguments_that_cannot_be_pickled_fail_the_future(pool: Runtime, argument: Any, kind: type) -> None:
    before = pool.stats().failed
    future = pool.submit(tasks.echo, argument)
    assert type(future.exception()) is kind
    assert future.done() and not future.cancelled()
    assert pool.stats().failed == before + 1
    assert pool.submit(abs, -1).result() == 1


def test_function_that_cannot_be_pickled_fails_the_future(pool: Runtime) -> None:
    lock = threading.Lock()
    future = pool.submit(lambda: lock)
    assert isinstance(future.exception(), TypeError)
    assert pool.submit(abs, -1).result() == 1


@pytest.mark.parametrize("error", [ValueError("bad load"), SystemExit(9), KeyboardInterrupt()], ids=type)
def test_arguments_that_cannot_be_unpickled_fail_the_future(pool: Runtime, error: BaseException) -> None:
    future = pool.submit(tasks.echo, tasks.LoadsBadly(error))
    raised = future.exception()
    assert type(raised) is type(error) and raised.args == error.args
    assert pool.submit(abs, -1).result() == 1


@pytest.mark.parametrize("make", [multiprocessing.Lock, multiprocessing.Queue], ids=["Lock", "Queue"])
def test_multiprocessing_objects_name_the_cure(pool: Runtime, make: Callable[[], Any]) -> None:
    thing = make()
    error = pool.submit(tasks.echo, thing).exception()
    assert isinstance(error, (TypeError, RuntimeError))
    assert "rt.state.lock" in str(error)


def test_runtime_futures_and_options_cannot_be_pickled(pool: Runtime) -> None:
    for thing in (pool, pool.submit(abs, -1), pool.options(priority=1)):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
        assert isinstance(pool.submit(tasks.echo, thing).exception(), TypeError)
    with pytest.raises(TypeError, match="Runtime"):
        pickle.dumps(pool)


# ---- results that cannot travel ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "kind", "words"),
    [
        ("lock", TypeError, "could not be pickled"),
        ("generator", TypeError, "could not be pickled"),
        ("dumps badly", ValueError, "could not be pickled"),
        ("loads badly", ValueError, "could not be unpickled"),
        ("loads with SystemExit", SystemExit, "could not be unpickled"),
    ],
)
def test_result_that_cannot_travel_fails_its_future(
    pool: Runtime, result: str, kind: type, words: str
) -> None:
    error = pool.submit(tasks.make, result).exception()
    assert type(error) is kind
    assert words in "\n".join(getattr(error, "__notes__", ()))
    assert pool.submit(abs, -1).result() == 1


def test_lambda_as_a_result(pool: Runtime) -> None:
    assert pool.submit(lambda n: lambda x: x + n, 5).result()(37) == 42


# ---- exceptions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("text", 5), KeyError("key"), OSError(2, "no such", "file"), StopIteration(3),
        SystemExit(3), SystemExit("text"), KeyboardInterrupt(), GeneratorExit(), tasks.Odd("odd"),
        CancelledError(), TimeoutError("t"), MemoryError(), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        WorkerDied(1, 2, 3, None, "mine"), BrokenRuntime("mine"), TaskTimeout("mine"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_exception_is_delivered_as_it_is(pool: Runtime, error: BaseException) -> None:
    raised = pool.submit(tasks.throw, error).exception()
    assert type(raised) is type(error)
    assert raised.args == error.args and str(raised) == str(error)
    assert isinstance(raised.__cause__, _RemoteTraceback)


def test_result_raises_it(pool: Runtime) -> None:
    for kind in (ValueError, SystemExit, KeyboardInterrupt):
        with pytest.raises(kind):
            pool.submit(tasks.throw_type, kind).result()


def test_sys_exit_and_interrupt_leave_the_worker_alive(pool: Runtime, gate: Gate) -> None:
    before = {w.number: (w.pid, w.started) for w in pool.workers()}
    for _ in range(10):
        assert pool.submit(sys.exit, 3).exception().args == (3,)
        assert isinstance(pool.submit(tasks.throw, KeyboardInterrupt()).exception(), KeyboardInterrupt)
    occupied(pool, gate)
    gate.open(2)
    assert {w.number: (w.pid, w.started) for w in pool.workers()} == before


def test_remote_traceback(pool: Runtime) -> None:
    error = pool.submit(tasks.outer_failure).exception()
    text = str(error.__cause__)
    for part in (
        "outer_failure",
        "inner_failure",
        "KeyError",
        "inner text",
        "outer text",
        "tasks.py",
        "direct cause",
    ):
        assert part in text
    assert isinstance(error.__cause__, _RemoteTraceback)


def test_exception_with_attributes_and_notes(pool: Runtime) -> None:
    error = ValueError("with more")
    error.code = 17  # type: ignore[attr-defined]
    error.add_note("a note")
    raised = pool.submit(tasks.throw, error).exception()
    assert raised.code == 17
    assert "a note" in raised.__notes__


@pytest.mark.parametrize("how", ["cannot be pickled", "cannot be unpickled"])
def test_remote_error(pool: Runtime, how: str) -> None:
    kind, args = (
        (tasks.Locked, ("with a lock",)) if how == "cannot be pickled" else (tasks.NeedsTwo, ("a", "b"))
    )
    error = pool.submit(tasks.throw_type, kind, *args).exception()
    assert isinstance(error, RemoteError)
    assert kind.__name__ in error.type_name
    assert "-".join(args) in error.text
    assert "throw_type" in error.traceback
    assert kind.__name__ in str(error)
    copies = (pickle.loads(pickle.dumps(error)), copy.deepcopy(error))
    assert all(
        (x.type_name, x.text, x.traceback) == (error.type_name, error.text, error.traceback) for x in copies
    )


def test_exception_group(pool: Runtime) -> None:
    error = pool.submit(tasks.throw, ExceptionGroup("two", [ValueError(1), KeyError(2)])).exception()
    assert isinstance(error, ExceptionGroup)
    assert [type(x) for x in error.exceptions] == [ValueError, KeyError]


def test_endless_recursion(pool: Runtime) -> None:
    assert isinstance(pool.submit(tasks.recurse).exception(), RecursionError)
    assert pool.submit(abs, -1).result() == 1


def test_exception_of_5_mb(pool: Runtime) -> None:
    error = pool.submit(tasks.large_exception, 5_000_000).exception()
    assert isinstance(error, ValueError)
    assert error.args == ("x" * 5_000_000,)


# ---- the states of a future --------------------------------------------------------------------------


def test_running(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    behind = [pool.submit(abs, -1) for _ in range(200)]
    assert all(f.running() for f in held)
    assert not any(f.running() for f in behind)
    gate.open(2)
    assert [f.result() for f in (*held, *behind)] == [None] * 2 + [1] * 200
    assert not any(f.running() for f in (*held, *behind))


def test_cancel_in_each_state(factory: Callable[..., Runtime], gate: Gate, tmp_path: Path) -> None:
    rt = factory(1)
    log = str(tmp_path / "log")
    early = rt.submit(tasks.log_line, log, "early")
    assert early.cancel() in (True, False)  # before the worker is ready it is still ours; both are right
    held = rt.submit(pass_through, gate.path, "held")
    gate.arrived()
    line = [rt.submit(tasks.log_line, log, i) for i in range(200)]
    leased, queued = line[0], line[-1]
    assert not held.cancel() and not held.cancelled()
    for future in (leased, queued):
        assert future.cancel() and future.cancel()
        assert future.cancelled() and future.done() and not future.running()
        with pytest.raises(CancelledError):
            future.result()
        with pytest.raises(CancelledError):
            future.exception()
    gate.open()
    assert held.result() == "held"
    assert [f.result() for f in line[1:-1]] == list(range(1, 199))
    assert not held.cancel() and not line[5].cancel()
    ran = sorted(int(x) for x in Path(log).read_text().split() if x != "early")
    assert ran == list(range(1, 199))
    assert rt.stats().cancelled == 2 + early.cancelled()


def test_cancel_all_that_wait_and_go_on(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    before = pool.stats().cancelled
    line = [pool.submit(tasks.throw_type, AssertionError) for _ in range(1000)]
    assert all(f.cancel() for f in line)
    assert pool.stats().cancelled == before + 1000
    gate.open(2)
    assert [f.result() for f in held] == [None, None]
    assert pool.submit(abs, -1).result() == 1


def test_cancel_races_with_the_start(pool: Runtime, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    futures = [pool.submit(tasks.log_line, log, i) for i in range(500)]
    cancelled = {i for i, f in enumerate(futures) if f.cancel()}
    concurrent.futures.wait(futures)
    assert {i for i, f in enumerate(futures) if f.cancelled()} == cancelled
    ran = sorted(map(int, Path(log).read_text().split())) if os.path.exists(log) else []
    assert ran == [i for i in range(500) if i not in cancelled]
    assert [f.result() for i, f in enumerate(futures) if i not in cancelled] == ran


def test_callback_threads(pool: Runtime, gate: Gate) -> None:
    seen: dict[str, threading.Thread] = {}
    arrived = threading.Event()

    def note(what: str) -> Callable[[Any], None]:
        def callback(future: Any) -> None:
            assert future.done()
            seen[what] = threading.current_thread()
            arrived.set()

        return callback

    held = occupied(pool, gate)
    held[0].add_done_callback(note("completes"))
    waiting = pool.submit(abs, -1)
    waiting.add_done_callback(note("cancel"))
    assert waiting.cancel()
    assert seen == {"cancel": threading.current_thread()}
    arrived.clear()
    gate.open(2)
    assert arrived.wait(tasks.PATIENCE)
    assert "collector" in seen["completes"].name
    held[0].result()
    held[0].add_done_callback(note("done"))
    assert seen["done"] is threading.current_thread()
    held[1].result()


def test_callbacks_run_in_order_and_survive_one_that_raises(pool: Runtime, gate: Gate, caplog: Any) -> None:
    held = occupied(pool, gate)
    seen: list[int] = []
    for i in range(5):
        held[0].add_done_callback(lambda _, i=i: seen.append(i))
    held[0].add_done_callback(lambda _: 1 / 0)
    last = threading.Event()
    held[0].add_done_callback(lambda _: last.set())
    with caplog.at_level(logging.CRITICAL):
        gate.open(2)
        assert last.wait(tasks.PATIENCE)
    assert seen == [0, 1, 2, 3, 4]
    held[1].result()
    assert pool.submit(abs, -1).result() == 1


def test_callback_that_submits(pool: Runtime) -> None:
    done = threading.Event()
    results: list[int] = []

    def more(future: concurrent.futures.Future[int]) -> None:
        results.append(future.result())
        if len(results) < 50:
            pool.submit(tasks.add, future.result(), 1).add_done_callback(more)
        else:
            done.set()

    pool.submit(tasks.echo, 0).add_done_callback(more)
    assert done.wait(tasks.PATIENCE)
    assert results == list(range(50))


def test_wait(pool: Runtime, gate: Gate, tmp_path: Path) -> None:
    held = pool.submit(pass_through, gate.path)
    gate.arrived()
    quick = pool.submit(abs, -1)
    done, pending = concurrent.futures.wait([held, quick], return_when=concurrent.futures.FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {held})
    failing = pool.submit(tasks.throw_type, ValueError)
    done, pending = concurrent.futures.wait([held, failing], return_when=concurrent.futures.FIRST_EXCEPTION)
    assert (done, pending) == ({failing}, {held})
    assert concurrent.futures.wait([held], timeout=0.01) == (set(), {held})
    gate.open()
    done, pending = concurrent.futures.wait([held, quick, failing])
    assert (done, pending) == ({held, quick, failing}, set())


def test_wait_counts_cancelled_futures_as_done(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    waiting = pool.submit(abs, -1)
    with ThreadPoolExecutor(1) as thread:
        waiter = thread.submit(concurrent.futures.wait, [waiting])
        waiting.cancel()
        assert waiter.result().done == {waiting}
    assert list(as_completed([waiting])) == [waiting]
    gate.open(2)
    concurrent.futures.wait(held)


def test_as_completed(pool: Runtime, gate: Gate) -> None:
    held = pool.submit(pass_through, gate.path, "last")
    others = [pool.submit(tasks.echo, i) for i in range(300)]
    order = as_completed([held, *others])
    first = [next(order).result() for _ in range(300)]
    assert sorted(first) == list(range(300))
    gate.open()
    assert [f.result() for f in order] == ["last"]
    again = pool.submit(pass_through, gate.path)
    with pytest.raises(TimeoutError):
        list(as_completed([again], timeout=0.01))
    gate.open()
    again.result()


# ---- asyncio -----------------------------------------------------------------------------------------


def test_asyncio(pool: Runtime) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        wrapped = [asyncio.wrap_future(pool.submit(tasks.echo, i)) for i in range(100)]
        called = [loop.run_in_executor(pool, tasks.add, i, 1) for i in range(100)]
        return await asyncio.gather(*wrapped, *called)

    assert asyncio.run(main()) == [*range(100), *range(1, 101)]


def test_asyncio_exceptions_and_cancellation(pool: Runtime, gate: Gate) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(ValueError, match="here"):
            await loop.run_in_executor(pool, tasks.throw, ValueError("here"))
        held = [asyncio.wrap_future(pool.submit(pass_through, gate.path)) for _ in range(2)]
        await loop.run_in_executor(None, gate.arrived, 2)
        future = pool.submit(abs, -1)
        wrapped = asyncio.wrap_future(future)
        wrapped.cancel()
        await asyncio.sleep(0)  # asyncio passes it on in the loop's next round
        with pytest.raises(asyncio.CancelledError):
            await wrapped
        assert future.cancelled()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(held[0]), 0.01)
        gate.open(2)
        await asyncio.gather(*held)

    asyncio.run(main())


# ---- by value ----------------------------------------------------------------------------------------


def test_lambda_closure_partial_and_methods(pool: Runtime) -> None:
    base = 40

    class Counter:
        def __init__(self, start: int) -> None:
            self.start = start

        def plus(self, n: int) -> int:
            return self.start + n

        def __call__(self, n: int) -> int:
            return self.start * n

    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    assert pool.submit(lambda x: x + base, 2).result() == 42
    assert pool.submit(factorial, 10).result() == 3628800
    assert pool.submit(functools.partial(tasks.add, 1, third=3), 2).result() == 6
    assert pool.submit(Counter(7).plus, 5).result() == 12
    assert pool.submit(Counter(7), 5).result() == 35
    assert pool.submit("abc".upper).result() == "ABC"
    assert type(pool.submit(tasks.echo, Counter(3)).result()).__name__ == "Counter"


def test_closure_over_a_variable_that_changes(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    n = 1
    listed = [1]

    def read() -> tuple[int, list[int]]:
        return n, listed

    futures = []
    for n in range(5):
        listed.append(n)
        futures.append(pool.submit(read))
    gate.open(2)
    assert [f.result() for f in futures] == [(i, [1, *range(i + 1)]) for i in range(5)]
    concurrent.futures.wait(held)


def test_by_value_from_main(tmp_path: Path) -> None:
    """No __main__ guard; globals of __main__ are read at submit; an initializer's global is seen."""
    out = run_script(
        tmp_path,
        """
import os, runtime

offset = 100
model = None

def load(value):
    global model
    model = {"value": value}

def predict(x):
    return model["value"] + x

def helper(x):
    return x + offset

def use(x):
    return helper(x)

class Point:
    def __init__(self, x): self.x = x
    def moved(self): return Point(self.x + 1)

class Trouble(Exception):
    pass

def fail():
    raise Trouble("mine")

with runtime.Runtime(2, initializer=load, initargs=(1000,)) as rt:
    print(rt.submit(use, 1).result())
    offset = 200
    print(rt.submit(use, 1).result())
    x = 1
    def f(): return x
    first = rt.submit(f)
    x = 2
    second = rt.submit(f)
    print(first.result(), second.result())
    print(list(rt.map(predict, range(5))))
    print([rt.submit(predict, 1).result() for _ in range(5)])
    moved = rt.submit(Point.moved, Point(4)).result()
    print(type(moved) is Point, moved.x)
    try:
        rt.submit(fail).result()
    except Trouble as error:
        print("caught", error)
    print(rt.submit(lambda: __name__).result(), rt.submit(os.getpid).result() != os.getpid())
    print(sum(rt.map(lambda v: v * offset, range(100))))
""",
    )
    assert out.splitlines() == [
        "101", "201", "1 2", "[1000, 1001, 1002, 1003, 1004]", "[1001, 1001, 1001, 1001, 1001]", "True 5",
        "caught mine", "__main__ True", str(200 * 4950),
    ]  # fmt: skip


def test_from_the_command_line_without_a_file(tmp_path: Path) -> None:
    text = "import runtime\ndef f(x): return x * 2\n"
    text += "with runtime.Runtime(1) as rt: print(rt.submit(f, 21).result())"
    done = run(["-c", text], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


# ---- what the constructor takes ----------------------------------------------------------------------


def test_worker_counts_that_no_runtime_can_have() -> None:
    for count in (0, -1):
        with pytest.raises(ValueError, match=r"^max_workers must be greater than 0$"):
            Runtime(count)
    with pytest.raises(ValueError, match=r"2,?000"):
        Runtime(10_000)
    with pytest.raises(TypeError):
        Runtime("two")  # type: ignore[arg-type]


def test_mp_context_is_ignored_with_one_warning(tmp_path: Path) -> None:
    out = run_script(
        tmp_path,
        """
import multiprocessing, warnings
import runtime

context = multiprocessing.get_context("spawn")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        with runtime.Runtime(1, mp_context=context) as rt:
            assert rt.submit(abs, -1).result() == 1
print([("mp_context" in str(w.message), w.filename == __file__) for w in seen])
""",
    )
    assert out == "[(True, True)]\n"


def test_initializer_sets_a_global(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, initializer=tasks.set_value, initargs=({"a": 1},))
    assert [rt.submit(tasks.get_value).result() for _ in range(20)] == [{"a": 1}] * 20
    assert tasks.value_of_worker == "not set"


def test_initializer_runs_once_in_each_worker(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    log = tmp_path / "log"
    rt = ready(factory(3, initializer=tasks.log_line, initargs=(str(log), "up")))
    assert sorted(rt.map(abs, range(100), chunksize=1)) == list(range(100))
    assert log.read_text() == "up\n" * 3
    victim = rt.workers()[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    until(lambda: log.read_text() == "up\n" * 4, "the replacement runs the initializer")


def test_initializer_that_raises(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, initializer=tasks.throw, initargs=(ZeroDivisionError("at start"),))
    future = submit_or_error(rt, abs, -1)
    error = future if isinstance(future, BaseException) else future.exception()
    assert isinstance(error, BrokenRuntime)
    assert isinstance(error, concurrent.futures.BrokenExecutor)
    assert "at start" in str(error) + str(error.__cause__)
    with pytest.raises(BrokenRuntime, match="at start"):
        rt.submit(abs, -1)


def submit_or_error(rt: Runtime, fn: Callable[..., Any], *args: Any) -> Any:
    """The future, or the exception of submit."""
    try:
        return rt.submit(fn, *args)
    except RuntimeError as error:
        return error
    except BrokenRuntime as error:
        return error


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module of some text that can be imported here and in workers; its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(text: str) -> str:
        name = f"preloaded_{len(list(tmp_path.glob('preloaded_*.py')))}_{os.getpid()}_{tmp_path.name}"
        name = "".join(c if c.isalnum() else "_" for c in name)
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return make


def test_preload_is_imported_once_before_workers_are_forked(
    factory: Callable[..., Runtime], module: Callable[[str], str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    name = module(f"import os\nopen({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\nPID = os.getpid()\n")
    rt = ready(factory(2, preload=name))
    seen = {
        rt.submit(lambda name: (name in sys.modules, sys.modules[name].PID), name).result() for _ in range(10)
    }
    (imported_in,) = map(int, log.read_text().split())
    assert seen == {(True, imported_in)}
    assert imported_in not in pids(rt) | {os.getpid()}
    assert name not in sys.modules


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise ValueError('not today')", "not today"),
        ("import os; os._exit(5)", "5"),
        ("import no_such_module_x", "no_such_module_x"),
    ],
    ids=["raises", "exits", "missing import"],
)
def test_preload_that_fails(
    factory: Callable[..., Runtime], module: Callable[[str], str], text: str, words: str
) -> None:
    name = module(text)
    rt = factory(2, preload=(name,))
    future = submit_or_error(rt, abs, -1)
    error = future if isinstance(future, BaseException) else future.exception()
    assert isinstance(error, BrokenRuntime)
    assert name in str(error) and words in str(error)


@pytest.mark.parametrize("share", [1, 3])
def test_max_tasks_per_child_is_exact(factory: Callable[..., Runtime], share: int) -> None:
    rt = factory(1, max_tasks_per_child=share)
    ran_in = [f.result() for f in [rt.submit(os.getpid) for _ in range(10)]]
    groups = [ran_in[i : i + share] for i in range(0, 10, share)]
    assert all(len(set(group)) == 1 for group in groups), ran_in
    assert len(set(ran_in)) == len(groups), ran_in
    until(lambda: sum(w.tasks_done for w in rt.workers()) == 10, "the count of all tasks")


def test_max_tasks_per_child_counts_items_of_a_map(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, max_tasks_per_child=7)
    ran_in = list(rt.map(lambda _: os.getpid(), range(30), chunksize=4))
    counts = [ran_in.count(pid) for pid in dict.fromkeys(ran_in)]
    assert counts == [7, 7, 7, 7, 2]
    assert rt.stats().failed == 0


def test_nested_runtime_has_one_worker(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    for workers, outer, inner, result in [f.result() for f in [rt.submit(tasks.nested) for _ in range(2)]]:
        assert workers == 1
        assert outer in pids(rt) and inner not in pids(rt) | {os.getpid()}
        assert result == 42


def test_constructor_returns_at_once_and_workers_start_by_themselves(
    factory: Callable[..., Runtime], module: Callable[[str], str], gate: Gate
) -> None:
    name = module(f"import tasks\ntasks.pass_through({gate.path!r})\n")
    rt = factory(2, preload=name)  # returns although the preload waits at the gate
    gate.arrived()
    future = rt.submit(abs, -1)
    assert not future.done() and rt.stats().workers == 0
    assert {w.status for w in rt.workers()} == {WorkerStatus.STARTING}
    gate.open()
    assert future.result() == 1
    ready(rt)


# ---- current, stats, workers -------------------------------------------------------------------------


def test_current_in_a_worker(pool: Runtime, factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    seen = [rt.submit(tasks.where).result() for _ in range(3)]
    (worker,) = rt.workers()
    assert [x[:4] for x in seen] == [(0, worker.slot, 1, 0)] * 3
    assert len({x[4] for x in seen}) == 3
    assert [x[5] for x in seen] == [1, 1, 1]
    assert [x[6] for x in seen] == [1, 2, 3]  # current().local lives as long as the worker


def test_current_elsewhere() -> None:
    with pytest.raises(RuntimeError, match="worker"):
        runtime.current()


def test_stats_add_up(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = ready(factory(2))
    held = occupied(rt, gate)
    line = [rt.submit(abs, -1) for _ in range(300)]
    failing = [rt.submit(tasks.throw_type, ValueError) for _ in range(10)]
    assert all(line.pop().cancel() for _ in range(20))
    stats = rt.stats()
    assert stats.running == 2
    assert stats.queued + stats.leased == 290
    assert (stats.done, stats.failed, stats.cancelled, stats.workers) == (0, 0, 20, 2)
    assert 0 < stats.used <= stats.reserved
    gate.open(2)
    concurrent.futures.wait([*held, *line, *failing])
    until(lambda: idle(rt))
    stats = rt.stats()
    assert (stats.queued, stats.leased, stats.running) == (0, 0, 0)
    assert (stats.done, stats.failed, stats.cancelled) == (282, 10, 20)
    assert stats.lane + stats.message >= 292  # what was leased was found, one way or the other
    assert stats.message > 0  # the first one at least woke its worker by zmq
    assert (stats.rescued, stats.pinned) == (0, 0)
    assert list(rt.map(abs, range(100))) == list(range(100))
    assert rt.stats().done == 382


def test_no_rescue_in_a_round_trip_after_another(pool: Runtime) -> None:
    before = pool.stats()
    for i in range(300):
        assert pool.submit(tasks.echo, i).result() == i
    after = pool.stats()
    assert after.done - before.done == 300
    assert after.lane + after.message > before.lane + before.message
    assert after.rescued == before.rescued


def test_workers_are_described(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    for number, worker in enumerate(pool.workers()):
        assert worker.number == number
        assert worker.status is WorkerStatus.READY
        assert worker.pid and os.path.exists(f"/proc/{worker.pid}")
        assert worker.task is not None and worker.generation == 1
        assert worker.rss and worker.rss > 1 << 20
        assert worker.started and abs(worker.started - time.time()) < 3600
    before = sum(w.tasks_done for w in pool.workers())
    gate.open(2)
    concurrent.futures.wait(held)
    assert pool.submit(abs, -1).result() == 1
    until(lambda: sum(w.tasks_done for w in pool.workers()) == before + 3)
    assert pool._max_workers == 2


# ---- references --------------------------------------------------------------------------------------


def gone(reference: weakref.ref[Any]) -> bool:
    gc.collect()
    return reference() is None


def test_no_reference_to_arguments_or_functions(pool: Runtime) -> None:
    argument = tasks.Tracked()
    seen = weakref.ref(argument)

    def local(_: Any, captured: Any = argument) -> int:
        return 5

    function = weakref.ref(local)
    future = pool.submit(local, argument)
    del argument, local
    assert future.result() == 5
    until(lambda: gone(seen) and gone(function), "the argument and the function are let go")


def test_no_reference_to_arguments_while_they_wait(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    argument = tasks.Tracked()
    seen = weakref.ref(argument)
    future = pool.submit(tasks.echo, argument)
    del argument
    assert gone(seen)  # what waits is the pickle
    gate.open(2)
    assert future.result().value is None
    concurrent.futures.wait(held)


def test_no_reference_to_results(pool: Runtime) -> None:
    future = pool.submit(tasks.Tracked, 5)
    seen = weakref.ref(future.result())
    assert not gone(seen)
    del future
    until(lambda: gone(seen), "the result is let go")


def test_no_reference_to_results_without_the_cycle_collector(pool: Runtime) -> None:
    gc.disable()
    try:
        future = pool.submit(tasks.Tracked, 5)
        result, kept = weakref.ref(future.result()), weakref.ref(future)
        failed = pool.submit(tasks.throw_type, ValueError)
        error = failed.exception()
        assert isinstance(error, ValueError)
        lost = weakref.ref(failed)
        del future, failed, error
        until(
            lambda: result() is None and kept() is None and lost() is None,
            "futures and results are let go",
            seconds=3.0,
        )
    finally:
        gc.enable()


def test_no_reference_to_results_in_the_worker(pool: Runtime) -> None:
    def count() -> int:
        gc.collect()
        return sum(type(x).__name__ == "Tracked" for x in gc.get_objects())

    for _ in range(20):
        pool.submit(tasks.echo, tasks.Tracked("x" * 100)).result()
    assert max(pool.submit(count).result() for _ in range(20)) <= 1


# ---- options -----------------------------------------------------------------------------------------


def test_larger_priorities_go_first(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1)
    held = rt.submit(pass_through, gate.path)
    gate.arrived()
    filler = [rt.submit(tasks.tick, "filler") for _ in range(300)]  # more than can be leased ahead
    low, high, higher = (rt.options(priority=p) for p in (-1, 5, 2**31 - 1))
    waiting = []
    for i in range(3):
        for name, view in (("low", low), ("high", high), ("higher", higher)):
            waiting.append(view.submit(tasks.tick, (name, i)))
    gate.open()
    held.result()
    order = sorted(f.result() for f in waiting)
    assert [value for _, _, value in order] == [(n, i) for n in ("higher", "high", "low") for i in range(3)]
    at = {value: when for _, when, value in order}
    assert at["high", 2] < max(f.result()[1] for f in filler) < at["low", 0]


def test_timeout_kills_and_replaces(factory: Callable[..., Runtime]) -> None:
    rt = ready(factory(2))
    before = pids(rt)
    start = time.monotonic()
    future = rt.options(timeout=0.2).submit(tasks.hang)
    error = future.exception()
    took = time.monotonic() - start
    assert isinstance(error, TaskTimeout) and isinstance(error, TimeoutError)
    assert "0.2" in str(error)
    assert 0.2 <= took < 0.2 + 10 * 0.1
    assert not future.running() and future.done() and not future.cancelled()
    until(lambda: len(before & pids(rt)) == 1, "the worker that hung is gone")
    assert len(pids(ready(rt))) == 2
    assert rt.stats().failed == 1


def test_timeout_of_code_that_holds_the_gil(factory: Callable[..., Runtime]) -> None:
    rt = ready(factory(1))
    start = time.monotonic()
    assert isinstance(rt.options(timeout=0.2).submit(tasks.hang_in_c).exception(), TaskTimeout)
    assert time.monotonic() - start < 0.2 + 10 * 0.1
    assert rt.submit(abs, -1).result() == 1


def test_timeout_is_not_the_users_timeout_error(pool: Runtime) -> None:
    error = pool.options(timeout=20).submit(tasks.throw, TimeoutError("mine")).exception()
    assert type(error) is TimeoutError


def test_timeout_counts_from_the_claim(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = ready(factory(1))
    held = rt.submit(pass_through, gate.path)
    gate.arrived()
    waiting = [rt.options(timeout=0.3).submit(abs, -1) for _ in range(200)]
    time.sleep(0.5)  # the point: time goes by while they wait
    gate.open()
    assert [f.result() for f in waiting] == [1] * 200
    held.result()


def test_only_the_task_that_hangs_is_killed(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    view = rt.options(timeout=0.2)
    futures = [
        rt.submit(tasks.echo, 0),
        view.submit(tasks.hang),
        *(view.submit(tasks.echo, i) for i in range(100)),
    ]
    assert futures[0].result() == 0
    assert isinstance(futures[1].exception(), TaskTimeout)
    assert [f.result() for f in futures[2:]] == list(range(100))


def test_options_inherit_or_override(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1, timeout=0.2, retries=1)
    assert isinstance(rt.submit(tasks.hang).exception(), TaskTimeout)
    assert isinstance(rt.options(priority=3).submit(tasks.hang).exception(), TaskTimeout)
    assert rt.options(priority=3).submit(tasks.die_until, 2).result() == 2
    assert isinstance(rt.options(retries=0).submit(tasks.die_until, 2).exception(), WorkerDied)
    unlimited = rt.options(timeout=None).submit(pass_through, gate.path, "done")
    gate.arrived()
    time.sleep(0.4)  # the point: longer than the runtime's own timeout
    assert unlimited.running()
    gate.open()
    assert unlimited.result() == "done"


def test_options_are_checked(pool: Runtime) -> None:
    for wrong in ({"timeout": 0}, {"timeout": -1}, {"retries": -1}, {"timeout": float("nan")}):
        with pytest.raises(ValueError):
            pool.options(**wrong)
    for wrong in ({"timeout": "1"}, {"retries": 1.5}, {"retry_on": "ValueError"}, {"priority": "high"}):
        with pytest.raises(TypeError):
            pool.options(**wrong)


def test_options_view_is_an_executor(pool: Runtime) -> None:
    view = pool.options(timeout=20)
    assert isinstance(view, concurrent.futures.Executor)
    assert view._max_workers == 2
    assert list(view.map(abs, [-1, -2])) == [1, 2]
    assert sorted(view.map_unordered(abs, [-1, -2])) == [1, 2]
    with view:
        pass
    assert view.submit(abs, -1).result() == 1  # the Runtime is its owner's to shut down
    assert asyncio.run(run_in(view)) == 1


async def run_in(executor: concurrent.futures.Executor) -> int:
    return await asyncio.get_running_loop().run_in_executor(executor, abs, -1)


def test_retries_after_the_worker_died(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, retries=2)
    assert rt.submit(tasks.die_until, 3).result() == 3
    error = rt.submit(tasks.die_until, 99).exception()
    assert isinstance(error, WorkerDied)
    assert error.attempts == 3
    assert isinstance(rt.submit(tasks.throw_type, ValueError).exception(), ValueError)  # not retried
    assert rt.stats().failed == 2


def test_retry_on(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    view = rt.options(retries=2, retry_on=(ValueError, KeyError))
    assert view.submit(tasks.fail_until, 3, ValueError).result() == 3
    assert str(view.submit(tasks.fail_until, 99, UnicodeError).exception()) == "attempt 3"
    assert str(view.submit(tasks.fail_until, 99, OSError).exception()) == "attempt 1"
    assert view.submit(tasks.die_until, 2).result() == 2
    assert rt.stats().rescued == 0


def test_retry_on_a_timeout(factory: Callable[..., Runtime]) -> None:
    view = factory(1).options(timeout=0.2, retries=1, retry_on=TaskTimeout)
    assert view.submit(tasks.hang_until, 2).result() == 2


def test_a_timeout_is_not_retried_unasked(factory: Callable[..., Runtime]) -> None:
    view = factory(1).options(timeout=0.2, retries=5)
    assert isinstance(view.submit(tasks.hang_until, 2).exception(), TaskTimeout)


# ---- deaths ------------------------------------------------------------------------------------------


def test_worker_that_dies_fails_only_what_it_ran(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = ready(factory(1))
    pid = rt.workers()[0].pid
    held = rt.submit(pass_through, gate.path)
    gate.arrived()
    behind = [rt.submit(tasks.echo, i) for i in range(300)]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    error = held.exception()
    assert isinstance(error, WorkerDied)
    assert (error.pid, error.number, error.signal, error.exitcode, error.attempts) == (
        pid,
        0,
        signal.SIGKILL,
        None,
        1,
    )
    assert error.reason and str(pid) in str(error)
    assert pickle.loads(pickle.dumps(error)).args == error.args
    assert [f.result() for f in behind] == list(range(300))
    assert pids(rt) & {pid} == set()
    stats = rt.stats()
    assert (stats.done, stats.failed, stats.rescued) == (300, 1, 0)


def test_exit_code_of_a_worker_that_exits(factory: Callable[..., Runtime]) -> None:
    error = factory(1).submit(os._exit, 17).exception()
    assert isinstance(error, WorkerDied)
    assert (error.exitcode, error.signal) == (17, None)


# ---- cancelling what runs ----------------------------------------------------------------------------


def test_cancel_running(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = ready(factory(1))
    before = pids(rt)
    held = rt.submit(pass_through, gate.path)
    gate.arrived()
    behind = [rt.submit(tasks.echo, i) for i in range(100)]
    assert not rt.cancel(held)
    assert held.running()
    assert rt.cancel(held, running=True)
    error = held.exception()
    assert isinstance(error, TaskCancelled) and isinstance(error, CancelledError)
    assert str(error)
    assert [f.result() for f in behind] == list(range(100))
    assert not before & pids(rt)
    assert not rt.cancel(held, running=True) and not rt.cancel(behind[0], running=True)


def test_cancel_running_takes_back_what_waits(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    waiting = pool.submit(abs, -1)
    assert pool.cancel(waiting, running=True)
    assert waiting.cancelled()
    gate.open(2)
    concurrent.futures.wait(held)


def test_a_call_that_could_not_be_pickled_is_over(pool: Runtime) -> None:
    """It is of this runtime all the same: there is nothing to cancel."""
    future = pool.submit(tasks.echo, threading.Lock())
    assert isinstance(future.exception(), TypeError)
    assert not pool.cancel(future) and not pool.cancel(future, running=True) and not future.cancel()


def test_cancel_is_for_its_own_futures(pool: Runtime, factory: Callable[..., Runtime]) -> None:
    other = factory(1).submit(abs, -1)
    for future in (other, concurrent.futures.Future()):
        with pytest.raises(ValueError, match="not of this runtime"):
            pool.cancel(future)
    assert other.result() == 1


# ---- the end -----------------------------------------------------------------------------------------


def test_submit_after_shutdown(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    view = rt.options(priority=1)
    rt.shutdown()
    for call in (
        lambda: rt.submit(abs, -1), lambda: rt.map(abs, [1]), lambda: rt.map_unordered(abs, [1]),
        lambda: view.submit(abs, -1),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            call()


def test_shutdown_is_idempotent(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    futures = [rt.submit(tasks.echo, i) for i in range(300)]
    rt.shutdown()
    assert all(f.done() for f in futures)
    assert [f.result() for f in futures] == list(range(300))
    for wait in (True, False):
        for cancel in (True, False):
            rt.shutdown(wait=wait, cancel_futures=cancel)
    rt.kill_workers()
    assert [f.result() for f in futures] == list(range(300))


def test_shutdown_before_any_worker_is_ready(factory: Callable[..., Runtime]) -> None:
    factory(2).shutdown()
    rt = factory(2)
    future = rt.submit(abs, -1)
    rt.shutdown()
    assert future.result(timeout=0) == 1


def test_shutdown_from_many_threads(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    futures = [rt.submit(tasks.echo, i) for i in range(100)]
    with ThreadPoolExecutor(8) as threads:
        concurrent.futures.wait([threads.submit(rt.shutdown) for _ in range(8)])
    assert [f.result(timeout=0) for f in futures] == list(range(100))


def test_shutdown_without_waiting(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1)
    held = rt.submit(pass_through, gate.path, "held")
    gate.arrived()
    behind = [rt.submit(tasks.echo, i) for i in range(100)]
    rt.shutdown(wait=False)
    assert not held.done()
    with pytest.raises(RuntimeError):
        rt.submit(abs, -1)
    gate.open()
    assert held.result() == "held"
    assert [f.result() for f in behind] == list(range(100))
    rt.shutdown()


def test_shutdown_that_cancels(factory: Callable[..., Runtime], gate: Gate, tmp_path: Path) -> None:
    rt = factory(1)
    log = tmp_path / "log"
    log.touch()
    held = rt.submit(pass_through, gate.path, "held")
    gate.arrived()
    behind = [rt.submit(tasks.log_line, str(log), i) for i in range(300)]
    rt.shutdown(wait=False, cancel_futures=True)
    assert (
        concurrent.futures.wait(behind).not_done == set()
    )  # the collector cancels them, as the stdlib's does
    assert all(f.cancelled() for f in behind)
    gate.open()
    rt.shutdown(wait=True)
    assert held.result(timeout=0) == "held"
    assert log.read_text() == ""


def test_leaving_the_with_block_waits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Runtime(2) as rt:
        for i in range(100):
            rt.submit(tasks.log_line, str(log), i)
    assert sorted(map(int, log.read_text().split())) == list(range(100))
    assert "shut down" in repr(rt)


def test_shutdown_in_a_callback(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    done = threading.Event()

    def stop(_: Any) -> None:
        rt.shutdown(wait=True)  # in the collector: it cannot wait for itself
        done.set()

    future = rt.submit(abs, -1)
    future.add_done_callback(stop)
    assert done.wait(tasks.PATIENCE)
    rt.shutdown()


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_ending_by_force(factory: Callable[..., Runtime], gate: Gate, how: str) -> None:
    rt = factory(2)
    finished = rt.submit(abs, -1)
    assert finished.result() == 1
    held = occupied(rt, gate)
    behind = [rt.submit(abs, -1) for _ in range(200)]
    getattr(rt, how)()
    for future in (*held, *behind):
        error = future.exception(timeout=10)
        assert isinstance(error, BrokenRuntime)
        assert how in str(error)
    assert finished.result() == 1
    with pytest.raises((RuntimeError, BrokenRuntime)):
        rt.submit(abs, -1)


def test_garbage_collection_finishes_what_is_pending(gate: Gate) -> None:
    rt = Runtime(1)
    held = rt.submit(pass_through, gate.path, "held")
    gate.arrived()
    behind = [rt.submit(tasks.echo, i) for i in range(100)]
    seen = weakref.ref(rt)
    del rt
    until(lambda: gone(seen), "the Runtime is let go although tasks are pending")
    assert not held.done()
    gate.open()
    assert held.result() == "held"
    assert [f.result() for f in behind] == list(range(100))
    # The leftover fixture sees that its processes and threads end by themselves.


def test_end_of_the_interpreter_finishes_what_is_pending(tmp_path: Path) -> None:
    run_script(
        tmp_path,
        """
import pathlib, runtime
def write(i):
    with open("log", "a") as file:
        file.write(f"{i}\\n")
rt = runtime.Runtime(2)
futures = [rt.submit(write, i) for i in range(300)]
other = runtime.Runtime(1)
other.submit(write, 300)
""",
    )
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(301))


def test_end_of_the_interpreter_by_an_exception(tmp_path: Path) -> None:
    run_script(
        tmp_path,
        "import runtime\n"
        "rt = runtime.Runtime(2)\n"
        "futures = [rt.submit(lambda i: open('log', 'a').write(f'{i}\\n'), i) for i in range(50)]\n"
        "raise SystemExit(4)\n",
        code=4,
    )
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(50))


def test_submit_while_the_interpreter_ends(tmp_path: Path) -> None:
    out = run_script(
        tmp_path,
        """
import atexit, runtime
rt = runtime.Runtime(1)
def late():
    try:
        rt.submit(abs, -1)
    except RuntimeError as error:
        print(error)
atexit.register(late)
print(rt.submit(abs, -1).result())
""",
    )
    assert out == "1\ncannot schedule new futures after interpreter shutdown\n"


def test_fork_of_the_host_is_inert(factory: Callable[..., Runtime]) -> None:
    rt = ready(factory(1))
    future = rt.submit(abs, -1)
    assert future.result() == 1
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks with threads
        pid = os.fork()
    if not pid:
        try:
            rt.submit(abs, -1)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        finally:
            rt.shutdown()
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    assert str(pid) in text and str(os.getpid()) in text
    assert rt.submit(abs, -2).result() == 2


# ---- Ctrl-C ------------------------------------------------------------------------------------------


INTERRUPTED = """
import sys, time, runtime
def main():
    rt = runtime.Runtime(2)
    rt.submit(abs, -1).result()
    future = rt.submit(time.sleep, 1000)
    while not future.running():
        time.sleep(0.001)
    try:
        print("running", flush=True)
        {wait}
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    {then}
    print(future.running(), flush=True)
    {end}
main()
"""


def interrupt(folder: Path, text: str, *, group: bool = False) -> tuple[int, str, str, float]:
    """Run a script, send SIGINT when it says "running": (exit code, stdout, stderr, seconds to its end)."""
    path = folder / "script.py"
    path.write_text(text)
    with subprocess.Popen(
        [sys.executable, str(path)], cwd=folder, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "running\n"
            start = time.monotonic()
            (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=40)
        except BaseException:
            process.kill()
            raise
        return process.returncode, out, err, time.monotonic() - start


@pytest.mark.parametrize("group", [False, True], ids=["the host", "the whole group"])
@pytest.mark.parametrize(
    "wait", ["future.result()", "list(rt.map(time.sleep, [1000]))"], ids=["result", "map"]
)
def test_ctrl_c_interrupts_what_waits(tmp_path: Path, group: bool, wait: str) -> None:
    # With map both workers may sleep by then.
    then = "print(rt.submit(abs, -7).result(), flush=True)" if "result" in wait else "pass"
    text = INTERRUPTED.format(wait=wait, then=then, end="rt.kill_workers()")
    code, out, err, _ = interrupt(tmp_path, text, group=group)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines == ["interrupted", *(["7"] if "result" in wait else []), "True"]  # True: workers let it pass


def test_ctrl_c_that_nobody_catches(tmp_path: Path) -> None:
    text = """
import time, runtime
rt = runtime.Runtime(2)
future = rt.submit(time.sleep, 0.5)
while not future.running():
    time.sleep(0.001)
print("running", flush=True)
future.result()
"""
    code, _, err, took = interrupt(tmp_path, text, group=True)
    assert code == -signal.SIGINT
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
    assert took < 10 * 2.0


# ---- found in review ---------------------------------------------------------------------------------


def test_cancel_of_running_code_is_final_whatever_retry_on_says(
    factory: Callable[..., Runtime], gate: Gate
) -> None:
    rt = factory(2, retries=5, retry_on=Exception)
    held = rt.submit(pass_through, gate.path)
    gate.arrived()
    assert rt.cancel(held, running=True)
    with pytest.raises(TaskCancelled):
        held.result()
    until(lambda: idle(rt), "idle")
    assert [f.result() for f in [rt.submit(abs, -i) for i in range(300)]] == list(range(300))
    assert rt.stats().leased == rt.stats().running == 0


def test_a_dead_proxy_in_a_worker_is_no_harm(factory: Callable[..., Runtime]) -> None:
    """Looking for the children that a task made must not touch objects of the user's."""
    rt = factory(1)
    pid = rt.submit(tasks.leave_a_dead_proxy_and_a_zombie).result()
    assert {rt.submit(os.getpid).result() for _ in range(20)} == {pid}
