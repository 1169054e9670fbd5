"""A Runtime that is the main program: what signals, `runtime ctl` and the service manager ask of it.

    USR1, HUP    reload the code               TTIN, TTOU   one worker more, one less
    TERM         drain, then stop              QUIT         stop now
    INT          the first like TERM, but within `interrupt_grace` seconds if there are such; the second: QUIT

The interpreter writes the number of each signal into a socket, in C, whatever the main thread does just then;
a thread reads it and acts. So a signal is obeyed while the main thread computes, waits, or belongs to the
user's function. That is ended by an exception at last: by KeyboardInterrupt after INT, as soon as the runtime
is drained or the grace is over; by SystemExit after TERM and QUIT, a second after the runtime has ended; and
what catches that, by the end of the process.

    SERVING ── TERM, INT, drain ──► DRAINING ── QUIT, INT, drain_timeout ──► STOPPING ──► ended
        └────────── QUIT, stop ────────────────────────────────────────────────▲
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from runtime.cli import exits
from runtime.cli.listeners import host_and_port
from runtime.cli.notify import Notifier
from runtime.control import Verbs
from runtime.errors import RuntimeFailure

if TYPE_CHECKING:
    from runtime.executor import Runtime
    from runtime.metrics import MetricsServer

__all__ = ["Phase", "Program"]

_RELOAD = (signal.SIGUSR1, signal.SIGHUP)
_SIGNALS = (*_RELOAD, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGTTIN, signal.SIGTTOU)
_NOTICE = 1.0  # seconds that the main thread has to see that the runtime has ended
_LAST = 1.0  # seconds that it has for the exception that ends it
_WAKE = 0  # no signal: look at the clock

log = logging.getLogger("runtime")


class Phase(enum.Enum):
    """What the program is doing."""

    SERVING = "running"
    DRAINING = "draining"
    STOPPING = "stopping"


class Program:
    """The signals of the main program, and the verbs that others ask for.

    A context manager for the main thread. Thread-safety: the verbs may be called from any thread.
    """

    def __init__(
        self,
        rt: Runtime,
        notifier: Notifier,
        *,
        drain_timeout: float,
        interrupt_grace: float | None = None,
        interrupts: bool = True,
    ) -> None:
        """interrupts: the main thread is the user's, and is ended by an exception."""
        self.rt = rt
        self.phase = Phase.SERVING
        self.ended_by = 0  # the signal, or TERM for `ctl`
        self._notifier = notifier
        self._drain_timeout = drain_timeout
        self._interrupt_grace = drain_timeout if interrupt_grace is None else interrupt_grace
        self._interrupts = interrupts
        # Sockets, since a closed one is nobody else's descriptor to those who come late.
        self._told, self._teller = socket.socketpair()
        self._told.setblocking(False)
        self._teller.setblocking(False)
        self.hurried = False  # told to stop now, while it drained or at once
        self._stop_at = 0.0  # monotonic time at which draining is over
        self._throw: BaseException | None = None  # what ends the main thread
        self._left = threading.Event()
        self._reloads = threading.Semaphore(2)  # one that runs, one that waits: that sees the newest code
        self._thread = threading.Thread(target=self._follow, name="runtime-program", daemon=True)

    def __enter__(self) -> Program:
        control = self.rt._core.control
        if control is not None:
            control.verbs = ProgramVerbs(control.name, self)
        self._handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._teller.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._poke(_WAKE)
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._notifier.stopping()
        self._told.close()
        self._teller.close()

    @property
    def exit_code(self) -> int:
        """What a shell makes of the signal that has ended it."""
        return exits.INTERRUPTED if self.ended_by == signal.SIGINT else 128 + self.ended_by

    def serve_metrics(self, address: str) -> contextlib.closing[MetricsServer]:
        """To be entered. Raises: exits.Usage."""
        from runtime.metrics import MetricsServer

        try:
            server = MetricsServer(self.rt, host_and_port(address), lambda: self.state)
        except ImportError as error:
            raise exits.Usage(str(error)) from None
        except OSError as error:
            raise exits.Usage(f"cannot serve metrics on {address}: {error.strerror or error}") from None
        server.start()
        host, port = server.address
        log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)
        return contextlib.closing(server)

    # ---- the verbs -----------------------------------------------------------------------------------

    def reload(self, timeout: float | None = None) -> Any:
        """Reload the code; blocks until that is done. Raises: ReloadFailed, BrokenRuntime, RuntimeError."""
        self._notifier.reloading()
        try:
            report = self.rt.reload(timeout=timeout)
        finally:
            if self.phase is Phase.SERVING:  # else it was told that this is the end
                self._notifier.ready()
        log.info(
            "reloaded: generation %d serves (%d started, %d drained, %d killed, %.2f s)",
            report.generation, report.started, report.drained, report.killed, report.seconds,
        )  # fmt: skip
        return report

    def reload_soon(self) -> None:
        """Reload in the background; what goes wrong is logged. One that waits to begin stands for all."""
        if not self._reloads.acquire(blocking=False):
            return
        try:
            threading.Thread(target=self._reload_quietly, name="runtime-reload", daemon=True).start()
        except RuntimeError as error:  # the signals' thread goes on
            self._reloads.release()
            log.error("not reloaded: %s", error)

    def scale(self, workers: int) -> None:
        """Have so many workers. Raises: as Runtime.scale."""
        self.rt.scale(workers)
        log.info("scaled to %d worker%s", workers, "" if workers == 1 else "s")

    @property
    def state(self) -> str:
        """What it is doing."""
        return self.phase.value if self.phase is not Phase.SERVING else self.rt._core.condition

    def drain(self) -> None:
        """Take nothing new, finish what was accepted, stop."""
        self._poke(signal.SIGTERM)

    def stop(self) -> None:
        """Stop now."""
        self._poke(signal.SIGQUIT)

    # ---- signals -------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread. The thread was told, unless somebody, asyncio say, has a wakeup of his own."""
        if self._throw is not None:
            error, self._throw = self._throw, None
            raise error
        now = signal.set_wakeup_fd(self._teller.fileno(), warn_on_full_buffer=False)
        if now != self._teller.fileno():
            signal.set_wakeup_fd(now)
            self._poke(number)

    def _poke(self, number: int) -> None:
        with contextlib.suppress(OSError):  # full: there is enough to do; closed: it has ended
            self._teller.send(bytes([number]))

    def _follow(self) -> None:
        """The thread: until the main thread has left."""
        sign = self._sign_of_life()
        poller = select.poll()
        poller.register(self._told, select.POLLIN)
        while not self._left.is_set():
            if poller.poll(self._patience() * 1000):
                for number in self._told.recv(4096):
                    self._act(number)
            next(sign)
            if self.phase is not Phase.SERVING and self._finish():
                return

    def _finish(self) -> bool:
        """Whether the end has come, of the runtime and, if that is ours to see to, of the main thread."""
        ended, interrupted = self.rt._core.ended.is_set(), self.ended_by == signal.SIGINT
        late = self.phase is Phase.DRAINING and time.monotonic() >= self._stop_at
        if self._interrupts and interrupted and (ended or late):
            self._end_main(0.0)
            return True
        if late and not ended:
            log.warning("not drained after %g s: stopping now", self._drain_timeout)
            self._begin_stop(self.ended_by)
        if ended and self._interrupts:
            self._end_main(_NOTICE)
        return ended

    def _patience(self) -> float:
        if self.phase is not Phase.SERVING:
            return 0.02
        return self._notifier.interval or 3600.0

    def _act(self, number: int) -> None:
        if number in _RELOAD:
            self.reload_soon()
        elif number in (signal.SIGTTIN, signal.SIGTTOU):
            self._scale_by(1 if number == signal.SIGTTIN else -1)
        elif number == signal.SIGTERM:
            self._begin_drain(number, self._drain_timeout)
        elif number == signal.SIGQUIT or (number == signal.SIGINT and self.phase is not Phase.SERVING):
            self.hurried = True
            self._begin_stop(number)
        elif number == signal.SIGINT:
            self._begin_drain(number, self._interrupt_grace)

    def _scale_by(self, more: int) -> None:
        try:
            self.scale(max(1, self.rt._max_workers + more))
        except (ValueError, RuntimeError, OSError, RuntimeFailure) as error:
            log.warning("not scaled: %s", error)

    def _reload_quietly(self) -> None:
        try:
            self.reload()
        except (RuntimeError, RuntimeFailure, OSError) as error:
            log.error("%s", error)
        finally:
            self._reloads.release()

    # ---- the end -------------------------------------------------------------------------------------

    def _begin_drain(self, number: int, seconds: float) -> None:
        if self.phase is not Phase.SERVING:
            return
        self.phase, self.ended_by = Phase.DRAINING, number
        self._stop_at = time.monotonic() + seconds
        self._notifier.stopping()
        log.info("draining, for at most %g s", seconds)
        self.rt.shutdown(wait=False)

    def _begin_stop(self, number: int) -> None:
        if self.phase is Phase.STOPPING:
            return
        self.phase, self.ended_by = Phase.STOPPING, number
        self._notifier.stopping()
        self.rt.kill_workers()

    def _end_main(self, notice: float) -> None:
        """What runs in the main thread ends, by itself or not."""
        if self._left.wait(notice):
            return
        for _ in range(2):
            self._throw = (
                KeyboardInterrupt() if self.ended_by == signal.SIGINT else SystemExit(self.exit_code)
            )
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if self._left.wait(_LAST):
                return
            self.rt.kill_workers()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(self.exit_code)

    # ---- signs of life -------------------------------------------------------------------------------

    def _sign_of_life(self) -> Iterator[None]:
        """One for the service manager whenever the supervisor's thread has turned since the last one."""
        interval, seen, sent = self._notifier.interval, -1.0, 0.0
        while True:
            now = time.monotonic()
            if interval and now - sent >= 0.9 * interval:
                turned = self.rt._core.turned
                if turned != seen:
                    self._notifier.alive()
                    seen, sent = turned, now
                self.rt._core.wake()  # and look again the next time
            yield


class ProgramVerbs(Verbs):
    """What `runtime ctl` asks of a main program."""

    def __init__(self, name: str, program: Program) -> None:
        super().__init__(name, program.rt)
        self._program = program

    @property
    def state(self) -> str:
        """As that of a Runtime."""
        return self._program.state

    def reload(self, timeout: float | None = None) -> dict[str, Any]:
        """The service manager is told, too."""
        return dataclasses.asdict(self._program.reload(timeout))

    def scale(self, n: int) -> None:
        """It is logged, too."""
        self._program.scale(n)

    def drain(self) -> None:
        """As SIGTERM."""
        self._program.drain()

    def stop(self) -> None:
        """As SIGQUIT."""
        self._program.stop()
