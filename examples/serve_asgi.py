"""An ASGI application under uvicorn, on the sockets that `runtime serve` holds.

    pip install uvicorn
    runtime serve --bind 127.0.0.1:8000 --workers 2 examples/serve_asgi.py:main

`app` may be any ASGI application: Starlette, FastAPI, Django, Quart. uvicorn accepts, parses and answers; the
runtime restarts, reloads and drains.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn

import runtime

Message = dict[str, Any]

GRACE = 0.2  # seconds for a connection that was just accepted to send its request: uvicorn would close it


async def app(
    scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    """The application: says who answers."""
    if scope["type"] != "http":
        raise RuntimeError(f"no {scope['type']} here")
    body = f"hello from {os.getpid()}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Server(uvicorn.Server):
    """One that leaves signals to the runtime."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nobody sends any to a worker, but for SIGTERM, which sets ctx.stopping."""
        yield


async def main(ctx: runtime.ServiceContext) -> None:
    """Serve `app` until told to stop; uvicorn then finishes the open requests."""
    server = Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=list(ctx.sockets)))
    stopping = asyncio.create_task(ctx.wait_stopping())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for listener in ctx.sockets:  # Server.close() would lose a connection that it accepts at this moment
        asyncio.get_running_loop().remove_reader(listener)
    await asyncio.sleep(GRACE)
    server.should_exit = True
    await serving
    stopping.cancel()
