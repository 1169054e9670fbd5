"""The host's handle of a zygote: orders to it, reports from it, its end. The process itself is zygote.py."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import pickle
import signal
import socket
import sys
from collections import deque
from typing import Any, NamedTuple

from runtime import _core
from runtime.channels import HostEnds, readable
from runtime.state import SharedState
from runtime.wire import REPORT_BYTES, WireError, decode_report, encode_report

__all__ = ["FIRST_FD", "QUIT_WAIT", "ZYGOTE_FDS", "Heir", "Report", "Zygote", "exec_zygote"]

FIRST_FD = 3  # the first of the descriptors that a fresh zygote gets …
ZYGOTE_FDS = 6  # … and how many they are, before those of a service
QUIT_WAIT = 2.0  # seconds that a zygote has to end
_STACK = 1 << 16  # bytes of a stack, at most


class Report(NamedTuple):
    """What the zygote says: the fields, and the descriptors that came along."""

    what: str
    fields: dict[str, Any]
    fds: list[int]


class Zygote:
    """The host's handle of a zygote process, however that was made. Owns the descriptors that it is given.

    Thread-safety: for the supervisor's thread, but for `kill`. Fork-safety: in a fork it is inert.
    """

    def __init__(self, connection: socket.socket, pid: int, pidfd: int, stack_fd: int) -> None:
        self.socket = connection
        self.socket.setblocking(False)
        self.pid, self.pidfd, self.stack_fd = pid, pidfd, stack_fd
        self._code: int | None = None
        self.generation = 1  # of the code that it has imported
        self.leave_by = 0.0  # monotonic time at which it is killed, 0: it is not asked to leave
        self.importing = ""  # the preload module that is being imported now
        self.started = False  # it forks from now on
        self.unsent: deque[bytes] = deque()

    def order(self, what: str, **fields: Any) -> None:
        """Send an order, or queue it while the zygote has too many unread. Its end is reported elsewhere."""
        self.unsent.append(encode_report(what, **fields))
        self.send()

    def send(self) -> None:
        """Send what is queued, as far as there is room."""
        try:
            while self.unsent:
                self.socket.send(self.unsent[0], socket.MSG_NOSIGNAL)
                self.unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()

    def reports(self) -> list[Report]:
        """What has come; an empty what: the zygote has closed its end."""
        found: list[Report] = []
        while True:
            try:
                data, fds = _receive(self.socket, 1 + HostEnds.COUNT)
            except BlockingIOError:
                return found
            except ConnectionResetError:  # it died with orders unread; what it had reported comes next
                continue
            except OSError:
                data, fds = b"", []
            if not data:
                found.append(Report("", {}, []))
                return found
            try:
                fields = decode_report(data)
            except WireError:
                continue
            found.append(Report(fields["what"], fields, fds))

    def stack(self) -> str:
        """The Python stack that a slow import left."""
        size = os.lseek(self.stack_fd, 0, os.SEEK_END)
        return os.pread(self.stack_fd, min(size, _STACK), max(0, size - _STACK)).decode(errors="replace")

    def heir(self, report: Report) -> Heir:
        """The way to the heir that a report has brought. Raises: OSError when a descriptor is lacking."""
        try:
            if len(report.fds) != 1:
                raise OSError(errno.EMFILE, "a descriptor got lost on its way")
            stack_fd = os.dup(self.stack_fd)
        except OSError:
            for fd in report.fds:
                os.close(fd)
            raise
        return Heir(socket.socket(fileno=report.fds[0]), stack_fd)

    def wait(self) -> int | None:
        """Until it has ended. Its exit code; None: unknown, as an heir's, which is not a child of ours."""
        readable(self.pidfd, None)
        with contextlib.suppress(ChildProcessError):
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            assert found is not None
            self._code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return self._code

    def kill(self) -> None:
        """SIGKILL, through the pidfd."""
        with contextlib.suppress(ProcessLookupError, OSError):
            _core.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self, patience: float) -> None:
        """Ask it to quit, wait, and kill it when it has not gone after `patience` seconds."""
        self.order("quit")
        if not readable(self.pidfd, patience):
            self.kill()
        self.wait()
        self.socket.close()
        for fd in (self.pidfd, self.stack_fd):
            os.close(fd)


class Heir:
    """The host's way to a spare zygote, from before that was forked. Owns both descriptors."""

    def __init__(self, connection: socket.socket, stack_fd: int) -> None:
        self._connection = connection
        self._stack_fd = stack_fd

    @property
    def pid(self) -> int:
        """Its pid, as soon as it has said that it is there; 0: not yet."""
        with contextlib.suppress(OSError, WireError):
            data = self._connection.recv(REPORT_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return int(decode_report(data).get("pid", 0))
        return 0

    def meet(self) -> Zygote | None:
        """Its handle, once it has said that it is there; what this owned is the handle's from then on.

        None: it has not yet. Raises: EOFError when it never will, and this is closed.
        """
        fds: list[int] = []
        try:
            data, fds = _receive(self._connection, 1)
            fields = decode_report(data) if data and fds else {}
        except BlockingIOError:
            return None
        except (OSError, WireError):
            fields = {}
        if fields.get("what") == "here":
            return Zygote(self._connection, fields["pid"], fds[0], self._stack_fd)
        self._forget(fds)
        raise EOFError("there is no heir")

    def close(self, patience: float) -> None:
        """End it, if it is there. Blocking: for so many seconds, if it says nothing; it ends when it does."""
        readable(self._connection.fileno(), patience)
        with contextlib.suppress(EOFError):
            zygote = self.meet()
            if zygote is not None:
                zygote.close(0.0)
            else:
                self._forget([])

    def _forget(self, fds: list[int]) -> None:
        for fd in (*fds, self._stack_fd):
            os.close(fd)
        self._connection.close()


def _receive(connection: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """A report, without waiting, and at most so many descriptors, which no program that is started inherits.

    socket.recv_fds leaves its flags out in CPython 3.11. Raises: BlockingIOError when there is none; OSError.
    """
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(REPORT_BYTES, socket.CMSG_LEN(most * fds.itemsize), flags)
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) // fds.itemsize * fds.itemsize])
    return data, list(fds)


def exec_zygote(
    settings: dict[str, Any], arena: _core.Arena, state: SharedState, environment: dict[str, str]
) -> Zygote:
    """A zygote that is a fresh interpreter. Raises: OSError when no process can be made.

    Not by subprocess.Popen: that reads a pipe until its writing end is closed, which a fork by another thread
    of the host's may have got, and may hold for as long as it lives.
    """
    import subprocess

    if not sys.executable:
        raise OSError(
            "sys.executable is empty: an embedded Python cannot start workers; set it to a Python binary"
        )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Nothing is garbage yet: collecting while the interpreter starts takes longer than some of the imports.
    path = f"sys.path.insert(0, {root!r})"
    code = f"import gc, sys; gc.disable(); {path}; from runtime.zygote import main; main()"
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    with contextlib.ExitStack() as passed, contextlib.ExitStack() as kept:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        kept.callback(ours.close)
        passed.callback(theirs.close)
        host = _core.pidfd_open(os.getpid())
        passed.callback(os.close, host)
        service, beyond = settings["service"], FIRST_FD + ZYGOTE_FDS
        more = service.fds if service is not None else ()
        there = {**settings, "service": service.at(beyond) if service is not None else None}
        config = _written(b"runtime-zygote", pickle.dumps(there, protocol=5))
        passed.callback(os.close, config)
        stack_fd = _core.memfd_create(b"runtime-stack")
        kept.callback(os.close, stack_fd)
        # The child gets /dev/null as 0, keeps 1 and 2, and has these next, in this order.
        actions: list[Any] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        for fd in (theirs.fileno(), arena.fd, state.region.fd, host, config, stack_fd, *more):
            above = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, beyond + len(more))
            passed.callback(os.close, above)
            actions.append((os.POSIX_SPAWN_DUP2, above, FIRST_FD + len(actions) - 1))
        pid = os.posix_spawnp(
            sys.executable, [sys.executable, *flags, "-P", "-c", code], environment,
            file_actions=actions, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )  # fmt: skip
        passed.close()  # so there is a descriptor
        pidfd = _core.pidfd_open(pid)
        kept.pop_all()  # they are the handle's
    return Zygote(ours, pid, pidfd, stack_fd)


def _written(name: bytes, data: bytes) -> int:
    """A memfd that holds `data`."""
    fd = _core.memfd_create(name)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
