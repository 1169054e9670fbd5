"""Turns runtime/*.pyx into extension modules; everything static is in pyproject.toml.

Declarative ext-modules would miss an edit of a header, so the extensions are made here, and
only when something is really built: asking for metadata or an sdist compiles nothing.

Environment switches (each gives another variant; tools/build.py keeps the variants apart):

    RUNTIME_DEBUG=1         -O1 -g -DRUNTIME_DEBUG: our own assertions and counters
    RUNTIME_SANITIZE=LIST   address, undefined, thread, or "address,undefined"
    RUNTIME_LINETRACE=1     line tracing, for coverage of the .pyx files
    RUNTIME_NO_EXTENSIONS=1 none at all: an editable install that leaves building to tools/build.py
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "runtime"
SANITIZERS = ("address", "undefined", "thread")

DIRECTIVES: dict[str, Any] = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "binding": True,
    "embedsignature": True,
    "embedsignature.format": "python",
}


def switch(name: str) -> bool:
    """True if the environment variable is set to something that does not mean "no"."""
    return os.environ.get(name, "").lower() not in ("", "0", "no", "off", "false")


def sanitizers() -> list[str]:
    names = os.environ.get("RUNTIME_SANITIZE", "").replace(",", " ").split()
    for name in names:
        if name not in SANITIZERS:
            sys.exit(f"RUNTIME_SANITIZE: {name!r} is none of {', '.join(SANITIZERS)}")
    if "thread" in names and "address" in names:
        sys.exit("RUNTIME_SANITIZE: address and thread exclude each other; build one after the other")
    return names


def flags() -> tuple[list[str], list[str], list[tuple[str, str | None]]]:
    """(compiler arguments, linker arguments, macros) of the variant asked for."""
    compile_args = ["-std=c11", "-Wall", "-Wno-unused-function"]
    link_args: list[str] = []
    macros: list[tuple[str, str | None]] = []
    if switch("RUNTIME_DEBUG") or sanitizers():
        compile_args += ["-O1", "-g", "-fno-omit-frame-pointer"]
    else:
        # Never -march=native: a wheel runs on other machines, too. Line numbers are all that perf, callgrind
        # and backtraces need; what -g of CPython's own flags adds is large, and slow to make.
        compile_args += ["-O2", "-g1"]
    if switch("RUNTIME_DEBUG"):
        macros.append(("RUNTIME_DEBUG", "1"))  # our own: CPython's flags hold -DNDEBUG
    for name in sanitizers():
        compile_args.append(f"-fsanitize={name}")
        link_args.append(f"-fsanitize={name}")
    if "thread" in sanitizers():
        compile_args.append("-Wno-tsan")  # fences: see include/atomics.h
    if switch("RUNTIME_LINETRACE"):
        macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")]
    return compile_args, link_args, macros


def extensions() -> list[Extension]:
    """One extension for each .pyx, found by looking: a new file needs no edit here."""
    if switch("RUNTIME_NO_EXTENSIONS"):
        return []
    compile_args, link_args, macros = flags()
    optimise = "-O2" in compile_args  # loops over data: older compilers vectorise at -O3 alone
    return [
        Extension(
            ".".join(source.with_suffix("").parts),
            [str(source)],
            include_dirs=[PACKAGE],
            define_macros=macros,
            extra_compile_args=compile_args + (["-O3"] if optimise and source.stem == "_builtin" else []),
            extra_link_args=link_args,
        )
        for source in sorted(Path(PACKAGE).rglob("*.pyx"))
    ]


def jobs() -> int:
    return len(os.sched_getaffinity(0))


class BuildExtensions(build_ext):
    """build_ext that runs Cython first, outside the source tree, and knows the headers."""

    parallel: int | None

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = jobs()

    def run(self) -> None:
        if self.extensions and not sys.platform.startswith("linux"):
            sys.exit(f"runtime needs Linux (memfd, futex, pidfd); this is {sys.platform}")
        # What is made here carries the time at which the build began, so that a source edited while
        # the build reads it is newer than the result, and the next build sees that. (10 ms: the
        # kernel stamps files with a coarse clock.)
        began = time.time() - 0.01
        if self.extensions:
            self.cythonize()
        backdate((source for extension in self.extensions for source in extension.sources), began)
        super().run()
        backdate((self.get_ext_fullpath(extension.name) for extension in self.extensions), began)

    def cythonize(self) -> None:
        """Generate the C below build_temp: two interpreters or variants never write the same file."""
        from Cython.Build import cythonize

        folder = os.path.join(self.build_temp, "cython")
        generated = cythonize(
            self.extensions,
            build_dir=folder,
            nthreads=self.parallel,
            compiler_directives={**DIRECTIVES, "linetrace": switch("RUNTIME_LINETRACE")},
            force=bool(self.force),
        )
        for copy in Path(folder).rglob("*.h"):  # by Cython; compiling against copies would hide an edit
            copy.unlink()
        headers = sorted(map(str, Path(PACKAGE).rglob("*.h")))
        for extension, made in zip(self.extensions, generated, strict=True):
            vars(extension).update(vars(made), depends=[*headers, "setup.py"])


def backdate(paths: Iterable[str], began: float) -> None:
    for path in paths:
        if os.path.exists(path) and os.path.getmtime(path) > began:
            os.utime(path, (began, began))


if __name__ == "__main__":  # the guard matters: Cython's process pool may import this file again
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions})
