"""The runner of all benchmarks: contenders take turns, each turn in a process of its own.

    for each row (a workload):
        for each round:
            for each contender:   A B C A B C …          so that a noisy minute hits all alike
                fork ── measure(meter) ── one line of JSON through a pipe
                end every process that is left of it

* A turn starts from the same process each time: nothing that one contender imports, leaks or breaks
  reaches the next. A turn that raises, dies or hangs is a `Failure` with its reason, and is reported.
* `with meter.timing():` is the part that counts: wall-clock seconds, and CPU seconds of every process
  below the turn. Set-up, warm-up and tear-down stay outside.
* A figure is the median over the rounds, with the smallest and the largest. Ratios are taken within a
  round, between neighbours in time, and then their median: to the peer with the best median, and to the
  row's limit, which is a contender like the others (a bare memcpy, a bare echo) and runs in its turn.

A benchmark is a list of `Row`s handed to `main`.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import resource
import select
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, TextIO

import machine

Measure = Callable[["Meter"], Mapping[str, float]]  # figure name -> value

PATIENCE = 1.0  # seconds in which what a turn leaves behind may end by itself


# ---- what is measured ----------------------------------------------------------------------------


class Role(StrEnum):
    """What a contender is in its row."""

    OURS = "ours"
    PEER = "peer"
    LIMIT = "limit"  # what the machine can do: at most one in a row


@dataclass(frozen=True)
class Figure:
    """One number of a row. `name` tells it from the row's others, and may be empty if there are none."""

    name: str
    unit: str
    higher_is_better: bool = False


@dataclass(frozen=True)
class Entry:
    """A contender in a row: `measure` runs in a fresh process, and returns a value for each figure.

    A figure that it leaves out does not exist for it; `meter.note` says why.
    """

    name: str
    role: Role
    measure: Measure


@dataclass(frozen=True)
class Row:
    """A workload. `meaning` says what is timed, and what one operation is. limit: seconds after which a turn
    has failed, where that is not the Scale's.
    """

    name: str
    meaning: str
    figures: tuple[Figure, ...]
    entries: tuple[Entry, ...]
    limit: float | None = None


@dataclass(frozen=True)
class Sample:
    """A turn that worked. cpu_seconds: of all its processes, in the timed parts, which took `seconds`.

    cpu: where figures have timed parts of their own, figure -> CPU seconds for an operation. detail: what is
    to stand in the JSON besides.
    """

    values: Mapping[str, float]
    operations: int
    seconds: float
    cpu_seconds: float
    note: str = ""
    cpu: Mapping[str, float] = field(default_factory=dict)
    detail: Any = None
    killed: int = 0  # processes that it left behind and that did not end by themselves


@dataclass(frozen=True)
class Failure:
    """A turn that did not."""

    error: str


Turn = Sample | Failure


class Meter:
    """Times parts of a turn.

    operations: how many the timed parts do, set by the workload. note, cpu, detail: as in a Sample, likewise.
    """

    def __init__(self, root: int) -> None:
        self._root = root  # the process below which all belongs to this turn
        self.operations = 1
        self.note = ""
        self.cpu: dict[str, float] = {}
        self.detail: Any = None
        self.seconds = self.cpu_seconds = 0.0

    @contextmanager
    def timing(self) -> Iterator[None]:
        """A part that counts; several add up."""
        gc.collect()
        others = machine.cpu_seconds_of_others(self._root)
        this = time.process_time()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            this = time.process_time() - this
            self.cpu_seconds += this + machine.cpu_seconds_of_others(self._root) - others


def enough(run: Callable[[int], object], seconds: float, start: int, most: int) -> int:
    """How many operations take about that long, at most `most`: run(n) is tried with growing n.

    This warms the workload up, too; what the first, cold run took says little.
    """
    count = min(start, most)
    run(count)
    while True:
        began = time.perf_counter()
        run(count)
        took = time.perf_counter() - began
        wanted = min(most, max(1, int(count * seconds / max(took, 1e-6))))
        if took >= seconds / 4 or wanted <= count:
            return wanted
        count = min(wanted, 8 * count)


# ---- one turn ------------------------------------------------------------------------------------


def turn(measure: Measure, limit: float) -> Turn:
    """Run `measure` in a fork. After `limit` seconds it is stopped and has failed."""
    with machine.adopting(), tempfile.TemporaryFile() as output:
        known = machine.descendants(os.getpid())
        reader, writer = os.pipe()
        root = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_a_turn(measure, writer, output.fileno(), root)
        os.close(writer)
        try:
            said, ending = _listen(pid, reader, limit)
        finally:
            os.close(reader)
            with suppress(ProcessLookupError, ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:  # hung, or we were interrupted
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            killed = machine.end_all_but(known, PATIENCE)
        if not said:
            return Failure(f"{ending}: {_last_words(output)}".removesuffix(": "))
        message = json.loads(said)
        return Failure(message["error"]) if "error" in message else Sample(**message, killed=killed)


def _be_a_turn(measure: Measure, writer: int, output: int, root: int) -> None:
    """The life of the fork; does not return."""
    try:
        machine.die_with_parent()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in enumerate((null, output, output)):
            os.dup2(source, target)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (as long as the process)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        faulthandler.enable(output)  # SIGABRT, when the time is up, shows where it hangs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        meter = Meter(root)
        try:
            values = dict(measure(meter))
            message: dict[str, Any] = {
                "values": values,
                "operations": meter.operations,
                "seconds": meter.seconds,
                "cpu_seconds": meter.cpu_seconds,
                "note": meter.note,
                "cpu": meter.cpu,
                "detail": meter.detail,
            }
        except BaseException as error:
            message = {"error": describe(error)}
        os.write(writer, json.dumps(message).encode() + b"\n")
    finally:
        os._exit(0)


def describe(error: BaseException) -> str:
    """Its type and the beginning of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.100}" if lines else type(error).__name__


def _listen(pid: int, reader: int, limit: float) -> tuple[bytes, str]:
    """The line that the turn wrote, or b"" and how it ended.

    A line, not everything up to the end of the pipe: workers that were forked hold its other end, too.
    """
    said, deadline = b"", time.monotonic() + limit
    pidfd = os.pidfd_open(pid)
    try:
        while not said.endswith(b"\n"):
            ready, _, _ = select.select([reader, pidfd], [], [], max(0.0, deadline - time.monotonic()))
            if reader in ready and (more := os.read(reader, 65536)):
                said += more
            elif ready:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                return b"", f"its process ended with {signal.Signals(-code).name if code < 0 else code}"
            else:
                signal.pidfd_send_signal(pidfd, signal.SIGABRT)
                select.select([pidfd], [], [], 1.0)
                return b"", f"no result in {limit:g} s"
        select.select([pidfd], [], [], 5.0)
        return said, ""
    finally:
        os.close(pidfd)


def _last_words(output: Any) -> str:
    """What its output says about the end: where a stack was dumped, its innermost frame."""
    output.seek(0)
    lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("Current thread") and number + 1 < len(lines):
            where = lines[number + 1].split(os.sep)[-1].replace('"', "")
            return f"stuck at {where.strip()}"
    return lines[-1].strip() if lines else ""


# ---- statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A median, with the smallest and the largest of what it is the median of."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None if there is nothing."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Summary:
    """One figure of one contender. Ratios are own value / other's value, whichever way is better."""

    value: Spread
    to_best_peer: Spread | None
    to_limit: Spread | None


@dataclass
class Result:
    """All turns of a row: for each contender, one for each round."""

    row: Row
    turns: dict[str, list[Turn]] = field(default_factory=dict)

    def values(self, name: str, figure: Figure) -> dict[int, float]:
        """Of a contender: round -> value, without the rounds that have none."""
        return {
            number: turn.values[figure.name]
            for number, turn in enumerate(self.turns.get(name, ()))
            if isinstance(turn, Sample) and figure.name in turn.values
        }

    def best_peer(self, figure: Figure) -> str | None:
        """The peer with the best median."""
        medians = {
            entry.name: statistics.median(values)
            for entry in self.row.entries
            if entry.role is Role.PEER and (values := list(self.values(entry.name, figure).values()))
        }
        best = max if figure.higher_is_better else min
        return best(medians, key=medians.__getitem__) if medians else None

    def limit(self) -> str | None:
        """The contender that is the row's limit."""
        return next((entry.name for entry in self.row.entries if entry.role is Role.LIMIT), None)

    def summary(self, name: str, figure: Figure) -> Summary | None:
        """None if no turn of it has this figure."""
        own = self.values(name, figure)
        value = Spread.of(list(own.values()))

        def to(other: str | None) -> Spread | None:
            theirs = self.values(other, figure) if other is not None else {}
            return Spread.of([own[number] / theirs[number] for number in own if theirs.get(number)])

        return Summary(value, to(self.best_peer(figure)), to(self.limit())) if value else None

    def cpu_per_operation(self, name: str, figure: str = "") -> Spread | None:
        """CPU seconds of all processes of a contender, per operation: of this figure's, if they are known."""
        samples = [turn for turn in self.turns.get(name, ()) if isinstance(turn, Sample)]
        return Spread.of([one.cpu.get(figure, one.cpu_seconds / one.operations) for one in samples])

    def failures(self, name: str) -> list[str]:
        """The reasons why turns of a contender failed."""
        return [turn.error for turn in self.turns.get(name, ()) if isinstance(turn, Failure)]

    def remarks(self, name: str) -> str:
        """What a reader should know about a contender's turns, failures first."""
        turns = self.turns.get(name, [])
        failures, words = self.failures(name), list[str]()
        if failures:
            count = "FAILED" if len(failures) == len(turns) else f"{len(failures)} of {len(turns)} FAILED"
            words.append(f"{count}: {'; '.join(dict.fromkeys(failures))}")
        samples = [turn for turn in turns if isinstance(turn, Sample)]
        words += dict.fromkeys(sample.note for sample in samples if sample.note)
        if killed := sum(sample.killed for sample in samples):
            words.append(f"left {killed} processes behind")
        return "; ".join(words)


# ---- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How long to look.

    rounds: turns of each contender, fewer if the row would take more than row_seconds. seconds: about as
    long as a timed part takes. limit: seconds after which a turn has failed.
    """

    rounds: int
    row_seconds: float
    seconds: float
    limit: float


def run(row: Row, scale: Scale, progress: TextIO | None = None) -> Result:
    """All turns of a row: A B C A B C …, in whole rounds: at least one, then while there is time."""
    result = Result(row, {entry.name: [] for entry in row.entries})
    start, longest = time.monotonic(), 0.0
    for number in range(scale.rounds):
        began = time.monotonic()
        if number and began + longest - start > scale.row_seconds:
            break
        for entry in row.entries:
            if progress is not None:
                print(
                    f"\r\033[K{row.name}, round {number + 1} of {scale.rounds}: {entry.name}",
                    end="",
                    file=progress,
                    flush=True,
                )
            result.turns[entry.name].append(turn(entry.measure, row.limit or scale.limit))
        longest = max(longest, time.monotonic() - began)
    if progress is not None:
        print("\r\033[K", end="", file=progress, flush=True)
    return result


# ---- showing -------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text, too. The first and the last column are words."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(header))]
    last = len(header) - 1

    def draw(line: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if column in (0, last) else "-" * (w - 1) + ":" for column, w in enumerate(widths)]
    return "\n".join([draw(cells[0]), draw(rule), *map(draw, cells[1:])])


def table(result: Result) -> str:
    """A row as a heading, its meaning, and a table of its contenders for each figure."""
    parts = [f"## {result.row.name}\n\n{result.row.meaning}"]
    for figure in result.row.figures:
        header = [
            " ".join(filter(None, (figure.name, f"({figure.unit})"))),
            "median",
            "min – max",
            "× best peer",
            "× limit",
            "CPU µs/op",
            "remarks",
        ]
        lines = []
        for entry in result.row.entries:
            summary, cpu = (
                result.summary(entry.name, figure),
                result.cpu_per_operation(entry.name, figure.name),
            )
            lines.append(
                [
                    entry.name if entry.role is not Role.LIMIT else f"limit: {entry.name}",
                    number(summary.value.median) if summary else "–",
                    f"{number(summary.value.least)} – {number(summary.value.most)}" if summary else "–",
                    number(summary.to_best_peer.median) if summary and summary.to_best_peer else "–",
                    number(summary.to_limit.median) if summary and summary.to_limit else "–",
                    number(cpu.median * 1e6) if cpu else "–",
                    result.remarks(entry.name) if figure is result.row.figures[0] else "",
                ]
            )
        better = "higher" if figure.higher_is_better else "lower"
        best = result.best_peer(figure)
        rounds = max(map(len, result.turns.values()), default=0)
        parts.append(
            f"{markdown(header, lines)}\n\n{better} is better; best peer: {best or 'none'}; rounds: {rounds}"
        )
    return "\n\n".join(parts)


def record(result: Result) -> dict[str, Any]:
    """A row for the JSON file: every turn, and what the table shows."""
    return {
        "name": result.row.name,
        "meaning": result.row.meaning,
        "figures": [
            {**asdict(figure), "best_peer": result.best_peer(figure)} for figure in result.row.figures
        ],
        "contenders": [
            {
                "name": entry.name,
                "role": entry.role,
                "summaries": {
                    figure.name: asdict(summary)
                    for figure in result.row.figures
                    if (summary := result.summary(entry.name, figure))
                },
                "cpu_seconds_per_operation": asdict(cpu)
                if (cpu := result.cpu_per_operation(entry.name))
                else None,
                "failures": result.failures(entry.name),
                "turns": [asdict(turn) for turn in result.turns[entry.name]],
            }
            for entry in result.row.entries
        ],
    }


def headline(facts: Mapping[str, Any]) -> str:
    """The machine and the versions, in two lines."""
    versions = ", ".join(f"{name} {found or 'missing'}" for name, found in facts["packages"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} usable cores, Linux {facts['kernel']}, {facts['python']}, "
        f"commit {facts['commit'] or 'unknown'}, load {facts['load_before']:.1f}\n{versions}"
    )


# ---- the command ---------------------------------------------------------------------------------


def choose(rows: Sequence[Row], peers: Sequence[str] | None, names: Sequence[str] | None) -> list[Row]:
    """The rows with these names, without the peers that are not named (None: all).

    Raises ValueError for a name that there is not.
    """
    known_peers = {e.name: None for row in rows for e in row.entries if e.role is Role.PEER}
    known_rows = {row.name: None for row in rows}
    for asked, known, what in ((peers, known_peers, "peer"), (names, known_rows, "row")):
        for name in asked or ():
            if name not in known:
                raise ValueError(f"no {what} is named {name!r}; there are: {', '.join(known)}")
    return [
        Row(
            row.name,
            row.meaning,
            row.figures,
            tuple(e for e in row.entries if e.role is not Role.PEER or peers is None or e.name in peers),
            row.limit,
        )
        for row in rows
        if names is None or row.name in names
    ]


def main(
    title: str,
    rows_at: Callable[[Scale], Sequence[Row]],
    *,
    quick: Scale,
    full: Scale,
    packages: Sequence[str],
    argv: Sequence[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> int:
    """The command line of a benchmark. 0: every turn of ours worked. A peer that failed is only reported.

    parents: with the options that this benchmark has besides, and has read.
    """
    parser = argparse.ArgumentParser(description=title, parents=parents)
    parser.add_argument("--quick", action="store_true", help="a minute: is it in order, and roughly how fast")
    parser.add_argument("--json", metavar="FILE", help="write every turn, ratio and machine fact there")
    parser.add_argument("--peers", metavar="A,B", help="only these peers ('none': none)")
    parser.add_argument("--rows", metavar="A,B", help="only these rows")
    options = parser.parse_args(argv)
    scale = quick if options.quick else full
    names = options.rows.split(",") if options.rows else None
    peers = options.peers.split(",") if options.peers else None
    try:
        rows = choose(rows_at(scale), [] if peers == ["none"] else peers, names)
    except ValueError as error:
        parser.error(str(error))

    facts = machine.facts(packages)
    print(f"# {title}\n\n{headline(facts)}", flush=True)
    started = time.time()
    results = []
    for row in rows:
        results.append(run(row, scale, sys.stderr if sys.stderr.isatty() else None))
        print(f"\n{table(results[-1])}", flush=True)
    facts["load_after"] = os.getloadavg()[0]
    took = time.time() - started
    print(f"\n{took:.0f} s, load afterwards {facts['load_after']:.1f}")

    if options.json:
        report = {
            "title": title,
            "started": started,
            "seconds": took,
            "scale": asdict(scale),
            "machine": facts,
            "rows": [record(result) for result in results],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1, ensure_ascii=False)
            file.write("\n")
    ours = [(result, e.name) for result in results for e in result.row.entries if e.role is Role.OURS]
    return 1 if any(result.failures(name) for result, name in ours) else 0
