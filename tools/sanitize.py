#!/usr/bin/env python3
"""The sanitizers, on a copy of the package: the modules in place stay as they are.

    python tools/sanitize.py address undefined   the core of the test suite, under both
    python tools/sanitize.py thread              many threads at the shared primitives
    python tools/sanitize.py --self-test thread  whether it finds what is planted
    python tools/sanitize.py address -- -k pool  what follows goes to pytest

The copy is build/sanitize-NAME, built by its own tools/build.py; a second run builds what has changed.
Every process that a test starts reports into a file; a file that is not empty fails the run, whatever the
test said. Exit code 0: no report. 1: reports, or a failure. 77: it could not be run here, and the last line
says why.

**address** and **undefined** see one process at a time, each of them: host, zygotes, workers.
**thread** is blind across processes, so host and workers are threads there (tools/sanitize_driver.pyx); under
the GIL no race would show, so they do not hold it.

What is suppressed is in tools/sanitize.supp, with its reason.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
SUPPRESSIONS = ROOT / "tools" / "sanitize.supp"
NOT_RUN = 77
COPIED = ("runtime", "tests", "tools", "bench", "examples", "docs")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "CONTRIBUTING.md", "CHANGELOG.md")

# The tests under ASan and UBSan: what reads, writes and copies memory; what is read from other processes; and
# a runtime at work, with deaths. Left out: what measures, builds, or tests tools; and what goes the same ways
# once more, so that CI has the time for it.
CORE = ("arena", "region", "pool", "series", "reports", "serializer", "arrays", "garbage")
DESELECTED = {  # test: why it cannot hold here, or is not worth its time
    "tests/test_map.py::test_memory_of_an_endless_map_is_flat": "ASan keeps what was freed for a while",
    "tests/test_arrays.py::test_results_that_the_host_has_no_memory_for": "it limits the address space",
    # These count kills, and each one starts a process, slowly; fewer of the same ways are gone all the same.
    **dict.fromkeys(
        (
            "tests/test_pool.py::test_hundreds_of_kills_lose_no_block",
            "tests/test_reports.py::test_busy_never_goes_backwards_and_outlives_processes",
        ),
        "15 s each",
    ),
}

# A crash on purpose is no report: the tests judge it. Leaks are CPython's (and test_arena counts ours).
OPTIONS = {
    "address": "detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_abort=0:handle_sigfpe=0:handle_sigill=0:"
    "use_sigaltstack=0:allocator_may_return_null=1:max_allocation_size_mb=4096:exitcode=99",
    "undefined": "print_stacktrace=1",
    "thread": "halt_on_error=0:exitcode=99:second_deadlock_stack=1:report_bugs=1",
}
VARIABLES = {"address": "ASAN_OPTIONS", "undefined": "UBSAN_OPTIONS", "thread": "TSAN_OPTIONS"}
LIBRARIES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
PLANTED = {
    "address": ("overflow", "overflow-in-a-worker"),
    "undefined": ("shift", "shift-in-a-worker"),
    "thread": ("race", "relaxed"),
}
SCALE = 8  # of the scenes under ThreadSanitizer


def not_run(why: str) -> NoReturn:
    print(f"sanitize: NOT RUN: {why}")
    sys.exit(NOT_RUN)


def libraries(names: list[str]) -> list[str]:
    """The sanitizers' runtime libraries, and the C++ one, whose throw they have to find when they start."""
    cc = runpy.run_path(str(ROOT / "tools" / "build.py"))["compiler"]()
    if cc is None:
        not_run("there is no C compiler here")
    found = []
    for library in [*(LIBRARIES[name] for name in names), "libstdc++.so.6"]:
        path = subprocess.run([*cc, f"-print-file-name={library}"], capture_output=True, text=True).stdout
        real = os.path.realpath(path.strip())
        if os.path.isabs(path.strip()) and os.path.exists(real):
            found.append(real)
        elif library != "libstdc++.so.6":
            not_run(f"{cc[0]} has no {library} here (Debian and Ubuntu: it comes with gcc's libgcc-12-dev)")
    return found


def check_suppressions() -> None:
    """Each entry has its reason: a comment right above it."""
    above = ""
    for line in SUPPRESSIONS.read_text().splitlines():
        if line.strip() and not line.startswith("#") and not above.startswith("#"):
            sys.exit(f"sanitize: {SUPPRESSIONS.name}: {line!r} gives no reason")
        above = line if line.startswith("#") or not above.startswith("#") or not line.strip() else above


def copy_tree(folder: Path) -> None:
    """What is built and run. Files that have not changed keep their times, so that little is built."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", ".*")
    wanted = set()
    for name in COPIED:
        for source in (ROOT / name).rglob("*"):
            if source.is_file() and not skip(str(source.parent), [source.name]):
                wanted.add(source.relative_to(ROOT))
    wanted |= {Path(name) for name in FILES if (ROOT / name).exists()}
    for path in wanted:
        copy_file(ROOT / path, folder / path)
    copy_file(ROOT / "tools" / "sanitize_driver.pyx", folder / "runtime" / "_sanitize_driver.pyx")
    wanted.add(Path("runtime/_sanitize_driver.pyx"))
    for name in COPIED:
        for copy in (folder / name).rglob("*"):
            if (
                copy.is_file()
                and copy.suffix not in (".so", ".pyc")
                and copy.relative_to(folder) not in wanted
            ):
                copy.unlink()


def copy_file(source: Path, target: Path) -> None:
    info = source.stat()
    if target.exists():
        there = target.stat()
        if (there.st_mtime_ns, there.st_size) == (info.st_mtime_ns, info.st_size):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def environment(names: list[str], preload: list[str], reports: Path) -> dict[str, str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RUNTIME_", "PYTHONPATH"))}
    environ["LD_PRELOAD"] = " ".join(preload)
    environ["PYTHONMALLOC"] = "malloc"  # else the interpreter's arenas hide what lies between two objects
    environ["RUNTIME_SANITIZED"] = ",".join(names)  # for tests that must know
    for name in names:
        options = f"{OPTIONS[name]}:log_path={reports / name}"
        if re.search(rf"^{name}:", SUPPRESSIONS.read_text(), re.M):
            lines = re.findall(rf"^{name}:(.*)$", SUPPRESSIONS.read_text(), re.M)
            path = reports.parent / f"{name}.supp"
            path.write_text("".join(f"{line.strip()}\n" for line in lines))
            options += f":suppressions={path}"
        environ[VARIABLES[name]] = options
    return environ


def without_randomized_addresses() -> None:
    """gcc 12's TSan knows fewer layouts of memory than newer kernels draw. (personality, before exec)"""
    ctypes.CDLL(None).personality(0x0040000)


class Sanitized:
    """A built copy, and how to run something in it."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.folder = ROOT / "build" / f"sanitize-{'-'.join(names)}"
        self.reports = self.folder / "reports"
        preload = libraries(names)
        self.folder.mkdir(parents=True, exist_ok=True)
        copy_tree(self.folder)
        subprocess.run(
            [sys.executable, "tools/build.py"],
            cwd=self.folder,
            env={**os.environ, "RUNTIME_SANITIZE": ",".join(names)},
            check=True,
        )
        shutil.rmtree(self.reports, ignore_errors=True)
        self.reports.mkdir()
        self.environ = environment(names, preload, self.reports)
        self.environ["PYTHONPATH"] = os.pathsep.join([str(self.site(preload)), str(self.folder)])
        probe = self.run("-c", "import runtime; print(runtime.__file__)", capture=True)
        if probe.returncode:
            not_run(f"Python does not start with {names}: {(probe.stderr.strip() or '?').splitlines()[-1]}")
        if not probe.stdout.startswith(str(self.folder)):
            sys.exit(f"sanitize: not the copy is imported, but {probe.stdout.strip()}")

    def site(self, preload: list[str]) -> Path:
        """A folder with what each Python does first: beside ASan, gcc's UBSan does not heed its log_path."""
        folder = self.folder / "site"
        folder.mkdir(exist_ok=True)
        library = next((path for path in preload if "libubsan" in path), None)
        lines = ["import ctypes", f"report = {os.fsencode(self.reports / 'undefined')!r}"]
        if library is not None:
            lines.append(f"ctypes.CDLL({library!r}).__sanitizer_set_report_path(report)")
        (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
        return folder

    def run(self, *argv: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *argv],
            cwd=self.folder,
            env=self.environ,
            text=True,
            capture_output=capture,
            preexec_fn=without_randomized_addresses if "thread" in self.names else None,
        )

    def found(self) -> list[str]:
        """The reports so far, the same ones once."""
        texts: dict[str, str] = {}
        for path in sorted(self.reports.iterdir()):
            text = path.read_text(errors="replace")
            summary = "\n".join(sorted(set(re.findall(r"^SUMMARY: .*|runtime error: .*", text, re.M))))
            if text.strip():
                texts.setdefault(re.sub(r"0x[0-9a-f]+|\d{3,}", "", summary) or text[:500], text)
        return list(texts.values())

    def core(self, extra: list[str]) -> int:
        """The chosen tests, with more patience than they ask for."""
        tests = [f"tests/test_{name}.py" for name in CORE]
        argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
        argv += ["--watchdog", "600", "-m", "not promise and not stress"]
        argv += [f"--deselect={test}" for test in DESELECTED]
        return self.run(*argv, *[test for test in tests if (self.folder / test).exists()], *extra).returncode

    def scenes(self) -> int:
        """A scene that hangs ends by its own watchdog, with all stacks."""
        return self.run("tools/sanitize_threads.py", str(SCALE)).returncode

    def plants(self) -> int:
        """Each thing that is planted has to be reported."""
        missed = 0
        for name in self.names:
            for plant in PLANTED[name]:
                shutil.rmtree(self.reports)
                self.reports.mkdir()
                done = self.run("tools/sanitize_threads.py", "--plant", plant, capture=True)
                seen = len(self.found()) > 0
                if not seen:
                    print(done.stderr)
                missed += not seen
                print(f"sanitize: {name}: planted {plant}: {'reported' if seen else 'NOT REPORTED'}")
        return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=tuple(OPTIONS), metavar="address|undefined|thread")
    parser.add_argument("--self-test", action="store_true", help="whether what is planted is reported")
    own, _, extra = " ".join(sys.argv[1:]).partition(" -- ")
    options = parser.parse_args(own.split())
    if "thread" in options.names and len(options.names) > 1:
        parser.error("thread goes with no other one; run one after the other")
    check_suppressions()
    begin = time.monotonic()
    made = Sanitized(sorted(set(options.names)))
    built = time.monotonic()
    if options.self_test:
        return made.plants()
    code = made.scenes() if "thread" in options.names else made.core(extra.split())
    found = made.found()
    for text in found:
        print(text[:6000])
    print(
        f"sanitize: {', '.join(made.names)}: {len(found)} reports, exit code {code}; built in "
        f"{built - begin:.0f} s, ran for {time.monotonic() - built:.0f} s"
    )
    return 1 if code or found else 0


if __name__ == "__main__":
    sys.exit(main())
