#!/usr/bin/env python3
"""Census of Python's own standard library, counted once in one process and once by worker processes.

    python examples/census.py                       count, compare, report
    python examples/census.py --kill 20             the same while 20 workers are killed at work
    runtime run --workers 4 examples/census.py:main --limit 200

The heart of it is what a program of yours would look like:

    import runtime

    def read(path):                                 # runs in a worker process
        ...
        return record

    with runtime.Runtime() as rt:                   # as many workers as there are CPUs to use
        for record in rt.map(read, paths):          # in order; errors and dead workers included
            ...

All else here is proof: that the result is equal to the last bit, that every task ran in a worker and
each worker did its share, and, with --kill, that killed workers cost time but no result.
The exit code is 0 only if all of that holds.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import select
import signal
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runtime

TOP = 8  # names in each ranking
WIDTH = 100  # of the report
FAIR = 0.25  # of its even share is what each worker must do at least
FEWEST = 50  # files per worker below which shares are left to chance


# What runs in the workers


def read(path: str) -> dict[str, Any]:
    """The record of one file. A file that does not parse is counted and says why."""
    record: dict[str, Any] = {"lines": 0, "sha256": None, "error": None}
    counts, modules, calls = Counter[str](), Counter[str](), Counter[str]()
    try:
        data = Path(path).read_bytes()
        record |= {"lines": len(data.splitlines()), "sha256": hashlib.sha256(data).hexdigest()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like: they are the file's business
            tree = ast.parse(data)
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) and error.lineno else ""
        record["error"] = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}{where}"
    else:
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
                    calls[name] += 1
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    counts["functions"] += 1
                case ast.ClassDef():
                    counts["classes"] += 1
                case ast.Import(names=names):
                    counts["imports"] += 1
                    modules.update({alias.name.partition(".")[0] for alias in names})
                case ast.ImportFrom(module=module, level=level):
                    counts["imports"] += 1
                    if module and not level:
                        modules[module.partition(".")[0]] += 1
    for kind in ("functions", "classes", "imports"):
        record[kind] = counts[kind]
    return {**record, "modules": dict(modules), "calls": dict(calls)}


def task(path: str) -> tuple[dict[str, Any], int, int, tuple[int, int]]:
    """The record, and who made it: the worker's number and pid; which task this was, in which attempt."""
    worker = runtime.current()
    return read(path), worker.number, os.getpid(), (worker.task, worker.attempt)


# What the host does


def find(root: str) -> list[str]:
    """Every .py file below `root`, third-party packages excluded, always in the same order."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        found += [os.path.join(folder, file) for file in files if file.endswith(".py")]
    return sorted(file for file in found if os.path.isfile(file))


def spread(items: list[str], limit: int | None) -> list[str]:
    """`limit` of the items, evenly spread."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


@dataclass
class Count:
    """One pass over the files: the records in the order of the files, and how they came to be."""

    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tasks: Counter[int] = field(default_factory=Counter)  # by worker number
    pids: set[int] = field(default_factory=set)
    attempts: dict[int, int] = field(default_factory=dict)  # by task: in which it succeeded

    @property
    def again(self) -> int:
        """Attempts that a worker's death ended. A task may hold several files: it counts once."""
        return sum(attempt - 1 for attempt in self.attempts.values())


def count_alone(paths: list[str]) -> Count:
    begin = time.perf_counter()
    records = [read(path) for path in paths]
    return Count(records, time.perf_counter() - begin)


def count_with(rt: Any, paths: list[str], killer: Killer) -> Count:
    count = Count()
    pool = rt.options(retries=killer.wanted) if killer.wanted else rt
    begin = time.perf_counter()
    for record, number, pid, (name, attempt) in pool.map(task, paths):
        count.records.append(record)
        count.tasks[number] += 1
        count.pids.add(pid)
        count.attempts[name] = max(attempt, count.attempts.get(name, 1))
        killer.after(len(count.records))
    count.seconds = time.perf_counter() - begin
    return count


class Killer:
    """SIGKILLs `wanted` workers in the middle of a task, evenly over the results that come in."""

    def __init__(self, rt: Any, wanted: int, total: int) -> None:
        self.rt, self.wanted, self.total, self.sent = rt, wanted, total, 0

    def after(self, finished: int) -> None:
        while self.sent < self.wanted and finished * (self.wanted + 1) >= (self.sent + 1) * self.total:
            if not self.strike():
                break  # nobody runs a task at this very moment: the next result brings another chance

    def strike(self) -> bool:
        """Kills one worker that runs a task and waits for its death. A pidfd cannot hit a stranger."""
        for number, pid in self.running():
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if (number, pid) in self.running():
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    self.sent += 1
                    death = select.poll()
                    death.register(handle, select.POLLIN)
                    return bool(death.poll(10_000))
            except ProcessLookupError:
                pass
            finally:
                os.close(handle)
        return False

    def running(self) -> list[tuple[int, int]]:
        """Workers with a task, the one that came to work first at the front."""
        at_work = [w for w in self.rt.workers() if w.task is not None and w.pid is not None]
        return [(w.number, w.pid) for w in sorted(at_work, key=lambda w: (w.started or 0, w.number))]


def digest(names: list[str], records: list[dict[str, Any]]) -> str:
    """SHA-256 over every record in one canonical form, so equal digests mean equal results."""
    sha = hashlib.sha256()
    for name, record in zip(names, records, strict=True):
        sha.update(json.dumps([name, record], sort_keys=True).encode() + b"\n")
    return sha.hexdigest()


def totals(names: list[str], records: list[dict[str, Any]]) -> dict[str, Any]:
    """The census itself."""
    modules, calls = Counter[str](), Counter[str]()
    for record in records:
        modules.update(record["modules"])
        calls.update(record["calls"])
    result: dict[str, Any] = {"files": len(records)}
    for kind in ("lines", "functions", "classes", "imports"):
        result[kind] = sum(record[kind] for record in records)
    result["modules"], result["calls"] = ranked(modules), ranked(calls)
    result["unparsed"] = {n: r["error"] for n, r in zip(names, records, strict=True) if r["error"]}
    result["sha256"] = digest(names, records)
    return result


def ranked(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:TOP])


def checks(
    alone: Count, shared: Count, same: bool, numbers: list[int], killer: Killer
) -> Iterator[tuple[bool, str]]:
    """What must hold, as (does it, in words)."""
    differ = sum(a != b for a, b in zip(alone.records, shared.records, strict=False))
    differ += abs(len(alone.records) - len(shared.records))
    equal = same and not differ
    yield equal, "both results are equal" if equal else f"the results differ in {differ} files"
    inside = os.getpid() not in shared.pids
    yield inside, "no task ran in the host" if inside else f"tasks ran in the host (pid {os.getpid()})"
    files = len(shared.records)
    if files >= FEWEST * len(numbers):
        least = FAIR * files / len(numbers)
        lazy = [str(number) for number in numbers if shared.tasks[number] < least]
        share = f"a quarter of its share ({least:,.0f} tasks)"
        yield (
            not lazy,
            f"workers below {share}: {', '.join(lazy)}" if lazy else f"each worker did at least {share}",
        )
    if killer.wanted:
        hit = shared.again
        yield (
            hit > 0,
            f"{hit} of {killer.wanted} kills ended a running task" + ("" if hit else ": proves nothing"),
        )


# The report


def report_counts(result: dict[str, Any], out: Callable[[str], None]) -> None:
    out("")
    for kind in ("files", "lines", "functions", "classes", "imports"):
        out(f"  {kind:<14}{result[kind]:>12,}")
    for title, names in (("imported most", "modules"), ("called most", "calls")):
        items = [f"{name} {number:,}" for name, number in result[names].items()]
        for start in range(0, len(items), TOP // 2):
            out(f"  {title if not start else '':<14}      {', '.join(items[start : start + TOP // 2])}")
    out(f"  {'do not parse':<14}{len(result['unparsed']):>12,}")
    for name, error in result["unparsed"].items():
        line = f"      {name}: {error}"
        out(line if len(line) <= WIDTH else line[: WIDTH - 3] + "...")
    out(f"  sha-256       {result['sha256']}")


def report_workers(
    shared: Count, numbers: list[int], ways: dict[str, int], out: Callable[[str], None]
) -> None:
    out("")
    total = max(1, len(shared.records))
    for number in numbers:
        tasks = shared.tasks[number]
        out(f"  {f'worker {number}':<14}{tasks:>12,} tasks  {'#' * round(40 * tasks / total)}")
    out(f"  {'by way':<14}      {', '.join(f'{way} {tasks:,}' for way, tasks in ways.items())}")


def speed(name: str, count: Count, note: str = "") -> str:
    rate = len(count.records) / count.seconds if count.seconds else 0.0
    return f"  {name:<14}{count.seconds:>10.2f} s {rate:>10,.0f} files/s{note}"


# The command


def parse(argv: list[str], *, own: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="census.py", description=(__doc__ or "").partition("\n")[0])
    if own:  # under `runtime run` the Runtime is made before us
        parser.add_argument("--workers", type=int, metavar="N", help="worker processes (default: as CPUs)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only N files, evenly spread")
    parser.add_argument("--kill", type=positive, default=0, metavar="N", help="SIGKILL N workers at work")
    parser.add_argument("--root", default=sysconfig.get_path("stdlib"), help="another folder to count")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(rt: Any, argv: list[str]) -> int:
    """For `runtime run`: counts with the Runtime that it is given."""
    return census(rt, parse(argv, own=False))


def census(rt: Any, options: argparse.Namespace) -> int:
    paths = spread(find(options.root), options.limit)
    names = [Path(path).relative_to(options.root).as_posix() for path in paths]
    if not paths:
        print(f"census: there is no .py file below {options.root}", file=sys.stderr)
        return 1
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack what a file's error shows
    out: Callable[[str], None] = (
        (lambda line: None) if options.json else (lambda line: print(line, flush=True))
    )
    what = "the standard library" if options.root == sysconfig.get_path("stdlib") else options.root
    out(f"census of {what}, CPython {platform.python_version()}, {len(paths):,} files\n")

    for path in paths:
        Path(path).read_bytes()  # so that neither pass pays for the disk
    alone = count_alone(paths)
    out(speed("one process", alone))
    before = rt.stats()
    killer = Killer(rt, options.kill, len(paths))
    shared = count_with(rt, paths, killer)
    after = rt.stats()
    numbers = sorted({worker.number for worker in rt.workers()} | set(shared.tasks))
    gain = alone.seconds / shared.seconds if shared.seconds else 0.0
    out(speed(f"{len(numbers)} workers", shared, f"{gain:>8.2f} x"))

    ways = {way: getattr(after, way) - getattr(before, way) for way in ("lane", "message", "rescued")}
    expected, result = totals(names, alone.records), totals(names[: len(shared.records)], shared.records)
    verdicts = list(checks(alone, shared, expected == result, numbers, killer))
    passed = all(good for good, _ in verdicts)
    report_counts(result, out)
    report_workers(shared, numbers, ways, out)
    out("")
    for good, words in verdicts:
        out(f"  {'ok' if good else 'FAIL':<6}{words}")
    if options.json:
        print(
            json.dumps(
                {
                    "ok": passed,
                    "checks": [{"ok": good, "check": words} for good, words in verdicts],
                    "seconds": {"one process": alone.seconds, "runtime": shared.seconds},
                    "speedup": gain,
                    "tasks": {str(number): shared.tasks[number] for number in numbers},
                    "ways": ways,
                    "kills": {"wanted": options.kill, "sent": killer.sent, "landed": shared.again},
                    "census": result,
                },
                indent=2,
            )
        )
    return 0 if passed else 1


def script() -> int:
    options = parse(sys.argv[1:], own=True)
    with runtime.Runtime(options.workers) as rt:
        return census(rt, options)


if __name__ == "__main__":
    sys.exit(script())
