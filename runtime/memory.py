"""Memory: how much may still be taken, taking it for a file without surprises, and what a process has taken.

A memfd has no size limit of its own: an over-large reservation is not refused, it ends in the OOM
killer. So whoever reserves asks first. The answer is the least of MemAvailable and, for the process's
cgroup and each of its ancestors, limit - (current - page cache that can be dropped).
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator

from runtime.errors import RegionFull
from runtime.limits import UNLIMITED, memory_groups, read

__all__ = ["available_memory", "extend", "memory_room", "reserve", "resident", "unshared"]

STEP = 16 << 20  # bytes reserved by one fallocate
SPARED = 4 << 20  # bytes of memory that are left to the process itself


def available_memory(root: str = "/") -> int:
    """Bytes that can be taken now; 2^63 - 1 when nothing is known. A snapshot: others take memory too."""
    return memory_room(root)[0]


def memory_room(root: str = "/") -> tuple[int, str]:
    """Bytes that can be taken now, and the file whose limit is the tightest."""
    return min(_rooms(root), default=((1 << 63) - 1, "no limit known"))


def reserve(fd: int, total: int, begin: int = 0) -> None:
    """Give the file memory that is really there from `begin` to `total`: later touches cannot fail.

    Blocking: 6 GiB take about a second; signals are handled every 16 MiB. Raises: RegionFull when the
    memory, or the room in the file's file system, is not there; part of it may then be reserved.
    """
    done = begin
    everything = signal.valid_signals()
    while done < total:
        room, limit = memory_room()  # before each step: nothing else would refuse
        if total - done > room - SPARED:
            raise RegionFull(
                f"the region needs {total - done} bytes more, but {room} bytes of memory are available, "
                f"{SPARED} of which stay free for the process (limit: {limit}); "
                f"use a smaller region or allow more memory"
            )
        step = min(STEP, total - done)
        # Some kernels undo a whole step when a signal comes.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, everything)
        try:
            os.posix_fallocate(fd, done, step)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise _over_file_size(total) from None
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
                raise
            files = os.fstatvfs(fd)
            free = files.f_bavail * files.f_frsize
            raise RegionFull(
                f"the region needs {total - done} bytes more, but its file system has {free} bytes available "
                f"({error.strerror}); use a smaller region, enlarge /dev/shm (for containers --shm-size), "
                f"or create the region without a name"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done += step


def extend(fd: int, total: int) -> None:
    """Give the file this size, and no memory: a hole. Raises: RegionFull when files may not be so large."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXFSZ])
    try:
        os.ftruncate(fd, total)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise _over_file_size(total) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _over_file_size(total: int) -> RegionFull:
    """The error for EFBIG. Takes the signal, blocked by now, that came with it and would end the process."""
    signal.sigtimedwait([signal.SIGXFSZ], 0)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return RegionFull(
        f"the region needs a file of {total} bytes, and files of this process may have {most} "
        f"(RLIMIT_FSIZE, ulimit -f); use a smaller region or raise the limit"
    )


def resident(pid: int) -> int | None:
    """Resident bytes of a process; None: it has ended, or cannot be looked at."""
    pages = _pages(str(pid))
    return None if pages is None else pages[0] * os.sysconf("SC_PAGE_SIZE")


def unshared() -> int | None:
    """Resident bytes that this process shares with no file; None: it cannot look."""
    pages = _pages("self")
    return None if pages is None else (pages[0] - pages[1]) * os.sysconf("SC_PAGE_SIZE")


def _pages(process: str) -> tuple[int, int] | None:
    """Pages of a process that are resident, and how many of them are a file's."""
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            fields = file.read().split()
        return int(fields[1]), int(fields[2])
    except (OSError, IndexError):
        return None


def _rooms(root: str) -> Iterator[tuple[int, str]]:
    meminfo = _numbers(read(os.path.join(root, "proc"), "meminfo"))
    free = meminfo.get("MemAvailable:", meminfo.get("MemFree:"))
    if free is not None:
        yield free * 1024, "/proc/meminfo"
    for version, folder in memory_groups(root):
        limit, used, prefix = (
            ("memory.max", "memory.current", "")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        )
        ceiling, current = read(folder, limit), read(folder, used)
        if not (ceiling.isdecimal() and current.isdecimal() and int(ceiling) < UNLIMITED):
            continue
        stat = _numbers(read(folder, "memory.stat"))
        # Pages of files on the LRU lists; shared memory is not among them, the kernel counts it as anonymous.
        cache = stat.get(prefix + "inactive_file", 0) + stat.get(prefix + "active_file", 0)
        yield max(0, int(ceiling) - max(0, int(current) - cache)), os.path.join(folder, limit)


def _numbers(text: str) -> dict[str, int]:
    """The lines `name number ...` of a statistics file."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
