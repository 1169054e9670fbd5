"""Reloads: the next generation of the user's code takes over from the last one, a worker at a time.

    ASKED ──► IMPORTING ──► TRYING ──► LEADING ──► done
                 │            │           │
                 └─ refused ◄─┘           └──► TURNING BACK ──► refused

    ASKED        One at a time: a reload that is asked for during another one waits for the end of that.
    IMPORTING    The new zygote, a fresh interpreter, imports what `preload` names. Workers that die are
                 replaced from the old zygote.
                 New zygote killed: another is started, three in all. Old zygote killed: replaced as ever, by
                 one that imports the code as it is by then.
    TRYING       It has forked a worker into a slot of its own, beside the one of the same number; that runs
                 the initializer, and imports the modules whose functions were submitted.
                 That worker killed: another, three in all; had it raised, refused. New zygote killed: back to
                 IMPORTING.
    LEADING      The first one was ready: the new zygote forks from now on, for whatever reason. A number
                 after the other: its successor is ready and gets leases; then the old worker gets none and
                 drains, by drain_timeout; when that is gone, the next one.
                 Successor killed: another, three in all. Old worker killed: its number has its successor, or
                 starts a worker of the new generation; if that fails, a successor is tried. New zygote
                 killed: replaced as ever. Old zygote killed: nobody can turn back any more; its workers are
                 replaced all the same.
    TURNING BACK A later successor failed: the old zygote leads again, and the workers of the new generation
                 are replaced in the same way. If that fails, too, both generations serve, and it is said.

A reload is refused with ReloadFailed; until LEADING nothing has changed by then. `timeout` is for the imports
and the first worker, then anew for each further one. The end of the runtime ends a reload in any state. A
zygote that does not lead stays while a worker of its lives, since nobody else can reap that, and quits then.

All states are moved by the supervisor's thread, in _follow_reload(), and when a worker is ready or has ended.
While a reload is under way nobody else replaces workers whose zygote has died (`_recycle`): it does.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import traceback
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from runtime import _core, config, serializer
from runtime.errors import BrokenRuntime, ReloadFailed, RuntimeFailure
from runtime.handle import QUIT_WAIT, Report, Zygote
from runtime.lifecycle import Worker, raise_descriptor_limit
from runtime.lives import NO_DESCRIPTORS
from runtime.locks import Latch
from runtime.restarts import backoff
from runtime.zygotes import Zygotes

__all__ = ["Reload", "ReloadReport", "Reloads"]

_ATTEMPTS = 3  # of a new zygote, or of a worker, that ends without saying why

log = logging.getLogger("runtime")


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a reload has done.

    generation: the new one. started: new workers that took over from old ones. drained: old workers that
    finished what they ran and left. killed: those that were still running after drain_timeout. seconds: from
    its beginning to the end of the last old worker.
    """

    generation: int
    started: int
    drained: int
    killed: int
    seconds: float


class Reload:
    """One reload, from the call to its outcome: `report` or `error`, once `done` is set.

    Thread-safety: these three may be read by any thread; the rest belongs to the supervisor's.
    """

    def __init__(self, timeout: float) -> None:
        self.done = Latch()
        self.report: ReloadReport | None = None
        self.error: Exception | None = None
        self.timeout = timeout
        self.generation = 0
        self.settings: dict[str, Any] = {}  # of the new zygote
        self.zygote: Zygote | None = None  # the new one, until it leads
        self.leading = False  # it leads, or has led
        self.before: Zygote | None = None  # that led before, while it can lead again
        self.settings_before: dict[str, Any] = {}
        self.failure: ReloadFailed | None = None  # why it turns back
        self.successor: Worker | None = None  # not ready yet
        self.leaving: Worker | None = None  # whom the last successor replaces
        self.attempts = 0  # that have failed, of the step that is under way
        self.short = False  # of descriptors, for the next process
        self.started = self.drained = self.killed = 0
        # Monotonic times.
        self.began = 0.0
        self.not_before = 0.0  # of the next attempt
        self.deadline = 0.0  # by which the next worker must be ready
        self.drain_by = 0.0  # at which who leaves is killed
        self.overdue = False  # it was


class Reloads(Zygotes):
    """The reloads of one runtime. Thread-safety: for the supervisor's thread, but for `ask_reload`."""

    def __init__(self, settings: config.Settings, table: serializer.FunctionTable) -> None:
        super().__init__(settings, table)
        self._table = table
        self._asked: deque[Reload] = deque()
        self._reload: Reload | None = None  # the one that is under way
        self.outcomes: Counter[str] = Counter()  # of reloads

    def ask_reload(self, timeout: float) -> Reload:
        """Have the code reloaded, after the reloads that were asked for before."""
        reload = Reload(timeout)
        self._asked.append(reload)
        self.wake()
        return reload

    @property
    def generation(self) -> int:
        """Of the code that new workers get."""
        return self._generation

    @property
    def reloading(self) -> bool:
        """Whether a reload is under way."""
        return self._reload is not None

    def _reload_due(self, now: float) -> float:
        """Monotonic time of the next thing that happens to a reload by the clock."""
        due = min((zygote.leave_by for zygote in self._others if zygote.leave_by), default=now + 60.0)
        reload = self._reload
        if reload is None:
            return due
        if reload.leaving is not None:
            return min(due, reload.drain_by)
        if reload.successor is None and reload.not_before > now:
            due = min(due, reload.not_before)
        return min(due, reload.deadline)

    # ---- the states ----------------------------------------------------------------------------------

    def _follow_reload(self) -> None:
        """The next step of the reload that is under way, if it is due."""
        now = time.monotonic()
        if self.stopping:
            self._refuse_reloads()
            return
        if self._reload is None and self._asked:
            self._begin(self._asked.popleft(), now)
        reload = self._reload
        if reload is None:
            return
        if reload.leaving is not None:
            self._drain_old(reload, reload.leaving, now)
        elif now >= reload.deadline:
            self._fail_reload(reload, f"{self._what_is_late(reload)} took longer than {reload.timeout:g} s")
        elif reload.successor is None and now >= reload.not_before:
            self._advance(reload, now)

    def _begin(self, reload: Reload, now: float) -> None:
        self._reload = reload
        reload.began = now
        reload.deadline = now + reload.timeout
        with contextlib.suppress(OSError):  # whether there are enough is seen as they are needed
            raise_descriptor_limit(1)
        # Where a rollback has failed, workers of a later generation than the one that leads serve on.
        serving = [it.zygote.generation for it in self._slots.values() if not (it.stopping or it.died)]
        reload.generation = 1 + max([self._generation, *serving])
        reload.settings = {
            **self._zygote_settings,
            "preload": list(self.settings.preload),
            "imports": [],
            "known": [name for name in self._table.modules() if name not in self.settings.preload],
            "generation": reload.generation,
        }

    def _advance(self, reload: Reload, now: float) -> None:
        """Start what is to be started next; if that is nothing, it is done."""
        if not reload.leading and reload.zygote is None:
            if self._lacks_room(reload, now):  # it takes about as many for a moment
                return
            try:
                reload.zygote = self._exec_zygote(reload.settings)
                self._others.append(reload.zygote)
            except OSError as error:
                self._try_again(reload, f"no process for the new zygote could be made: {error}")
            return
        zygote = self._zygote if reload.leading else reload.zygote
        if zygote is None or not zygote.started:
            return
        number = self._next_number(reload)
        if number is not None:
            self._start_successor(reload, number, zygote, now)
        elif reload.leading:
            self._end_reload(reload, reload.failure)
        else:  # a paused runtime: there is no worker to be tried
            self._take_over(reload)
            self.wake()

    def _next_number(self, reload: Reload) -> int | None:
        """Whose worker is replaced next. Numbers without one get one of the generation that leads anyway: but
        where that has failed to start, the next attempt decides.
        """
        for n, number in self._wanted.items():
            if not reload.leading or (number.restarts.in_a_row and not number.served):
                return n
            worker = number.worker
            if worker and not worker.stopping and worker.zygote.generation != self._generation:
                return n
        return None

    def _start_successor(self, reload: Reload, number: int, zygote: Zygote, now: float) -> None:
        if self._lacks_room(reload, now):
            return
        worker = self._new_worker(number, zygote)
        if worker is None:  # all slots are being swept
            reload.not_before = now + NO_DESCRIPTORS
            return
        worker.successor = True
        reload.successor = worker
        self._order(worker)

    def _lacks_room(self, reload: Reload, now: float) -> bool:
        """Whether there are too few descriptors for one more process; it is tried again soon."""
        reload.short = self._starts_possible() <= 0
        if reload.short:
            reload.not_before = now + NO_DESCRIPTORS
        return reload.short

    def _succeeded(self, worker: Worker) -> None:
        reload = self._reload
        assert reload is not None and reload.successor is worker
        worker.successor = False
        reload.successor = None
        reload.attempts = 0
        reload.started += 1
        if not reload.leading:
            self._take_over(reload)
        number = self._numbers[worker.number]
        old, number.worker = number.worker, worker
        now = time.monotonic()
        reload.deadline = now + reload.timeout
        if old is not None and not old.died:
            if not old.stopping:
                self._let_go(old)
            if old.ready:  # else it runs nothing; and it may not be forked yet, by a zygote that stands still
                reload.leaving, reload.overdue = old, False
                reload.drain_by = now + self.settings.drain_timeout
        self.wake()

    def _drain_old(self, reload: Reload, old: Worker, now: float) -> None:
        """Wait for the end of who was replaced; the sweep of its slot is still to come."""
        if old.died:
            if reload.overdue:
                reload.killed += 1
            elif self.dispatcher.phase(old.slot) == _core.PHASE_LEAVING:
                reload.drained += 1
            reload.leaving = None
            reload.deadline = now + reload.timeout
            self.wake()
        elif now >= reload.drain_by:
            reload.overdue = True
            old.suspicion = ": it had not finished within the drain_timeout of a reload"
            self.dispatcher.signal(old.slot, signal.SIGKILL)
            reload.drain_by = now + 1.0

    def _take_over(self, reload: Reload) -> None:
        """The new zygote leads. The one before stays for its workers, and may have to lead again."""
        zygote, reload.zygote = reload.zygote, None
        assert zygote is not None
        self._others.remove(zygote)
        reload.leading = True
        reload.settings_before = self._zygote_settings
        reload.before = self._lead(zygote, reload.settings)
        if reload.before is not None and not reload.before.started:
            self._quit(reload.before)
            reload.before = None

    def _lead(self, zygote: Zygote, settings: dict[str, Any]) -> Zygote | None:
        """From now on this one forks. The one that did so far."""
        before, self._zygote = self._zygote, zygote
        self._zygote_settings, self._generation = settings, zygote.generation
        self._zygote_failures, self._zygote_at = 0, 0.0
        for number in self._numbers.copy().values():
            number.restarts.lived()  # failures of the other code do not count
        if before is not None:
            self._others.append(before)
        return before

    def _turn_back(self, reload: Reload, zygote: Zygote) -> None:
        """The zygote from before leads again; workers of the new generation are replaced by its own."""
        self._others.remove(zygote)
        self._lead(zygote, reload.settings_before)
        reload.before = None
        reload.attempts, reload.not_before = 0, 0.0
        reload.deadline = time.monotonic() + reload.timeout
        self.wake()

    # ---- what goes wrong -----------------------------------------------------------------------------

    def _not_succeeded(self, worker: Worker, failure: BrokenRuntime | None) -> None:
        reload = self._reload
        if reload is None or reload.successor is not worker:
            return
        reload.successor = None
        if failure is None:
            self.wake()
        elif failure.__cause__ is not None:
            self._fail_reload(reload, str(failure), failure.__cause__)
        else:
            self._try_again(reload, str(failure))

    def _other_reported(self, zygote: Zygote, report: Report) -> None:
        reload = self._reload
        if reload is None or zygote is not reload.zygote:
            return
        module = report.fields["module"]
        if report.what == "failed":
            text = f"preload module {module!r} raised {report.fields['error']}"
            self._fail_reload(reload, f"{text}\n\n{report.fields['traceback'].rstrip()}")
        else:
            self._import_in_workers(reload.settings, module)
            reload.attempts -= 1  # it ends now, and this one does not count

    def _other_died(self, zygote: Zygote, reason: str) -> None:
        reload = self._reload
        if reload is None:
            return
        if zygote is reload.before:
            reload.before = None
        elif zygote is reload.zygote:
            reload.zygote = None
            self._drop_successor(reload)
            self._try_again(reload, reason)

    def _try_again(self, reload: Reload, reason: str) -> None:
        """Something has ended without saying why: it may have been killed, which says nothing of the code."""
        reload.attempts += 1
        if reload.attempts >= _ATTEMPTS:
            self._fail_reload(reload, f"{reason} (the last of {reload.attempts} attempts)")
            return
        if reload.attempts > 0:
            reload.not_before = time.monotonic() + backoff(reload.attempts)
            log.warning("reload: %s; trying again", reason)
        self.wake()

    def _fail_reload(self, reload: Reload, reason: str, cause: BaseException | None = None) -> None:
        if cause is not None:
            reason += "\n\n" + "".join(traceback.format_exception(cause)).rstrip()
        self._drop_successor(reload)
        if reload.failure is not None:
            reload.failure.add_note(f"It could not be rolled back, and workers of both serve on: {reason}")
            self._end_reload(reload, reload.failure)
            return
        serves = f"generation {reload.generation - 1} serves on"
        if reload.leading and reload.before is None:
            serves = f"generation {reload.generation} serves on, as the zygote of the one before has died"
        error = ReloadFailed(f"the reload failed, and {serves}: {reason}")
        error.__cause__ = cause
        if reload.leading and reload.before is not None:
            reload.failure = error
            self._turn_back(reload, reload.before)
        else:
            self._end_reload(reload, error)

    def _what_is_late(self, reload: Reload) -> str:
        zygote = reload.zygote
        if reload.short:
            return "waiting for free file descriptors"
        if reload.successor is not None:
            return "a worker's start"
        if zygote is not None and zygote.importing:
            return f"importing preload module {zygote.importing!r}"
        return "the start of a worker" if reload.leading else "the start of the new zygote"

    # ---- the end -------------------------------------------------------------------------------------

    def _end_reload(self, reload: Reload, error: RuntimeFailure | None) -> None:
        self._reload = None
        self._drop_successor(reload)
        zygote, reload.zygote = reload.zygote, None
        if zygote is not None:
            self._quit(zygote)
        if error is not None:
            reload.error = error
        else:
            seconds = time.monotonic() - reload.began
            reload.report = ReloadReport(
                reload.generation, reload.started, reload.drained, reload.killed, seconds
            )
        self.outcomes["done" if error is None else "refused"] += 1
        reload.done.set()
        self.wake()

    def _refuse_reloads(self) -> None:
        """The runtime ends."""
        if self._reload is not None:
            self._end_reload(self._reload, ReloadFailed("the runtime ended during the reload"))
        while self._asked:
            reload = self._asked.popleft()
            reload.error = ReloadFailed("the runtime ended before the reload began")
            reload.done.set()

    def _drop_successor(self, reload: Reload) -> None:
        """It starts for nobody."""
        worker, reload.successor = reload.successor, None
        if worker is not None and not worker.died:
            self._let_go(worker)

    def _quit(self, zygote: Zygote) -> None:
        """It ends its children, and itself; at once, if it can have no workers yet."""
        zygote.leave_by = time.monotonic() + QUIT_WAIT
        if zygote.started:
            zygote.order("quit")
        else:
            zygote.kill()

    def _dismiss(self) -> None:
        """Zygotes that do not lead quit when the slot of their last worker is swept."""
        now = time.monotonic()
        reload = self._reload
        needed = (reload.zygote, reload.before) if reload is not None else ()
        for zygote in self._others:
            if zygote.leave_by:
                if now >= zygote.leave_by:
                    zygote.kill()
                    zygote.leave_by = now + 1.0
            elif zygote not in needed and not any(it.zygote is zygote for it in self._slots.values()):
                self._quit(zygote)
