"""The command: targets, exit codes, the progress line, the doctor; at the end through real workers."""

from __future__ import annotations

import importlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import ClassVar

import pytest

import runtime
from runtime.cli import doctor, exits, main, progress, targets

ROOT = str(Path(runtime.__file__).resolve().parent.parent)
PATIENCE = 40  # seconds for a subprocess that hangs: less than the watchdog of the tests


class FakeRuntime:
    """Records what the command does with its Runtime."""

    made: ClassVar[list[FakeRuntime]] = []

    def __init__(self, **options):
        self.options, self.calls = options, []
        self._core = types.SimpleNamespace(control=None)
        self.made.append(self)

    def stats(self):
        return types.SimpleNamespace(workers=2, queued=3, leased=1, running=2, done=40, failed=1)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.calls.append(f"shutdown wait={wait} cancel={cancel_futures}")

    def kill_workers(self):
        self.calls.append("kill")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder; modules that a test imports from it are forgotten afterwards."""
    known, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeRuntime, "made", [])
    monkeypatch.setattr(importlib.import_module("runtime.executor"), "Runtime", FakeRuntime)
    monkeypatch.delenv("RUNTIME_MAX_WORKERS", raising=False)
    return FakeRuntime.made


# TARGET


def test_target_in_a_module_of_the_current_folder(here):
    (here / "job_a.py").write_text("def go(rt, argv): return 7\n")
    assert targets.load("job_a:go")(None, []) == 7
    assert sys.path[0] == str(here)


def test_target_in_a_file_elsewhere_imports_its_neighbours(here):
    folder = here / "sub" / "jobs"
    folder.mkdir(parents=True)
    (folder / "neighbour_b.py").write_text("VALUE = 8\n")
    (folder / "job-b.py").write_text("import neighbour_b\ndef go(rt, argv): return neighbour_b.VALUE\n")
    function = targets.load("sub/jobs/job-b.py:go")
    assert function(None, []) == 8
    # Workers find it by the same name.
    assert importlib.import_module(function.__module__).go is function
    assert sys.path[:2] == [str(folder), str(here)]
    assert targets.load("sub/jobs/job-b.py:go") is function
    assert sys.path.count(str(folder)) == 1


def test_target_may_be_an_attribute_of_an_attribute(here):
    (here / "job_c.py").write_text("class Job:\n    @staticmethod\n    def go(rt, argv): return 9\n")
    assert targets.load("job_c:Job.go")(None, []) == 9


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "'nothing' is not a TARGET: write module:function or file.py:function"),
        ("job_d:", "'job_d:' is not a TARGET"),
        (":go", "':go' is not a TARGET"),
        ("no_such_module:go", "there is no module 'no_such_module'"),
        ("no_such.module:go", "there is no module 'no_such'"),
        ("json.no_such:go", "there is no module 'json.no_such'"),
        ("not a module:go", "'not a module' is not a module name"),
        ("no_such_file.py:go", "the file 'no_such_file.py' does not exist (the current folder is "),
        ("folder.py:go", "the file 'folder.py' is a folder"),
        ("./job_d:go", "the file './job_d' does not exist"),
        ("job_d:goo", "job_d has no 'goo': did you mean go?"),
        ("job_d:xyz", "job_d has no 'xyz'; define it at the top level of the module"),
        ("job_d.py:VALUE", "job_d.py:VALUE is int, not a function"),
        (
            "job_d:narrow",
            "job_d:narrow() cannot be called as function(rt, argv): too many positional arguments",
        ),
        ("two.words.py:go", "'two.words.py' cannot be imported: rename it to one word and .py, like two.py"),
        ("json.py:go", "'json.py' has the same name as another module, 'json'"),
    ],
)
def test_bad_target(here, capsys, fake, target, message):
    text = "VALUE = 1\ndef go(rt, argv): pass\ndef narrow(): pass\n"
    for file in ("job_d.py", "two.words.py", "json.py"):
        (here / file).write_text(text)
    (here / "folder.py").mkdir()
    with pytest.raises(exits.Usage) as caught:
        targets.load(target)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert main(["run", target]) == 2
    assert capsys.readouterr().err == f"runtime: {caught.value}\n"
    assert not fake  # nothing was started


def test_a_missing_import_inside_the_target_is_its_own_error(here):
    (here / "job_e.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        targets.load("job_e:go")


# runtime run: options and exit codes


def test_run_hands_over_options_and_arguments(here, fake, capsys):
    (here / "job_f.py").write_text("def go(rt, argv): print(argv); rt.seen = True\n")
    command = "run --workers 3 --threads 4 --preload json,csv --preload re --timeout 1.5 --retries 2"
    code = main(
        [
            *command.split(),
            "--region-size",
            "8MiB",
            "--no-progress",
            "job_f:go",
            "x",
            "--workers",
            "9",
            "--",
            "-h",
        ]
    )
    assert code == 0
    (rt,) = fake
    assert rt.options == {
        "max_workers": 3,
        "threads": 4,
        "preload": ["json", "csv", "re"],
        "timeout": 1.5,
        "retries": 2,
        "region_size": "8MiB",
        "max_worker_rss": None,
        "drain_timeout": 30.0,
        "name": "job_f",
    }
    assert rt.calls == ["shutdown wait=True cancel=False"]
    output = capsys.readouterr()
    assert output.out == "['x', '--workers', '9', '--', '-h']\n"
    assert output.err == ""


@pytest.mark.parametrize(
    ("option", "environment", "workers"),
    [([], "5", 5), (["--workers", "2"], "5", 2), ([], "", None), ([], None, None)],
)
def test_workers_from_option_environment_default(here, fake, monkeypatch, option, environment, workers):
    if environment is not None:
        monkeypatch.setenv("RUNTIME_MAX_WORKERS", environment)
    (here / "job_g.py").write_text("def go(rt, argv): pass\n")
    assert main(["run", *option, "--no-progress", "job_g:go"]) == 0
    assert fake[0].options["max_workers"] == workers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "max_workers must be greater than 0"),
        (["--workers", "10000"], "max_workers must be at most 2,000"),
        (["--timeout", "nan"], "timeout must be greater than 0"),
        (["--retries", "-1"], "retries must be >= 0"),
        (["--region-size", "big"], "region_size: str 'big' is not a size"),
        (["--preload", "not-a-module"], "preload: 'not-a-module' is not a module name"),
    ],
)
def test_bad_options_start_nothing(here, fake, capsys, options, message):
    (here / "job_h.py").write_text("def go(rt, argv): pass\n")
    assert main(["run", *options, "job_h:go"]) == 2
    assert message in capsys.readouterr().err
    assert not fake


def test_bad_environment(here, fake, capsys, monkeypatch):
    monkeypatch.setenv("RUNTIME_MAX_WORKERS", "many")
    assert main(["run", "x:y"]) == 2
    assert capsys.readouterr().err.startswith("runtime: RUNTIME_MAX_WORKERS is 'many' in the environment")


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return None", 0, ""),
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("return 255", 255, ""),
        ("return 256", 1, ""),
        ("return -1", 255, ""),
        ("return [1]", 1, "runtime: job_i:go returned list; it must return None or an int, the exit code\n"),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(4)", 4, ""),
        ("raise SystemExit('no disk')", 1, "no disk\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_exit_codes(here, fake, capsys, body, code, stderr):
    (here / "job_i.py").write_text(f"def go(rt, argv): {body}\n")
    assert main(["run", "--no-progress", "job_i:go"]) == code
    assert capsys.readouterr().err == stderr


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ("return 3", ["shutdown wait=True cancel=False"]),
        ("raise SystemExit(0)", ["shutdown wait=True cancel=False"]),
        ("raise SystemExit(1)", ["shutdown wait=True cancel=True"]),
        ("raise OSError", ["shutdown wait=True cancel=True"]),
        ("raise KeyboardInterrupt", ["kill"]),
    ],
)
def test_how_the_runtime_ends(here, fake, body, calls):
    (here / "job_j.py").write_text(f"def go(rt, argv): {body}\n")
    main(["run", "--no-progress", "job_j:go"])
    assert fake[0].calls == calls


def test_ctrl_c_while_the_shutdown_waits(here, fake, capsys, monkeypatch):
    def interrupted(self, wait=True, *, cancel_futures=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeRuntime, "shutdown", interrupted)
    (here / "job_k.py").write_text("def go(rt, argv): pass\n")
    assert main(["run", "job_k:go"]) == 130
    assert fake[0].calls == ["kill"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["def go(rt, argv): 1 / 0\n", "1 / 0\n"])
def test_a_traceback_begins_at_the_users_code(here, fake, capsys, text):
    (here / "job_l.py").write_text(text)
    assert main(["run", "--no-progress", "job_l.py:go"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert f'"{here}/job_l.py", line 1' in lines[1]
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_a_file_that_does_not_parse(here, fake, capsys):
    (here / "job_m.py").write_text("def go(:\n")
    assert main(["run", "job_m.py:go"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert f'"{here}/job_m.py", line 1' in lines[0]
    assert lines[-1].startswith("SyntaxError")


@pytest.mark.parametrize(
    "arguments", [[], ["serve"], ["ctl"], ["run"], ["run", "--work", "2", "a:b"], ["doctor", "x"]]
)
def test_the_parser_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: runtime")


def test_help_names_only_what_exists(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in ("run", "serve", "ctl", "doctor"))


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("runtime ")


# The progress line


def test_line():
    now = progress.Sample(workers=2, queued=1200, running=2, done=98765, failed=0)
    text = "".join(text for text, _ in progress.segments(now, 1234.5))
    assert text == "2 workers, 1,200 queued, 2 running, 98,765 done, 0 failed, 1,234 tasks/s"
    one = progress.Sample(workers=1, queued=0, running=1, done=0, failed=3)
    assert "".join(text for text, _ in progress.segments(one, 0.25)).startswith(
        "1 worker, 0 queued, 1 running"
    )
    assert ("bold red") in [style for _, style in progress.segments(one, 0.0)]
    assert ("bold red") not in [style for _, style in progress.segments(now, 0.0)]


def test_summary():
    last = progress.Sample(workers=2, queued=0, running=0, done=90, failed=10)
    assert (
        "".join(text for text, _ in progress.summary(last, 4.0)) == "90 done, 10 failed in 4.0 s, 25 tasks/s"
    )
    assert "0.0 tasks/s" in progress.summary(last, 0.0)[-1][0]


def test_leased_tasks_are_not_started_yet():
    assert progress.sample(FakeRuntime().stats()) == progress.Sample(
        2, queued=4, running=2, done=40, failed=1
    )


def test_rate_over_a_window():
    rate = progress.Rate(window=2.0)
    assert rate.add(10.0, 100) == 0.0
    assert rate.add(10.5, 150) == 100.0
    assert rate.add(11.0, 200) == 100.0
    assert rate.add(12.0, 200) == 50.0
    assert rate.add(13.0, 200) == 0.0  # the burst has left the window
    assert rate.add(13.0, 200) == 0.0  # a clock that stands still
    assert rate.add(14.0, 100) == 0.0  # never negative


def test_plain_lines():
    stream = io.StringIO()
    shown = progress.Progress(FakeRuntime(), stream=stream)
    with shown:
        assert shown._tick()
    first, last = stream.getvalue().splitlines()
    assert first.startswith("runtime: 2 workers, 4 queued, 2 running, 40 done, 1 failed, ")
    assert last.startswith("runtime: 40 done, 1 failed in ")
    assert "\x1b" not in stream.getvalue()


def test_no_progress():
    stream = io.StringIO()
    with progress.Progress(FakeRuntime(), stream=stream, enabled=False):
        pass
    assert stream.getvalue() == ""


def test_no_summary_after_ctrl_c():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), progress.Progress(FakeRuntime(), stream=stream):
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_progress_never_raises(monkeypatch):
    closed = io.StringIO()
    closed.close()
    with progress.Progress(FakeRuntime(), stream=closed) as shown:
        assert not shown._tick()
    broken = FakeRuntime()
    broken.stats = lambda: 1 / 0
    stream = io.StringIO()
    with progress.Progress(broken, stream=stream) as shown:
        assert not shown._tick()
    assert stream.getvalue() == ""


def test_totals_survive_a_runtime_that_has_ended():
    rt, stream = FakeRuntime(), io.StringIO()
    with progress.Progress(rt, stream=stream) as shown:
        shown._tick(draw=False)
        rt.stats = lambda: 1 / 0
    assert stream.getvalue().startswith("runtime: 40 done, 1 failed in ")


class Terminal:
    """A pseudo terminal; while it is entered it is stdout and stderr."""

    def __init__(self):
        self.reader, writer = pty.openpty()
        self.stream = os.fdopen(writer, "w", encoding="utf-8")

    def __enter__(self):
        self.saved = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self.stream
        return self

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self.saved

    def read(self) -> str:
        """What appeared since the last reading."""
        sys.stdout.flush()
        found = b""
        while select.select([self.reader], [], [], 0)[0]:
            found += os.read(self.reader, 65536)
        return found.decode().replace("\r\n", "\n")


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(progress, "TERMINAL_INTERVAL", 3600.0)  # only the test draws
    terminal = Terminal()
    yield terminal
    terminal.stream.close()
    os.close(terminal.reader)


@pytest.fixture
def no_rich(monkeypatch):
    for name in ("rich", "rich.console", "rich.text", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_line_on_a_terminal(terminal, no_rich):
    with terminal, progress.Progress(FakeRuntime()) as shown:
        shown._tick()
        assert terminal.read().startswith("\r\x1b[K2 workers, 4 queued, 2 running, 40 done, 1 failed, ")
        print("hello")  # erases the line first
        assert terminal.read() == "\r\x1b[Khello\n"
        print("more")  # nothing to erase
        assert terminal.read() == "more\n"
        print("half", end="")
        shown._tick()  # not over the half line
        assert terminal.read() == "half"
        print()
        shown._tick()
        assert terminal.read().startswith("\n\r\x1b[K2 workers")
    with terminal:
        assert terminal.read().startswith("\r\x1b[Kruntime: 40 done, 1 failed in ")
        with progress.Progress(FakeRuntime()):
            assert sys.stdout is not terminal.stream
        assert sys.stdout is sys.stderr is terminal.stream


def test_a_narrow_terminal(terminal, no_rich):
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal.stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
    with terminal, progress.Progress(FakeRuntime()) as shown:
        shown._tick()
        assert terminal.read() == "\r\x1b[K2 workers, 4 queued"[:23]


def test_a_line_with_colours(terminal):
    pytest.importorskip("rich")
    with terminal, progress.Progress(FakeRuntime()) as shown:
        shown._tick()
        line = terminal.read()
        assert line.startswith("\r\x1b[K\x1b[")
        assert "1 failed" in line and "\n" not in line
    assert "40 done" in terminal.read()


def test_a_fork_prints_past_the_line(terminal, no_rich):
    with terminal, progress.Progress(FakeRuntime()) as shown:
        shown._tick()
        terminal.read()
        with sys.stdout._line.lock:  # what a child may inherit from another thread
            child = os.fork()
            if child == 0:
                sys.stdout.write("from the child\n")
                sys.stdout.flush()
                os._exit(0)
            os.waitpid(child, 0)
        assert terminal.read() == "from the child\n"


# The doctor


def test_table():
    text = doctor.table(
        [
            doctor.Check("a", "ok", "fine"),
            doctor.Check("longer", "warn", "so so", "do this"),
            doctor.Check("b", "fail", "bad", "do that"),
        ]
    )
    assert text.splitlines() == [
        "ok    a       fine",
        "warn  longer  so so",
        "              -> do this",
        "fail  b       bad",
        "              -> do that",
        "",
        "1 of 3 checks failed, 1 warning",
    ]
    assert doctor.table([doctor.Check("a", "ok", "fine")]).endswith("\nall is well")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_exit_code(monkeypatch, capsys, status, code):
    check = doctor.Check("a", status, "detail [/] with brackets", "cure")
    monkeypatch.setattr(doctor, "_CHECKS", (("a", lambda name: check),))
    assert main(["doctor"]) == code
    assert "detail [/] with brackets" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (code == 0)
    assert report["checks"] == [
        {"name": "a", "status": status, "detail": "detail [/] with brackets", "cure": "cure"}
    ]


def test_doctor_on_a_terminal(terminal, monkeypatch):
    pytest.importorskip("rich")
    check = doctor.Check("a", "fail", "detail [/] with brackets", "cure")
    monkeypatch.setattr(doctor, "_CHECKS", (("a", lambda name: check),))
    with terminal:
        assert main(["doctor"]) == 1
        text = terminal.read()
    assert "detail [/] with brackets" in text and "-> cure" in text and "1 of 1 checks failed" in text


def test_a_check_that_raises_has_failed(monkeypatch):
    monkeypatch.setattr(doctor, "_CHECKS", (("a", lambda name: 1 / 0),))
    (check,) = doctor.checks()
    assert (check.status, check.detail) == ("fail", "ZeroDivisionError: division by zero")


def test_doctor_finds_the_broken_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "runtime._core", None)
    check = doctor._core("core")
    assert check.status == "fail"
    assert "tools/build.py" in check.cure


@pytest.fixture
def folders(monkeypatch):
    """Sets XDG_RUNTIME_DIR; there is no other folder for sockets."""
    sockets = pytest.importorskip("runtime.sockets")

    def only(*paths):
        monkeypatch.setattr(
            sockets, "_parents", lambda: [(f"folder {n}", str(p)) for n, p in enumerate(paths)]
        )
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(paths[0]))

    return only


def test_doctor_finds_a_socket_path_that_is_too_long(tmp_path, folders):
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    folders(deep)
    check = doctor._sockets("sockets")
    assert check.status == "fail"
    assert "over 107 bytes" in check.detail
    assert "XDG_RUNTIME_DIR" in check.cure
    assert not list(deep.iterdir())


def test_doctor_finds_no_writable_folder(tmp_path, folders):
    folders(tmp_path / "missing")
    check = doctor._sockets("sockets")
    assert check.status == "fail"
    assert "No such file or directory" in check.detail


def test_doctor_says_that_the_wanted_folder_is_not_used(tmp_path, folders):
    with tempfile.TemporaryDirectory() as short:
        folders(tmp_path / "missing", short)
        check = doctor._sockets("sockets")
        assert check.status == "warn"
        assert f"in {short}, because XDG_RUNTIME_DIR ({tmp_path}/missing) cannot be used" in check.detail


def test_doctor_leaves_no_file(folders):
    with tempfile.TemporaryDirectory() as short:
        folders(short)
        assert doctor._sockets("sockets") == doctor.Check("sockets", "ok", f"in {short}")
        assert not os.listdir(short)


def test_doctor_counts_descriptors(monkeypatch):
    check = doctor._files("open files")
    assert check.status == "ok"
    assert "enough for " in check.detail
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (20, 20))
    check = doctor._files("open files")
    assert (check.status, check.detail) == ("fail", "RLIMIT_NOFILE 20 (hard limit 20)")
    assert "file descriptors" in check.cure


def test_doctor_reads_the_quota(monkeypatch):
    monkeypatch.setattr(doctor.config, "cpu_quota", lambda: 0.5)
    check = doctor._cpus("cpus")
    assert check.status == "warn"
    assert "cgroup quota 0.5" in check.detail


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("raise OSError('no descriptors')", "OSError: no descriptors"),
        ("import os; os.abort()", "exit code -6"),
        ("import time; time.sleep(600)", "no end in 1 s"),
        (
            'print(\'{"worker": 7, "host": 7, "first": 1, "usual": 1}\')',
            "the task ran in the host, not in a worker",
        ),
    ],
    ids=["raises", "aborts", "hangs", "cheats"],
)
def test_doctor_survives_a_round_trip_that(monkeypatch, tmp_path, code, detail):
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(fake))
    monkeypatch.setattr(doctor, "_PATIENCE", 1.0 if "sleep" in code else 30.0)
    check = doctor._round_trip("round trip")
    assert (check.status, check.detail) == ("fail", detail)


# Through real workers


def command(*arguments, **options):
    """`python -m runtime ...` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    environment.pop("RUNTIME_MAX_WORKERS", None)
    return subprocess.run(
        [sys.executable, "-m", "runtime", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        **options,
    )


JOB = """
import os, sys

def square(n):
    return n * n, os.getpid()

def go(rt, argv):
    results = list(rt.map(square, range(int(argv[0]))))
    assert os.getpid() not in {pid for _, pid in results}
    print(sum(value for value, _ in results))
    return int(argv[1])

def fail(rt, argv):
    rt.submit(int, "x").result()

def alone(rt, argv):
    print(len({pid for _, pid in rt.map(square, range(50))}))
"""


def test_run_for_real(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    done = command("run", "--workers", "2", "job.py:go", "100", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "328350\n"), done.stderr
    assert done.stderr.startswith("runtime: 100 done, 0 failed in ")
    assert done.stderr.count("\n") == 1


def test_run_a_module_without_progress(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    done = command("run", "--workers", "1", "--no-progress", "job:alone", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_run_a_task_that_raises(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    done = command("run", "--no-progress", "job.py:fail", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: invalid literal for int()" in done.stderr
    assert 'job.py", line 14, in fail' in done.stderr


WAIT = """
import os, time

def task(fifo):
    with open(fifo, "w") as out:
        out.write(str(os.getpid()))
    time.sleep(600)

def go(rt, argv):
    rt.submit(task, argv[0]).result()
"""


def test_ctrl_c_is_quick_and_quiet(tmp_path):
    (tmp_path / "job.py").write_text(WAIT)
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime", "run", "--workers", "2", "job.py:go", fifo],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with open(fifo) as running:  # opens when the task runs
            worker = os.pidfd_open(int(running.read()))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to host and workers alike
        _, stderr = process.communicate(timeout=20)
        death = select.poll()
        death.register(worker, select.POLLIN)
        assert death.poll(10_000), "the worker outlived its host"
        os.close(worker)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert stderr == ""


def test_doctor_for_real():
    done = command("doctor", "--json")
    report = json.loads(done.stdout)
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert {status[name] for name in ("python", "packages", "kernel", "libzmq", "core", "round trip")} == {
        "ok"
    }, report
    assert done.returncode == ("fail" in status.values())


def test_doctor_into_a_pipe_that_closes():
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(PATIENCE) == 1


def test_the_command_loads_only_what_it_needs():
    code = "import sys, runtime.cli; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = ("rich", "numpy", "asyncio", "multiprocessing")
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert done.stdout == "[]\n", done.stderr
