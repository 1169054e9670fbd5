#!/usr/bin/env python3
"""The full counts of the promises, in slices: `make soak PROMISE=1 MINUTES=20`.

    make soak                            what there is, what was reached and what is missing
    make soak PROMISE=n MINUTES=m        run the proof of promise n for m minutes
    make soak PROMISE=n MINUTES=m ARGS="--seed 42 --dirty"

A slice runs the very test of tests/promises that CI runs to the counts in brackets, only until its time is
up. It appends a line to docs/soak.jsonl (seed, commit, digest of the compiled code, counts, times, machine)
and writes the table in docs/guarantees.md anew: what slices have reached in all with the same compiled code,
and what is missing. A slice that failed gets its line, too. With uncommitted changes there is no line unless
--dirty says so, and such a line is kept but never counted.

Promised times must hold for 99 of 100 tries, and each of the others must coincide with a moment in which the
machine stood still: tools/heartbeat.py runs beside and writes these down.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "docs" / "soak.jsonl"
GUARANTEES = ROOT / "docs" / "guarantees.md"
GOALS = ROOT / "tests" / "promises" / "goals.py"
BEGIN, END = "<!-- soak: written by tools/soak.py -->", "<!-- /soak -->"

Record = dict[str, Any]


class Goal(NamedTuple):
    """A line of tests/promises/goals.py, which says what each field is."""

    promises: tuple[int, ...]
    title: str
    test: str
    counts: dict[str, tuple[int, int]]
    times: str
    longest: bool


def load_goals() -> list[Goal]:
    return [Goal(*goal) for goal in runpy.run_path(str(GOALS))["GOALS"]]


def digest(package: Path = ROOT / "runtime") -> str:
    """Of all that is compiled: the same for revisions that differ in Python or in words alone."""
    seen = hashlib.sha256()
    files = [*package.glob("*.pyx"), *package.glob("*.pxd"), *package.glob("include/*")]
    for path in sorted(files):
        seen.update(f"{path.relative_to(package)}\0".encode())
        seen.update(hashlib.sha256(path.read_bytes()).digest())
    return seen.hexdigest()[:16]


def git(*argv: str) -> str:
    return subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def dirty() -> list[str]:
    """What has changed since the commit, but for what slices write themselves."""
    ours = {str(path.relative_to(ROOT)) for path in (LEDGER, GUARANTEES)}
    return [line for line in git("status", "--porcelain").splitlines() if line[3:] not in ours]


def machine() -> str:
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    name = model[1].strip() if model else platform.machine()
    cpus = len(os.sched_getaffinity(0))
    python = f"{sys.implementation.name} {platform.python_version()}"
    return f"{name}, {cpus} usable CPUs, Linux {platform.release()}, {python}"


# ---- the ledger ----------------------------------------------------------------------------------


def read_ledger(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """One write at the end of the file: lines that are there are never touched."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, (json.dumps(record) + "\n").encode())
    finally:
        os.close(fd)


class Reached(NamedTuple):
    """What the slices of one goal have come to, with one state of the compiled code."""

    slices: int
    failed: int
    counts: dict[str, int]
    longest: Record | None  # the slice that ran longest
    worst: float  # the largest p99 of any slice, ms


def reached(goal: Goal, ledger: Sequence[Record], code: str) -> Reached:
    of_it = [r for r in ledger if r["promises"] == list(goal.promises) and r["code"] == code]
    counted = [r for r in of_it if not r["dirty"] and not r["failed"]]
    sums = {name: sum(int(r["counts"].get(name, 0)) for r in counted) for name in goal.counts}
    worst = max((times["p99"] for r in counted for times in r["ms"].values()), default=0.0)
    longest = max(counted, key=lambda r: float(r["seconds"]), default=None)
    return Reached(len(counted), sum(bool(r["failed"]) for r in of_it), sums, longest, worst)


def missing(goal: Goal, found: Reached) -> dict[str, int]:
    """What the full count still lacks; where one run has to reach it, the longest one counts alone."""
    best = found.longest["counts"] if found.longest else {}
    have = {name: int(best.get(name, 0)) for name in goal.counts} if goal.longest else found.counts
    return {name: max(0, full - have[name]) for name, (_, full) in goal.counts.items()}


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{value:,} {name}" for name, value in counts.items())


def row(goal: Goal, found: Reached) -> list[str]:
    lacking = {name: count for name, count in missing(goal, found).items() if count}
    longest = "–"
    if found.longest is not None:
        in_it = {name: int(found.longest["counts"].get(name, 0)) for name in goal.counts}
        longest = f"{float(found.longest['seconds']) / 60:.1f} min: {listed(in_it)}"
    summed = listed(found.counts) if found.slices else "–"
    if found.slices and goal.times:
        summed += f"; p99 ≤ {found.worst:g} ms"
    if found.failed:
        summed += f"; **{found.failed} slices failed**"
    return [
        ", ".join(map(str, goal.promises)),
        goal.title + (f" ({goal.times})" if goal.times else ""),
        listed({name: ci for name, (ci, _) in goal.counts.items()}),
        listed({name: full for name, (_, full) in goal.counts.items()}),
        summed,
        longest,
        listed(lacking) or "nothing",
    ]


def table(goals: Sequence[Goal], ledger: Sequence[Record], code: str) -> str:
    """The section of docs/guarantees.md, between its two marks."""
    commits = sorted({r["commit"][:12] for r in ledger if r["code"] == code and not r["dirty"]})
    lines = [
        BEGIN,
        f"Compiled code `{code}`" + (f", commits {', '.join(commits)}." if commits else "; no slice yet."),
        "",
        "| promise | | in CI | in all | reached in slices | longest run | missing |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(row(goal, reached(goal, ledger, code))) + " |" for goal in goals),
        END,
    ]
    return "\n".join(lines)


def replaced(text: str, section: str) -> str:
    """The page with a new section."""
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        sys.exit(f"soak: {GUARANTEES.name} has no section {BEGIN} … {END}; put the two marks back")
    return before + section + after


def write_table() -> None:
    section = table(load_goals(), read_ledger(LEDGER), digest())
    GUARANTEES.write_text(replaced(GUARANTEES.read_text(), section))


# ---- a slice -------------------------------------------------------------------------------------


def run_slice(goal: Goal, seconds: float, seed: int) -> Record:
    """What the proof has counted in that time, or why it has failed; and how long the machine stood still."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        stalls, report = Path(folder, "stalls"), Path(folder, "report")
        stalls.touch()
        beats = subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "heartbeat.py"), str(stalls)], stdin=subprocess.PIPE
        )
        try:
            task = {"seconds": seconds, "seed": seed, "stalls": str(stalls), "report": str(report)}
            test = str(GOALS.parent / goal.test)
            argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "promise", test]
            code, why = told(argv, {**os.environ, "RUNTIME_SOAK": json.dumps(task)})
        finally:
            assert beats.stdin is not None
            beats.stdin.close()
            beats.wait()
        spans = [json.loads(line) for line in stalls.read_text().splitlines()]
        found: Record = {"stalls": len(spans), "stalled": round(sum(b - a for a, b in spans), 2)}
        if code or not report.exists():
            return {**found, "failed": True, "why": why or f"pytest ended with {code}"}
        return {**found, **json.loads(report.read_text())}


def told(argv: list[str], environ: dict[str, str]) -> tuple[int, str]:
    """(exit code, the first line of a failure) of a test whose output is shown as it comes."""
    why = ""
    with subprocess.Popen(argv, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("E  ") and not why:
                why = line[1:].strip()[:300]
    return process.returncode, why


def soak(goal: Goal, minutes: float, seed: int, anyway: bool) -> int:
    changes = dirty()
    if changes and not anyway:
        sys.exit(
            "soak: there are uncommitted changes, so nobody could say later what ran:\n  "
            + "\n  ".join(changes)
            + "\nCommit them, or say --dirty: the slice is written down then, but not counted."
        )
    subprocess.run([sys.executable, str(ROOT / "tools" / "build.py")], check=True)
    code, commit = digest(), git("rev-parse", "HEAD").strip()
    print(f"soak: promise {', '.join(map(str, goal.promises))}, {minutes:g} min, seed {seed}", flush=True)
    found = run_slice(goal, minutes * 60, seed)
    if code != digest() or commit != git("rev-parse", "HEAD").strip() or (dirty() and not anyway):
        sys.exit("soak: sources changed while the slice ran; it is not written down")
    record = {
        "promises": goal.promises,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": bool(changes),
        "code": code,
        "failed": False,
        "seed": str(seed),
        "counts": {},
        "seconds": 0.0,
        "ms": {},
        "machine": machine(),
        **found,
    }
    append(LEDGER, record)
    write_table()
    if record["failed"]:
        print(
            f"soak: FAILED; the same again: make soak PROMISE={goal.promises[0]} MINUTES={minutes:g} ", end=""
        )
        print(f'ARGS="--seed {seed}"')
        return 1
    print(f"soak: {listed({name: int(n) for name, n in found['counts'].items()})}, {found['ms']}")
    return 0


def show(goals: Sequence[Goal]) -> None:
    code, ledger = digest(), read_ledger(LEDGER)
    print(f"make soak PROMISE=n MINUTES=m; compiled code {code}")
    for goal in goals:
        number, title, in_ci, in_all, summed, longest, lacking = row(goal, reached(goal, ledger, code))
        print(f"\n{number:>6}  {title}\n        in CI {in_ci}; in all {in_all}")
        print(f"        reached {summed}; longest run {longest}; missing {lacking}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--promise", type=int, metavar="N")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--dirty", action="store_true", help="write down a slice of uncommitted changes")
    parser.add_argument("--table", action="store_true", help="only write the table of docs/guarantees.md")
    options = parser.parse_args()
    goals = load_goals()
    if options.table:
        write_table()
        return 0
    if options.promise is None:
        show(goals)
        return 0
    chosen = [goal for goal in goals if options.promise in goal.promises]
    if not chosen:
        known = ", ".join(str(n) for goal in goals for n in goal.promises)
        sys.exit(f"soak: there is no proof of promise {options.promise} yet; there are {known}")
    if options.minutes <= 0:
        sys.exit("soak: MINUTES must be greater than 0")
    return soak(chosen[0], options.minutes, options.seed, options.dirty)


if __name__ == "__main__":
    sys.exit(main())
