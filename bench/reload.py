#!/usr/bin/env python3
"""What a reload costs those who work meanwhile, and whether it costs a task.

    python bench/reload.py --quick
    python bench/reload.py --json reload.json

No process pool that we know of reloads, so there is no peer: the limit of a row is the same load without a
reload, in its turn.
"""

from __future__ import annotations

import math
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import tasks
from harness import Entry, Figure, Meter, Role, Row, Scale

WORKERS = 2
IN_FLIGHT = 2 * WORKERS  # tasks: each worker has one that runs and one that waits
RELOADS = 20  # of which none may lose or double a task
BEGIN = 0.25  # of the time, after which the one reload begins

QUICK = Scale(rounds=1, row_seconds=15, seconds=1.0, limit=60)
FULL = Scale(rounds=7, row_seconds=120, seconds=2.0, limit=120)
PACKAGES = ("pyzmq",)


def opened() -> Any:
    """Two workers that have the module of the tasks, and have worked."""
    import runtime

    rt = runtime.Runtime(WORKERS, preload=["tasks"])
    list(rt.map(tasks.spin, [0.001] * 100, chunksize=1))
    return rt


def keep_busy(submit: Callable[[], Any], ended: Callable[[], bool]) -> list[float]:
    """Always IN_FLIGHT tasks, until it has ended. Seconds from the submission of each to its end."""
    done: queue.SimpleQueue[tuple[float, BaseException | None]] = queue.SimpleQueue()
    took = []
    inside = 0
    while True:
        while inside < IN_FLIGHT and not ended():
            began = time.perf_counter()
            submit().add_done_callback(
                lambda future, began=began: done.put((time.perf_counter() - began, future.exception()))
            )
            inside += 1
        if inside == 0:
            return took
        seconds, error = done.get()
        if error is not None:
            raise error
        took.append(seconds)
        inside -= 1


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# ---- load ----------------------------------------------------------------------------------------


def steady(rt: Any, end: float) -> int:
    """No reload."""
    return 0


def one(rt: Any, end: float) -> int:
    """One reload in all the time."""
    time.sleep(BEGIN * (end - time.monotonic()))
    rt.reload()
    return 1


def without_end(rt: Any, end: float) -> int:
    """One reload after the other."""
    count = 0
    while time.monotonic() < end:
        rt.reload()
        count += 1
    return count


def load(what: Callable[[Any, float], int], seconds: float, meter: Meter) -> Mapping[str, float]:
    """A task of 1 ms in each worker all the time, while `what` goes on beside."""
    with opened() as rt:
        found: list[int] = []
        end = time.monotonic() + seconds
        beside = threading.Thread(target=lambda: found.append(what(rt, end)))
        with meter.timing():
            beside.start()
            took = keep_busy(
                lambda: rt.submit(tasks.spin, 0.001),
                lambda: time.monotonic() >= end and not beside.is_alive(),
            )
        beside.join()
        meter.operations = len(took)
        meter.note = f"{found[0]} reloads" if found[0] else ""
        return {
            "rate": len(took) / meter.seconds,
            "p50": percentile(took, 0.5) * 1e3,
            "p99": percentile(took, 0.99) * 1e3,
            "max": max(took) * 1e3,
        }


# ---- none lost, none doubled ---------------------------------------------------------------------


def counted(meter: Meter) -> Mapping[str, float]:
    """Reloads under load; each task leaves a line in a file."""
    with tempfile.TemporaryDirectory() as folder, opened() as rt:
        path = Path(folder) / "ran"
        path.touch()
        took: list[float] = []
        keys = iter(range(sys.maxsize))
        submitted = []

        def reload() -> None:
            for _ in range(RELOADS):
                took.append(rt.reload().seconds)

        def submit() -> Any:
            submitted.append(next(keys))
            return rt.submit(tasks.leave_a_line, str(path), submitted[-1])

        beside = threading.Thread(target=reload)
        with meter.timing():
            beside.start()
            keep_busy(submit, lambda: not beside.is_alive())
        meter.operations, meter.note = len(submitted), f"{len(submitted):,} tasks"
        ran = Counter(map(int, path.read_text().split()))
        assert len(took) == RELOADS and ran.keys() <= set(submitted)
        return {
            "a reload": statistics.median(took) * 1e3,
            "lost": sum(ran[key] == 0 for key in submitted),
            "doubled": sum(ran[key] > 1 for key in submitted),
        }


# ---- the rows ------------------------------------------------------------------------------------


def rows(scale: Scale) -> list[Row]:
    def entry(name: str, role: Role, what: Callable[[Any, float], int]) -> Entry:
        return Entry(name, role, lambda meter: load(what, scale.seconds, meter))

    return [
        Row(
            "load",
            f"{IN_FLIGHT} tasks of 1 ms of CPU in flight on {WORKERS} workers for {scale.seconds:g} s, "
            "and until the last reload has ended; latency is from submission to the future's callback. An "
            "operation is a task.",
            (
                Figure("rate", "tasks/s", higher_is_better=True),
                Figure("p50", "ms"),
                Figure("p99", "ms"),
                Figure("max", "ms"),
            ),
            (
                entry("one reload", Role.OURS, one),
                entry("reload after reload", Role.OURS, without_end),
                entry("no reload", Role.LIMIT, steady),
            ),
        ),
        Row(
            "exactly once",
            f"{RELOADS} reloads in a row under the same load; each task leaves a line in a file: lost are "
            "those without one, doubled those with two. An operation is a task.",
            (
                Figure("a reload", "ms"),
                Figure("lost", "tasks"),
                Figure("doubled", "tasks"),
            ),
            (Entry("runtime", Role.OURS, counted),),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main("Reload", rows, quick=QUICK, full=FULL, packages=PACKAGES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
