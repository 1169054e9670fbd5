"""How tests run the command `runtime serve` or `run`, and speak HTTP with it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from watching import ROOT, until

PATIENCE = 30.0

HTTP = """
import asyncio, os
VERSION = "one"

async def main(ctx):
    open_now = set()

    async def serve(connection):
        reader, writer = await asyncio.open_connection(sock=connection)
        path = (await reader.readuntil(b"\\r\\n\\r\\n")).split()[1].decode()
        body = await answer(ctx, path)
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
        await writer.drain()
        writer.close()

    def accept(listener):
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        task = asyncio.create_task(serve(connection))
        open_now.add(task)
        task.add_done_callback(open_now.discard)

    loop = asyncio.get_running_loop()
    for listener in ctx.sockets:
        listener.setblocking(False)
        loop.add_reader(listener, accept, listener)
    await ctx.wait_stopping()
    for listener in ctx.sockets:
        loop.remove_reader(listener)
    while open_now:
        await asyncio.wait(open_now)

async def answer(ctx, path):
    if path.startswith("/slow"):  # until the file is there
        while not os.path.exists(path.removeprefix("/slow")):
            await asyncio.sleep(0.01)
    if path == "/exit":
        os._exit(3)
    if path == "/raise":
        asyncio.get_running_loop().call_soon(fail)
    return f"{VERSION} {os.getpid()} {ctx.number} {ctx.generation} {ctx.state.add('asked', 1)}".encode()

def fail():
    for task in asyncio.all_tasks():
        task.cancel()
"""


class Command:
    """A command `python -m runtime …` that runs in `folder`; what it says is in `log`."""

    def __init__(
        self, folder: Path, *words: str, environ: dict[str, str] | None = None, **popen: Any
    ) -> None:
        self.file = folder / f"log.{len(list(folder.glob('log.*')))}"
        with open(self.file, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "runtime", *words],
                cwd=folder, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": ROOT, **(environ or {})}, **popen,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self.file.read_text(errors="replace")

    def says(self, text: str, times: int = 1) -> str:
        """Wait until it has said this so often. Everything that it has said."""

        def found() -> bool:
            return self.log.count(text) >= times or self.process.poll() is not None

        until(found, lambda: f"{text!r} x {times} in\n{self.log}")
        assert self.log.count(text) >= times, f"it ended without {text!r}:\n{self.log}"
        return self.log

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end. The exit code."""
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()


class Served(Command):
    """`runtime serve` on a free port."""

    def __init__(self, folder: Path, target: str, *words: str, **more: Any) -> None:
        super().__init__(folder, "serve", "--bind", "127.0.0.1:0", *words, target, **more)
        ready = self.says("runtime: ready")
        (self.port,) = {int(port) for port in re.findall(r"on 127\.0\.0\.1:(\d+)", ready)}

    def get(self, path: str = "/") -> list[str]:
        """The words of the answer. Raises: OSError."""
        return get(self.port, path)

    def pids(self) -> set[int]:
        """The workers: children of the main program's children."""
        return {worker for zygote in children(self.process.pid) for worker in children(zygote)}

    def all_ready(self, workers: int, generation: int = 1) -> list[int]:
        """The pids of the workers that answer, as soon as there are so many of that generation."""
        seen: dict[int, int] = {}

        def found() -> bool:
            _, pid, _, came, _ = self.get()
            if int(came) == generation:
                seen[int(pid)] = 1
            return len(seen) >= workers

        until(found, lambda: f"{workers} workers of generation {generation}; {seen}\n{self.log}")
        return list(seen)


def children(pid: int) -> list[int]:
    """Of all threads of a process; none if it has ended."""
    with contextlib.suppress(OSError):
        files = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        return [int(text) for file in files for text in file.read_text().split()]
    return []


def get(port: int, path: str = "/", timeout: float = PATIENCE) -> list[str]:
    """The words of the answer. Raises: OSError; EOFError for one that is cut off."""
    with socket.create_connection(("127.0.0.1", port), timeout) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while piece := client.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise EOFError(f"cut off after {data!r}")
    return body.decode().split()


@contextlib.contextmanager
def load(port: int, clients: int = 4) -> Iterator[Counter[str]]:
    """Clients that ask again and again meanwhile: how often ok, refused, failed (cut off, reset)."""
    counts: Counter[str] = Counter()
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            try:
                get(port)
                counts["ok"] += 1
            except ConnectionRefusedError:
                counts["refused"] += 1
            except (OSError, EOFError):
                counts["failed"] += 1

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        over.set()
        for thread in threads:
            thread.join()


def kill(pid: int) -> None:
    """SIGKILL to a process that is not ours to wait for, and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], PATIENCE)[0]
    finally:
        os.close(pidfd)
