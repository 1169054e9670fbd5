"""Lanes: who looks at the outboxes, who sleeps, what a thread does for itself; and the compiled loops.

What only a bad moment would show is brought about: the collector is kept busy by a callback, so that the
thread under test is the one that takes its result in; Ctrl-C comes at each bytecode in turn.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import tasks
from tasks import Gate
from watching import ready, settled, until

from runtime import BrokenRuntime, Runtime, config

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
