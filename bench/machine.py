"""What a benchmark has to know about the machine: its facts, and which process used how much CPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds, the unit of the times in /proc/PID/stat
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 36, 37
_prctl = ctypes.CDLL(None, use_errno=True).prctl


# ---- facts ---------------------------------------------------------------------------------------


def facts(packages: Iterable[str]) -> dict[str, Any]:
    """What a reader of the figures must know. A package that is not installed has the version None."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
        "load_before": os.getloadavg()[0],
    }


def version(package: str) -> str | None:
    """Of the installed distribution `package`, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit of this tree, with a + if tracked files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- processes -----------------------------------------------------------------------------------


def descendants(root: int) -> dict[int, float]:
    """Every process below `root`: pid -> CPU seconds of the children that it has waited for."""
    parents, waited = {}, {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                # The name of the program, in parentheses, may hold anything; the numbers follow it.
                fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
                parents[int(name)] = int(fields[1])
                waited[int(name)] = (int(fields[13]) + int(fields[14])) * _TICK
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: waited[pid] for pid in found - {root}}


def cpu_seconds_of_others(root: int) -> float:
    """CPU seconds so far of all processes below `root`, ended ones too, but without this one's own."""
    while True:
        before, total, complete = _cpu_seconds_of_waited_children(), 0.0, True
        for pid, waited in descendants(root).items():
            if pid != os.getpid():
                try:
                    # The clock of another process (man 3 clock_getcpuclockid): ns, where /proc has 10 ms.
                    total += time.clock_gettime(~pid << 3 | 2) + waited
                except OSError:  # it has ended just now: its parent's count has it, read too early
                    complete = False
        if complete and before == _cpu_seconds_of_waited_children():
            return total + before


def _cpu_seconds_of_waited_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def adopting() -> Iterator[None]:
    """While it holds, orphans below this process become its children, and so can be found."""
    before = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, before.value)


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_all_but(known: Iterable[int], patience: float) -> int:
    """Wait until this process has no descendants but `known`; after `patience` seconds, kill the rest.

    Returns how many had to be killed. Needs `adopting`. Raises RuntimeError if one cannot be killed.
    """
    spared, killed = set(known), set[int]()
    start = time.monotonic()
    while left := descendants(os.getpid()).keys() - spared:
        late = time.monotonic() - start - patience
        if late > 10:
            raise RuntimeError(f"processes {sorted(left)} do not end")
        for pid in left:
            with suppress(ChildProcessError):  # the child of a child: its parent ends first
                if os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            if late > 0:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        time.sleep(0.002)
    return len(killed)
