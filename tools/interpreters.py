#!/usr/bin/env python3
"""The CPythons of this machine that can build the package, one path a line; this one first.

    python3 tools/interpreters.py                               all of them
    python3 tools/interpreters.py | sed -n 2p                   the one that .ci/run takes as the second
    SECOND_PYTHON=python3.13t python3 tools/interpreters.py     with this one in the second place

Looked for on the PATH and among pyenv's versions: one of each minor version, free-threaded ones only
if they are named. Each is tried, because a pyenv shim may be found and not run. Standard library only.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

BUILD = Path(__file__).resolve().parent / "build.py"
OLDEST = (3, 11)
VERSIONS = ("3.13", "3.14", "3.12", "3.11")  # in the order in which they are wanted beside this one
PROBE = """
import json, sys, sysconfig
free = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
print(json.dumps([sys.implementation.name, *sys.version_info[:2], free, sys.executable]))
"""


def candidates() -> Iterator[str]:
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    for version in VERSIONS:
        yield f"python{version}"
        yield from sorted(glob.glob(f"{glob.escape(pyenv)}/versions/{version}*/bin/python{version}"))


def probe(command: str) -> tuple[str, str] | None:
    """("3.13" or "3.13t", path), or None for what does not run, or is no CPython that we support."""
    found = shutil.which(command)
    asked = found and subprocess.run([found, "-c", PROBE], capture_output=True, text=True)
    if not asked or asked.returncode:
        return None
    name, major, minor, free, path = json.loads(asked.stdout)
    if name != "cpython" or (major, minor) < OLDEST:
        return None
    return f"{major}.{minor}{'t' if free else ''}", path


def can_build(path: str) -> bool:
    return subprocess.run([path, str(BUILD), "--check"], capture_output=True).returncode == 0


def interpreters() -> list[str]:
    chosen: dict[str, str] = {}  # by version
    named = os.environ.get("SECOND_PYTHON")
    asked_for = [sys.executable, *([named] if named else ())]
    for command in (*asked_for, *candidates()):
        version, path = probe(command) or ("", "")
        if not version or version in chosen or (version.endswith("t") and command not in asked_for):
            continue
        if can_build(path):
            chosen[version] = path
    return list(chosen.values())


if __name__ == "__main__":
    print("\n".join(interpreters()))
