"""Retries: when they come, who waits for them, what stops them, and the history that poison leaves."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import evil
import pytest
import tasks
from tasks import Gate, pass_through
from watching import read_pids, settled, shut_down_clean, until

import runtime
from runtime import Runtime, WorkerDied, retries
from runtime.retries import HISTORY, RETRY_BACKOFF, RETRY_BACKOFF_MAX, retry_delay


def waiting_retry(rt: Runtime) -> bool:
    """A retry waits for its time, and nothing else is under way."""
    stats = rt.stats()
    return rt._core.dispatcher.retry_in is not None and (stats.leased, stats.running) == (0, 0)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every retry but the first is a minute away."""
    monkeypatch.setattr("runtime.outcomes.retry_delay", lambda attempts: 0.0 if attempts < 2 else 60.0)


def log_and_die(path: str, value: Any = None) -> None:
    """Note the time and end this worker."""
    tasks.log_line(path, time.monotonic())
    tasks.kill_self()


def log_and_raise(path: str, value: Any = None) -> None:
    tasks.log_line(path, time.monotonic())
    raise ValueError("again")


class Locked(ConnectionError):
    """It holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("again")
        self.lock = threading.Lock()


class Picky(ConnectionError):
    """It cannot be made again from its pickle."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)


def log_and_raise_locked(path: str, value: Any = None) -> None:
    tasks.log_line(path, value)
    raise Locked


def log_and_raise_picky(path: str, value: Any = None) -> None:
    tasks.log_line(path, value)
    raise Picky("again", 5)


def fail_at(value: int, bad: int, path: str) -> int:
    """The value; one of them is logged and raises."""
    if value == bad:
        log_and_raise(path)
    return value


# ---- the delays ----------------------------------------------------------------------------------


def test_the_first_retry_comes_at_once_and_the_others_later_and_later() -> None:
    assert retry_delay(0) == retry_delay(1) == 0.0
    for attempts in range(2, 200):
        least = min(RETRY_BACKOFF_MAX / 1.25, RETRY_BACKOFF * 2 ** min(attempts - 2, 40))
        drawn = [retry_delay(attempts) for _ in range(50)]
        assert all(least <= delay <= min(RETRY_BACKOFF_MAX, 1.25 * least) for delay in drawn)
        assert len(set(drawn)) > 1, "without jitter"


def test_the_users_random_numbers_are_left_alone() -> None:
    random.seed(7)
    expected = random.Random(7).random()
    retry_delay(5)
    assert random.random() == expected
    assert retries.HISTORY == HISTORY


@pytest.mark.parametrize("fn", [log_and_die, log_and_raise])
def test_attempts_of_a_call_keep_their_distance(
    factory: Callable[..., Runtime], tmp_path: Path, fn: Callable[..., Any]
) -> None:
    rt = factory(2, retries=3, retry_on=ValueError)
    path = str(tmp_path / "log")
    assert rt.submit(fn, path).exception() is not None
    at = [float(line) for line in Path(path).read_text().split()]
    assert len(at) == 4
    assert at[2] - at[1] >= RETRY_BACKOFF
    assert at[3] - at[2] >= 2 * RETRY_BACKOFF
    assert rt.stats().rescued == 0


@pytest.mark.parametrize("fn", [log_and_die, log_and_raise])
def test_attempts_of_an_item_keep_their_distance(
    factory: Callable[..., Runtime], tmp_path: Path, fn: Callable[..., Any]
) -> None:
    view = factory(2).options(retries=2, retry_on=ValueError)
    path = str(tmp_path / "log")
    (error,) = view.map(fn, [path], return_exceptions=True)
    assert isinstance(error, WorkerDied if fn is log_and_die else ValueError)
    at = [float(line) for line in Path(path).read_text().split()]
    assert len(at) == 3
    assert at[2] - at[1] >= RETRY_BACKOFF


@pytest.mark.parametrize("fn", [log_and_raise_locked, log_and_raise_picky])
@pytest.mark.parametrize("kinds", [ConnectionError, (KeyError, Locked, Picky), KeyError, ()])
def test_what_cannot_be_pickled_is_retried_by_its_type(
    pool: Runtime, tmp_path: Path, fn: Callable[..., None], kinds: Any
) -> None:
    path = tmp_path / "log"
    view = pool.options(retries=1, retry_on=kinds)
    errors = [view.submit(fn, str(path)).exception(), *view.map(fn, [str(path)], return_exceptions=True)]
    assert [type(error) for error in errors] == [runtime.RemoteError] * 2
    assert len(path.read_text().splitlines()) == (2 if kinds in (KeyError, ()) else 4)


def test_other_items_of_the_batch_go_on_meanwhile(
    factory: Callable[..., Runtime], tmp_path: Path, far: None
) -> None:
    rt = factory(2, retries=2, retry_on=ValueError)
    path = str(tmp_path / "log")
    results = rt.map_unordered(fail_at, range(40), [3] * 40, [path] * 40, chunksize=8)
    got = sorted(next(results) for _ in range(39))
    assert got == [i for i in range(40) if i != 3]
    until(lambda: waiting_retry(rt), "the third attempt waits")
    assert rt.stats().queued == 1
    assert len(Path(path).read_text().split()) == 2
    assert rt.submit(tasks.echo, "others run").result() == "others run"
    results.close()  # type: ignore[attr-defined]
    settled(rt)
    assert rt.stats().cancelled == 1


# ---- what waits ------------------------------------------------------------------------------------


def test_a_retry_that_waits_is_queued_and_can_be_cancelled(
    factory: Callable[..., Runtime], far: None
) -> None:
    rt = factory(1, retries=9)
    future = rt.submit(tasks.kill_self)
    until(lambda: waiting_retry(rt), "the third attempt waits")
    assert not future.running() and not future.done()
    assert rt.stats().queued == 1
    assert future.cancel()
    assert future.cancelled()
    settled(rt)
    assert rt.stats().cancelled == 1
    shut_down_clean(rt)


def test_cancel_running_takes_a_waiting_retry_too(factory: Callable[..., Runtime], far: None) -> None:
    rt = factory(1, retries=9)
    future = rt.submit(tasks.kill_self)
    until(lambda: waiting_retry(rt), "the third attempt waits")
    assert rt.cancel(future, running=True)
    with pytest.raises(CancelledError):
        future.result(10)


def test_a_cancel_that_meets_an_attempt_at_its_end_prevents_the_next(
    factory: Callable[..., Runtime], tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome is with the collector, the next attempt is not queued yet: neither can be taken back."""
    rt = factory(1, retries=1, retry_on=ValueError)
    path = str(tmp_path / "log")
    outcomes = rt._core.collector.outcomes
    said: list[bool] = []
    kept = outcomes.fail_or_retry

    def cancel_first(*args: Any) -> None:
        said.append(rt.cancel(future, running=True))
        kept(*args)

    monkeypatch.setattr(outcomes, "fail_or_retry", cancel_first)
    future = rt.submit(log_and_raise, path)
    with pytest.raises(CancelledError):
        future.result(10)
    assert said == [True] and future.cancelled()
    assert len(Path(path).read_text().split()) == 1, "it ran once more"
    settled(rt)


@pytest.mark.parametrize("outcome", ["result", "exception"])
def test_a_cancel_that_meets_the_end_of_a_call_is_what_it_says(
    factory: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    """The outcome is with the collector, the future does not have it yet: cancelled it is, and stays."""
    rt = factory(1)
    said: list[bool] = []
    outcomes = rt._core.collector.outcomes
    kept = outcomes.finish

    def cancel_first(*args: Any) -> None:
        said.append(rt.cancel(future, running=True))
        kept(*args)
        said.append(rt.cancel(future, running=True))

    monkeypatch.setattr(outcomes, "finish", cancel_first)
    future = rt.submit(evil.square, 3) if outcome == "result" else rt.submit(evil.misbehave, "raise")
    assert future._condition  # so it is the collector's
    with pytest.raises(CancelledError):
        future.result(10)
    until(lambda: len(said) == 2, "it was asked again")
    assert said == [True, True] and future.cancelled()
    settled(rt)


def test_shutdown_waits_for_retries(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, retries=3)
    call, item = rt.submit(tasks.die_until, 4), rt.map(tasks.die_until, [4])
    rt.shutdown()
    assert call.result(0) == 4
    assert list(item) == [4]


def test_shutdown_that_cancels_does_not_wait_for_retries(factory: Callable[..., Runtime], far: None) -> None:
    rt = factory(1, retries=9)
    call, item = rt.submit(tasks.kill_self), rt.map(evil_kill, [0])
    until(lambda: rt.stats().queued == 2 and waiting_retry(rt), "both wait for their third attempt")
    rt.shutdown(cancel_futures=True)
    assert call.cancelled()
    with pytest.raises(CancelledError):
        list(item)


def evil_kill(_: int) -> None:
    tasks.kill_self()


def test_kill_workers_ends_retries_that_wait(factory: Callable[..., Runtime], far: None) -> None:
    rt = factory(1, retries=9)
    future = rt.submit(tasks.kill_self)
    until(lambda: waiting_retry(rt), "the third attempt waits")
    rt.kill_workers()
    assert isinstance(future.exception(0), runtime.BrokenRuntime)


def test_a_map_that_is_dropped_forgets_its_retries(factory: Callable[..., Runtime], far: None) -> None:
    rt = factory(1, retries=9)
    results = rt.map(evil_kill, range(3), chunksize=1)
    until(lambda: rt.stats().queued == 3 and waiting_retry(rt), "all wait for their third attempt")
    results.close()  # type: ignore[attr-defined]
    settled(rt)
    assert rt.stats().cancelled == 3
    shut_down_clean(rt)


# ---- poison ------------------------------------------------------------------------------------------


def test_poison_leaves_the_history_of_its_deaths(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    rt = factory(1, retries=2)
    path = str(tmp_path / "pids")
    error = rt.submit(note_and_exit, path).exception()
    assert isinstance(error, WorkerDied)
    pids = read_pids(path, 3)
    assert error.attempts == 3 and error.pid == pids[-1]
    assert error.history == tuple(f"pid {pid}: it exited with code 7" for pid in pids)
    assert all(line in str(error) for line in error.history)
    assert f"({__name__}.note_and_exit)" in str(error) and "task 1 " in str(error)
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error), copy.copy(error)):
        assert type(twin) is WorkerDied
        assert (twin.history, twin.task, twin.attempts, str(twin)) == (
            error.history, error.task, 3, str(error),
        )  # fmt: skip


def note_and_exit(path: str) -> None:
    tasks.log_line(path, os.getpid())
    os._exit(7)


def test_poison_among_the_items_of_a_map(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, retries=1)
    got = list(rt.map(die_at, range(30), [11] * 30, return_exceptions=True))
    error = got.pop(11)
    assert got == [i for i in range(30) if i != 11]
    assert isinstance(error, WorkerDied)
    assert error.attempts == len(error.history) == 2
    assert "item 11" in error.__notes__[0]


def die_at(value: int, bad: int) -> int:
    if value == bad:
        tasks.kill_self()
    return value


def test_one_death_is_no_history_in_the_message(factory: Callable[..., Runtime]) -> None:
    error = factory(1).submit(tasks.kill_self).exception()
    assert isinstance(error, WorkerDied)
    assert len(error.history) == 1 and "\n" not in str(error)
    assert error.signal == signal.SIGKILL


def test_a_long_history_is_cut(factory: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.outcomes.retry_delay", lambda attempts: 0.0)
    error = factory(2, retries=HISTORY + 3).submit(tasks.kill_self).exception()
    assert isinstance(error, WorkerDied)
    assert error.attempts == HISTORY + 4 and len(error.history) == HISTORY
    assert error.history[-1].startswith(f"pid {error.pid}:")


def test_the_constructor_keeps_its_order() -> None:
    error = WorkerDied(1, 2, None, 9, "why", 4, "stack", 5)
    assert (error.pid, error.number, error.exitcode, error.signal) == (1, 2, None, 9)
    assert (error.reason, error.attempts, error.stack, error.rss) == ("why", 4, "stack", 5)
    assert (error.task, error.history) == ("", ())
    with pytest.raises(TypeError):
        WorkerDied(1, 2, None, 9, "why", 4, "stack", 5, ("history",))  # type: ignore[misc]


def test_fifty_poison_tasks_among_innocents_with_retries(
    factory: Callable[..., Runtime], tmp_path: Path
) -> None:
    """Promise 3: only what a worker ran answers for its death, and only that is counted."""
    rt = factory(2, retries=1)
    count, path = 600, str(tmp_path / "log")
    poison = set(random.Random(11).sample(range(count), 50))
    futures = [rt.submit(evil.counted_poison if i in poison else evil.counted, path, i) for i in range(count)]
    errors = {i: f.exception(60) for i, f in enumerate(futures)}
    assert {i for i, error in errors.items() if error is not None} == poison
    for i in poison:
        error = errors[i]
        assert isinstance(error, WorkerDied)
        assert error.attempts == len(error.history) == 2
    ran = [int(line.split()[1]) for line in Path(path).read_text().splitlines() if line[0] == "S"]
    assert all(ran.count(i) == (2 if i in poison else 1) for i in range(count))
    assert rt.stats().failed == 50
    settled(rt)


def test_others_run_while_a_retry_waits(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1, retries=3)
    future = rt.submit(tasks.die_until, 4)
    other = rt.submit(pass_through, gate.path, "through")
    gate.arrived()
    gate.open()
    assert other.result() == "through"
    assert future.result() == 4
