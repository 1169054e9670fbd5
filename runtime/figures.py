"""What a Runtime says of itself: of each worker, and in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.lifecycle import WorkerStatus

__all__ = ["Stats", "WorkerInfo"]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker as it was when asked.

    number: what names it, 0 .. max_workers-1. slot: its row in the region, or None. pid: of its process, or
    None. started: when that was asked for, seconds since the epoch, or None. tasks_done: tasks and items that
    workers of this number have run. task: number of the one that runs now, or None. rss: resident bytes, or
    None. busy: seconds that workers of this number have spent in user code; it never goes backwards.
    """

    number: int
    slot: int | None
    pid: int | None
    generation: int
    status: WorkerStatus
    started: float | None
    tasks_done: int
    task: int | None
    rss: int | None
    busy: float = 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the start, and sizes now. Items of a map count one by one.

    queued: waiting in the host. leased: handed to a worker and not started. running: started. done, failed,
    cancelled: ended. lane, message: leases announced through shared memory alone, and by a zmq message.
    rescued: found by the backstop's rescan. reserved, used, pinned, largest_free: bytes of the region;
    reserved is what takes memory, tables included, pinned are arguments that a view in a worker keeps,
    largest_free is what one object could have before the region is extended. growths: times it got memory.
    workers: that are ready. kernels: (name, grains, grains done) of those that run.
    """

    queued: int
    leased: int
    running: int
    done: int
    failed: int
    cancelled: int
    lane: int
    message: int
    rescued: int
    reserved: int
    used: int
    pinned: int
    largest_free: int
    growths: int
    workers: int
    kernels: tuple[tuple[str, int, int], ...] = ()
