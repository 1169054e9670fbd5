#!/usr/bin/env python3
"""Does the installed package work? Run by the Python that it was installed for, from any folder.

    /path/to/environment/bin/python tools/smoke.py

`make smoke`, .ci/run and cibuildwheel (pyproject.toml) run it. It needs nothing but the package, and says
which check failed. With numpy in the environment it sends numpy's arrays, too.
"""

from __future__ import annotations

import array
import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import runtime

PATIENCE = 60.0  # seconds for any one answer
MIB = 1 << 20


class Failed(Exception):
    """What did not hold."""


def expect(holds: object, otherwise: str) -> None:
    """An assert that -O leaves standing."""
    if not holds:
        raise Failed(otherwise)


def where() -> str:
    """What is tested is the installed package, not a tree that happens to be on the path."""
    found, prefix = Path(runtime.__file__).resolve(), Path(sys.prefix).resolve()
    expect(found.is_relative_to(prefix), f"imported from {found}, which is not in {prefix}")
    version = importlib.metadata.version("runtime-workers")
    expect(runtime.__version__ == version, f"__version__ {runtime.__version__}, installed as {version}")
    return f"{version} on {sys.version.split()[0]}"


def tasks(rt: runtime.Runtime) -> str:
    pids = {rt.submit(os.getpid).result(PATIENCE) for _ in range(10)}
    expect(os.getpid() not in pids, "a task ran in the host")
    squares = list(rt.map(lambda x: x * x, range(1000), timeout=PATIENCE))
    expect(squares == [x * x for x in range(1000)], "a map came back wrong")
    return f"the host is {os.getpid()}, tasks ran in {sorted(pids)}"


def arrays(rt: runtime.Runtime) -> str:
    """1 MiB there and back, through the region."""
    numbers = array.array("d", range(MIB // 8))
    back = rt.submit(lambda x: x[::-1], numbers).result(PATIENCE)
    expect(back == numbers[::-1], "an array came back wrong")
    try:
        numpy: Any = importlib.import_module("numpy")
    except ImportError:
        return "array.array, there is no numpy"
    ramp = numpy.arange(MIB // 8, dtype=float)
    more = rt.submit(lambda x: x + 1, ramp).result(PATIENCE)
    expect((more == ramp + 1).all(), "a numpy array came back wrong")
    return f"array.array and numpy {numpy.__version__}"


def death(rt: runtime.Runtime) -> str:
    """A task that kills its worker fails alone, and a new worker takes the place."""
    before = workers(rt)
    killed = rt.submit(lambda: os.kill(os.getpid(), signal.SIGKILL)).exception(PATIENCE)
    if not isinstance(killed, runtime.WorkerDied):
        raise Failed(f"a killed task ended with {killed!r}")
    expect(killed.pid in before, f"{killed} is none of {before}")
    after = workers(rt, without=killed.pid)
    expect(sum(rt.map(abs, range(-100, 0), timeout=PATIENCE)) == 5050, "wrong after a worker's death")
    return f"worker {killed.pid} was killed, {sorted(after - before)[0]} took its place"


def workers(rt: runtime.Runtime, without: int | None = None) -> set[int]:
    """The pids of both workers, when both are there and none of them is `without`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        pids = {worker.pid for worker in rt.workers() if worker.pid is not None}
        if len(pids) == 2 and without not in pids:
            return pids
        expect(time.monotonic() < deadline, f"no two workers but {without}: {rt.workers()}")
        time.sleep(0.01)


def command() -> str:
    """The script that the installer made: `runtime run`, and a doctor that finds nothing wrong."""
    script = os.path.join(sysconfig.get_path("scripts"), "runtime")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.py").write_text(
            "def go(rt, argv):\n    print(sum(rt.map(int, argv)))\n    return 7\n"
        )
        done = call(script, "run", "--workers", "1", "--no-progress", "job.py:go", "1", "2", cwd=folder)
        expect((done.returncode, done.stdout) == (7, "3\n"), f"runtime run: {done}")
        done = call(script, "doctor", cwd=folder)
        expect(done.returncode == 0, f"runtime doctor:\n{done.stdout}{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def call(*argv: str, cwd: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=2 * PATIENCE)


def main() -> None:
    print(f"smoke: package: {where()}", flush=True)
    with runtime.Runtime(2) as rt:
        for check in (tasks, arrays, death):
            print(f"smoke: {check.__name__}: {check(rt)}", flush=True)
    print(f"smoke: command: {command()}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        sys.exit(f"smoke: FAILED: {failed}")
