"""The listening sockets of `runtime serve`: those that it binds, and those that systemd hands over.

They belong to the main program and are inherited by every worker of every generation. So while it lives a
connection is accepted by the kernel, whoever reloads or dies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable, Iterator, MutableMapping

from runtime import config
from runtime.cli.exits import Usage
from runtime.listening import listen_tcp

__all__ = ["address_of", "host_and_port", "listeners"]

_FIRST = 3  # of the descriptors that systemd hands over


@contextlib.contextmanager
def listeners(
    binds: Iterable[str], backlog: int, environ: MutableMapping[str, str]
) -> Iterator[list[socket.socket]]:
    """The sockets of LISTEN_FDS, then one for each of `binds`; closed at the end.

    Raises: Usage for what cannot be bound; the message names it.
    """
    with contextlib.ExitStack() as stack:
        found = inherited(environ)
        for sock in found:
            stack.callback(sock.close)
        for text in binds:
            found.append(_bound(text, backlog, stack))
        yield found


def inherited(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """What systemd has passed to this process (sd_listen_fds); workers do not see its variables.

    Raises: Usage
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if not count or pid != str(os.getpid()):
        return []
    if not count.isdecimal():
        raise Usage(f"LISTEN_FDS is {count!r} in the environment: it must be a number of descriptors")
    found = []
    for fd in range(_FIRST, _FIRST + int(count)):
        try:
            sock = socket.socket(fileno=fd)
            if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError("it does not listen")
        except OSError as error:
            raise Usage(f"descriptor {fd} of LISTEN_FDS is no listening socket: {error}") from None
        os.set_inheritable(fd, False)
        found.append(sock)
    return found


def host_and_port(text: str) -> tuple[str, int]:
    """As config.host_and_port. Raises: Usage."""
    try:
        return config.host_and_port(text)
    except ValueError as error:
        raise Usage(str(error)) from None


def address_of(sock: socket.socket) -> str:
    """Where a socket listens, for people."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name)}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"{host}:{name[1]}"


def _bound(text: str, backlog: int, stack: contextlib.ExitStack) -> socket.socket:
    try:
        if text.startswith("unix:"):
            return _bound_unix(text.removeprefix("unix:"), backlog, stack)
        host, port = host_and_port(text)
        return stack.enter_context(listen_tcp(host, port, backlog))
    except (OSError, OverflowError) as error:  # that: of the backlog
        raise Usage(f"cannot listen on {text}: {getattr(error, 'strerror', None) or error}") from None


def _bound_unix(path: str, backlog: int, stack: contextlib.ExitStack) -> socket.socket:
    """A path that nobody listens on any more is replaced; at the end it is removed, if it is still ours."""
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("there is a file, and it is no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError("somebody listens there")
    sock.bind(path)
    made = os.stat(path)
    stack.callback(_unlink, path, (made.st_dev, made.st_ino))
    sock.listen(backlog)
    return sock


def _unlink(path: str, identity: tuple[int, int]) -> None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if (found.st_dev, found.st_ino) == identity:
            os.unlink(path)
