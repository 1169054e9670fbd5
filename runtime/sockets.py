"""Every zmq socket of the package: hints between host and workers, over sockets in a private folder.

    host PUSH ──► PULL worker      one pair per worker: "look at your ring"
    host PULL ◄── PUSH worker      one PULL for all: "look at my outbox"
    host XPUB ──► SUB  worker      "read your control word" (XPUB is a PUB that sees its subscriptions)

The host binds a fresh path of each for every worker; when that worker is connected on all three, the
paths are unlinked, so a stranger has nothing left to connect to. A context is made after the
fork in a worker, and in the host when its Runtime starts.

A hint may be lost (a full queue, a peer that dies): the region holds the truth, and the rescan finds it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import zmq

from runtime import _core
from runtime.wire import HINT_BYTES, Hint, HintKind, WireError, decode_hint, encode_hint

__all__ = ["CrewLink", "HostLink", "Paths", "WorkerLink", "make_folder"]

MAX_PATH = 107  # bytes of a socket's path: sun_path less its end
_LONGEST_NAME = len("/65535-ffffffff.up")
_GREETING = 100  # milliseconds between two looks whether a welcome may still come
_COMMAND = 32  # bytes that zmq puts around a topic when it subscribes
_QUEUE = 100_000  # hints that may wait for a peer that does not read


_send = zmq.backend.Socket.send  # without what zmq.Socket.send does for other kinds of message
_NOBLOCK = int(zmq.NOBLOCK)  # arithmetic with an enum takes as long as all the rest of a send


class Paths(NamedTuple):
    """Where a worker connects."""

    up: str  # to the host's PULL
    down: str  # to the host's PUSH
    control: str  # to the host's XPUB


def make_folder() -> str:
    """A new folder for socket files, for this user alone (0700).

    In XDG_RUNTIME_DIR, else the temporary folder, else /tmp: the first that can be written and whose
    paths fit a socket address. Raises: OSError that says what is wrong with each and what to do.
    """
    import tempfile  # not at the top: a worker needs none of it, and it brings a lot along

    tried = []
    for name, parent in _parents():
        if not parent:
            continue
        try:
            folder = tempfile.mkdtemp(prefix="runtime-", dir=parent)
        except OSError as error:
            tried.append(f"{name} ({parent}): {error.strerror or error}")
            continue
        if len(os.fsencode(folder)) + _LONGEST_NAME <= MAX_PATH:
            return folder
        os.rmdir(folder)
        tried.append(f"{name} ({parent}): socket paths there would be over {MAX_PATH} bytes")
    raise OSError(
        "no folder for the runtime's sockets: "
        + "; ".join(tried)
        + ". Set TMPDIR or XDG_RUNTIME_DIR to a short, writable folder."
    )


def _parents() -> Iterator[tuple[str, str | None]]:
    import tempfile

    yield "XDG_RUNTIME_DIR", os.environ.get("XDG_RUNTIME_DIR")
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:  # none of its candidates can be written
        temporary = None
        yield "the temporary folder", os.environ.get("TMPDIR") or str(error)
    yield "the temporary folder", temporary
    if temporary != "/tmp":
        yield "/tmp", "/tmp"


def _new_context() -> zmq.Context[zmq.Socket[bytes]]:
    context = zmq.Context(io_threads=1)
    context.setsockopt(zmq.LINGER, 0)
    context.setsockopt(zmq.MAXMSGSIZE, HINT_BYTES + _COMMAND)
    context.setsockopt(zmq.SNDHWM, _QUEUE)
    context.setsockopt(zmq.RCVHWM, _QUEUE)
    return context


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


class HostLink:
    """The host's sockets.

    Thread-safety: `poll` belongs to the collector, `send` and `wake` may be called from any thread, all else
    is the supervisor's. These two share a lock for the sockets that both use, which `poll` does not hold
    while it waits; nobody else takes it (see locks.py). A zmq descriptor is edge-triggered and any call on
    its socket may swallow the edge, so each call from outside wakes the poller.
    Fork-safety: none; a fork must not call it. Blocking: only `poll`.
    """

    def __init__(self, folder: str, slots: int) -> None:
        self.folder = folder
        self.strangers = 0  # messages that were malformed, or of a process that is gone
        self.inert = False  # in a fork of the host: everything here is the parent's
        self._lock = threading.RLock()
        self._context = _new_context()
        self._context.set(zmq.MAX_SOCKETS, 16 + 2 * slots)
        self._pull = self._context.socket(zmq.PULL)
        self._control = self._context.socket(zmq.XPUB)
        for socket in (self._pull, self._control):
            socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        self._push: dict[int, _core.Outlet] = {}
        self._held: list[_core.Outlet] = []  # closed ones that somebody was inside of
        self._ending = False  # zmq's threads end as soon as nobody is
        self._bound: dict[int, Paths] = {}
        self._count = 0
        self._bell = _core.Bell()
        self._poller = select.poll()
        for fd in (self._bell.fd, self._pull.FD, self._control.FD):
            self._poller.register(fd, select.POLLIN)

    def open(self, slot: int) -> Paths:
        """Bind fresh paths for a new worker in `slot`. Raises: OSError, and nothing is left bound."""
        with self._lock:
            self._count += 1
            stem = f"{self.folder}/{slot}-{self._count:x}"
            paths = Paths(f"{stem}.up", f"{stem}.down", f"{stem}.ctl")
            if not os.path.isdir(self.folder):  # a cleaner of temporary files has been here
                os.mkdir(self.folder, 0o700)
            for path in paths:
                if os.path.lexists(path):
                    raise FileExistsError(f"{path} exists already: somebody else writes into {self.folder}")
            try:
                push = self._context.socket(zmq.PUSH)
                self._push[slot] = _core.Outlet(_send, push, _NOBLOCK)
                self._bound[slot] = paths
                push.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
                with _umask(0o177):
                    self._pull.bind(f"ipc://{paths.up}")
                    push.bind(f"ipc://{paths.down}")
                    self._control.bind(f"ipc://{paths.control}")
            except zmq.ZMQError as error:
                self.close_slot(slot)
                raise OSError(error.errno, f"sockets in {self.folder} cannot be made: {error}") from error
        self.wake()
        return paths

    def hide(self, slot: int) -> None:
        """The worker is connected: unlink its paths, so that nobody else can. Idempotent.

        The listeners stay open behind them: libzmq ends a connection together with the listener that made it.
        """
        for path in self._bound.get(slot, ()):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def close_slot(self, slot: int) -> None:
        """The worker is gone: close its listeners, and with them its connections. Idempotent."""
        self.hide(slot)
        with self._lock:
            paths = self._bound.pop(slot, None)
            if paths is None:
                return
            for socket, path in ((self._pull, paths.up), (self._control, paths.control)):
                with contextlib.suppress(zmq.ZMQError):
                    socket.unbind(f"ipc://{path}")
            push = self._push.pop(slot, None)
            if push is not None:
                push.close()
                self._held = [it for it in (*self._held, push) if it.held]
        self.wake()

    def is_open(self, slot: int) -> bool:
        """Whether there is a socket to the worker in `slot`."""
        return slot in self._push

    def send(self, kind: HintKind, slot: int, incarnation: int) -> bool:
        """Send a hint to the worker in `slot`. False: it is not connected, or does not read."""
        push = None if self.inert else self._push.get(slot)
        if push is None:
            return False
        try:
            return push.send(encode_hint(kind, slot, incarnation))
        except zmq.ZMQError:
            return False
        finally:
            if push.closed:  # under us
                self._end()

    def publish(self, slot: int, incarnation: int) -> None:
        """Tell a worker to read its control word."""
        with self._lock:
            if not self._control.closed:
                self._control.send(encode_hint(HintKind.CONTROL, slot, incarnation), _NOBLOCK)
        self.wake()

    def wake(self) -> None:
        """Make `poll` return. Harmless after `close`."""
        if not self.inert:
            self._bell.ring()

    def poll(self, timeout: float) -> list[Hint]:
        """Hints that have come, after at most `timeout` seconds; a subscription reads as CONTROL."""
        hints = self._receive()
        if not hints:
            self._poller.poll(timeout * 1000)
            self._bell.silence()
            hints = self._receive()
        return hints

    def _receive(self) -> list[Hint]:
        hints: list[Hint] = []
        with self._lock:
            for socket, skip in ((self._pull, 0), (self._control, 1)):
                while True:
                    try:
                        data = socket.recv(_NOBLOCK)
                    except zmq.Again:
                        break
                    if skip and data[:1] != b"\x01":
                        continue  # an unsubscription: the worker is gone, which its pidfd tells too
                    try:
                        hints.append(decode_hint(data[skip:]))
                    except WireError:
                        self.strangers += 1
        return hints

    def close(self) -> None:
        """Close every socket and remove the folder. Idempotent.

        A socket that somebody is inside of is not closed under him: he does it, and ends zmq's threads. He
        may be in a signal handler that waits for this.
        """
        for slot in list(self._push):
            self.close_slot(slot)
        with self._lock:
            if self._control.closed:
                return
            self._pull.close(0)
            self._control.close(0)
            self._bell.close()
        self._ending = True
        self._end()
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    def _end(self) -> None:
        """End zmq's threads, if everything is closed and nobody is inside of anything."""
        if not any([push.held for push in self._held]):
            mine, self._ending = self._ending, False  # in one step: two may be here
            if mine:
                self._context.destroy(0)


class WorkerLink:
    """A worker's sockets. Thread-safety: for the worker's main thread alone."""

    def __init__(self, paths: Paths, slot: int, incarnation: int) -> None:
        self._look = encode_hint(HintKind.LOOK, slot, incarnation)
        self._hello = encode_hint(HintKind.HELLO, slot, incarnation)
        self._again = encode_hint(HintKind.AGAIN, slot, incarnation)
        self._context = _new_context()
        self._push = self._context.socket(zmq.PUSH)
        self._pull = self._context.socket(zmq.PULL)
        self._control = self._context.socket(zmq.SUB)
        # The topic is the whole hint: this worker's control word, and no other's.
        self._control.setsockopt(zmq.SUBSCRIBE, encode_hint(HintKind.CONTROL, slot, incarnation))
        self._push.connect(f"ipc://{paths.up}")
        self._pull.connect(f"ipc://{paths.down}")
        self._control.connect(f"ipc://{paths.control}")
        self._poller = select.poll()
        for socket in (self._pull, self._control):
            self._poller.register(socket.FD, select.POLLIN)

    def greet(self, give_up: Callable[[], bool]) -> bool:
        """Say hello until the host is connected on all three sockets. False: gave up.

        Again and again: if a stranger has connected to the host's PUSH too, every other welcome is his.
        """
        while not give_up():
            self.hello()
            if self._pull.poll(_GREETING):
                self._pull.recv()
                return True
        return False

    def hello(self) -> None:
        """Tell the host that this worker is connected to its PULL."""
        with contextlib.suppress(zmq.Again):
            self._push.send(self._hello, _NOBLOCK)

    def notify(self) -> None:
        """Tell the host to look at the outbox and the phase."""
        with contextlib.suppress(zmq.Again):
            self._push.send(self._look, _NOBLOCK)

    def wait(self, timeout: float) -> None:
        """Until a hint comes, or for `timeout` seconds. Look at everything after it, whatever it says.

        It is read by `forget`, before the next wait: until then there is better to do.
        """
        self._poller.poll(timeout * 1000)

    def forget(self) -> bool:
        """Read the hints that have come: what they tell of has been looked at, or will be before the wait.

        True: only AGAIN came. Hints keep their order, so the one that it repeats was lost, not late.
        """
        came = repeated = 0
        for socket in (self._pull, self._control):
            with contextlib.suppress(zmq.Again):  # the descriptor is quiet from here on
                while True:
                    repeated += socket.recv(_NOBLOCK) == self._again
                    came += 1
        return 0 < came == repeated

    def close(self) -> None:
        """Send what is queued, then close."""
        for socket in (self._push, self._pull, self._control):
            socket.close(200)  # milliseconds: the last hint should still leave
        self._context.term()


class CrewLink(WorkerLink):
    """A worker's sockets, with a PUSH that any of its threads may send through. Else as WorkerLink."""

    def __init__(self, paths: Paths, slot: int, incarnation: int) -> None:
        super().__init__(paths, slot, incarnation)
        self._incarnation = incarnation
        self._outlet = _core.Outlet(_send, self._push, _NOBLOCK)
        self._tell = self.notifier(slot)

    def notifier(self, slot: int) -> Callable[[], None]:
        """What tells the host to look at the outbox of a lane. Thread-safety: any thread."""
        look = encode_hint(HintKind.LOOK, slot, self._incarnation)

        def notify() -> None:
            with contextlib.suppress(zmq.Again):
                self._outlet.send(look)

        return notify

    def notify(self) -> None:
        """Tell the host to look at the outbox of the first lane, and at the phase."""
        self._tell()

    def watch(self, fd: int) -> None:
        """`wait` also ends when there is something to read from this descriptor."""
        self._poller.register(fd, select.POLLIN)
