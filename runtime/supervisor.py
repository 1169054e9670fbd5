"""The supervisor: starts workers, watches them, settles what the dead leave, replaces them, stops them.

    loop:  listen   what the zygote reports: forked, exited, failed
           reap     pidfds that say a worker is dead
           killed   leases that the deadline keeper or a cancel has killed
           settle   the dead whose descendants are dead too: sweep the slot
           respawn  a worker for each number that has none, after its back-off
           stop     when asked to and nothing is left to do

A number is what users see: worker 0, worker 1. It outlives processes; each process lives in a slot, and
the replacement starts at once in another slot while the dead one's is swept.

    RESTARTING ──fork──► STARTING ──ready──► READY ──stop──► STOPPING
        ▲                    │                 │                │
        └──── died ──────────┴─────────────────┴────────────────┘      RESTING: waiting out a back-off
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

from runtime import _core, config, serializer
from runtime.collector import Collector
from runtime.errors import BrokenRuntime, remote_traceback
from runtime.lifecycle import (
    Bell,
    Number,
    Worker,
    WorkerStatus,
    backoff,
    death_of,
    geometry,
    how_it_ended,
    raise_descriptor_limit,
    zygote_settings,
)
from runtime.sockets import HostLink, make_folder
from runtime.zygote import Zygote

__all__ = ["Supervisor"]

_ORPHAN_WAIT = 1.0  # seconds for a worker to see that it lost its zygote before it was ready
_WINDOW = 30.0  # seconds in which …
_FAILURES = 5  # … so many deaths before ready make a slot give up
_SLOW_START = 10.0  # seconds until the first warning about a slow start
_SLOW_AGAIN = 60.0  # seconds between the further ones
_QUIT_WAIT = 2.0  # seconds that a zygote has to end
_END_WAIT = 2.0  # seconds that workers have to end when the runtime is ended by force

log = logging.getLogger("runtime")


class Supervisor:
    """Everything of one runtime but its front: region, sockets, zygote, workers, threads.

    Thread-safety: `stop`, `end`, `fail`, `wake`, `look` and `workers` may be called from any thread, as may
    `dispatcher` and `collector`; the rest belongs to the supervisor's own thread.
    Fork-safety: `forked()` makes it inert in a child. Blocking: only `ended.wait()`.
    Raises: OSError, RegionFull when the machine lacks what it needs; the message says what to do.
    """

    def __init__(self, settings: config.Settings, table: serializer.FunctionTable) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.broken: BrokenRuntime | None = None
        self.ended = threading.Event()
        raise_descriptor_limit(settings.max_workers)
        self._zygote_settings = zygote_settings(settings, table)
        self._environment = {**os.environ, **config.thread_caps(settings.max_workers)}
        self.arena = _core.Arena.create(
            settings.region_size, *geometry(settings.max_workers), *config.lanes()
        )
        self.link = HostLink(make_folder(), self.arena.slots)
        self._zygote_settings["folder"] = self.link.folder
        self._bell = Bell()
        self.keeper = _core.DeadlineKeeper(self.arena, self._bell.fd)
        self.dispatcher = _core.Dispatcher(self.arena, self.keeper)
        self.collector = Collector(self.dispatcher, self.link, self)
        self.expect = self.collector.expect  # what a future calls when its result is needed
        self.tell = self.collector.tell  # after the dispatcher was called: whoever has something to do now
        self._numbers = {n: Number() for n in range(settings.max_workers)}
        self._slots: dict[int, Worker] = {}  # slot -> its process, until the slot is swept
        self._looks: deque[int] = deque()  # slots whose phase may have changed
        self._stopping = False  # end when nothing is left to do
        self._counting = threading.RLock()  # guards each number's worker and count, for those who look
        self._drained = False  # nothing is left: the workers were told to leave
        self._stop_by = 0.0  # monotonic time at which those that have not left are killed
        self._ever_ready = False
        self._warn_at = time.monotonic() + _SLOW_START
        self._zygote: Zygote | None = None
        self._old: list[Zygote] = []  # dead ones, whose workers are being replaced
        self._zygote_failures = 0
        self._zygote_at = 0.0  # monotonic time of the next attempt to start one
        self.threads = [
            threading.Thread(target=self._guarded(target), name=f"runtime-{name}", daemon=True)
            for name, target in (
                ("collector", self.collector.run),
                ("deadline", self.keeper.run),
                ("supervisor", self.run),
            )
        ]

    def start(self) -> None:
        """Start the threads; they do the rest."""
        try:
            for thread in self.threads:
                thread.start()
        except BaseException:  # no memory or no right for a thread: leave nothing half-made
            self.dispatcher.close()
            self._drained = self.collector.stopped = True
            self.keeper.stop()
            self.link.wake()
            for thread in self.threads:
                if thread.ident is not None:
                    thread.join()
            self.link.close()
            self._bell.close()
            self.ended.set()
            raise

    def join(self) -> None:
        """Until everything has ended. Returns at once in a thread of the runtime's own."""
        if threading.current_thread() in self.threads:
            return
        while not self.ended.wait(1.0) and self.threads[-1].is_alive():
            pass

    def _guarded(self, target: Callable[[], None]) -> Callable[[], None]:
        """A thread of ours must not end unseen by an exception: nobody would complete the futures."""

        def run() -> None:
            try:
                target()
            except BaseException as error:
                log.critical("a thread of the runtime failed", exc_info=True)
                self.fail(BrokenRuntime(f"a thread of the runtime failed: {type(error).__name__}: {error}"))

        return run

    # ---- asked from outside --------------------------------------------------------------------------

    def wake(self) -> None:
        """Make the loop look at everything."""
        self._bell.ring()

    def look(self, slot: int) -> None:
        """The collector: a worker may have changed its phase (-1: any may have)."""
        for index in (slot,) if slot >= 0 else tuple(self._slots):
            worker = self._slots.get(index)
            if worker is not None and not worker.leave_by:
                phase = self.dispatcher.phase(index)
                if phase == _core.PHASE_LEAVING or (phase == _core.PHASE_READY and not worker.ready):
                    self._looks.append(index)
                    self.wake()

    @property
    def stopping(self) -> bool:
        """Whether it ends when nothing is left to do."""
        return self._stopping

    def stop(self) -> None:
        """Finish what was accepted, then end."""
        self._stopping = True
        self.wake()

    def end(self, reason: str, number: int) -> None:
        """End now: what has no outcome gets BrokenRuntime, every worker this signal, and soon SIGKILL."""
        self.fail(BrokenRuntime(reason))
        for worker in list(self._slots.values()):
            self.dispatcher.signal(worker.slot, number)
        self.wake()

    def fail(self, error: BrokenRuntime) -> None:
        """No task can run any more: all without an outcome get this error, and later ones too."""
        self.broken = self.broken or error
        self.collector.broken = self.broken
        self._stopping = True
        self.dispatcher.close()
        self.dispatcher.abandon(False)
        self.link.wake()
        self.wake()

    def forked(self) -> None:
        """In a child that the user forked: what it does to the region stays its own."""
        self.dispatcher.disown()
        self.link.inert = self._bell.inert = True
        self.arena.make_private()

    def workers(self) -> list[tuple[int, WorkerStatus, Worker | None, int]]:
        """(number, status, process, tasks done) of each number; the counts never go backwards."""
        now = time.monotonic()
        with self._counting:
            return [
                (n, self._status(it, now), it.worker, it.tasks_done + self._done_by(it.worker))
                for n, it in sorted(self._numbers.items())
            ]

    def _done_by(self, worker: Worker | None) -> int:
        return self.dispatcher.look(worker.slot)[2] if worker is not None else 0

    def _retire(self, worker: Worker) -> None:
        """Its number is free for the next process; what it has done stays counted."""
        number = self._numbers[worker.number]
        with self._counting:
            if number.worker is worker:
                number.worker = None
                number.tasks_done += self._done_by(worker)

    def _status(self, number: Number, now: float) -> WorkerStatus:
        worker = number.worker
        if worker is None:
            if self._drained:
                return WorkerStatus.STOPPING
            return WorkerStatus.RESTING if number.not_before > now else WorkerStatus.RESTARTING
        if worker.stopping:
            return WorkerStatus.STOPPING
        return WorkerStatus.READY if worker.ready else WorkerStatus.STARTING

    # ---- the loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread. However its loop ends, everything is closed and everybody who waits is told."""
        try:
            while not self._drained or self._slots:
                self._respawn()
                ready = self._wait()
                self._listen()
                self._reap(ready)
                self._follow_phases()
                self._resolve_killed()
                self._settle()
                self._recycle()
                self._warn()
                self._drain()
        except BaseException as error:
            self.fail(BrokenRuntime(f"the supervisor failed: {type(error).__name__}: {error}"))
            raise
        finally:
            self._close()

    def _wait(self) -> set[int]:
        """Until something happens, or until the next thing is due. Descriptors that are ready."""
        poller = select.poll()
        poller.register(self._bell.fd, select.POLLIN)
        if self._zygote is not None:
            self._zygote.send()
            poller.register(
                self._zygote.socket, select.POLLIN | (select.POLLOUT if self._zygote.unsent else 0)
            )
        for worker in self._slots.values():
            if worker.pidfd >= 0 and not worker.died:
                poller.register(worker.pidfd, select.POLLIN)
        found = poller.poll(max(0.0, self._due() - time.monotonic()) * 1000 + 1)
        self._bell.silence()
        return {fd for fd, _ in found}

    def _due(self) -> float:
        """Monotonic time of the next thing that happens by the clock."""
        now = time.monotonic()
        due = now + 60.0
        for worker in self._slots.values():
            if worker.died and not worker.reported:
                due = min(due, worker.died + worker.patience)
            elif worker.leave_by:
                due = min(due, worker.leave_by)
        if not self._drained:
            due = min(
                [
                    due,
                    *(
                        it.not_before
                        for it in self._numbers.values()
                        if it.worker is None and it.not_before > now
                    ),
                ]
            )
        if self._zygote is None and not self._drained:
            due = min(due, max(self._zygote_at, now))
        if not self._ever_ready:
            due = min(due, self._warn_at)
        if self._stop_by:
            due = min(due, self._stop_by)
        return due

    def _respawn(self) -> None:
        """A worker for each number that has none and whose back-off is over."""
        now = time.monotonic()
        if self._drained or self.broken is not None:
            return
        if self._zygote is None and (now < self._zygote_at or not self._new_zygote()):
            return
        for n, number in self._numbers.items():
            if number.worker is not None or number.not_before > now:
                continue
            slot = self.dispatcher.open_slot(n, 1)
            if slot < 0:
                return  # all are being swept; the next settle comes back here
            assert self._zygote is not None
            worker = Worker(n, slot, self._zygote, time.time())
            number.worker = self._slots[slot] = worker
            try:
                paths = self.link.open(slot)
            except OSError as error:
                self._refused(worker, f"no sockets for a new worker: {error}")
                continue
            incarnation = self.dispatcher.incarnation(slot)
            self._zygote.order(
                "fork", slot=slot, incarnation=incarnation, number=n, generation=1, paths=paths
            )

    def _new_zygote(self) -> bool:
        try:
            self._zygote = Zygote(self._zygote_settings, self.arena, self._environment)
        except OSError as error:
            self._zygote_failed(f"no process for the zygote could be made: {error}")
            return False
        return True

    # ---- listening to the zygote ---------------------------------------------------------------------

    def _listen(self) -> None:
        """Act on what the zygote reports."""
        zygote = self._zygote
        for report in zygote.reports() if zygote is not None else ():
            assert zygote is not None
            worker = self._slots.get(report.fields.get("slot", -1))
            if worker is not None and report.fields["incarnation"] != self.dispatcher.incarnation(
                worker.slot
            ):
                worker = None  # it is about an earlier process of this slot
            if report.what == "forked":
                self._forked(worker, report.fields["pid"], report.fd)
            elif report.what == "exited" and worker is not None:
                worker.status, worker.rss = report.fields["status"], report.fields["rss"]
                worker.reported = True
                self._died(worker)
            elif report.what == "refused" and worker is not None:
                self._refused(worker, f"the system refused a new process: {report.fields['error']}")
            elif report.what == "importing":
                zygote.importing = report.fields["module"]
            elif report.what == "started":
                zygote.importing = ""
                self._zygote_failures = 0
            elif report.what == "threads":
                self._import_in_workers(report.fields["module"])
            elif report.what == "failed":
                self._preload_failed(report.fields)
            elif report.what == "":
                self._zygote_died(zygote)

    def _forked(self, worker: Worker | None, pid: int, pidfd: int) -> None:
        """A process was made for a slot."""
        if pidfd < 0:  # the descriptor got lost, for want of one; the zygote has not reaped it yet
            with contextlib.suppress(OSError):
                pidfd = _core.pidfd_open(pid)
        if worker is None or worker.died:
            if pidfd >= 0:  # nobody waits for it any more
                with contextlib.suppress(OSError):
                    _core.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            return
        worker.pid, worker.pidfd = pid, pidfd
        self.dispatcher.occupy(worker.slot, pidfd)
        self._looks.append(worker.slot)
        if self.broken is not None or self._drained:
            self.dispatcher.signal(worker.slot, signal.SIGKILL)

    def _import_in_workers(self, module: str) -> None:
        """A fork would leave a module's threads behind, so each worker imports it for itself."""
        with contextlib.suppress(RuntimeWarning):  # under -W error
            warnings.warn(
                f"preload module {module!r} leaves a thread running; it is imported in each worker instead",
                RuntimeWarning,
                stacklevel=1,
            )
        settings = self._zygote_settings
        settings["preload"] = [name for name in settings["preload"] if name != module]
        settings["imports"] = [*settings["imports"], module]
        self._zygote_failures -= 1  # this one does not count

    def _preload_failed(self, fields: dict[str, Any]) -> None:
        """A preload module raised: nothing can start."""
        if not self._ever_ready:
            text = f"preload module {fields['module']!r} raised {fields['error']}"
            failure = BrokenRuntime(text)
            failure.__cause__ = remote_traceback(fields["traceback"])
            self.fail(failure)
        else:
            log.error("preload module %r raised in a new zygote: %s", fields["module"], fields["error"])

    def _zygote_died(self, zygote: Zygote) -> None:
        """A new one takes over; workers of the old one are replaced, one by one."""
        zygote.kill()  # it may have closed its end without ending
        code = zygote.process.wait()
        self._zygote = None
        for worker in list(self._slots.values()):
            if worker.zygote is zygote and worker.pid is None and not worker.died:
                # Never forked, or never heard of: such a one ends when it sees that its parent is gone.
                worker.died = time.monotonic()
                worker.patience = _ORPHAN_WAIT
                self._retire(worker)
        self._old.append(zygote)
        if self._drained or self.broken is not None:
            return
        if zygote.importing:
            what = (
                f"the zygote ended with exit code {code} as it imported preload module {zygote.importing!r}"
            )
            self._zygote_failed(what, importing=True)
        else:
            self._zygote_failed(f"the zygote ended with exit code {code}")

    def _zygote_failed(self, reason: str, importing: bool = False) -> None:
        """Try again, later each time; without a worker that was ever ready, not often."""
        self._zygote_failures += 1
        if not self._ever_ready and (
            self._zygote_failures >= _FAILURES or (importing and self._zygote_failures > 0)
        ):
            self.fail(BrokenRuntime(reason))
            return
        if self._zygote_failures > 0:
            log.warning("%s; starting another", reason)
            self._zygote_at = time.monotonic() + backoff(self._zygote_failures)

    # ---- lives and deaths of workers -----------------------------------------------------------------

    def _follow_phases(self) -> None:
        """A worker that is ready gets leases; one that leaves gets none."""
        while self._looks:
            worker = self._slots.get(self._looks.popleft())
            if worker is None or worker.died or worker.pid is None:
                continue  # not before the zygote has told of it: what cannot be killed gets no task
            phase = self.dispatcher.phase(worker.slot)
            if phase == _core.PHASE_READY and not worker.ready:
                worker.ready = self._ever_ready = True
                self.link.hide(worker.slot)
                if self._drained:
                    continue
                self.dispatcher.make_ready(worker.slot)
                self.collector.announce()
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
        worker.unready = not (self.dispatcher.worked(worker.slot) or worker.stopping)
        self._retire(worker)
        self.dispatcher.vacate(worker.slot)
        if worker.unready:
            number.not_before = worker.died + worker.patience  # _settle knows how it ended
        else:
            number.failures.clear()
            number.not_before = 0.0

    def _start_failure(self, worker: Worker) -> BrokenRuntime:
        """Why a worker did not become ready."""
        if self.dispatcher.phase(worker.slot) == _core.PHASE_FAILED:
            try:
                ((_, data, views, _, _),) = _core.read_frame(self.dispatcher.failure(worker.slot))
                cause = serializer.load_exception(data, views)
            except ValueError as error:
                cause = error
            text = "".join(traceback.format_exception_only(cause)).strip()  # survives a __str__ that raises
            failure = BrokenRuntime(f"the initializer raised {text}")
            failure.__cause__ = cause
            return failure
        return BrokenRuntime(
            f"worker {worker.number} (pid {worker.pid}) ended before it was ready: {how_it_ended(worker)}"
        )

    def _failed_before_ready(self, number: Number, now: float, failure: BrokenRuntime) -> None:
        """Back off; give up when no slot has any attempt left, or at once when the very first one raised."""
        number.failures.append(now)
        while number.failures[0] < now - _WINDOW:
            number.failures.popleft()
        number.not_before = now + backoff(len(number.failures))
        if self.broken is not None or self._drained:
            return
        exhausted = all(
            it.worker is None and sum(t > now - _WINDOW for t in it.failures) >= _FAILURES
            for it in self._numbers.values()
        )
        if exhausted or (not self._ever_ready and failure.__cause__ is not None):
            self.fail(failure)
        else:
            log.warning("%s; trying again in %.2g s", failure, number.not_before - now)

    def _refused(self, worker: Worker, reason: str) -> None:
        """No process could be made for a slot."""
        worker.died = now = time.monotonic()
        worker.reported = True
        self._retire(worker)
        self._failed_before_ready(self._numbers[worker.number], now, BrokenRuntime(reason))

    def _resolve_killed(self) -> None:
        """Leases that a deadline or a cancel has killed get their outcome before the process is gone."""
        for worker in self._slots.values():
            if not worker.died:
                self.dispatcher.killed(worker.slot)
        self.collector.announce()
        if self.dispatcher.has_outcomes:
            self.link.wake()

    def _settle(self) -> None:
        """Sweep the slots of the dead whose descendants are dead too."""
        now = time.monotonic()
        for worker in list(self._slots.values()):
            if not worker.died or not (worker.reported or now >= worker.died + worker.patience):
                continue
            slot = worker.slot
            if worker.unready:
                self._failed_before_ready(self._numbers[worker.number], now, self._start_failure(worker))
            self.link.close_slot(slot)
            self.collector.forget(slot)
            self.dispatcher.settle(slot, death_of(worker))
            if worker.pidfd >= 0:
                os.close(worker.pidfd)
            del self._slots[slot]
            self.collector.announce()
            self.link.wake()
        for zygote in [old for old in self._old if not any(w.zygote is old for w in self._slots.values())]:
            self._old.remove(zygote)
            zygote.close(0.0)

    def _recycle(self) -> None:
        """Replace workers whose zygote has died, one at a time: nobody would end what they leave behind."""
        if not self._old or any(
            it.worker is None or not it.worker.ready or it.worker.stopping for it in self._numbers.values()
        ):
            return
        for number in self._numbers.values():
            if number.worker is not None and number.worker.zygote in self._old:
                self._ask_to_leave(number.worker)
                return

    def _ask_to_leave(self, worker: Worker) -> None:
        worker.stopping = True
        self.dispatcher.stop_slot(worker.slot)
        self.collector.tell()
        self.link.publish(worker.slot, self.dispatcher.incarnation(worker.slot))

    def _warn(self) -> None:
        """Nothing is killed for slowness at the first start, but it is said what takes so long."""
        if self._ever_ready or self._stopping or time.monotonic() < self._warn_at:
            return
        self._warn_at = time.monotonic() + _SLOW_AGAIN
        zygote = self._zygote
        if zygote is not None and zygote.importing:
            log.warning("preload module %r is still being imported:\n%s", zygote.importing, zygote.stack())
        elif self.settings.initializer is not None:
            log.warning(
                "no worker is ready yet; the initializer %r is still running", self.settings.initializer
            )
        else:
            log.warning("no worker is ready yet")

    # ---- ending --------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """When asked to end and nothing is left to do: let the workers go."""
        now = time.monotonic()
        for worker in self._slots.values():
            if worker.leave_by and now >= worker.leave_by and not worker.died:
                self.dispatcher.signal(worker.slot, signal.SIGKILL)
                worker.leave_by = now + 1.0
        if self._stopping and not self._drained and self.dispatcher.close_if_idle():
            self._drained = True
            self._stop_by = now + (_END_WAIT if self.broken is not None else self.settings.drain_timeout)
            for worker in self._slots.values():
                if worker.died:
                    continue
                if worker.ready:
                    self._ask_to_leave(worker)
                else:
                    worker.stopping = True
                    self.dispatcher.signal(worker.slot, signal.SIGKILL)  # it starts for nobody
            if self._zygote is not None and (self._zygote.importing or self.broken is not None):
                self._forget_unforked()
        if self._stop_by and now >= self._stop_by:
            self._stop_by = now + 1.0
            for worker in self._slots.values():
                self.dispatcher.signal(worker.slot, signal.SIGKILL)
            self._forget_unforked()

    def _forget_unforked(self) -> None:
        """Workers that were ordered and will not be forked any more: the zygote is ended with us."""
        if self._zygote is not None and any(worker.pid is None for worker in self._slots.values()):
            self._zygote.kill()

    def _close(self) -> None:
        """The last steps; everything of this runtime is gone after them."""
        for worker in self._slots.values():  # none, unless the loop has failed
            self.dispatcher.signal(worker.slot, signal.SIGKILL)
            self.dispatcher.vacate(worker.slot)
        if self._zygote is not None:
            self._zygote.close(0.0 if self._zygote.importing else _QUIT_WAIT)
        for zygote in self._old:
            zygote.close(0.0)
        for worker in self._slots.values():
            self.dispatcher.settle(worker.slot, death_of(worker))
            if worker.pidfd >= 0:
                os.close(worker.pidfd)
        self.collector.stopped = True
        self.link.wake()
        self.threads[0].join()
        self.keeper.stop()
        self.threads[1].join()
        self.dispatcher.close()
        self.dispatcher.abandon(False)
        self.collector.complete()
        self.link.close()
        self._bell.close()
        self.arena.release()
        self.ended.set()
