"""Promise 11: hung code is stopped 100 ms after its deadline at most.

Two tasks hang at once, one of them in C with the worker's GIL held. Each second time the host's own GIL is
held in C as well, from before the deadlines until both processes are gone: the deadline thread has to do
without it, and it is poll(2) on the workers' pidfds, called with the GIL held, that says when they ended.
"""

from __future__ import annotations

import ctypes
import os
import select
import time

import hanging
from watching import alive, all_ready, settled, until

from runtime import TaskTimeout

WITHIN = 0.1  # seconds, promised
TIMEOUT = 0.25


class PollFd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]


def poll_with_gil(fd, seconds):
    """Until the descriptor is ready; no other thread of this process runs Python meanwhile."""
    one = PollFd(fd, select.POLLIN, 0)
    return ctypes.PyDLL(None).poll(ctypes.byref(one), 1, int(seconds * 1000))


def poll_without(fd, seconds):
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return len(poller.poll(seconds * 1000))


def beginnings(path, count):
    def found():
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return {int(pid): float(at) for pid, at in map(str.split, lines)} if len(lines) >= count else {}

    return until(found, "the tasks have begun")


def test_hung_code_is_stopped_at_its_deadline(tally, runtime_factory, tmp_path):
    rt = runtime_factory(2)
    while tally.more():
        wait = poll_with_gil if tally.counts["hung"] % 4 else poll_without
        pidfds = {pid: os.pidfd_open(pid) for pid in all_ready(rt).values()}
        try:
            path = tmp_path / f"began{tally.counts['hung']}"
            tasks = [tally.random.choice(hanging.PYTHON), tally.random.choice(hanging.HOLDING_THE_GIL)]
            futures = [rt.options(timeout=TIMEOUT).submit(task, str(path)) for task in tasks]
            begun = beginnings(path, 2)
            assert begun.keys() == pidfds.keys(), "each has a worker of its own"
            # The first to end is looked at first, so that neither hides the other's end.
            for pid, at in sorted(begun.items(), key=lambda item: item[1]):
                assert wait(pidfds[pid], 20), f"{[task.__name__ for task in tasks]}: {pid} still runs"
                tally.timed("stopped after the deadline", WITHIN, at + TIMEOUT, time.monotonic())
            errors = [future.exception(20) for future in futures]
            assert [type(error) for error in errors] == [TaskTimeout] * 2, errors
            assert not any(alive(pid) for pid in begun)
        finally:
            for fd in pidfds.values():
                os.close(fd)
        tally.counts["hung"] += 2
        tally.counts["holding the GIL"] += 1
        until(lambda pidfds=pidfds: not pidfds.keys() & set(all_ready(rt).values()), "both are replaced")
    settled(rt)
