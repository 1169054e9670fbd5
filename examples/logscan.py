#!/usr/bin/env python3
"""A web server's log of some hundred megabytes, scanned by a C kernel on all cores, checked against numpy.

    python examples/logscan.py                      make a log, scan it, compare, report
    python examples/logscan.py --size 64MiB --kill 5    the same while 5 workers are killed at work
    python examples/logscan.py --file access.log    a log of yours, in the format of line() in logscan.c

Lines, answers by status, bytes sent and a histogram of latencies. The heart of it:

    kernel = runtime.Kernel.from_library("scan.so", "scan", partial=COUNTS.size, combine=combine)
    with runtime.Runtime() as rt:
        log = rt.alloc(size)                        # memory that all workers see
        file.readinto(log)
        counts = rt.run_kernel(kernel, log)         # every thread of every worker, without the GIL

The kernel (logscan.c, built with cc) sees pieces that are cut at any byte: it hands back the parts of lines
at both ends of a piece, and combine() joins them. The same question is answered by numpy in one thread, by
polars and by pyarrow where they are installed. The exit code is 0 only if all answers are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import runtime

HERE = Path(__file__).resolve().parent
STATUSES, BUCKETS, FRAGMENT = 600, 48, 2040  # as in logscan.c
COUNTS = struct.Struct(f"3Q {STATUSES}Q {BUCKETS}Q 4I {FRAGMENT}s {FRAGMENT}s")
PART = 4 << 20  # bytes of the log that one task makes
CHUNK = 16 << 20  # bytes that numpy looks at in one go
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
FIELDS = ("status", "bytes", "latency")
PATTERN = r'^[^"]*"[^"]*" (?P<status>\d{1,18}) (?P<bytes>\d{1,18}) "[^"]*" (?P<latency>\d{1,18})$'
LINE = re.compile(PATTERN.encode())


@dataclass
class Answer:
    """What is asked of a log. latency: lines by the number of bits of their microseconds."""

    lines: int = 0
    malformed: int = 0
    bytes: int = 0
    status: dict[int, int] = field(default_factory=dict)
    latency: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, line: bytes) -> None:
        """Count one line."""
        self.lines += 1
        match = LINE.fullmatch(line)
        if match is None or int(match[1]) >= STATUSES:
            self.malformed += 1
            return
        status, nbytes, latency = map(int, match.groups())
        self.bytes += nbytes
        self.status[status] = self.status.get(status, 0) + 1
        self.latency[min(latency.bit_length(), BUCKETS - 1)] += 1


# Making a log


def make_part(seed: int, number: int, nbytes: int) -> bytes:
    """So many bytes of log, or a line more; the same for the same seed and number."""
    rng = random.Random(f"{seed}/{number}")
    paths = [f"/{a}/{b}" for a in ("api/items", "static/js", "users", "search") for b in range(200)]
    agents = ["Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/128.0", "curl/8.5.0", "Googlebot/2.1"]
    lines, size, second = [], 0, number * 40
    while size < nbytes:
        second += 1
        n = 500
        for path, method, status, agent, sent, slow in zip(
            rng.choices(paths, k=n),
            rng.choices(("GET", "POST", "PUT"), (90, 8, 2), k=n),
            rng.choices((200, 206, 301, 304, 404, 500, 503), (850, 10, 20, 70, 40, 8, 2), k=n),
            rng.choices(agents, (70, 20, 10), k=n),
            (rng.randrange(1 << rng.randrange(4, 22)) for _ in range(n)),
            (rng.randrange(1 << rng.randrange(6, 24)) for _ in range(n)),
            strict=True,
        ):
            line = (
                f"198.51.100.{sent % 254} - - [23/Nov/2026:10:{second // 60 % 60:02}:{second % 60:02} +0000] "
                f'"{method} {path}?q={slow:x} HTTP/1.1" {status} {sent} "{agent}" {slow}\n'
            )
            if slow % 4096 == 7:
                line = line[: len(line) // 3] + "\n"  # cut off, as by a full disk
            lines.append(line)
            size += len(line)
    return "".join(lines).encode()


def make_log(rt: runtime.Runtime, path: Path, size: int, seed: int) -> None:
    """Write a log of at least so many bytes."""
    numbers = range(-(-size // PART))
    with path.open("wb") as file:
        for part in rt.map(make_part, [seed] * len(numbers), numbers, [PART] * len(numbers), buffersize=8):
            file.write(part)


# The answers


def build_kernel(folder: Path) -> runtime.Kernel:
    """Compile logscan.c. Raises: subprocess.CalledProcessError, FileNotFoundError without a compiler."""
    library = folder / "logscan.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", library, HERE / "logscan.c"], check=True)
    return runtime.Kernel.from_library(str(library), "scan", partial=COUNTS.size, combine=combine)


def combine(parts: list[bytes], lengths: list[int]) -> Answer:
    """One answer from those of all pieces, in their order."""
    answer = Answer()
    carry = b""  # the fragment of a line that began in an earlier piece
    for part in parts:
        lines, malformed, nbytes, *rest = COUNTS.unpack(part)
        newlines, head, tail, _, heads, tails = rest[-6:]
        answer.lines += lines
        answer.malformed += malformed
        answer.bytes += nbytes
        for status, count in enumerate(rest[:STATUSES]):
            if count:
                answer.status[status] = answer.status.get(status, 0) + count
        for bucket, count in enumerate(rest[STATUSES : STATUSES + BUCKETS]):
            answer.latency[bucket] += count
        carry += heads[:head]
        if newlines:
            answer.add(carry)
            carry = tails[:tail]
    if carry:
        answer.add(carry)
    return answer


def read_and_scan(rt: runtime.Runtime, kernel: runtime.Kernel, path: Path) -> Answer:
    """The answer of the kernel on all threads of all workers."""
    log = rt.alloc(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(log):
            done += file.readinto(log[done:]) or len(log)
    return rt.run_kernel(kernel, log)


def with_numpy(path: Path) -> Answer:
    """The answer of numpy, in one thread."""
    import numpy as np

    answer, status, carry = Answer(), np.zeros(STATUSES, np.int64), b""
    latency = np.zeros(BUCKETS, np.int64)

    def numbers(data: Any, begin: Any, end: Any) -> Any:
        """The numbers between two places of each line."""
        values = np.zeros(len(begin), np.int64)
        for digit in range(int((end - begin).max(initial=0))):
            at = begin + digit
            inside = at < end
            values[inside] = values[inside] * 10 + (data[at[inside]] - 48)
        return values

    with path.open("rb") as file:
        while block := file.read(CHUNK):
            block = carry + block
            cut = block.rfind(b"\n") + 1
            carry = block[cut:]
            data = np.frombuffer(block, np.uint8, cut)
            newlines = np.flatnonzero(data == 10)
            quotes = np.flatnonzero(data == 34)
            line = np.searchsorted(newlines, quotes)
            good = np.bincount(line, minlength=len(newlines)) == 4
            q = quotes[good[line]].reshape(-1, 4)
            ends = newlines[good]
            space = q[:, 1] + 5  # behind three digits
            code = numbers(data, q[:, 1] + 2, space)
            answer.lines += len(newlines)
            answer.malformed += len(newlines) - len(code)
            answer.bytes += int(numbers(data, space + 1, q[:, 2] - 1).sum())
            status += np.bincount(code, minlength=STATUSES)
            bits = np.frexp(numbers(data, q[:, 3] + 2, ends).astype(float))[1]
            latency += np.bincount(np.minimum(bits, BUCKETS - 1), minlength=BUCKETS)
    for rest in carry.splitlines():
        answer.add(rest)
    answer.status = {
        int(s): int(status[s]) + answer.status.get(int(s), 0)
        for s in {*np.flatnonzero(status).tolist(), *answer.status}
    }
    answer.latency = [a + int(b) for a, b in zip(answer.latency, latency, strict=True)]
    return answer


def bit_lengths(numbers: Any) -> Any:
    """The buckets of an array of latencies, as float64 counts bits: exact below 2**53."""
    import numpy as np

    return np.minimum(np.frexp(np.asarray(numbers, float))[1], BUCKETS - 1)


def with_polars(path: Path) -> Answer:
    """The answer of polars, in as many threads as it likes."""
    import polars as pl

    text = pl.scan_csv(path, has_header=False, separator="\x01", quote_char=None, new_columns=["line"])
    fields = text.select(pl.col("line").str.extract_groups(PATTERN).struct.unnest())
    table = fields.cast(pl.Int64).collect()
    return tabled(table.height, table.drop_nulls().to_numpy().T)


def with_pyarrow(path: Path) -> Answer:
    """The answer of pyarrow."""
    import pyarrow.compute as pc
    from pyarrow import csv

    text = csv.read_csv(
        path,
        read_options=csv.ReadOptions(column_names=["line"]),
        parse_options=csv.ParseOptions(delimiter="\x01", quote_char=False),
    )["line"]
    fields = pc.extract_regex(text, pattern=PATTERN).drop_null()
    columns = [pc.struct_field(fields, name).cast("int64").to_numpy() for name in FIELDS]
    return tabled(len(text), columns)


def tabled(lines: int, columns: Any) -> Answer:
    """The answer that lies in the columns of the lines that are well formed."""
    import numpy as np

    status, nbytes, latency = columns
    codes, counts = np.unique(status, return_counts=True)
    return Answer(
        lines,
        lines - len(status),
        int(nbytes.sum()),
        dict(zip(codes.tolist(), counts.tolist(), strict=True)),
        np.bincount(bit_lengths(latency), minlength=BUCKETS).tolist(),
    )


OTHERS: tuple[tuple[str, str, Callable[[Path], Answer]], ...] = (
    ("numpy", "numpy, one thread", with_numpy),
    ("polars", "polars", with_polars),
    ("pyarrow", "pyarrow", with_pyarrow),
)


# Proof


def kill_workers(rt: runtime.Runtime, kills: int, over: threading.Event) -> None:
    """Kill so many workers at work, at random moments, or as many as it takes until it is over."""
    rng = random.Random(kills)
    while kills and not over.wait(rng.uniform(0.0, 0.05)):
        pids = [worker.pid for worker in rt.workers() if worker.pid and worker.task is not None]
        if pids:
            os.kill(rng.choice(pids), signal.SIGKILL)  # a child of our zygote, which reaps it
            kills -= 1


def scanned_under_fire(rt: runtime.Runtime, kills: int, scan: Callable[[], Answer]) -> bool:
    """Scan again and again until so many workers were killed meanwhile. Whether all answers were equal."""
    over = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(rt, kills, over))
    answers = [scan()]
    killer.start()
    try:
        while killer.is_alive():
            answers.append(scan())
    finally:
        over.set()
        killer.join()
    print(f"killed {kills} workers during {len(answers) - 1} scans")
    return all(answer == answers[0] for answer in answers)


def timed(rounds: int, ask: Callable[[], Answer]) -> tuple[Answer, float]:
    """An answer, and the median of the seconds that so many rounds took."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        answer = ask()
        times.append(time.perf_counter() - began)
    return answer, statistics.median(times)


def report(answer: Answer, times: dict[str, float], size: int) -> None:
    """What was found, and how long each took."""
    print(f"\n  lines      {answer.lines:,}, {answer.malformed:,} malformed; {answer.bytes:,} bytes sent")
    print("  status     " + ", ".join(f"{s} {n:,}" for s, n in sorted(answer.status.items())))
    most = max(answer.latency) or 1
    for bucket, count in enumerate(answer.latency):
        if count:
            print(f"  < {1 << bucket:>10,} µs {count:>10,}  {'#' * (40 * count // most)}")
    ours = next(iter(times.values()))
    print()
    for name, seconds in times.items():
        print(f"  {name:36} {seconds:7.3f} s {size / seconds / 1e9:6.2f} GB/s {seconds / ours:6.1f} x")


def charted(times: dict[str, float]) -> dict[str, Any]:
    """The times as tools/chart.py takes the JSON of benchmarks."""
    roles = ("ours", *("peer" for _ in times))
    contenders = [
        {"name": name, "role": role, "summaries": {"": {"value": {"median": seconds}}}, "failures": []}
        for (name, seconds), role in zip(times.items(), roles, strict=False)
    ]
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    machine = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"CPython {platform.python_version()}",
    }
    return {"title": "logscan", "machine": machine, "rows": [{"name": "logscan", "contenders": contenders}]}


def bytes_of(text: str) -> int:
    """The number of bytes that somebody wrote as 256MiB."""
    match = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512MiB, or a number of bytes")
    return int(match[1]) * UNITS.get(match[2], 1)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, help="a log of yours instead of one that is made")
    parser.add_argument("--size", type=bytes_of, default="384MiB", help="of the log (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of its content")
    parser.add_argument("--workers", type=int, help="default: as many as CPUs may be used")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="kill N workers at work")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is shown")
    parser.add_argument("--json", type=Path, help="write the times there, for tools/chart.py")
    options = parser.parse_args(None if arguments is None else list(arguments))

    with (
        tempfile.TemporaryDirectory(prefix="logscan-") as folder,
        runtime.Runtime(options.workers, threads=options.threads) as rt,
    ):
        path = options.file or Path(folder, "access.log")
        if options.file is None:
            make_log(rt, path, options.size, options.seed)
            print(f"made {path.stat().st_size:,} bytes of log")
        kernel = build_kernel(Path(folder))
        scan = partial(read_and_scan, rt, kernel, path)
        equal = not options.kill or scanned_under_fire(rt, options.kill, scan)
        answer, seconds = timed(options.rounds, scan)
        times = {"runtime, file to answer": seconds}
        for module, name, ask in OTHERS:
            try:
                __import__(module)
            except ModuleNotFoundError:
                print(f"{module} is not installed: not asked")
                continue
            other, times[name] = timed(options.rounds, partial(ask, path))
            if other != answer:
                print(f"NOT EQUAL: {name} says {other}, the kernel {answer}", file=sys.stderr)
                equal = False
        report(answer, times, path.stat().st_size)
        print("\n  ok    all answers are equal" if equal else "\n  FAILED")
        if options.json:
            options.json.write_text(json.dumps(charted(times)))
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
