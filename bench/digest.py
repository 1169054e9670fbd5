"""The tables of docs/benchmarks.md, made of the JSON of a run of arrays.py."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness import markdown, number

MIB = 1 << 20
Report = Mapping[str, Any]
Values = dict[int, float]  # round -> value


class Goal(NamedTuple):
    """A ratio within a round: of `ours` to `other` in a figure of a row, at most or at least `bound`.

    other: a contender; "peer": the best one; None: the value itself. inverse: other / ours.
    """

    what: str
    row: str
    figure: str
    ours: str
    other: str | None
    sign: str
    bound: float
    inverse: bool = False


GOALS = (
    Goal("argument, against one memcpy", "argument", "", "runtime", "one memcpy", "≤", 1.2),
    Goal(
        "argument, `ProcessPoolExecutor` / ours",
        "argument", "", "runtime", "ProcessPoolExecutor", "≥", 10, True,
    ),
    Goal("argument, Ray / ours", "argument", "", "runtime", "Ray", "≥", 1.5, True),
    Goal(
        "argument that is summed, against memcpy and sum",
        "argument, summed", "", "runtime", "memcpy and sum", "≤", 1.2,
    ),
    Goal(
        "argument of `rt.empty`, against one memcpy",
        "born", "reads one word", "runtime, rt.empty", "one memcpy", "≤", 0.03,
    ),
    Goal(
        "the same beyond a sum",
        "born", "sums, beyond the sum", "runtime, rt.empty", "one memcpy", "≤", 0.03,
    ),
    Goal("result, against fill and one memcpy", "result", "", "runtime", "fill and memcpy", "≤", 1.2),
    Goal(
        "result of `current().empty`, against a fill",
        "result, born", "call", "runtime, current().empty", "fill", "≤", 1.05,
    ),
    Goal(
        "the same beyond the function",
        "result, born", "beyond the function", "runtime, current().empty", "fill", "≤", 0.05,
    ),
    Goal("1 MiB echo (numpy), against the best peer", "echo numpy", "", "runtime", "peer", "≥", 10),
    Goal("1 MiB echo (`bytes`), against the best peer", "echo bytes", "", "runtime", "peer", "≥", 10),
    Goal("one `Ref` read by 8 tasks: PSS, × the array", "shared", "PSS", "runtime", None, "≤", 1.05),
)  # fmt: skip


def tables(report: Report) -> str:
    """All that the report has rows for."""
    rows = {row["name"]: row for row in report["rows"]}
    parts = [goals(rows)]
    for what in ("argument", "result"):
        if row := rows.get(f"{what} by size"):
            parts += [f"### {row['name']}\n\n{row['meaning']}", sizes(row)]
    for what in ("argument", "result"):
        if row := rows.get(f"{what} by threshold"):
            parts += [f"### {row['name']}\n\n{row['meaning']}", thresholds(row)]
    if row := rows.get("mixed load"):
        parts += [f"### {row['name']}\n\n{row['meaning']}", load(row)]
    return "\n\n".join(parts)


# ---- what was asked for --------------------------------------------------------------------------


def goals(rows: Mapping[str, Any]) -> str:
    """Each goal with the ratio that was reached."""
    lines = []
    for goal in GOALS:
        if (row := rows.get(goal.row)) is None:
            continue
        other = best_peer(row, goal.figure) if goal.other == "peer" else goal.other
        found = ratios(row, goal, other)
        if not found:
            lines.append([goal.what, f"{goal.sign} {goal.bound:g} ×", f"– {failure(row, goal, other)}", ""])
            continue
        middle = statistics.median(found)
        met = (operator.le if goal.sign == "≤" else operator.ge)(middle, goal.bound)
        spread = f"{number(min(found))} – {number(max(found))}"
        reached = f"**{number(middle)} ×** ({spread})" + ("" if met else ": missed")
        lines.append([goal.what, f"{goal.sign} {goal.bound:g} ×", reached, against(row, goal, other)])
    return markdown(["", "asked for", "reached (min – max)", "medians"], lines)


def ratios(row: Report, goal: Goal, other: str | None) -> list[float]:
    own = values(row, goal.ours, goal.figure)
    if other is None:
        return list(own.values())
    theirs = values(row, other, goal.figure)
    both = [(own[i], theirs[i]) for i in own if i in theirs]
    return [theirs / own if goal.inverse else own / theirs for own, theirs in both]


def values(row: Report, name: str, figure: str) -> Values:
    """Of a contender, without the rounds in which it failed."""
    turns = next((one["turns"] for one in row["contenders"] if one["name"] == name), [])
    return {i: turn["values"][figure] for i, turn in enumerate(turns) if figure in turn.get("values", ())}


def best_peer(row: Report, figure: str) -> str:
    return next(one["best_peer"] or "" for one in row["figures"] if one["name"] == figure)


def failure(row: Report, goal: Goal, other: str | None) -> str:
    """Why there is no ratio."""
    for one in row["contenders"]:
        if one["name"] in (goal.ours, other) and one["failures"]:
            return f"{one['name']}: {one['failures'][0]}"
    return f"no {other}"


def against(row: Report, goal: Goal, other: str | None) -> str:
    """Both medians, with CPU time for an operation."""
    unit = next(one["unit"] for one in row["figures"] if one["name"] == goal.figure)
    return "; ".join(
        f"{name}: {number(statistics.median(found.values()))} {unit}, CPU {cpu(row, name, goal.figure)}"
        for name in (goal.ours, other)
        if name and (found := values(row, name, goal.figure))
    )


def cpu(row: Report, name: str, figure: str) -> str:
    """Microseconds of all processes of a contender, for an operation."""
    turns = next(one["turns"] for one in row["contenders"] if one["name"] == name)
    found = [
        turn["cpu"].get(figure, turn["cpu_seconds"] / turn["operations"])
        for turn in turns
        if "values" in turn
    ]
    return f"{number(statistics.median(found) * 1e6)} µs"


# ---- by size -------------------------------------------------------------------------------------


def size(figure: str) -> int:
    """The bytes that a figure's name says."""
    count, unit = figure.split()
    return int(count) * (MIB if unit == "MiB" else 1024)


def medians(row: Report, name: str) -> dict[str, float]:
    """Figure -> median over the rounds, in µs."""
    found = {one["name"]: values(row, name, one["name"]) for one in row["figures"]}
    return {figure: statistics.median(some.values()) for figure, some in found.items() if some}


def sizes(row: Report) -> str:
    """µs, MB/s and CPU µs of each contender at each size."""
    lines = []
    for one in row["contenders"]:
        found = medians(row, one["name"])
        for what, cell in (
            ("µs", lambda figure, found=found: number(found[figure])),
            ("MB/s", lambda figure, found=found: number(size(figure) / found[figure])),
            ("CPU", lambda figure, one=one: cpu(row, one["name"], figure)),
        ):
            cells = [cell(f["name"]) if f["name"] in found else "–" for f in row["figures"]]
            lines.append([one["name"] if what == "µs" else "", what, *cells])
    return markdown(["", "", *(one["name"] for one in row["figures"])], lines)


def thresholds(row: Report) -> str:
    """µs by threshold and size, and where the curves cross."""
    names = [one["name"] for one in row["contenders"]]
    figures = [one["name"] for one in row["figures"]]
    found = {name: medians(row, name) for name in names}
    lines = [[n, *(number(found[n][f]) if f in found[n] else "–" for f in figures)] for n in names]
    out, inside = values_of_all(row, names[0]), values_of_all(row, names[-1])
    ratio = {
        f: statistics.median(own / inside[f][i] for i, own in out[f].items()) for f in figures if f in inside
    }
    lines.append(["outside / inside", *(number(ratio[f]) if f in ratio else "–" for f in figures)])
    return f"{markdown([row['name'] + ' (µs)', *figures], lines)}\n\n{crossing(ratio, names[0])}"


def values_of_all(row: Report, name: str) -> dict[str, Values]:
    return {f["name"]: found for f in row["figures"] if (found := values(row, name, f["name"]))}


def crossing(ratio: Mapping[str, float], first: str) -> str:
    """From which size on it pays to stay outside, for good. first: the lowest threshold, "from 4 KiB"."""
    outside = [figure for figure in ratio if size(figure) >= size(first.removeprefix("from "))]
    paid: list[str] = []
    for figure in reversed(outside):
        if ratio[figure] > 1:
            break
        paid.insert(0, figure)
    return f"Outside of the pickle is faster from {paid[0]} on." if paid else "Nowhere is it faster outside."


# ---- memory --------------------------------------------------------------------------------------


def load(row: Report, lines: int = 12) -> str:
    """Memory over time, and the slopes."""
    (ours,) = row["contenders"]
    turns = [turn for turn in ours["turns"] if "values" in turn]
    if not turns:
        return f"failed: {ours['failures']}"
    samples: Sequence[Mapping[str, float]] = turns[0]["detail"]["samples"]
    names = ("host", "workers", "reserved", "used")
    chosen = samples[:: max(1, len(samples) // lines)]
    body = [[f"{one['seconds'] / 60:.1f}", *(number(one[name] / 1e6) for name in names)] for one in chosen]
    slopes = ", ".join(f"{name}: {number(value)}" for name, value in turns[0]["values"].items())
    units = {one["unit"] for one in row["figures"][:-1]}
    return (
        f"{markdown(['minutes', *(f'{name} (MB)' for name in names)], body)}\n\n"
        f"Second half ({', '.join(units)}), and MB at the end: {slopes}. {turns[0]['operations']:,} calls"
        f"{', ' + turns[0]['note'] if turns[0]['note'] else ''}."
    )
