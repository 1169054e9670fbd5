"""The supervisor: starts workers, watches them, settles what the dead leave, replaces them, stops them.

loop:  respawn  a worker for each number that has none, after its back-off      lives.py
       listen   what the zygote reports: forked, exited, failed                 zygotes.py
       reap     pidfds that say a worker is dead                                lives.py
       killed   leases that the deadline keeper or a cancel has killed
       reload   new code takes over, a worker at a time                        reloads.py
       settle   the dead whose descendants are dead too: sweep the slot         lives.py
       drain    end when asked to and nothing is left to do
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable

from runtime import _core, config, serializer
from runtime.collector import Collector
from runtime.control import Control
from runtime.errors import BrokenRuntime
from runtime.handle import QUIT_WAIT
from runtime.lifecycle import (
    Number,
    death_of,
    fill_standard_descriptors,
    new_arena,
    raise_descriptor_limit,
    room_for,
    slots_for,
)
from runtime.locks import Latch
from runtime.relay import Relay
from runtime.reloads import Reloads
from runtime.sockets import HostLink, make_folder
from runtime.state import state_of_runtime

__all__ = ["Supervisor"]

_END_WAIT = 1.0  # seconds that workers have to end when the runtime is ended by force

log = logging.getLogger("runtime")


class Supervisor(Reloads):
    """Everything of one runtime but its front: region, sockets, zygote, workers, threads.

    Thread-safety: `stop`, `end`, `scale`, `ask_reload`, `fail`, `wake`, `look` and `workers` may be called
    from any thread, as may `dispatcher` and `collector`; the rest belongs to the supervisor's own thread.
    Fork-safety: `forked()` makes it inert in a child. Blocking: only `ended.wait()`.
    Raises: OSError, RegionFull when the machine lacks what it needs; the message says what to do.
    """

    def __init__(self, settings: config.Settings, table: serializer.FunctionTable) -> None:
        self.pid = os.getpid()
        self.ended = Latch()
        fill_standard_descriptors()
        raise_descriptor_limit(settings.max_workers)
        super().__init__(settings, table)
        self.control: Control | None = None
        self.arena = new_arena(settings)
        self._unpaused = settings.max_workers  # the last one that was not 0
        self._zygote_settings["folder"] = folder = make_folder()
        try:
            if settings.name is not None:
                self.control = Control(settings.name)
            self.state = state_of_runtime(settings.state_max_items, settings.state_max_bytes)
            self._first_zygote()
            self.link = HostLink(folder, self.arena.room // settings.threads)
            self._bell = _core.Bell()
            self.keeper = _core.DeadlineKeeper(self.arena, self._bell.fd)
            self.dispatcher = _core.Dispatcher(self.arena, self.keeper)
        except BaseException:
            if self._zygote is not None:
                self._zygote.close(0.0)
            with contextlib.suppress(FileNotFoundError):  # a zygote has removed it
                os.rmdir(folder)
            self.arena.release()
            self._close_control()
            raise
        self.collector = Collector(self.dispatcher, self.link, self)
        self.relay = Relay()
        self.expect = self.collector.expect  # what a future calls when its result is needed
        self.tell = self.collector.tell  # after the dispatcher was called: whoever has something to do now
        self._stopping = False  # end when nothing is left to do
        self._stop_by = 0.0  # monotonic time at which those that have not left are killed
        self.collecting = self._thread("collector", self.collector.run)
        self.keeping = self._thread("deadline", self.keeper.run)
        # It may still be writing when the interpreter ends, to a reader that is slow: that waits.
        self.relaying = self._thread("relay", self.relay.run, daemon=False)
        self.supervising = self._thread("supervisor", self.run)
        self.threads = (self.collecting, self.keeping, self.relaying, self.supervising)

    def start(self) -> None:
        """Start the threads; they do the rest."""
        try:
            for thread in self.threads:
                thread.start()
        except BaseException:  # no memory or no right for a thread: leave nothing half-made
            self.dispatcher.close()
            self._drained = True
            self.collector.stop()
            self.keeper.stop()
            self.link.wake()
            self.relay.finish(self.relaying)
            for thread in self.threads:
                if thread.ident is not None:
                    thread.join()
            if self._zygote is not None:
                self._zygote.close(QUIT_WAIT)
            self.link.close()
            self._bell.close()
            self._close_control()
            self.ended.set()
            raise

    def join(self) -> None:
        """Until everything has ended. Returns at once in a thread of the runtime's own.

        Raises: RuntimeError where that would never be.
        """
        if threading.current_thread() in self.threads:
            return
        self.dispatcher.must_not_wait()
        while not self.ended.wait(1.0) and self.supervising.is_alive():
            pass

    def _thread(self, name: str, target: Callable[[], None], daemon: bool = True) -> threading.Thread:
        return threading.Thread(target=self._guarded(target), name=f"runtime-{name}", daemon=daemon)

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

    @property
    def stopping(self) -> bool:
        """Whether it ends when nothing is left to do."""
        return self._stopping

    @property
    def turned(self) -> float:
        """Monotonic time of the loop's last turn."""
        return self._respawned

    @property
    def condition(self) -> str:
        """running, draining, or broken."""
        return "broken" if self.broken is not None else "draining" if self._stopping else "running"

    def stop(self) -> None:
        """Finish what was accepted, then end."""
        self._stopping = True
        self.wake()

    def scale(self, workers: int) -> None:
        """Have so many workers from now on; who leaves finishes what it runs. 0: none, tasks wait.

        Raises: ValueError beyond the room that was laid out; RegionFull, OSError when the machine lacks
        memory or descriptors, and nothing has changed; RuntimeError when the runtime has ended.
        """
        if self._stopping or self.ended.is_set():
            raise RuntimeError("cannot scale a runtime after shutdown")
        threads = self.settings.threads
        room = room_for(self.settings.max_workers, threads)
        if workers > room:
            raise ValueError(
                f"this runtime was made with max_workers={self.settings.max_workers} and has room for "
                f"{room} workers, not {workers:,}: make one with a larger max_workers"
                + (" or fewer threads" if threads > 1 else "")
            )
        unborn = [it for it in self._wanted.values() if it.worker is None]
        if workers > len(self._wanted):
            raise_descriptor_limit(workers - len(self._wanted) + len(unborn))
            self.dispatcher.add_slots(slots_for(workers, threads))
        self._unpaused = workers or self._unpaused
        self._want(workers)
        self.wake()

    @property
    def scaled(self) -> int:
        """Workers that there shall be."""
        return len(self._wanted)

    def _want(self, workers: int) -> None:
        """From any thread, several at once: the last one to store decides."""
        for n in range(workers):  # in this order, so that there is no gap
            self._numbers.setdefault(n, Number())
        self._wanted = {n: self._numbers[n] for n in range(workers)}
        paused = None
        while paused is not (not self._wanted):  # another thread may have stored meanwhile
            paused = not self._wanted
            self.dispatcher.pause(paused)  # at once: those who are to leave do not know it yet
        self.tell()

    def end(self, reason: str, number: int) -> None:
        """End now: what has no outcome gets BrokenRuntime, every worker this signal, and soon SIGKILL."""
        self.fail(BrokenRuntime(reason))
        for worker in list(self._slots.values()):
            self.dispatcher.signal(worker.slot, number)
        self.wake()

    def fail(self, error: BrokenRuntime) -> None:
        """No task can run any more: all without an outcome get this error, and later ones too."""
        self.broken = self.broken or error
        self.collector.outcomes.broken = self.broken
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

    # ---- the loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread. However its loop ends, everything is closed and everybody who waits is told."""
        try:
            while not self._drained or self._slots:
                self._respawn()
                ready = self._wait()
                self._listen(ready)
                self._reap(ready)
                self._follow_phases()
                self._resolve_killed()
                self._follow_reload()
                self._settle()
                self._dismiss()
                self._recycle()
                self._release_surplus()
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
        for zygote in self._living():
            zygote.send()
            poller.register(zygote.socket, select.POLLIN | (select.POLLOUT if zygote.unsent else 0))
            poller.register(zygote.pidfd, select.POLLIN)
        for worker in self._slots.values():
            if worker.pidfd >= 0 and not worker.died:
                poller.register(worker.pidfd, select.POLLIN)
        found = poller.poll(max(0.0, self._due() - time.monotonic()) * 1000 + 1)
        self._bell.silence()
        return {fd for fd, _ in found}

    def _due(self) -> float:
        """Monotonic time of the next thing that happens by the clock."""
        now = time.monotonic()
        due = self._reload_due(now)
        for worker in self._slots.values():
            if worker.died and not worker.reported:
                due = min(due, worker.died + worker.patience)
            elif worker.leave_by:
                due = min(due, worker.leave_by)
        if not self._drained:
            for it in self._wanted.values():
                # One that was over by the last look waits for something else, a slot or a zygote.
                if it.worker is None and it.restarts.not_before > self._respawned:
                    due = min(due, it.restarts.not_before)
        if self._zygote is None and not self._drained:
            due = min(due, max(self._zygote_at, now))
        if not self._ever_ready:
            due = min(due, self._warn_at)
        if self._stop_by:
            due = min(due, self._stop_by)
        return due

    def _resolve_killed(self) -> None:
        """Leases that a deadline or a cancel has killed get their outcome before the process is gone."""
        for worker in self._slots.values():
            if not worker.died:
                self.dispatcher.killed(worker.slot)
        self.collector.announce()
        if self.dispatcher.has_outcomes:
            self.link.wake()

    # ---- ending --------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """When asked to end and nothing is left to do: let the workers go."""
        now = time.monotonic()
        for worker in self._slots.values():
            if worker.leave_by and now >= worker.leave_by and not worker.died:
                if self.dispatcher.tasks_in(worker.slot):  # it finishes a task: that may take long
                    worker.leave_by = now + self.settings.drain_timeout
                    continue
                self.dispatcher.signal(worker.slot, signal.SIGKILL)
                worker.leave_by = now + 1.0
        if self._stopping and not self._wanted and self.dispatcher.waiting and self.broken is None:
            self._want(self._unpaused)  # it was paused, but what was accepted is to be finished
        if self._stopping and not self._drained and self.dispatcher.close_if_idle():
            self._drained = True
            self._stop_by = now + (_END_WAIT if self.broken is not None else self.settings.drain_timeout)
            for worker in self._slots.values():
                if not worker.died:
                    self._let_go(worker)
            if self._zygote is not None and (not self._zygote.started or self.broken is not None):
                self._forget_unforked(False)
        if self._stop_by and now >= self._stop_by:
            self._stop_by = now + 1.0
            for worker in self._slots.values():
                self.dispatcher.signal(worker.slot, signal.SIGKILL)
            self._forget_unforked(True)

    def _forget_unforked(self, force: bool) -> None:
        """Workers that were ordered and will not be forked any more: the zygote is ended with us.

        One that may have forked some that we have not heard of is asked first: it ends them all.
        """
        for zygote in self._living():
            if any(worker.pid is None and worker.zygote is zygote for worker in self._slots.values()):
                if zygote.started and not force:
                    zygote.order("quit")
                else:
                    zygote.kill()

    def _close(self) -> None:
        """The last steps; everything of this runtime is gone after them."""
        for worker in self._slots.values():  # none, unless the loop has failed
            self.dispatcher.signal(worker.slot, signal.SIGKILL)
            self.dispatcher.vacate(worker.slot)
        self._refuse_reloads()
        for zygote in self._living():
            zygote.close(QUIT_WAIT if zygote.started else 0.0)
        for zygote in self._old:
            zygote.close(0.0)
        if self._heir is not None:
            self._heir.close(QUIT_WAIT)
        for worker in self._slots.values():
            self.dispatcher.settle(worker.slot, death_of(worker))
            self._release(worker)
        self.collector.stop()
        self.link.wake()
        self.collecting.join()
        self.keeper.stop()
        self.keeping.join()
        self.relay.finish(self.relaying)
        self.dispatcher.close()
        self.dispatcher.abandon(False)
        self.collector.complete()
        self.collector.outcomes.finish_late()
        self.link.close()
        self._bell.close()
        self.arena.release()
        self._close_control()
        with contextlib.suppress(BufferError):  # a view of the user's: it ends with that
            self.state.region.close()
        self.ended.set()

    def _close_control(self) -> None:
        if self.control is not None:
            self.control.close()
