"""Whether the kernel's OOM killer may have ended a worker.

A cgroup counts the processes that the kernel has killed in it for want of memory, not which ones. So the
count is read when a worker starts and again when SIGKILL has ended it: a rise that no other death has used
up explains this one. The kernel raises the count before it sends the signal.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime import limits

__all__ = ["MemoryWatch", "Reading"]


@dataclass(slots=True, eq=False)
class Group:
    """A worker's cgroup and its ancestors. explained: up to which count deaths were put down to it."""

    folders: tuple[tuple[int, str], ...]
    explained: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """The count when a worker started. kills: None where there is none to read."""

    group: Group
    kills: int | None


class MemoryWatch:
    """Reads the counts of the workers' groups. root: the folder of `proc` and the mounts; for tests.

    Thread-safety: for one thread. Blocking, Raises: nothing.
    """

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._groups: dict[str, Group] = {}  # /proc/PID/cgroup -> what it says

    def reading(self, pid: int) -> Reading:
        """For a worker that has just been forked."""
        text = limits.groups_of(self._root, pid)
        group = self._groups.get(text)
        if group is None:
            group = self._groups[text] = Group(limits.memory_groups(self._root, pid))
        return Reading(group, limits.oom_kills(group.folders))

    def suspicion(self, before: Reading | None, rss: int | None) -> str:
        """What to add to "killed by SIGKILL", of a signal that was not ours; "" if memory is not the cause.

        rss: the largest resident size of the worker in bytes, or None.
        """
        now = limits.oom_kills(before.group.folders) if before is not None else None
        if before is None or before.kills is None or now is None:
            return (
                ", which the runtime did not send: it may have been the kernel's OOM killer; its counter "
                "cannot be read here, look into the kernel's log (dmesg, journalctl -k)"
            )
        group = before.group
        known = max(before.kills, group.explained)
        if now <= known:
            return ""
        group.explained = known + 1
        limit = limits.limit_of(group.folders)
        facts = [
            f"the oom_kill counter of its cgroup rose from {before.kills} to {now}",
            f"the limit is {_size(limit)}" if limit is not None else "the cgroup sets no limit of its own",
        ]
        if rss is not None:
            facts.append(f"the worker had up to {_size(rss)}")
        return f", probably out of memory: {', '.join(facts)}"


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"
