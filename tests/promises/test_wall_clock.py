"""Promise 20: steps of the wall clock by an hour change nothing.

The process and its workers run under a shim that shifts what they are told (tests/clock.c); the machine's
clock is not touched. What waits there, and for how long, is in clocks.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

import pytest
from watching import host

CODE = "import sys; sys.path.append(sys.argv[2]); import clocks; clocks.main()"
COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
SOURCE = Path(__file__).parent.parent / "clock.c"


@pytest.fixture
def shim(tmp_path):
    """Environment of a process whose wall clock follows a file, and the file."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("there is no C compiler for the shim")
    library, steps = tmp_path / "libclock.so", tmp_path / "steps"
    subprocess.run([*COMPILER, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    steps.write_bytes(struct.pack("q", 0))
    return {"LD_PRELOAD": str(library), "CLOCK_STEPS": str(steps)}


def stepped(shim, **options):
    settings = json.dumps({"path": shim["CLOCK_STEPS"], **options})
    with host(CODE, settings, str(Path(__file__).parent), environ=shim) as one:
        counts = json.loads(one.line())
        assert one.process.wait(30) == 0
        one.gone()
    return counts


def test_steps_of_the_wall_clock_change_nothing(tally, shim):
    while tally.more():
        steps = float("inf") if tally.is_slice else tally.goal["steps"]
        seconds = tally.seconds / 2 if tally.is_slice else 0
        tally.counts.update(stepped(shim, seed=tally.seed, steps=steps, seconds=seconds))
