"""`runtime run` as a main program: what its signals do, whatever the function does meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Command
from watching import until

from runtime import Runtime
from runtime.cli.notify import Notifier
from runtime.cli.program import Phase, Program

Run = Callable[..., Command]

PRELUDE = """
import os, signal, sys, time

def say(*words):
    print(*words, flush=True)

def wait_for(path):
    say("waiting")
    while not os.path.exists(path):
        time.sleep(0.01)
    return "waited"

def version(_):
    return runtime.current().generation

import runtime
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts `runtime run` of a function's body, and waits until it says `go`."""
    started: list[Command] = []

    def start(body: str, *words: str) -> Command:
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        (tmp_path / "job.py").write_text(f"{PRELUDE}\ndef main(rt, argv):\n{lines}\n")
        command = Command(tmp_path, "run", "--no-progress", "--workers", "1", *words, "job.py:main")
        started.append(command)
        command.says("go")
        return command

    yield start
    for command in started:
        command.close()


def test_term_drains(run: Run, tmp_path: Path) -> None:
    """What was accepted is finished; nothing new is taken."""
    command = run(
        f"""
accepted = [rt.submit(wait_for, {str(tmp_path / "open")!r}) for _ in range(3)]
say("go")
try:
    while True:
        rt.submit(version, 0).result(0.01)
except TimeoutError:
    pass
try:
    while True:
        rt.submit(int)
        time.sleep(0.01)
except RuntimeError as error:
    say(error)
say([it.result() for it in accepted])
"""
    )
    command.says("waiting")
    command.signal(signal.SIGTERM)
    command.says("cannot schedule new futures after shutdown")
    (tmp_path / "open").touch()
    command.says("['waited', 'waited', 'waited']")
    assert command.end() == 0, "it came to its own end"
    assert "Traceback" not in command.log


def test_term_ends_a_function_that_does_not_end(run: Run) -> None:
    command = run('say("go")\ntry:\n    time.sleep(600)\nfinally:\n    say("cleaned up")')
    command.signal(signal.SIGTERM)
    assert command.end() == 143
    assert command.log == "go\ncleaned up\n"


def test_term_does_not_wait_for_ever(run: Run, tmp_path: Path) -> None:
    body = f'it = rt.submit(wait_for, {str(tmp_path / "never")!r})\nsay("go")\nit.result()'
    command = run(body, "--drain-timeout", "0.2")
    command.signal(signal.SIGTERM)
    assert command.end() == 143
    assert "not drained after 0.2 s" in command.log
    assert "Traceback" not in command.log


DEAF = """
say("go")
while True:
    try:
        time.sleep(600)
    except BaseException as error:
        say(type(error).__name__)
"""

IN_C = """
import hashlib
say("go")
hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


@pytest.mark.parametrize(
    ("number", "code", "raised"),
    [
        (signal.SIGTERM, 143, "SystemExit"),
        (signal.SIGINT, 130, "KeyboardInterrupt"),
        (signal.SIGQUIT, 131, "SystemExit"),
    ],
)
def test_a_function_that_catches_everything(run: Run, number: int, code: int, raised: str) -> None:
    command = run(DEAF)
    command.signal(number)
    assert command.end() == code
    assert command.log.startswith(f"go\n{raised}\n")


def test_a_function_that_is_in_c(run: Run) -> None:
    command = run(IN_C)
    command.signal(signal.SIGTERM)
    assert command.end() == 143
    assert command.log == "go\n"


def test_ctrl_c_lets_running_tasks_end(run: Run, tmp_path: Path) -> None:
    command = run(
        f"""
it = rt.submit(wait_for, {str(tmp_path / "open")!r})
say("go")
try:
    say(it.result())
    time.sleep(600)
except KeyboardInterrupt:
    say("interrupted")
    raise
"""
    )
    command.says("waiting")
    command.signal(signal.SIGINT)
    (tmp_path / "open").touch()
    assert command.end() == 130
    assert command.log.endswith("waited\ninterrupted\n")


def test_quit_stops_now(run: Run, tmp_path: Path) -> None:
    command = run(f'it = rt.submit(wait_for, {str(tmp_path / "never")!r})\nsay("go")\nit.result()')
    command.says("waiting")
    command.signal(signal.SIGQUIT)
    assert command.end() == 131
    assert "Traceback" not in command.log


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_reload(run: Run, number: int) -> None:
    command = run(
        """
for generation in (1, 2):
    say("go", generation)
    while rt.submit(version, 0).result() == generation:
        pass
"""
    )
    command.signal(number)
    command.says("go 2")
    command.signal(number)
    assert command.end() == 0


def test_bad_code_is_not_taken(run: Run, tmp_path: Path) -> None:
    command = run('say("go")\nrt.submit(version, 0).result()\nsay("ran")\ntime.sleep(600)')
    command.says("ran")
    (tmp_path / "job.py").write_text("def main(:")
    command.signal(signal.SIGUSR1)
    command.says("SyntaxError")
    command.says("generation 1 serves on")
    command.signal(signal.SIGQUIT)
    assert command.end() == 131


def test_more_and_fewer_workers(run: Run) -> None:
    command = run(
        """
say("go")
for _ in range(2):
    seen = rt._max_workers
    while rt._max_workers == seen:
        time.sleep(0.01)
    say("workers", rt._max_workers)
"""
    )
    command.signal(signal.SIGTTIN)
    command.says("workers 2")
    command.signal(signal.SIGTTOU)
    command.says("workers 1")
    assert command.end() == 0


def test_asyncio_has_a_wakeup_of_its_own(run: Run) -> None:
    """Its loop takes what the interpreter writes signals to; ours get through all the same."""
    command = run(
        """
import asyncio
async def work():
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, say, "theirs")
    say("go")
    while await asyncio.wrap_future(rt.submit(version, 0)) < 2:
        await asyncio.sleep(0.01)
    say("reloaded")
    await asyncio.sleep(600)
asyncio.run(work())
"""
    )
    command.signal(signal.SIGUSR2)
    command.says("theirs")
    command.signal(signal.SIGUSR1)
    command.says("reloaded")
    command.signal(signal.SIGTERM)
    assert command.end() == 143


def test_nobody_is_left(run: Run) -> None:
    command = run('say(rt.submit(os.getpid).result(), "pid")\nsay("go")\ntime.sleep(600)')
    (pid,) = (int(line.split()[0]) for line in command.log.splitlines() if line.endswith("pid"))
    command.signal(signal.SIGTERM)
    assert command.end() == 143
    until(lambda: not os.path.exists(f"/proc/{pid}"), "the worker has ended")


# ---- in this process -------------------------------------------------------------------------------------


def test_no_thread_for_a_reload(
    runtime_factory: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, what else is asked is done, and the next reload is one."""
    rt = runtime_factory(1)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Program(rt, Notifier({}), drain_timeout=5.0, interrupts=False) as program:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            for _ in range(3):
                program.reload_soon()
        assert caplog.text.count("not reloaded: can't start new thread") == 3
        program.reload_soon()
        until(lambda: rt.workers()[0].generation == 1, "it reloads")
    assert program.phase is Phase.SERVING


def test_a_reload_that_meets_the_end_is_not_told_as_ready(
    runtime_factory: Callable[..., Runtime], tmp_path: Path
) -> None:
    rt = runtime_factory(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.setblocking(False)
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "n")})
        with Program(rt, notifier, drain_timeout=5.0, interrupts=False) as program:
            program.drain()
            until(rt._core.ended.is_set, "it has drained")
            with pytest.raises(RuntimeError):
                program.reload()
        said = []
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(manager.recv(4096).split(b"\n")[0])
    assert b"STOPPING=1" in said and b"READY=1" not in said
