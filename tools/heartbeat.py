#!/usr/bin/env python3
"""Says when the machine stood still: one process for each usable processor, that wakes up every 2 ms.

    python tools/heartbeat.py FILE      until its standard input is closed

A line of FILE is [begin, end] in monotonic seconds: when a beat was due, and when it came at last, if that
was more than 10 ms later. `make soak` holds promised times against these lines: who is late must have an
alibi. Nothing of the runtime is imported or started here, so it cannot be what holds up the beats.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

BEAT = 0.002  # seconds
STALL = 0.010  # seconds that a beat must come late to be written down


def beat(fd: int) -> None:
    """Until our standard input is closed."""
    poller = select.poll()
    poller.register(0, select.POLLHUP | select.POLLIN)
    while True:
        due = time.monotonic() + BEAT
        if poller.poll(BEAT * 1000):
            return
        now = time.monotonic()
        if now > due + STALL:
            os.write(fd, f"{json.dumps([due, now])}\n".encode())


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: heartbeat.py FILE")
    fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    first, *others = sorted(os.sched_getaffinity(0))
    children = []
    for cpu in others:
        child = os.fork()
        if child == 0:
            os.sched_setaffinity(0, {cpu})
            beat(fd)
            os._exit(0)
        children.append(child)
    os.sched_setaffinity(0, {first})
    beat(fd)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
