"""Promises 6 to 8: the state of a runtime whose workers are killed, and stopped, while they use it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import sealing
from linearizable import linearizable
from test_state_linearizable import record
from watching import all_ready, send, settled, stopped, until

from runtime import LockTimeout, SharedRegion, SharedState, WorkerDied


def test_values_are_never_torn(tally, runtime_factory):
    """Kills at any instruction of workers that write; one of them is stopped all the while."""
    rt = runtime_factory(3)
    free = rt.state.bytes_free()
    tasks = {}

    def begin(seed):
        tasks[seed] = rt.submit(sealing.write, seed)

    for seed in range(3):
        begin(seed)
    until(lambda: all(info.task is not None for info in rt.workers()), "all write")
    still = rt.workers()[0].pid
    send(still, signal.SIGSTOP)
    until(lambda: stopped(still), "it is stopped")
    while tally.more():
        before = {seed: rt.state.add(f"ops {seed}", 0) for seed in tasks}
        until(
            lambda before=before: (
                sum(rt.state.add(f"ops {n}", 0) > old + 20 for n, old in before.items()) >= 2
            ),
            "both others write",
        )
        pid = tally.random.choice([info.pid for info in rt.workers() if info.pid not in (None, still)])
        time.sleep(tally.random.random() * 0.001)  # whatever instruction it is at
        send(pid, signal.SIGKILL)
        until(lambda: any(task.done() for task in tasks.values()), "its task is over")
        for key, value in rt.state.items("key "):
            sealing.check_sealed(str(key), value)
        for seed, task in list(tasks.items()):
            if task.done():
                assert isinstance(task.exception(), WorkerDied)
                begin(seed)
        tally.counts["kills"] += 1
    for task in tasks.values():
        until(lambda task=task: rt.cancel(task, running=True) or task.done(), "it is ended")
    settled(rt)
    until(lambda: still not in all_ready(rt).values(), "those that wrote are gone")
    rt.state.sweep()
    for key, _ in rt.state.items():
        rt.state.delete(key)
    rt.state.sweep()
    units = rt.state.region.load_u64(32)
    assert rt.state.bytes_free() + sealing.chunks(rt.state) * units == free


def test_histories_are_linearizable(tally):
    """Of four processes at one key, two of which are killed in each second history."""
    region = SharedRegion.create(1 << 15)
    state = SharedState.create(region)
    while tally.more():
        history = record(state, tally.random.randrange(1 << 30), kills=tally.counts["histories"] % 2 == 0)
        assert linearizable(history, None), history
        state.sweep()
        state.delete("k")
        tally.counts["histories"] += 1
    region.close()


def test_a_dead_holders_lock_passes_on(tally, runtime_factory):
    """In 10 ms; that of a living one, and of a stopped one, never."""
    rt = runtime_factory(2)
    with rt.state.lock("ours"):
        while tally.more():
            holding = rt.submit(sealing.hold, "key")
            holder = int(until(lambda: rt.state.get("holder"), "it is held"))
            waiting = rt.submit(sealing.wait_for, "key")
            until(lambda: "waiting" in rt.state, "somebody waits")
            if tally.counts["locks"] % 10 == 0:
                send(holder, signal.SIGSTOP)
                until(lambda holder=holder: stopped(holder), "it is stopped")
                with pytest.raises(LockTimeout), rt.state.lock("key", 0.02):
                    pass
            watched = os.pidfd_open(holder)
            killed = time.monotonic()
            signal.pidfd_send_signal(watched, signal.SIGKILL)
            os.close(watched)
            passed, inherited = waiting.result(30)
            assert inherited and isinstance(holding.exception(30), WorkerDied)
            tally.timed("passed on", 0.010, killed, passed)
            with pytest.raises(LockTimeout), rt.state.lock("ours", 0):
                pass
            rt.state.delete("holder")
            rt.state.delete("waiting")
            tally.counts["locks"] += 1
            until(lambda: len(all_ready(rt)) == 2, "it is replaced")
