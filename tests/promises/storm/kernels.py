"""Kernels in a storm: jobs over arrays in the region and outside of it. They run to their end, exactly.

They are no orders: their tasks note nothing in the ledger, and the runtime runs what has died by itself.
Where workers have several threads, one may die of what runs beside a kernel, again and again: so a job may
end with WorkerDied there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
import sysconfig
import zlib
from pathlib import Path

import numpy

from runtime import Kernel, RegionFull, TaskTimeout, WorkerDied

SIZES = (1, 500, 3_000, 20_000, 100_000)  # doubles
PAGE = 4096
PATIENCE = 60.0  # seconds for one job

COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
SOURCE = Path(__file__).parents[2] / "kernels.c"
GRAIN_NS = (0, 200_000, 2_000_000)  # in the middle of which workers die

AXPY, CRC, SUM, COPY = (Kernel(f"runtime:{name}") for name in ("axpy_f64", "crc32", "sum_f64", "copy"))


def compiled(folder):
    """A kernel that spends most of its time in the middle of a grain; None without a C compiler."""
    if shutil.which(COMPILER[0]) is None:
        return None
    path = Path(folder) / "libkernels.so"
    subprocess.run([*COMPILER, "-O1", "-shared", "-fPIC", "-o", str(path), str(SOURCE)], check=True)
    return Kernel.from_library(path, "add_slowly", inout=True)


def array(wave, draw, n):
    """In the region, or outside: of whole numbers, so that sums of them are exact."""
    found = wave.rt.empty(n, "f8") if draw.random() < 0.7 else numpy.empty(n)
    found[:] = numpy.arange(n) % 1_000
    return found


def in_place(wave, draw, run):
    """A grain that was run twice, or half, is seen in what it has added."""
    n = draw.choice(SIZES)
    x, y = array(wave, draw, n), array(wave, draw, n)
    right = x * 3 + y
    run(AXPY, x, y, params=struct.pack("d", 3.0))
    assert (y == right).all(), "axpy: another result"


def slowly(wave, draw, run):
    """Half of a grain is added when its worker dies."""
    if wave.slow is None:
        return
    n = draw.choice((500, 3_000, 8_000))
    x, y = array(wave, draw, n), array(wave, draw, n)
    right = x + y
    run(wave.slow, x, y, params=struct.pack("q", draw.choice(GRAIN_NS)))
    assert (y == right).all(), "add_slowly: another result"
    wave.stock.counts["slow kernels"] += 1


def onto_itself(wave, draw, run):
    y = array(wave, draw, draw.choice(SIZES))
    right = y * 2
    run(AXPY, y, y, params=struct.pack("d", 1.0))
    assert (y == right).all(), "axpy of an array onto itself: another result"


def copying(wave, draw, run):
    x = array(wave, draw, draw.choice(SIZES))
    y = numpy.empty_like(x)
    run(COPY, x, y)
    assert (x == y).all(), "copy: another result"


def reducing(wave, draw, run):
    x = array(wave, draw, draw.choice(SIZES))
    assert run(CRC, x) == zlib.crc32(x), "crc32: another result"
    assert run(SUM, x) == x.sum(), "sum: another result"


KINDS = {slowly: 6, in_place: 3, onto_itself: 3, copying: 1, reducing: 2}


def grinding(wave, draw):
    """A client: one job after another, each with one outcome."""
    counts = wave.stock.counts

    def run(kernel, *buffers, **options):
        grain = draw.choice([None, PAGE, PAGE, 4 * PAGE])
        try:
            return wave.rt.run_kernel(kernel, *buffers, grain=grain, timeout=PATIENCE, **options)
        except TaskTimeout as error:
            raise AssertionError(f"lost: {kernel}") from error

    while wave.rises():
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        try:
            kind(wave, draw, run)
            counts["kernels"] += 1
        except RegionFull:
            counts["kernels without room"] += 1
        except WorkerDied:
            if wave.rt._settings.threads == 1:
                raise
            counts["kernels whose workers died"] += 1
