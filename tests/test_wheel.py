"""What a wheel needs of the machine that it is installed on, and how wheels are made and tried.

The compiled modules are those in the tree: a symbol that they bind here is the one that a wheel built
here would bind. The wheels themselves are built and tried by tools/wheels.py (`make smoke`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "runtime"
SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
MODULES = [
    path.with_name(path.stem + SUFFIX)
    for path in sorted(PACKAGE.rglob("*.pyx"))
    if path.with_name(path.stem + SUFFIX).exists()
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NEWEST = (2, 28)
CC = shutil.which("cc") or shutil.which("gcc") or "cc"


# ---- what the compiled modules bind --------------------------------------------------------------


def bound(listing: str) -> dict[str, str]:
    """Of what `nm -D --with-symbol-versions` printed: the symbols of the C library, and their versions."""
    return dict(re.findall(r"^\s+[UVWvw]\s+(\S+?)@{1,2}GLIBC_(\w[\w.]*)", listing, re.M))


def too_new(symbols: dict[str, str]) -> list[str]:
    """Those of a C library after NEWEST, or of its private parts."""
    return [f"{x}@{y}" for x, y in symbols.items() if not y[0].isdigit() or numbers(y) > NEWEST]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_symbols_are_old_enough():
    nm = shutil.which("nm")
    if nm is None:  # whoever compiled the modules here has a linker, and nm comes with it
        assert not (shutil.which("cc") or shutil.which("gcc")), "a compiler without nm: install binutils"
        pytest.skip("there is no nm here, nor a compiler: install binutils to see what the modules bind")
    symbols = {}
    for module in MODULES:
        argv = [nm, "-D", "--undefined-only", "--with-symbol-versions", str(module)]
        symbols[module.name] = bound(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert {name: too_new(found) for name, found in symbols.items() if too_new(found)} == {}
    # Guards the reader: a small module may need nothing of the C library, but not all of them.
    assert {"syscall", "clock_gettime"} <= set().union(*symbols.values())


def test_every_module_is_looked_at():
    assert [path.name.removesuffix(SUFFIX) for path in MODULES] == [
        path.stem for path in sorted(PACKAGE.rglob("*.pyx"))
    ]


def test_a_symbol_that_is_too_new_is_found():
    listing = """
                 U PyLong_FromLong
                 w __cxa_finalize@GLIBC_2.2.5
                 U fcntl64@GLIBC_2.28
                 U fstat@GLIBC_2.33
                 U pthread_create@GLIBC_2.34
                 U __tunable@GLIBC_PRIVATE
                 U strtol@@GLIBC_3.0
    """
    assert bound(listing).keys() == {
        "__cxa_finalize",
        "fcntl64",
        "fstat",
        "pthread_create",
        "__tunable",
        "strtol",
    }
    assert too_new(bound(listing)) == [
        "fstat@2.33",
        "pthread_create@2.34",
        "__tunable@PRIVATE",
        "strtol@3.0",
    ]


# ---- what our C and Cython may call --------------------------------------------------------------

# Headers of a C library after 2.28 bind these to a version of their own: 2.33 made stat and its kin
# functions, 2.34 moved the threads, the loader and the POSIX shared memory into libc.
FORBIDDEN = re.compile(
    r"(?<![\w.])(?:[fl]?stat(?:64)?|fstatat(?:64)?|mknod(?:at)?|dl(?:open|m?open|v?sym|close|error|addr)"
    r"|pthread_\w+|thrd_\w+|mtx_\w+|cnd_\w+|sem_\w+|shm_(?:open|unlink)|mq_\w+|aio_\w+|timer_\w+)\s*\("
    r"|(?<![\w.])pthread_\w+|\bcimport\b[^\n]*\b(?:[fl]?stat|dlopen|dlsym)\b|\bposix\.stat\b|<(?:pthread|dlfcn)\.h>"
)


def forbidden(text: str, suffix: str) -> list[str]:
    """Calls in the text of a source file that would need a newer C library, as "line: call"."""
    comments = r"/\*.*?\*/|//[^\n]*" if suffix == ".h" else r'"""(?:\\.|[^\\])*?"""|#[^\n]*'
    text = re.sub(comments, lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = re.sub(r'"[^"\n<]*"' + r"|'[^'\n]*'", '""', text)
    found = FORBIDDEN.finditer(text)
    return [f"{text.count(chr(10), 0, match.start()) + 1}: {match[0].strip()}" for match in found]


def test_sources_call_nothing_that_is_too_new():
    sources = [path for suffix in ("*.pyx", "*.pxd", "*.h") for path in PACKAGE.rglob(suffix)]
    assert len(sources) > 20
    found = {path.name: forbidden(path.read_text(), path.suffix) for path in sources}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("text", "suffix", "calls"),
    [
        ("x = os.fstat(fd)\nos.stat(path)\n# fstat(fd)\nread_stat(pid)\n", ".pyx", []),
        ('"""Not\n\nfstat(fd)."""\nrc = fstat (fd, &st)\n', ".pyx", ["4: fstat ("]),
        ('snprintf(path, b"/proc/%d/stat", pid)\n', ".pyx", []),
        ("from posix.stat cimport struct_stat\n", ".pyx", ["1: posix.stat"]),
        ("from posix.dlfcn cimport dlopen\n", ".pyx", ["1: cimport dlopen"]),
        ('cdef extern from "<pthread.h>" nogil:\n', ".pxd", ["1: <pthread.h>"]),
        ("/* pthread_create( */ static pthread_t t;\n", ".h", ["1: pthread_t"]),
        ("\n// dlsym(h)\nvoid *p = dlsym(h, name);\n", ".h", ["3: dlsym("]),
        ("shm_open(name, 0, 0); sem_wait(&s);\n", ".h", ["1: shm_open(", "1: sem_wait("]),
    ],
)
def test_a_call_that_is_too_new_is_found(text, suffix, calls):
    assert forbidden(text, suffix) == calls


# ---- cibuildwheel --------------------------------------------------------------------------------


def selected(identifier: str) -> bool:
    """As cibuildwheel decides, apart from requires-python."""
    table = PYPROJECT["tool"]["cibuildwheel"]
    build, skip = (any(fnmatch.fnmatch(identifier, x) for x in table[key]) for key in ("build", "skip"))
    return build and not skip


def test_cibuildwheel_builds_what_we_support():
    table = PYPROJECT["tool"]["cibuildwheel"]
    project = PYPROJECT["project"]
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), re.M)
    oldest = project["requires-python"].removeprefix(">=")
    assert oldest in versions and len(versions) >= 3
    assert table["linux"]["archs"] == ["x86_64", "aarch64"]
    for arch in table["linux"]["archs"]:
        assert table["linux"][f"manylinux-{arch}-image"] == "manylinux_2_28"
        for version in versions:
            assert selected(f"cp{version.replace('.', '')}-manylinux_{arch}")
    for other in ("cp313t-manylinux_x86_64", "cp311-musllinux_x86_64", "pp311-manylinux_x86_64"):
        assert not selected(other)


def test_cibuildwheel_runs_the_smoke():
    words = PYPROJECT["tool"]["cibuildwheel"]["test-command"].split()
    assert words[0] == "python" and len(words) == 2
    script = Path(words[1].format(project=ROOT))
    assert script == ROOT / "tools" / "smoke.py"
    compile(script.read_text(), str(script), "exec")


# ---- the tools -----------------------------------------------------------------------------------


def tool(
    name: str, *argv: str, python: str = sys.executable, **environ: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("SECOND_PYTHON", "PYENV_ROOT")}
    return subprocess.run(
        [python, str(ROOT / "tools" / name), *argv], env={**clean, **environ}, capture_output=True, text=True
    )


@pytest.fixture
def wheels():
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "tools" / "wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_refuses_the_tree():
    """It has to be the installed package: a smoke that passes on a source tree says nothing of a wheel."""
    done = tool("smoke.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert done.stderr.startswith(f"smoke: FAILED: imported from {PACKAGE / '__init__.py'}, which is not in ")


@pytest.mark.parametrize(
    ("tag", "passes"),
    [
        ("manylinux_2_17_x86_64", True),
        ("manylinux_2_28_aarch64", True),
        ("manylinux_2_31_x86_64", False),
        ("manylinux_2_100_x86_64", False),
        ("linux_x86_64", False),
    ],
)
def test_tag_that_auditwheel_may_name(wheels, tag, passes):
    assert wheels.old_enough(tag) is passes


@pytest.mark.parametrize(
    ("names", "passes"),
    [
        (("runtime/_a.pyx", f"runtime/_a{SUFFIX}", "runtime/b.py"), True),
        (("runtime/_a.pyx", f"runtime/_a{SUFFIX}", "runtime/_c.pyx"), False),
        (("runtime/_a.pyx", f"runtime/_a{SUFFIX}", f"runtime/_c{SUFFIX}"), False),
        (("runtime/b.py",), False),
    ],
)
def test_wheel_has_all_its_modules(wheels, tmp_path, names, passes):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    with contextlib.nullcontext() if passes else pytest.raises(SystemExit, match="was compiled for"):
        wheels.complete(tmp_path / "some.whl")


@pytest.fixture
def fake(tmp_path):
    """Makes a command that answers a probe like a Python of some version, or fails."""

    def make(
        name: str, version: str, free: str = "false", implementation: str = "cpython", code: int = 0
    ) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        answer = f'["{implementation}", {version.replace(".", ", ")}, {free}, "{path}"]'
        path.write_text(f"#!/bin/sh\n[ \"$1\" = -c ] && echo '{answer}'\nexit {code}\n")
        path.chmod(0o755)
        return path

    return make


def test_interpreters_are_tried(fake, tmp_path):
    """This one first; then one for each other version, in the order wanted, if it can build."""
    ours = "{}.{}".format(*sys.version_info[:2])
    fake(f"python{ours}", ours)
    versions = [version for version in ("3.13", "3.14", "3.12", "3.11") if version != ours]
    first = fake(f"python{versions[0]}", versions[0])
    fake(f"python{versions[1]}", versions[1], code=1)  # a shim of a version that is not there
    last = fake(f"python{versions[2]}", versions[2])
    path = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "CC": CC}
    assert tool("interpreters.py", **path).stdout.split() == [sys.executable, str(first), str(last)]

    named = fake("mine", versions[0], free="true")
    found = tool("interpreters.py", SECOND_PYTHON=str(named), **path).stdout.split()
    assert found == [sys.executable, str(named), str(first), str(last)]
    for wrong in (fake("old", "3.10"), fake("other", versions[0], implementation="pypy"), tmp_path / "none"):
        found = tool("interpreters.py", SECOND_PYTHON=str(wrong), **path).stdout.split()
        assert found == [sys.executable, str(first), str(last)]


def test_interpreters_of_pyenv(fake, tmp_path):
    """Free-threaded ones are there under the same name; they are taken only if they are named."""
    version = "3.12" if sys.version_info[:2] != (3, 12) else "3.13"
    found = []
    for name, free in ((f"{version}.1", "false"), (f"{version}.0t", "true")):
        folder = tmp_path / "versions" / name / "bin"
        folder.mkdir(parents=True)
        made = fake(f"python{version}", version, free=free)
        made.write_text(made.read_text().replace(str(made), str(folder / made.name)))
        found.append(made.rename(folder / made.name))
    environ = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path), "CC": CC}
    assert tool("interpreters.py", **environ).stdout.split() == [sys.executable, str(found[0])]
