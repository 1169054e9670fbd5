"""A listening socket whose connections have a thread each."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time

import pytest
from watching import until

from runtime import listening


class Starved(socket.socket):
    """A listening socket of a process that has no descriptor left, while that is said."""

    starved = True
    attempts = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.attempts += 1
        if self.starved:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def listener(sock: socket.socket) -> listening.Listener:
    return listening.Listener(
        sock, lambda client: client.sendall(b"served"), lambda client: None, most=2, name="listening"
    )


def bound(sock: socket.socket) -> socket.socket:
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def test_without_descriptors_it_does_not_spin() -> None:
    """And who waits is served as soon as there is one."""
    sock = Starved()
    found = listener(bound(sock))
    found.start()
    with contextlib.closing(found), socket.create_connection(sock.getsockname(), 30) as client:
        began = time.monotonic()
        until(lambda: sock.attempts >= 4)
        attempts = sock.attempts
        assert attempts <= 2 + (time.monotonic() - began) / listening.PAUSE
        sock.starved = False
        assert client.recv(100) == b"served"


def closed_in_a_fork(found: listening.Listener) -> int:
    """Descriptors that a fork has less than we have."""
    before = len(os.listdir("/proc/self/fd"))
    pid = os.fork()
    if pid == 0:
        try:
            found.close()  # does nothing here
            os._exit(before - len(os.listdir("/proc/self/fd")))
        finally:
            os._exit(100)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_fork_has_nothing_of_it() -> None:
    found = listener(bound(socket.socket()))
    found.start()
    with contextlib.closing(found):
        assert closed_in_a_fork(found) == 2


def test_a_fork_while_it_is_being_closed() -> None:
    """Here the thread that accepts is late, since it refuses somebody."""
    refusing, go = threading.Event(), threading.Event()

    def refuse(client: socket.socket) -> None:
        refusing.set()
        go.wait()

    sock = bound(socket.socket())
    found = listening.Listener(sock, lambda client: None, refuse, most=0, name="listening")
    found.start()
    with socket.create_connection(sock.getsockname(), 30):
        refusing.wait()
        closing = threading.Thread(target=found.close)
        closing.start()
        until(lambda: select.select([found._ended], [], [], 0)[0], "it was told to end")
        closed = closed_in_a_fork(found)
        go.set()
        closing.join()
    assert closed == 2


def test_without_a_thread_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py looks for descriptors."""
    found = listener(bound(socket.socket()))

    def start() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(found._thread, "start", start)
    with pytest.raises(RuntimeError, match="new thread"):
        found.start()
    assert found not in listening._living
