"""Lanes: who looks at the outboxes, who sleeps, what a thread does for itself; and the compiled loops.

What only a bad moment would show is brought about: the collector is kept busy by a callback, so that the
thread under test is the one that takes its result in; Ctrl-C comes at each bytecode in turn.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import evil
import numpy as np
import pytest
import tasks
from tasks import Gate
from watching import pids, ready, settled, until

from runtime import BrokenRuntime, Runtime, RuntimeFailure, TaskTimeout, config
from runtime._core import Span

pytestmark = pytest.mark.skipif(not config.lanes()[1], reason="nobody watches the memory on one CPU")

Factory = Callable[..., Runtime]


@contextlib.contextmanager
def collector_busy(rt: Runtime, gate: Gate) -> Iterator[threading.Event]:
    """The collector is in a callback until this ends, or the event is set."""
    came, go = threading.Event(), threading.Event()

    def stay(_: object) -> None:
        came.set()
        go.wait(tasks.PATIENCE)

    rt.submit(tasks.pass_through, gate.path).add_done_callback(stay)
    gate.open()
    assert came.wait(tasks.PATIENCE)
    try:
        yield go
    finally:
        go.set()


def ran(rt: Runtime) -> int:
    """Tasks that the workers have run."""
    return sum(worker.tasks_done for worker in rt.workers())


def run_unseen(rt: Runtime, fn: Callable[..., Any], *args: Any) -> Any:
    """The future of a call whose result lies in the outbox. While the collector is busy."""
    before = ran(rt)
    future = rt.submit(fn, *args)
    until(lambda: ran(rt) > before, "the call has been run")
    return future


def interrupted(at: int, call: Callable[[], object]) -> bool:
    """Call, with KeyboardInterrupt before bytecode number `at` of the package. False: it has ended before."""
    left = at

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if "/runtime/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left < 0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, factory: Factory) -> Runtime:
    """A Runtime with one worker, whose threads look at the memory for long enough to find what is there."""
    monkeypatch.setenv("RUNTIME_SPIN", "100000")
    rt = ready(factory(1))
    for fn in (tasks.echo, tasks.knocker):
        rt.submit(fn, 0).result()
    return rt


# ---- a thread that takes its own result in ---------------------------------------------------------


def test_interrupt_at_each_bytecode_of_result(patient: Runtime, gate: Gate) -> None:
    futures = []
    with collector_busy(patient, gate):
        for at in range(1000):
            futures.append(run_unseen(patient, tasks.echo, {at}))  # a set is not plain
            if not interrupted(at, lambda: futures[-1].result(tasks.PATIENCE)):
                break
        else:
            pytest.fail("result() takes too many bytecodes")
    assert at > 20
    assert [future.result(tasks.PATIENCE) for future in futures] == [{i} for i in range(at + 1)]
    settled(patient)


def test_interrupt_while_a_result_is_unpickled(
    patient: Runtime, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        monkeypatch.setattr(tasks, "on_knock", None)
        raise KeyboardInterrupt

    with collector_busy(patient, gate):
        future = run_unseen(patient, tasks.knocker)
        monkeypatch.setattr(tasks, "on_knock", interrupt)
        with pytest.raises(KeyboardInterrupt):
            future.result()
        assert not future.done()
        assert future.result() == "come"
    settled(patient)


def test_callbacks_run_in_the_collector(
    patient: Runtime, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is added while another thread unpickles the result."""
    threads: list[str] = []
    with collector_busy(patient, gate):
        future = run_unseen(patient, tasks.knocker)

        def add() -> None:
            monkeypatch.setattr(tasks, "on_knock", None)
            future.add_done_callback(lambda _: threads.append(threading.current_thread().name))

        monkeypatch.setattr(tasks, "on_knock", add)
        with pytest.raises(TimeoutError):
            future.result(0.05)
    assert future.result(tasks.PATIENCE) == "come"
    until(lambda: threads == ["runtime-collector"], lambda: f"the callback has run: {threads}")
    settled(patient)


def test_the_runtime_ends_while_a_result_is_unpickled(
    patient: Runtime, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector_busy(patient, gate) as go:
        future = run_unseen(patient, tasks.knocker)

        def end() -> None:
            monkeypatch.setattr(tasks, "on_knock", None)
            future.add_done_callback(lambda _: None)  # so that this thread may not set it
            go.set()
            ender = threading.Thread(target=patient.kill_workers)
            ender.start()
            ender.join(tasks.PATIENCE)

        monkeypatch.setattr(tasks, "on_knock", end)
        assert future.result(tasks.PATIENCE) == "come"


def test_an_error_that_a_thread_finds_itself(patient: Runtime, gate: Gate) -> None:
    with collector_busy(patient, gate) as go:
        future = run_unseen(patient, tasks.throw, KeyError("gone"))
        threading.Timer(0.1, go.set).start()
        with pytest.raises(KeyError, match="gone"):
            future.result(tasks.PATIENCE)
    settled(patient)


# ---- a destructor in the middle of the dispatcher ----------------------------------------------------


def test_the_runtime_ends_inside_the_dispatcher(patient: Runtime, gate: Gate) -> None:
    """A weak reference's callback, run as a dropped future goes, lets another thread end everything."""
    with collector_busy(patient, gate) as go:
        dropped = run_unseen(patient, tasks.echo, 1)
        called = []

        def end(_: object) -> None:
            go.set()
            ender = threading.Thread(target=patient.kill_workers)
            ender.start()
            ender.join(tasks.PATIENCE)
            called.append(ender.is_alive())

        watch = weakref.ref(dropped, end)
        del dropped
        with contextlib.suppress(BrokenRuntime):
            patient.submit(tasks.echo, 2).result(tasks.PATIENCE)
    assert called == [False] and watch() is None
    settled(patient)


# ---- whoever sleeps is told ----------------------------------------------------------------------------


def test_nobody_sleeps_over_outcomes(patient: Runtime, gate: Gate) -> None:
    """What another thread took in between the collector's look at the outcomes and its sleep."""
    dispatcher = patient._core.dispatcher
    with collector_busy(patient, gate):
        future = run_unseen(patient, tasks.echo, {1})
        assert dispatcher.unread()
        dispatcher.drain_everything()
        assert dispatcher.has_outcomes and not dispatcher.unread()
        assert not dispatcher.park()
    assert future.result(tasks.PATIENCE) == {1}


# ---- the compiled loops --------------------------------------------------------------------------------


def test_function_that_cannot_be_loaded_in_a_chunk(pool: Runtime, tmp_path: Path) -> None:
    bad = evil.AtUnpickling("raise", str(tmp_path / "pids"), os.getpid())
    outcomes = list(pool.map(lambda x: (x, bad), range(20), chunksize=5, return_exceptions=True))
    assert [type(outcome) for outcome in outcomes] == [evil.Refused] * 20


BIG = 256 << 20


@pytest.mark.parametrize("by_map", [False, True])
def test_plain_result_needs_no_memory_for_its_pickle(rt: Runtime, by_map: bool) -> None:
    if by_map:
        (result,) = rt.map(tasks.none_left, [BIG])
    else:
        result = rt.submit(tasks.none_left, BIG).result(tasks.PATIENCE)
    assert result == bytes(BIG)


def test_plain_result_without_memory_in_a_call_of_a_known_function(factory: Factory) -> None:
    rt = ready(factory(1))
    before = pids(rt)
    rt.submit(tasks.none_left, 0, BIG).result(tasks.PATIENCE)  # now the worker has the function
    assert rt.submit(tasks.none_left, BIG).result(tasks.PATIENCE) == bytes(BIG)
    assert pids(rt) == before


def test_plain_argument_needs_no_memory_for_its_pickle(pool: Runtime) -> None:
    assert pool.submit(len, b"").result() == 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    argument = tasks.none_left(BIG)
    try:
        future = pool.submit(len, argument)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert future.result() == BIG


def test_large_integers_do_not_share_one_pickle() -> None:
    for bits in (1, 62, 63, 64, 10_000, 1_000_000):
        span = Span.pack(0, [1 << bits] * 1000, 0, False)
        other = Span.pack(0, [-(1 << bits)] * 1000, 0, False)
        if span is None or other is None:  # so large that each travels by itself
            assert span is other is None and bits == 1_000_000
            continue
        assert span.count == 1 or span.nbytes < 40_000
        assert other.nbytes < max(40_000, span.nbytes + 10)


def test_destructor_of_an_argument_runs_within_the_timeout(factory: Factory) -> None:
    rt = ready(factory(1, timeout=0.5))
    rt.submit(tasks.own_pid).result()
    with pytest.raises(TaskTimeout):
        rt.submit(tasks.own_pid, tasks.HangsWhenDropped()).result(tasks.PATIENCE)
    rt.submit(tasks.own_pid).result(tasks.PATIENCE)


def test_function_whose_globals_cannot_be_moved_back(factory: Factory) -> None:
    rt = ready(factory(1))

    def fn() -> float:
        return tasks.PATIENCE + BIG

    assert rt.submit(fn).result() == tasks.PATIENCE + BIG
    before = pids(rt)
    rt.submit(tasks.break_relinking).result()
    with pytest.raises(KeyError, match="broken"):
        rt.submit(fn).result(tasks.PATIENCE)
    assert pids(rt) == before


# ---- a worker that runs wild ---------------------------------------------------------------------------

EXIT = b"csys\nexit\n(tR."


@pytest.mark.parametrize("data", [b"", b"?", b"(\xff\xff\xff\x7f", b"i\1\0", b"[\5\0\0\0N", b"R\x09\0\0\0"])
def test_plain_result_that_is_damaged(factory: Factory, data: bytes) -> None:
    rt = ready(factory(1))
    rt.submit(tasks.echo, 0).result()
    rt.submit(tasks.write_as_plain, data).exception(tasks.PATIENCE)
    for _ in range(3):
        future = rt.submit(tasks.echo, 1j)
        until(future.done, "the call has ended")  # nobody waits on its lock: it is looked at in the harvest
        assert isinstance(future.exception(), ValueError | EOFError | TypeError | MemoryError)
    settled(rt)


@pytest.mark.parametrize("pickle", [EXIT, b"", b"N.", b"].", b"X\x28\0\0\0" + b"x" * 40 + b".", b"}."])
def test_list_of_results_that_is_none(factory: Factory, pickle: bytes) -> None:
    rt = ready(factory(1))
    rt.submit(tasks.write_as_list, pickle).exception(tasks.PATIENCE)
    outcomes = list(rt.map(str, range(40), chunksize=40, return_exceptions=True))
    assert [type(outcome) for outcome in outcomes] == [RuntimeFailure] * 40
    settled(rt)


def test_chunk_that_ends_without_an_item_run(factory: Factory) -> None:
    rt = ready(factory(1))
    rt.submit(tasks.deliver_nothing).exception(tasks.PATIENCE)
    outcomes = list(rt.map(tasks.echo, range(40), chunksize=1, return_exceptions=True))
    assert [type(outcome) for outcome in outcomes] == [RuntimeFailure] * 40
    settled(rt)


# ---- endings -------------------------------------------------------------------------------------------


def test_call_that_was_placed_and_refused_leaves_no_block(factory: Factory) -> None:
    rt = ready(factory(1))
    rt._core.dispatcher.close()  # as if it had ended between the look at that and the call
    gc.collect()
    gc.disable()
    try:
        before = rt.stats().used
        with pytest.raises(RuntimeError):
            rt.submit(len, np.zeros(20_000))
        assert rt.stats().used == before
    finally:
        gc.enable()


def test_cancel_of_a_call_that_ends_meanwhile(rt: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    future = rt.submit(tasks.echo, 1)
    still = future._task
    assert future.result() == 1
    future._task = still
    states = iter([False, False, True])

    def done() -> bool:
        future._task = None
        return next(states)

    monkeypatch.setattr(future, "cancel", lambda: False)
    monkeypatch.setattr(future, "done", done)
    assert not rt.cancel(future, running=True)
