#!/usr/bin/env python3
"""A rehearsal of a release: the sdist, a wheel built from it on each Python, each in a fresh environment.

    python tools/wheels.py                      on all that tools/interpreters.py finds; about a minute each
    python tools/wheels.py python3.13           on this one alone
    python tools/wheels.py --keep dist          and keep the sdist and the wheels there

For each interpreter: a new environment, `pip wheel` of the sdist in it (which is what `pip install` of an
sdist does), the wheel and what it depends on installed, then tools/smoke.py far from the tree, first bare
and then with numpy. `auditwheel show` has to name manylinux_2_28 or an older one for the first wheel.
Runs in an environment that has the extra `test`; `make smoke` makes one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
NEWEST = (2, 28)  # the C library of the oldest distributions that the wheels are for


def run(*argv: str | Path, cwd: Path) -> str:
    """What it printed. Without our switches, and without a path that would find the tree."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RUNTIME_") and k != "PYTHONPATH"}
    words = [str(word) for word in argv]
    done = subprocess.run(
        words, cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{done.stdout}wheels: exit code {done.returncode}: {' '.join(words)}")
    return done.stdout


def interpreters() -> list[str]:
    argv = [sys.executable, str(TOOLS / "interpreters.py")]
    return subprocess.run(argv, text=True, check=True, stdout=subprocess.PIPE).stdout.split()


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def make_sdist(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return only(folder, "*.tar.gz")


def rehearse(python: str, sdist: Path, folder: Path) -> Path:
    """The wheel that `python` makes of the sdist, after it has passed in a fresh environment."""
    start = time.monotonic()
    folder.mkdir()
    environment = folder / "environment"
    run(python, TOOLS / "bootstrap.py", "--empty", "--venv", environment, cwd=folder)
    inside = environment / "bin" / "python"
    run(inside, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, sdist, cwd=folder)
    wheel = only(folder, "*.whl")
    complete(wheel)
    run(inside, "-m", "pip", "install", wheel, cwd=folder)
    said = run(inside, TOOLS / "smoke.py", cwd=folder)
    run(inside, "-m", "pip", "install", "--no-compile", "numpy", cwd=folder)
    said += run(inside, TOOLS / "smoke.py", cwd=folder)
    print(f"{said}wheels: {wheel.name} by {python} passed, {time.monotonic() - start:.0f} s", flush=True)
    return wheel


def complete(wheel: Path) -> None:
    """It has a compiled module for each .pyx that it holds, and no other."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    sources = {name.removesuffix(".pyx") for name in names if name.endswith(".pyx")}
    built = {name.partition(".")[0] for name in names if name.endswith(".so")}
    if not sources or built != sources:
        sys.exit(
            f"wheels: {wheel.name} was compiled for {sorted(built)}, and its sources are {sorted(sources)}"
        )


def audit(wheel: Path) -> str:
    """The tag that auditwheel would give the wheel."""
    argv = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    done = subprocess.run(argv, capture_output=True, text=True)
    match = re.search(r"following\s+platform\s+tag:\s+\"(\w+)\"", done.stdout)
    if done.returncode or match is None:
        sys.exit(f"wheels: auditwheel could not judge {wheel.name}:\n{done.stdout}{done.stderr}")
    if not old_enough(match[1]):
        sys.exit(f"wheels: {wheel.name} runs only where {match[1]} does:\n{done.stdout}")
    return match[1]


def old_enough(tag: str) -> bool:
    """True for manylinux_2_28 and all before it. A wheel that is no manylinux one is "linux_x86_64"."""
    match = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    return match is not None and (int(match[1]), int(match[2])) <= NEWEST


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", nargs="*", help="interpreters (default: those of tools/interpreters.py)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the sdist and the wheels there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runtime-wheels-") as scratch:
        sdist = make_sdist(Path(scratch))
        pythons = options.python or interpreters()
        print(f"wheels: {sdist.name} on {', '.join(pythons)}", flush=True)
        with ThreadPoolExecutor(2) as pool:  # the compilers use all cores; the rest of each does not
            rounds = [
                pool.submit(rehearse, python, sdist, Path(scratch, str(number)))
                for number, python in enumerate(pythons)
            ]
        made = [done.result() for done in rounds]
        print(f"wheels: {made[0].name} may be tagged {audit(made[0])}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            for file in (sdist, *made):
                shutil.copy2(file, options.keep)


if __name__ == "__main__":
    main()
