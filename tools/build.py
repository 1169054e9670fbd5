#!/usr/bin/env python3
"""The edit loop: build runtime/*.pyx in place, in parallel, and only what changed.

    python tools/build.py            seconds after one edit, a blink after none
    python tools/build.py --force    everything again
    python tools/build.py --check    only say whether a C compiler and Python.h are here

Each interpreter and each variant (RUNTIME_DEBUG, RUNTIME_SANITIZE, RUNTIME_LINETRACE; see
setup.py) has its own folder below build/, so switching between them compiles nothing twice. What
is newer there is then moved over runtime/*.so by rename: a process that has the old module
mapped keeps it, and one that imports at that moment sees the old file or the new one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "runtime"
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
SWITCHES = ("RUNTIME_DEBUG", "RUNTIME_SANITIZE", "RUNTIME_LINETRACE")
PROBE = """
#include <Python.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/syscall.h>
int main(void) { return 0; }
"""


def compiler() -> list[str] | None:
    """The command that setuptools will call, or the first other C compiler there is."""
    configured = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    for command in (configured, "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def toolchain_problem() -> str | None:
    """One sentence that says what is missing to compile an extension module, or None."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not sys.platform.startswith("linux"):
        return f"runtime needs Linux (memfd, futex, pidfd), and this is {sys.platform}."
    cc = compiler()
    if cc is None:
        return (
            "There is no C compiler (cc) here: install one, with `apt install gcc libc6-dev` on Debian"
            " and Ubuntu or `dnf install gcc` on Fedora and RHEL."
        )
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        return (
            f"Python.h of {sys.executable} is missing (looked in {include}): install it, with"
            f" `apt install python{version}-dev` on Debian and Ubuntu or"
            f" `dnf install python{version}-devel` (python3-devel for the system's own) on Fedora and RHEL."
        )
    paths = dict.fromkeys((include, sysconfig.get_path("platinclude")))
    argv = [*cc, "-std=c11", *(f"-I{path}" for path in paths), "-fsyntax-only", "-xc", "-"]
    probe = subprocess.run(argv, input=PROBE, text=True, capture_output=True)
    if probe.returncode:
        reason = next((x for x in probe.stderr.splitlines() if "error" in x), probe.stderr.strip())
        return (
            f"{cc[0]} cannot compile a C11 file that includes Python.h ({reason.strip()}): install the"
            " C library's headers, with `apt install libc6-dev linux-libc-dev` on Debian and Ubuntu or"
            " `dnf install glibc-devel kernel-headers` on Fedora and RHEL."
        )
    return None


def variant() -> str:
    """A folder name for this interpreter and these switches: "cpython-311-x86_64-linux-gnu-debug"."""
    parts = [SUFFIX.strip(".").removesuffix(".so")]
    for name in SWITCHES:
        value = os.environ.get(name, "").lower()
        if value not in ("", "0", "no", "off", "false"):
            kind = name.removeprefix("RUNTIME_").lower()
            parts.append("-".join(sorted(value.replace(",", " ").split())) if kind == "sanitize" else kind)
    return "-".join(parts)


def fingerprint(*patterns: str) -> str:
    """Changes with the name, size or time of every file of the package that matches."""
    seen = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in PACKAGE.rglob(pattern)}):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            seen.update(f"{path.relative_to(ROOT)} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    return seen.hexdigest()


def inputs(name: str) -> str:
    """Changes with every input of the build of variant `name`."""
    settings = [name, sys.version, *(os.environ.get(x, "") for x in ("CC", "CFLAGS", "LDFLAGS"))]
    settings.append(hashlib.sha256((ROOT / "setup.py").read_bytes()).hexdigest())
    settings.append(fingerprint("*.pyx", "*.pxd", "*.pxi", "*.h"))
    return hashlib.sha256("\n".join(settings).encode()).hexdigest()


def outputs() -> str:
    return fingerprint(f"*{SUFFIX}")


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two builds of one variant at once would write the same files: the second one waits."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("build: another build is running here; waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def compile_modules(folder: Path, jobs: int, *, force: bool, verbose: bool) -> None:
    argv = [sys.executable, "setup.py", *([] if verbose else ["-q"]), "build_ext"]
    relative = folder.relative_to(ROOT)  # setuptools would repeat an absolute path below build_temp
    argv += ["--build-temp", str(relative / "temp"), "--build-lib", str(relative / "lib")]
    argv += ["--parallel", str(jobs), *(["--force"] if force else [])]
    environ = dict(os.environ)
    environ.pop("RUNTIME_NO_EXTENSIONS", None)
    cc = compiler()
    if cc is not None:
        environ.setdefault("CC", shlex.join(cc))
    done = subprocess.run(argv, cwd=ROOT, env=environ)
    if done.returncode:
        problem = toolchain_problem()
        sys.exit(f"build: {problem or f'failed with exit code {done.returncode}; see above'}")


def place(folder: Path) -> tuple[list[str], list[str]]:
    """Move what was built over the in-place modules. (Names placed, names removed.)"""
    sources = {path.with_suffix("").relative_to(ROOT) for path in PACKAGE.rglob("*.pyx")}
    placed, removed = [], []
    for module in sorted(sources):
        built = (folder / "lib" / module).with_name(module.name + SUFFIX)
        target = (ROOT / module).with_name(module.name + SUFFIX)
        stat = built.stat()
        with contextlib.suppress(FileNotFoundError):
            there = target.stat()
            if (there.st_mtime_ns, there.st_size) == (stat.st_mtime_ns, stat.st_size):
                continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            copy = shutil.copy2(built, Path(scratch, target.name))
            os.replace(copy, target)
        placed.append(".".join(module.parts))
    for target in PACKAGE.rglob(f"*{SUFFIX}"):  # of a source that is gone: it would still be imported
        module = target.with_name(target.name.removesuffix(SUFFIX)).relative_to(ROOT)
        if module not in sources:
            target.unlink()
            removed.append(".".join(module.parts))
    return placed, removed


def build(jobs: int, *, force: bool = False, verbose: bool = False) -> str:
    """Build and place; says what was done."""
    name = variant()
    folder = ROOT / "build" / name
    stamp = ROOT / "build" / f"{SUFFIX.strip('.')}.stamp"  # one for all variants: they share the places
    with only_one(ROOT / "build"):
        before = inputs(name)
        with contextlib.suppress(FileNotFoundError):
            if not force and stamp.read_text().split() == [before, outputs()]:
                return "nothing to do"
        start = time.monotonic()
        compile_modules(folder, jobs, force=force, verbose=verbose)
        placed, removed = place(folder)
        stamp.write_text(f"{before}\n{outputs()}\n")
        said = [f"built {', '.join(placed)}"] if placed else []
        said += [f"removed {', '.join(removed)}"] if removed else []
        return f"{'; '.join(said) or 'nothing changed'} ({name}, {time.monotonic() - start:.1f} s)"


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-j", "--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("-f", "--force", action="store_true", help="build everything again")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the compiler's commands")
    parser.add_argument("--check", action="store_true", help="only look for a C compiler and Python.h")
    options = parser.parse_args()
    if options.check:
        problem = toolchain_problem()
        sys.exit(problem and f"build: {problem}")
    print(f"build: {build(options.jobs, force=options.force, verbose=options.verbose)}")


if __name__ == "__main__":
    main()
