"""A small explicit-state model checker: breadth first, so the first thing that is wrong has a shortest trace.

A model is a `World`: mutable, with methods that are the steps of its actors. The checker asks a state for the
steps that are possible in it, takes each of them on a copy, and goes on until there is no state left that it
has not seen. It finds three kinds of things:

    a step that must not be possible        the step raises `Broken`
    a state that must not be                `check` raises `Broken`
    a state that leads nowhere              from it no way leads to a state that is an end (`ended`)

The third is what "it ends well" means without assumptions on who is scheduled when: whatever has happened so
far, there is still a way to the quiet end (AG EF in CTL; no fairness is assumed). It includes deadlock.
"""

from __future__ import annotations

import abc
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

__all__ = ["Broken", "Report", "Step", "World", "explore", "numbers_of", "source", "step"]

F = TypeVar("F", bound=Callable[..., None])


class Broken(Exception):
    """A property does not hold."""


class Step(NamedTuple):
    """What can happen next: a method of the world's class, and its arguments."""

    method: Callable[..., None]
    args: tuple[int, ...] = ()


def step(where: str, words: str) -> Callable[[F], F]:
    """Says of a step which code it stands for, "file:function,function; file:...", and how to tell it."""

    def mark(method: F) -> F:
        method.source = where  # type: ignore[attr-defined]
        method.words = words  # type: ignore[attr-defined]
        return method

    return mark


def source(method: Callable[..., None]) -> str:
    """The code that a step stands for."""
    return str(getattr(method, "source", ""))


def numbers_of(kind: type) -> Callable[[Any], tuple[int, ...]]:
    """What makes a tuple of the fields of a dataclass: dataclasses.astuple copies what is in them, slowly."""
    return attrgetter(*(one.name for one in fields(kind)))


class World(abc.ABC):
    """One state of a model, open for changes."""

    @abc.abstractmethod
    def freeze(self) -> bytes:
        """The state as bytes. May rename what has no order, so that states that differ in names are one."""

    @abc.abstractmethod
    def raw(self) -> bytes:
        """The state as bytes, names as they are: for traces."""

    @abc.abstractmethod
    def steps(self) -> list[Step]:
        """All that can happen next."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises `Broken` in a state that must not be."""

    @abc.abstractmethod
    def ended(self) -> bool:
        """Whether this is a quiet end: all is done, and done right."""

    @abc.abstractmethod
    def shown(self) -> dict[str, str]:
        """The shared words, by name, as a reader would write them."""


@dataclass
class Report:
    """What an exploration has found."""

    states: int = 0
    transitions: int = 0
    depth: int = 0  # steps of the longest of the shortest ways to a state
    ends: int = 0  # states that are a quiet end
    seconds: float = 0.0  # of processor time
    broken: str = ""  # what is wrong; "": nothing
    trace: list[str] = field(default_factory=list)  # the shortest way there, a line for each step and word
    steps: int = 0  # of that way
    taken: set[str] = field(default_factory=set)  # names of the steps that were ever possible


class Explorer:
    """One exploration. `thaw` makes a world of a frozen state; without one, the first world."""

    def __init__(self, thaw: Callable[..., World], limit: int) -> None:
        self.thaw = thaw
        self.limit = limit
        first = thaw().freeze()
        self.states = [first]
        self.numbers = {first: 0}
        self.parents = array("L", [0])
        self.levels = array("L", [0])
        self.sources = array("L")  # of each transition, and
        self.targets = array("L")
        self.ends = array("L")
        self.report = Report()

    def run(self) -> Report:
        """Visit every state; then look whether each has a way to an end."""
        begin = time.process_time()
        number = 0
        while number < len(self.states) and not self.report.broken:
            self.visit(number)
            number += 1
        report = self.report
        if not report.broken:
            self.find_dead_ends()
        report.states, report.transitions = len(self.states), len(self.sources)
        report.depth, report.ends = max(self.levels), len(self.ends)
        report.seconds = time.process_time() - begin
        return report

    def visit(self, number: int) -> None:
        """Take every step from a state."""
        state = self.states[number]
        world = self.thaw(state)
        if world.ended():
            self.ends.append(number)
        for possible in world.steps():
            after = self.thaw(state)
            self.report.taken.add(possible.method.__name__)
            try:
                possible.method(after, *possible.args)
                frozen = after.freeze()
                target = self.numbers.get(frozen)
                if target is None:
                    after.check()
            except Broken as broken:
                self.fail(str(broken), number, possible)
                return
            if target is None:
                target = self.numbers[frozen] = len(self.states)
                self.states.append(frozen)
                self.parents.append(number)
                self.levels.append(self.levels[number] + 1)
                if target >= self.limit:
                    raise MemoryError(f"more than {self.limit} states: the model is not small enough")
            self.sources.append(number)
            self.targets.append(target)

    def find_dead_ends(self) -> None:
        """The first state from which no way leads to an end, if there is one."""
        before: list[list[int]] = [[] for _ in self.states]
        for origin, target in zip(self.sources, self.targets, strict=True):
            before[target].append(origin)
        good = bytearray(len(self.states))
        todo = list(self.ends)
        for number in todo:
            good[number] = 1
        while todo:
            for origin in before[todo.pop()]:
                if not good[origin]:
                    good[origin] = 1
                    todo.append(origin)
        number = good.find(0)
        if number >= 0:
            stuck = not self.thaw(self.states[number]).steps()
            self.fail("nothing can happen any more" if stuck else "no way leads to the end from here", number)

    # ---- traces ----------------------------------------------------------------------------------------

    def fail(self, what: str, number: int, last: Step | None = None) -> None:
        """Note what is wrong and the way to it."""
        path = [number]
        while path[-1]:
            path.append(self.parents[path[-1]])
        path.reverse()
        self.report.broken = what
        self.report.trace, self.report.steps = self.tell(path, last)

    def tell(self, path: list[int], last: Step | None) -> tuple[list[str], int]:
        """The way in words.

        States were stored under other names (worker 1 as worker 0), so the way is walked once more with the
        names as they are: of the steps that are possible, the one that leads to the next state of the path.
        """
        world = self.thaw()
        lines: list[str] = []
        for number in path[1:]:
            for possible in world.steps():
                after = self.thaw(world.raw())
                possible.method(after, *possible.args)
                if self.thaw(after.raw()).freeze() == self.states[number]:
                    break
            else:
                raise AssertionError("a state of the path cannot be reached again")
            lines += told(world, possible, after)
            world = after
        if last is not None:
            lines += self.tell_last(world, last)
        return lines, len(path) - 1 + (last is not None)

    def tell_last(self, world: World, last: Step) -> list[str]:
        """The step that is wrong, found by what it does."""
        for possible in world.steps():
            if possible.method is last.method:
                after = self.thaw(world.raw())
                try:
                    possible.method(after, *possible.args)
                    after.check()
                except Broken as broken:
                    self.report.broken = str(broken)  # with the names of this trace
                    return told(world, possible, after)
        raise AssertionError("the last step cannot be found again")


def told(before: World, taken: Step, after: World) -> list[str]:
    """A step, and the words that it has changed."""
    words = str(getattr(taken.method, "words", taken.method.__name__))
    where = source(taken.method)
    lines = [words.format(*taken.args) + (f"  [{where}]" if where else "")]
    old, new = before.shown(), after.shown()
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            lines.append(f"    {key}: {old.get(key, '-')} -> {new.get(key, '-')}")
    return lines


def explore(thaw: Callable[..., World] | partial[Any], limit: int = 5_000_000) -> Report:
    """Visit every state that can be reached. Raises: MemoryError when there are more than `limit`."""
    return Explorer(thaw, limit).run()
