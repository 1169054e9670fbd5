#!/usr/bin/env python3
"""Kernels: what a grain and a job cost, and how near run_kernel comes to two plain C threads.

    python bench/kernels.py --quick            seconds: is it in order; the figures mean nothing
    python bench/kernels.py --json kernels.json

Needs a C compiler. All work on the same data in the region, with two workers or threads. The threads run the
very function that the kernel is, half of the data each. numba.prange takes part where numba is installed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Entry, Figure, Meter, Role, Row, Scale

import runtime
from runtime import Kernel, _core

WORKERS = 2
PAGE = 4096
MIB = 1 << 20
QUICK = Scale(rounds=1, row_seconds=1, seconds=0.005, limit=60)
FULL = Scale(rounds=7, row_seconds=60, seconds=0.5, limit=120)
PACKAGES = ("numba", "numpy")

MS = (Figure("", "ms"),)
RATE = (Figure("", "grains/s", higher_is_better=True),)
SPEED = (Figure("", "GB/s", higher_is_better=True),)
US = (Figure("", "µs"),)
BUILTINS = {"crc32": 4, "count_byte": 8, "histogram_u8": 2048, "sum_f64": 0, "minmax_f64": 16}


@functools.cache
def library() -> str:
    """kernels.c, compiled; with OpenMP if that can be."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    path = str(Path(tempfile.mkdtemp()) / "libkernels.so")
    source = str(Path(__file__).with_name("kernels.c"))
    command = [*compiler, "-O3", "-shared", "-fPIC", "-pthread", "-o", path, source]
    if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
        subprocess.run(command, check=True)
    return path


def has_openmp() -> bool:
    return hasattr(ctypes.CDLL(library()), "scale_openmp")


def repeat(call: Callable[[], object], seconds: float, meter: Meter, pause: float = 0.0) -> float:
    """Median seconds of a call, each after a pause."""
    call()
    times: list[float] = []
    with meter.timing():
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            if pause:
                time.sleep(pause)
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    meter.operations = len(times)
    return sorted(times)[len(times) // 2]


def data_of(rt: runtime.Runtime, nbytes: int) -> memoryview:
    data = rt.alloc(nbytes)
    data[:] = bytes(range(256)) * (nbytes // 256)
    return data


# ---- what is measured --------------------------------------------------------------------------------


def empty_grains(nbytes: int, seconds: float, meter: Meter) -> Mapping[str, float]:
    with runtime.Runtime(WORKERS) as rt:
        data, kernel = data_of(rt, nbytes), Kernel.from_library(library(), "nothing")
        took = repeat(lambda: rt.run_kernel(kernel, data, grain=PAGE), seconds, meter)
    return {"": nbytes / PAGE / took}


def empty_job(pause: float, seconds: float, meter: Meter) -> Mapping[str, float]:
    with runtime.Runtime(WORKERS) as rt:
        data, kernel = data_of(rt, WORKERS * PAGE), Kernel.from_library(library(), "nothing")
        took = repeat(lambda: rt.run_kernel(kernel, data, grain=PAGE), seconds, meter, pause)
    return {"": took * 1e6}


class Announcing(runtime.Runtime):
    """A runtime that notes when a job is announced: when its first participant is queued."""

    announced: int | None = None  # monotonic ns

    def _participate(self, *args: Any) -> None:
        if self.announced is None:
            self.announced = time.monotonic_ns()
        super()._participate(*args)


def announcement(planned: bool, pause: float, seconds: float, meter: Meter) -> Mapping[str, float]:
    """From the call, or from when the job is planned, to the first instruction of the first grain."""
    with Announcing(WORKERS) as rt:
        data = data_of(rt, WORKERS * PAGE)
        kernel = Kernel.from_library(library(), "stamp", partial=8)
        waits: list[int] = []

        def call() -> None:
            rt.announced = None
            began = time.monotonic_ns()
            stamps = rt.run_kernel(kernel, data, grain=PAGE)
            if planned:
                assert rt.announced is not None
                began = rt.announced
            waits.append(min(int.from_bytes(stamp, "little") for stamp in stamps) - began)

        repeat(call, seconds, meter, pause)
    return {"": sorted(waits)[len(waits) // 2] / 1e3}


def round_trip(pause: float, seconds: float, meter: Meter) -> Mapping[str, float]:
    with runtime.Runtime(WORKERS) as rt:
        return {"": repeat(lambda: rt.submit(abs, -1).result(), seconds, meter, pause) * 1e6}


def wait_for(flag: memoryview, nap: float) -> None:
    """A task that holds the GIL, but for what others take of it; or sleeps."""
    while not flag[0]:
        if nap:
            time.sleep(nap)


def beside(nap: float, nbytes: int, seconds: float, meter: Meter) -> Mapping[str, float]:
    """A kernel on one of two threads, while such a task runs on the other."""
    with runtime.Runtime(1, threads=2) as rt:
        data, kernel, flag = data_of(rt, nbytes), Kernel("runtime:crc32"), rt.alloc(1)
        flag[0] = 0
        task = rt.submit(wait_for, flag, nap)
        while not task.running():
            time.sleep(0.001)
        took = repeat(lambda: rt.run_kernel(kernel, data), seconds, meter)
        flag[0] = 1
        task.result()
    return {"": nbytes / took / 1e9}


def params_of(name: str) -> bytes:
    return b"a" if name == "count_byte" else b""


def builtin(name: str, nbytes: int, seconds: float, meter: Meter) -> Mapping[str, float]:
    with runtime.Runtime(WORKERS) as rt:
        data, kernel = data_of(rt, nbytes), Kernel(f"runtime:{name}")
        return {"": repeat(lambda: rt.run_kernel(kernel, data, params=params_of(name)), seconds, meter) * 1e3}


def builtin_by_threads(name: str, nbytes: int, seconds: float, meter: Meter) -> Mapping[str, float]:
    with runtime.Runtime(1) as rt:
        data = data_of(rt, nbytes)
        room = BUILTINS[name] or nbytes // PAGE * 8
        out = ctypes.create_string_buffer(2 * room)
        run = ctypes.CDLL(library()).two_threads
        size = ctypes.c_size_t
        args = (
            ctypes.c_void_p(_core.read_capsule(_core.BUILTINS[name])[1]),
            ctypes.c_void_p(_core.address_of(data)), size(nbytes), out, size(room), size(room),
            params_of(name),
        )  # fmt: skip
        return {"": repeat(lambda: run(*args), seconds, meter) * 1e3}


def loop(nbytes: int, seconds: float, meter: Meter) -> Mapping[str, float]:
    with runtime.Runtime(WORKERS) as rt:
        src, dst = data_of(rt, nbytes), data_of(rt, nbytes)
        kernel = Kernel.from_library(library(), "scale")
        return {"": repeat(lambda: rt.run_kernel(kernel, src, dst), seconds, meter) * 1e3}


def loop_by_threads(how: str, nbytes: int, seconds: float, meter: Meter) -> Mapping[str, float]:
    with runtime.Runtime(1) as rt:
        src, dst = data_of(rt, nbytes), data_of(rt, nbytes)
        made = ctypes.CDLL(library())
        at = [ctypes.c_void_p(_core.address_of(view)) for view in (src, dst)]
        size, half = ctypes.c_size_t(nbytes), ctypes.c_size_t(nbytes // 2 // PAGE * PAGE)
        if how == "OpenMP":
            call: Callable[[], object] = lambda: made.scale_openmp(at[0], size, at[1])  # noqa: E731
        elif how == "threads":
            call = lambda: made.two_threads(made.scale, at[0], size, at[1], half, half, None)  # noqa: E731
        else:
            call = prange(src, dst)
        return {"": repeat(call, seconds, meter) * 1e3}


def prange(src: memoryview, dst: memoryview) -> Callable[[], object]:
    import numba
    import numpy as np

    numba.set_num_threads(2)
    x, y = np.frombuffer(src, np.float32), np.frombuffer(dst, np.float32)

    @numba.njit(parallel=True)
    def scale(x: np.ndarray, y: np.ndarray) -> None:
        for i in numba.prange(x.size):
            y[i] = np.float32(2) * x[i] + np.float32(1)

    return lambda: scale(x, y)


# ---- the table ---------------------------------------------------------------------------------------


def rows(scale: Scale) -> list[Row]:
    nbytes = MIB if scale is QUICK else 256 * MIB

    def entry(name: str, role: Role, measure: Callable[..., Mapping[str, float]], *args: object) -> Entry:
        return Entry(name, role, functools.partial(measure, *args, scale.seconds))

    loops = [
        entry("runtime", Role.OURS, loop, nbytes),
        entry("two C threads", Role.LIMIT, loop_by_threads, "threads", nbytes),
    ]
    if has_openmp():
        loops.append(entry("OpenMP", Role.PEER, loop_by_threads, "OpenMP", nbytes))
    if importlib.util.find_spec("numba"):
        loops.append(entry("numba.prange", Role.PEER, loop_by_threads, "numba", nbytes))
    found = [
        Row(
            "empty grains", f"a kernel that does nothing over {nbytes // MIB} MiB in pages", RATE,
            (entry("runtime", Role.OURS, empty_grains, nbytes),),
        ),
        *(
            Row(
                f"empty job{when}", f"a job of two grains, and a task, that do nothing{when}", US,
                (
                    entry("runtime", Role.OURS, empty_job, pause),
                    entry("until it begins", Role.OURS, announcement, False, pause),
                    entry("announced until it begins", Role.OURS, announcement, True, pause),
                    entry("a round trip of ours", Role.LIMIT, round_trip, pause),
                ),
            )
            for when, pause in (("", 0.0), (" after an idle ms", 0.001))
        ),
        Row(
            "beside Python", f"crc32 of {nbytes // MIB} MiB on one of a worker's two threads", SPEED,
            (
                entry("runtime", Role.OURS, beside, 0.0, nbytes),
                entry("the other sleeps", Role.LIMIT, beside, 0.01, nbytes),
            ),
        ),
        Row("loop", f"y = 2 x + 1 over {nbytes // MIB} MiB of floats", MS, tuple(loops)),
    ]  # fmt: skip
    for name in BUILTINS:
        entries = (
            entry("runtime", Role.OURS, builtin, name, nbytes),
            entry("two C threads", Role.LIMIT, builtin_by_threads, name, nbytes),
        )
        found.append(Row(name, f"runtime:{name} over {nbytes // MIB} MiB", MS, entries))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main("Kernels", rows, quick=QUICK, full=FULL, packages=PACKAGES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
