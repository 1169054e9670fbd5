#!/usr/bin/env python3
"""No more than so many calls a second, in all workers together: python examples/rate_limiter.py

A window is a counter in the shared state that is gone when its time is over. add() is atomic, so two workers
never get the same place; who finds the window full sleeps until the next one.
"""

from __future__ import annotations

import time
from collections import Counter

import runtime

LIMIT, WINDOW = 20, 0.25  # calls, seconds


def wait_for_a_place(what: str) -> int:
    """The number of the window in which this call may be made."""
    state = runtime.current().state
    while True:
        now = time.monotonic()
        window = int(now / WINDOW)
        if state.add(f"{what}/{window}") <= LIMIT:
            return window
        time.sleep((window + 1) * WINDOW - now)


def call(number: int) -> int:
    return wait_for_a_place("some-service")  # ... and then the request that must not come too often


def main() -> None:
    with runtime.Runtime(4) as rt:
        began = time.monotonic()
        calls = Counter(rt.map(call, range(100), chunksize=1))
        took = time.monotonic() - began
        for key, _ in rt.state.items("some-service/"):
            rt.state.delete(key)
    print(f"{calls.total()} calls in {took:.2f} s, at most {max(calls.values())} in {WINDOW} s")
    assert calls.total() == 100
    assert max(calls.values()) <= LIMIT


if __name__ == "__main__":
    main()
