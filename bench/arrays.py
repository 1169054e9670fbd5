#!/usr/bin/env python3
"""Arrays to tasks and back: what crossing costs from 1 KiB to 256 MiB, and what memory it takes.

    python bench/arrays.py --quick                     seconds: is it in order; the figures mean nothing
    python bench/arrays.py --json arrays.json          all rounds, and ten minutes of mixed load
    python bench/arrays.py --rows argument,born --peers none
    python bench/arrays.py --table arrays.json         the tables of docs/benchmarks.md from such a file
    python tools/chart.py arrays.json docs/arrays.svg

Ours runs with its defaults. Each call sends a new view of the array: a pool that remembers arrays by their
identity (joblib) cannot answer from what an earlier call brought.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import copies
import digest
import footprint
import harness
import peers
import tasks
from copies import MIB, expect, words
from harness import Entry, Figure, Meter, Role, Row, Scale
from peers import Contender, Pool

WORKERS = 2
IN_FLIGHT = 64  # echoes at once
MINUTES = 10.0  # of mixed load
THRESHOLDS = (4, 16, 64, 256)  # KiB

QUICK = Scale(rounds=1, row_seconds=1, seconds=0.005, limit=60)
FULL = Scale(rounds=5, row_seconds=150, seconds=0.3, limit=300)
PACKAGES = ("cloudpickle", "joblib", "loky", "mpire", "numpy", "pebble", "pyzmq", "ray")

ALL = (*peers.PEERS, peers.JOBLIB, peers.RAY)
SHOWN = tuple(one for one in ALL if one.name in ("ProcessPoolExecutor", "loky", "joblib", "Ray"))  # in curves

Call = Callable[[], object]
Prepare = Callable[[Pool, int], Call]  # what to call, for so many bytes


# ---- one size ------------------------------------------------------------------------------------


def argument(
    contender: Contender, fn: Callable[[Any], int], nbytes: int, calls: int, meter: Meter
) -> Mapping[str, float]:
    """Call a function with an array as argument, one call after another."""
    data = words(nbytes)
    wanted = fn(data)
    with contender.open(WORKERS) as pool:
        call = lambda: expect(pool.result(pool.submit(fn, data.view())), wanted)  # noqa: E731
        return {"": copies.median_ms(call, calls, meter)}


def copy_and_sum(nbytes: int, calls: int, meter: Meter) -> Mapping[str, float]:
    """An array copied by one thread, and the copy summed."""
    import numpy as np

    data = words(nbytes)
    there = np.copy(data)

    def call() -> None:
        np.copyto(there, data)
        tasks.total(there)

    return {"": copies.median_ms(call, calls, meter)}


def in_empty(pool: Pool, data: Any) -> Any:
    """The content of an array in one of rt.empty."""
    assert pool.empty is not None
    array = pool.empty(data.shape, data.dtype)
    array[:] = data
    return array


def in_store(pool: Pool, data: Any) -> Any:
    """What stands for an array that the pool keeps."""
    assert pool.put is not None
    return pool.put(data)


def born(
    contender: Contender, keep: Callable[[Pool, Any], Any], nbytes: int, calls: int, meter: Meter
) -> Mapping[str, float]:
    """Call functions with an array that the workers can reach already; without the functions' own time."""
    data = words(nbytes)
    one, every = tasks.first(data), tasks.total(data)
    with contender.open(WORKERS) as pool:
        value = keep(pool, data)

        def touch() -> None:
            expect(pool.result(pool.submit(tasks.first, value)), one)

        def add() -> float:
            found, seconds = pool.result(pool.submit(tasks.timed_total, value))
            expect(found, every)
            return float(seconds)

        return {
            "reads one word": copies.median_ms(touch, calls, meter),
            "sums, beyond the sum": copies.median_ms(add, calls, meter),
        }


def copy_for_both(nbytes: int, calls: int, meter: Meter) -> Mapping[str, float]:
    """The same copy as the limit of both figures."""
    found = copies.median_ms(copies.copying(nbytes), calls, meter)
    return {"reads one word": found, "sums, beyond the sum": found}


def result(contender: Contender, nbytes: int, calls: int, meter: Meter) -> Mapping[str, float]:
    """Call a function that makes an array by np.full and returns it."""
    with contender.open(WORKERS) as pool:

        def call() -> None:
            array = pool.result(pool.submit(tasks.full, nbytes // 8))
            expect((array.nbytes, int(array[0]), int(array[-1])), (nbytes, 7, 7))

        return {"": copies.median_ms(call, calls, meter)}


def fill_and_copy(nbytes: int, calls: int, meter: Meter) -> Mapping[str, float]:
    """np.full, and a copy of that to where it has been copied before, by one thread."""
    import numpy as np

    there = tasks.full(nbytes // 8)
    return {"": copies.median_ms(lambda: np.copyto(there, tasks.full(nbytes // 8)), calls, meter)}


def born_result(nbytes: int, calls: int, meter: Meter) -> Mapping[str, float]:
    """Call a function that fills an array of current().empty and returns it."""
    with peers.OURS.open(WORKERS) as pool:

        def call() -> float:
            array, seconds = pool.result(pool.submit(tasks.born_full, nbytes // 8))
            expect((array.nbytes, int(array[0]), int(array[-1])), (nbytes, 7, 7))
            return float(seconds)

        def whole() -> None:
            call()

        return {
            "call": copies.median_ms(whole, calls, meter),
            "beyond the function": copies.median_ms(call, calls, meter),
        }


def fill(nbytes: int, calls: int, meter: Meter) -> Mapping[str, float]:
    """An array filled by one thread that it has filled before: the same as the limit of both figures."""
    array = tasks.full(nbytes // 8)
    found = copies.median_ms(lambda: array.fill(7), calls, meter)
    return {"call": found, "beyond the function": found}


# ---- all sizes -----------------------------------------------------------------------------------


def label(nbytes: int) -> str:
    """The name of the figure for this size; `digest.size` reads it."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // 1024} KiB"


def curve(
    contender: Contender, prepare: Prepare, sizes: Sequence[int], seconds: float, meter: Meter
) -> Mapping[str, float]:
    """For each size: microseconds of a call, the median of at least five."""
    with contender.open(WORKERS) as pool:
        return series(partial(prepare, pool), sizes, seconds, meter)


def series(
    prepare: Callable[[int], Call], sizes: Sequence[int], seconds: float, meter: Meter
) -> Mapping[str, float]:
    values, operations = {}, 0
    for nbytes in sizes:
        call = prepare(nbytes)
        found: list[float] = []
        for _ in range(4):  # both workers, both ends
            call()
        used = meter.cpu_seconds
        with meter.timing():
            end = time.perf_counter() + seconds
            while len(found) < 5 or time.perf_counter() < end:
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
        operations += len(found)
        values[label(nbytes)] = statistics.median(found) * 1e6
        meter.cpu[label(nbytes)] = (meter.cpu_seconds - used) / len(found)
    meter.operations = operations
    return values


def sent(pool: Pool, nbytes: int) -> Call:
    """An ordinary array as argument."""
    data = words(nbytes)
    return lambda: expect(pool.result(pool.submit(tasks.first, data.view())), 7)


def sent_born(pool: Pool, nbytes: int) -> Call:
    """An array of rt.empty as argument."""
    data = in_empty(pool, words(nbytes))
    return lambda: expect(pool.result(pool.submit(tasks.first, data)), 7)


def returned(pool: Pool, nbytes: int) -> Call:
    """An array as result that the worker has already: nothing is filled."""
    return lambda: expect(int(pool.result(pool.submit(tasks.kept, nbytes // 8))[-1]), 7)


def returned_born(pool: Pool, nbytes: int) -> Call:
    """An array of current().empty as result, of which two words are set."""
    return lambda: expect(int(pool.result(pool.submit(tasks.born, nbytes // 8))[-1]), 7)


def copied(sizes: Sequence[int], seconds: float, meter: Meter) -> Mapping[str, float]:
    """The same sizes copied by one thread."""
    return series(copies.copying, sizes, seconds, meter)


def threshold(
    least: int, prepare: Prepare, sizes: Sequence[int], seconds: float, meter: Meter
) -> Mapping[str, float]:
    """The same with buffers of so many bytes and more outside of the pickle, in host and workers."""
    os.environ["RUNTIME_BENCH_OUT_OF_BAND_MIN"] = str(least)
    import threshold as changed

    contender = peers.runtime_with(preload=("threshold",))
    with contender.open(WORKERS) as pool:
        expect((changed.in_force(), pool.result(pool.submit(changed.in_force))), (least, least))
        return series(partial(prepare, pool), sizes, seconds, meter)


# ---- the rows ------------------------------------------------------------------------------------


def entry(name: str, role: Role, workload: Callable[..., Mapping[str, float]], *args: Any) -> Entry:
    return Entry(name, role, partial(workload, *args))


def entries(
    workload: Callable[..., Mapping[str, float]],
    *args: Any,
    limit: Entry,
    others: Sequence[Contender] = ALL,
) -> tuple[Entry, ...]:
    """Ours, the peers and the limit of a row."""
    return (
        entry("runtime", Role.OURS, workload, peers.OURS, *args),
        *(entry(one.name, Role.PEER, workload, one, *args) for one in others),
        limit,
    )


def large_rows(scale: Scale) -> list[Row]:
    """Single arrays of 64 MiB, and many of 1 MiB."""
    nbytes, calls = (MIB, 2) if scale is QUICK else (64 * MIB, 9)
    size, milliseconds = label(nbytes), (Figure("", "ms"),)
    in_flight = 4 if scale is QUICK else IN_FLIGHT
    memcpy = entry("one memcpy", Role.LIMIT, copies.one_copy, nbytes, calls)
    return [
        Row(
            "argument",
            f"An array of {size} as argument of a function that reads one word, one call after another, "
            "warm. The limit is one warm copy. An operation is a call.",
            milliseconds,
            entries(argument, tasks.first, nbytes, calls, limit=memcpy),
        ),
        Row(
            "argument, summed",
            "The same with a function that sums the array. The limit copies and sums.",
            milliseconds,
            entries(
                argument,
                tasks.total,
                nbytes,
                calls,
                limit=entry("memcpy and sum", Role.LIMIT, copy_and_sum, nbytes, calls),
            ),
        ),
        Row(
            "born",
            f"An array of {size} that lies in shared memory already as argument (Ray: of ray.put): the call, "
            "and the call less what the function itself took. The limit is one warm copy.",
            (Figure("reads one word", "ms"), Figure("sums, beyond the sum", "ms")),
            (
                entry("runtime, rt.empty", Role.OURS, born, peers.OURS, in_empty, nbytes, calls),
                entry("runtime, rt.put", Role.OURS, born, peers.OURS, in_store, nbytes, calls),
                entry("Ray", Role.PEER, born, peers.RAY, in_store, nbytes, calls),
                entry("one memcpy", Role.LIMIT, copy_for_both, nbytes, calls),
            ),
        ),
        Row(
            "result",
            f"An array of {size} that the task makes by np.full, as result. The limit is np.full and one "
            "warm copy by one thread. An operation is a call.",
            milliseconds,
            entries(
                result,
                nbytes,
                calls,
                limit=entry("fill and memcpy", Role.LIMIT, fill_and_copy, nbytes, calls),
            ),
        ),
        Row(
            "result, born",
            "The same, filled in memory of current().empty: the call, and the call less what the function "
            "took. The limit fills an array that it has filled before.",
            (Figure("call", "ms"), Figure("beyond the function", "ms")),
            (
                entry("runtime, current().empty", Role.OURS, born_result, nbytes, calls),
                entry("fill", Role.LIMIT, fill, nbytes, calls),
            ),
        ),
        *(
            Row(
                f"echo {kind}",
                f"1 MiB ({kind}) as argument and back as result, {in_flight} calls in flight. The limit is "
                "two copies by one thread. An operation is a call.",
                (Figure("", "calls/s", higher_is_better=True),),
                entries(
                    copies.echo,
                    make,
                    WORKERS,
                    in_flight,
                    scale.seconds,
                    limit=entry("two memcpy", Role.LIMIT, copies.two_copies, scale.seconds),
                ),
            )
            for kind, make in (("numpy", copies.octets), ("bytes", copies.plain_bytes))
        ),
    ]


def curve_rows(scale: Scale) -> list[Row]:
    """All sizes; where it pays to leave a buffer outside of the pickle."""
    seconds = scale.seconds
    sizes = [1024 * 4**i for i in (range(0, 6, 5) if scale is QUICK else range(10))]
    steps = [1024 * 2**i for i in (range(1, 10, 8) if scale is QUICK else range(1, 10))]
    least = {f"from {kib} KiB": kib * 1024 for kib in THRESHOLDS} | {"never": 1 << 40}
    found = []
    for what, prepare, name, prepare_born in (
        ("argument", sent, "rt.empty", sent_born),
        ("result", returned, "current().empty", returned_born),
    ):
        plain, *rest = entries(
            curve,
            prepare,
            sizes,
            seconds,
            limit=entry("one memcpy", Role.LIMIT, copied, sizes, seconds),
            others=SHOWN,
        )
        ours = entry(f"runtime, {name}", Role.OURS, curve, peers.OURS, prepare_born, sizes, seconds)
        found.append(
            Row(
                f"{what} by size",
                f"An array as {what}, of which one word is read and none filled; one call after another. The "
                "limit is one warm copy. An operation is a call.",
                tuple(Figure(label(nbytes), "µs") for nbytes in sizes),
                (plain, ours, *rest),
            )
        )
    for what, prepare in (("argument", sent), ("result", returned)):
        found.append(
            Row(
                f"{what} by threshold",
                f"An array as {what}, likewise, by the size from which on buffers stay outside of the "
                "pickle. An operation is a call.",
                tuple(Figure(label(nbytes), "µs") for nbytes in steps),
                tuple(
                    entry(name, Role.OURS, threshold, nbytes, prepare, steps, seconds)
                    for name, nbytes in least.items()
                ),
            )
        )
    return found


def memory_rows(scale: Scale, minutes: float) -> list[Row]:
    """What it takes."""
    nbytes, most = (MIB, MIB) if scale is QUICK else (1024 * MIB, 64 * MIB)
    return [
        Row(
            "shared",
            f"One array of {label(nbytes)} of rt.put (Ray: of ray.put), read whole by 8 tasks in {WORKERS} "
            "workers, the source deleted: PSS of all processes, less what they had before.",
            (Figure("PSS", "× the array"),),
            (
                entry("runtime", Role.OURS, footprint.shared, peers.OURS, WORKERS, nbytes),
                entry("Ray", Role.PEER, footprint.shared, peers.RAY, WORKERS, nbytes),
            ),
        ),
        Row(
            "mixed load",
            f"{minutes:g} minutes of arrays and bytes of 1 KiB to {label(most)}, random in size, way and "
            "lifetime: how resident memory and the region grow in the second half. An operation is a call.",
            footprint.SLOPES,
            (entry("runtime", Role.OURS, footprint.mixed, WORKERS, minutes, most),),
            limit=60 * minutes + 120,
        ),
    ]


def rows(scale: Scale, minutes: float | None) -> list[Row]:
    """minutes: of mixed load; None: as the scale has it."""
    if minutes is None:
        minutes = 0.01 if scale is QUICK else MINUTES
    return [*large_rows(scale), *curve_rows(scale), *memory_rows(scale, minutes)]


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--minutes", type=float, help=f"of mixed load (default: {MINUTES:g})")
    own.add_argument("--table", metavar="FILE", help="only print the tables of a run from its JSON")
    options = own.parse_known_args(argv)[0]
    if options.table:
        print(digest.tables(json.loads(Path(options.table).read_text())))
        return 0
    return harness.main(
        "Arrays",
        partial(rows, minutes=options.minutes),
        quick=QUICK,
        full=FULL,
        packages=PACKAGES,
        argv=argv,
        parents=(own,),
    )


if __name__ == "__main__":
    sys.exit(main())
