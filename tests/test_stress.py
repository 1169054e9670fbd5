"""Runtimes that are made, used and ended by several threads at once, from a seed.

(Kills, timeouts, cancels and all the rest at once are the storm of tests/promises.) The seed is printed;
RUNTIME_STRESS_SEED sets another.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress

import evil
import pytest
from watching import all_ready, send, settled, until

import runtime
from runtime import WorkerDied

pytestmark = [pytest.mark.stress, pytest.mark.timeout(120)]

SEED = int(os.environ.get("RUNTIME_STRESS_SEED", "20260601"))


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


def in_threads(*jobs):
    """Run them at once; the first error of any is ours."""
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for future in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            future.result()


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
