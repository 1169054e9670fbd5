"""How tests of processes look at the world: conditions with deadlines, families, hosts as scripts.

Nothing here sleeps to synchronise: `until` polls a condition, and fails with its words at the deadline.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parent.parent)
SESSION = "PYTEST_LEFTOVER_MARK"  # in the environment of all that this session starts: conftest.py
FAMILY = "RUNTIME_TEST_FAMILY"  # in the environment of a script and of all that it starts


def until(condition: Callable[[], Any], what: str | Callable[[], object] = "", seconds: float = 30.0) -> Any:
    """The first true value of `condition()`; `what`, or what it says by then, is for the message."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while not (value := condition()):
        if time.monotonic() > deadline:
            words = what() if callable(what) else what
            raise AssertionError(f"not within {seconds:g} s: {words or condition}")
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return value


def read_pids(path: Any, count: int = 1) -> list[int]:
    """The pids that a task has noted in a file, as soon as there are `count` of them."""
    path = Path(path)

    def found() -> list[int]:
        text = path.read_text() if path.exists() else ""
        pids = [int(line) for line in text.split("\n")[:-1]]
        return pids if len(pids) >= count else []

    return until(found, f"{count} pids in {path.name}")


def fields(pid: int | str) -> list[str]:
    """/proc/PID/stat from the state on; [] if there is no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return []


def alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    return fields(pid)[:1] not in ([], ["Z"], ["X"])


def stopped(pid: int) -> bool:
    return fields(pid)[:1] == ["T"]


def parent(pid: int) -> int:
    """Its parent's pid; 0: it is gone."""
    found = fields(pid)
    return int(found[1]) if found else 0


def send(pid: int, number: int) -> None:
    """A signal to a process that this session has started, directly or not; never to any other."""
    fd = os.pidfd_open(pid)
    try:
        if f"{SESSION}={os.environ[SESSION]}" not in environment_of(pid):
            raise ProcessLookupError(f"{pid} has ended, or was never ours")
        signal.pidfd_send_signal(fd, number)
    finally:
        os.close(fd)


def environment_of(pid: int) -> list[str]:
    """NAME=value of a process as it was started; a fork keeps it. [] when it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return []


def family(mark: str) -> set[int]:
    """Live processes with this mark in their environment (a fork keeps it, and so does exec)."""
    wanted = f"{FAMILY}={mark}"
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return {pid for pid in pids if wanted in environment_of(pid) and alive(pid)}


def fork(run: Callable[[], object]) -> int:
    """The pid of a child that calls run() and ends, with 0 unless that raised."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def join(*pids: int) -> None:
    """Wait for children of ours, which must end with 0."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * len(pids)


# ---- a runtime's processes -----------------------------------------------------------------------


def all_ready(rt: Any) -> dict[int, int]:
    """{number: pid} once every worker is READY."""

    def ready() -> dict[int, int]:
        infos = rt.workers()
        good = all(info.status.name == "READY" and info.pid for info in infos)
        return {info.number: info.pid for info in infos} if good else {}

    return until(ready, "all workers are ready")


def ready(rt: Any) -> Any:
    """The runtime itself, once all its workers are."""
    all_ready(rt)
    return rt


def pids(rt: Any) -> set[int]:
    """Of its workers."""
    return {worker.pid for worker in rt.workers() if worker.pid is not None}


def idle(rt: Any) -> bool:
    """Nothing waits, nothing runs."""
    stats = rt.stats()
    return stats.queued == stats.leased == stats.running == 0  # type: ignore[no-any-return]


def zygote_of(worker: int) -> int:
    """The process that has forked this worker of ours; 0 if that has ended."""
    with contextlib.suppress(IndexError):
        pid = parent(worker)
        return pid if parent(pid) == os.getpid() else 0
    return 0


def settled(rt: Any) -> None:
    """Every task that was accepted has ended, each once, and nothing is under way."""
    dispatcher = rt._core.dispatcher
    until(lambda: dispatcher.idle and rt.stats().leased == 0, lambda: f"everything has ended: {rt.stats()}")
    stats = rt.stats()
    assert stats.done + stats.failed + stats.cancelled == dispatcher.accepted, (stats, dispatcher.accepted)
    assert (stats.queued, stats.leased, stats.running) == (0, 0, 0), stats


def shut_down_clean(rt: Any) -> None:
    """After the end of a runtime no block and no lease is left. The caller has dropped its results."""
    rt.shutdown()
    kept, inflight, _ = rt._core.dispatcher.counts()
    assert (kept, inflight) == (0, 0)
    assert rt._core.arena.owners() == {}


# ---- hosts as scripts ----------------------------------------------------------------------------


def environment(mark: str = "", **more: str) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    path = os.pathsep.join((ROOT, os.path.join(ROOT, "tests")))
    return {**environ, "PYTHONPATH": path, FAMILY: mark, **more}


class Host:
    """A script in a process of its own, that makes a Runtime and says what is needed, a line at a time."""

    def __init__(self, code: str, *args: str, **options: Any) -> None:
        self.mark = uuid.uuid4().hex
        environ = environment(self.mark, **options.pop("environ", {}))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
            **options,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        text = self.process.stdout.readline()
        assert text, f"the script ended with {self.process.wait(20)}"
        return text.rstrip("\n")

    def pids(self) -> list[int]:
        return [int(text) for text in self.line().split()]

    def gone(self, spare: frozenset[int] = frozenset(), seconds: float = 10.0) -> None:
        """Fails if something of the script's lives longer than that."""
        until(
            lambda: not family(self.mark) - spare,
            lambda: "\n".join(
                ["the end of all that the script started:", *describe(family(self.mark) - spare)]
            ),
            seconds,
        )

    def close(self) -> None:
        """End what is left of it, gently for what reads stdin."""
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        for pid in family(self.mark):
            with contextlib.suppress(OSError):
                send(pid, signal.SIGKILL)
        self.process.wait(20)


@contextlib.contextmanager
def host(code: str, *args: str, **options: Any) -> Iterator[Host]:
    one = Host(code, *args, **options)
    try:
        yield one
    finally:
        one.close()


def run(
    argv: list[str], code: str | None = None, environ: dict[str, str] | None = None, **options: Any
) -> Any:
    """A script to its end: CompletedProcess with text. `code` is its standard input."""
    return subprocess.run(
        [sys.executable, *argv],
        input=code or "",
        capture_output=True,
        text=True,
        timeout=40,
        env=environment(**(environ or {})),
        **options,
    )


def output(code: str, *args: str, **options: Any) -> list[str]:
    """The lines that a script prints; it must succeed."""
    done = run(["-c", code, *args], **options)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr[-4000:]}"
    return done.stdout.splitlines()


def run_script(folder: Path, text: str, code: int = 0) -> str:
    """Run a program of its own in `folder`; what it wrote. It must end with `code` and an empty stderr."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    done = run([str(path)], cwd=folder)
    assert (done.returncode, done.stderr) == (code, ""), f"stdout: {done.stdout}\nstderr: {done.stderr}"
    return done.stdout  # type: ignore[no-any-return]


def describe(pids: set[int]) -> list[str]:
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.append(f"{pid} (child of {parent(pid)}): {command[:120]}")
    return found


def blocks_are_back(rt: Any, functions: int) -> None:
    """Until only the pickles of functions are in the region, so many bytes of them at most."""

    def back() -> bool:
        gc.collect()
        stats = rt.stats()
        return set(rt._core.arena.owners()) <= {"host"} and stats.used <= functions and stats.pinned == 0

    until(back, lambda: f"blocks are back: {rt._core.arena.owners()}, {rt.stats()}", 5.0)
