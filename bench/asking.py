#!/usr/bin/env python3
"""What it costs to be asked: `runtime ctl … status` under full load, and a Prometheus that scrapes.

    python bench/asking.py --json asking.json

The client of ctl runs already and connects anew for each question. A scrape is that of /metrics and /health,
every five seconds, of a runtime with 16 workers; what counts is the CPU time of the host alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import harness
import tasks
from harness import Entry, Figure, Meter, Role, Row, Scale

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import metrics
from runtime.cli.ctl import Client

WORKERS, MANY = 2, 16
ASKS = 2_000
TASK = 0.001  # seconds of one task of the load
EVERY = 5.0  # seconds between two scrapes

QUICK = Scale(rounds=1, row_seconds=15, seconds=10.0, limit=60)
FULL = Scale(rounds=3, row_seconds=400, seconds=60.0, limit=180)
PACKAGES = ("prometheus-client",)

SCRAPER = """
import sys, time, urllib.request
while True:
    for path in ("metrics", "health"):
        urllib.request.urlopen(f"http://{sys.argv[1]}/{path}").read()
    time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def busy(rt: runtime.Runtime) -> Iterator[None]:
    """Every worker has something to do all the time."""
    over = threading.Event()

    def feed() -> None:
        for _ in rt.map(tasks.spin, itertools.repeat(TASK), chunksize=1, buffersize=64):
            if over.is_set():
                return

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def status(loaded: bool, meter: Meter) -> Mapping[str, float]:
    """Milliseconds from connect to answer."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        with runtime.Runtime(WORKERS, name="asked") as rt, contextlib.ExitStack() as stack:
            rt.submit(tasks.nothing).result()
            if loaded:
                stack.enter_context(busy(rt))
            meter.operations = ASKS
            with meter.timing():
                for _ in range(ASKS):
                    start = time.perf_counter()
                    with contextlib.closing(Client("asked")) as client:
                        client.ask("status")
                    times.append(time.perf_counter() - start)
    times.sort()
    return {"p50": times[ASKS // 2] * 1e3, "p99": times[ASKS * 99 // 100] * 1e3, "max": times[-1] * 1e3}


def scraped(by: bool, seconds: float, meter: Meter) -> Mapping[str, float]:
    """Per cent of a core that the host takes, doing nothing else."""
    with runtime.Runtime(MANY) as rt, contextlib.ExitStack() as stack:
        rt.submit(tasks.nothing).result()
        while rt.stats().workers < MANY:
            time.sleep(0.01)
        server = stack.enter_context(contextlib.closing(metrics.serve(rt, "127.0.0.1:0")))
        if by:
            command = [sys.executable, "-c", SCRAPER, "{}:{}".format(*server.address), str(EVERY)]
            scraper = stack.enter_context(subprocess.Popen(command))
            stack.callback(scraper.kill)
        time.sleep(1.0)
        meter.operations = max(1, int(seconds / EVERY))
        with meter.timing():
            before = time.process_time()
            time.sleep(seconds)
            used = time.process_time() - before
    return {"": used / seconds * 100}


def rows(scale: Scale) -> list[Row]:
    return [
        Row(
            "ctl status",
            f"{ASKS:,} times connect, ask, close; {WORKERS} workers, tasks of {TASK * 1e3:g} ms. An "
            "operation is a question.",
            (Figure("p50", "ms"), Figure("p99", "ms"), Figure("max", "ms")),
            (
                Entry("under load", Role.OURS, lambda meter: status(True, meter)),
                Entry("idle", Role.LIMIT, lambda meter: status(False, meter)),
            ),
        ),
        Row(
            "scraped",
            f"CPU time of the host over {scale.seconds:g} s, {MANY} idle workers, /metrics and /health each "
            f"{EVERY:g} s. An operation is a scrape.",
            (Figure("", "% of a core"),),
            (
                Entry("scraped", Role.OURS, lambda meter: scraped(True, scale.seconds, meter)),
                Entry("not scraped", Role.PEER, lambda meter: scraped(False, scale.seconds, meter)),
            ),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main("Asking", rows, quick=QUICK, full=FULL, packages=PACKAGES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
