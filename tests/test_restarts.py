"""Restart policy: which deaths count, the back-off, when a runtime is broken, what a loop costs."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evil
import pytest
from recycled import fails_without, plan, second_fails
from tasks import own_pid
from watching import alive, all_ready, host, read_pids, send, until, zygote_of

from runtime import BrokenRuntime, Runtime, WorkerDied, WorkerStatus, restarts
from runtime.lifecycle import Number
from runtime.supervisor import Supervisor

Factory = Callable[..., Runtime]


# ---- the arithmetic ------------------------------------------------------------------------------


def test_backoff_is_doubled_up_to_a_limit() -> None:
    for failures in range(1, 2000):
        expected = min(10.0, 0.05 * 2 ** min(failures - 1, 30))
        for crowd in (0, 1):
            assert 0.8 * expected <= restarts.backoff(failures, crowd) <= 1.2 * expected
    assert restarts.backoff(0) <= 0.06


def test_backoff_has_jitter() -> None:
    drawn = [restarts.backoff(4) for _ in range(200)]
    assert len(set(drawn)) > 100
    assert max(drawn) - min(drawn) > 0.1 * statistics.mean(drawn)


def test_a_crowd_does_not_cost_more_than_one() -> None:
    """Attempts in a minute, of 1 and of 100 numbers that always fail, from the minute after the first."""

    def attempts(crowd: int, begin: float, end: float) -> int:
        count, now, row = 0, 0.0, 0
        while now < end:
            row += 1
            count += now >= begin
            now += restarts.backoff(row, crowd)
        return count * crowd

    assert attempts(1, 0, 60) <= 16
    assert attempts(1, 600, 1200) <= 80
    assert attempts(100, 6000, 12000) <= 10 * 80


def test_the_window() -> None:
    """Five within 30 s exhaust it, until there was some life; slower ones never do."""
    quick, slow = restarts.Restarts(), restarts.Restarts()
    for n in range(4):
        quick.failed(100.0 + n)
        assert not quick.exhausted and quick.not_before > 100.0 + n
    quick.failed(130.0)
    assert quick.exhausted and quick.in_a_row == 5
    quick.failed(500.0)
    assert quick.exhausted, "it has not lived since"
    quick.lived()
    assert not quick.exhausted and quick.in_a_row == 0 and quick.not_before == 0.0
    quick.failed(501.0)
    assert not quick.exhausted
    for n in range(100):
        slow.failed(7.6 * n, 3)
    assert not slow.exhausted


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is what is tested, not its pauses."""
    monkeypatch.setattr(restarts, "_FIRST", 0.001)


# ---- (a) deaths before ready ---------------------------------------------------------------------


def births(path: Path) -> int:
    return len(path.read_text().split()) if path.exists() else 0


@pytest.mark.usefixtures("hurried")
def test_life_resets_the_count(factory: Factory, tmp_path: Path) -> None:
    """Four failures, work, four failures: five in 30 s would be too many, but they are not in a row."""
    path = tmp_path / "births"
    rt = factory(1, initializer=plan, initargs=(str(path), "xxxx.xxxx."))
    assert rt.submit(os.getpid).result() == read_pids(path, 5)[-1]
    assert type(rt.submit(evil.misbehave, "kill").exception()) is WorkerDied
    assert rt.submit(os.getpid).result() == read_pids(path, 10)[-1]
    assert births(path) == 10


@pytest.mark.usefixtures("hurried")
def test_being_ready_alone_does_not_reset_it(factory: Factory, tmp_path: Path) -> None:
    """Or a worker that dies right after it was ready would be started for ever."""
    path = tmp_path / "births"
    rt = factory(1, initializer=plan, initargs=(str(path), "xx.x."))
    (pid,) = all_ready(rt).values()
    assert births(path) == 3
    send(pid, signal.SIGKILL)
    until(lambda: births(path) == 5, "a failure when idle, one before ready, then it is there")
    assert all_ready(rt)
    assert rt._core._numbers[0].restarts.in_a_row == 4
    assert rt.submit(abs, -1).result() == 1


# ---- (b) deaths after ready ----------------------------------------------------------------------


def test_deaths_that_tasks_cause_are_refilled_at_once(factory: Factory) -> None:
    rt = factory(1)
    all_ready(rt)
    futures = [rt.submit(evil.misbehave, "kill") for _ in range(20)]
    statuses = set()
    for future in futures:
        while not future.done():
            statuses.add(rt.workers()[0].status)
        assert type(future.exception()) is WorkerDied
    assert WorkerStatus.RESTING not in statuses
    number = rt._core._numbers[0]
    assert (number.restarts.in_a_row, number.restarts.exhausted) == (0, False)


@pytest.mark.usefixtures("hurried")
def test_idle_deaths_before_any_work_count(factory: Factory) -> None:
    rt = factory(1)
    for _ in range(5):
        (pid,) = all_ready(rt).values()
        send(pid, signal.SIGKILL)
        until(lambda p=pid: not alive(p), "it is dead")  # type: ignore[misc]
        until(lambda p=pid: rt.workers()[0].pid != p, "the supervisor has seen it")  # type: ignore[misc]
    with pytest.raises(BrokenRuntime, match=r"ended before it was ready: killed by signal 9"):
        rt.submit(abs, -1).result()


def test_idle_deaths_after_work_do_not(factory: Factory) -> None:
    rt = factory(1)
    for _ in range(8):
        (pid,) = all_ready(rt).values()
        assert rt.submit(own_pid).result() == pid
        send(pid, signal.SIGKILL)
        until(lambda p=pid: rt.workers()[0].pid not in (p, None), "it is replaced")  # type: ignore[misc]
        assert rt._core._numbers[0].restarts.in_a_row == 0


# ---- (c) and (d): broken, or not -----------------------------------------------------------------


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_after_a_first_success_only_when_every_number_has_failed_enough(
    factory: Factory, tmp_path: Path, how: str
) -> None:
    ok = tmp_path / "ok"
    ok.touch()
    rt = factory(2, initializer=fails_without, initargs=(str(ok), how))
    pids = all_ready(rt)
    assert {f.result() for f in [rt.submit(own_pid) for _ in range(10)]} <= set(pids.values())
    ok.unlink()
    dead = rt._core._numbers[1].restarts
    send(pids[1], signal.SIGKILL)
    until(lambda: dead.exhausted, "number 1 has failed five times")
    assert rt.submit(own_pid).result() == pids[0], "the other one works on"
    assert rt._core.broken is None
    assert type(rt.submit(evil.misbehave, "kill").exception()) is WorkerDied
    error = rt.submit(own_pid).exception(30)
    assert type(error) is BrokenRuntime
    assert ("the initializer raised" if how == "raise" else "ended before it was ready") in str(error)


@pytest.mark.usefixtures("hurried")
def test_what_failed_for_a_while_works_again(factory: Factory, tmp_path: Path) -> None:
    """The tasks wait for it."""
    ok = tmp_path / "ok"
    ok.touch()
    rt = factory(1, initializer=fails_without, initargs=(str(ok), "raise"))
    (pid,) = all_ready(rt).values()
    ok.unlink()
    send(pid, signal.SIGTERM)
    future = rt.submit(own_pid)
    until(lambda: rt._core._numbers[0].restarts.in_a_row >= 2, "it fails")
    ok.touch()
    assert future.result() != pid
    assert rt._core.broken is None


@pytest.mark.parametrize("how", ["kill_workers", "terminate_workers", "shutdown"])
@pytest.mark.parametrize("when", ["at once", "in a crash loop"])
def test_the_end_does_not_wait_for_a_start(factory: Factory, tmp_path: Path, how: str, when: str) -> None:
    """Half a second is ten times what it takes: it waits for no worker that starts for nobody."""
    path = tmp_path / "births"
    rt = factory(2, initializer=plan, initargs=(str(path), "xxxx" if when == "in a crash loop" else ""))
    if when == "in a crash loop":
        until(lambda: births(path) >= 2, "two have failed")
    begin = time.monotonic()
    if how == "shutdown":
        rt.shutdown(cancel_futures=True)
    else:
        getattr(rt, how)()
    assert time.monotonic() - begin < 0.5


# ---- what a loop costs ---------------------------------------------------------------------------

LOOP = """if True:
    import logging, os, sys, threading
    import runtime
    from watching import parent, until
    logging.disable()

    def begin(kind):
        if runtime.current().number == 0:
            return
        os.write(1, b"x\\n")
        if kind == "exit":
            os._exit(3)
        elif kind == "kill":
            os.kill(os.getpid(), 9)
        threading.Timer(0.01, os._exit, (3,)).start()      # idle, right after it was ready

    rt = runtime.Runtime(2, initializer=begin, initargs=(sys.argv[1],))
    until(lambda: rt.workers()[0].status is runtime.WorkerStatus.READY, "the other one is ready")
    worker = rt.workers()[0].pid
    os.write(1, b"%d %d\\n" % (parent(worker), worker))
    for line in sys.stdin:
        assert rt.submit(abs, -1).result() == 1
        os.write(1, b"%d\\n" % rt.workers()[0].pid)
    rt.kill_workers()
"""


def cpu(own: int, zygote: int, worker: int) -> float:
    """Seconds of all processes of a runtime; those of dead workers are the zygote's."""
    total = 0
    for pid, last in ((own, 13), (zygote, 15), (worker, 13)):
        total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:last]))
    return total / os.sysconf("SC_CLK_TCK")


@pytest.mark.promise
@pytest.mark.parametrize("kind", ["exit", "kill", "idle"])
def test_a_crash_loop_costs_little(kind: str) -> None:
    """Less than 1 % of a core in the 60 s after the first failure, which has about 13 attempts: 8 of them in
    the first 10 s, which are measured. The other worker does not notice."""
    with host(LOOP, kind, stderr=-3) as one:
        lines = [one.line()]
        while " " not in lines[-1]:
            lines.append(one.line())
        zygote, worker = map(int, lines[-1].split())
        before, begin = cpu(one.pid, zygote, worker), time.monotonic()
        time.sleep(10)  # what is measured
        cost = cpu(one.pid, zygote, worker) - before
        seconds = time.monotonic() - begin
        one.process.stdin.write("\n")
        one.process.stdin.flush()
        attempts = len(lines) - 1
        while (line := one.line()) == "x":
            attempts += 1
        assert int(line) == worker
        assert 3 <= attempts <= 12, attempts
        assert cost < 0.01 * 60 * 8 / 13 * seconds / 10, f"{cost:.2f} s for {attempts} attempts"


def test_workers_that_are_ready_do_not_wait_for_one_in_a_loop(factory: Factory, tmp_path: Path) -> None:
    """A death by a task is refilled at once, also while another number rests."""
    path = tmp_path / "births"
    rt = factory(2, initializer=second_fails, initargs=(str(path),))
    until(lambda: rt._core._numbers[1].restarts.in_a_row >= 4, "number 1 rests")
    for _ in range(5):
        assert type(rt.submit(evil.misbehave, "kill").exception()) is WorkerDied
        assert rt.submit(abs, -3).result() == 3
    assert rt._core._numbers[0].restarts.in_a_row == 0


# ---- a dead zygote's workers ---------------------------------------------------------------------


def pids_of(rt: Runtime, *numbers: int) -> list[int]:
    """Of those numbers' workers that are READY."""
    found = {info.number: info.pid for info in rt.workers() if info.status is WorkerStatus.READY}
    return [found.get(number) or 0 for number in numbers]


def test_a_number_in_a_loop_keeps_no_dead_zygotes_worker(factory: Factory, tmp_path: Path) -> None:
    rt = factory(3, initializer=second_fails, initargs=(str(tmp_path),))
    until(lambda: all(pids_of(rt, 0, 2)), "two are ready")
    until(lambda: rt._core._numbers[1].restarts.in_a_row >= 3, "number 1 fails")
    before = pids_of(rt, 0, 2)
    zygote = zygote_of(before[0])
    send(zygote, signal.SIGKILL)
    until(lambda: not set(before) & set(found := pids_of(rt, 0, 2)) and all(found), "both are replaced")
    until(lambda: not rt._core._old, "nothing is left of the dead zygote")
    assert rt.submit(abs, -1).result() == 1


@pytest.mark.usefixtures("hurried")
def test_a_new_zygote_whose_workers_fail_costs_one_worker(factory: Factory, tmp_path: Path) -> None:
    """The others stay with the code that works, until the one that was replaced works again."""
    ok = tmp_path / "ok"
    ok.touch()
    rt = factory(3, initializer=fails_without, initargs=(str(ok), "raise"))
    before = set(all_ready(rt).values())
    ok.unlink()
    send(zygote_of(min(before)), signal.SIGKILL)
    until(lambda: max(it.restarts.in_a_row for it in rt._core._numbers.values()) >= 7, "one fails")
    assert len(before & set(pids_of(rt, 0, 1, 2))) == 2, "the others serve"
    assert rt.submit(own_pid).result() in before
    ok.touch()
    until(lambda: not before & set(found := pids_of(rt, 0, 1, 2)) and all(found), "all are replaced")


def test_a_pause_that_is_over_between_two_looks_is_not_slept_through() -> None:
    """The loop looks for whom to start, then for how long it may sleep; the pause ended in between."""
    now = time.monotonic()
    number = Number()
    number.restarts.not_before = now - 0.001
    looks: dict[str, Any] = {"_slots": {}, "_wanted": {0: number}, "_drained": False, "_zygote": object()}
    looks |= {"_ever_ready": True, "_stop_by": 0.0, "_reload_due": lambda now: now + 60.0}
    assert Supervisor._due(SimpleNamespace(_respawned=now - 0.002, **looks)) <= now  # type: ignore[arg-type]
    late = Supervisor._due(SimpleNamespace(_respawned=now, **looks))  # type: ignore[arg-type]
    assert late > now + 10, "it was looked at, and waits for something else"
