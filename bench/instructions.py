#!/usr/bin/env python3
"""What supervision costs of a no-op task, in instructions: python bench/instructions.py

    instructions_driver.py, under `valgrind --tool=callgrind`, with a few bursts of tasks and with many. The
    difference is the cost of the tasks alone. Each instruction of our modules is traced to its line of
    Cython source (addr2line through what was inlined, then the comments of the generated C), and each line
    belongs to a part of a task's way; what our lines call in the interpreter and in libc belongs to the line.

The count is that of the shipped code (tools/build.py's, -O2) in user space, in one process. What the kernel
does for a system call is not in it; a task has one, fcntl, which asks whether the worker's descriptors are
still its own. (clock_gettime is none on Linux, but is one under valgrind: see CLOCK.)

**What counts as supervision** is what would be left out if a worker could not die, hang, be killed, be
replaced, or write nonsense. Where something has two uses it counts whole:

    lease words   tag, state and CAS of each step: the truth that the sweep of a dead worker reads
    deadlines     the clock of a task, its timeout, the entry that runs, the keeper's guards
    outbox        the record of an answer, the cursor, its checks; the answer lies in the lease already
    distrust      the host copies what a worker wrote before it looks, and checks numbers and sizes
    retries       attempts, the view that keeps the original for the next one
    between       between two tasks: control word, descriptors, recycling, counters of work done
    now and then  every 10 ms: signals, children, views; a share of it, see RATE

Not counted, but shown: the clock at the begin and the end of a call. The deadline reads it, but it would be
read without one, too: how many calls a worker is given ahead follows from how long they take. Neither counted
nor shown: what tells `runtime.current()` of the task; laying out, pickling, waking, cancelling, queues.

Exit code 1: over LIMIT. Exit code 2: it could not be measured, or a line that is named here is gone.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
LIMIT = 3.0  # percent of a no-op task

# Bursts of the two runs; a burst is 32 tasks.
FEW, MANY = 20, 120

# What clock_gettime takes in the vDSO, beyond the way to the system call that valgrind sees instead.
CLOCK = 40

# What is due every 10 ms is shared by the tasks of 10 ms: docs/benchmarks.md, submit, a worker's half of it.
RATE = 1_000
CHECKS = 500  # of the run that measures it

SHARED = "the clock"  # not counted
NOW_AND_THEN = "now and then"  # counted by a run of its own, as valgrind's milliseconds are short
# (source, text of the line, what it is for); a text that starts with "def " stands for the whole function,
# but for the lines that stand above it. Purpose "": not supervision.
SUPERVISION: tuple[tuple[str, str, str], ...] = (
    ("_leasing.pyx", "self.tags[at] += 1", "lease words"),
    ("_leasing.pyx", "task.tag = self.tags[at] &", "lease words"),
    ("_leasing.pyx", "a64_store_release(&lease.word, lease_word(L_LEASED, 0, task.tag))", "lease words"),
    ("_leasing.pyx", "ring_place(number, task.tag))", "lease words"),
    ("_leasing.pyx", "if table.tasks[task.entry] is not task:", "lease words"),
    ("_leasing.pyx", "if task.state != T_WAITING or (task.batch", "lease words"),
    ("_leasing.pyx", "lease.task = task.number", "lease words"),
    ("_lease.pyx", "word = a64_load_acquire(&lease.word)", "lease words"),
    ("_lease.pyx", "if l_state(word) != L_LEASED or ring_place(entry", "lease words"),
    ("_lease.pyx", "if a64_cas_acq_rel(&lease.word, word, lease_word(L_RUNNING, 0", "lease words"),
    ("_lease.pyx", "word = a64_load_relaxed(&lease.word)", "lease words"),
    ("_lease.pyx", "done = lease_word(L_DONE, count", "lease words"),
    (
        "_lease.pyx",
        "if l_state(word) != L_RUNNING or not a64_cas_acq_rel(&lease.word, word, done)",
        "lease words",
    ),
    ("_harvest.pyx", "cdef uint64_t word = a64_load_acquire(&lease.word)      # pairs", "lease words"),
    ("_harvest.pyx", "if l_state(word) != L_DONE or l_tag(word) != task.tag or task.state", "lease words"),
    ("_harvest.pyx", "a64_store_release(&lease.word, lease_word(L_FREE, 0, task.tag))", "lease words"),
    ("_leasing.pyx", "a64_store_relaxed(&lease.started, 0)", "deadlines"),
    ("_leasing.pyx", "lease.flags = (F_PRIVATE_VIEW", "deadlines"),
    ("_leasing.pyx", "self.keeper.timeouts[at]", "deadlines"),
    ("_leasing.pyx", "if task.timeout:", "deadlines"),
    ("_leasing.pyx", "if guard_of(self.keeper, index).killing:", "deadlines"),
    ("_lease.pyx", "a32_store_release(&self.slot.running, entry + 1)", "deadlines"),
    ("_lease.pyx", "a32_store_release(&self.slot.running, 0)", "deadlines"),
    ("_lease.pyx", "a64_store_release(&lease.started, <uint64_t>now)", "deadlines"),
    ("_lease.pyx", "a64_store_release(&lease.started, 0)", "deadlines"),
    ("_lease.pyx", "a64_store_relaxed(&self.slot.tasks_done, a64_load_relaxed", "between"),
    ("_runner.pyx", "self.begin(lease, self.clock or now_ns())", SHARED),
    ("_lease.pyx", "def begin", SHARED),
    ("_lease.pyx", "def end", SHARED),
    ("_lease.pyx", "cdef int64_t now = now_ns()", SHARED),
    ("_lease.pyx", "cdef int64_t took = now", SHARED),
    ("_lease.pyx", "lease.out_ns += took", SHARED),
    ("_lease.pyx", "a64_store_release(&self.slot.busy, a64_load_relaxed", SHARED),
    ("_lease.pyx", "record = record_t(R_DONE, entry, done, 0, 0, 0, count)", "outbox"),
    ("_lease.pyx", "while not outbox_put(self.slot, self.records", "outbox"),
    ("_lease.pxd", "def outbox_put", "outbox"),
    ("_lease.pxd", "def outbox_waiting", "outbox"),
    ("_lease.pxd", "def outbox_take", "outbox"),
    ("_harvest.pyx", "def drain_now", "outbox"),
    ("_harvest.pyx", "def process", "outbox"),
    ("_harvest.pyx", "if table.state == S_LIVE and outbox_waiting", "outbox"),
    ("_harvest.pyx", "memcpy(&copy, lease, <size_t>", "distrust"),
    ("_harvest.pyx", "memcpy(copy.inline_, lease.inline_, copy.out_bytes)", "distrust"),
    ("_harvest.pyx", "if (exporter is None and not plain) or ran > task.count", "distrust"),
    ("_leasing.pyx", "if table.suspect and a64_load_relaxed", "distrust"),
    ("_leasing.pyx", "table.suspect = False", "distrust"),
    ("_leasing.pyx", "lease.attempt = task.attempt", "retries"),
    ("_submit.pyx", "task.attempt = 1", "retries"),
    ("_submit.pyx", "if options is not None:", "retries"),
    ("_harvest.pyx", "task.retries = 0 ", "retries"),
    ("_layout.pxd", "cdef uint32_t bits = 64", "metrics"),
    ("_layout.pxd", "return 0 if bits <= 10 else min", "metrics"),
    ("_layout.pxd", "cdef a64_t *at = &row[bucket_of(ns)]", "metrics"),
    ("_layout.pxd", "a64_store_relaxed(at, a64_load_relaxed(at) + count)", "metrics"),
    ("_lease.pyx", "count_time(self.slot.ran", "metrics"),
    ("_lease.pyx", "if lease.submitted:", "metrics"),
    ("_leasing.pyx", "lease.submitted = <uint64_t>task.submitted", "metrics"),
    ("_leasing.pyx", "task.submitted = 0", "metrics"),
    ("_dispatch.pyx", "if self.accepted % TIMED == 0:", "metrics"),
    ("_runner.pyx", "while not (self.leaving or a32_load_acquire(&self.slot.control)", "between"),
    ("_runner.pyx", "self.context.task = None", ""),
    ("_runner.pyx", "self.worker.check()", NOW_AND_THEN),
    ("_runner.pyx", "self.check_at = now_ns() + CHECK", NOW_AND_THEN),
    ("_runner.pyx", "def check", "between"),
    ("_runner.pyx", "            self.check()", "between"),
    ("_runner.pyx", "self.left -= 1", "between"),
)

# The parts of a task's way, by the functions of our modules; the first that matches.
WAY: tuple[tuple[str, str], ...] = (
    ("submit", r"_submit|_plain.*dumps|_dispatch.*(enter|submit)|_records.*Task"),
    ("lease", r"_leasing|_dispatch.*(work|take_in)|_waiting.*(noisy|announce)"),
    ("claim", r"claim|serve|function_for"),
    ("run", r"Runner_call|_plain"),
    ("between tasks", r"Runner_check"),
    ("complete", r"complete|put|tell|WorkerPort"),
    ("harvest", r"_harvest|drain|fulfil|_future|_waiting|_slots|_dispatch"),
)


def give_up(text: str) -> NoReturn:
    print(f"instructions: {text}", file=sys.stderr)
    sys.exit(2)


# ---- callgrind -----------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What was executed at one address: its own instructions, and those of what it called elsewhere."""

    own: int
    called: int


class Profile(NamedTuple):
    """Of one run: by (object, address); the function that an address lies in; calls of clock_gettime."""

    costs: dict[tuple[str, int], Cost]
    functions: dict[tuple[str, int], str]
    clocks: dict[tuple[str, int], int]
    total: int


def is_ours(path: str) -> bool:
    return Path(path).parent == ROOT / "runtime"


def read_profile(path: Path) -> Profile:
    """The file that callgrind wrote. What a call costs counts where we leave our own modules."""
    own: collections.Counter[tuple[str, int]] = collections.Counter()
    called: collections.Counter[tuple[str, int]] = collections.Counter()
    clocks: collections.Counter[tuple[str, int]] = collections.Counter()
    functions: dict[tuple[str, int], str] = {}
    where = function = there = name = ""
    calls, total = 0, 0
    for line in path.read_text().splitlines():
        if line.startswith("0x"):
            at, cost = line.split()
            key = (where, int(at, 16))
            if calls:
                if is_ours(where) and not is_ours(there):
                    called[key] += int(cost)
                    if "clock_gettime" in name:
                        clocks[key] += calls
                calls, there = 0, where  # a call without cob= stays in this object
            else:
                own[key] += int(cost)
                total += int(cost)
                if is_ours(where):
                    functions[key] = function
        elif line.startswith("ob="):
            where = there = line[3:]
        elif line.startswith("fn="):
            function = line[3:]
        elif line.startswith("cob="):
            there = line[4:]
        elif line.startswith("cfn="):
            name = line[4:]
        elif line.startswith("calls="):
            calls = int(line[6:].split()[0])
    costs = {key: Cost(own[key], called[key]) for key in own.keys() | called.keys() if is_ours(key[0])}
    return Profile(costs, functions, dict(clocks), total)


def run(bursts: int, checks: int, folder: Path) -> tuple[int, Profile]:
    """(tasks, what they cost) of a run of the driver."""
    out = folder / "callgrind"
    options = ["--dump-instr=yes", "--dump-line=no", "--compress-strings=no", "--compress-pos=no"]
    argv = ["valgrind", "--tool=callgrind", *options, f"--callgrind-out-file={out}", sys.executable]
    environ = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
    driver = [str(BENCH / "instructions_driver.py"), str(bursts), str(checks)]
    done = subprocess.run([*argv, *driver], env=environ, capture_output=True, text=True)
    if done.returncode:
        give_up(f"the driver failed under valgrind:\n{done.stderr[-3000:]}")
    return int(done.stdout.split()[-1]), read_profile(out)


def difference(few: Profile, many: Profile) -> Profile:
    def less(a: dict[Any, int], b: dict[Any, int]) -> dict[Any, int]:
        return {key: count - b.get(key, 0) for key, count in a.items()}

    nothing = Cost(0, 0)
    costs = {
        key: Cost(
            cost.own - few.costs.get(key, nothing).own, cost.called - few.costs.get(key, nothing).called
        )
        for key, cost in many.costs.items()
    }
    return Profile(costs, many.functions, less(many.clocks, few.clocks), many.total - few.total)


# ---- from addresses to lines of Cython -----------------------------------------------------------


class Line(NamedTuple):
    source: str  # "_lease.pyx"
    number: int


class Generated:
    """A file that Cython has written: which line of which source each of its lines came from."""

    MARK = re.compile(r'\s*/\* "runtime/([\w.]+)":(\d+)')

    def __init__(self, path: Path) -> None:
        self.starts: list[int] = []
        self.lines: list[Line | None] = []
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if found := self.MARK.match(text):
                self.starts.append(number)
                self.lines.append(Line(found[1], int(found[2])))
            elif "/* function exit code */" in text:
                self.starts.append(number)
                self.lines.append(None)

    def at(self, number: int) -> Line | None:
        found = bisect.bisect_right(self.starts, number) - 1
        return self.lines[found] if found >= 0 else None


def places(path: str, addresses: Iterable[int]) -> dict[int, list[tuple[str, int]]]:
    """(file, line) of each address and of all that it was inlined into, the innermost first."""
    text = "\n".join(f"{address:#x}" for address in addresses)
    done = subprocess.run(["addr2line", "-a", "-i", "-e", path], input=text, capture_output=True, text=True)
    if done.returncode:
        give_up(f"addr2line failed: {done.stderr}")
    found: dict[int, list[tuple[str, int]]] = {}
    stack: list[tuple[str, int]] = []
    for line in done.stdout.splitlines():
        if line.startswith("0x"):
            stack = found[int(line, 16)] = []
        else:
            file, _, number = line.partition(" (")[0].rpartition(":")
            stack.append((file, int(number) if number.isdecimal() else 0))
    return found


def sources_of(profile: Profile) -> dict[tuple[str, int], list[Line]]:
    """The lines of Cython that each address belongs to, the innermost first."""
    by_object: dict[str, list[int]] = collections.defaultdict(list)
    for path, address in profile.costs:
        by_object[path].append(address)
    generated: dict[str, Generated] = {}
    found: dict[tuple[str, int], list[Line]] = {}
    for path, addresses in by_object.items():
        for address, stack in places(path, addresses).items():
            lines = []
            for file, number in stack:
                if file.endswith(".c") and (file in generated or Path(file).exists()):
                    if file not in generated:
                        generated[file] = Generated(Path(file))
                    if (line := generated[file].at(number)) is not None:
                        lines.append(line)
            found[path, address] = lines
    return found


def named_lines() -> dict[Line, str]:
    """The lines of SUPERVISION: what each is for."""
    found: dict[Line, str] = {}
    for source, text, purpose in SUPERVISION:
        lines = (ROOT / "runtime" / source).read_text().splitlines()
        if text.startswith("def "):
            name = text.removeprefix("def ")
            at = [n for n, line in enumerate(lines, 1) if re.match(rf"\s*cdef .*\b{name}\(", line)]
            at = [n for n in at if not lines[n - 1].rstrip().endswith(("-1", "nogil", "noexcept"))] or at
            if len(at) != 1:
                give_up(f"{source} has {len(at)} functions {name}; see SUPERVISION in {Path(__file__).name}")
            indent = len(lines[at[0] - 1]) - len(lines[at[0] - 1].lstrip())
            number = at[0]
            while number < len(lines) and not (
                lines[number].strip() and len(lines[number]) - len(lines[number].lstrip()) <= indent
            ):
                number += 1
            numbers: Sequence[int] = range(at[0], number + 1)
        else:
            numbers = [n for n, line in enumerate(lines, 1) if text in line]
            if not numbers:
                give_up(f"{source} has no line {text!r} any more; see SUPERVISION in {Path(__file__).name}")
        for number in numbers:
            found.setdefault(Line(source, number), purpose)
    return found


# ---- the report ----------------------------------------------------------------------------------


def part_of(function: str) -> str:
    return next((part for part, pattern in WAY if re.search(pattern, function)), "other")


def report(tasks: int, profile: Profile, check: float) -> dict[str, Any]:
    """Instructions per task: by part of its way, and what of it is supervision, by purpose and by line."""
    named, lines_of = named_lines(), sources_of(profile)
    way: collections.Counter[str] = collections.Counter()
    purposes: collections.Counter[str] = collections.Counter()
    by_line: collections.Counter[Line] = collections.Counter()
    unknown = 0
    for key, cost in profile.costs.items():
        clocks = profile.clocks.get(key, 0) * CLOCK
        count = cost.own + cost.called + clocks
        lines = lines_of.get(key, [])
        line = next((line for line in lines if line in named), None)
        if line is not None and named[line] == NOW_AND_THEN:
            continue
        way[part_of(profile.functions.get(key, ""))] += count
        unknown += 0 if lines else count
        if line is not None and named[line]:
            purposes[named[line]] += count
            by_line[line] += count
    purposes[NOW_AND_THEN] = round(check / RATE * tasks)
    way["now and then"] = purposes[NOW_AND_THEN]
    task = sum(way.values())
    clock = purposes.pop(SHARED)
    return {
        "tasks": tasks,
        "instructions of a task": task / tasks,
        "with the loop around it": profile.total / tasks,
        "way": {part: count / tasks for part, count in way.most_common()},
        "supervision": {purpose: count / tasks for purpose, count in purposes.most_common()},
        "lines": {
            f"{line.source}:{line.number}": count / tasks for line, count in by_line.most_common() if count
        },
        "not traced to a line": unknown / tasks,
        "share": 100 * sum(purposes.values()) / task,
        "share with the clock": 100 * (sum(purposes.values()) + clock) / task,
    }


def show(found: dict[str, Any]) -> None:
    task = found["instructions of a task"]
    print(f"{found['tasks']:,} no-ops, {task:,.0f} instructions each ", end="")
    print(f"({found['with the loop around it']:,.0f} with the loop that submits and collects)\n")
    for title in ("way", "supervision"):
        print(
            f"| {title:<16} | instructions | % of a task |\n| :--------------- | -----------: | ----------: |"
        )
        for name, count in found[title].items():
            print(f"| {name:<16} | {count:>12,.1f} | {100 * count / task:>11.2f} |")
        print()
    print("lines:")
    for name, count in found["lines"].items():
        source, _, number = name.partition(":")
        text = (ROOT / "runtime" / source).read_text().splitlines()[int(number) - 1].strip()
        print(f"  {count:7.1f}  {name:<18} {text[:90]}")
    print(f"\nsupervision: {found['share']:.2f} % of a no-op task (limit {LIMIT:g} %); ", end="")
    print(f"{found['share with the clock']:.2f} % with the clock that it shares")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    for tool in ("valgrind", "addr2line"):
        if shutil.which(tool) is None:
            give_up(f"{tool} is needed and was not found (Debian: apt install valgrind binutils)")
    with tempfile.TemporaryDirectory() as folder:
        few, less = run(FEW, 0, Path(folder))
        many, more = run(MANY, 0, Path(folder))
        _, checked = run(FEW, CHECKS, Path(folder))
    found = report(many - few, difference(less, more), (checked.total - less.total) / CHECKS)
    if found["not traced to a line"] > 0.25 * found["instructions of a task"]:
        give_up("most of it could not be traced to source lines: build with tools/build.py, here, with -g")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    show(found)
    return int(found["share"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
