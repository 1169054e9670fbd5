"""The kernel floor at import, and what the command says where the package does not load.

Machines are faked by a sitecustomize module, which a new interpreter imports before anything else.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import runtime
from runtime import _core, machine
from runtime.cli import broken, doctor

PACKAGE = Path(runtime.__file__).resolve().parent
PATIENCE = 50  # seconds for a subprocess that hangs: less than the watchdog of the tests


def kernel(release: str) -> str:
    """Code that fakes a kernel of this release."""
    fields = f"('Linux', 'here', {release!r}, '#1', 'x86_64')"
    return f"import os; os.uname = lambda: os.uname_result({fields})\n"


def without(*modules: str) -> str:
    """Code after which these modules cannot be imported."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"


@pytest.fixture
def python(tmp_path):
    """Runs an interpreter in which a given code ran first."""

    def run(first: str, *argv: str, package: Path = PACKAGE, **environ: str) -> SimpleNamespace:
        folder = tmp_path / "first"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(first)
        path = os.pathsep.join((str(folder), str(package.parent)))
        clean = {name: value for name, value in os.environ.items() if name != machine.ANY_KERNEL}
        return subprocess.run(
            [sys.executable, *argv],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environ},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


def checks(done: SimpleNamespace) -> dict[str, dict[str, str]]:
    """What `doctor --json` found, by name; it said nothing else."""
    assert done.stderr == "", done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is (done.returncode == 0)
    return {check["name"]: check for check in report["checks"]}


# The floor


@pytest.mark.parametrize(
    ("release", "numbers"),
    [
        ("6.18.44", (6, 18)),
        ("5.4.0-1234-aws", (5, 4)),
        ("4.19", (4, 19)),
        ("6.1.0-rc1+", (6, 1)),
        ("5.10+", (5, 10)),
        ("4.18.0-553.22.1.el8_10.x86_64", (4, 18)),
        ("5.15.167.4-microsoft-standard-WSL2", (5, 15)),
        ("10.0", (10, 0)),
        ("6", (6, 0)),
        ("6-rc1.2", (6, 0)),
        ("", None),
        ("custom", None),
        ("-5.3", None),
        ("\u0665.3", None),  # a digit, but not ours
    ],
)
def test_version(release, numbers):
    assert machine.version(release) == numbers


@pytest.mark.parametrize(
    ("release", "passes"),
    [
        ("5.3.0", True),
        ("5.3", True),
        ("6.0-rc1", True),
        ("strange", True),
        ("5.2.99", False),
        ("4.19", False),
    ],
)
def test_floor(monkeypatch, release, passes):
    monkeypatch.delenv(machine.ANY_KERNEL, raising=False)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert (machine.problem() is None) is passes
    monkeypatch.setenv(machine.ANY_KERNEL, "1")
    assert machine.problem() is None


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14", "android"])
def test_other_systems(monkeypatch, system):
    monkeypatch.setenv(machine.ANY_KERNEL, "1")  # says nothing about them
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delattr(os, "uname")  # as on Windows
    with pytest.raises(ImportError, match=rf"needs Linux 5\.3 or later, and this is {system}: use"):
        machine.check()


IMPORT = """
import sys
try:
    import runtime
except ImportError as error:
    print(error)
mine = {"psutil", "zmq", "cloudpickle"}
print([name for name in sys.modules if name in mine or name.startswith(("runtime._", "zmq."))])
"""


def test_import_on_an_old_kernel_loads_nothing(python):
    done = python(kernel("4.19.0-27-amd64"), "-c", IMPORT)
    message, loaded = done.stdout.splitlines()
    for part in ("needs Linux 5.3 or later", "4.19.0-27-amd64", "use a newer one", "RUNTIME_ANY_KERNEL=1"):
        assert part in message
    assert loaded == "[]"
    assert (done.returncode, done.stderr) == (0, "")


def test_import_elsewhere_loads_nothing(python):
    done = python("", "-c", f"import sys\nsys.platform = 'darwin'\n{IMPORT}")
    message, loaded = done.stdout.splitlines()
    assert message.startswith("runtime needs Linux 5.3 or later, and this is darwin")
    assert loaded == "[]"


def test_import_on_an_old_kernel_that_may_have_the_calls(python):
    done = python(kernel("4.18.0"), "-c", "import runtime; runtime.Runtime", RUNTIME_ANY_KERNEL="1")
    assert (done.returncode, done.stderr) == (0, "")


# What the command says


def test_doctor_on_an_old_kernel(python):
    found = checks(done := python(kernel("4.19.0"), "-m", "runtime", "doctor", "--json"))
    assert done.returncode == 1
    assert found["kernel"]["status"] == "fail" and "needs Linux 5.3" in found["kernel"]["detail"]
    assert (
        found["kernel"]["cure"] == "all calls work here: set RUNTIME_ANY_KERNEL=1"
    )  # only the number is fake
    assert "ImportError: runtime needs Linux 5.3 or later" in found["package"]["detail"]
    assert found["round trip"]["status"] == "fail"


def test_doctor_without_a_built_core(python, tmp_path):
    clone = shutil.copytree(PACKAGE, tmp_path / "clone" / "runtime", ignore=shutil.ignore_patterns("*.so"))
    found = checks(done := python("", "-m", "runtime", "doctor", "--json", package=clone))
    assert done.returncode == 1
    assert found["core"]["detail"] == "does not load: No module named 'runtime._core'"
    assert "tools/build.py" in found["core"]["cure"]
    assert found["open files"]["detail"].startswith("not checked: ")
    assert {found[name]["status"] for name in ("core", "package", "round trip")} == {"fail"}
    assert {found[name]["status"] for name in ("python", "packages", "kernel", "libzmq")} == {"ok"}


@pytest.mark.parametrize("module", ["psutil", "cloudpickle", "zmq"])
def test_doctor_without_a_package(python, module):
    found = checks(done := python(without(module), "-m", "runtime", "doctor", "--json"))
    assert done.returncode == 1
    culprit = found["libzmq" if module == "zmq" else "packages"]
    assert culprit["status"] == "fail" and f"import of {module} halted" in culprit["detail"]
    assert "pip install --force-reinstall" in culprit["cure"]
    # The other two are imported only when they are used.
    assert found["package"]["status"] == ("fail" if module == "zmq" else "ok")


def test_doctor_as_a_script(python, tmp_path):
    """The file that an installer makes of the entry point, run with a package that does not load."""
    script = tmp_path / "runtime"
    script.write_text("import sys\nfrom runtime.cli import main\nsys.exit(main())\n")
    found = checks(python(without("runtime._core"), str(script), "doctor", "--json"))
    assert found["core"]["status"] == found["package"]["status"] == "fail"


def test_other_subcommands_say_it_in_a_line(python):
    done = python(without("runtime._core"), "-m", "runtime", "run", "job:go")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("runtime: the package does not load: ModuleNotFoundError: ")
    assert line.endswith("; ask `runtime doctor` why")
    assert python(without("runtime._core"), "-m", "runtime", "--version").returncode == 0


@pytest.mark.parametrize(
    ("argv", "original", "kept"),
    [
        (["-m", "doctor"], ["python", "-m", "runtime", "doctor"], True),
        (["-m"], ["python", "-X", "dev", "-mruntime"], True),
        (["/usr/bin/runtime", "doctor"], ["python", "/usr/bin/runtime", "doctor"], True),
        (["-m", "runtime"], ["python", "-m", "other", "runtime"], False),
        (["-m"], ["python", "-m", "runtime.cli.roundtrip"], False),
        (["-c", "runtime"], ["python", "-c", "import runtime", "runtime"], False),
        (["job.py"], ["python", "job.py"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_nobody_but_the_command_gets_past_the_error(monkeypatch, argv, original, kept):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(broken, "reason", None)
    error = ImportError("why")
    assert broken.keep(error) is kept
    assert broken.reason is (error if kept else None)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (_core, "pidfd_open", errno.ENOSYS),
        (_core, "pidfd_send_signal", errno.EPERM),
        (_core, "memfd_create", errno.ENOSYS),
        (os, "eventfd", errno.EPERM),
    ],
)
def test_doctor_names_the_call_that_a_sandbox_refuses(monkeypatch, module, name, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refused)
    check = doctor._kernel("kernel")
    assert check.status == "fail"
    assert f"{name} ({os.strerror(number)})" in check.detail
    assert "seccomp" in check.cure


def test_a_python_that_was_built_with_old_headers_will_do(monkeypatch, runtime_factory):
    """Its os and signal modules lack the calls; the core makes them itself."""
    for module, name in ((os, "pidfd_open"), (os, "memfd_create"), (signal, "pidfd_send_signal")):
        monkeypatch.delattr(module, name)
    assert doctor._kernel("kernel").status == "ok"
    assert runtime_factory(1).submit(abs, -1).result(30) == 1


def test_doctor_misses_the_children_in_proc(monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).endswith("/children"))
    check = doctor._kernel("kernel")
    assert check.status == "warn" and "CONFIG_PROC_CHILDREN" in check.cure
