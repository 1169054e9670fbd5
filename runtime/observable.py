"""`Observable`: the part of a Runtime that says how it is: its workers, its numbers, its stacks."""

from __future__ import annotations

import abc
import os

from runtime.figures import Stats, WorkerInfo
from runtime.lifecycle import WorkerStatus
from runtime.memory import resident
from runtime.supervisor import Supervisor

__all__ = ["Observable"]


class Observable(abc.ABC):
    """A Runtime, as far as looking at it goes. Thread-safety: any thread."""

    _core: Supervisor

    @abc.abstractmethod
    def _progress(self) -> tuple[tuple[str, int, int], ...]:
        """Of the kernels that run."""

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Every worker number and what it does now."""
        found = []
        now = self._core.workers()
        busy = self._core.busy()  # after it: of every number that there was then
        for number, status, worker, done in now:
            slot = pid = started = task = None
            if worker is not None:
                slot, pid, started = worker.slot, worker.pid, worker.started
                task = next(iter(self._core.dispatcher.tasks_in(slot)), None)
            rss = resident(pid) if pid is not None else None
            generation = worker.zygote.generation if worker is not None else self._core.generation
            found.append(
                WorkerInfo(number, slot, pid, generation, status, started, done, task, rss, busy[number])
            )
        return tuple(found)

    def stats(self) -> Stats:
        """Counts and sizes; each is exact, but they are read one after the other."""
        core = self._core
        dispatcher, arena = core.dispatcher, core.arena
        running = sum(len(dispatcher.tasks_in(slot)) for slot in core.occupied())
        ready = sum(status is WorkerStatus.READY for _, status, _, _ in core.workers())
        return Stats(
            queued=dispatcher.waiting,
            leased=max(0, dispatcher.leased - running),
            running=running,
            done=dispatcher.done,
            failed=dispatcher.failed,
            cancelled=dispatcher.vanished,
            lane=dispatcher.by_lane,
            message=dispatcher.by_message,
            rescued=dispatcher.rescues,
            reserved=arena.reserved_bytes,
            used=arena.used_bytes,
            pinned=dispatcher.pinned_bytes,
            largest_free=arena.largest_free_bytes,
            growths=arena.growths,
            workers=ready,
            kernels=self._progress(),
        )

    def dump_stacks(self, number: int | None = None) -> dict[int, str]:
        """The Python stacks of all threads of live workers, by worker number; of one alone if it is named.

        Also of a worker that starts, or holds the GIL in C. A stopped one has a text that says so; one that
        is dead at the moment is left out. Thread-safety: any thread, several at once. Blocking: milliseconds,
        about a second if a worker does not answer. Raises: ValueError for a number that no worker has;
        OSError when no descriptor is left; RuntimeError in a fork.
        """
        core = self._core
        if core.pid != os.getpid():
            raise RuntimeError(f"this Runtime belongs to process {core.pid}; ask it there")
        numbers = [found[0] for found in core.workers()]
        if number is not None and (isinstance(number, bool) or number not in numbers):
            others = f"their numbers are 0 to {numbers[-1]}" if numbers else "there is none now"
            raise ValueError(f"there is no worker {number!r}; {others}")
        return core.dump_stacks(number)
