#!/usr/bin/env python3
"""What a Runtime costs by itself: a task among a thousand or a million, an idle second, a block, a death.

    python bench/costs.py --quick
    python bench/costs.py --json costs.json

The loop over the shipped code of MemoryPool is compiled when it is needed (native.pyx), with Cython and a C
compiler.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import peers
import tasks
from harness import Entry, Figure, Meter, Role, Row, Scale

WORKERS = 2
COUNTS = (1_000, 10_000, 100_000, 1_000_000)
IDLE = 3.0  # seconds that are watched
SETTLE = 1.0  # seconds until everybody has fallen asleep
BLOCKS, AT_ONCE = 100_000, 1_000  # that a worker holds when it is killed; of one call

QUICK = Scale(rounds=2, row_seconds=15, seconds=0.05, limit=60)
FULL = Scale(rounds=5, row_seconds=90, seconds=0.5, limit=120)
PACKAGES = ("pyzmq",)


# ---- a task among many ---------------------------------------------------------------------------


def flat(counts: Sequence[int], meter: Meter) -> Mapping[str, float]:
    """Microseconds for each of n no-ops: submitted, then collected; the futures are dropped as they are."""
    found = {}
    with peers.OURS.open(WORKERS) as pool:
        pool.result(pool.submit(tasks.nothing))
        meter.operations = sum(counts)
        with meter.timing():
            for count in counts:
                start = time.perf_counter()
                handles = [pool.submit(tasks.nothing) for _ in range(count)]
                handles.reverse()
                while handles:
                    pool.result(handles.pop())
                found[f"{count:,}"] = (time.perf_counter() - start) / count * 1e6
    return found


# ---- nothing to do -------------------------------------------------------------------------------


def idle(contender: peers.Contender, meter: Meter) -> Mapping[str, float]:
    """Memory of a worker that has run a no-op; wake-ups and CPU of all processes while nothing happens."""
    with contender.open(WORKERS) as pool:
        for handle in [pool.submit(tasks.nothing) for _ in range(100)]:
            pool.result(handle)
        workers = [pid for pid in below(os.getpid()) if not below(pid)]
        processes = [os.getpid(), *below(os.getpid())]
        time.sleep(SETTLE)
        before = switches(processes)
        meter.operations = 1
        with meter.timing():
            time.sleep(IDLE)
        woken = switches(processes) - before
        return {
            "USS of a worker": sum(map(unshared, workers)) / max(1, len(workers)) / 1e6,
            "wake-ups": woken / meter.seconds,
        }


def below(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
            found += [child, *below(child)]
    return found


def switches(processes: Sequence[int]) -> int:
    """How often their threads have been put on a processor so far."""
    total = 0
    for pid in processes:
        for task in os.listdir(f"/proc/{pid}/task"):
            lines = Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total


def unshared(pid: int) -> int:
    """Bytes that would be free if it ended (USS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


# ---- a block -------------------------------------------------------------------------------------


def compiled() -> Any:
    """native.pyx, compiled in a temporary folder against the package that is imported."""
    import importlib.util

    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    import runtime

    package = Path(runtime.__file__).parent
    source = Path(__file__).with_name("native.pyx")
    with tempfile.TemporaryDirectory() as folder:
        extension = Extension(
            "native", [str(source)], include_dirs=[str(package)], extra_compile_args=["-O2", "-std=c11"]
        )
        made = cythonize([extension], build_dir=folder, include_path=[str(package.parent)], quiet=True)
        command = Distribution({"ext_modules": made}).get_command_obj("build_ext")
        command.build_lib = command.build_temp = folder
        command.ensure_finalized()
        command.run()
        spec = importlib.util.spec_from_file_location("native", next(Path(folder).rglob("native*.so")))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def native(what: Callable[[Any, Any, int], float], meter: Meter) -> Mapping[str, float]:
    """Nanoseconds of a loop in native.pyx: the best of seven, so that a neighbour's noise stays out."""
    import runtime

    module, pool = compiled(), runtime.MemoryPool(64, 4096)
    meter.operations = 7_000_000
    with meter.timing():
        return {"": min(what(module, pool, 1_000_000) for _ in range(7))}


def from_python(statement: str, names: dict[str, Any], meter: Meter) -> Mapping[str, float]:
    """Nanoseconds of a statement: the best of seven."""
    meter.operations = 7 * 200_000
    with meter.timing():
        return {"": min(timeit.repeat(statement, number=200_000, repeat=7, globals=names)) / 200_000 * 1e9}


def pooled(meter: Meter) -> Mapping[str, float]:
    """acquire and release from Python."""
    import runtime

    pool = runtime.MemoryPool(64, 4096)
    return from_python("release(acquire())", {"acquire": pool.acquire, "release": pool.release}, meter)


def locked(meter: Meter) -> Mapping[str, float]:
    """An uncontended lock of the standard library."""
    return from_python("with lock:\n    pass", {"lock": threading.Lock()}, meter)


# ---- what the dead have held ---------------------------------------------------------------------


def hold_own(n: int) -> None:
    """In a worker: take so many blocks, and keep them."""
    import runtime

    here = runtime.current()
    here.local.setdefault("own", []).extend(here.empty(64, "u1") for _ in range(n))


def hold_arguments(arrays: list[Any]) -> None:
    """In a worker: keep these; each is a block of the host's, and pinned."""
    import runtime

    runtime.current().local.setdefault("arguments", []).extend(arrays)


def hand_over(rt: Any) -> None:
    rt.submit(hold_arguments, [rt.empty(64, "u1") for _ in range(AT_ONCE)]).result()


def swept(hold: Callable[[Any], object], meter: Meter) -> Mapping[str, float]:
    """Milliseconds from SIGKILL to a worker, and from its end, until all is free that it alone has held."""
    import runtime

    with runtime.Runtime(1, region_max="1GiB") as rt:
        pid = rt.submit(os.getpid).result()
        arena = rt._core.arena
        before = arena.used_bytes
        for _ in range(BLOCKS // AT_ONCE):
            hold(rt)
        assert arena.used_bytes - before >= BLOCKS * 4096
        meter.operations, meter.note = BLOCKS, "CPU: less what the dead worker had used"
        fd = os.pidfd_open(pid)
        try:
            with meter.timing():
                start = time.perf_counter()
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                select.select([fd], [], [])
                end = time.perf_counter()
                while arena.used_bytes > before + (1 << 20):  # what the calls' functions take stays
                    time.sleep(0.0005)
                back = time.perf_counter()
        finally:
            os.close(fd)
    return {"after the signal": (back - start) * 1e3, "after its end": (back - end) * 1e3}


# ---- the rows ------------------------------------------------------------------------------------


def rows(scale: Scale) -> list[Row]:
    counts = COUNTS[:3] if scale is QUICK else COUNTS
    return [
        Row(
            "flat",
            "No-ops submitted from one thread, then collected: microseconds for each, by how many there are. "
            "An operation is a task.",
            tuple(Figure(f"{count:,}", "µs") for count in counts),
            (Entry("runtime", Role.OURS, lambda meter: flat(counts, meter)),),
        ),
        Row(
            "idle",
            f"{WORKERS} workers that have run a hundred no-ops, then nothing for {IDLE:g} seconds. Wake-ups: "
            "context switches of all threads of all processes. An operation is the whole time.",
            (Figure("USS of a worker", "MB"), Figure("wake-ups", "/s")),
            tuple(
                Entry(one.name, role, lambda meter, one=one: idle(one, meter))  # type: ignore[misc]
                for one, role in ((peers.OURS, Role.OURS), *((peer, Role.PEER) for peer in peers.PEERS))
            ),
        ),
        Row(
            "block from Python",
            "acquire and release of a block of a MemoryPool. The limit is `with threading.Lock()`.",
            (Figure("", "ns"),),
            (
                Entry("MemoryPool", Role.OURS, pooled),
                Entry("with Lock()", Role.LIMIT, locked),
            ),
        ),
        Row(
            "block nogil",
            "The same in a compiled loop without the GIL. The limit is one compare-and-swap and one store; "
            "a release that fails for a block that is not held any more takes two.",
            (Figure("", "ns"),),
            (
                Entry(
                    "MemoryPool",
                    Role.OURS,
                    lambda meter: native(lambda m, p, n: m.take_and_give(p, n), meter),
                ),
                Entry("two CAS", Role.PEER, lambda meter: native(lambda m, p, n: m.swap_twice(n), meter)),
                Entry(
                    "CAS + store",
                    Role.LIMIT,
                    lambda meter: native(lambda m, p, n: m.swap_and_store(n), meter),
                ),
            ),
        ),
        Row(
            "blocks of the dead",
            f"A worker that holds {BLOCKS:,} blocks is killed: until they are free, arguments that it has "
            "kept (pins) or arrays of its own. An operation is a block.",
            (Figure("after the signal", "ms"), Figure("after its end", "ms")),
            (
                Entry(
                    "its own",
                    Role.OURS,
                    lambda meter: swept(lambda rt: rt.submit(hold_own, AT_ONCE).result(), meter),
                ),
                Entry("arguments", Role.OURS, lambda meter: swept(hand_over, meter)),
            ),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main("Costs", rows, quick=QUICK, full=FULL, packages=PACKAGES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
