"""Everything at once, for a few seconds, from a seed: kills, timeouts, cancels, maps, submits of all sizes.

In the end every future has one outcome, what was accepted has ended, every block and lease is back, and
(conftest.py) no process, thread or descriptor is left. The seed is printed; RUNTIME_STRESS_SEED sets another.
"""

from __future__ import annotations

import concurrent.futures
import gc
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import evil
import pytest
from watching import all_ready, send, settled, shut_down_clean, until

import runtime
from runtime import RegionFull, TaskCancelled, TaskTimeout, WorkerDied

pytestmark = [pytest.mark.stress, pytest.mark.timeout(120)]

SEED = int(os.environ.get("RUNTIME_STRESS_SEED", "20260601"))
SIZES = (0, 10, 100, 1_000, 5_000, 16_000, 20_000, 70_000, 300_000, 1_500_000)  # bytes


@pytest.fixture
def draw(request):
    """Random numbers of this test alone, the same in every run."""
    print(f"RUNTIME_STRESS_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


class Outcomes:
    """Counts how often each future was completed: a callback of each, and what it holds in the end."""

    def __init__(self):
        self.lock = threading.Lock()
        self.calls = Counter()
        self.futures = []

    def watch(self, future, good):
        """`good(value)` says whether a result is right."""
        with self.lock:
            self.futures.append((future, good))
        future.add_done_callback(self.called)
        return future

    def called(self, future):
        with self.lock:
            self.calls[id(future)] += 1

    def check(self, allowed, seconds=60):
        """Each has exactly one outcome, a right one, or one of these exceptions. Counts by kind."""
        kinds = Counter()
        deadline = time.monotonic() + seconds
        for future, good in self.futures:
            try:
                value = future.result(max(0.0, deadline - time.monotonic()))
            except (concurrent.futures.CancelledError, *allowed) as error:
                kinds[type(error).__name__] += 1
            else:
                assert good(value), repr(value)[:200]
                kinds["result"] += 1
            assert self.calls[id(future)] == 1
        return kinds


def echo(data, spin=0.0):
    end = time.monotonic() + spin
    while time.monotonic() < end:
        pass
    return data


def length_and_fill(data, nbytes):
    return len(data), bytes(nbytes)


def killer(rt, draw, stop, kills, pause):
    """Kill workers that run something at that moment, until told to stop."""
    while not stop.wait(draw.uniform(0.2, 1.8) * pause):
        running = [info.pid for info in rt.workers() if info.task is not None and info.pid]
        if running:
            with suppress(ProcessLookupError):
                send(draw.choice(running), signal.SIGKILL)
                kills.append(1)


def in_threads(*jobs):
    """Run them at once; the first error of any is ours."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for future in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            future.result()


def submitter(rt, draw, outcomes, count):
    for _ in range(count):
        nbytes = draw.choice(SIZES)
        data = draw.randbytes(min(nbytes, 64)) + bytes(max(0, nbytes - 64))
        what = draw.random()
        if what < 0.4:
            outcomes.watch(rt.submit(echo, data, draw.uniform(0, 0.002)), lambda v, d=data: v == d)
        elif what < 0.7:
            back = draw.choice(SIZES)
            outcomes.watch(
                rt.submit(length_and_fill, data, back),
                lambda v, d=data, b=back: v[0] == len(d) and v[1] == bytes(b),
            )
        elif what < 0.8:
            outcomes.watch(rt.options(timeout=0.05).submit(time.sleep, 0.2), lambda v: v is None)
        elif what < 0.9:
            future = outcomes.watch(rt.submit(time.sleep, 0.01), lambda v: v is None)
            if draw.random() < 0.5:
                future.cancel()
            else:
                rt.cancel(future, running=True)
        else:
            priority = draw.randrange(-2, 3)
            future = rt.options(priority=priority, retries=2).submit(evil.square, priority)
            outcomes.watch(future, lambda v, p=priority: v == p * p)
        if draw.random() < 0.02:
            with suppress(Exception):
                future = outcomes.futures[-1][0]
                future.result(1)


def mapper(rt, draw, laps, allowed):
    for _ in range(laps):
        count = draw.choice([1, 10, 100, 1000])
        nbytes = draw.choice([0, 0, 100, 20_000])
        spin = draw.choice([0.0, 0.0, 0.0003])
        items = [bytes([i % 256]) * nbytes for i in range(count)]
        chunksize = draw.choice([None, None, 1, 7, 100])
        call = draw.choice([rt.map, rt.map_unordered])
        results = call(echo, items, [spin] * count, chunksize=chunksize, return_exceptions=True)
        if draw.random() < 0.2:  # dropped in the middle
            for _ in range(draw.randrange(count)):
                next(results)
            del results
            continue
        good, bad = [], []
        for value in results:
            (bad if isinstance(value, BaseException) else good).append(value)
        assert len(good) + len(bad) == count
        assert all(isinstance(error, allowed) for error in bad), bad
        if not bad:
            assert sorted(good) == sorted(items)
            if call == rt.map:
                assert good == items


def ended(rt):
    """Nothing of it is left: futures have ended, leases and blocks are back."""
    gc.collect()
    settled(rt)
    all_ready(rt)
    shut_down_clean(rt)


def test_everything_at_once(runtime_factory, draw):
    rt = runtime_factory(2, region_size="8MiB")
    outcomes, kills, stop = Outcomes(), [], threading.Event()
    allowed = (WorkerDied, TaskTimeout, TaskCancelled)
    seeds = [random.Random(draw.random()) for _ in range(5)]
    killing = threading.Thread(target=killer, args=(rt, seeds[4], stop, kills, 0.15))
    killing.start()
    try:
        in_threads(
            lambda: submitter(rt, seeds[0], outcomes, 150),
            lambda: submitter(rt, seeds[1], outcomes, 150),
            lambda: mapper(rt, seeds[2], 12, allowed),
            lambda: mapper(rt, seeds[3], 12, allowed),
        )
        kinds = outcomes.check(allowed)
    finally:
        stop.set()
        killing.join()
    print(dict(kinds), len(kills), "kills", rt.stats())
    assert kinds["result"] > 100
    assert kills
    assert rt.stats().done + rt.stats().failed + rt.stats().cancelled == rt._core.dispatcher.accepted
    outcomes.futures.clear()
    ended(rt)


def test_kills_with_retries_lose_nothing(runtime_factory, draw):
    """Every task and item has its result, whatever is killed meanwhile."""
    rt = runtime_factory(2, retries=1000, preload=["evil", __name__])  # no attempt dies of an import
    outcomes, kills, stop = Outcomes(), [], threading.Event()
    killing = threading.Thread(target=killer, args=(rt, draw, stop, kills, 0.05))
    killing.start()

    def submit():
        for i in range(400):
            outcomes.watch(rt.submit(evil.square, i), lambda v, i=i: v == i * i)

    def map_all(chunksize):
        for lap in range(3):
            count = 3000
            assert list(rt.map(evil.square, range(count), chunksize=chunksize)) == [
                i * i for i in range(count)
            ], lap

    try:
        in_threads(submit, submit, lambda: map_all(None), lambda: map_all(20))
        for _ in range(200):
            outcomes.watch(rt.submit(echo, b"", 0.01), lambda v: v == b"")
        kinds = outcomes.check(())
    finally:
        stop.set()
        killing.join()
    print(dict(kinds), len(kills), "kills", rt.stats())
    assert kinds == {"result": 1000}
    assert kills
    assert rt.stats().failed == 0
    ended(rt)


def test_timeouts_near_the_end_of_tasks_hit_nobody_else(runtime_factory, draw):
    """Tasks that end just when their time is up, with innocents behind them."""
    rt = runtime_factory(2)
    outcomes = Outcomes()
    near = [
        outcomes.watch(
            rt.options(timeout=0.02).submit(echo, i, draw.uniform(0.015, 0.025)), lambda v, i=i: v == i
        )
        for i in range(100)
    ]
    innocents = [outcomes.watch(rt.submit(evil.square, i), lambda v, i=i: v == i * i) for i in range(400)]
    kinds = outcomes.check((TaskTimeout,))
    print(dict(kinds))
    assert all(f.exception() is None for f in innocents)
    assert sum(kinds.values()) == len(near) + len(innocents)
    del near, innocents
    outcomes.futures.clear()
    ended(rt)


def test_cancels_race_with_starts_and_ends(runtime_factory, draw):
    rt = runtime_factory(2)
    all_ready(rt)
    outcomes = Outcomes()
    said = []
    for i in range(600):
        future = outcomes.watch(rt.submit(echo, i, draw.choice([0.0, 0.0005])), lambda v, i=i: v == i)
        for _ in range(draw.randrange(3)):
            evil.square(2)
        if draw.random() < 0.7:
            said.append((future, future.cancel()))
        if draw.random() < 0.02:
            said.append((future, rt.cancel(future, running=True)))
    kinds = outcomes.check((TaskCancelled,))
    print(dict(kinds))
    for future, cancelled in said:
        if cancelled:
            assert future.cancelled() or isinstance(future.exception(), TaskCancelled)
    settled(rt)
    del said, future
    outcomes.futures.clear()
    ended(rt)


def test_a_full_region_with_kills(runtime_factory, draw):
    """Arguments and results of several times the region's size: slow, never stuck, nothing lost."""
    rt = runtime_factory(2, region_size="1MiB", retries=1000)
    outcomes, kills, stop = Outcomes(), [], threading.Event()
    killing = threading.Thread(target=killer, args=(rt, draw, stop, kills, 0.2))
    killing.start()
    seeds = [random.Random(draw.random()) for _ in range(2)]

    def submit(draw):
        for _ in range(25):
            data = draw.randbytes(32) * draw.choice([1_000, 10_000, 50_000])
            outcomes.watch(rt.submit(echo, data), lambda v, d=data: v == d)

    try:
        in_threads(*(lambda d=d: submit(d) for d in seeds))
        kinds = outcomes.check((RegionFull,))
    finally:
        stop.set()
        killing.join()
    print(dict(kinds), len(kills), "kills", rt.stats())
    assert kinds == {"result": 50}
    outcomes.futures.clear()
    ended(rt)


def test_recycling_under_load_loses_nothing(runtime_factory, tmp_path):
    path = str(tmp_path / "log")
    rt = runtime_factory(2, max_tasks_per_child=7)
    futures = [rt.submit(evil.counted, path, i) for i in range(100)]
    items = list(rt.map(evil.counted, [path] * 100, range(100, 200)))
    assert [f.result(60) for f in futures] + items == list(range(200))
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    started = Counter(int(key) for kind, key, _ in lines if kind == "S")
    assert started == Counter(range(200)), "each ran exactly once"
    per_process = Counter(pid for kind, _, pid in lines if kind == "S")
    assert max(per_process.values()) <= 7
    ended(rt)


def test_runtimes_side_by_side(runtime_factory, draw):
    """Several runtimes in one process, used from several threads, ended in any order."""

    def one(seed):
        own = random.Random(seed)
        with runtime.Runtime(1) as rt:
            futures = [rt.submit(evil.square, i) for i in range(100)]
            if own.random() < 0.5:
                send(all_ready(rt)[0], signal.SIGKILL)
            results = [f.exception(60) or f.result() for f in futures]
            assert all(isinstance(r, WorkerDied) or r == i * i for i, r in enumerate(results))
            assert sum(isinstance(r, WorkerDied) for r in results) <= 1
            settled(rt)
        assert rt._core.arena.owners() == {}

    for _ in range(3):
        seeds = [draw.random() for _ in range(4)]
        in_threads(*(lambda s=s: one(s) for s in seeds))


def test_shutdown_in_the_middle(runtime_factory, draw):
    """Whatever way it ends, every future that was handed out gets its outcome."""
    for how in ("shutdown", "cancel", "kill", "terminate", "shutdown"):
        rt = runtime_factory(2)
        outcomes, refused = Outcomes(), []

        def submit(rt=rt, outcomes=outcomes, refused=refused):
            with suppress(RuntimeError):
                for i in range(3000):
                    outcomes.watch(rt.submit(evil.square, i), lambda v, i=i: v == i * i)
                return
            refused.append(1)

        def end(rt=rt, outcomes=outcomes, how=how):
            until(lambda: len(outcomes.futures) > 200, "they submit")
            if how == "shutdown":
                rt.shutdown()
            elif how == "cancel":
                rt.shutdown(cancel_futures=True)
            elif how == "kill":
                rt.kill_workers()
            else:
                rt.terminate_workers()

        in_threads(submit, submit, end)
        kinds = outcomes.check((runtime.BrokenRuntime,) if how in ("kill", "terminate") else (), 30)
        print(how, dict(kinds), len(refused))
        if how == "shutdown":
            assert set(kinds) == {"result"}
        rt.shutdown()
        outcomes.futures.clear()
        assert rt._core.arena.owners() == {}
