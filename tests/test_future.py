"""A Future is one of the stdlib's in all that user code can see: what CPython's own tests leave out.

Those are run by test_stdlib_executor.py. Here are futures of a Runtime, and futures made by hand, which
`runtime.Future()` allows as the stdlib does: subclasses, waiters, callbacks, references, asyncio, Ctrl-C.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import logging
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    InvalidStateError,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from pathlib import Path
from typing import Any

import pytest
import tasks
from tasks import PATIENCE, Gate, pass_through
from watching import all_ready, fields, host, send, until

from runtime import Future, Runtime

StdlibFuture = concurrent.futures.Future


@pytest.fixture(scope="module")
def shared() -> Iterator[Runtime]:
    with Runtime(2) as rt:
        all_ready(rt)
        yield rt


@pytest.fixture
def pool(shared: Runtime) -> Iterator[Runtime]:
    """Two workers; the test must leave them idle."""
    yield shared
    until(lambda: not busy(shared), f"idle: {shared.stats()}")


def busy(rt: Runtime) -> int:
    stats = rt.stats()
    return stats.queued + stats.leased + stats.running


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only counted references free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def occupied(rt: Runtime, gate: Gate) -> list[Future[Any]]:
    """Both workers wait at the gate, for these."""
    held = [rt.submit(pass_through, gate.path, i) for i in range(2)]
    gate.arrived(2)
    return held


def together(count: int, function: Callable[[int], Any]) -> list[Any]:
    """function(0), function(1), … from as many threads, which start at the same moment."""
    barrier = threading.Barrier(count)

    def run(number: int) -> Any:
        barrier.wait(PATIENCE)
        return function(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def blocked(count: int, function: Callable[[int], Any]) -> tuple[ThreadPoolExecutor, list[StdlibFuture[Any]]]:
    """The same, without waiting for it."""
    threads = ThreadPoolExecutor(count)
    return threads, [threads.submit(function, i) for i in range(count)]


def gone(ref: weakref.ref[Any]) -> None:
    """What it refers to is freed; a thread that has just set a future may still be in that call."""
    until(lambda: ref() is None, "it is freed")


class Waiter:
    """What wait() and as_completed() put into `_waiters`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, StdlibFuture[Any]]] = []
        self.called = threading.Event()

    def add_result(self, future: StdlibFuture[Any]) -> None:
        self._add("result", future)

    def add_exception(self, future: StdlibFuture[Any]) -> None:
        self._add("exception", future)

    def add_cancelled(self, future: StdlibFuture[Any]) -> None:
        self._add("cancelled", future)

    def _add(self, what: str, future: StdlibFuture[Any]) -> None:
        self.calls.append((what, future))
        self.called.set()


def install(future: Future[Any]) -> Waiter:
    waiter = Waiter()
    with future._condition:
        future._waiters.append(waiter)  # type: ignore[arg-type]
    return waiter


# ---- what it is --------------------------------------------------------------------------------------


def test_it_is_a_future_of_the_stdlib(pool: Runtime) -> None:
    for future in (pool.submit(abs, -1), pool.options(priority=1).submit(abs, -1), Future()):
        assert type(future) is Future
        assert isinstance(future, StdlibFuture)
        assert hash(future) == hash(future) and future == future != Future()
    assert Future[int].__origin__ is Future  # type: ignore[attr-defined]


def test_repr_names_the_class_and_what_came(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    waiting = pool.submit(abs, -1)
    assert f"<Future at {id(waiting):#x} state=pending>" == repr(waiting)
    waiting.cancel()
    assert repr(waiting).endswith("state=cancelled>")
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]
    assert repr(held[0]).endswith("state=finished returned int>")
    failed = pool.submit(tasks.throw_type, KeyError)
    failed.exception()
    assert repr(failed).endswith("state=finished raised KeyError>")


@pytest.mark.parametrize(
    "refused",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda f, p=p: pickle.dumps(f, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
    ids=["copy", "deepcopy", *(f"pickle {p}" for p in range(pickle.HIGHEST_PROTOCOL + 1))],
)
def test_it_is_neither_copied_nor_pickled(refused: Callable[[Any], Any], pool: Runtime) -> None:
    done = pool.submit(abs, -1)
    done.result()
    cancelled: Future[Any] = Future()
    cancelled.cancel()
    for future in (Future(), done, cancelled):
        with pytest.raises(TypeError, match="Future"):
            refused(future)
    assert done.result() == 1


def test_a_future_as_an_argument_fails_only_its_task(pool: Runtime) -> None:
    inner = pool.submit(abs, -1)
    assert isinstance(pool.submit(tasks.echo, inner).exception(), TypeError)
    assert inner.result() == 1


class Named(Future[Any]):
    """A subclass with a field, and a hand in the completion."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.invoked = 0

    def _invoke_callbacks(self) -> None:
        self.invoked += 1
        super()._invoke_callbacks()  # type: ignore[misc]


def test_subclasses() -> None:
    one, two, three = Named("one"), Named("two"), Named("three")
    seen: list[Any] = []
    for future in (one, two, three):
        future.add_done_callback(seen.append)
        assert repr(future) == f"<Named at {id(future):#x} state=pending>"
    one.set_result(1)
    two.set_exception(KeyError("two"))
    assert three.cancel() and not three.set_running_or_notify_cancel()
    assert seen == [one, two, three]
    assert [f.invoked for f in seen] == [1, 1, 1]
    assert [f.name for f in seen] == ["one", "two", "three"]
    assert wait(seen, timeout=0).done == {one, two, three}
    with pytest.raises(TypeError):
        copy.copy(one)


# ---- made by hand ------------------------------------------------------------------------------------


def test_by_hand_to_a_result() -> None:
    future: Future[int] = Future()
    waiter = install(future)
    assert (future.running(), future.done(), future.cancelled()) == (False, False, False)
    assert future.set_running_or_notify_cancel()
    assert (future.running(), future.done(), future.cancelled()) == (True, False, False)
    assert not future.cancel()
    future.set_result(5)
    assert (future.running(), future.done(), future.cancelled()) == (False, True, False)
    assert (future.result(), future.result(0), future.exception(), future.cancel()) == (5, 5, None, False)
    assert waiter.calls == [("result", future)]


def test_by_hand_to_an_exception() -> None:
    future: Future[int] = Future()
    waiter = install(future)
    error = KeyError("by hand")
    future.set_exception(error)
    assert future.exception() is future.exception(timeout=0) is error
    for _ in range(2):
        with pytest.raises(KeyError) as raised:
            future.result()
        assert raised.value is error
    assert not future.cancel() and not future.running() and future.done()
    assert waiter.calls == [("exception", future)]


def test_by_hand_to_a_cancellation() -> None:
    future: Future[int] = Future()
    waiter = install(future)
    assert future.cancel() and future.cancel()
    assert (future.running(), future.done(), future.cancelled()) == (False, True, True)
    assert waiter.calls == []  # wait() goes on when the executor has taken notice, not before
    assert wait([future], timeout=0).not_done == {future}
    assert not future.set_running_or_notify_cancel()
    assert waiter.calls == [("cancelled", future)]
    assert wait([future], timeout=0).done == {future}
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    with pytest.raises(CancelledError):
        future.exception()


def test_set_running_or_notify_cancel_is_for_once(caplog: pytest.LogCaptureFixture) -> None:
    running: Future[int] = Future()
    cancelled: Future[int] = Future()
    finished: Future[int] = Future()
    assert running.set_running_or_notify_cancel()
    assert cancelled.cancel() and not cancelled.set_running_or_notify_cancel()
    finished.set_result(1)
    for future in (running, cancelled, finished):
        caplog.clear()
        with pytest.raises(RuntimeError, match="unexpected state"):
            future.set_running_or_notify_cancel()
        assert [record.levelno for record in caplog.records] == [logging.CRITICAL]


@pytest.mark.parametrize("end", ["result", "exception", "cancel"])
def test_an_outcome_is_final(end: str, pool: Runtime) -> None:
    by_hand: Future[Any] = Future()
    {
        "result": lambda: by_hand.set_result(1),
        "exception": lambda: by_hand.set_exception(KeyError(1)),
        "cancel": by_hand.cancel,
    }[end]()
    ours = pool.submit(abs, -1) if end == "result" else pool.submit(tasks.throw_type, KeyError, 1)
    ours.exception()
    for future in (by_hand, ours):
        before = repr(future)
        with pytest.raises(InvalidStateError, match="state="):
            future.set_result(2)
        with pytest.raises(InvalidStateError, match="state="):
            future.set_exception(ValueError())
        assert repr(future) == before


def test_a_state_set_under_the_condition_is_seen() -> None:
    """As CPython's own test does it."""
    future: Future[int] = Future()
    threads, waiting = blocked(3, lambda _: future.exception(timeout=PATIENCE))
    error = KeyError()
    with future._condition:
        future._state = "FINISHED"
        future._exception = error
        future._condition.notify_all()
    with threads:
        assert [f.result() for f in waiting] == [error] * 3


def test_a_waiter_that_cannot_be_told_keeps_nobody_else_waiting() -> None:
    """There may be no memory for it."""
    future: Future[int] = Future()
    threads, waiting = blocked(1, lambda _: future.result(3 * PATIENCE))
    condition: Any = future._condition
    until(lambda: condition._waiters, "it waits")
    waiter = install(future)

    def refuse(*_: Any) -> None:
        raise MemoryError

    waiter.add_result = refuse  # type: ignore[method-assign]
    with threads:
        with pytest.raises(MemoryError):
            future.conclude(True, 1)
        assert waiting[0].result(PATIENCE) == 1


def test_invoke_callbacks_calls_what_was_added() -> None:
    future: Future[int] = Future()
    seen: list[Any] = []
    future.add_done_callback(seen.append)
    assert list(future._done_callbacks) == [seen.append]  # type: ignore[attr-defined]
    future._invoke_callbacks()  # type: ignore[attr-defined]
    assert seen == [future] and not future.done()


def test_the_condition_is_one_and_re_entrant(pool: Runtime) -> None:
    for future in [*(Future() for _ in range(50)), *(pool.submit(abs, -i) for i in range(50))]:
        found = together(4, lambda _, future=future: future._condition)
        assert all(it is future._condition for it in found)
        with future._condition, future._condition:
            future._condition.notify_all()
    until(lambda: not busy(pool), "all have run")


def test_an_outcome_from_outside_is_kept(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    held[0].set_result("from outside")
    gate.open(2)
    assert [f.result() for f in held] == ["from outside", 1]
    assert pool.submit(abs, -1).result() == 1
    until(lambda: not busy(pool), "its task has ended")
    assert held[0].result() == "from outside"


# ---- result and exception ----------------------------------------------------------------------------


def test_an_exception_as_a_result_is_returned(pool: Runtime) -> None:
    by_hand: Future[Any] = Future()
    by_hand.set_result(ValueError("returned"))
    for future in (pool.submit(tasks.echo, ValueError("returned")), by_hand):
        result = future.result()
        assert type(result) is ValueError and result.args == ("returned",)
        assert future.exception() is None
        assert future.result() is result


@pytest.mark.parametrize("value", [None, False, 0, "", (), float("nan")], ids=repr)
def test_results_that_are_false(pool: Runtime, value: Any) -> None:
    future = pool.submit(tasks.echo, value)
    assert repr(future.result()) == repr(value)
    assert future.exception() is None and future.done()


class FalseError(Exception):
    """An exception that is false."""

    def __bool__(self) -> bool:
        return False


def test_exception_waits_and_does_not_raise_what_it_returns(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    failing = pool.submit(tasks.throw, KeyError("waited for"))
    threads, waiting = blocked(2, lambda i: (failing, held[0])[i].exception(timeout=PATIENCE))
    with pytest.raises(TimeoutError):
        failing.exception(timeout=0)
    gate.open(2)
    with threads:
        error, nothing = (f.result() for f in waiting)
    assert type(error) is KeyError and error.args == ("waited for",)
    assert error is failing.exception()
    assert nothing is None
    with pytest.raises(KeyError) as raised:
        failing.result()
    assert raised.value is error
    assert held[1].result() == 1


@pytest.mark.parametrize("timeout", [0, -1, 0.01, 0.0])
def test_timeouts(pool: Runtime, gate: Gate, timeout: float) -> None:
    held = occupied(pool, gate)
    waiting = pool.submit(abs, -1)
    by_hand: Future[Any] = Future()
    for future in (held[0], waiting, by_hand):
        for method in (future.result, future.exception):
            with pytest.raises(concurrent.futures.TimeoutError):
                method(timeout)
            with pytest.raises(TimeoutError):
                method(timeout=timeout)
        assert not future.done()
    gate.open(2)
    assert [f.result(PATIENCE) for f in (*held, waiting)] == [0, 1, 1]
    assert waiting.result(timeout) == 1  # what is there is there


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_result_from_20_threads_at_once(pool: Runtime, gate: Gate, fails: bool) -> None:
    held = occupied(pool, gate)
    future = pool.submit(tasks.throw if fails else tasks.echo, KeyError("for all"))
    asking = threading.Semaphore(0)

    def ask(number: int) -> Any:
        asking.release()
        try:
            return future.result(timeout=(None, PATIENCE)[number % 2])
        except KeyError as error:
            return error

    threads, waiting = blocked(20, ask)
    for _ in range(20):
        assert asking.acquire(timeout=PATIENCE)
    gate.open(2)
    with threads:
        found = [f.result() for f in waiting]
    assert all(it is found[0] for it in found)
    assert type(found[0]) is KeyError and found[0].args == ("for all",)
    assert [f.result() for f in held] == [0, 1]


def test_threads_that_give_up_and_threads_that_do_not(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)

    def ask(number: int) -> Any:
        try:
            return held[0].result(timeout=0.01 if number % 2 else None)
        except TimeoutError:
            return "gave up"

    threads, waiting = blocked(10, ask)
    assert [f.result() for f in waiting[1::2]] == ["gave up"] * 5
    gate.open(2)
    with threads:
        assert [f.result() for f in waiting[::2]] == [0] * 5
    assert held[1].result() == 1


def test_results_asked_for_the_moment_they_come(pool: Runtime) -> None:
    for i in range(300):
        future = pool.submit(tasks.echo, i)
        assert together(2, lambda _, future=future: future.result(PATIENCE)) == [i, i]


# ---- states and cancelling ---------------------------------------------------------------------------


def test_the_states_of_a_task(pool: Runtime, gate: Gate, tmp_path: Path) -> None:
    def states() -> list[tuple[bool, bool, bool]]:
        return [(f.running(), f.done(), f.cancelled()) for f in (held[0], waiting)]

    held = occupied(pool, gate)
    second = Gate(tmp_path, "second")
    waiting = pool.submit(pass_through, second.path, 2)
    assert states() == [(True, False, False), (False, False, False)]
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]
    second.arrived()
    assert states() == [(False, True, False), (True, False, False)]
    second.close()
    assert waiting.result() == 2
    assert states() == [(False, True, False), (False, True, False)]


def test_cancel_in_every_state(pool: Runtime, gate: Gate, tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = occupied(pool, gate)
    line = [pool.submit(tasks.log_line, str(log), i) for i in range(200)]
    waiters = [install(f) for f in (line[0], line[-1], running[0])]
    seen: list[Any] = []
    for future in (line[0], line[-1]):  # in a worker's ring, and still with us
        future.add_done_callback(seen.append)
        assert (future.cancel(), future.cancel(), pool.cancel(future)) == (True, True, True)
        assert (future.running(), future.done(), future.cancelled()) == (False, True, True)
        with pytest.raises(CancelledError):
            future.result(timeout=0)
        with pytest.raises(CancelledError):
            future.exception(timeout=0)
    assert seen == [line[0], line[-1]]
    assert not running[0].cancel() and not running[0].cancelled() and running[0].running()
    gate.open(2)
    assert [f.result() for f in running] == [0, 1]
    assert [f.result() for f in line[1:-1]] == list(range(1, 199))
    assert not running[0].cancel() and not line[1].cancel() and line[1].result() == 1
    failed = pool.submit(tasks.throw_type, KeyError)
    assert isinstance(failed.exception(), KeyError) and not failed.cancel()
    assert sorted(map(int, log.read_text().split())) == list(range(1, 199))
    assert [w.calls for w in waiters] == [
        [("cancelled", line[0])],
        [("cancelled", line[-1])],
        [("result", running[0])],
    ]


def test_cancel_races_with_completion(pool: Runtime, tmp_path: Path) -> None:
    """200 times; the more tasks before it, the earlier in its life."""
    log = tmp_path / "log"
    log.touch()
    seen: list[Any] = []
    cancelled = []
    for i in range(200):
        before = [pool.submit(abs, -1) for _ in range(i % 5)]
        future = pool.submit(tasks.log_line, str(log), i)
        future.add_done_callback(seen.append)
        while i % 2 and not (future.running() or future.done()):
            pass
        took = set(together(2, lambda _, future=future: future.cancel()))
        assert len(took) == 1 or not future.cancelled()  # of two at once both are told the same
        if future.cancelled():
            assert took == {True}
            with pytest.raises(CancelledError):
                future.result(PATIENCE)
            cancelled.append(i)
        else:
            assert took == {False}
            assert future.result(PATIENCE) == i
        assert future.done() and wait([future], timeout=0).done
        assert [f.result() for f in before] == [1] * len(before)
        until(lambda i=i: len(seen) == i + 1, "its callback")
        assert seen[-1] is future
    assert sorted(map(int, log.read_text().split())) == sorted(set(range(200)) - set(cancelled))


def test_20_threads_cancel_at_once(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    for _ in range(20):
        waiting = pool.submit(tasks.throw_type, AssertionError)
        waiter = install(waiting)
        seen: list[Any] = []
        waiting.add_done_callback(seen.append)
        assert together(20, lambda _, waiting=waiting: waiting.cancel()) == [True] * 20
        assert seen == [waiting]
        assert waiter.calls == [("cancelled", waiting)]
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]


def test_cancel_wakes_those_who_wait(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    waiting = pool.submit(tasks.throw_type, AssertionError)
    asking = threading.Semaphore(0)

    def ask(number: int) -> bool:
        asking.release()
        try:
            (waiting.result, waiting.exception)[number % 2](timeout=(None, PATIENCE)[number // 2 % 2])
        except CancelledError:
            return True
        return False

    threads, askers = blocked(8, ask)
    for _ in range(8):
        assert asking.acquire(timeout=PATIENCE)
    assert waiting.cancel()
    with threads:
        assert [f.result() for f in askers] == [True] * 8
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]


# ---- callbacks ---------------------------------------------------------------------------------------


def test_callbacks_get_the_future_in_the_order_of_addition(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    futures = [*held, pool.submit(abs, -1)]
    seen: dict[Any, list[tuple[int, bool]]] = {future: [] for future in futures}
    for i in range(100):
        for future in futures:
            future.add_done_callback(lambda f, i=i: seen[f].append((i, f.done())))
    assert list(seen.values()) == [[], [], []]
    gate.open(2)
    until(lambda: all([len(calls) == 100 for calls in seen.values()]), "all were called")
    assert list(seen.values()) == [[(i, True) for i in range(100)]] * 3


def test_callbacks_after_completion_run_here_and_now(pool: Runtime) -> None:
    done = pool.submit(abs, -1)
    done.result()
    failed = pool.submit(tasks.throw_type, KeyError)
    failed.exception()
    cancelled: Future[Any] = Future()
    cancelled.cancel()
    for future in (done, failed, cancelled):
        seen: list[Any] = []
        future.add_done_callback(lambda f, seen=seen: seen.append((f, threading.current_thread())))
        assert seen == [(future, threading.current_thread())]
        future.add_done_callback(lambda f, seen=seen: seen.append(f))
        assert seen[1:] == [future]


def test_callbacks_added_by_threads_while_it_completes(pool: Runtime) -> None:
    for _ in range(30):
        future = pool.submit(abs, -1)
        seen: list[tuple[int, int]] = []

        def add(thread: int, future: Any = future, seen: Any = seen) -> None:
            for i in range(20):
                future.add_done_callback(lambda _, i=i: seen.append((thread, i)))

        together(4, add)
        assert future.result() == 1
        until(lambda seen=seen: len(seen) >= 80, "all were called")
        assert sorted(seen) == [(thread, i) for thread in range(4) for i in range(20)]


def test_a_callback_that_is_added_twice_is_called_twice(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    seen: list[Any] = []
    held[0].add_done_callback(seen.append)
    held[0].add_done_callback(seen.append)
    gate.open(2)
    until(lambda: len(seen) == 2, "both")
    assert seen == held[:1] * 2
    assert [f.result() for f in held] == [0, 1]


def test_callbacks_within_a_callback(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    seen: list[Any] = []
    finished = threading.Event()

    def outer(future: Future[Any]) -> None:
        seen.append("outer")
        future.add_done_callback(lambda _: seen.append("inner"))  # it is done: called at once
        seen.append((future.result(), future.exception(), future.cancel(), future.running(), future.done()))

    held[0].add_done_callback(outer)
    held[0].add_done_callback(lambda _: finished.set())
    gate.open(2)
    assert finished.wait(PATIENCE)
    assert seen == ["outer", "inner", (0, None, False, False, True)]
    assert held[1].result() == 1


@pytest.mark.parametrize("when", ["before", "after", "by hand", "cancelled"])
def test_exceptions_in_callbacks_are_logged_and_swallowed(
    pool: Runtime, gate: Gate, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """In the stdlib's words, and by its logger."""
    held = occupied(pool, gate)
    future: Future[Any] = {"by hand": Future(), "cancelled": pool.submit(abs, -1)}.get(when, held[0])
    if when == "after":
        gate.open(2)
        future.result()
    called = threading.Event()
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(lambda _: called.set())
    if when == "by hand":
        future.set_result(1)
    elif when == "cancelled":
        future.cancel()
    elif when == "before":
        gate.open(2)
    assert called.wait(PATIENCE)
    [record] = [record for record in caplog.records if record.name == "concurrent.futures"]
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"exception calling callback for {future!r}"
    assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
    if when in ("by hand", "cancelled"):
        gate.open(2)
    assert [f.result() for f in held] == [0, 1]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, tasks.Odd])
def test_what_a_callback_raises_never_ends_the_pool(
    pool: Runtime, gate: Gate, kind: type[BaseException]
) -> None:
    """These the stdlib lets pass: into the thread that sets the result, which is ours and goes on."""
    held = occupied(pool, gate)
    held[0].add_done_callback(lambda _: tasks.throw_type(kind))
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]
    assert [pool.submit(abs, -i).result() for i in range(20)] == list(range(20))
    with pytest.raises(kind):
        held[0].add_done_callback(lambda _: tasks.throw_type(kind))


# ---- wait and as_completed ---------------------------------------------------------------------------


def mixed() -> dict[str, StdlibFuture[Any]]:
    """Futures made by hand, the stdlib's and ours."""
    made: dict[str, StdlibFuture[Any]] = {}
    for who, kind in (("theirs", StdlibFuture), ("ours", Future)):
        for state in ("pending", "running", "done", "failed", "cancelled", "told"):
            future = made[f"{who} {state}"] = kind()
            if state == "running":
                future.set_running_or_notify_cancel()
            elif state == "done":
                future.set_result(state)
            elif state == "failed":
                future.set_exception(KeyError(state))
            elif state != "pending":
                future.cancel()
                if state == "told":
                    future.set_running_or_notify_cancel()
    return made


def test_wait_for_the_first_of_mixed_futures(pool: Runtime, gate: Gate) -> None:
    made = mixed()
    finished = {f for name, f in made.items() if name.split()[1] in ("done", "failed", "told")}
    held = occupied(pool, gate)
    waiting = pool.submit(abs, -1)
    everything = {*made.values(), *held, waiting}
    done, pending = wait(everything, return_when=FIRST_COMPLETED)
    assert (done, pending) == (finished, everything - finished)
    done, pending = wait(everything - finished, timeout=0.01, return_when=FIRST_COMPLETED)
    assert (done, pending) == (set(), everything - finished)
    waiting.cancel()
    done, pending = wait(everything - finished, return_when=FIRST_COMPLETED)
    assert (done, pending) == ({waiting}, everything - finished - {waiting})
    gate.open()
    rest = {*made.values(), *held} - finished
    done, _ = wait(rest, return_when=FIRST_COMPLETED)
    assert len(done) == 1 and done < set(held)
    gate.open()
    assert [f.result() for f in held] == [0, 1]


def test_wait_for_the_first_exception_of_mixed_futures(pool: Runtime, gate: Gate) -> None:
    made = mixed()
    held = occupied(pool, gate)
    failing = pool.submit(tasks.throw, KeyError("ours"))
    unfailed = [made[f"{who} {state}"] for who in ("theirs", "ours") for state in ("done", "told", "pending")]
    done, pending = wait([*unfailed, held[0], failing], timeout=0.01, return_when=FIRST_EXCEPTION)
    assert (done, pending) == ({*unfailed[0:2], *unfailed[3:5]}, {unfailed[2], unfailed[5], held[0], failing})
    threads, waiter = blocked(1, lambda _: wait([*unfailed, held[0], failing], return_when=FIRST_EXCEPTION))
    gate.open()  # one of two goes on, and its worker runs what fails
    with threads:
        done, pending = waiter[0].result()
    assert failing in done and {unfailed[2], unfailed[5]} <= pending
    gate.open()
    wait([*held])
    for who in ("theirs", "ours"):
        done, pending = wait([made[f"{who} failed"], made[f"{who} pending"]], return_when=FIRST_EXCEPTION)
        assert (done, pending) == ({made[f"{who} failed"]}, {made[f"{who} pending"]})


def test_wait_for_all_of_mixed_futures(pool: Runtime, gate: Gate) -> None:
    made = mixed()
    held = occupied(pool, gate)
    everything = [*made.values(), *held, pool.submit(abs, -1), pool.submit(tasks.throw_type, KeyError)]
    everything.append(everything[-1])  # twice the same
    threads, waiter = blocked(2, lambda i: wait(everything, (None, PATIENCE)[i], ALL_COMPLETED))
    for who in ("theirs", "ours"):
        made[f"{who} pending"].set_result(1)
        made[f"{who} running"].set_exception(KeyError())
        made[f"{who} cancelled"].set_running_or_notify_cancel()
    gate.open(2)
    with threads:
        for it in waiter:
            assert it.result() == (set(everything), set())
    assert wait(everything, timeout=0) == (set(everything), set())
    assert wait([]) == (set(), set())


def test_waiters_are_taken_back(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    wait(held, timeout=0)
    with pytest.raises(TimeoutError):
        list(as_completed(held, timeout=0))
    assert [list(f._waiters) for f in held] == [[], []]
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]


def test_wait_races_with_completion(pool: Runtime) -> None:
    for i in range(200):
        futures = [pool.submit(tasks.echo, i) for _ in range(1 + i % 3)]
        if i % 2:
            assert wait(futures, PATIENCE, (FIRST_COMPLETED, ALL_COMPLETED)[i // 2 % 2]).done
        assert sorted(f.result(0) for f in as_completed(futures, PATIENCE)) == [i] * len(futures)


def test_as_completed_with_duplicates(pool: Runtime, gate: Gate) -> None:
    made = mixed()
    finished = {f for name, f in made.items() if name.split()[1] in ("done", "failed", "told")}
    held = occupied(pool, gate)
    order = as_completed([*finished, *held, *held, *finished, held[0]])
    assert {next(order) for _ in finished} == finished
    gate.open(2)
    rest = list(order)
    assert len(rest) == 2 and set(rest) == set(held)
    assert list(as_completed([*held, *held])) in (held, held[::-1])


def test_as_completed_with_a_timeout(pool: Runtime, gate: Gate) -> None:
    held = occupied(pool, gate)
    done = pool.submit(abs, -1)
    by_hand: Future[Any] = Future()
    by_hand.set_result(1)
    pool.cancel(done)
    order = as_completed([*held, done, by_hand, *held], timeout=0.01)
    assert {next(order), next(order)} == {done, by_hand}
    with pytest.raises(TimeoutError, match=r"2 \(of 4\) futures unfinished"):
        next(order)
    gate.open(2)
    assert set(as_completed(held, timeout=PATIENCE)) == set(held)


# ---- asyncio -----------------------------------------------------------------------------------------


def test_wrap_future(pool: Runtime, gate: Gate) -> None:
    async def main() -> None:
        held = pool.submit(pass_through, gate.path, "several")
        several = [asyncio.wrap_future(held) for _ in range(5)]
        failing = asyncio.wrap_future(pool.submit(tasks.throw, KeyError("through")))
        with pytest.raises(KeyError, match="through"):
            await failing
        assert not any(f.done() for f in several)
        gate.open()
        assert await asyncio.gather(*several) == ["several"] * 5
        assert await asyncio.wrap_future(held) == "several"  # done long since
        by_hand: Future[int] = Future()
        wrapped = asyncio.wrap_future(by_hand)
        await asyncio.to_thread(by_hand.set_result, 5)
        assert await wrapped == 5

    asyncio.run(main())


def test_cancel_through_wrap_future(pool: Runtime, gate: Gate) -> None:
    async def main() -> None:
        held = occupied(pool, gate)
        waiting = pool.submit(tasks.throw_type, AssertionError)
        wrapped = [asyncio.wrap_future(f) for f in (waiting, held[0])]
        for it in wrapped:
            assert it.cancel()
        for it in wrapped:
            with pytest.raises(asyncio.CancelledError):
                await it
        await asyncio.sleep(0)  # asyncio passes it on in the loop's next round
        assert waiting.cancelled()
        assert held[0].running() and not held[0].cancelled()  # a worker runs it: only nobody waits
        back = asyncio.wrap_future(queued := pool.submit(tasks.throw_type, AssertionError))
        assert queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await back
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(held[1]), 0.01)
        gate.open(2)
        assert await asyncio.wrap_future(held[0]) == 0
        assert held[1].result(PATIENCE) == 1

    asyncio.run(main())


def test_a_result_after_the_loop_has_closed(
    pool: Runtime, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[Future[Any]]:
        held = occupied(pool, gate)
        for future in held:
            asyncio.wrap_future(future).cancel()
        return held

    held = asyncio.run(main())
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]
    assert pool.submit(abs, -1).result() == 1
    assert caplog.records == []


# ---- references --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", ["result", "exception", "callback", "wait", "as_completed", "timeout", "not"]
)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_dropped_future_is_freed_at_once(
    pool: Runtime, no_collector: None, asked: str, fails: bool
) -> None:
    future = pool.submit(tasks.throw if fails else tasks.echo, KeyError())
    ref = weakref.ref(future)
    called = threading.Event()
    if asked == "timeout":
        try:
            future.result(timeout=0)
        except (TimeoutError, KeyError):
            pass
    if asked == "exception":
        future.exception()
    elif asked == "callback":
        future.add_done_callback(lambda f: called.set())
        assert called.wait(PATIENCE)
    elif asked == "wait":
        wait([future])
    elif asked == "as_completed":
        list(as_completed([future]))
    elif asked == "result":
        try:
            future.result()
        except KeyError:
            pass
    del future
    gone(ref)


def test_a_cancelled_future_is_freed_at_once(pool: Runtime, gate: Gate, no_collector: None) -> None:
    held = occupied(pool, gate)
    waiting = [pool.submit(abs, -1) for _ in range(200)]
    refs = [weakref.ref(f) for f in waiting]
    assert all([f.cancel() for f in waiting])
    try:
        waiting[0].result()
    except CancelledError:
        pass
    del waiting
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]
    for ref in refs:
        gone(ref)


def test_a_future_by_hand_is_freed_at_once(no_collector: None) -> None:
    for end in ("result", "exception", "cancel", "pending", "touched"):
        future: Future[Any] = Future()
        ref = weakref.ref(future)
        if end == "result":
            future.set_result(1)
        elif end == "exception":
            future.set_exception(KeyError())
            try:
                future.result()
            except KeyError:
                pass
        elif end == "cancel":
            future.cancel()
        elif end == "touched":
            future.add_done_callback(print)
            with future._condition:
                assert not future._waiters
            assert not future.done()
        del future
        assert ref() is None, end


def test_a_dropped_future_still_calls_back(pool: Runtime, gate: Gate, no_collector: None) -> None:
    held = occupied(pool, gate)
    refs = [weakref.ref(future) for future in held]
    seen: list[int] = []
    for future in held:
        future.add_done_callback(lambda f: seen.append(f.result()))
    del held, future
    gate.open(2)
    until(lambda: sorted(seen) == [0, 1], "both called back")
    for ref in refs:
        gone(ref)


class Tie:
    """Something that a callback refers to."""

    def __call__(self, future: Any) -> None:
        pass


def test_a_finished_future_is_not_kept_by_its_exception(pool: Runtime, no_collector: None) -> None:
    """Nor does the exception keep the frames that asked for it any longer than the stdlib's."""
    future = pool.submit(tasks.throw, KeyError("kept"))
    error = future.exception()
    for _ in range(3):
        try:
            future.result()
        except KeyError as raised:
            assert raised is error
    ref = weakref.ref(future)
    tie = Tie()
    future.add_done_callback(tie)
    tied = weakref.ref(tie)
    del future, tie
    assert error is not None
    error.__traceback__ = None  # it holds this very frame, but nothing of the future's
    gone(ref)
    gone(tied)


# ---- Ctrl-C ------------------------------------------------------------------------------------------


CTRL_C = """
import concurrent.futures, sys
from pathlib import Path
import runtime, tasks

gate = tasks.Gate(Path(sys.argv[1]))
with runtime.Runtime(2) as rt:
    held = rt.submit(tasks.pass_through, gate.path, "held")
    gate.arrived()
    for wait in (
        lambda: held.result(),
        lambda: held.result(timeout=1000),
        lambda: held.exception(),
        lambda: concurrent.futures.wait([held]),
        lambda: list(concurrent.futures.as_completed([held])),
    ):
        try:
            print("waiting", flush=True)
            wait()
        except KeyboardInterrupt:
            print("interrupted", held.running(), rt.submit(abs, -7).result(), flush=True)
    gate.open()
    print(held.result(), held.done(), flush=True)
"""


def test_ctrl_c_in_every_way_to_wait(tmp_path: Path) -> None:
    """While the task runs, so it can only be the signal that ends the waiting. The pool does not care."""
    with host(CTRL_C, os.fspath(tmp_path)) as script:
        for _ in range(5):
            assert script.line() == "waiting"
            until(lambda: fields(script.pid)[:1] == ["S"], "the main thread waits")
            send(script.pid, signal.SIGINT)
            assert script.line() == "interrupted True 7"
        assert script.line() == "held True"
        assert script.process.wait(PATIENCE) == 0


def test_ctrl_c_in_threads_that_wait_is_for_the_main_thread(tmp_path: Path) -> None:
    code = """
import signal, sys, threading
from pathlib import Path
import runtime, tasks

gate = tasks.Gate(Path(sys.argv[1]))
with runtime.Runtime(1) as rt:
    held = rt.submit(tasks.pass_through, gate.path, "held")
    gate.arrived()
    found = []
    threads = [threading.Thread(target=lambda: found.append(held.result())) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        print("waiting", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("interrupted", found, flush=True)
    gate.open()
    for thread in threads:
        thread.join()
    print(*found, flush=True)
"""
    with host(code, os.fspath(tmp_path)) as script:
        assert script.line() == "waiting"
        send(script.pid, signal.SIGINT)
        assert script.line() == "interrupted []"
        assert script.line() == "held held held"
        assert script.process.wait(PATIENCE) == 0
