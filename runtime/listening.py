"""Listening sockets of the host's: how they are made, and a thread for each connection of few clients."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import weakref
from collections.abc import Callable

__all__ = ["Listener", "listen_tcp"]

PAUSE = 0.05  # seconds until a connection is taken again after there was no descriptor, or no thread, for one


def listen_tcp(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket; no host is every address, of IPv4 and IPv6. Raises: OSError, OverflowError."""
    if not host:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=dual)
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(address[:2], family=family, backlog=backlog)


class Listener:
    """Serves the connections of a listening socket, from `start` to `close`.

    serve: called with each connection, in a thread of its own, which closes it. refuse: called instead with
    one that is too many, in the thread that accepts. Thread-safety: `close` from any thread. Fork-safety: a
    fork has nothing of it; `forget` is called there.
    """

    def __init__(
        self,
        listener: socket.socket,
        serve: Callable[[socket.socket], None],
        refuse: Callable[[socket.socket], None],
        *,
        most: int,
        name: str,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self._listener = listener
        self._serve, self._refuse, self._forget = serve, refuse, forget
        self._most, self._name = most, name
        self._clients: set[socket.socket] = set()
        self._closing = threading.Lock()  # taken by the one that closes, and never given back
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        _living.add(self)

    def start(self) -> None:
        """Accept from now on. Raises: RuntimeError when there is no thread for it; then it is closed."""
        self._listener.setblocking(False)
        try:
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Accept no more; what is due to those who are connected is still sent. Idempotent."""
        if not self._closing.acquire(blocking=False):
            return
        os.eventfd_write(self._ended, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RD)
        _living.discard(self)  # now: a fork while it ends must have nothing of it either
        os.close(self._ended)

    def _accept(self) -> None:
        either, end = select.poll(), select.poll()
        either.register(self._listener.fileno(), select.POLLIN)
        for poller in (either, end):
            poller.register(self._ended, select.POLLIN)
        while self._ended not in {fd for fd, _ in either.poll()}:
            try:
                self._take()
            except (OSError, RuntimeError):  # no descriptor: it waits on. No thread: it may ask again
                end.poll(PAUSE * 1000)  # what waits would be reported at once, over and over

    def _take(self) -> None:
        """The next connection. Raises: OSError, RuntimeError when descriptors or threads are lacking."""
        client, _ = self._listener.accept()
        client.setblocking(True)
        if len(self._clients) >= self._most:
            with client:
                self._refuse(client)
        else:
            self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        self._clients.add(client)
        try:
            threading.Thread(
                target=self._run, args=(client,), name=f"{self._name}-client", daemon=True
            ).start()
        except BaseException:
            self._clients.discard(client)
            client.close()
            raise

    def _run(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError):
                self._serve(client)
        finally:
            self._clients.discard(client)

    def _forked(self) -> None:
        self._closing = threading.Lock()
        self._closing.acquire()  # there is nothing to close here
        self._listener.close()
        os.close(self._ended)
        for client in list(self._clients):
            client.close()
        self._forget()


_living: weakref.WeakSet[Listener] = weakref.WeakSet()


def _forked() -> None:
    for listener in list(_living):
        listener._forked()
    _living.clear()


os.register_at_fork(after_in_child=_forked)
