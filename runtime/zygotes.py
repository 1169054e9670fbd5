"""Which zygote forks: its start, its reports, its replacement when it dies.

listen   what it reports: importing, started, forked, exited, refused, failed
died     a new one takes over; the workers of the old one are replaced, one by one (lives.py)
others   that do not lead: the next one of a reload, the last one while workers of it live          reloads.py
warn     nothing is killed for slowness at the first start, but it is said what takes so long
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import time
import warnings
from typing import Any

from runtime import _core, config, serializer
from runtime.errors import BrokenRuntime, remote_traceback
from runtime.handle import Heir, Report, Zygote, exec_zygote
from runtime.lifecycle import zygote_settings
from runtime.lives import Lives
from runtime.restarts import FAILURES, backoff
from runtime.zygote import fork_zygote

__all__ = ["Zygotes"]

_ORPHAN_WAIT = 1.0  # seconds for a worker to see that it lost its zygote before it was ready
_HEIR_WAIT = 5.0  # seconds for an heir whose fork is under way to say that it is there
_HEIR_LOOK = 0.005  # seconds between two looks whether it has
_SLOW_START = 10.0  # seconds until the first warning about a slow start
_SLOW_AGAIN = 60.0  # seconds between the further ones

log = logging.getLogger("runtime")


class Zygotes(Lives):
    """The zygote of one runtime, and those before it. Thread-safety: for the supervisor's thread."""

    arena: _core.Arena

    @property
    @abc.abstractmethod
    def stopping(self) -> bool:
        """Whether the runtime ends when nothing is left to do."""

    @abc.abstractmethod
    def _other_reported(self, zygote: Zygote, report: Report) -> None:
        """One that does not lead cannot import a module: it raised, or left a thread."""

    @abc.abstractmethod
    def _other_died(self, zygote: Zygote, reason: str) -> None:
        """One that does not lead has ended."""

    def __init__(self, settings: config.Settings, table: serializer.FunctionTable) -> None:
        super().__init__(settings)
        self._zygote_settings = zygote_settings(settings, table)
        self._environment = {**os.environ, **config.thread_caps(settings.max_workers, settings.threads)}
        self._generation = 1  # of the code that new workers get
        self._others: list[Zygote] = []  # living ones that do not lead
        self._zygote_failures = 0
        self._zygote_at = 0.0  # monotonic time of the next attempt to start one
        self._heir: Heir | None = None  # of a zygote that was forked from the host
        self._heir_by = 0.0  # monotonic time by which it must have said that it is there; 0: it is not needed
        self._warn_at = time.monotonic() + _SLOW_START

    def _zygote_is_there(self) -> bool:
        return self._zygote is not None or (time.monotonic() >= self._zygote_at and self._new_zygote())

    def _first_zygote(self) -> None:
        """A zygote that is forked from the host must be, before we start any thread."""
        if self.settings.start_method == "fork":
            self._zygote = fork_zygote(self._zygote_settings, self.arena, self.state, self._environment)

    def _new_zygote(self) -> bool:
        if self.settings.start_method == "fork":
            return self._take_heir()
        try:
            self._zygote = self._exec_zygote(self._zygote_settings)
        except OSError as error:
            self._zygote_failed(f"no process for the zygote could be made: {error}")
            return False
        return True

    def _exec_zygote(self, settings: dict[str, Any]) -> Zygote:
        """A fresh interpreter. Raises: OSError."""
        self.arena.restate()  # it goes by what it finds there
        zygote = exec_zygote(settings, self.arena, self.state, self._environment)
        zygote.generation = settings["generation"]
        return zygote

    def _living(self) -> list[Zygote]:
        """The zygote that leads, and the others."""
        return [*([self._zygote] if self._zygote is not None else ()), *self._others]

    def _listen(self, ready: set[int]) -> None:
        """Act on what the zygotes report, and on their ends."""
        for zygote in self._living():
            self._listen_to(zygote)
            # A child of its may hold the connection open.
            if zygote.pidfd in ready and zygote in self._living():
                self._zygote_died(zygote)

    def _listen_to(self, zygote: Zygote) -> None:
        for report in zygote.reports():
            worker = self._slots.get(report.fields.get("slot", -1))
            if worker is not None and report.fields["incarnation"] != self.dispatcher.incarnation(
                worker.slot
            ):
                worker = None  # it is about an earlier process of this slot
            if report.what == "forked":
                self._forked(worker, report)
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
                zygote.started = True
                if zygote is self._zygote:
                    self._zygote_failures = 0
            elif report.what == "heir":
                self._meet_heir(zygote, report)
            elif report.what in ("threads", "failed") and zygote is not self._zygote:
                self._other_reported(zygote, report)
            elif report.what == "threads":
                self._import_in_workers(self._zygote_settings, report.fields["module"])
                self._zygote_failures -= 1  # this one does not count
            elif report.what == "failed":
                self._preload_failed(report.fields)
            elif report.what == "":
                self._zygote_died(zygote)

    def _import_in_workers(self, settings: dict[str, Any], module: str) -> None:
        """A fork would leave a module's threads behind, so each worker imports it for itself."""
        with contextlib.suppress(RuntimeWarning):  # under -W error
            warnings.warn(
                f"preload module {module!r} leaves a thread running; it is imported in each worker instead",
                RuntimeWarning,
                stacklevel=1,
            )
        settings["preload"] = [name for name in settings["preload"] if name != module]
        settings["imports"] = [*settings["imports"], module]

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
        code = zygote.wait()
        leading = zygote is self._zygote
        if leading:
            self._zygote = None
        else:
            self._others.remove(zygote)
        for worker in list(self._slots.values()):
            if worker.zygote is zygote and worker.pid is None and not worker.died:
                # Never forked, or never heard of: such a one ends when it sees that its parent is gone. There
                # is none if the zygote had not come to forking, or has ended its children before itself.
                worker.died = time.monotonic()
                worker.patience = _ORPHAN_WAIT if zygote.started and code != 0 else 0.0
                self._retire(worker)
        self._old.append(zygote)
        if self._drained or self.broken is not None:
            return
        what = f"the zygote ended with exit code {code}"
        if zygote.importing:
            what += f" as it imported preload module {zygote.importing!r}"
        if leading:
            self._zygote_failed(what, importing=bool(zygote.importing))
        else:
            self._other_died(zygote, what)

    def _meet_heir(self, zygote: Zygote, report: Report) -> None:
        """A forked zygote makes its spare."""
        try:
            heir = zygote.heir(report)
        except OSError:
            log.warning("the heir of the zygote cannot be reached: this process has no descriptor left")
            return
        if self._heir is not None:  # it has died
            self._heir.close(0.0)
        self._heir = heir

    def _take_heir(self) -> bool:
        """The zygote that was forked is gone, and cannot be forked again: its heir leads now.

        False: it has not said yet that it is there, and is looked for again soon; or there is none.
        """
        now = time.monotonic()
        self._heir_by = self._heir_by or now + _HEIR_WAIT
        heir = None
        if self._heir is not None:
            with contextlib.suppress(EOFError):
                heir = self._heir.meet()
                if heir is None and now < self._heir_by:
                    self._zygote_at = now + _HEIR_LOOK
                    return False
                if heir is None:
                    self._heir.close(0.0)
            self._heir = None
        if heir is None:
            self.fail(
                BrokenRuntime(
                    "the zygote and its heir, both forked from this process, have been killed at once, and "
                    "they cannot be forked again now that it has threads: make a new Runtime, or use "
                    'start_method="exec", whose zygote is always replaced'
                )
            )
            return False
        self._heir_by = 0.0
        settings = self._zygote_settings
        heir.order("lead", preload=settings["preload"], imports=settings["imports"])
        self._zygote = heir
        return True

    def _zygote_failed(self, reason: str, importing: bool = False) -> None:
        """Try again, later each time; without a worker that was ever ready, not often."""
        self._zygote_failures += 1
        if not self._ever_ready and (
            self._zygote_failures >= FAILURES or (importing and self._zygote_failures > 0)
        ):
            self.fail(BrokenRuntime(reason))
            return
        if self._zygote_failures > 0:
            log.warning("%s; starting another", reason)
            self._zygote_at = time.monotonic() + backoff(self._zygote_failures)

    def _warn(self) -> None:
        """Nothing is killed for slowness at the first start, but it is said what takes so long."""
        if self._ever_ready or self.stopping or time.monotonic() < self._warn_at:
            return
        self._warn_at = time.monotonic() + _SLOW_AGAIN
        if not self._wanted:
            return
        zygote = self._zygote
        if zygote is not None and zygote.importing:
            log.warning("preload module %r is still being imported:\n%s", zygote.importing, zygote.stack())
        elif self.settings.initializer is not None:
            stack = ""
            with contextlib.suppress(OSError):  # no descriptor left
                stack = next(iter(self.dump_stacks(None).values()), "")
            log.warning(
                "no worker is ready yet; the initializer %r is still running:\n%s",
                self.settings.initializer,
                stack,
            )
        else:
            log.warning("no worker is ready yet")
