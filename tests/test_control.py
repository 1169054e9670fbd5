"""`runtime ctl`, the socket that it asks, and the names that such sockets have."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Command
from tasks import Gate, hang_in_c, pass_through
from watching import ROOT, until

from runtime import Runtime, control, names
from runtime.cli import ctl, main

Factory = Callable[..., Runtime]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names of this test alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "runtime"


@contextlib.contextmanager
def client(name: str = "here") -> Iterator[ctl.Client]:
    with contextlib.closing(ctl.Client(name)) as found:
        yield found


def raw(data: bytes, name: str = "here") -> list[dict[str, Any]]:
    """The answers to what a client sends before it closes its side."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(names.control_path(name))
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file, contextlib.suppress(ConnectionResetError):
            return [json.loads(line) for line in file]
    return []


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """`runtime ctl …` in this process: its exit code, and what it prints."""
    code = main(["ctl", *words])
    output = capsys.readouterr()
    return code, output.out + output.err


# ---- what can be asked -----------------------------------------------------------------------------------


STATUS = {
    "name", "pid", "state", "uptime", "generation", "reloading", "wanted", "workers",
    "queued", "leased", "running", "done", "failed", "cancelled",
}  # fmt: skip
WORKER = {
    "number", "slot", "pid", "generation", "status", "started", "tasks_done", "task", "rss", "busy",
}  # fmt: skip


def test_status(factory: Factory, tmp_path: Path) -> None:
    """Its fields are documented, and others build on them."""
    rt = factory(2, name="here")
    gate = Gate(tmp_path)
    future = rt.submit(pass_through, gate.path, 1)
    (pid,) = gate.arrived()
    with client() as ask:
        status = ask.ask("status")
        gate.open()
        future.result()
    assert set(status) == STATUS
    assert (status["name"], status["pid"], status["state"]) == ("here", os.getpid(), "running")
    assert (status["wanted"], status["generation"], status["reloading"]) == (2, 1, False)
    assert (status["queued"], status["running"], status["done"]) == (0, 1, 0)
    assert [set(worker) for worker in status["workers"]] == [WORKER, WORKER]
    (busy,) = [worker for worker in status["workers"] if worker["pid"] == pid]
    assert busy["status"] == "ready" and busy["task"] is not None and busy["rss"] > 1 << 20
    gate.close()


def test_every_command(factory: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    rt = factory(1, name="here")
    assert rt.submit(abs, -1).result() == 1
    code, text = call(capsys, "here", "status")
    assert code == 0
    assert "here: running, pid" in text and "1 of 1 workers ready" in text and "1 done" in text
    code, text = call(capsys, "here", "stats", "--json")
    assert (code, json.loads(text)["done"]) == (0, 1)
    assert "largest_free" in call(capsys, "here", "stats")[1]
    code, text = call(capsys, "here", "reload", "--timeout", "30")
    assert code == 0 and re.match(r"generation 2: 1 started, 1 drained, 0 killed, \d", text)
    assert call(capsys, "here", "scale", "2", "--json") == (0, "null\n")
    until(lambda: rt.stats().workers == 2)
    code, text = call(capsys, "here", "dump-stacks", "--number", "1")
    assert code == 0 and text.startswith("worker 1\n") and "loop" in text
    code, text = call(capsys, "here", "top", "--json", "--count", "2", "--interval", "0.05")
    first, second = map(json.loads, text.splitlines())
    assert first["rate"] is None and second["rate"] == 0.0
    assert second["workers"][0]["load"] is not None
    code, text = call(capsys, "here", "top", "--count", "2", "--interval", "0.05")
    assert code == 0 and text.count("busy") == 2 and "tasks/s" in text
    assert call(capsys, "here", "drain") == (0, "")
    rt.shutdown()
    assert call(capsys, "here", "status")[0] == 3


def test_drain_finishes_what_was_accepted(factory: Factory, tmp_path: Path) -> None:
    rt = factory(1, name="here")
    gate = Gate(tmp_path)
    futures = [rt.submit(pass_through, gate.path, n) for n in range(3)]
    gate.arrived()
    with client() as ask:
        ask.ask("drain")
        assert ask.ask("status")["state"] == "draining"
    with pytest.raises(RuntimeError):
        rt.submit(abs, 1)
    gate.open(3)
    assert [future.result() for future in futures] == [0, 1, 2]
    rt.shutdown()
    gate.close()


def test_stop_ends_now(factory: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rt = factory(1, name="here")
    future = rt.submit(time.sleep, 600)
    assert call(capsys, "here", "stop") == (0, "")
    assert future.exception() is not None
    assert not list((tmp_path / "runtime").iterdir())


def test_a_refusal(factory: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    factory(1, name="here")
    code, text = call(capsys, "here", "scale", "100000")
    assert code == 1 and text.startswith("runtime: ValueError: ")
    code, text = call(capsys, "here", "dump-stacks", "--number", "7")
    assert code == 1 and "there is no worker 7" in text


def test_an_unknown_name(factory: Factory, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "nobody", "status")
    assert code == 3 and "there is no named runtime of this user" in text
    factory(1, name="here")
    code, text = call(capsys, "nobody", "status")
    assert code == 3 and "no runtime is named 'nobody'" in text and "the names are here" in text


@pytest.mark.parametrize(
    "words",
    [
        [], ["here"], ["here", "fly"], ["here", "scale"], ["here", "scale", "x"],
        ["here", "top", "--count", "0"], ["here", "top", "--interval", "x"],
        *(["here", "top", f"--interval={seconds}"] for seconds in ("nan", "-1", "inf")),
    ],
)  # fmt: skip
def test_a_wrong_command_line(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ctl", *words])
    assert caught.value.code == 2


# ---- whatever happens ------------------------------------------------------------------------------------


def test_workers_that_are_all_stuck(factory: Factory) -> None:
    """In C, with the GIL: they answer nobody, and the runtime does."""
    rt = factory(2, name="here")

    def hang() -> None:
        while True:  # a signal ends a sleep
            hang_in_c()

    futures = [rt.submit(hang) for _ in range(2)]
    with client() as ask:
        until(lambda: ask.ask("status")["running"] == 2)
        assert len(ask.ask("dump-stacks")) == 2
        ask.ask("stop")
    assert all(future.exception() is not None for future in futures)


def test_during_a_reload(factory: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs in an import; who asked for it waits, the others do not."""
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "reloaded_by_ctl.py"
    module.write_text("")
    rt = factory(1, name="here", preload="reloaded_by_ctl")
    rt.submit(abs, 1).result()
    module.write_text(
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)"
    )
    reports: list[Any] = []

    def reload() -> None:
        with client() as ask:
            reports.append(ask.ask("reload"))

    thread = threading.Thread(target=reload)
    thread.start()
    with client() as ask:
        until(lambda: ask.ask("status")["reloading"])
        assert ask.ask("status")["generation"] == 1
        (tmp_path / "go").touch()
        thread.join()
        assert ask.ask("status")["generation"] == reports[0]["generation"] == 2
        module.write_text("def (")
        with pytest.raises(ctl.Refused, match=r"ReloadFailed: .*generation 2 serves on(.|\n)*SyntaxError"):
            ask.ask("reload")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\n", "one line with a JSON object"),
        (b"\xff\x00garbage\n", "one line with a JSON object"),
        (b"[" * 3000 + b"\n", "one line with a JSON object"),
        (b"[1]\n", 'a request has a "command"'),
        (b'{"command": "__class__"}\n', 'a request has a "command"'),
        (b'{"command": ["status"]}\n', 'a request has a "command"'),
        (b'{"command": "status", "x": 1}\n', "status has no field 'x'"),
        (b'{"command": "scale"}\n', "scale needs"),
        (b'{"command": "scale", "n": true}\n', "n of scale cannot be True"),
        (b'{"command": "scale", "n": -1}\n', "must be >= 0"),
        (b'{"command": "reload", "timeout": NaN}\n', "timeout must be"),
        (b"x" * 5000, "a request has at most 4096 bytes"),
    ],
)
def test_garbage(factory: Factory, line: bytes, said: str) -> None:
    factory(1, name="here")
    answers = raw(line)
    assert len(answers) == 1 and not answers[0]["ok"]
    assert said in answers[0]["error"]
    assert raw(b'{"command":"status"}\n' * 3 + b'{"comm')[2]["ok"], "half a line is nobody's request"


def test_clients_that_say_nothing(factory: Factory) -> None:
    factory(1, name="here")
    with contextlib.ExitStack() as stack:
        for _ in range(control.MAX_CLIENTS - 1):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(names.control_path("here"))
            sock.sendall(b'{"command": "stat')
        with client() as ask:
            assert ask.ask("status")["state"] == "running"
            assert not raw(b"")[0]["ok"], "one too many"
    until(lambda: raw(b'{"command":"stats"}\n')[0]["ok"])


def test_one_too_many_is_told_so(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if it was refused before it has asked; above all one who wants it to stop."""
    rt = factory(1, name="here")
    monkeypatch.setattr(rt._core.control._listener, "_most", 0)
    connect = ctl.Client.connect

    def connect_and_wait(self: ctl.Client) -> None:
        connect(self)
        until(lambda: self._socket.recv(1, socket.MSG_PEEK), "the refusal")
        poller = select.poll()
        poller.register(self._socket, select.POLLHUP)
        assert poller.poll(30_000)

    for verb in ("stop", "status"):
        monkeypatch.setattr(ctl.Client, "connect", connect_and_wait)
        code, text = call(capsys, "here", verb)
        assert code == 1 and "clients are connected already" in text
    assert rt._core.condition == "running"


def test_a_queue_that_is_full(folder: Path) -> None:
    """Of one that is stopped, say: its name is known."""
    name = names.Name("here")
    name.socket.listen(0)
    with contextlib.ExitStack() as stack:
        stack.callback(name.release)
        stack.enter_context(client())
        with pytest.raises(ctl.Unreachable, match="'here' does not answer"):
            ctl.Client("here")
        with pytest.raises(ctl.Unreachable, match=r"is named 'nobody'.*the names are here"):
            ctl.Client("nobody")


def test_top_waits_longer_than_a_connection_may_be_silent(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    factory(1, name="here")
    monkeypatch.setattr(control, "PATIENCE", 0.05)
    code, text = call(capsys, "here", "top", "--json", "--count", "2", "--interval", "0.2")
    assert code == 0 and len(text.splitlines()) == 2


def test_another_user(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    factory(1, name="here")
    monkeypatch.setattr(control, "_peer", lambda client: 12345)
    with pytest.raises(ctl.Unreachable), client() as ask:
        ask.ask("status")


# ---- names -----------------------------------------------------------------------------------------------


def test_only_a_named_runtime_has_a_socket(factory: Factory, folder: Path) -> None:
    factory(1)
    assert not folder.exists()
    rt = factory(1, name="here")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {file.name for file in folder.iterdir()} == {"here", "here~"}
    assert stat.S_IMODE((folder / "here").stat().st_mode) == 0o600
    rt.shutdown()
    assert not list(folder.iterdir())


def test_a_name_that_is_taken(factory: Factory) -> None:
    rt = factory(1, name="here")
    with pytest.raises(names.NameTaken, match=rf"named 'here' already \(pid {os.getpid()}\)"):
        Runtime(1, name="here")
    rt.submit(abs, 1).result()
    rt.shutdown()
    factory(1, name="here").submit(abs, 1).result()


@pytest.mark.parametrize("name", ["", "..", "a/b", "a~", "x" * 65, "é"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="name must be 1 to 64"):
        Runtime(1, name=name)


def test_a_path_that_is_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/tmp/{'x' * 90}")
    with pytest.raises(names.NoPlace, match="over 107 bytes"):
        names.Name("here")


def test_folders_that_others_may_use(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(0o755)
    folder.chmod(0o755)
    with pytest.raises(names.NoPlace, match="chmod 700"):
        names.Name("here")
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(names.NoPlace, match="belongs to user"):
            names.Name("here")
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        names.Name("here")
    folder.unlink()
    folder.mkdir(0o700)
    (folder / "here~").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        names.Name("here")
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_runtime_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert names.control_path("here") == str(tmp_path / f"runtime-{os.getuid()}" / "here")


def test_a_runtime_dir_that_is_relative(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is invalid, and would be another one after a chdir."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "here")
    assert f"/runtime-{os.getuid()}/" in names.control_path("x")


@pytest.mark.parametrize("lacking", ["socket.socket", "os.eventfd"])
def test_a_name_that_there_is_no_descriptor_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """It stays free."""

    def lacks(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(lacking, lacks)
        with pytest.raises(OSError, match="Too many open files"):
            control.Control("here")
    assert not list(folder.iterdir())
    names.Name("here").release()


def test_a_runtime_that_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is free again; conftest.py looks for what else may be left."""

    def lacks(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("runtime.supervisor.HostLink", lacks)
        with pytest.raises(OSError, match="Too many open files"):
            Runtime(1, name="here")
    assert not list(folder.iterdir())
    names.Name("here").release()


def test_a_lock_that_was_tidied_away(folder: Path) -> None:
    """By a cleaner of temporary folders: who has the name then keeps it."""
    first = names.Name("here")
    (folder / "here~").unlink()
    second = names.Name("here")
    first.release()
    assert names.live_names() == ["here"]
    second.release()
    assert not list(folder.iterdir())


def test_sockets_that_others_may_have_made(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that was there first: nobody asks them, or shows what they are called."""
    factory(1, name="here")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    code, text = call(capsys, "here", "status")
    assert code == 3 and "belongs to user" in text and "there is no named runtime of this user" in text


HOST = """
import os, sys, runtime
rt = runtime.Runtime(1, name="here")
print(rt.submit(os.getpid).result(), flush=True)
sys.stdin.read()
"""


def host(text: str = HOST, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", text, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )  # fmt: skip


def test_a_host_that_is_killed(folder: Path, factory: Factory) -> None:
    """Its name is free at once, and its files are gone soon."""
    with host() as process:
        assert process.stdout and process.stdout.readline()
        process.kill()
    until(lambda: not list(folder.iterdir()), "the zygote removes what is left")
    factory(1, name="here").submit(abs, 1).result()


RACE = """
import os, sys, time
from runtime.names import Name, NameTaken
print("ready", flush=True)
sys.stdin.readline()
try:
    name = Name("here")
    print("mine", flush=True)
    sys.stdin.read()
    name.release()
except NameTaken:
    print("taken", flush=True)
"""


def test_several_want_one_name(folder: Path) -> None:
    racers = [host(RACE) for _ in range(4)]
    try:
        for racer in racers:
            assert racer.stdout and racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = sorted(racer.stdout.readline() for racer in racers if racer.stdout)
        assert said == ["mine\n", "taken\n", "taken\n", "taken\n"]
    finally:
        for racer in racers:
            racer.communicate()
    assert not list(folder.iterdir())


STEPS = """
import os, signal, sys
from runtime import names

def step(most):
    "A process that is killed at this line of names.py, counted from the beginning. Whether it was."
    pid = os.fork()
    if pid == 0:
        left = most
        def trace(frame, event, arg):
            nonlocal left
            if frame.f_code.co_filename != names.__file__:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        name = names.Name("here")
        name.release()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

count = 0
while step(count + 1):
    count += 1
    if count % 2:
        names.remove_dead(names.control_path("here"))
    taken = names.Name("here")
    assert names.live_names() == ["here"]
    taken.release()
    assert not os.listdir(os.path.dirname(taken.path)), count
print(count)
"""


def test_a_kill_at_every_line(folder: Path) -> None:
    """Of taking and giving back a name: the next one can always have it."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(done.stdout) > 20


FORKS = """
import os, sys, runtime
rt = runtime.Runtime(1, name="here")
rt.submit(abs, 1).result()
if os.fork() == 0:
    sys.stdin.read()  # outlives its parent
    os._exit(0)
rt.shutdown()
print("over", flush=True)
os._exit(0)
"""


def test_a_fork_of_the_host_has_nothing_of_it(folder: Path) -> None:
    with host(FORKS) as process:
        assert process.stdout and process.stdout.readline() == "over\n"
        assert not list(folder.iterdir())
        names.Name("here").release()
        process.communicate()


def test_a_named_runtime_that_is_dropped(folder: Path) -> None:
    rt = Runtime(1, name="here")
    rt.submit(abs, 1).result()
    del rt
    gc.collect()
    until(lambda: not list(folder.iterdir()), "its end")


# ---- main programs ---------------------------------------------------------------------------------------


def test_a_main_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.py").write_text(
        "import time\ndef main(rt, argv):\n    print('go', flush=True)\n    time.sleep(600)\n"
    )
    command = Command(tmp_path, "run", "--no-progress", "--workers", "1", "job.py:main")
    second = None
    try:
        command.says("go")
        second = Command(tmp_path, "run", "--no-progress", "--workers", "1", "job.py:main")
        second.says("go")  # two may run at once; the second one has no name
        named = Command(tmp_path, "run", "--name", "job", "--workers", "1", "job.py:main")
        assert named.end() == 2 and "there is a runtime named 'job' already" in named.log
        code, text = call(capsys, "job", "status", "--json")
        assert (code, json.loads(text)["pid"]) == (0, command.process.pid)
        assert call(capsys, "job", "reload")[0] == 0
        (tmp_path / "job.py").write_text("def (")
        code, text = call(capsys, "job", "reload")
        assert code == 0, "no function of it was submitted, so nobody imports it"
        assert call(capsys, "job", "stop")[0] == 0
        assert command.end() == 131
    finally:
        command.close()
        if second is not None:
            second.signal(signal.SIGQUIT)
            second.end()
            second.close()


def test_without_a_place_for_the_socket(tmp_path: Path, folder: Path) -> None:
    """Main programs do without it, unless a name was asked for."""
    folder.touch()
    (tmp_path / "job.py").write_text("def main(rt, argv): print(rt.submit(abs, -7).result())\n")
    (tmp_path / "app.py").write_text("def main(ctx): ctx.stopping.wait()\n")
    started = []

    try:
        command = Command(tmp_path, "run", "--no-progress", "--workers", "1", "job.py:main")
        started.append(command)
        assert (command.end(), command.log) == (0, "7\n")
        named = Command(tmp_path, "run", "--name", "x", "--workers", "1", "job.py:main")
        started.append(named)
        assert named.end() == 2 and "Not a directory" in named.log
        served = Command(tmp_path, "serve", "--workers", "1", "app:main")
        started.append(served)
        served.says("runtime: ready")
        assert "runtime ctl cannot be used" in served.log
        served.signal(signal.SIGTERM)
        assert served.end() == 0
    finally:
        for command in started:
            command.close()


def test_a_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "app.py").write_text("def main(ctx):\n    ctx.stopping.wait()\n")
    command = Command(tmp_path, "serve", "--workers", "1", "--name", "web", "app:main")
    try:
        command.says("runtime: ready")
        assert call(capsys, "web", "scale", "2")[0] == 0
        command.says("scaled to 2 workers")
        (tmp_path / "app.py").write_text("def main(")
        code, text = call(capsys, "web", "reload")
        assert code == 1 and "SyntaxError" in text and "generation 1 serves on" in text
        other = Command(tmp_path, "serve", "--workers", "1", "--name", "web", "app:main")
        assert other.end() == 2 and "there is a runtime named 'web' already" in other.log
        assert call(capsys, "web", "drain")[0] == 0
        assert command.end() == 0
    finally:
        command.close()
