"""The name of a runtime, under which `runtime ctl` finds it: a socket in a folder of this user's.

    $XDG_RUNTIME_DIR/runtime/NAME       or, without that, runtime-UID/NAME in the temporary folder (0700)
                            /NAME~      flock'ed for as long as the owner lives; holds its pid

The lock says who owns a name, and the kernel gives it back when its owner ends, however that is. So a dead
name is known at once and taken over: under the lock the old socket is unlinked and a new one bound. The file
of the lock is unlinked before it is closed; who has opened it meanwhile sees that it has no name left, and
begins anew. A SIGKILL at any point leaves files that nobody has locked: the zygote removes them, or the next
owner does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time

__all__ = ["Name", "NameTaken", "NoPlace", "control_path", "live_names", "remove_dead", "trust_folder"]

_MAX_PATH = 107  # bytes of a socket's path: sun_path less its end
_PATIENCE = 0.1  # seconds for others who look whether a name is dead, and for owners that come and go
_BACKLOG = 64


class NameTaken(RuntimeError):
    """Another process owns the name."""


class NoPlace(OSError):
    """The folder of names cannot be had, or not be trusted."""


def control_path(name: str) -> str:
    """Where the socket of that name is, if there is one."""
    return os.path.join(_folder(), name)


def _folder() -> str:
    parent = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(parent):  # its specification has it so; another would change with the working directory
        return os.path.join(parent, "runtime")
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"runtime-{os.getuid()}")


def trust_folder() -> None:
    """For who asks by a name. Raises: NoPlace if another user may have made the sockets that are there.

    Root may ask the runtimes of a user, to whose folder XDG_RUNTIME_DIR points then.
    """
    if os.geteuid() != 0 or not os.environ.get("XDG_RUNTIME_DIR"):
        _check_private(_folder())


def live_names() -> list[str]:
    """The names that have an owner now."""
    try:
        trust_folder()
        found = [entry[:-1] for entry in os.listdir(_folder()) if entry.endswith("~")]
    except OSError:
        return []
    return sorted(name for name in found if _listens(control_path(name)))


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN)  # that: more wait for it than it has room for


class Name:
    """A name that this process owns, and the socket that listens under it.

    Thread-safety: none needed. Fork-safety: a fork has to call `forget`.
    """

    def __init__(self, name: str) -> None:
        """Take the name. Raises: NameTaken; NoPlace; OSError for want of descriptors."""
        self.name = name
        self.path = control_path(name)
        if len(os.fsencode(self.path)) > _MAX_PATH:
            raise NoPlace(
                f"the socket {self.path} of the name {name!r} would have a path of over {_MAX_PATH} bytes: "
                "choose a shorter name, or set XDG_RUNTIME_DIR to a shorter folder"
            )
        _make_private(os.path.dirname(self.path))
        self._lock = -1
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._lock = _lock(self.path, name)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            self.socket.bind(self.path)  # the folder keeps others out, whatever the umask
            os.chmod(self.path, 0o600)
            self.socket.listen(_BACKLOG)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the name back. Idempotent."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                _remove(self.path, self._lock)
        self.forget()

    def forget(self) -> None:
        """In a fork: the parent keeps it."""
        self.socket.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_dead(path: str) -> None:
    """Remove the files of a name whose owner has ended, unless somebody else has it by now."""
    with contextlib.suppress(OSError):
        fd = os.open(f"{path}~", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path, fd)
        finally:
            os.close(fd)


def _remove(path: str, lock: int) -> None:
    """By who has the lock. If its file has lost its name, to one who tidies up, the path may be another's."""
    if _is_at(lock, f"{path}~"):
        for file in (path, f"{path}~"):
            with contextlib.suppress(OSError):
                os.unlink(file)


def _make_private(folder: str) -> None:
    """A folder for this user alone. Raises: NoPlace."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
    except OSError as error:
        raise _no_folder(folder, error) from None
    _check_private(folder)


def _check_private(folder: str) -> None:
    """Raises: NoPlace for a folder that is none, or that others may use."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _no_folder(folder, error) from None
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise NoPlace(f"the folder {folder} belongs to user {found.st_uid}, not to this one")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise NoPlace(f"others may use the folder {folder}: chmod 700 it")
    finally:
        os.close(fd)


def _no_folder(folder: str, error: OSError) -> NoPlace:
    return NoPlace(f"the folder {folder} for the sockets of names: {error.strerror}")


def _lock(path: str, name: str) -> int:
    """The locked descriptor. Raises: NameTaken, OSError."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        fd = os.open(f"{path}~", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, f"{path}~"):
                return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = _owner(fd)
                os.close(fd)
                raise NameTaken(
                    f"there is a runtime named {name!r} already ({owner}): choose another name"
                ) from None
            time.sleep(_PATIENCE / 20)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    """Whether this is still the file of that name."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _owner(fd: int) -> str:
    match = re.fullmatch(rb"(\d+)\n", os.pread(fd, 32, 0))
    return f"pid {int(match[1])}" if match else "it is just starting"
