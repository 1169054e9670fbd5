"""What the supervisor knows of workers, and the sizes and limits that it starts them with."""

from __future__ import annotations

import enum
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from typing import Any

from runtime import _core, config, filters, serializer, stacks
from runtime.channels import HostEnds
from runtime.errors import RegionFull
from runtime.handle import Zygote
from runtime.names import control_path
from runtime.oom import Reading
from runtime.outcomes import Death
from runtime.restarts import Restarts
from runtime.worker import EXIT_DESCRIPTORS, EXIT_HOST_GONE, EXIT_KILLED, EXIT_ORPHANED, EXIT_SERVICE

__all__ = [
    "Number",
    "Worker",
    "WorkerStatus",
    "death_of",
    "fill_standard_descriptors",
    "geometry",
    "how_it_ended",
    "new_arena",
    "raise_descriptor_limit",
    "room_for",
    "slots_for",
    "starts_possible",
    "zygote_settings",
]

REPORT_WAIT = 0.5  # seconds to wait for the zygote's word on how a worker ended
_ROOM = 64  # workers that any runtime may be scaled to; a larger one to …
_ROOM_FACTOR = 4  # … so many times the number that it was made with
_SHARE = 4  # of a limited address space a region takes a fourth at most
_FDS_PER_WORKER = 13  # descriptors of the host for a worker: listeners, connections, pidfd, channels
_FDS_TAKEN = 12  # of them a worker that is ready has
_FDS_PASSING = 4  # that threads of ours open for a moment: files of /proc, what a message brings
_FDS_RESERVE = 24  # for zmq's own, the zygote, and what comes and goes


class WorkerStatus(enum.Enum):
    """What a worker number is doing."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # dead, the next one starting
    STOPPING = "stopping"
    RESTING = "resting"  # waiting out a back-off


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process, from the order to fork it until its slot is swept."""

    number: int
    slot: int
    zygote: Zygote
    started: float  # wall-clock seconds, for people
    pid: int | None = None
    pidfd: int = -1
    ends: HostEnds | None = None  # what it prints, logs and leaves
    ready: bool = False
    ready_at: float = 0.0  # monotonic seconds
    stopping: bool = False
    died: float = 0.0  # monotonic seconds, 0: alive
    patience: float = REPORT_WAIT  # seconds from its death until its slot is swept without a report
    leave_by: float = 0.0  # monotonic time at which it is killed, 0: not leaving
    successor: bool = False  # a reload has started it beside the worker of its number, and it is not ready
    unready: bool = False  # it died before it was ready, or had done nothing since
    reported: bool = False  # the zygote has said how it ended, and that its descendants are gone
    status: int | None = None  # exit code, negative for a signal
    rss: int | None = None
    memory: Reading | None = None  # of its cgroup, at its start
    suspicion: str = ""  # what may have ended it, behind how it ended


@dataclass(slots=True, eq=False)
class Number:
    """What is known of a worker number across its processes."""

    worker: Worker | None = None
    restarts: Restarts = field(default_factory=Restarts)

    @property
    def served(self) -> bool:
        """Whether it has a worker that takes tasks."""
        return self.worker is not None and self.worker.ready and not self.worker.stopping


def geometry(workers: int, threads: int = 1) -> tuple[int, int, int, int]:
    """(slots, leases per slot, outbox records per slot, bytes of a bounce block).

    Many slots get smaller tables each, so that a region stays small; those of threads are many soon.
    """
    lanes = workers * threads
    if threads == 1 and lanes <= 16:
        leases, bounce = 256, 256 << 10
    elif lanes <= 16 or (threads == 1 and lanes <= 128):
        leases, bounce = 64, 64 << 10
    else:
        leases, bounce = 16, 16 << 10
    return slots_for(workers, threads), leases, 4 * leases, bounce


def new_arena(settings: config.Settings) -> _core.Arena:
    """The region of a new runtime. Raises: RegionFull, OSError when the machine lacks what it needs.

    Without a region_max it may grow as far as the machine has memory, and this process address space: each
    worker maps as much, so a limit on that leaves most of it to other things.
    """
    least, limit = settings.region_size, resource.getrlimit(resource.RLIMIT_AS)[0]
    spare = config.MAX_REGION if limit == resource.RLIM_INFINITY else limit // _SHARE
    most = settings.region_max or max(least, min(config.default_region_max(), config.MAX_REGION, spare))
    while True:
        try:
            return _core.GrowingArena.create(
                least,
                *geometry(settings.max_workers, settings.threads),
                *config.lanes(),
                slots_for(room_for(settings.max_workers, settings.threads), settings.threads),
                most,
                settings.threads,
            )
        except RegionFull:
            if settings.region_max is not None or most == least:
                raise
            most = max(least, most // 2)


def slots_for(workers: int, threads: int = 1) -> int:
    """Slots that so many workers need: one for each thread of twice as many workers, and of two more.

    A dead worker's slots are swept while its successor starts.
    """
    return (2 * workers + 2) * threads


def room_for(workers: int, threads: int = 1) -> int:
    """Workers that a runtime made with so many may be scaled to.

    Their slots are laid out at its creation, as a hole in the region's file: a slot that was never used
    costs its address space (436 KiB with up to 16 workers) and no memory.
    """
    return max(workers, min(config.MAX_LANES // threads, max(_ROOM, _ROOM_FACTOR * workers)))


def fill_standard_descriptors() -> None:
    """Where a daemon has closed 0, 1 or 2, put /dev/null, and leave it there.

    Else a socket of ours gets that number, and what anybody prints, workers too, goes into the socket: libzmq
    aborts.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            lowest = os.open(os.devnull, os.O_RDWR)  # of those that are free: this one
            os.set_inheritable(lowest, True)


def raise_descriptor_limit(workers: int) -> None:
    """libzmq aborts the process when it runs out of descriptors, so make sure beforehand that it does not.

    Raises: OSError when the hard limit is too low.
    """
    open_now = len(os.listdir("/proc/self/fd"))
    need = open_now + _FDS_RESERVE + _FDS_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise OSError(
                f"{workers} workers need about {need} file descriptors ({open_now} are open), and the limit "
                f"is {hard}: raise it (ulimit -Hn {need}, LimitNOFILE= of a unit) or use fewer workers"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def starts_possible(starting: int) -> int:
    """How many workers there are descriptors for, beside those that start and may not have all of theirs yet.

    A replacement comes before its predecessor's are free; libzmq aborts if it accepts when there is none,
    also when the last one is taken for a moment only.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return config.MAX_WORKERS
    try:
        free = soft - len(os.listdir("/proc/self/fd")) + 1
    except OSError:  # not even one for the folder
        return 0
    return (free - _FDS_PASSING) // _FDS_TAKEN - starting


def zygote_settings(settings: config.Settings, table: serializer.FunctionTable) -> dict[str, Any]:
    """What the zygote is told; plain values, so that nothing of the user's is imported to read them."""
    initializer = None
    if settings.initializer is not None:
        ref, payload = serializer.pack_call(table, settings.initializer, settings.initargs, {})
        buffers = tuple(bytes(buffer) for buffer in payload.buffers)
        initializer = (ref.id, ref.data, payload.joined(), buffers, tuple(payload.readonly))
    return {
        "path": [entry or os.getcwd() for entry in sys.path],
        "argv": list(sys.argv),
        "warnings": filters.described(),
        "authkey": _authkey(),
        "preload": list(settings.preload),
        "forward_logs": settings.forward_logs,
        "imports": [],
        "initializer": initializer,
        "max_tasks": settings.max_tasks_per_child,
        "max_rss": settings.max_worker_rss,
        "threads": settings.threads,
        "generation": 1,
        "known": [],
        "service": settings.service,
        "control": control_path(settings.name) if settings.name is not None else None,
    }


def _authkey() -> bytes | None:
    """What a multiprocessing Manager asks of those who use its proxies, if there can be one."""
    process = sys.modules.get("multiprocessing.process")
    return bytes(process.current_process().authkey) if process is not None else None


def how_it_ended(worker: Worker) -> str:
    """How a worker ended, in words."""
    status = worker.status
    if status is None:
        return "its exit code is unknown"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "?"
        return f"killed by signal {-status} ({name}){worker.suspicion}"
    return {
        EXIT_KILLED: "the host had ended the task that it was finishing",
        EXIT_HOST_GONE: "it believed that the host was gone",
        EXIT_ORPHANED: "its zygote had died before it was ready",
        EXIT_DESCRIPTORS: "a task had closed file descriptors that the worker needs",
        EXIT_SERVICE: "its service raised, or returned without being asked to stop",
    }.get(status, f"it exited with code {status}")


def death_of(worker: Worker) -> Death:
    """What the tasks of a dead worker are told."""
    status = worker.status
    exitcode = status if status is not None and status >= 0 else None
    number = -status if status is not None and status < 0 else None
    crashed = worker.ends is not None and (status is None or number in stacks.CRASHES)
    stack = stacks.crash_stack(worker.ends.stack) if crashed and worker.ends is not None else ""
    return Death(worker.pid, worker.number, exitcode, number, how_it_ended(worker), worker.rss, stack)
