"""The application that all servers of serving.py run: one small answer, as ASGI, WSGI, and a service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

BODY = b"hello\n"
# wrk believes in the answer's header, not in its own, and uWSGI sends none.
HEADERS = [
    (b"content-type", b"text/plain"),
    (b"content-length", b"%d" % len(BODY)),
    (b"connection", b"close"),
]


async def app(scope: dict[str, Any], receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """ASGI."""
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


def wsgi(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> list[bytes]:
    """WSGI."""
    start_response("200 OK", [(name.decode(), value.decode()) for name, value in HEADERS])
    return [BODY]


async def main(ctx: Any) -> None:
    """The ASGI application under uvicorn, as a service of `runtime serve`."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(app, lifespan="off", log_level="error", access_log=False)
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=list(ctx.sockets)))
    await ctx.wait_stopping()
    for listener in ctx.sockets:  # as examples/serve_asgi.py
        asyncio.get_running_loop().remove_reader(listener)
    await asyncio.sleep(0.2)
    server.should_exit = True
    await serving
