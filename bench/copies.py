"""Workloads of large arguments and results, and the copies by one thread that they are measured against."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import harness
import tasks
from harness import Meter
from peers import Contender

MIB = 1 << 20


def expect(found: object, wanted: object) -> None:
    """Fail the turn if a contender answers something else. (An assert would be gone under -O.)"""
    if found != wanted:
        raise ValueError(f"wrong result: {found!r:.60}, not {wanted!r:.60}")


def words(nbytes: int) -> Any:
    """An array of 64-bit words that are not all alike."""
    import numpy as np

    return np.arange(7, 7 + nbytes // 8, dtype=np.uint64)


def octets(nbytes: int) -> Any:
    """The same as bytes."""
    return words(nbytes).view("uint8")


def plain_bytes(nbytes: int) -> bytes:
    return bytes(octets(nbytes))


def echo(
    contender: Contender,
    make: Callable[[int], Any],
    workers: int,
    in_flight: int,
    seconds: float,
    meter: Meter,
) -> Mapping[str, float]:
    """Send 1 MiB as argument and get it back as result, so many calls at a time: calls per second."""
    data = make(MIB)
    with contender.open(workers) as pool:
        last: list[Any] = []

        def run(count: int) -> None:
            flying: deque[Any] = deque()
            for _ in range(count):
                if len(flying) == in_flight:
                    pool.result(flying.popleft())
                flying.append(pool.submit(tasks.same, data))
            while flying:
                last[:] = [pool.result(flying.popleft())]

        meter.operations = harness.enough(run, seconds, in_flight, 20_000)
        with meter.timing():
            run(meter.operations)
        expect(bytes(last[0]) == bytes(data), True)
        return {"": meter.operations / meter.seconds}


def two_copies(seconds: float, meter: Meter) -> Mapping[str, float]:
    """1 MiB copied twice for each call, by one thread."""
    import numpy as np

    data = octets(MIB)
    there, back = np.empty_like(data), np.empty_like(data)

    def run(count: int) -> None:
        for _ in range(count):
            np.copyto(there, data)
            np.copyto(back, there)

    meter.operations = harness.enough(run, seconds, 10, 1_000_000)
    with meter.timing():
        run(meter.operations)
    return {"": meter.operations / meter.seconds}


def copying(nbytes: int) -> Callable[[], object]:
    """Copies so much by one thread to where it has been copied before."""
    import numpy as np

    data = words(nbytes)
    there = np.copy(data)
    return lambda: np.copyto(there, data)


def one_copy(nbytes: int, calls: int, meter: Meter) -> Mapping[str, float]:
    return {"": median_ms(copying(nbytes), calls, meter)}


def median_ms(call: Callable[[], float | None], calls: int, meter: Meter) -> float:
    """The median of what a call takes, in ms, after two that are not counted; without the seconds that it
    returns.
    """
    found = []
    for _ in range(2):
        call()
    meter.operations = calls
    with meter.timing():
        for _ in range(calls):
            start = time.perf_counter()
            own = call()
            found.append(time.perf_counter() - start - (own or 0.0))
    return statistics.median(found) * 1e3
