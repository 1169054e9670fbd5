"""Shared objects as they are mapped into this process: their text, functions and instructions.

Read with `nm` and `objdump` (binutils, which a C compiler brings along). An instruction is an address; what
does nothing (padding between blocks) is left out.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ATOMICS = "atomics.h"
ROW = re.compile(r"^(\S+)\s+(\d+|-)\s+(0x)?([0-9a-f]+)\b")
CODE = re.compile(r"^\s*([0-9a-f]+):\t(\S.*)$")
IDLE = re.compile(r"^(cs |data16 |rep )*(nop|xchg +%ax,%ax)|^(cs |data16 )+$")


class Unreadable(Exception):
    """An object has no symbols, or no line table, or binutils are missing."""


class Function(NamedTuple):
    """A symbol of an object: addresses low .. high - 1."""

    name: str
    low: int
    high: int


def tool(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unreadable(f"{argv[0]} is missing: install binutils") from None
    if done.returncode:
        raise Unreadable(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


class Shipped:
    """One mapped shared object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base, self.text = _mapping(path)
        self.functions: dict[str, Function] = {}
        for line in tool("nm", "-S", "--defined-only", str(path)).splitlines():
            parts = line.split()
            if len(parts) == 4 and parts[2] in "tT":
                low = self.base + int(parts[0], 16)
                self.functions[parts[3]] = Function(parts[3], low, low + int(parts[1], 16))
        if not self.functions:
            raise Unreadable(f"{path} has no symbols: build it with tools/build.py, do not strip it")

    @property
    def name(self) -> str:
        """_slab, of _slab.cpython-311-x86_64-linux-gnu.so."""
        return self.path.name.partition(".")[0]

    @staticmethod
    def bytes_at(address: int) -> bytes:
        """The longest instruction at an address of any object, as this process has it."""
        return ctypes.string_at(address, 15)

    def entries(self) -> list[int]:
        """Where its functions begin."""
        return [function.low for function in self.functions.values()]

    def has(self, suffix: str) -> Function | None:
        """As `find`; None: there is none."""
        try:
            return self.find(suffix)
        except Unreadable:
            return None

    def find(self, suffix: str) -> Function:
        """A function by its name, a method as Class.name; Cython adds to the front of it, gcc to the end."""
        if suffix in self.functions:
            return self.functions[suffix]
        name = r"_\d*".join(map(re.escape, suffix.split(".")))
        pattern = re.compile(rf"[^a-zA-Z]{name}(\.(isra|constprop|part)\.\d+)*$")
        found = [f for name, f in self.functions.items() if pattern.search(name)]
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise Unreadable(f"{self.path.name} should have one function {suffix}, has {names}")
        return found[0]

    @functools.cached_property
    def instructions(self) -> dict[int, str]:
        """address -> text, of all that does something."""
        found = {}
        for line in tool("objdump", "-d", "--no-show-raw-insn", str(self.path)).splitlines():
            match = CODE.match(line)
            if match and not IDLE.match(match[2]):
                found[self.base + int(match[1], 16)] = match[2]
        return found

    def code(self, function: Function) -> frozenset[int]:
        """The instructions of a function."""
        return frozenset(a for a in range(function.low, function.high) if a in self.instructions)

    @functools.cached_property
    def _atomic_ranges(self) -> list[tuple[int, int]]:
        """Addresses that the line table ascribes to the atomic operations of atomics.h."""
        lines = (Path(__file__).parents[2] / "runtime" / "include" / ATOMICS).read_text().splitlines()
        atomic = {str(number) for number, line in enumerate(lines, 1) if "atomic_" in line}
        ranges: list[tuple[int, int]] = []
        start = -1
        for line in tool("objdump", "--dwarf=decodedline", str(self.path)).splitlines():
            match = ROW.match(line)
            if match is None:
                continue
            address = self.base + int(match[4], 16)
            if 0 <= start < address:
                ranges.append((start, address))
            start = address if match[1] == ATOMICS and match[2] in atomic else -1
        if not ranges:
            raise Unreadable(f"{self.path} has no line table: build it with CFLAGS=-g")
        return ranges

    def atomics(self, function: Function) -> frozenset[int]:
        """The instructions of a function that come from include/atomics.h."""
        code = self.code(function)
        return frozenset(
            a
            for low, high in self._atomic_ranges
            if function.low <= low < function.high
            for a in range(low, high)
            if a in code
        )


def _mapping(path: Path) -> tuple[int, list[tuple[int, int]]]:
    """(where an object begins, its executable ranges), from /proc/self/maps."""
    base = -1
    text: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != str(path):
            continue
        low, high = (int(x, 16) for x in fields[0].split("-"))
        if base < 0:
            base = low - int(fields[2], 16)
        if "x" in fields[1]:
            text.append((low, high))
    if base < 0:
        raise Unreadable(f"{path} is not loaded")
    return base, text


@functools.cache
def module(name: str) -> Shipped:
    """A compiled module of the package."""
    return Shipped(Path(importlib.import_module(f"runtime.{name}").__file__ or "").resolve())


def native(name: str, function: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of a compiled module, as nogil code calls it; also one that only the module itself calls."""
    made: Callable[..., Any] = ctypes.CFUNCTYPE(result, *arguments)(module(name).find(function).low)
    return made


def method(name: str, function: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A cdef method of a compiled module, to be called with its object."""
    made = ctypes.PYFUNCTYPE(result, ctypes.py_object, *arguments)
    called: Callable[..., Any] = made(module(name).find(function).low)
    return called


@functools.cache
def package() -> tuple[Shipped, ...]:
    """All of them that are loaded."""
    loaded = [name for name in sys.modules if name.startswith("runtime._")]
    files = [str(sys.modules[name].__file__) for name in loaded]
    return tuple(module(n.partition(".")[2]) for n, f in zip(loaded, files, strict=True) if f.endswith(".so"))
