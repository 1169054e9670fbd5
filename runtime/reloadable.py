"""`Reloadable`: the part of a Runtime that asks for new code. What comes of that is in reloads.py."""

from __future__ import annotations

import abc
import threading

from runtime import config
from runtime.reloads import ReloadReport
from runtime.supervisor import Supervisor

__all__ = ["Reloadable"]


class Reloadable(abc.ABC):
    """A Runtime, as far as reloads go. Thread-safety: any thread, but the runtime's own."""

    _settings: config.Settings

    @abc.abstractmethod
    def _usable(self) -> Supervisor:
        """Raises: RuntimeError, BrokenRuntime, where nothing can be asked of it."""

    @abc.abstractmethod
    def _ended(self) -> Exception:
        """Why that is so."""

    def reload(self, *, timeout: float | None = None) -> ReloadReport:
        """Replace the code of the workers by what is in its files now, without losing a task.

        A new interpreter imports `preload` afresh, and a worker of it starts, with the initializer, beside an
        old one. When that is ready, it takes over, and the old one finishes what it runs, within
        drain_timeout: then it is killed, which is a worker's death to its tasks. The next one follows. So
        there is always a worker ready for each number that had one. `state`, the queue and the region stay.
        Functions that travel by value, and what is defined in `__main__`, are the host's and stay as they
        are.

        timeout: seconds for the imports and the first worker, and anew for each further worker; None: 60.
        Returns when the last old worker is gone. A second reload waits for the end of the first. Ctrl-C ends
        the waiting, not the reload. Thread-safety: any thread, but those of a callback. Raises: ReloadFailed
        with the reason when the new code does not start: the old code serves on; or when the runtime is shut
        down meanwhile. ValueError with start_method="fork"; TypeError, ValueError for a bad timeout;
        RuntimeError after shutdown, in a fork and in a callback; BrokenRuntime.
        """
        seconds = config.reload_timeout(timeout)
        if self._settings.start_method == "fork":
            raise ValueError(
                'start_method="fork" cannot reload: its workers are forks of this process and have its '
                'modules; use start_method="exec"'
            )
        core = self._usable()
        if threading.current_thread() in core.threads:
            raise RuntimeError("reload() cannot be called in a callback: it waits for this very thread")
        core.dispatcher.must_not_wait()
        asked = core.ask_reload(seconds)
        while not asked.done.wait(1.0) and not (core.ended.is_set() or not core.supervising.is_alive()):
            pass
        if asked.report is None:
            raise asked.error or self._ended()
        return asked.report
