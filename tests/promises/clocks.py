"""A process whose wall clock is stepped by an hour, again and again, while all that waits does.

`main()` with a JSON object as its argument, under the shim of tests/clock.c; test_wall_clock.py starts it.

    {"path": the file that shifts the clock, "seed": text, "steps": n, "seconds": s}     until one is reached

In a round all steps go one way, so that forwards nothing may end too early, and backwards nothing too late.
How long everything took is measured by the monotonic clock.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from watching import all_ready, send, settled, until

import runtime
from runtime import LockTimeout, TaskTimeout, WorkerDied

HOUR = 3600
LATE = 10.0  # seconds that anything may be late on a busy machine: no hour
WORKERS = 3
DRAIN = 1.0  # seconds that a worker has to drain
FAILING = "CLOCKS_FAILING"  # in the environment: a file; while it is there, worker 1 does not start


class Clock:
    """The wall clock of this process and its descendants."""

    def __init__(self, path):
        self.path = path
        self.seconds = 0

    def step(self, seconds):
        self.seconds += seconds
        with open(self.path, "r+b", buffering=0) as file:
            file.write(struct.pack("q", self.seconds))


class Steps(threading.Thread):
    """Steps in one direction, until told to stop."""

    def __init__(self, clock, draw, counts):
        super().__init__(name="steps")
        self.clock, self.draw, self.counts = clock, draw, counts
        self.way = -HOUR if counts["rounds"] % 2 else HOUR
        self.ending = threading.Event()

    def run(self):
        while not self.ending.wait(self.draw.uniform(0.02, 0.08)):
            self.clock.step(self.way)
            self.counts["steps"] += 1

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self.ending.set()
        self.join()


def within(what, began, least, most=LATE):
    """It took as long as it had to."""
    took = time.monotonic() - began
    assert least <= took <= least + most, f"{what} took {took:.3f} s, not {least:g}"


# ---- in the workers --------------------------------------------------------------------------------------


def setup():
    """Worker 1 fails while it is told to; each attempt is noted."""
    path = Path(os.environ[FAILING])
    if runtime.current().number == 1 and path.exists():
        with path.open("ab", buffering=0) as file:
            file.write(b"x")
        raise ValueError("as it was told")


def wall_clock():
    return time.time()


def hang():
    while True:
        time.sleep(60)


def die(path):
    with open(path, "ab", buffering=0) as file:
        file.write(b"x")
    os.kill(os.getpid(), signal.SIGKILL)


# ---- what waits ------------------------------------------------------------------------------------------


def deadline(rt, key):
    began = time.monotonic()
    error = rt.options(timeout=0.4).submit(hang).exception(2 * LATE)
    assert type(error) is TaskTimeout, error
    within("a deadline", began, 0.4)


def no_deadline(rt, key):
    """One that is far away does not come."""
    assert rt.options(timeout=600).submit(time.sleep, 0.4).result(600) is None


def result(rt, key):
    future, began = rt.submit(hang), time.monotonic()
    with pytest.raises(TimeoutError):
        future.result(0.3)
    within("result(timeout=)", began, 0.3)
    assert rt.cancel(future, running=True)


def items(rt, key):
    began = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        list(rt.options(timeout=LATE).map(time.sleep, [0.1, 2.0], chunksize=1, timeout=0.3))
    assert not isinstance(caught.value, TaskTimeout), "map(timeout=) is not the task's"
    within("map(timeout=)", began, 0.3)


def retries(rt, key):
    """The first at once, then after a pause that doubles."""
    with tempfile.NamedTemporaryFile() as file:
        began = time.monotonic()
        error = rt.options(retries=3).submit(die, file.name).exception(2 * LATE)
        assert type(error) is WorkerDied and error.attempts == 4, error
        assert os.path.getsize(file.name) == 4
        within("three retries", began, 0.05 + 0.1)


def ttl(rt, key):
    began = time.monotonic()
    rt.state.set(key, b"short", ttl=0.3)
    rt.state.set(f"{key} long", b"long", ttl=600)
    until(lambda: rt.state.get(key) is None, "it has expired", 2 * LATE)
    within("a ttl", began, 0.3)
    assert rt.state.get(f"{key} long") == b"long"
    rt.state.delete(f"{key} long")


def lock(rt, key):
    with rt.state.lock(key), ThreadPoolExecutor(1) as other:
        began = time.monotonic()
        error = other.submit(lambda: rt.state.lock(key, timeout=0.3).__enter__()).exception(2 * LATE)
        assert type(error) is LockTimeout, error
        within("a lock's timeout", began, 0.3)
        began = time.monotonic()
        with pytest.raises(LockTimeout):
            asyncio.run(enter(rt.state.alock(key, timeout=0.3)))
        within("a lock's timeout in asyncio", began, 0.3)


async def enter(lock):
    async with lock:
        pass


WAITS = (deadline, no_deadline, result, items, retries, ttl, lock)


def back_off(rt, key):
    """A worker that does not start is tried less and less often, and soon after its fault is mended."""
    path = Path(os.environ[FAILING])
    pids = all_ready(rt)
    path.touch()
    began = time.monotonic()
    send(pids[1], signal.SIGKILL)
    until(lambda: path.stat().st_size >= 5, "five attempts")
    # 0.05 s before the second, twice as long each time, less a fifth; a death after work is free.
    within("the back-off", began, 0.8 * (0.05 + 0.1 + 0.2 + 0.4))
    path.unlink()
    all_ready(rt)


def draining(rt, key):
    """Two reloads: of workers that finish in time, and of one that does not."""
    all_ready(rt)
    short = [rt.submit(time.sleep, 0.2) for _ in range(WORKERS)]
    report = rt.reload()
    assert (report.started, report.killed) == (WORKERS, 0), report
    assert [future.result(LATE) for future in short] == [None] * WORKERS
    hung = rt.submit(hang)
    until(hung.running, "it runs")
    began = time.monotonic()
    report = rt.reload()
    assert (report.started, report.killed) == (WORKERS, 1), report
    within("a drain", began, DRAIN, 3 * LATE)
    assert type(hung.exception(LATE)) is WorkerDied


# ---- rounds ----------------------------------------------------------------------------------------------


def shifted(rt, clock):
    """The shim does what it should, in the host and in workers."""
    begin, began = time.time(), time.monotonic()
    clock.step(HOUR)
    assert HOUR <= time.time() - begin < HOUR + LATE and time.monotonic() - began < LATE
    assert HOUR <= rt.submit(wall_clock).result() - begin < HOUR + LATE, "workers have another clock"
    clock.step(-HOUR)


def one_round(rt, clock, draw, counts):
    all_ready(rt)
    shifted(rt, clock)
    with Steps(clock, draw, counts), ThreadPoolExecutor(len(WAITS)) as pool:
        waiting = {wait.__name__: pool.submit(wait, rt, f"{wait.__name__} {counts}") for wait in WAITS}
        for future in waiting.values():
            future.result()
        for wait in (back_off, draining):
            wait(rt, "")
    settled(rt)
    counts["waits"] += len(WAITS) + 2
    counts["rounds"] += 1
    clock.step(-clock.seconds)


def main():
    options = json.loads(sys.argv[1])
    draw, counts, clock = random.Random(options["seed"]), Counter(), Clock(options["path"])
    os.environ[FAILING] = options["path"] + ".failing"
    end = time.monotonic() + options["seconds"] if options["seconds"] else float("inf")
    with runtime.Runtime(WORKERS, initializer=setup, preload=["clocks"], drain_timeout=DRAIN) as rt:
        while counts["steps"] < options["steps"] and time.monotonic() < end:
            one_round(rt, clock, draw, counts)
    print(json.dumps(counts))
