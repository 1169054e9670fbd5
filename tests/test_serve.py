"""`runtime serve`: services, their sockets, signals, reloads, and what they are told."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import HTTP, Command, Served, children, get, kill, load
from watching import ROOT, until

Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts `runtime serve` of a text, in a folder of its own."""
    started: list[Command] = []

    def start(text: str = HTTP, *words: str, target: str = "app:main", **more: Any) -> Served:
        (tmp_path / "app.py").write_text(text)
        started.append(served := Served(tmp_path, target, *words, **more))
        return served

    yield start
    for command in started:
        command.close()


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs `runtime serve` of what cannot be served: its exit code, and what it says."""

    def run(*words: str, text: str = HTTP, **more: Any) -> tuple[int, str]:
        (tmp_path / "app.py").write_text(text)
        command = Command(tmp_path, "serve", *words, **more)
        try:
            return command.end(), command.log
        finally:
            command.close()

    yield run


def rewrite(served: Served, text: str) -> None:
    """The service's code; of the same size and second, perhaps."""
    (served.file.parent / "app.py").write_text(text)


# ---- a service -----------------------------------------------------------------------------------


def test_it_serves_and_drains(serve: Serve, tmp_path: Path) -> None:
    served = serve(HTTP, "--workers", "2")
    assert len(served.all_ready(2)) == 2
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(f"GET /slow{tmp_path}/go HTTP/1.1\r\n\r\n".encode())
        served.get()  # so the other request has been accepted, too: the queue keeps its order
        until(lambda: asked(served) is not None)
        served.signal(signal.SIGTERM)
        served.says("draining")
        (tmp_path / "go").touch()
        assert b"one" in client.recv(1000), "the request that was open is answered"
    assert served.end() == 0
    with pytest.raises(ConnectionRefusedError):
        served.get()


def test_one_that_is_not_called_ready_yet_finishes_what_it_has_begun(serve: Serve) -> None:
    text = """
def main(ctx):
    if ctx.number == 0:
        ctx.ready()
    ctx.log.info("begins")
    ctx.stopping.wait()
    ctx.log.info("ends")
"""
    served = serve(text, "--workers", "2", "--settle", "600")
    served.says("begins", 2)
    served.signal(signal.SIGTERM)
    assert served.end() == 0
    assert served.log.count(": ends") == 2


def test_one_that_is_still_imported_has_nothing_to_finish(serve: Serve, tmp_path: Path) -> None:
    text = f"""
import os, time
def begin():
    if os.path.exists({str(tmp_path / "hang")!r}):
        os.write(2, b"hangs\\n")
        time.sleep(1000)
class Target:
    def __getattribute__(self, name):
        begin()
        return object.__getattribute__(self, name)
    def main(self, ctx):
        os.write(2, b"begins\\n")
        ctx.stopping.wait()
app = Target()
"""
    served = serve(text, "--workers", "1", target="app:app.main")
    served.says("begins", 1)
    (tmp_path / "hang").touch()
    served.signal(signal.SIGTTIN)  # one more, which hangs before it has begun
    served.says("hangs", 1)
    begin = time.monotonic()
    served.signal(signal.SIGTERM)
    assert served.end() == 0
    assert time.monotonic() - begin < 20, "it waited for the drain_timeout"


def asked(served: Served) -> int | None:
    return int(served.get()[4])


def test_a_service_without_sockets_that_is_no_coroutine(serve: Serve) -> None:
    text = """
import runtime
def main(ctx):
    assert isinstance(ctx, runtime.ServiceContext)
    current = runtime.current()
    assert (current.number, current.generation) == (ctx.number, ctx.generation)
    ctx.log.info("begins %r", ctx)
    ctx.stopping.wait()
    ctx.log.info("ends")
"""
    served = serve(text, "--workers", "2")
    served.says("begins", 2)
    served.signal(signal.SIGINT)
    assert served.end() == 0
    assert served.log.count("runtime.worker.0: ends") == served.log.count("runtime.worker.1: ends") == 1


def test_what_workers_and_generations_share(serve: Serve) -> None:
    text = """
def main(ctx):
    block = ctx.pool.acquire()
    block.write(0, b"mine")
    ctx.log.info("count %d, state %d, block of %d in %d bytes", ctx.region.fetch_add_u64(0, 1) + 1,
                 ctx.state.add("n", 1), len(memoryview(block)), ctx.region.size)
    ctx.stopping.wait()
    block.release()
"""
    served = serve(text, "--workers", "2", "--shared-size", "1MiB", "--pool-blocks", "3",
                   "--pool-block-size", "4KiB")  # fmt: skip
    served.says("block of 4096 in 1048576 bytes", 2)
    served.signal(signal.SIGUSR1)
    served.says("reloaded")
    served.says("count 4, state", 1)
    assert {f"count {n}," in served.log for n in (1, 2, 3, 4)} == {True}
    served.signal(signal.SIGTERM)
    assert served.end() == 0


def test_a_service_says_itself_when_it_is_ready(serve: Serve) -> None:
    text = """
import time
def main(ctx):
    if ctx.number == 0:
        ctx.ready()
    ctx.stopping.wait()
"""
    began = time.monotonic()
    served = serve(text, "--workers", "2", "--settle", "600")
    assert time.monotonic() - began < 60
    served.signal(signal.SIGTERM)
    assert served.end() == 0


def test_several_wait_for_the_end(serve: Serve) -> None:
    text = """
import asyncio
async def main(ctx):
    try:
        await asyncio.wait_for(ctx.wait_stopping(), 0.01)
    except TimeoutError:
        ctx.log.info("not yet")
    await asyncio.gather(*(ctx.wait_stopping() for _ in range(3)))
    await ctx.wait_stopping()
    assert ctx.stopping.is_set()
    ctx.log.info("all told")
"""
    served = serve(text, "--workers", "1")
    served.says("not yet")
    served.signal(signal.SIGTERM)
    assert served.end() == 0
    assert "all told" in served.log


# ---- crashes -------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_replaced(serve: Serve) -> None:
    served = serve(HTTP, "--workers", "2")
    before = served.all_ready(2)
    with load(served.port, 2) as counts:
        for pid in before:
            kill(pid)
        served.says("killed by signal 9", 2)
        until(lambda: counts["ok"] > 50)
    assert counts["refused"] == 0
    assert counts["failed"] <= 2 * len(before)
    assert not set(served.all_ready(2)) & set(before)
    served.signal(signal.SIGTERM)
    assert served.end() == 0


def test_a_service_that_fails_later_is_started_again(serve: Serve) -> None:
    served = serve(HTTP, "--workers", "1")
    served.get("/raise")
    served.says("the service ended")
    served.says("its service raised, or returned")
    until(lambda: served.get()[0] == "one")
    with pytest.raises((EOFError, ConnectionError)):
        served.get("/exit")
    served.says("it exited with code 3")
    until(lambda: served.get()[0] == "one")
    served.signal(signal.SIGTERM)
    assert served.end() == 0


def test_a_worker_that_gets_sigterm_finishes_and_is_replaced(serve: Serve, tmp_path: Path) -> None:
    served = serve(HTTP, "--workers", "1")
    (pid,) = served.all_ready(1)
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(f"GET /slow{tmp_path}/go HTTP/1.1\r\n\r\n".encode())
        served.get()
        os.kill(pid, signal.SIGTERM)
        until(lambda: int(served.get()[1]) != pid)
        (tmp_path / "go").touch()
        assert f"one {pid} ".encode() in client.recv(1000)
    served.signal(signal.SIGTERM)
    assert served.end() == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def main(ctx): 1 / 0", "ZeroDivisionError"),
        ("def main(ctx): pass", "the service returned without being asked to stop"),
        ("async def main(ctx): raise SystemExit(4)", "SystemExit"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("def other(ctx): pass", "has no attribute 'main'"),
        ("main = 3", "app:main is int, not a function"),
        ("def main(: pass", "SyntaxError"),
    ],
)
def test_a_service_that_never_runs_ends_the_program(refused: Any, text: str, said: str) -> None:
    code, log = refused("--workers", "1", "app:main", text=text)
    assert code == 1
    assert said in log
    assert "Traceback" in log


def test_a_service_that_does_not_stop_is_killed(serve: Serve) -> None:
    text = """
import time
def main(ctx):
    ctx.log.info("deaf")
    while True:
        time.sleep(60)
"""
    served = serve(text, "--workers", "1", "--drain-timeout", "0.3")
    served.says("deaf")
    served.signal(signal.SIGTERM)
    assert served.end() == 0


@pytest.mark.stress
def test_a_worker_that_has_grown_is_replaced(serve: Serve) -> None:
    """After ten seconds: the next one may be as large."""
    served = serve(HTTP, "--workers", "1", "--max-worker-rss", "1MiB")
    (pid,) = served.all_ready(1)
    with load(served.port, 1) as counts:
        until(lambda: int(served.get()[1]) != pid)
    assert counts["refused"] == counts["failed"] == 0
    served.signal(signal.SIGTERM)
    assert served.end() == 0


def test_nothing_outlives_the_main_program(serve: Serve) -> None:
    served = serve(HTTP, "--workers", "2")
    pidfds = [os.pidfd_open(pid) for pid in served.all_ready(2)]
    served.process.kill()
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 5.0)[0]
        os.close(pidfd)


# ---- reloads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_reload_under_load(serve: Serve, number: int) -> None:
    served = serve(HTTP, "--workers", "2")
    before = served.all_ready(2)
    with load(served.port) as counts:
        for generation, version in ((2, "two"), (3, "six")):
            rewrite(served, HTTP.replace('"one"', f'"{version}"'))
            served.signal(number)
            served.says(f"reloaded: generation {generation} serves (2 started, 2 drained, 0 killed")
            assert served.get()[0] == version
    assert counts["refused"] == counts["failed"] == 0 < counts["ok"]
    assert not set(served.all_ready(2, 3)) & set(before)
    served.signal(signal.SIGTERM)
    assert served.end() == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def main(: pass", "SyntaxError"),
        ("raise OSError('no such luck')", "no such luck"),
        ("def main(ctx): raise KeyError('at once')", "at once"),
        ("def main(ctx): return", "without being asked"),
        ("import os; os._exit(5)", "exit code 5"),
        ("nothing = 1", "has no attribute 'main'"),
    ],
)
def test_bad_code_is_rolled_back(serve: Serve, text: str, said: str) -> None:
    served = serve(HTTP, "--workers", "1")
    before = served.all_ready(1)
    rewrite(served, text)
    with load(served.port, 1) as counts:
        served.signal(signal.SIGUSR1)
        log = served.says("the reload failed, and generation 1 serves on")
    assert said in log
    assert counts["refused"] == counts["failed"] == 0
    assert served.all_ready(1) == before
    rewrite(served, HTTP)
    served.signal(signal.SIGUSR1)
    served.says("reloaded")
    served.signal(signal.SIGTERM)
    assert served.end() == 0


def test_a_changed_file_is_reloaded(serve: Serve) -> None:
    pytest.importorskip("watchfiles")
    served = serve(HTTP, "--workers", "1", "--reload")
    until(lambda: (rewrite(served, HTTP.replace("one", "new")), served.get())[1][0] == "new")
    served.signal(signal.SIGTERM)
    assert served.end() == 0


# ---- signals -------------------------------------------------------------------------------------


def test_one_worker_more_or_less(serve: Serve) -> None:
    served = serve(HTTP, "--workers", "1")
    served.signal(signal.SIGTTIN)
    served.says("scaled to 2 workers")
    assert len(served.all_ready(2)) == 2
    served.signal(signal.SIGTTOU)
    served.says("scaled to 1 worker\n")
    served.signal(signal.SIGTTOU)
    served.says("scaled to 1 worker\n", 2)
    served.signal(signal.SIGTERM)
    assert served.end() == 0


@pytest.mark.parametrize("numbers", [(signal.SIGQUIT,), (signal.SIGINT, signal.SIGINT)])
def test_it_stops_at_once(serve: Serve, tmp_path: Path, numbers: tuple[int, ...]) -> None:
    served = serve(HTTP, "--workers", "1")
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(f"GET /slow{tmp_path}/never HTTP/1.1\r\n\r\n".encode())
        served.get()
        for number in numbers:
            served.signal(number)
            if len(numbers) > 1:
                served.says("draining")
        assert served.end() == 128 + numbers[-1]


# ---- sockets -------------------------------------------------------------------------------------


def test_sockets_of_several_kinds(serve: Serve, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    served = serve(HTTP, "--workers", "1", "--bind", f"unix:{path},[::1]:0")
    assert f"unix:{path}, [::1]:" in served.log
    ask = b"GET / HTTP/1.1\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(ask)
        assert b"one" in client.recv(1000)
    (port,) = re.findall(r"\[::1\]:(\d+)", served.log)
    with socket.create_connection(("::1", int(port))) as client:
        client.sendall(ask)
        assert b"one" in client.recv(1000)
    served.signal(signal.SIGTERM)
    assert served.end() == 0
    assert not os.path.exists(path)


def test_a_dead_unix_socket_is_replaced_and_a_file_is_not(refused: Any, serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    served = serve(HTTP, "--workers", "1", "--bind", f"unix:{path}")
    code, log = refused("--bind", f"unix:{path}", "app:main")
    assert code == 2 and "somebody listens there" in log
    served.signal(signal.SIGTERM)
    assert served.end() == 0
    path.write_text("precious")
    code, log = refused("--bind", f"unix:{path}", "app:main")
    assert code == 2 and "it is no socket" in log
    assert path.read_text() == "precious"


PASS = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), sys.argv[2]
os.execv(sys.executable, [sys.executable, "-m", "runtime", "serve", *sys.argv[3:]])
"""


def test_the_sockets_of_systemd(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HTTP)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", PASS, str(listener.fileno()), "1", "--workers", "1", "app:main"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    try:  # nobody here has it any more
        assert get(port)[0] == "one"
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bind", "nonsense", "app:main"), "is not HOST:PORT"),
        (("--bind", "127.0.0.1:99999", "app:main"), "is not HOST:PORT"),
        (("--bind", "::1:80", "app:main"), "in brackets"),
        (("--bind", "192.0.2.1:0", "app:main"), "cannot listen on 192.0.2.1:0"),
        (("--bind", ":0", "--backlog", "9999999999", "app:main"), "cannot listen on :0: signed integer is"),
        (("app",), "is not a TARGET"),
        (("nofile.py:main",), "does not exist"),
        (("--workers", "0", "app:main"), "max_workers must be greater than 0"),
        (("--shared-size", "1KiB", "app:main"), "1024"),
        (("--settle", "-1", "app:main"), "settle must be"),
        (("--drain-timeout", "soon", "app:main"), "invalid float value"),
        (("--reload", "--reload-dir", "nowhere", "app:main"), "there is no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_served(refused: Any, words: tuple[str, ...], said: str) -> None:
    code, log = refused(*words)
    assert (code, said in log) == (2, True), log
    assert "Traceback" not in log


def test_a_port_that_is_taken(refused: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, log = refused("--bind", address, "app:main")
    assert (code, f"cannot listen on {address}: Address already in use" in log) == (2, True), log


# ---- who watches it ------------------------------------------------------------------------------


def test_the_service_manager_is_told(serve: Serve, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(30)
        environ = {"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "200000"}
        text = (
            "import os\ndef main(ctx):\n    assert not {'NOTIFY_SOCKET', 'WATCHDOG_USEC'} & {*os.environ}\n"
        )
        served = serve(text + "    ctx.stopping.wait()\n", "--workers", "1", environ=environ)
        said: list[str] = []

        def hear(what: str) -> None:
            while not (said and said[-1].startswith(what)):
                said.append(manager.recv(1000).decode())

        hear("READY=1\nSTATUS=1 workers")
        hear("WATCHDOG=1")
        hear("WATCHDOG=1")
        served.signal(signal.SIGHUP)
        hear("RELOADING=1\nMONOTONIC_USEC=")
        hear("READY=1")
        served.signal(signal.SIGTERM)
        hear("STOPPING=1")
        assert served.end() == 0


ORPHAN = """
import os, sys
if os.fork() == 0 and os.fork() == 0:
    while os.getppid() != 1:
        pass
    open(sys.argv[1], "w")
"""


def test_as_pid_1(tmp_path: Path) -> None:
    """In a PID namespace of its own: signals reach it, orphans are reaped, its end is that of the program."""
    unshare = shutil.which("unshare")
    namespace = [
        unshare or "",
        "--user",
        "--map-root-user",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
    ]
    if unshare is None or subprocess.run([*namespace, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no PID namespace can be made here")
    text = """
def main(ctx):
    ctx.log.info("worker, init %s", open("/proc/1/cmdline").read().split("\\0")[2:5])
    ctx.stopping.wait()
"""
    (tmp_path / "app.py").write_text(text)
    out = tmp_path / "out"
    with open(out, "wb") as file:
        process = subprocess.Popen(
            [*namespace, sys.executable, "-m", "runtime", "serve", "--workers", "1", "app:main"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        until(lambda: "runtime: ready" in out.read_text(), lambda: out.read_text())
        assert "worker, init ['runtime', 'serve', '--workers']" in out.read_text()
        (inner,) = children(process.pid)  # PID 1 of the namespace
        nsenter = ["nsenter", "--user", "--preserve-credentials", "--pid", "--mount", "-t", str(inner)]
        subprocess.run([*nsenter, sys.executable, "-c", ORPHAN, str(tmp_path / "adopted")], check=True)
        until((tmp_path / "adopted").exists)
        until(lambda: not zombies(inner), "the init reaps what it adopts")
        os.kill(inner, signal.SIGTERM)
        assert process.wait(30) == 0, out.read_text()
    finally:
        process.kill()
        process.wait()


def zombies(pid: int) -> list[int]:
    return [
        it for it in children(pid) if Path(f"/proc/{it}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
    ]


# ---- the examples --------------------------------------------------------------------------------


def example(tmp_path: Path, name: str) -> Served:
    return Served(tmp_path, f"{ROOT}/examples/{name}.py:main", "--workers", "2")


def test_the_raw_example(tmp_path: Path) -> None:
    served = example(tmp_path, "serve_raw")
    try:
        assert served.get()[0] == "hello,"
        with socket.create_connection(("127.0.0.1", served.port), 30) as kept:  # keep-alive
            for _ in range(2):
                kept.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert b"generation 1" in kept.recv(1000)
            with load(served.port) as counts:
                served.signal(signal.SIGUSR1)
                served.says("reloaded: generation 2 serves (2 started, 2 drained")
            assert kept.recv(1000) == b"", "a kept connection without a request ends with its worker"
        assert counts["refused"] == counts["failed"] == 0
        served.signal(signal.SIGTERM)
        assert served.end() == 0
    finally:
        served.close()


def test_the_asgi_example(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    served = example(tmp_path, "serve_asgi")
    try:
        with load(served.port) as counts:
            served.signal(signal.SIGUSR1)
            served.says("reloaded: generation 2 serves (2 started, 2 drained")
        assert counts["refused"] == 0 < counts["ok"]
        served.signal(signal.SIGTERM)
        assert served.end() == 0
    finally:
        served.close()


@pytest.mark.promise
@pytest.mark.timeout(120)
def test_reloads_and_kills_under_load(tmp_path: Path) -> None:
    """The load test of the report in short (bench/serving.py has it with wrk): no connection is refused, and
    only what a killed worker had open is lost. A zygote dies, too.
    """
    served = example(tmp_path, "serve_raw")
    rounds, clients = 5, 4
    try:
        with load(served.port, clients) as counts:
            for turn in range(rounds):
                served.signal(signal.SIGUSR1)
                served.says("reloaded: ", turn + 1)
                kill(int(served.get()[4].rstrip(",")))
                served.says("killed by signal 9", turn + 1)
                until(lambda: len(served.pids()) == 2)
            (zygote,) = (pid for pid in children(served.process.pid) if children(pid))
            before = served.pids()
            kill(zygote)
            until(
                lambda: len(served.pids()) == 2 and not served.pids() & before, "workers of the next zygote"
            )
        assert counts["refused"] == 0
        assert counts["failed"] <= clients * rounds
        assert counts["ok"] > 100 * rounds
        served.signal(signal.SIGTERM)
        assert served.end() == 0
    finally:
        served.close()
