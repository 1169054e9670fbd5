#!/usr/bin/env python3
"""What all workers have done, while they do it, though some are killed: python examples/work_counter.py

Each file's lines are counted by one worker; the total lies in the shared state. A task that is run again
after its worker died must not count twice: it counts in one step with the note that it has counted, under a
lock, and the next holder of a dead one's lock is told.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import runtime


def count(path: str) -> None:
    state = runtime.current().state
    lines = Path(path).read_bytes().count(b"\n")
    with state.lock("total") as lock:
        if lock.inherited:  # its last holder died in here: take the total from what was noted
            state.set("total", sum_of_notes(state))
        if state.compare_and_set(f"file/{path}", None, lines.to_bytes(8, "little")):
            state.add("total", lines)


def sum_of_notes(state: runtime.SharedState) -> bytes:
    return sum(int.from_bytes(value, "little") for _, value in state.items("file/")).to_bytes(8, "little")


def main() -> None:
    folder = Path(os.__file__).parent
    paths = sorted(str(path) for path in folder.glob("*.py"))
    with runtime.Runtime(4, retries=5) as rt:
        results = rt.map_unordered(count, paths * 5, chunksize=1)
        for done, _ in enumerate(results, 1):
            if done % 100 == 0:
                print(f"{rt.state.add('total', 0):9,} lines so far")
                pid = rt.workers()[done // 100 % 4].pid
                if pid:
                    os.kill(pid, signal.SIGKILL)
        with rt.state.lock("total") as lock:
            if lock.inherited:
                rt.state.set("total", sum_of_notes(rt.state))
        total = rt.state.add("total", 0)
    print(f"{total:9,} lines in {len(paths)} files")
    assert total == sum(Path(path).read_bytes().count(b"\n") for path in paths)


if __name__ == "__main__":
    main()
