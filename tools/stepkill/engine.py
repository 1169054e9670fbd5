"""Steps a scenario through, kills it at its boundaries, and lets a survivor sweep and audit what is left.

A **boundary** is a moment between two instructions of the text. A process that is killed there leaves nothing
but the region behind, so all boundaries with the same region are one case for those who live on. Each case is
decided once, on a copy: a fresh world of the same scenario gets the region's bytes as they were, sweeps them,
and audits. To show that a SIGKILL is no more than that, some boundaries are reached again, at full speed, and
killed for real: a seeded tenth of the pairs {address, region}; all boundaries where the scenario is short.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tools.stepkill.shipped import Shipped
from tools.stepkill.trace import Range, Stepper, Strayed

SHORT = 300  # instructions: a scenario under this is killed at each of them
SHARE = 10  # else at one in so many
ENDLESS = 1_000_000  # instructions that no scenario takes


class Verdict(NamedTuple):
    """What a survivor finds wrong."""

    lost: int = 0
    doubled: int = 0


class World(Protocol):
    """A region with what the surviving process knows about it. Made afresh for each death.

    Two worlds of one scenario are the same but for process ids and times.
    """

    memory: mmap.mmap  # the whole region

    def prepare(self) -> None:
        """In the process that will die, not stepped."""

    def act(self) -> None:
        """The operation: what is stepped."""

    def meddle(self) -> None:
        """What another process does in between, if the scenario says so."""

    def recover(self) -> None:
        """The sweep of a survivor, once the process is dead."""

    def audit(self) -> Verdict:
        """Afterwards: is everything there, once, and of use?"""

    def close(self) -> None:
        """Give it all back."""


class Moment(NamedTuple):
    """Before a function executes, for the n-th time, an instruction that begins so; b"": its first one."""

    function: str
    prefix: bytes
    nth: int


LOCK = b"\xf0"
CALL = b"\xe8"


def at_lock(function: str, count: int = 1) -> Moment:
    """Just before the n-th compare-and-swap that a function executes."""
    return Moment(function, LOCK, count)


def at_entry(function: str, count: int = 1) -> Moment:
    """When a function is entered for the n-th time."""
    return Moment(function, b"", count)


def at_call(function: str, count: int = 1) -> Moment:
    """Just before a function calls another one for the n-th time."""
    return Moment(function, CALL, count)


class Scenario(NamedTuple):
    """One way through a primitive."""

    name: str
    make: Callable[[], World]
    meddling: tuple[Moment, ...] = ()  # at each of them World.meddle is called
    over: tuple[str, ...] = ()  # modules that are run over, too: they do not touch the region

    def amid(self, *moments: Moment) -> Scenario:
        """With another process that meddles at these moments."""
        return self._replace(meddling=moments)


@dataclass
class Course:
    """What stepping a scenario through has shown."""

    addresses: list[int] = field(default_factory=list)  # the boundaries, by the instruction that comes next
    cases: list[int] = field(default_factory=list)  # and the region that was there
    regions: dict[tuple[bytes, int], int] = field(default_factory=dict)  # {bytes, meddlings before} -> number
    meddled: list[int] = field(default_factory=list)  # boundaries at which World.meddle was called
    found: list[bytes] = field(default_factory=list)  # and the region as that call found it

    def case(self, region: bytes) -> int:
        key = (region, len(self.meddled))
        return self.regions.setdefault(key, len(self.regions))


@dataclass
class Outcome:
    """Of a scenario, or of all those of a primitive."""

    boundaries: int = 0
    addresses: set[int] = field(default_factory=set)
    kills: int = 0
    missed: int = 0  # boundaries to be killed at that did not come again
    regions: int = 0
    lost: int = 0  # boundaries after which something is lost
    doubled: int = 0
    remarks: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.boundaries += other.boundaries
        self.addresses |= other.addresses
        self.kills += other.kills
        self.missed += other.missed
        self.regions += other.regions
        self.lost += other.lost
        self.doubled += other.doubled
        self.remarks += other.remarks


class Meddler:
    """Recognises the moments of a scenario while it is stepped."""

    def __init__(self, moments: Iterable[Moment], modules: Sequence[Shipped]) -> None:
        self.waiting: list[tuple[int, int, bytes, int]] = []
        for moment in moments:
            function = next(f for m in modules if (f := m.has(moment.function)) is not None)
            self.waiting.append((function.low, function.high, moment.prefix, moment.nth))

    def due(self, address: int, code: Callable[[int], bytes]) -> bool:
        """Whether a moment has come: this instruction is about to be executed."""
        come = False
        for k, (low, high, prefix, count) in enumerate(self.waiting):
            if address == low if not prefix else low <= address < high and code(address).startswith(prefix):
                self.waiting[k] = (low, high, prefix, count - 1)
                come |= count == 1
        return come


def text_of(modules: Sequence[Shipped], over: Sequence[str]) -> tuple[list[Range], list[int]]:
    """(ranges that are stepped, entries of their functions)."""
    stepped = [m for m in modules if m.name not in over]
    return [r for m in stepped for r in m.text], [e for m in stepped for e in m.entries()]


def step_through(scenario: Scenario, modules: Sequence[Shipped]) -> Course:
    """Execute a scenario to its end, one instruction at a time."""
    ranges, entries = text_of(modules, scenario.over)
    course = Course()
    meddler = Meddler(scenario.meddling, modules)
    code = {m: m.bytes_at for m in modules}[modules[0]]
    world = scenario.make()
    try:
        stepper = Stepper(world.act, ranges, world.prepare)
        try:
            stepper.enter(entries)
            memory, last, case = world.memory, b"", -1
            for address in stepper.steps():
                if len(course.addresses) == ENDLESS:
                    raise Strayed("it does not end")
                now = memory[:]
                if now != last:
                    last, case = now, course.case(now)
                course.addresses.append(address)
                course.cases.append(case)
                if scenario.meddling and meddler.due(address, code):
                    course.meddled.append(len(course.addresses) - 1)
                    course.found.append(now)
                    world.meddle()
                    last = b""
            course.case(memory[:])  # it may be killed after the last of them, too
            if stepper.finish() != 0:
                raise Strayed(f"exit code {stepper.status}")
        finally:
            stepper.kill()
    finally:
        world.close()
    if len(course.meddled) != len(scenario.meddling):
        raise Strayed("a moment to meddle did not come")
    return course


def rehearse(scenario: Scenario) -> None:
    """Nobody dies. What compiled code looks up once and keeps, it then finds the same way in every child."""
    world = scenario.make()
    try:
        world.recover()
        world.audit()
    finally:
        world.close()


def decide(scenario: Scenario, region: bytes, found: Sequence[bytes]) -> Verdict:
    """What a survivor makes of a copy of the region. found: what it has found whenever it meddled before."""
    world = scenario.make()
    try:
        for before in found:
            world.memory[:] = before
            world.meddle()  # for what this process knows of it
        world.memory[:] = region
        world.recover()
        return world.audit()
    finally:
        world.close()


def kill_at(
    scenario: Scenario, course: Course, ranges: list[Range], boundary: int, hits: int | None = None
) -> Verdict | None:
    """Run to a boundary at full speed, SIGKILL, sweep the real region. None: it did not come.

    hits: for the last address, instead of the count of the course.
    """
    world = scenario.make()
    try:
        stepper = Stepper(world.act, ranges, world.prepare)
        try:
            done = 0
            for stop in [*[m for m in course.meddled if m < boundary], boundary]:
                address = course.addresses[stop]
                count = course.addresses[done : stop + 1].count(address)
                if not stepper.reach(address, hits if hits and stop == boundary else count):
                    return None
                if stop != boundary:
                    world.meddle()
                done = stop
        finally:
            stepper.kill()
        world.recover()
        return world.audit()
    finally:
        world.close()


def choose(course: Course, seed: str, share: int) -> list[int]:
    """Boundaries to be killed for real: the first one of each pair {address, region} that is drawn."""
    firsts: dict[tuple[int, int], int] = {}
    for boundary, pair in enumerate(zip(course.addresses, course.cases, strict=True)):
        firsts.setdefault(pair, boundary)
    pairs = sorted(firsts.values())
    if len(course.addresses) < SHORT:
        return list(range(len(course.addresses)))
    return sorted(random.Random(seed).sample(pairs, -(-len(pairs) // share)))


def run(scenario: Scenario, modules: Sequence[Shipped], seed: str, share: int = SHARE) -> Outcome:
    """All of a scenario: stepped, decided, killed.

    To be called on one processor (os.sched_setaffinity): who steps and who is stepped take turns, and a step
    takes 30 µs there instead of 100.
    """
    rehearse(scenario)
    course = step_through(scenario, modules)
    outcome = Outcome(len(course.addresses), set(course.addresses), regions=len(course.regions))
    verdicts = [decide(scenario, region, course.found[:count]) for region, count in course.regions]
    for case in [*course.cases, len(verdicts) - 1]:
        outcome.lost += verdicts[case].lost > 0
        outcome.doubled += verdicts[case].doubled > 0
    ranges, _ = text_of(modules, scenario.over)
    for boundary in choose(course, f"{seed} {scenario.name}", share):
        expected: Verdict | None = verdicts[course.cases[boundary]]
        verdict = kill_at(scenario, course, ranges, boundary)
        if verdict is None:  # how often a loop runs may depend on the pid, or on /proc: then the first time
            verdict, expected = kill_at(scenario, course, ranges, boundary, 1), Verdict()
        if verdict is None:
            outcome.missed += 1
            continue
        outcome.kills += 1
        if verdict != expected:
            outcome.remarks.append(f"{scenario.name}: killed at {boundary}: {verdict}, copy: {expected}")
            outcome.lost += verdict.lost > 0
            outcome.doubled += verdict.doubled > 0
    return outcome
