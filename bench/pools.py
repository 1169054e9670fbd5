#!/usr/bin/env python3
"""Process pools compared: what a task, an item, a round trip, a megabyte, a start and a death cost.

    python bench/pools.py --quick                      under a minute on two cores
    python bench/pools.py --json pools.json            all rounds
    python bench/pools.py --peers loky,pebble --rows submit,map

Every pool has WORKERS workers, runs the functions of tasks.py, and is opened once for each turn, outside
the timed part (but for `start`, which is about that). A function below that takes a Contender is a
workload: all contenders pass through the same lines.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import copies
import harness
import peers
import tasks
from copies import MIB, expect
from harness import Entry, Figure, Measure, Meter, Role, Row, Scale
from peers import Contender

WORKERS = 2
IN_FLIGHT = 16  # echoes at once
DEATH_LIMIT = 5.0  # seconds after which a pool counts as not usable again

QUICK = Scale(rounds=3, row_seconds=6, seconds=0.05, limit=20)
FULL = Scale(rounds=7, row_seconds=38, seconds=0.5, limit=30)
PACKAGES = ("cloudpickle", "loky", "mpire", "numpy", "pebble", "pyzmq")


# ---- many tasks ----------------------------------------------------------------------------------


def submit(contender: Contender, seconds: float, meter: Meter) -> Mapping[str, float]:
    """Submit n no-ops from one thread, then collect every result."""
    with contender.open(WORKERS) as pool:

        def run(count: int) -> None:
            handles = [pool.submit(tasks.nothing) for _ in range(count)]
            for handle in handles:
                pool.result(handle)

        meter.operations = harness.enough(run, seconds, 200, 100_000)
        with meter.timing():
            run(meter.operations)
        return {"": meter.operations / meter.seconds}


def map_items(contender: Contender, seconds: float, meter: Meter) -> Mapping[str, float]:
    """Map a function that returns its argument over n integers, with the pool's default chunks."""
    with contender.open(WORKERS) as pool:
        results: list[int] = []

        def run(count: int) -> None:
            results[:] = pool.map(tasks.same, range(count))

        meter.operations = harness.enough(run, seconds, 500, 400_000)
        with meter.timing():
            run(meter.operations)
        expect(results, list(range(meter.operations)))
        return {"": meter.operations / meter.seconds}


# ---- one task ------------------------------------------------------------------------------------


def round_trip(contender: Contender, pause: float, seconds: float, meter: Meter) -> Mapping[str, float]:
    """Submit a no-op, wait for its result, `pause`, and again."""
    with contender.open(WORKERS) as pool:
        return latencies(lambda: pool.result(pool.submit(tasks.nothing)), pause, seconds, meter)


def bare_echo(pause: float, seconds: float, meter: Meter) -> Mapping[str, float]:
    """The same with two processes and two pyzmq PUSH/PULL pairs: a byte there and back, nothing pickled."""
    import zmq

    with tempfile.TemporaryDirectory() as folder:
        there, back = (f"ipc://{folder}/{name}" for name in ("there", "back"))
        child = os.fork()
        if child == 0:
            context = zmq.Context()
            pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
            pull.connect(there)
            push.connect(back)
            while True:  # until it is killed
                push.send(pull.recv())
        try:
            with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
                push.linger = 0
                push.bind(there)
                pull.bind(back)

                def call() -> None:
                    push.send(b".")
                    pull.recv()

                return latencies(call, pause, seconds, meter)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def latencies(call: Callable[[], object], pause: float, seconds: float, meter: Meter) -> Mapping[str, float]:
    """The median and the 99th percentile of what a call takes, in µs; at least 100 calls."""
    clock = time.perf_counter_ns

    def run(duration: float, least: int) -> list[int]:
        found: list[int] = []
        end = clock() + int(duration * 1e9)
        while clock() < end or len(found) < least:
            if pause:
                time.sleep(pause)
            start = clock()
            call()
            found.append(clock() - start)
        return found

    run(seconds / 4, 20)
    with meter.timing():
        found = run(seconds, 100)
    meter.operations = len(found)
    found.sort()
    return {"p50": statistics.median(found) / 1e3, "p99": found[int(0.99 * len(found))] / 1e3}


# ---- large arguments -----------------------------------------------------------------------------


def array(contender: Contender, calls: int, meter: Meter) -> Mapping[str, float]:
    """Call a function that reads two elements with 64 MiB as argument, one call after another."""
    data = copies.octets(64 * MIB)
    wanted = tasks.ends(data)
    with contender.open(WORKERS) as pool:
        call = lambda: expect(pool.result(pool.submit(tasks.ends, data)), wanted)  # noqa: E731
        return {"": copies.median_ms(call, calls, meter)}


# ---- birth and death -----------------------------------------------------------------------------


def start(contender: Contender, meter: Meter) -> Mapping[str, float]:
    """Make a pool and get a first result from it. Its modules are imported already."""
    contender.load()
    with ExitStack() as stack:
        with meter.timing():
            pool = stack.enter_context(contender.open(WORKERS))
            pool.result(pool.submit(tasks.nothing))
        return {"": meter.seconds * 1e3}


def fork_and_answer(meter: Meter) -> Mapping[str, float]:
    """Fork, and read one byte that the child writes to a pipe."""
    reader, writer = os.pipe()
    with meter.timing():
        child = os.fork()
        if child == 0:
            os.write(writer, b".")
            os._exit(0)
        os.read(reader, 1)
    os.waitpid(child, 0)
    return {"": meter.seconds * 1e3}


@contextmanager
def meeting() -> Iterator[tuple[socket.socket, str]]:
    """A listener for tasks.check_in, and its address."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = os.path.join(folder, "meeting")
        listener.bind(address)
        listener.listen()
        listener.settimeout(DEATH_LIMIT)
        yield listener, address


def death(contender: Contender, meter: Meter) -> Mapping[str, float]:
    """SIGKILL a worker in the middle of a task; when is the pool what it was before?

    `usable`: WORKERS tasks run at once again. `ready`: the pool says that all its workers are ready again.
    """
    with meeting() as (listener, address), contender.open(WORKERS) as pool, ExitStack() as guests:

        def arrival() -> int:
            guest = guests.enter_context(listener.accept()[0])
            return int.from_bytes(guest.recv(8), "little")

        handles = [pool.submit(tasks.check_in, address) for _ in range(WORKERS)]
        for _ in handles:
            arrival()
        guests.close()  # lets them go
        for handle in handles:
            pool.result(handle)

        victim = pool.submit(tasks.check_in, address)
        pid = arrival()
        values: dict[str, float] = {}
        broken = ""
        with meter.timing():
            began = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            try:
                handles = [pool.submit(tasks.check_in, address) for _ in range(WORKERS)]
            except Exception as error:
                handles, broken = [], type(error).__name__
            arrived = 0
            listener.settimeout(0.0005)
            while not broken and time.perf_counter() - began < DEATH_LIMIT:
                with suppress(TimeoutError):
                    arrival()
                    arrived += 1
                if arrived == WORKERS:
                    values.setdefault("usable", (time.perf_counter() - began) * 1e3)
                if pool.ready is not None and len(pool.ready() - {pid}) == WORKERS:
                    values.setdefault("ready", (time.perf_counter() - began) * 1e3)
                if len(values) == 1 + (pool.ready is not None):
                    break
                if arrived < WORKERS and any(pool.done(handle) for handle in handles):
                    broken = next(outcome(pool, handle) for handle in handles if pool.done(handle))
        guests.close()
        state = f"broken: {broken}" if broken else "" if values else f"not usable in {DEATH_LIMIT:g} s"
        meter.note = "; ".join(filter(None, (state, f"the killed task: {outcome(pool, victim)}")))
        return values


def outcome(pool: peers.Pool, handle: Any) -> str:
    """How a task ended, in words; it gets a moment for it."""
    end = time.monotonic() + 0.5
    while not pool.done(handle):
        if time.monotonic() > end:
            return "never answered"
        time.sleep(0.001)
    try:
        return f"returned {pool.result(handle)!r}"
    except BaseException as error:
        return type(error).__name__


# ---- the rows ------------------------------------------------------------------------------------


def entries(
    measure: Callable[[Contender, Meter], Mapping[str, float]],
    *limit: tuple[str, Measure],
    ours: Sequence[Contender] = (peers.OURS,),
) -> tuple[Entry, ...]:
    """All contenders through one workload, and the row's limit if it has one."""
    return (
        *(Entry(contender.name, Role.OURS, partial(measure, contender)) for contender in ours),
        *(Entry(contender.name, Role.PEER, partial(measure, contender)) for contender in peers.PEERS),
        *(Entry(name, Role.LIMIT, measure) for name, measure in limit),
    )


def rows(scale: Scale) -> list[Row]:
    """The table, top to bottom; the quick one does without the second kind of echo."""
    seconds, calls = scale.seconds, 2 if scale is QUICK else 9
    rate = partial(Figure, "", higher_is_better=True)
    both = (peers.OURS, peers.runtime_with("runtime, region_size=512MiB", region_size="512MiB"))

    def timed(workload: Callable[..., Mapping[str, float]], *args: Any) -> Callable[..., Any]:
        return lambda contender, meter: workload(contender, *args, meter)

    def limit(name: str, workload: Callable[..., Mapping[str, float]], *args: Any) -> tuple[str, Measure]:
        return name, lambda meter: workload(*args, meter)

    return [
        Row(
            "submit",
            "No-ops submitted from one thread, then every result collected. An operation is a task.",
            (rate("tasks/s"),),
            entries(timed(submit, seconds)),
        ),
        Row(
            "map",
            "A function that returns its argument, mapped over up to 400,000 integers with default chunks. "
            "An operation is an item.",
            (rate("items/s"),),
            entries(timed(map_items, seconds)),
        ),
        Row(
            "round trip",
            "A no-op submitted and waited for, one after another. The limit is one byte there and back "
            "between two processes over bare pyzmq PUSH/PULL. An operation is a call.",
            (Figure("p50", "µs"), Figure("p99", "µs")),
            entries(timed(round_trip, 0.0, seconds), limit("pyzmq echo", bare_echo, 0.0, seconds)),
        ),
        Row(
            "round trip idle",
            "The same after 1 ms in which nothing happens; that is not in the time, but is in the CPU.",
            (Figure("p50", "µs"), Figure("p99", "µs")),
            entries(timed(round_trip, 0.001, seconds), limit("pyzmq echo", bare_echo, 0.001, seconds)),
        ),
        *(
            Row(
                f"echo {kind}",
                f"1 MiB ({kind}) as argument and back as result, {IN_FLIGHT} calls in flight. The limit is "
                "two copies by one thread. An operation is a call.",
                (rate("calls/s"),),
                entries(
                    timed(copies.echo, make, WORKERS, IN_FLIGHT, seconds),
                    limit("two memcpy", copies.two_copies, seconds),
                    ours=both,
                ),
            )
            for kind, make in (("numpy", copies.octets), ("bytes", copies.plain_bytes))
            if scale is not QUICK or kind == "numpy"
        ),
        Row(
            "array",
            "A 64 MiB array as argument of a function that reads two elements, one call after another, "
            "warm. The limit is one warm copy. An operation is a call.",
            (Figure("", "ms"),),
            entries(timed(array, calls), limit("one memcpy", copies.one_copy, 64 * MIB, calls), ours=both),
        ),
        Row(
            "start",
            "From before the pool is made until the first result; modules are imported already. The limit "
            "is a fork that writes a byte to a pipe.",
            (Figure("", "ms"),),
            entries(timed(start), limit("fork", fork_and_answer)),
        ),
        Row(
            "death",
            "A worker is killed by SIGKILL in the middle of a task. usable: until as many tasks as it has "
            "workers run at once again. ready: until the pool itself reports all workers ready (only ours "
            "can tell).",
            (Figure("usable", "ms"), Figure("ready", "ms")),
            entries(timed(death)),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main("Process pools", rows, quick=QUICK, full=FULL, packages=PACKAGES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
