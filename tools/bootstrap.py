#!/usr/bin/env python3
"""From a fresh clone to a working environment, with nothing but a Python and a C compiler.

    python3 tools/bootstrap.py                        .venv with all that running needs, built in place
    python3 tools/bootstrap.py --extras test,cli      and what these extras of pyproject.toml name
    python3.13 tools/bootstrap.py --venv .venv-3.13   another interpreter beside it

Standard library only. Said again when nothing has changed, it takes a blink: a stamp in the
environment holds what it was made from. The environment is made by the first of these that works:

    1. python -m venv                                    (Debian's python3 lacks ensurepip by itself)
    2. python -m venv --without-pip, then pip --python   (a pip from anywhere fills it)
    3. virtualenv
    4. uv
"""

# The first lines run on any Python 3, to say in words what would otherwise be a SyntaxError.
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"bootstrap: runtime needs Python 3.11 or newer, and {sys.executable} is {sys.version_info[0]}."
        f"{sys.version_info[1]}; name a newer one, as in `make PYTHON=python3.13 test`."
    )

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "tools" / "build.py"
STAMP = "bootstrap.json"
# A pip that knows --python, found in the interpreter itself or as a program.
PIP_WITH_PYTHON = (22, 3)


def say(text: str) -> None:
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def give_up(text: str) -> NoReturn:
    sys.exit(f"bootstrap: {text}")


def quiet(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run something that may well fail; its output is for us."""
    try:
        return subprocess.run(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return subprocess.CompletedProcess(argv, 127, str(error))


def interpreter(venv: Path) -> str:
    return str(venv / "bin" / "python")


# ---- what to install -----------------------------------------------------------------------------


def project() -> dict[str, Any]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def requirements(extras: set[str]) -> list[str]:
    """What building, running and the extras need, from pyproject.toml alone."""
    table = project()
    optional: dict[str, list[str]] = table["project"]["optional-dependencies"]
    for extra in sorted(extras - optional.keys()):
        give_up(f"there is no extra {extra!r} in pyproject.toml, only {', '.join(optional)}.")
    wanted = [*table["build-system"]["requires"], *table["project"]["dependencies"]]
    for extra in sorted(extras):
        wanted += optional[extra]
    return list(dict.fromkeys(wanted))


def origin() -> str:
    """Changes when the environment has to be made or filled again."""
    seen = hashlib.sha256(sys.version.encode())
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        seen.update(path.read_bytes())
    seen.update(str(ROOT).encode())
    return seen.hexdigest()


# ---- making an environment -----------------------------------------------------------------------

Installer = list[str]  # the start of a command line; "install"-style arguments follow


def pip_inside(venv: Path) -> Installer | None:
    argv = [interpreter(venv), "-m", "pip"]
    return [*argv, "install"] if quiet(*argv, "--version").returncode == 0 else None


def pip_from_outside(venv: Path) -> Installer | None:
    """A pip of this Python, or one on the PATH, that can be told to fill another environment."""
    for argv in ([sys.executable, "-m", "pip"], ["pip3"], ["pip"]):
        asked = quiet(*argv, "--version")
        words = asked.stdout.split()
        if asked.returncode or len(words) < 2:
            continue
        with contextlib.suppress(ValueError):
            if tuple(int(x) for x in words[1].split(".")[:2]) >= PIP_WITH_PYTHON:
                return [*argv, "--python", interpreter(venv), "install"]
    return None


def uv_from_outside(venv: Path) -> Installer | None:
    uv = shutil.which("uv")
    return [uv, "pip", "install", "--python", interpreter(venv)] if uv else None


def installer(venv: Path) -> Installer | None:
    return pip_inside(venv) or pip_from_outside(venv) or uv_from_outside(venv)


def try_venv(venv: Path) -> str:
    return failure(quiet(sys.executable, "-m", "venv", str(venv)))


def try_venv_without_pip(venv: Path) -> str:
    return failure(quiet(sys.executable, "-m", "venv", "--without-pip", str(venv)))


def try_virtualenv(venv: Path) -> str:
    problem = failure(quiet(sys.executable, "-m", "virtualenv", str(venv)))
    if problem and shutil.which("virtualenv"):
        problem = failure(quiet("virtualenv", "--python", sys.executable, str(venv)))
    return problem


def try_uv(venv: Path) -> str:
    return failure(quiet("uv", "venv", "--python", sys.executable, str(venv)))


WAYS: dict[str, Callable[[Path], str]] = {
    "venv": try_venv,
    "venv --without-pip": try_venv_without_pip,
    "virtualenv": try_virtualenv,
    "uv": try_uv,
}


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a failed command said; "" for one that succeeded."""
    if done.returncode == 0:
        return ""
    lines = [line.strip(" .") for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def same_python(venv: Path) -> bool:
    """True if there is a working environment of exactly this interpreter's version."""
    code = "import sys; print(sys.version, sys.prefix != sys.base_prefix)"
    asked = quiet(interpreter(venv), "-c", code)
    return asked.returncode == 0 and asked.stdout.strip() == f"{sys.version} True"


def clear(venv: Path) -> None:
    if not venv.exists():
        return
    if not (venv / "pyvenv.cfg").is_file() and any(venv.iterdir()):
        give_up(f"{venv} is in the way: it exists and is no virtual environment.")
    shutil.rmtree(venv)


def make_venv(venv: Path) -> Installer:
    """A new environment, or the one that is there, and how to install into it."""
    if same_python(venv):
        found = installer(venv)
        if found:
            return found
    problems = []
    for name, way in WAYS.items():
        clear(venv)
        problem = way(venv)
        if not problem and same_python(venv):
            found = installer(venv)
            if found:
                say(f"made {venv} with {name}")
                return found
            problem = "no pip to fill it with"
        problems.append(f"{name}: {problem or 'made no working environment'}")
    clear(venv)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    give_up(
        f"{sys.executable} cannot make a virtual environment: install one of venv, pip, virtualenv or uv, for"
        f" instance with `apt install python{version}-venv` on Debian and Ubuntu or `dnf install python3-pip`"
        f" on Fedora and RHEL (tried: {'; '.join(problems)})."
    )


# ---- filling it ----------------------------------------------------------------------------------


def run(argv: list[str], otherwise: str, **environ: str) -> None:
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **environ}, stdout=sys.stderr)
    if done.returncode:
        give_up(otherwise)


def fill(venv: Path, install: Installer, wanted: list[str]) -> None:
    offline = "could not install what pyproject.toml asks for (see above): is the package index reachable?"
    if not pip_inside(venv):
        wanted = ["pip", *wanted]  # so that the next time, and whoever works here, needs no outside help
    if not wanted:
        return
    say(f"installing {', '.join(wanted)}")
    run([*install, "--quiet", *wanted], offline)


def link(venv: Path, install: Installer) -> None:
    """Make `import runtime` and the command find the tree.

    An editable install would compile everything in a folder of its own each time it is repeated;
    RUNTIME_NO_EXTENSIONS leaves that to tools/build.py, and what remains takes two seconds.
    """
    argv = [*install, "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    run(argv, "could not link the tree into the environment; see above.", RUNTIME_NO_EXTENSIONS="1")


# ---- the whole -----------------------------------------------------------------------------------


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """`make run` beside `make test`: the second one waits."""
    handle = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_stamp(venv: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads((venv / STAMP).read_text())
        if isinstance(stamp, dict):
            return stamp
    return {}


def bootstrap(venv: Path, extras: set[str]) -> None:
    """Bring the environment up to date; nothing is done twice."""
    stamp = read_stamp(venv)
    current = stamp.get("origin") == origin()
    have = set(stamp.get("extras", ()))
    if current and extras <= have and os.access(interpreter(venv), os.X_OK):
        return
    wanted = requirements(extras | (have if current else set()))
    check = quiet(sys.executable, str(BUILD), "--check")
    if check.returncode:
        give_up(check.stdout.strip().removeprefix("build: "))
    install = make_venv(venv)
    fill(venv, install, wanted)
    link(venv, install)
    done = {"origin": origin(), "extras": sorted(extras | (have if current else set()))}
    (venv / STAMP).write_text(json.dumps(done) + "\n")


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR")
    parser.add_argument("--extras", default="", metavar="A,B", help="extras of pyproject.toml to install")
    parser.add_argument("--no-build", action="store_true", help="install only; do not compile")
    parser.add_argument("--empty", action="store_true", help="only make an environment that has pip")
    options = parser.parse_args()
    venv: Path = options.venv.absolute()
    extras = {x.strip() for x in options.extras.split(",") if x.strip()}
    if options.empty:
        fill(venv, make_venv(venv), [])
        return
    with only_one():
        bootstrap(venv, extras)
    if not options.no_build:
        code = subprocess.run([interpreter(venv), str(BUILD)]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
