#!/usr/bin/env python3
"""Web servers under wrk while their code is reloaded and their workers are killed.

    pip install gunicorn uvicorn uvicorn-worker uwsgi      and wrk, of the system's packages
    python bench/serving.py --json serving.json

Each connection carries one request (`Connection: close`), so what is refused and what is lost are told apart:
`refused` counts connects that failed, `lost` requests without a whole answer. A worker that is killed loses
what it has open, up to all connections of wrk.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import harness
import psutil
from harness import Entry, Figure, Meter, Role, Row, Scale

HERE = Path(__file__).resolve().parent
WORKERS, CONNECTIONS = 2, 16
EVENTS = 20  # reloads, and kills
PATIENCE = 60.0
PAUSE = 0.2  # seconds of load between two events, so that each one meets a steady state

QUICK = Scale(rounds=1, row_seconds=15, seconds=2.0, limit=240)
FULL = Scale(rounds=3, row_seconds=300, seconds=10.0, limit=240)
PACKAGES = ("gunicorn", "uvicorn", "uvicorn-worker", "uwsgi")


class Server:
    """One that listens on `port`, from its start until `close`."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.folder = folder
        self.log = folder / "log"
        with open(self.log, "wb") as out:
            self.process = subprocess.Popen(
                self.command(), cwd=HERE, stdout=out, stderr=out,
                env={**os.environ, "PYTHONPATH": str(HERE.parent)},
            )  # fmt: skip
        wait(lambda: len(self.workers()) == WORKERS and self.answers(), f"{self.log.read_text()}")

    def command(self) -> list[str]:
        raise NotImplementedError

    def workers(self) -> set[int]:
        """The processes that serve: those that have none below them."""
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(self.process.pid).children(recursive=True)
            parents = {it.ppid() for it in found}
            return {it.pid for it in found if it.pid not in parents and it.status() != psutil.STATUS_ZOMBIE}
        return set()

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 5) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                return client.recv(100).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def ask_to_reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def reload(self) -> None:
        """New code in all workers."""
        before = self.workers()
        self.ask_to_reload()
        wait(lambda: len(now := self.workers()) == WORKERS and not now & before, "the reload")

    def kill(self) -> None:
        """SIGKILL to one worker, and its replacement."""
        before = self.workers()
        os.kill(victim := min(before), signal.SIGKILL)
        wait(lambda: len(now := self.workers()) == WORKERS and victim not in now, "the replacement")

    def close(self) -> None:
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        self.process.wait()


class Ours(Server):
    target = "serving_app:main"

    def command(self) -> list[str]:
        serve = ["serve", "--bind", self.address, "--workers", str(WORKERS)]
        return [sys.executable, "-m", "runtime", *serve, self.target]

    def reload(self) -> None:
        """It says when it is done."""
        times = self.log.read_text().count("reloaded: ")
        self.ask_to_reload()
        wait(lambda: self.log.read_text().count("reloaded: ") > times, "the reload")


class OursBare(Ours):
    target = f"{HERE.parent}/examples/serve_raw.py:main"


class Gunicorn(Server):
    def command(self) -> list[str]:
        name = program("gunicorn")
        kind = "uvicorn_worker.UvicornWorker"
        return [
            name,
            "-k",
            kind,
            "-w",
            str(WORKERS),
            "-b",
            self.address,
            "--log-level",
            "warning",
            "serving_app:app",
        ]


class Uwsgi(Server):
    """Its chain reload replaces one worker after the other. Asked while one is under way, it does nothing."""

    def command(self) -> list[str]:
        self.fifo = str(self.folder / "fifo")
        return [
            program("uwsgi"), "--http-socket", self.address, "--master", "--processes", str(WORKERS),
            "--lazy-apps", "--need-app", "--disable-logging", "--master-fifo", self.fifo,
            "--module", "serving_app:wsgi", "--listen", "128", "--pythonpath", str(HERE),
        ]  # fmt: skip

    def reload(self) -> None:
        before, asked = self.workers(), 0.0

        def done() -> bool:
            nonlocal asked
            if time.monotonic() - asked > 5.0:
                asked = time.monotonic()
                Path(self.fifo).write_text("c")
            return len(now := self.workers()) == WORKERS and not now & before

        wait(done, "the reload")


def program(name: str) -> str:
    """Beside this interpreter, or on PATH."""
    found = shutil.which(name, path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.01)


@contextlib.contextmanager
def wrk(port: int) -> Iterator[dict[str, float]]:
    """Load until the end of the block; then what wrk has seen."""
    command = [program("wrk"), "-t1", f"-c{CONNECTIONS}", "-d3600s", "--latency", "-H", "Connection: close"]
    process = subprocess.Popen(
        [*command, f"http://127.0.0.1:{port}/"], stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    seen: dict[str, float] = {}
    try:
        yield seen
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    seen.update(figures(text))


def figures(text: str) -> dict[str, float]:
    """Out of wrk's report."""
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    refused, *lost = map(int, errors.groups()) if errors else (0, 0)
    other = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    tail = re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    if rate is None or tail is None:
        raise ValueError(f"wrk said: {text}")
    return {
        "requests": float(rate[1]),
        "p99": float(tail[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[tail[2]],
        "refused": refused,
        "lost": sum(lost) + (int(other[1]) if other else 0),
    }


def measured(
    kind: type[Server], reloads: int, kills: int, seconds: float, meter: Meter
) -> Mapping[str, float]:
    """Under load: so many reloads, so many kills, by turns; or so many seconds of neither."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(kind(Path(folder))) as server:
        took = 0.0
        with wrk(server.port) as seen, meter.timing():
            began = time.monotonic()
            for turn in range(max(reloads, kills)):
                time.sleep(PAUSE)
                if turn < reloads:
                    start = time.monotonic()
                    server.reload()
                    took += time.monotonic() - start
                if turn < kills:
                    server.kill()
            time.sleep(max(PAUSE, seconds - (time.monotonic() - began)))
        meter.operations = max(1, int(seen["requests"] * meter.seconds))
        return {**seen, **({"a reload": took / reloads * 1e3} if reloads else {})}


CONTENDERS = (
    ("runtime + uvicorn", Role.OURS, Ours),
    ("gunicorn + uvicorn", Role.PEER, Gunicorn),
    ("uWSGI", Role.PEER, Uwsgi),
    ("runtime + asyncio", Role.PEER, OursBare),
)
FIGURES = (Figure("requests", "/s", True), Figure("p99", "ms"), Figure("refused", ""), Figure("lost", ""))


def row(name: str, meaning: str, reloads: int, kills: int, scale: Scale) -> Row:
    figures = (*FIGURES, Figure("a reload", "ms")) if reloads else FIGURES
    return Row(
        name,
        f"{meaning}; wrk with {CONNECTIONS} connections of one request each, {WORKERS} workers; an operation "
        "is a request",
        figures,
        tuple(
            Entry(
                title, role,
                lambda meter, kind=kind: measured(kind, reloads, kills, scale.seconds, meter),  # type: ignore[misc]
            )
            for title, role, kind in CONTENDERS
        ),
    )  # fmt: skip


def rows(scale: Scale) -> list[Row]:
    events = EVENTS if scale is FULL else 3
    return [
        row("steady", "nothing happens", 0, 0, scale),
        row("reloads", f"{events} reloads, one after the other", events, 0, scale),
        row("kills", f"{events} SIGKILLs of workers, one after the other", 0, events, scale),
        row("both", f"{events} reloads and {events} SIGKILLs by turns", events, events, scale),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main("Serving", rows, quick=QUICK, full=FULL, packages=PACKAGES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
