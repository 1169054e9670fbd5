"""The lives of worker processes: who is born, becomes ready, leaves or dies, and what follows from it.

    respawn        a worker for each number that has none, after its back-off
    follow_phases  a worker that says it is ready gets leases; one that leaves gets none
    reap           pidfds that say a worker is dead: the next one may start
    settle         the dead whose descendants are dead too: sweep the slot, count a death before ready
    recycle        workers that should not stay are asked to leave, one at a time

A number is what users see: worker 0, worker 1. It outlives processes; each process lives in a slot, and
the replacement starts at once in another slot while the dead one's is swept.

    RESTARTING ──fork──► STARTING ──ready──► READY ──stop──► STOPPING
        ▲                    │                 │                │
        └──── died ──────────┴─────────────────┴────────────────┘      RESTING: waiting out a back-off

Who forks them is chosen in zygotes.py; when all of this is done, and until when, in supervisor.py.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import logging
import os
import signal
import time
import traceback

from runtime import _core, config, serializer, stacks
from runtime.channels import HostEnds
from runtime.collector import Collector
from runtime.errors import BrokenRuntime, RegionFull
from runtime.handle import Report, Zygote
from runtime.lifecycle import Number, Worker, WorkerStatus, death_of, how_it_ended, starts_possible
from runtime.oom import MemoryWatch
from runtime.relay import Relay, host_levels
from runtime.restarts import WINDOW
from runtime.sockets import HostLink
from runtime.state import SharedState

__all__ = ["NO_DESCRIPTORS", "Lives"]

NO_DESCRIPTORS = 0.05  # seconds until it is tried again to start a worker that there was no descriptor for

log = logging.getLogger("runtime")


class Lives(abc.ABC):
    """The workers of one runtime by number and by slot, and the verbs that act on them.

    Thread-safety: `look`, `workers`, `occupied`, `busy` and `dump_stacks` may be called from any thread; the
    rest belongs to the supervisor's.
    """

    settings: config.Settings
    link: HostLink
    dispatcher: _core.Dispatcher
    collector: Collector
    relay: Relay
    state: SharedState

    def __init__(self, settings: config.Settings) -> None:
        self.settings = settings
        self.broken: BrokenRuntime | None = None
        # All that there ever were: 0, 1, 2 …; more may come at any time, from any thread, none ever goes.
        self._numbers = {n: Number() for n in range(settings.max_workers)}
        self._wanted = dict(self._numbers)  # those that shall have a worker. Replaced, never changed
        self._slots: dict[int, Worker] = {}  # slot -> its process, until the slot is swept
        self._looks: collections.deque[int] = collections.deque()  # slots whose phase may have changed
        self._drained = False  # nothing is left: the workers were told to leave
        self._respawned = 0.0  # monotonic time of the last look for numbers whose back-off is over
        self._ever_ready = False
        self._short = False  # of descriptors: a worker waits to be started
        self._memory = MemoryWatch()
        self._zygote: Zygote | None = None  # the one that forks
        self._old: list[Zygote] = []  # dead ones, whose workers are being replaced
        self.ends: collections.Counter[str] = collections.Counter()  # of workers, by how
        self._replaced: Number | None = None  # whose worker was asked to leave last, for that reason

    @abc.abstractmethod
    def wake(self) -> None:
        """Make the loop look at everything."""

    @abc.abstractmethod
    def fail(self, error: BrokenRuntime) -> None:
        """No task can run any more."""

    @abc.abstractmethod
    def _zygote_is_there(self) -> bool:
        """Whether there is one that forks; it is started if it may be."""

    @property
    @abc.abstractmethod
    def reloading(self) -> bool:
        """Whether a reload is under way, which replaces workers itself."""

    @abc.abstractmethod
    def _succeeded(self, worker: Worker) -> None:
        """A successor is ready, and gets leases."""

    @abc.abstractmethod
    def _not_succeeded(self, worker: Worker, failure: BrokenRuntime | None) -> None:
        """A successor has ended before it was ready. None: as it was asked to."""

    # ---- looking -------------------------------------------------------------------------------------

    def look(self, slot: int) -> None:
        """The collector: a worker may have changed its phase (-1: any may have)."""
        for index in (slot,) if slot >= 0 else tuple(self._slots):
            worker = self._slots.get(index)
            if worker is not None and not worker.leave_by:
                phase = self.dispatcher.phase(index)
                if phase == _core.PHASE_LEAVING or (phase == _core.PHASE_READY and not worker.ready):
                    self._looks.append(index)
                    self.wake()

    def workers(self) -> list[tuple[int, WorkerStatus, Worker | None, int]]:
        """(number, status, process, tasks done) of each number; the counts never go backwards."""
        now = time.monotonic()
        found = []
        for n in range(len(self._numbers)):
            worker = self._numbers[n].worker
            if n in self._wanted or worker is not None:
                status = self._status(self._numbers[n], worker, now)
                found.append((n, status, worker, self.dispatcher.tasks_of(n)))
        return found

    def busy(self) -> dict[int, float]:
        """Seconds that the processes of each number have spent in user code; they never go backwards."""
        return {n: self.dispatcher.busy_of(n) * 1e-9 for n in range(len(self._numbers))}

    def dump_stacks(self, number: int | None) -> dict[int, str]:
        """The Python stacks of live workers, by number; of one alone if it is named. See `stacks.take`."""
        asked: list[stacks.Asked] = []
        try:
            for n in range(len(self._numbers)):
                worker = self._numbers[n].worker
                if number in (None, n) and worker is not None and not worker.died:
                    self._ask(worker, asked)
            return stacks.take(asked)
        finally:
            for one in asked:
                one.close()

    def _ask(self, worker: Worker, asked: list[stacks.Asked]) -> None:
        """Add a worker to those that are asked for their stacks, unless it ends meanwhile."""
        pid, pidfd, ends = worker.pid, worker.pidfd, worker.ends
        if pid is None or pidfd < 0 or ends is None:
            return
        try:
            one = stacks.Asked(worker.number, pid, pidfd, ends)
        except OSError:
            if worker.ends is None:  # it was closed under us
                return
            raise
        asked.append(one)
        if worker.ends is None:  # so what we have duplicates of may be somebody else's; see _release
            asked.pop().close()

    def _status(self, number: Number, worker: Worker | None, now: float) -> WorkerStatus:
        if worker is None:
            if self._drained:
                return WorkerStatus.STOPPING
            return WorkerStatus.RESTING if number.restarts.not_before > now else WorkerStatus.RESTARTING
        if worker.stopping:
            return WorkerStatus.STOPPING
        return WorkerStatus.READY if worker.ready else WorkerStatus.STARTING

    def occupied(self) -> list[int]:
        """Slots with a living process, also of one whose number has its next one already."""
        return [worker.slot for worker in list(self._slots.values()) if not worker.died]

    def _retire(self, worker: Worker) -> None:
        """Its number is free for the next process."""
        number = self._numbers[worker.number]
        if number.worker is worker:
            number.worker = None

    # ---- births and deaths ---------------------------------------------------------------------------

    def _respawn(self) -> None:
        """A worker for each number that has none and whose back-off is over."""
        now = self._respawned = time.monotonic()
        if self._drained or self.broken is not None:
            return
        if not self._zygote_is_there():
            return
        missing = []
        for n, number in self._wanted.items():
            if number.worker is not None and number.worker.stopping:
                self._retire(number.worker)  # it finishes what it runs; the next one starts meanwhile
            if number.worker is None and number.restarts.not_before <= now:
                missing.append((n, number))
        if not missing:
            return
        room = self._starts_possible()
        for n, number in missing:
            if room <= 0:
                if not self._short:
                    log.warning("too few file descriptors are left to start worker %d; waiting for some", n)
                self._short = True
                number.restarts.not_before = now + NO_DESCRIPTORS
                continue
            self._short = False
            room -= 1
            assert self._zygote is not None
            worker = self._new_worker(n, self._zygote)
            if worker is None:
                return  # all slots are being swept; the next settle comes back here
            number.worker = worker
            self._order(worker)

    def _new_worker(self, n: int, zygote: Zygote) -> Worker | None:
        """A slot for a worker that is to be ordered; None: none is free."""
        slot = self.dispatcher.open_slot(n, zygote.generation)
        if slot < 0:
            return None
        worker = self._slots[slot] = Worker(n, slot, zygote, time.time())
        return worker

    def _order(self, worker: Worker) -> None:
        """Have a worker forked."""
        slot = worker.slot
        try:
            paths = self.link.open(slot)
        except OSError as error:
            self._refused(worker, f"no sockets for a new worker: {error}")
            return
        worker.zygote.order(
            "fork", slot=slot, incarnation=self.dispatcher.incarnation(slot), number=worker.number,
            generation=worker.zygote.generation, paths=paths,
            levels=host_levels() if self.settings.forward_logs else None,
        )  # fmt: skip

    def _starts_possible(self) -> int:
        """How many more workers there are descriptors for."""
        return starts_possible(sum(self._lacks_descriptors(worker) for worker in self._slots.values()))

    def _lacks_descriptors(self, worker: Worker) -> bool:
        """Whether the host will have more descriptors for a worker than it has now."""
        if worker.ready or worker.died:
            return False
        return worker.ends is None or not self.collector.greeted(worker.slot)

    def _forked(self, worker: Worker | None, report: Report) -> None:
        """A process was made for a slot."""
        pid, pidfd, fds = report.fields["pid"], report.fds[0] if report.fds else -1, report.fds[1:]
        if pidfd < 0:  # the descriptor got lost, for want of one; the zygote has not reaped it yet
            with contextlib.suppress(OSError):
                pidfd = _core.pidfd_open(pid)
        if worker is None or worker.died:
            if pidfd >= 0:  # nobody waits for it any more
                with contextlib.suppress(OSError):
                    _core.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            for fd in fds:
                os.close(fd)
            return
        worker.pid, worker.pidfd = pid, pidfd
        self._hear(worker, fds)
        self.dispatcher.occupy(worker.slot, pidfd)
        self._looks.append(worker.slot)
        worker.memory = self._memory.reading(pid)
        if self.broken is not None or self._drained or worker.stopping:
            self.dispatcher.signal(worker.slot, signal.SIGKILL)

    def _hear(self, worker: Worker, fds: list[int]) -> None:
        """Take the ends of a new worker's channels. One whose output nobody could read is ended."""
        if len(fds) == HostEnds.COUNT:
            worker.ends = HostEnds(worker.number, fds)
            self.relay.begin(worker.ends)
            return
        log.warning("no descriptors left for the output of a new worker; it is ended, and another started")
        for fd in fds:
            os.close(fd)
        incarnation = self.dispatcher.incarnation(worker.slot)
        worker.zygote.order("kill", slot=worker.slot, incarnation=incarnation)

    def _refused(self, worker: Worker, reason: str) -> None:
        """No process could be made for a slot."""
        worker.died = now = time.monotonic()
        worker.reported = True
        self._retire(worker)
        self._failed_before_ready(worker, now, BrokenRuntime(reason))

    def _follow_phases(self) -> None:
        """A worker that is ready gets leases; one that leaves gets none."""
        while self._looks:
            worker = self._slots.get(self._looks.popleft())
            if worker is None or worker.died or worker.pid is None:
                continue  # not before the zygote has told of it: what cannot be killed gets no task
            phase = self.dispatcher.phase(worker.slot)
            if phase == _core.PHASE_READY and not worker.ready:
                worker.ready = self._ever_ready = True
                worker.ready_at = time.monotonic()
                self.link.hide(worker.slot)
                if worker.stopping:
                    continue
                self.dispatcher.make_ready(worker.slot)
                self.collector.announce()
                if worker.successor:
                    self._succeeded(worker)
            elif phase == _core.PHASE_LEAVING and not worker.leave_by:
                # It runs nothing any more, but threads of a task's may keep it from ending. The next one
                # starts now.
                worker.stopping = True
                worker.leave_by = time.monotonic() + self.settings.drain_timeout
                self.dispatcher.stop_slot(worker.slot)
                self.collector.announce()
                self._retire(worker)

    def _reap(self, ready: set[int]) -> None:
        """Workers whose pidfd says that they are dead."""
        for worker in list(self._slots.values()):
            if worker.pidfd in ready and not worker.died:
                self._died(worker)

    def _died(self, worker: Worker) -> None:
        """A worker's process is gone: no more leases to it, and the next one may start."""
        if worker.died:
            return
        worker.died = time.monotonic()
        number = self._numbers[worker.number]
        # Who leaves of its own accord may be gone before anybody has looked at its phase.
        left = worker.stopping or self.dispatcher.phase(worker.slot) == _core.PHASE_LEAVING
        worked = self._worked(worker)
        worker.unready = not (left or worked)
        self._retire(worker)
        self.dispatcher.vacate(worker.slot)
        with contextlib.suppress(RegionFull):  # no row for this process: those who wait find out themselves
            self.state._bury()
        if worker.successor:
            return  # its number has nothing to do with it yet
        if worker.unready:
            if worker.ready and worker.died - worker.ready_at > WINDOW:
                number.restarts.lived()
            number.restarts.not_before = worker.died + worker.patience  # _settle knows how it ended
        elif worked:
            number.restarts.lived()

    def _worked(self, worker: Worker) -> bool:
        """Whether it has done something since it was ready. A service has: it has not failed for a while."""
        return self.dispatcher.worked(worker.slot) or (worker.ready and self.settings.service is not None)

    def _start_failure(self, worker: Worker) -> BrokenRuntime:
        """Why a worker did not become ready."""
        if self.dispatcher.phase(worker.slot) == _core.PHASE_FAILED:
            try:
                ((_, data, views, _, _),) = _core.read_frame(self.dispatcher.failure(worker.slot))
                cause = serializer.load_exception(data, views)
            except ValueError as error:
                cause = error
            text = "".join(traceback.format_exception_only(cause)).strip()  # survives a __str__ that raises
            what = "the initializer" if self.settings.initializer is not None else "the start of a worker"
            what = what if self.settings.service is None else "the service"
            failure = BrokenRuntime(f"{what} raised {text}")
            failure.__cause__ = cause
            return failure
        stack = death_of(worker).stack
        return BrokenRuntime(
            f"worker {worker.number} (pid {worker.pid}) ended before it was ready: {how_it_ended(worker)}"
            + (f"\n{stack}" if stack else "")
        )

    def _failed_before_ready(self, worker: Worker, now: float, failure: BrokenRuntime) -> None:
        """Back off; give up when no slot has any attempt left, or at once when the very first one raised."""
        if worker.successor:
            self._not_succeeded(worker, failure)
            return
        number = self._numbers[worker.number]
        wanted = self._wanted.values()
        number.restarts.failed(now, sum(it.restarts.in_a_row > 0 for it in wanted))
        if self.broken is not None or self._drained or number not in wanted:
            return
        exhausted = all(
            it.restarts.exhausted and not (it.worker is not None and it.worker.ready) for it in wanted
        )
        if exhausted or (not self._ever_ready and failure.__cause__ is not None):
            self.fail(failure)
        else:
            log.warning("%s; trying again in %.2g s", failure, number.restarts.not_before - now)

    # ---- the end of a life --------------------------------------------------------------------------

    def _settle(self) -> None:
        """Sweep the slots of the dead whose descendants are dead too."""
        now = time.monotonic()
        for worker in list(self._slots.values()):
            if not worker.died or not (worker.reported or now >= worker.died + worker.patience):
                continue
            slot = worker.slot
            if worker.status == -signal.SIGKILL and not self.dispatcher.sent_kill(slot):
                worker.suspicion = self._memory.suspicion(worker.memory, worker.rss)
            if worker.unready:
                self._failed_before_ready(worker, now, self._start_failure(worker))
            elif worker.successor:
                self._not_succeeded(worker, None)
            signalled = worker.status is None or worker.status < 0
            self.ends["signal" if signalled else "left" if worker.stopping else "exit"] += 1
            if self.settings.service is not None and not (worker.stopping or worker.unready):
                log.warning("worker %d (pid %s) died: %s", worker.number, worker.pid, how_it_ended(worker))
            self.link.close_slot(slot)
            self.collector.forget(slot)
            self.dispatcher.settle(slot, death_of(worker))
            self._release(worker)
            del self._slots[slot]
            self.collector.announce()
            self.link.wake()
        for zygote in [old for old in self._old if not any(w.zygote is old for w in self._slots.values())]:
            self._old.remove(zygote)
            zygote.close(0.0)

    def _release(self, worker: Worker) -> None:
        """The descriptors of a dead worker. What it has printed is still being read."""
        pidfd, worker.pidfd = worker.pidfd, -1
        ends, worker.ends = worker.ends, None
        # Who asks for its stacks takes duplicates, and then looks whether they were taken before this.
        if pidfd >= 0:
            os.close(pidfd)
        if ends is not None:
            os.close(ends.stack)
            self.relay.end(ends)

    def _recycle(self) -> None:
        """Replace workers whose zygote has died, one at a time: nobody would end what they leave behind.

        At most one number at a time is without a worker on this account. It waits for numbers that will have
        one in a moment, not for those that fail again and again. If the one that was replaced last is among
        these, it waits until some worker of the new zygote is ready: else all might be lost to a fault of
        that.
        """
        wanted = self._wanted.values()
        if (
            not self._old
            or self.reloading
            or any(not it.served and not it.restarts.in_a_row for it in wanted)
        ):
            return
        last = self._replaced
        if (
            last is not None
            and last in wanted
            and not last.served
            and not any(it.served and it.worker and it.worker.zygote is self._zygote for it in wanted)
        ):
            return
        for number in wanted:
            if number.worker is not None and number.served and number.worker.zygote in self._old:
                self._replaced = number
                self._ask_to_leave(number.worker)
                return

    def _release_surplus(self) -> None:
        """Workers of numbers that are not wanted any more leave."""
        for worker in self._slots.values():
            if not (worker.stopping or worker.died or worker.number in self._wanted):
                self._let_go(worker)

    def _let_go(self, worker: Worker) -> None:
        """It finishes what it runs; one that is not ready yet starts for nobody.

        A service may have begun to serve before it is called ready: it finishes that, too.
        """
        if worker.ready:
            self._ask_to_leave(worker)
        elif self.settings.service is not None:
            self._ask_to_leave(worker)
            self.dispatcher.signal(worker.slot, signal.SIGTERM)
        else:
            worker.stopping = True
            self.dispatcher.signal(worker.slot, signal.SIGKILL)

    def _ask_to_leave(self, worker: Worker) -> None:
        worker.stopping = True
        if self.settings.service is not None:  # a task may take its time; what has been told to stop, not
            worker.leave_by = time.monotonic() + self.settings.drain_timeout
        self.dispatcher.stop_slot(worker.slot)
        self.collector.tell()
        self.link.publish(worker.slot, self.dispatcher.incarnation(worker.slot))
