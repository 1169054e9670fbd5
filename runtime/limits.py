"""How much of the machine this process may use: CPUs and memory, as the kernel will enforce it.

    /proc/<pid>/cgroup      the group of the process, one line per hierarchy
    /proc/<pid>/mountinfo   where each hierarchy is mounted, and which of its groups is shown there
    <mount>/<group>/...     the limits of that group; those of every ancestor hold as well

Both cgroup versions are read, also side by side. Every function takes the folder that holds
`proc` and the mounts (`root`), so that tests read recorded trees. Nothing here raises: a file
that is missing, unreadable or not understood sets no limit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

__all__ = [
    "UNLIMITED",
    "available_cpus",
    "cpu_quota",
    "groups_of",
    "limit_of",
    "memory_groups",
    "memory_limit",
    "memory_total",
    "oom_kills",
    "read",
]

in_worker = False
"""True in a worker process (worker.py sets it): a Runtime made there has one worker by default."""

# v1 says "no limit" as the largest page-aligned value below 2^63; no machine has 2^62 bytes.
UNLIMITED = 1 << 62


def cpu_quota(root: str = "/", pid: int | str = "self") -> float | None:
    """CPUs that the cgroups grant, as a fraction (1.5), the least of all ancestors; None: no quota."""
    quotas = []
    for version, folder in _groups("cpu", root, pid):
        if version == 2:
            quota, _, period = read(folder, "cpu.max").partition(" ")
        else:
            quota, period = read(folder, "cpu.cfs_quota_us"), read(folder, "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(root: str = "/", pid: int | str = "self") -> int | None:
    """Bytes of memory that the cgroups allow, the least of all ancestors; None: no limit."""
    return limit_of(memory_groups(root, pid))


def groups_of(root: str = "/", pid: int | str = "self") -> str:
    """What the kernel says of a process's groups: the same text, the same groups. "" when it has ended."""
    return read(os.path.join(root, "proc", str(pid)), "cgroup")


def memory_groups(root: str = "/", pid: int | str = "self") -> tuple[tuple[int, str], ...]:
    """(cgroup version, folder) of the groups that limit a process's memory, its own first."""
    return tuple(_groups("memory", root, pid))


def oom_kills(groups: tuple[tuple[int, str], ...]) -> int | None:
    """Processes that the kernel has killed for want of memory in the first of these that counts them.

    None: none does. A count includes that of the groups below.
    """
    for version, folder in groups:
        text = read(folder, "memory.events" if version == 2 else "memory.oom_control")
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.strip().isdecimal():
                return int(count)
    return None


def limit_of(groups: tuple[tuple[int, str], ...]) -> int | None:
    """Bytes of memory that these groups allow, the least of them; None: no limit."""
    limits = []
    for version, folder in groups:
        text = read(folder, "memory.max" if version == 2 else "memory.limit_in_bytes")
        if text.isdecimal() and int(text) < UNLIMITED:
            limits.append(int(text))
    return min(limits, default=None)


def memory_total(root: str = "/") -> int | None:
    """Bytes of memory of the machine; None: unknown."""
    for line in read(os.path.join(root, "proc"), "meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name == "MemTotal" and words and words[0].isdecimal():
            return int(words[0]) * 1024
    return None


def available_cpus(root: str = "/") -> int:
    """CPUs that this process can keep busy: its affinity, cut by the cgroup quota; at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _groups(controller: str, root: str, pid: int | str) -> Iterator[tuple[int, str]]:
    """(cgroup version, folder) of the process's group and of all its visible ancestors."""
    proc = os.path.join(root, "proc", str(pid))
    paths = _paths(read(proc, "cgroup"), controller)
    for version, shown, mount in _mounts(read(proc, "mountinfo"), controller):
        group = paths.get(version)
        below = None if group is None else _below(group, shown)
        if below is None:
            continue
        top = os.path.join(root, mount.lstrip("/"))
        while below:
            yield version, os.path.join(top, *below)
            below.pop()
        yield version, top


def _paths(text: str, controller: str) -> dict[int, str]:
    """The group of the process in the hierarchy that has `controller`, by cgroup version."""
    paths = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = path
        elif controller in controllers.split(","):
            paths[1] = path
    return paths


def _mounts(text: str, controller: str) -> Iterator[tuple[int, str, str]]:
    """(cgroup version, group shown at the mount point, mount point) of each mount that may matter."""
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, filesystem = head.split(" "), tail.split(" ")
        if len(fields) < 5 or len(filesystem) < 3:
            continue
        shown, mount = _unescape(fields[3]), _unescape(fields[4])
        if filesystem[0] == "cgroup2":
            yield 2, shown, mount
        elif filesystem[0] == "cgroup" and controller in filesystem[2].split(","):
            yield 1, shown, mount


def _below(group: str, shown: str) -> list[str] | None:
    """The steps from the group that a mount shows down to ours; None: ours is not under it.

    A mount older than the cgroup namespace shows a group above the namespace's root ("/..", "/../..").
    That is an ancestor of ours, but the names of the steps between are hidden: only it can be read.
    """
    ours, top = _steps(group), _steps(shown)
    if ".." in ours:
        return None
    if ".." in top:
        return [] if set(top) == {".."} else None
    return ours[len(top) :] if ours[: len(top)] == top else None


def _steps(path: str) -> list[str]:
    return [step for step in path.split("/") if step]


def _unescape(field: str) -> str:
    """Undoes mountinfo's octal escapes of blank, tab, newline and backslash."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def read(folder: str, name: str) -> str:
    """The text of a file that the kernel writes; "" when there is none to read."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""
