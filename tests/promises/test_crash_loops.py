"""Promise 14, the other half: what crashes again and again in one slot takes no time from the others.

The CPU that a crash loop costs is measured by a test of its own. Here two runtimes take turns, one of them
with a second worker that dies whenever it is started: worker 0 needs as long for a task in both.
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time

from watching import all_ready, until

import runtime

TASKS = 40  # in a turn
TURNS = 12
ROUNDS = 3  # of turns, at most: what else runs here may slow one of the two down for a while


def crash(how, path):
    """An initializer: worker 1 dies, in some way, before it is ready or as soon as it is."""
    if runtime.current().number != 1:
        return
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.write(fd, b".")
    os.close(fd)
    if how == "exit":
        os._exit(3)
    if how == "idle":
        threading.Timer(0.001, os._exit, (3,)).start()
        return
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSEGV)
    while True:  # the signal is on its way
        pass


def spin():
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass
    return runtime.current().number


def turn(rt):
    """Seconds for each of some tasks, one after another."""
    took = []
    for _ in range(TASKS):
        begin = time.perf_counter()
        rt.submit(spin).result(30)
        took.append(time.perf_counter() - begin)
    return took


def slowed(healthy, looping):
    """How much longer tasks take beside a crash loop: (medians, sums)."""
    alone, beside = [], []
    for _ in range(TURNS):
        alone += turn(healthy)
        beside += turn(looping)
    return statistics.median(beside) / statistics.median(alone), sum(beside) / sum(alone)


def test_a_crash_loop_does_not_slow_the_other_slots(tally, runtime_factory, tmp_path):
    healthy = runtime_factory(1)
    all_ready(healthy)
    while tally.more():
        for how in ("exit", "kill", "segfault", "idle"):
            note = tmp_path / f"{how}-{tally.counts['kinds']}"
            looping = runtime_factory(2, initializer=crash, initargs=(how, str(note)), retries=1000)
            until(lambda rt=looping: rt.submit(os.getpid).result(30), "worker 0 works")
            for last in range(1, ROUNDS + 1):  # a loop that took time from the others would take it each time
                ratio, in_all = slowed(healthy, looping)
                crashes = len(note.read_bytes())
                print(f"{how}: {crashes} crashes, tasks take {ratio:.3f} × (median), {in_all:.3f} × (in all)")
                if ratio <= 1.25 and in_all <= 2:
                    break
                assert last < ROUNDS, (how, ratio, in_all)
            assert crashes >= 3, "there was no loop"
            looping.shutdown(cancel_futures=True)
            tally.counts["kinds"] += 1
            tally.counts["crashes"] += crashes
