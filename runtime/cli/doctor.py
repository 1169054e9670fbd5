"""`runtime doctor`: what this machine offers, what is wrong with it, and the cure.

A check is a function that returns a `Check`; one that raises is itself a failed check. They run
from the bottom up, so the first failure is usually the cause of those below it.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from runtime import config, machine
from runtime.cli import broken, exits

__all__ = ["Check", "checks", "command", "table"]

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"

MIB: Final = 1 << 20
_PATIENCE: Final = 30.0  # seconds for the round trip


@dataclass(frozen=True, slots=True)
class Check:
    """One line: `status` is ok, warn or fail; `cure` says what to do unless it is ok."""

    name: str
    status: str
    detail: str
    cure: str = ""


def command(arguments: argparse.Namespace) -> int:
    results = checks()
    failed = any(check.status == FAIL for check in results)
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in results]}, indent=2))
    else:
        _print(results)
    return exits.FAILED if failed else exits.OK


def checks() -> list[Check]:
    return [_guarded(name, check) for name, check in _CHECKS]


def _guarded(name: str, check: Callable[[str], Check]) -> Check:
    try:
        return check(name)
    except ImportError as error:
        return Check(name, WARN, f"not checked: {error}", "cure what does not load first")
    except Exception as error:
        return Check(
            name, FAIL, f"{type(error).__name__}: {error}", "the check itself failed; please report it"
        )


# What is installed


def _python(name: str) -> Check:
    detail = f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})"
    if sys.implementation.name != "cpython" or sys.version_info < (3, 11):
        return Check(name, FAIL, detail, "use CPython 3.11 or later")
    return Check(name, OK, detail)


def _packages(name: str) -> Check:
    required = {package: _version(package) for package in ("pyzmq", "psutil", "cloudpickle")}
    optional = {package: _version(package) for package in ("rich", "numpy")}
    detail = ", ".join(f"{package} {found or 'missing'}" for package, found in required.items())
    detail += "".join(f", {package} {found}" for package, found in optional.items() if found)
    missing = [package for package, found in required.items() if not found]
    if missing:
        return Check(name, FAIL, detail, f"pip install {' '.join(missing)}")
    for package in ("psutil", "cloudpickle"):  # libzmq has a check of its own
        try:
            importlib.import_module(package)
        except ImportError as error:
            cure = f"pip install --force-reinstall {package}"
            return Check(name, FAIL, f"{detail}; {package} does not load: {error}", cure)
    return Check(name, OK, detail)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _core(name: str) -> Check:
    try:
        core = importlib.import_module("runtime._core")
    except ImportError as error:
        cure = "install a wheel, or build it in place: python tools/build.py"
        return Check(name, FAIL, f"does not load: {error}", cure)
    return Check(name, OK, os.path.basename(str(core.__file__)))


def _libzmq(name: str) -> Check:
    try:
        zmq = importlib.import_module("zmq")
    except ImportError as error:
        return Check(name, FAIL, f"does not load: {error}", "pip install --force-reinstall pyzmq")
    detail = f"{zmq.zmq_version()} (pyzmq {zmq.pyzmq_version()})"
    if zmq.zmq_version_info() < (4, 1):
        return Check(name, FAIL, detail, "pip install --upgrade pyzmq")
    return Check(name, OK, detail)


def _package(name: str) -> Check:
    if broken.reason is not None:
        return Check(name, FAIL, broken.told(), "the checks that failed above are the likely cause")
    return Check(name, OK, os.path.dirname(importlib.import_module("runtime").__file__ or ""))


# What the kernel allows


def _kernel(name: str) -> Check:
    detail = f"{platform.system()} {platform.release()}"
    missing, tried = [], ", ".join(call for call, _ in _CALLS)
    for call, attempt in _CALLS:
        try:
            attempt()
        except OSError as error:
            missing.append(f"{call} ({error.strerror})")
        except ImportError:
            tried = "its calls cannot be tried: the core does not load"
    if missing:
        cure = "use Linux 5.3 or later; in a container, let its seccomp profile allow these calls"
        return Check(name, FAIL, f"{detail} without {' and '.join(missing)}", cure)
    too_old = machine.problem()
    if too_old is not None:
        return Check(name, FAIL, too_old, f"all calls work here: set {machine.ANY_KERNEL}=1")
    detail += f", {tried}"
    if not os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children"):
        cure = "use a kernel with CONFIG_PROC_CHILDREN: what tasks start may else outlive a killed worker"
        return Check(name, WARN, f"{detail}; /proc does not tell a process's children", cure)
    return Check(name, OK, detail)


def _calls() -> Any:
    """The system calls as the core makes them. Raises: ImportError."""
    return importlib.import_module("runtime._core")


def _try_pidfd() -> None:
    fd = _calls().pidfd_open(os.getpid())
    try:
        select.select([fd], [], [], 0)
    finally:
        os.close(fd)


def _try_pidfd_signal() -> None:
    fd = _calls().pidfd_open(os.getpid())
    try:
        _calls().pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)


def _try_memfd() -> None:
    """Sealed, as a region is."""
    fd = _calls().memfd_create(b"runtime-doctor")
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    finally:
        os.close(fd)


_CALLS: Final[tuple[tuple[str, Callable[[], None]], ...]] = (
    ("pidfd_open", _try_pidfd),
    ("pidfd_send_signal", _try_pidfd_signal),
    ("memfd_create", _try_memfd),
    ("eventfd", lambda: os.close(os.eventfd(0, os.EFD_CLOEXEC))),
)


def _cpus(name: str) -> Check:
    affinity, quota, workers = len(os.sched_getaffinity(0)), config.cpu_quota(), config.default_workers()
    limit = "no cgroup quota" if quota is None else f"cgroup quota {quota:g}"
    detail = f"{affinity} by affinity, {limit}: {workers} worker{'' if workers == 1 else 's'} by default"
    if quota is not None and quota < 1:
        return Check(name, WARN, detail, "less than one CPU: expect pauses; raise the quota (docker --cpus)")
    return Check(name, OK, detail)


def _memory(name: str) -> Check:
    total, limit, most = config.memory_total(), config.memory_limit(), config.default_region_max()
    detail = f"{_bytes(total)} in the machine, "
    detail += "no cgroup limit" if limit is None else f"cgroup limit {_bytes(limit)}"
    detail += f": room for a region of {_bytes(most)}"
    if most < 64 * MIB:
        cure = "raise the memory limit (docker --memory): large arguments will travel slowly"
        return Check(name, WARN, detail, cure)
    return Check(name, OK, detail)


def _files(name: str) -> Check:
    from runtime.lifecycle import raise_descriptor_limit

    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    workers = config.default_workers()
    detail = f"RLIMIT_NOFILE {soft} (hard limit {hard})"
    try:
        raise_descriptor_limit(workers)  # as each Runtime does
    except OSError as error:
        return Check(name, FAIL, detail, str(error))
    return Check(name, OK, f"{detail}, enough for {workers} worker{'' if workers == 1 else 's'}")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


# Where files and sockets go


def _shm(name: str) -> Check:
    cure = "only named regions need it (SharedRegion.create(name=...)); in a container: --shm-size 1g"
    if not os.path.isdir("/dev/shm"):
        return Check(name, WARN, "/dev/shm does not exist", cure)
    total, _, free = shutil.disk_usage("/dev/shm")
    detail = f"{_bytes(total)}, {_bytes(free)} free; used by named regions only"
    if not os.access("/dev/shm", os.W_OK | os.X_OK):
        return Check(name, WARN, f"{detail}; not writable", cure)
    return Check(name, OK, detail) if free >= 16 * MIB else Check(name, WARN, detail, cure)


def _sockets(name: str) -> Check:
    """The folder that a Runtime would make now, and whether its filesystem holds sockets."""
    from runtime import sockets

    cure = "set XDG_RUNTIME_DIR or TMPDIR to a short, writable folder, for example /run/user/$UID"
    try:
        folder = sockets.make_folder()
    except OSError as error:
        return Check(name, FAIL, str(error), cure)
    parent, wanted = os.path.dirname(folder), os.environ.get("XDG_RUNTIME_DIR")
    path = os.path.join(folder, "doctor")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        os.unlink(path)
    except OSError as error:
        return Check(name, FAIL, f"{parent} cannot hold a socket: {error.strerror}", cure)
    finally:
        os.rmdir(folder)
    if wanted and os.path.realpath(wanted) != os.path.realpath(parent):
        return Check(name, WARN, f"in {parent}, because XDG_RUNTIME_DIR ({wanted}) cannot be used", cure)
    return Check(name, OK, f"in {parent}")


# The proof


def _round_trip(name: str) -> Check:
    """A Runtime of one worker, in a process of its own: a hang or a crash is an answer, too."""
    cure = "the checks that failed are the likely cause; if none did, please report it"
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "runtime.cli.roundtrip", str(_PATIENCE)],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return Check(name, FAIL, f"no end in {_PATIENCE:.0f} s", cure)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check(name, FAIL, last, cure)
    found = json.loads(done.stdout)
    if found["worker"] == found["host"]:
        return Check(name, FAIL, "the task ran in the host, not in a worker", "please report it")
    first, usual = found["first"] * 1e3, found["usual"] * 1e6
    return Check(
        name,
        OK,
        f"first result after {first:.0f} ms, then {usual:.0f} us each (worker pid {found['worker']})",
    )


_CHECKS: Final[tuple[tuple[str, Callable[[str], Check]], ...]] = (
    ("python", _python),
    ("packages", _packages),
    ("kernel", _kernel),
    ("cpus", _cpus),
    ("memory", _memory),
    ("open files", _files),
    ("/dev/shm", _shm),
    ("sockets", _sockets),
    ("libzmq", _libzmq),
    ("core", _core),
    ("package", _package),
    ("round trip", _round_trip),
)


def _print(results: list[Check]) -> None:
    """In columns and colours on a terminal where rich is installed, else plain."""
    try:
        tables = importlib.import_module("rich.table") if sys.stdout.isatty() else None
    except ImportError:
        tables = None
    if tables is None:
        print(table(results))
        return
    grid = tables.Table(box=None, show_header=False, pad_edge=False)
    for check in results:
        colour = {OK: "green", WARN: "yellow", FAIL: "bold red"}[check.status]
        grid.add_row(f"[{colour}]{check.status}[/]", check.name, _verbatim(check.detail))
        if check.cure:
            grid.add_row("", "", _verbatim(f"-> {check.cure}", "italic"))
    importlib.import_module("rich.console").Console(highlight=False).print(
        grid, "", _verdict(results), sep="\n"
    )


def _verbatim(text: str, style: str = "") -> Any:
    """Not markup: a message may hold brackets."""
    return importlib.import_module("rich.text").Text(text, style)


def table(results: list[Check]) -> str:
    """Plain text: status, name, detail, and the cure below what is not ok."""
    width = max((len(check.name) for check in results), default=0)
    lines = []
    for check in results:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.cure:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.cure}")
    return "\n".join([*lines, "", _verdict(results)])


def _verdict(results: list[Check]) -> str:
    failed, warned = (sum(check.status == status for check in results) for status in (FAIL, WARN))
    verdict = f"{failed} of {len(results)} checks failed" if failed else "all is well"
    return verdict + (f", {warned} warning{'s'[: warned > 1]}" if warned else "")


def _bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    number = float(size)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
