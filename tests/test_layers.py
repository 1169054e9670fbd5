"""The floors of the package: `import`, `cimport` and `#include` run only downward.

The lines are read, not run: an import inside a function or under TYPE_CHECKING is an edge like any
other. The checker itself is checked on small trees that break one rule each.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "runtime"

# Lowest first. What shares a floor may import each other in one direction; a new file needs a line here.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("include",),  # C headers
    ("_atomics",),
    ("_layout",),
    ("errors", "limits", "listening", "locks", "machine", "names", "retries", "terminal"),
    ("config", "memory", "oom", "progress"),
    ("_identity", "segment"),
    ("_region", "_slab"),
    ("_frame", "_plain", "_future", "_stream", "kernel"),
    ("_extent",),
    ("_arena",),
    ("_growth",),
    ("_views",),
    ("_kernel", "_builtin"),
    ("_pool", "_lease", "_series", "_report", "_shaped", "_stdio", "_stacks", "_bell"),
    ("_maplayout",),
    ("_units", "_mapwatch"),
    ("_map",),
    ("_maplock",),
    ("_mapsweep",),
    ("_mapaccess",),
    ("_statelock",),
    ("_state", "_threads", "_runner", "_records"),
    ("_watch",),
    ("_leasing",),
    ("_harvest",),
    ("_slots",),
    ("_waiting",),
    ("_rescue",),
    ("_dispatch",),
    ("_submit",),
    ("_core",),  # the compiled door
    ("wire", "lookup", "arrays", "payload", "state"),
    ("linking", "guards"),
    ("versions",),
    ("reducers",),
    ("byvalue",),
    ("functions",),
    ("serializer",),  # the door to these nine
    ("refs",),
    ("store",),
    ("sockets", "children", "forking", "inherit", "bytecode", "heirs", "logrecords", "channels", "filters"),
    ("forwarding", "stacks", "handle"),
    ("contexts",),
    ("kernels",),
    ("calls",),
    ("loop",),  # of a worker with one thread
    ("lanes",),  # and with several
    ("service",),  # and of one that runs a service
    ("worker",),
    ("zygote",),  # forks, and then calls worker.main
    ("outcomes",),
    ("collector", "mapping"),
    ("restarts",),
    ("lifecycle", "asynchronous", "future"),
    ("relay", "control"),
    ("lives",),
    ("zygotes",),
    ("reloads",),
    ("supervisor",),
    ("figures", "front", "pressure", "jobs"),
    ("native", "observable", "reloadable"),
    ("executor",),
    ("metrics",),
    ("cli",),
    ("__init__",),
    ("__main__",),
)
DOOR = "_core"
ZMQ = "sockets"
FORK = ("zygote", "cli.init")  # workers; the command under PID 1

CYTHON = (".pyx", ".pxd", ".pxi")
PYTHON = (".py", ".pyi")
HEADERS = (".h",)


@dataclass
class Module:
    """All files of one name: _region.pyx, _region.pxd, _region.pyi; a header stands for itself."""

    name: str  # "_region", "cli.run", "include.atomics"
    files: list[Path] = field(default_factory=list)
    compiled: bool = False
    edges: dict[str, str] = field(default_factory=dict)  # inside the package: name -> "file:line"
    outside: dict[str, str] = field(default_factory=dict)  # other packages: top name -> "file:line"
    forks: list[str] = field(default_factory=list)  # "file:line"

    @property
    def is_python(self) -> bool:
        return any(path.suffix == ".py" for path in self.files)

    @property
    def floor(self) -> str:
        """Its name in FLOORS: that of the folder for what lies in one."""
        return self.name.partition(".")[0]


# ---- reading -------------------------------------------------------------------------------------


def read_package(root: Path) -> dict[str, Module]:
    """Every module of the package below `root`, with its edges."""
    modules: dict[str, Module] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix in (*CYTHON, *PYTHON, *HEADERS):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
            module = modules.setdefault(name, Module(name))
            module.files.append(path)
            module.compiled |= path.suffix in CYTHON
    for module in modules.values():
        for path in module.files:
            Reader(root, modules, module, path).read()
    return modules


class Reader:
    """Reads the import lines of one file into the edges of its module."""

    def __init__(self, root: Path, modules: dict[str, Module], module: Module, path: Path) -> None:
        self.root, self.modules, self.module, self.path = root, modules, module, path
        self.package = root.name
        # The dotted name of the folder that a relative import starts from.
        self.folder = (root.name, *path.relative_to(root).parts[:-1])

    def read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix in PYTHON:
            self.read_python(text)
        else:
            self.read_cython(text)

    def read_python(self, text: str) -> None:
        tree = ast.parse(text, str(self.path))
        names = {"os": "os", "posix": "posix", "pty": "pty"}  # local name -> module that can fork
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.add_import(alias.name, node.lineno)
                    if alias.name in ("os", "posix", "pty"):
                        names[alias.asname or alias.name] = alias.name
            elif isinstance(node, ast.ImportFrom):
                bound = [alias.name for alias in node.names]
                self.add_from("." * node.level + (node.module or ""), bound, node.lineno)
                if node.module in ("os", "posix", "pty") and {"fork", "forkpty"} & set(bound):
                    self.module.forks.append(self.where(node.lineno))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("fork", "forkpty")
                and isinstance(node.value, ast.Name)
                and node.value.id in names
            ):
                self.module.forks.append(self.where(node.lineno))

    def read_cython(self, text: str) -> None:
        for match in re.finditer(r'^[ \t]*#include[ \t]*"([^"]+)"', text, re.M):
            self.add_header(match[1], text.count("\n", 0, match.start()) + 1)
        if self.path.suffix in HEADERS:
            text = re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.S)
            self.find_forks(text)
            return
        # Strings and comments go, but for the short strings, which name headers and included files.
        text = re.sub(r'"""(?:\\.|[^\\])*?"""|' + r"'''(?:\\.|[^\\])*?'''", blank, text)
        text = re.sub(r"#[^\n]*", "", text)
        self.find_forks(re.sub(r'"[^"\n]*"|' + r"'[^'\n]*'", '""', text))
        statement = re.compile(
            r"^[ \t]*(?:from[ \t]+(?P<source>[\w.]+)[ \t]+)?(?P<kind>c?import)[ \t]+"
            r"(?P<names>\([^)]*\)|(?:[^\n;\\]|\\\n)+)",
            re.M,
        )
        for match in statement.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            listed = match["names"].strip("()").replace("\\\n", " ").split(",")
            names = [words[0] for words in map(str.split, listed) if words]
            if match["source"]:
                self.add_from(match["source"], names, line)
            else:
                for name in names:
                    self.add_import(name, line)
        for match in re.finditer(
            r"""^[ \t]*(?:cdef[ \t]+extern[ \t]+from|include)[ \t]+["']([^"'<]+)["']""", text, re.M
        ):
            self.add_header(match[1], text.count("\n", 0, match.start()) + 1)

    def find_forks(self, text: str) -> None:
        for match in re.finditer(r"\b(?:v?fork|forkpty)[ \t]*\(|\bc?import\b[^\n]*\bv?fork\b", text):
            self.module.forks.append(self.where(text.count("\n", 0, match.start()) + 1))

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(self.root.parent)}:{line}"

    def absolute(self, name: str) -> list[str]:
        """The parts of a module's full name; leading dots are relative to this file's folder."""
        level = len(name) - len(name.lstrip("."))
        parts = [part for part in name[level:].split(".") if part]
        return [*self.folder[: len(self.folder) - level + 1], *parts] if level else parts

    def add_import(self, name: str, line: int) -> None:
        parts = self.absolute(name)
        if parts[0] == self.package:
            self.add_edge(parts[1:], line)
        else:
            self.module.outside.setdefault(parts[0], self.where(line))

    def add_from(self, source: str, names: list[str], line: int) -> None:
        parts = self.absolute(source)
        if parts[0] != self.package:
            self.add_import(".".join(parts), line)
            return
        for name in names:  # a name of the module, or a module of the package
            submodule = [*parts[1:], name]
            self.add_edge(submodule if ".".join(submodule) in self.modules else parts[1:], line)

    def add_header(self, name: str, line: int) -> None:
        """Quoted: relative to the package or to the file. (System headers stand in angle brackets.)"""
        for base in (self.root, self.path.parent):
            found = (base / name).resolve()
            if found.is_file() and found.is_relative_to(self.root.resolve()):
                self.add_edge(list(found.relative_to(self.root.resolve()).with_suffix("").parts), line)
                return

    def add_edge(self, parts: list[str], line: int) -> None:
        while parts and ".".join(parts) not in self.modules:
            parts = parts[:-1]  # a name that is no module belongs to the module that has it
        target = ".".join(parts) or "__init__"
        if target != self.module.name:
            self.module.edges.setdefault(target, self.where(line))


def blank(match: re.Match[str]) -> str:
    """Nothing, on as many lines: what follows keeps its line number."""
    return "\n" * match[0].count("\n")


# ---- judging -------------------------------------------------------------------------------------


def violations(root: Path, floors: tuple[tuple[str, ...], ...] = FLOORS) -> list[str]:
    """Every broken rule, in words; empty if the house stands."""
    modules = read_package(root)
    height = {name: number for number, names in enumerate(floors) for name in names}
    found = []
    downward: dict[str, list[str]] = {}  # an edge that is named as upward is not named again as a circle
    for module in modules.values():
        downward[module.name] = []
        if module.floor not in height:
            found.append(f"{module.name} has no floor: give it one in FLOORS of tests/test_layers.py")
            continue
        for target, where in module.edges.items():
            floor = modules[target].floor if target in modules else target
            if height.get(floor, -1) > height[module.floor]:
                found.append(f"{where}: {module.name} imports {target}, which is above it")
            else:
                downward[module.name].append(target)
            if target in modules and modules[target].compiled and module.is_python and target != DOOR:
                found.append(
                    f"{where}: {module.name} imports {target}; Python imports compiled code from {DOOR}"
                )
        if "zmq" in module.outside and module.name != ZMQ:
            found.append(f"{module.outside['zmq']}: {module.name} imports zmq; only {ZMQ} may")
        if module.name not in FORK:
            found += [f"{where}: {module.name} forks; only zygote may" for where in module.forks]
    circle = find_circle(downward)
    if circle:
        found.append(f"a circle: {' -> '.join(circle)}")
    return found


def find_circle(graph: dict[str, list[str]]) -> list[str]:
    """A path that comes back to where it began, or []."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> Iterator[list[str]]:
        if node in path:
            yield [*path[path.index(node) :], node]
        elif node not in done:
            for target in graph.get(node, ()):
                yield from walk(target, [*path, node])
            done.add(node)

    circle = next((circle for start in graph for circle in walk(start, [])), [])[:-1]
    first = circle.index(min(circle)) if circle else 0
    return [*circle[first:], *circle[: first + 1]]


# ---- the package ---------------------------------------------------------------------------------


def test_package_keeps_its_floors() -> None:
    assert violations(PACKAGE) == []


def test_package_is_read() -> None:
    """Guards the reader: a pattern that matches nothing would let everything pass."""
    modules = read_package(PACKAGE)
    assert "include.atomics" in modules["_atomics"].edges
    assert "_atomics" in modules["_layout"].edges
    assert {"_atomics", "_layout", "_region"} <= modules["_arena"].edges.keys()
    assert modules["_region"].compiled and not modules["errors"].compiled


def test_serializer_is_the_door_to_its_files() -> None:
    family = {
        "arrays",
        "payload",
        "lookup",
        "linking",
        "guards",
        "versions",
        "reducers",
        "byvalue",
        "functions",
    }
    modules = read_package(PACKAGE)
    inside = {*family, "serializer"}
    assert family <= modules.keys()
    assert [name for name in modules if name not in inside and family & modules[name].edges.keys()] == []


# ---- the checker ---------------------------------------------------------------------------------

SOUND = {
    "include/atomics.h": "#include <stdint.h>\n/* fork() is called in zygote.py */\n",
    "_atomics.pxd": 'cdef extern from "include/atomics.h" nogil:\n    pass\n',
    "errors.py": "class Broken(Exception): ...\n",
    "_region.pxd": "from runtime._atomics cimport *\n",
    "_region.pyx": '"""Says:\n\nfrom runtime.executor import Runtime\n"""\n'
    "from libc.stdint cimport (\n    int64_t,\n)\n"
    "from runtime.errors import Broken  # from runtime import worker\nimport os\n\n"
    'os.register_at_fork(before=None)\nx = "fork()"\n',
    "_core.pyx": "from runtime._region import SharedRegion\n",
    "_core.pyi": "from runtime.errors import Broken\n",
    "wire.py": "import struct\nfrom . import errors\n",
    "sockets.py": "import zmq\nfrom runtime import wire\n",
    "worker.py": "from runtime.sockets import connect\nfrom runtime._core import SharedRegion\n",
    "zygote.py": "import os\n\ndef spawn():\n    from runtime import worker\n    return os.fork()\n",
    "supervisor.py": "from .zygote import spawn\n\ndef start(zygote):\n    return zygote.fork()\n",
    "executor.py": "import runtime.supervisor as s\n",
    "cli/__init__.py": "from runtime.cli import run\n",
    "cli/run.py": "from ..executor import Runtime\n",
    "__init__.py": "from runtime.executor import Runtime\n",
}


def build(folder: Path, **changes: str) -> Path:
    """A small sound package, with some files replaced ("cli__run_py" is cli/run.py) or added."""
    root = folder / "runtime"
    renamed = {re.sub(r"_(py|pyx|pxd|h)$", r".\1", k).replace("__", "/"): v for k, v in changes.items()}
    for name, text in {**SOUND, **renamed}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_sound_tree_passes(tmp_path: Path) -> None:
    root = build(tmp_path)
    assert violations(root) == []
    modules = read_package(root)
    assert modules["_region"].edges.keys() == {"_atomics", "errors"}
    assert modules["zygote"].edges.keys() == {"worker"}
    assert modules["cli.run"].edges.keys() == {"executor"}
    assert modules["sockets"].outside.keys() == {"zmq"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"wire_py": "def f():\n    from runtime.executor import Runtime\n"},
            "runtime/wire.py:2: wire imports executor, which is above it",
            id="upward, inside a function",
        ),
        pytest.param(
            {"errors_py": "import runtime\n"},
            "runtime/errors.py:1: errors imports __init__, which is above it",
            id="upward, to the package itself",
        ),
        pytest.param(
            {"_atomics_pxd": '"""doc\n\n"""\nfrom runtime cimport (\n    _region,\n)\n'},
            "runtime/_atomics.pxd:4: _atomics imports _region, which is above it",
            id="upward, cimport over several lines",
        ),
        pytest.param(
            {"_region_pyx": "cimport runtime._core as c\n"},
            "runtime/_region.pyx:1: _region imports _core, which is above it",
            id="upward, plain cimport",
        ),
        pytest.param(
            {"_region_pxd": "from ._core cimport x\n"},
            "runtime/_region.pxd:1: _region imports _core, which is above it",
            id="upward, relative cimport",
        ),
        pytest.param(
            {"include__atomics_h": '#include "../_region.h"\n', "_region_h": "\n"},
            "runtime/include/atomics.h:1: include.atomics imports _region, which is above it",
            id="upward, include",
        ),
        pytest.param(
            {"wire_py": "import runtime.payload\n", "payload_py": "from .wire import encode\n"},
            "a circle: payload -> wire -> payload",
            id="circle on one floor",
        ),
        pytest.param(
            {"cli__run_py": "from runtime import cli\n"},
            "a circle: cli -> cli.run -> cli",
            id="circle in a folder",
        ),
        pytest.param(
            {"worker_py": "import zmq.asyncio\n"},
            "runtime/worker.py:1: worker imports zmq; only sockets may",
            id="stray zmq",
        ),
        pytest.param(
            {"_region_pyx": "from zmq import Context\n"},
            "runtime/_region.pyx:1: _region imports zmq; only sockets may",
            id="stray zmq, compiled",
        ),
        pytest.param(
            {"worker_py": "import os as _os\n\n_os.fork()\n"},
            "runtime/worker.py:3: worker forks; only zygote may",
            id="stray fork",
        ),
        pytest.param(
            {"worker_py": "from os import fork\n"},
            "runtime/worker.py:1: worker forks; only zygote may",
            id="stray fork, by name",
        ),
        pytest.param(
            {"_region_pyx": "from posix.unistd cimport close, fork\n"},
            "runtime/_region.pyx:1: _region forks; only zygote may",
            id="stray fork, compiled",
        ),
        pytest.param(
            {"include__atomics_h": "static int f(void) { return fork(); }\n"},
            "runtime/include/atomics.h:1: include.atomics forks; only zygote may",
            id="stray fork, in C",
        ),
        pytest.param(
            {"worker_py": "from runtime._region import SharedRegion\n"},
            "runtime/worker.py:1: worker imports _region; Python imports compiled code from _core",
            id="past the door",
        ),
        pytest.param(
            {"helpers_py": "\n"},
            "helpers has no floor: give it one in FLOORS of tests/test_layers.py",
            id="no floor",
        ),
    ],
)
def test_broken_tree_is_named(tmp_path: Path, changes: dict[str, str], expected: str) -> None:
    assert violations(build(tmp_path, **changes)) == [expected]
