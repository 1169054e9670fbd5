"""One line of the table: a primitive, the ways through it, and what has to be covered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tools.stepkill.engine import Scenario
from tools.stepkill.shipped import Shipped, package


class Unreached(NamedTuple):
    """Instructions of a function that no scenario can reach."""

    function: str
    most: int  # instructions, an upper bound
    reason: str


class Code(NamedTuple):
    """What is to be stepped of a function."""

    name: str
    what: str  # "all of it", or "atomic operations"
    base: int  # where its object begins
    wanted: frozenset[int]  # instructions
    everything: frozenset[int]  # all of the function's


class Primitive(NamedTuple):
    """One line of the table."""

    name: str
    scenarios: tuple[Scenario, ...]
    whole: tuple[str, ...]  # module.function: all of its instructions are to be stepped
    atomic: tuple[str, ...] = ()  # module.function: its atomic operations are
    unreached: tuple[Unreached, ...] = ()
    objects: tuple[Shipped, ...] = ()  # whose text is stepped; none: the whole package

    def modules(self) -> tuple[Shipped, ...]:
        return self.objects or package()

    def code(self) -> Iterator[Code]:
        """All that is to be stepped."""
        objects = {shipped.name: shipped for shipped in self.modules()}
        for name in (*self.whole, *self.atomic):
            found, function = objects[name.partition(".")[0]], name.partition(".")[2]
            everything = found.code(found.find(function))
            if name in self.whole:
                yield Code(name, "all of it", found.base, everything, everything)
            else:
                yield Code(
                    name, "atomic operations", found.base, found.atomics(found.find(function)), everything
                )
