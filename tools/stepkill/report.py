"""What is printed: a line for each primitive, and what is missing where something is."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.stepkill.engine import Outcome
from tools.stepkill.primitive import Primitive, Unreached

ENOUGH = 0.95  # of a primitive's instructions that must have been stepped
MISSED = 0.05  # of the boundaries to be killed at, those that need not come again


@dataclass(frozen=True)
class Part:
    """A function of a primitive."""

    name: str
    what: str  # as in Code
    stepped: int
    instructions: int
    around: tuple[int, int]  # of the whole function: stepped, and all
    excused: int  # of those not stepped, in the table of what cannot be reached
    missing: tuple[int, ...]  # offsets in the object of those not stepped


@dataclass(frozen=True)
class Line:
    """A primitive in the table."""

    name: str
    outcome: Outcome
    scenarios: tuple[tuple[str, int, int, int], ...]  # name, boundaries, regions, kills
    parts: tuple[Part, ...]
    unreached: tuple[Unreached, ...]
    seconds: float

    @property
    def instructions(self) -> int:
        return sum([part.instructions - part.excused for part in self.parts])

    @property
    def share(self) -> float:
        """Of its instructions, those that were stepped."""
        total = self.instructions
        return sum([part.stepped for part in self.parts]) / total if total else 1.0

    @property
    def good(self) -> bool:
        found = self.outcome
        missed = found.missed > MISSED * found.kills
        return not (found.lost or found.doubled or missed or self.share < ENOUGH)


def line(primitive: Primitive, scenarios: Sequence[tuple[str, Outcome]], seconds: float) -> Line:
    """Add a primitive's scenarios up."""
    total = Outcome()
    for _, outcome in scenarios:
        total.add(outcome)
    excused = {unreached.function: unreached.most for unreached in primitive.unreached}
    parts = []
    for code in primitive.code():
        missing = sorted(code.wanted - total.addresses)
        around = len(code.everything & total.addresses), len(code.everything)
        most = min(excused.get(code.name, 0), len(missing))
        offsets = tuple([address - code.base for address in missing])
        stepped = len(code.wanted) - len(missing)
        parts.append(Part(code.name, code.what, stepped, len(code.wanted), around, most, offsets))
    counts = tuple([(name, o.boundaries, o.regions, o.kills) for name, o in scenarios])
    return Line(primitive.name, total, counts, tuple(parts), primitive.unreached, seconds)


HEAD = ("primitive", "boundaries", "addresses", "regions", "killed", "lost", "doubled", "share", "of", "s")


def show(lines: Sequence[Line], seed: str, verbose: bool, seconds: float) -> None:
    """Print the table."""
    total = Outcome()
    rows = []
    for one in lines:
        total.add(one.outcome)
        share = f"{one.share:.1%}"
        rows.append((one.name, *counts(one.outcome), share, one.instructions, f"{one.seconds:.0f}"))
    rows.append(("all", *counts(total), "", "", f"{seconds:.0f}"))
    print(f"CPython {platform.python_version()}, {platform.machine()}; seed {seed}")
    widths = [max([len(str(row[k])) for row in [HEAD, *rows]]) for k in range(len(HEAD))]
    for row in [HEAD, *rows]:
        cells = [str(row[0]).ljust(widths[0])]
        cells += [str(x).rjust(w) for x, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
    print("Every boundary is counted; those with the same region are one case for a survivor, swept once.")
    unreached = {item: one.name for one in lines for item in one.unreached}
    for item in unreached:
        print(f"not reachable, {item.function}: at most {item.most} instructions: {item.reason}")
    for one in lines:
        show_faults(one, verbose)


def counts(outcome: Outcome) -> Iterable[int]:
    yield from (outcome.boundaries, len(outcome.addresses), outcome.regions, outcome.kills)
    yield from (outcome.lost, outcome.doubled)


def show_faults(one: Line, verbose: bool) -> None:
    for remark in one.outcome.remarks:
        print(f"{one.name}: {remark}")
    if one.outcome.lost or one.outcome.doubled:
        print(f"{one.name}: LOST at {one.outcome.lost} boundaries, DOUBLED at {one.outcome.doubled}")
    if one.outcome.missed:
        print(f"{one.name}: boundaries that did not come again, to be killed at: {one.outcome.missed}")
    if verbose:
        for name, boundaries, regions, kills in one.scenarios:
            what = f"{one.name}, {name}" if name else one.name
            print(f"{what}: {boundaries} boundaries, {regions} regions, {kills} killed")
    for part in one.parts:
        if verbose or (part.missing and not one.good):
            found = f"{part.stepped} of {part.instructions}"
            if part.around[1] != part.instructions:
                found += f", of the whole function {part.around[0]} of {part.around[1]}"
            where = " ".join([f"{address:x}" for address in part.missing])
            print(f"{one.name}: {part.name} ({part.what}): {found}{'; not ' if where else ''}{where}")
    if one.share < ENOUGH:
        print(f"{one.name}: only {one.share:.1%} of its instructions were stepped")
