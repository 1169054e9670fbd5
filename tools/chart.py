"""Draws the charts of the docs from the JSON of benchmark runs.

    python bench/pools.py --json pools.json
    python tools/chart.py pools.json docs/speed.svg
    python bench/arrays.py --json arrays.json
    python tools/chart.py arrays.json docs/arrays.svg
    python examples/logscan.py --json logscan.json
    python tools/chart.py logscan.json docs/logscan.svg

Of pools: one panel for each of three rows (submit, round trip, 64 MiB array), a bar for each contender and
for the limit, as long as its median, on a logarithmic scale: the figures span four orders of magnitude. Of
arrays: a panel for each way, a line for each contender, MB/s by size, both scales logarithmic. A contender
that has no figure is named with its reason. Nothing is chosen here: all contenders of a row are drawn.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

# row and figure of the JSON, title, unit, whether more is better
PANELS = (
    ("submit", "", "submit of a no-op, futures collected", "tasks/s", True),
    ("round trip", "p50", "round trip, p50", "µs", False),
    ("array", "", "64 MiB array as argument", "ms", False),
)
LOGSCAN = (("logscan", "", "a log on disk to its answer", "s", False),)

WIDTH = 760
LABEL = 190  # pixels for names
FIGURE = 110  # pixels for figures
BAR = 20
GAP = 6
TITLE = 34
OURS, THEIRS, LIMIT, INK = "#2f6fde", "#b9c2cf", "#e3b341", "#24292f"

# row of the JSON of arrays, title
CURVES = (("argument by size", "array as argument"), ("result by size", "array as result"))
OURS_AND_BORN = (OURS, "#0a2f7a")  # in the order of the row
OTHERS = ("#1a7f37", "#bf3989", "#bc4c00", "#6e7781")
PLOT = 300  # height
LEFT = 70  # pixels for figures
RIGHT = 200  # pixels for names
LINE = 15  # least distance of names
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20}
GRID = "#d8dee4"


class Bar(NamedTuple):
    """name: of a contender. value: its median, or None with the reason. color: of its role."""

    name: str
    value: float | None
    reason: str
    color: str


def bars(row: dict[str, Any], figure: str) -> list[Bar]:
    """The contenders of a row, in its order."""
    colors = {"ours": OURS, "limit": LIMIT}
    found = []
    for one in row["contenders"]:
        summary = one["summaries"].get(figure)
        value = summary["value"]["median"] if summary else None
        reason = "" if value is not None else str((one["failures"] or ["no figure"])[0])[:60]
        name = f"limit: {one['name']}" if one["role"] == "limit" else one["name"]
        found.append(Bar(name, value, reason, colors.get(one["role"], THEIRS)))
    return found


def panel(title: str, unit: str, more: bool, row: list[Bar], top: int) -> Iterable[str]:
    """One group of bars."""
    known = [bar.value for bar in row if bar.value]
    low = math.log10(min(known)) - 0.35 if known else 0.0
    high = math.log10(max(known)) if known else 1.0
    room = WIDTH - LABEL - FIGURE
    better = "longer is better" if more else "shorter is better"
    yield text(0, top + 18, f"{title}  ({unit}; {better}; logarithmic)", weight="600")
    for i, bar in enumerate(row):
        y = top + TITLE + i * (BAR + GAP)
        yield text(LABEL - 8, y + 15, bar.name, anchor="end", weight="600" if bar.color == OURS else "400")
        if bar.value:
            length = max(2.0, room * (math.log10(bar.value) - low) / (high - low))
            yield f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{bar.color}"/>'
            yield text(int(LABEL + length) + 6, y + 15, figure(bar.value))
        else:
            yield text(LABEL, y + 15, bar.reason or "no figure")


def text(x: int, y: int, words: str, anchor: str = "start", weight: str = "400", color: str = INK) -> str:
    """A line of text."""
    where = f'x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="{color}"'
    return f"<text {where}>{escape(words)}</text>"


def figure(value: float) -> str:
    """A number with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Line(NamedTuple):
    """A contender's (bytes, MB/s), or none with the reason."""

    name: str
    points: tuple[tuple[int, float], ...]
    reason: str
    color: str


def lines(row: dict[str, Any]) -> list[Line]:
    """The contenders of a row, in its order."""
    ours, others = iter(OURS_AND_BORN), iter(OTHERS)
    found = []
    for one in row["contenders"]:
        color = {"ours": ours, "limit": iter([LIMIT])}.get(one["role"], others)
        points = []
        for figure in row["figures"]:
            if summary := one["summaries"].get(figure["name"]):
                count, unit = figure["name"].split()
                nbytes = int(count) * UNITS[unit]
                points.append((nbytes, nbytes / summary["value"]["median"]))  # bytes in a µs
        reason = "" if points else str((one["failures"] or ["no figure"])[0])[:24]
        found.append(Line(one["name"], tuple(points), reason, next(color)))
    return found


def plot(title: str, row: list[Line], top: int) -> Iterable[str]:
    """One group of lines."""
    sizes = [x for line in row for x, _ in line.points] or [1]
    rates = [y for line in row for _, y in line.points] or [1.0]
    left, right = math.log2(min(sizes)), max(math.log2(max(sizes)), math.log2(min(sizes)) + 1)
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)) + 0.01)
    above, below = top + TITLE, top + TITLE + PLOT

    def across(nbytes: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(nbytes) - left) / (right - left)

    def up(rate: float) -> float:
        return below - PLOT * (math.log10(rate) - low) / (high - low)

    yield text(0, top + 18, f"{title}  (MB/s; higher is better; logarithmic)", weight="600")
    for power in range(low, high + 1):
        y = up(10.0**power)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>'
        yield text(LEFT - 8, round(y) + 4, figure(10.0**power), anchor="end")
    for nbytes in sorted(set(sizes)):
        unit = "MiB" if nbytes >= UNITS["MiB"] else "KiB"
        yield text(round(across(nbytes)), below + 18, f"{nbytes // UNITS[unit]} {unit[0]}", anchor="middle")
    for line in row:
        corners = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        width = 3 if line.color in OURS_AND_BORN else 1.5
        yield f'<polyline points="{corners}" fill="none" stroke="{line.color}" stroke-width="{width}"/>'
    ends = {line: up(line.points[-1][1]) if line.points else below for line in row}
    y = above - LINE
    names = sorted(row, key=ends.__getitem__)
    for i, line in enumerate(names):
        room = below - LINE * (len(names) - 1 - i)  # for those below it
        y = min(max(ends[line], y + LINE), room)
        words = f"{line.name}: {line.reason}" if line.reason else line.name
        yield text(WIDTH - RIGHT + 8, round(y) + 4, words, color=line.color)


def draw_curves(report: dict[str, Any]) -> str:
    """The SVG of a report of arrays. Raises: KeyError for one that lacks a row."""
    rows = {row["name"]: row for row in report["rows"]}
    parts: list[str] = []
    top = 8
    for name, title in CURVES:
        parts += plot(title, lines(rows[name]), top)
        top += TITLE + PLOT + 40
    return framed(parts, top, report["machine"])


def draw(report: dict[str, Any]) -> str:
    """The SVG of a report. Raises: KeyError for one that lacks a row."""
    if report["title"] == "Arrays":
        return draw_curves(report)
    rows = {row["name"]: row for row in report["rows"]}
    parts: list[str] = []
    top = 8
    for name, part, title, unit, more in LOGSCAN if report["title"] == "logscan" else PANELS:
        row = bars(rows[name], part)
        parts += panel(title, unit, more, row, top)
        top += TITLE + len(row) * (BAR + GAP) + 14
    return framed(parts, top, report["machine"])


def framed(parts: list[str], top: int, machine: dict[str, Any]) -> str:
    """The picture of these parts, with a caption below."""
    parts.append(text(0, top + 8, caption(machine)))
    height = top + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def caption(machine: dict[str, Any]) -> str:
    """Where it was measured."""
    return (
        f"medians; two workers; {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"{machine['python']}"
    )


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    report = json.loads(Path(argv[0]).read_text())
    try:
        picture = draw(report)
    except KeyError as error:
        print(
            f"chart: {argv[0]} has no {error}: is it the JSON of a full run of bench/pools.py, or arrays.py?",
            file=sys.stderr,
        )
        return 1
    Path(argv[1]).write_text(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
