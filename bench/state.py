"""SharedState beside a dict behind a threading.Lock: python -m bench.state [--quick]

All rows of a round run one after another, and rounds are repeated: each ratio is the median of all rounds.
64-byte values, 1,000 keys. "pair": two processes on different keys of one map, against two on a map each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable

from runtime import SharedRegion, SharedState

KEYS = 1000


def timed(call: Callable[[int], object], times: int) -> float:
    """ns a call."""
    begin = time.perf_counter_ns()
    call(times)
    return (time.perf_counter_ns() - begin) / times


def cases(state: SharedState) -> dict[str, Callable[[int], object]]:
    lock, table = threading.Lock(), {f"key{i}": os.urandom(64) for i in range(KEYS)}
    keys = list(table)
    value = os.urandom(64)
    for key in keys:
        state.set(key, table[key])

    def base(n: int) -> None:
        for i in range(n):
            with lock:
                table[keys[i % KEYS]]

    def get(n: int) -> None:
        for i in range(n):
            state.get(keys[i % KEYS])

    def add(n: int) -> None:
        for _ in range(n):
            state.add("n")

    def put(n: int) -> None:
        for i in range(n):
            state.set(keys[i % KEYS], value)

    def bare(n: int) -> None:
        for _ in range(n):
            with threading.Lock():
                pass

    def locked(n: int) -> None:
        for _ in range(n):
            with state.lock("l"):
                pass

    return {"dict": base, "get": get, "add": add, "set": put, "Lock": bare, "lock": locked}


def pair(states: list[SharedState], times: int) -> float:
    """Seconds that two processes take to set keys of their own."""
    pids = []
    begin = time.perf_counter()
    for number, state in enumerate(states):
        pid = os.fork()
        if pid == 0:
            keys = [f"{number} {i}" for i in range(KEYS)]
            value = bytes(64)
            for i in range(times):
                state.set(keys[i % KEYS], value)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.state")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the work")
    times, rounds = (1000, 3) if parser.parse_args().quick else (100_000, 9)
    regions = [SharedRegion.create(4 << 20) for _ in range(3)]
    maps = [SharedState.create(region) for region in regions]
    calls = cases(maps[0])
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            found.setdefault(name, []).append(timed(call, times))
        found.setdefault("pair", []).append(pair([maps[1], maps[1]], 10 * times))
        found.setdefault("apart", []).append(pair([maps[1], maps[2]], 10 * times))
    for name, base in (
        ("get", "dict"),
        ("add", "dict"),
        ("set", "dict"),
        ("lock", "Lock"),
        ("pair", "apart"),
    ):
        ratio = statistics.median(a / b for a, b in zip(found[name], found[base], strict=True))
        print(f"{name:5} {statistics.median(found[name]):10.4g}  {ratio:6.2f} x {base}")


if __name__ == "__main__":
    main()
