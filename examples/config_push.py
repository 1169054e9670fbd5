#!/usr/bin/env python3
"""The host changes a setting, and all workers follow at once: python examples/config_push.py

Each worker has a task that watches the keys under "config/". A change that comes while it looks away is not
lost: what it sees next is the last value.
"""

from __future__ import annotations

import runtime

WORKERS, CHANGES = 4, 5


def follow() -> list[int]:
    """The levels that this worker has seen."""
    state, seen = runtime.current().state, []
    changes = state.watch("config/level")
    state.add("watching")
    for change in changes:
        if change.value is None:  # deleted: the end
            return seen
        seen.append(int(change.value))
        state.set(f"seen/{runtime.current().number}", change.value)
    return seen


def main() -> None:
    with runtime.Runtime(WORKERS) as rt:
        followers = [rt.submit(follow) for _ in range(WORKERS)]
        progress = rt.state.watch("seen/")
        watching = rt.state.watch("watching")
        while rt.state.add("watching", 0) < WORKERS:
            next(watching)
        for level in range(1, CHANGES + 1):
            rt.state.set("config/level", str(level).encode())
            there = 0
            while there < WORKERS:
                there += next(progress).value == str(level).encode()
            print(f"all workers use level {level}")
        rt.state.delete("config/level")
        for follower in followers:
            assert follower.result() == list(range(1, CHANGES + 1))


if __name__ == "__main__":
    main()
