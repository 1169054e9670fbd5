"""The file behind a region: made, reserved, named, examined. No mapping happens here.

0       header page: what `pack_header` writes (region_about in _region.pxd), then words of the pool
4096    data, rounded up to a page
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import NamedTuple

__all__ = [
    "FOLDER",
    "LARGEST",
    "Facts",
    "examine",
    "file_bytes",
    "link",
    "name_taken",
    "open_named",
    "open_unnamed",
    "pack_header",
    "path_of",
]

FOLDER = "/dev/shm"
HEADER_BYTES = 4096
VERSION = 1  # raised with every change of the format
LARGEST = 1 << 47  # bytes that a process can address
_MAGIC = 0x31474E5254524D54
_ABOUT = struct.Struct("=QIIQQQQ")


class Facts(NamedTuple):
    """What a valid region's file says about itself."""

    data_bytes: int  # of data, exactly
    max_bytes: int  # of address space to reserve for the data
    file: tuple[int, int]  # (device, inode), by which the file is known again


def file_bytes(data_bytes: int) -> int:
    """Size of the file of a region."""
    return HEADER_BYTES + (data_bytes + 4095) // 4096 * 4096


def pack_header(data_bytes: int, max_bytes: int, pid: int, start: int) -> bytes:
    """The first bytes of the file; `pid` and `start` say which process made it."""
    return _ABOUT.pack(_MAGIC, VERSION, HEADER_BYTES, data_bytes, max_bytes, pid, start)


def path_of(name: object) -> str:
    """The path of a named region. Raises TypeError, ValueError for what is not a file name."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"a region's name is a file name without '/': {name!r} is not")
    length = len(os.fsencode(name))
    if length > 255:
        raise ValueError(f"a region's name has at most 255 bytes, this one has {length}")
    return f"{FOLDER}/{name}"


def open_unnamed() -> tuple[int, str | None]:
    """A new file in /dev/shm that has no name, so that a kill leaves nothing behind; where the file system
    cannot do that, one with a temporary name. The descriptor, and that name or None."""
    flags = os.O_RDWR | os.O_CLOEXEC
    temporary = None
    try:
        fd = os.open(FOLDER, flags | os.O_TMPFILE, 0o600)
    except FileNotFoundError:
        cure = f"named regions live in {FOLDER}, which does not exist; create the region without a name"
        raise FileNotFoundError(errno.ENOENT, cure, FOLDER) from None
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        temporary = f"{FOLDER}/.runtime-{os.getpid()}-{os.urandom(8).hex()}"
        fd = os.open(temporary, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    os.fchmod(fd, 0o600)  # whatever the umask
    return fd, temporary


def link(fd: int, temporary: str | None, path: str) -> None:
    """Give the finished file its name. Raises FileExistsError if somebody has that."""
    try:
        if temporary is None:
            # Python calls linkat, which can follow /proc's link, only with a src_dir_fd. Nobody looks at it.
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
        else:
            os.link(temporary, path)
    except FileExistsError:
        raise name_taken(path) from None


def name_taken(path: str) -> FileExistsError:
    """The error for a name that is in use."""
    cure = "a region or another file has this name; open() it, or unlink() it first"
    return FileExistsError(errno.EEXIST, cure, path)


def open_named(path: str) -> int:
    """A descriptor of an existing region's file, which must belong to this user."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no region of this name", path) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV):
            raise ValueError(f"{path} is not a region: it is not a regular file") from None
        raise
    owner = os.fstat(fd).st_uid
    if owner != os.geteuid():
        os.close(fd)
        reason = f"the file belongs to user {owner}, who could cut it under us"
        raise PermissionError(errno.EPERM, reason, path)
    return fd


def examine(fd: int, what: str) -> Facts:
    """The facts of a region's file, or ValueError that says what is wrong with it.

    The header is read once: what was checked is what is used, whatever another process writes meanwhile.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{what} is not a region: it is not a regular file")
    about = os.pread(fd, _ABOUT.size, 0) if status.st_size >= HEADER_BYTES else b""
    if len(about) < _ABOUT.size:
        raise ValueError(
            f"{what} is not a region, or was truncated: it has {status.st_size} bytes, "
            f"a header alone has {HEADER_BYTES}"
        )
    magic, version, header, data, largest, _, _ = _ABOUT.unpack(about)
    if magic != _MAGIC:
        raise ValueError(f"{what} is not a region: it begins with {magic:#018x}, expected {_MAGIC:#018x}")
    if version != VERSION:
        raise ValueError(
            f"{what} has layout version {version}, expected {VERSION}: "
            f"all processes must use the same release of this package"
        )
    if header != HEADER_BYTES or not 0 < data <= largest <= LARGEST:
        raise ValueError(
            f"{what} has a damaged header: {header} bytes of header (expected {HEADER_BYTES}), "
            f"{data} bytes of data, {largest} bytes reserved"
        )
    if status.st_size < file_bytes(data):
        raise ValueError(f"{what} was truncated: it has {status.st_size} bytes, expected {file_bytes(data)}")
    return Facts(data, largest, (status.st_dev, status.st_ino))
