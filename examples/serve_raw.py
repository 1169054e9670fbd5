"""An HTTP service on bare asyncio, kept up by `runtime serve`.

    runtime serve --bind 127.0.0.1:8000 --workers 2 examples/serve_raw.py:main
    curl http://127.0.0.1:8000/          counts the requests of all workers, over crashes and reloads

While it runs: edit it and `kill -USR1` the main program, or `kill -9` a worker. No connection is refused: the
listening socket belongs to the main program. A worker that reloads finishes the requests that it has taken,
and only what a killed worker had open is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import runtime

GREETING = "hello"


class Connections:
    """The open connections of this worker, and which of them wait for another request."""

    def __init__(self, ctx: runtime.ServiceContext) -> None:
        self.ctx = ctx
        self.tasks: set[asyncio.Task[None]] = set()
        self.idle: set[asyncio.StreamWriter] = set()

    def accept(self, listener: socket.socket) -> None:
        """Take one connection, if no other worker was quicker. Without a wait, so that none is half taken."""
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            connection, _ = listener.accept()
            task = asyncio.create_task(self.serve(connection))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def serve(self, connection: socket.socket) -> None:
        """One connection, until its end."""
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            while await self.answer(reader, writer):
                self.idle.add(writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client has left, or it does not talk HTTP
        finally:
            self.idle.discard(writer)
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request. Whether the connection stays open."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.idle.discard(writer)
        stays = b"connection: close" not in head.lower() and not self.ctx.stopping.is_set()
        count = self.ctx.state.add("requests", 1)  # of all workers
        body = f"{GREETING}, request {count}, from {os.getpid()}, generation {self.ctx.generation}\n"
        lines = ["HTTP/1.1 200 OK", "Content-Type: text/plain", f"Content-Length: {len(body)}"]
        lines += [] if stays else ["Connection: close"]
        writer.write("\r\n".join([*lines, "", body]).encode())
        await writer.drain()
        return stays


async def main(ctx: runtime.ServiceContext) -> None:
    """Serve until told to stop; then finish what has been begun, and return."""
    connections = Connections(ctx)
    loop = asyncio.get_running_loop()
    for listener in ctx.sockets:
        listener.setblocking(False)
        loop.add_reader(listener, connections.accept, listener)
    await ctx.wait_stopping()
    for listener in ctx.sockets:
        loop.remove_reader(listener)  # the others accept, and the next generation
    await asyncio.sleep(0)
    for writer in list(connections.idle):
        writer.close()  # a kept connection without a request
    if connections.tasks:
        await asyncio.wait(connections.tasks)
