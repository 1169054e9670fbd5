"""Both ways to tell the other side: through the memory while it is awake, by zmq when it sleeps.

Whatever the way, nothing may wait for the backstop: `rescued` stays 0. These tests, and those of crashes and
maps, run both ways: RUNTIME_LANES=off is a step of .ci/run.
"""

from __future__ import annotations

import concurrent.futures
import marshal
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import evil
import pytest
from tasks import Gate, echo, pass_through
from watching import all_ready, run_script, send, settled, until

import runtime


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch, runtime_factory: Any) -> Any:
    """A runtime whose waiters watch for a microsecond only, so that nearly every hand-over meets a park."""
    monkeypatch.setenv("RUNTIME_SPIN", "1")
    return runtime_factory


def hand_over(rt: runtime.Runtime, count: int, seed: int) -> None:
    """So many tasks, with pauses about as long as it takes to fall asleep."""
    chance = random.Random(seed)
    done = 0
    while done < count:
        burst = chance.choice([1, 1, 1, 2, 3, 10])
        futures = [rt.submit(echo, done + i) for i in range(burst)]
        if chance.random() < 0.3:
            concurrent.futures.wait(futures, 30)  # sleeps on the lock instead of looking
        assert [f.result(30) for f in futures] == [done + i for i in range(burst)]
        done += burst
        until_ns = time.perf_counter_ns() + chance.randrange(60_000)
        while time.perf_counter_ns() < until_ns:
            pass


def test_no_wake_up_is_lost_between_park_and_unpark(restless: Any) -> None:
    rt = restless(2)
    hand_over(rt, 4_000, 1)
    stats = rt.stats()
    assert stats.rescued == 0
    assert stats.lane + stats.message >= stats.done >= 4_000  # one that was taken back is leased again
    assert stats.message > 100  # it did fall asleep


HAND_OVERS = int(os.environ.get("RUNTIME_HAND_OVERS", "60000"))  # a million takes a minute or two


@pytest.mark.stress
@pytest.mark.timeout(60 + HAND_OVERS // 1000)
@pytest.mark.parametrize("threads", [1, 3])
def test_no_wake_up_is_lost_in_many_hand_overs(restless: Any, threads: int) -> None:
    rt = restless(2)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(hand_over, rt, HAND_OVERS // threads, seed) for seed in range(threads)]:
            future.result()
    stats = rt.stats()
    assert stats.rescued == 0
    assert stats.message > 1000 and stats.lane > 1000


def test_who_is_awake_needs_no_message(rt: runtime.Runtime) -> None:
    futures = [rt.submit(echo, i) for i in range(5_000)]
    assert [f.result(30) for f in futures] == list(range(5_000))
    stats = rt.stats()
    assert stats.lane + stats.message >= 5_000
    assert stats.lane > stats.message > 0  # the first one found its worker asleep
    assert stats.rescued == 0


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, runtime_factory: Any) -> runtime.Runtime:
    """A runtime without lanes."""
    monkeypatch.setenv("RUNTIME_LANES", "off")
    return runtime_factory(2)


def test_without_lanes_a_message_announces_each_lease(messages: runtime.Runtime) -> None:
    assert sorted(messages.map_unordered(abs, range(2_000))) == list(range(2_000))
    futures = [messages.submit(echo, i, b"x" * 40_000) for i in range(50)]
    assert [f.result(30)[0] for f in futures] == list(range(50))
    stats = messages.stats()
    assert (stats.lane, stats.rescued) == (0, 0)
    assert stats.message >= stats.done == 2_050


def test_without_lanes_a_dead_worker_is_replaced(messages: runtime.Runtime) -> None:
    doomed = messages.submit(evil.misbehave, "kill")
    futures = [messages.submit(evil.square, i) for i in range(100)]
    assert isinstance(doomed.exception(30), runtime.WorkerDied)
    assert [f.result(30) for f in futures] == [i * i for i in range(100)]
    settled(messages)


@pytest.mark.parametrize(
    ("name", "value"), [("RUNTIME_LANES", "maybe"), ("RUNTIME_SPIN", "-1"), ("RUNTIME_SPIN", "1e9")]
)
def test_environment_that_cannot_be_meant(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        runtime.Runtime(1)


def test_nobody_watches_with_one_cpu(tmp_path: Path) -> None:
    out = run_script(
        tmp_path,
        """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import runtime
        with runtime.Runtime(2) as rt:
            assert rt.submit(abs, -1).result(30) == 1
            print("spin", rt._core.arena.spin)
        """,
    )
    assert "spin 0" in out


# ---- fairness ------------------------------------------------------------------------------------


def test_a_long_task_holds_no_short_ones_behind_it(rt: runtime.Runtime, gate: Gate) -> None:
    """Some of the short ones are leased to the worker that is busy: they are taken back."""
    all_ready(rt)
    dispatcher = rt._core.dispatcher
    slow = rt.submit(pass_through, gate.path, "slow")
    until(slow.running, "the long task runs")
    (busy,) = [w.slot for w in rt.workers() if w.task is not None]
    behind = 0
    short = []
    for _ in range(1_000):
        short.append(rt.submit(os.getpid))
        behind = max(behind, dispatcher.look(busy)[4])
    pids = {f.result(30) for f in short}
    assert not slow.done()
    assert behind > 1
    assert pids <= {w.pid for w in rt.workers() if w.slot != busy} | pids
    assert all(w.pid not in pids for w in rt.workers() if w.slot == busy)
    gate.open()
    assert slow.result(30) == "slow"
    assert rt.stats().rescued == 0


# ---- idle ----------------------------------------------------------------------------------------

IDLE = """
import os, time, runtime

def switches():
    total = 0
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                lines = open(f"/proc/{pid}/task/{task}/status").read().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total

def children(pid):
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in open(f"/proc/{pid}/task/{task}/children").read().split():
            found += [int(child), *children(int(child))]
    return found

with runtime.Runtime(2) as rt:
    assert list(rt.map(abs, range(100))) == list(range(100))
    pids = [os.getpid(), *children(os.getpid())]
    assert len(pids) == 4, pids
    time.sleep(1.0)  # until everybody has fallen asleep
    before, began = switches(), time.monotonic()
    time.sleep(3.0)  # this is what is measured
    print("switches", (switches() - before) / (time.monotonic() - began))
"""


def test_an_idle_runtime_sleeps(tmp_path: Path) -> None:
    """Fewer than 20 wake-ups a second, of all threads of all its processes."""
    out = run_script(tmp_path, IDLE)
    assert float(out.split("switches ")[1].split()[0]) < 20


# ---- threads that need a result ------------------------------------------------------------------


def test_many_threads_look_for_their_own_results(rt: runtime.Runtime) -> None:
    def ask(number: int) -> None:
        for i in range(300):
            assert rt.submit(echo, number, i).result(30) == (number, i)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(ask, number) for number in range(8)]:
            future.result()
    assert rt.stats().rescued == 0


def test_a_callback_runs_in_the_collector_whoever_looks(rt: runtime.Runtime) -> None:
    where: list[str] = []
    for i in range(200):
        future = rt.submit(echo, i)
        future.add_done_callback(lambda _: where.append(threading.current_thread().name))
        assert future.result(30) == i
    until(lambda: len(where) == 200, "all were called back")
    mine = threading.current_thread().name
    # One that was added to a future that was done already runs at once, here: as the stdlib's.
    assert set(where) <= {"runtime-collector", mine}


def test_a_worker_that_is_stopped_while_it_watches(rt: runtime.Runtime) -> None:
    """It holds nothing back, and goes on as if nothing had been."""
    pids = all_ready(rt)
    for _ in range(5):
        for i in range(20):
            assert rt.submit(echo, i).result(30) == i
        send(pids[0], signal.SIGSTOP)
        futures = [rt.submit(echo, i) for i in range(50)]
        try:
            assert [f.result(30) for f in futures] == list(range(50))
        finally:
            send(pids[0], signal.SIGCONT)
    assert all_ready(rt) == pids


# ---- plain values --------------------------------------------------------------------------------

PLAIN: list[Any] = [
    None, True, False, 0, -1, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**200), 2**10000,
    0.0, -0.0, 1e308, float("inf"), "", "ascii", "ü€😀", "\ud800", "x" * 300,
    b"", b"\0" * 300, (), (1, (2, (3,))), [], [1, [2.5, "x"]], {},
    {"a": 1, 2: [None], (3, "b"): {"c": b"d"}}, [True] * 200, {i: str(i) for i in range(100)},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20])
def test_plain_values_there_and_back(pool: runtime.Runtime, value: Any) -> None:
    future = pool.submit(echo, value)
    until(future.done, "the call has ended")  # so it is the dispatcher that has taken it in
    back = future.result()
    assert (type(back), repr(back)) == (type(value), repr(value))


def test_what_comes_back_is_ones_own(pool: runtime.Runtime) -> None:
    """Nothing that can change is shared between results, or with the caller."""
    value = [1, [2]]
    first, second = (pool.submit(echo, value).result(30) for _ in range(2))
    first[1].append(3)
    assert (value, second) == ([1, [2]], [1, [2]])
    rows = list(pool.map(echo, [value, value, (1, 2)]))
    rows[0].append(4)
    assert rows[1:] == [[1, [2]], (1, 2)]


def test_damaged_plain_values_are_refused() -> None:
    """Whatever a worker leaves there: a value, or a clean error, and no memory for lengths that lie."""
    from runtime._core import unpack_plain

    chance = random.Random(7)
    for value in PLAIN:
        raw = marshal.dumps(value, 2)
        assert repr(unpack_plain(raw)) == repr(value)
        for _ in range(300):
            torn = bytearray(raw)
            for _ in range(chance.randrange(1, 4)):
                action = chance.randrange(3)
                if action == 0 and torn:
                    torn[chance.randrange(len(torn))] = chance.randrange(256)
                elif action == 1:
                    del torn[chance.randrange(len(torn) + 1) :]
                else:
                    torn[chance.randrange(len(torn) + 1) : 0] = chance.randbytes(5)
            try:
                unpack_plain(torn)
            except (ValueError, EOFError, TypeError):
                pass
