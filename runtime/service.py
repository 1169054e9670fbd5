"""A worker that runs a service: `TARGET(ctx)` in its main thread, until it is told to stop.

    main thread                           watcher
    TARGET(ctx) …                         READY when it has run for `settle` seconds, or says ctx.ready()
      ctx.stopping is set            ◄──  told to stop: control word, SIGTERM, SIGUSR2, too large
    returns ── LEAVING ── exit

What ends unasked has failed, whether it raised or returned: before READY the host is given the exception,
after it the exception is logged and the process exits with EXIT_SERVICE. One that is told to stop has the
`drain_timeout` of the runtime for it.

A signal handler may not touch what `ctx.stopping` is made of, since it may have interrupted its wait(): it
rings the watcher, who sets it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from runtime import _core, config
from runtime.contexts import Context, Here
from runtime.loop import EXIT_FAILED, EXIT_ORPHANED, Orders, Worker
from runtime.sockets import CrewLink
from runtime.state import SharedState

if TYPE_CHECKING:
    import asyncio

__all__ = ["EXIT_SERVICE", "ServiceContext", "ServiceWorker"]

EXIT_SERVICE = 75  # the service ended without being asked to; its log says how

_LOOK = 1.0  # seconds between two looks at the control word without a hint, at children and at the size
_GROWN_UP = 10.0  # seconds after which a process that is too large is replaced: the next one may be as large


class ServiceContext:
    """What `runtime serve` gives a service: where it runs, what it shares, and when it has to stop.

    stopping: a threading.Event, set when the service shall finish what it has begun and return. sockets: the
    listening sockets of `--bind` and LISTEN_FDS, in this order; the same ones in every worker, also of the
    next generation, so closing one here ends only this worker's part. region: a SharedRegion that all workers
    share. pool: a MemoryPool in it. state: the SharedState. log: a logger whose records the main program
    shows. number, generation: of this worker, and of its code.
    """

    def __init__(self, worker: ServiceWorker, context: Context, service: config.Service) -> None:
        self.stopping = threading.Event()
        self.number = context.number
        self.generation = context.generation
        self.log = context.log
        self.sockets = tuple(socket.socket(fileno=fd) for fd in service.sockets)
        self._worker = worker
        self._service = service
        self._shared: tuple[_core.SharedRegion, _core.MemoryPool] | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    @property
    def region(self) -> _core.SharedRegion:
        """Shared memory of all workers; its high end is taken by `pool`. Raises: OSError."""
        return self._sharing()[0]

    @property
    def pool(self) -> _core.MemoryPool:
        """Equal blocks in `region`, for all workers. Raises: OSError; RegionFull beyond 4096 processes."""
        return self._sharing()[1]

    @property
    def state(self) -> SharedState:
        """The map of the runtime, see docs/state.md. Raises: RuntimeFailure if it was written over."""
        return self._worker.context.state

    def _sharing(self) -> tuple[_core.SharedRegion, _core.MemoryPool]:
        if self._shared is None:  # two threads may come here; both make the same
            region = _core.SharedRegion.from_fd(self._service.region)
            self._shared = region, _core.MemoryPool(*self._service.pool, region=region)
        return self._shared

    def ready(self) -> None:
        """This service serves from now on: no need to wait until it has run for a while (`--settle`)."""
        self._worker.declared = True
        self._worker.ring()

    async def wait_stopping(self) -> None:
        """Until `stopping` is set. For a coroutine; several may wait, in any loop of this process."""
        import asyncio

        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            if not self.stopping.is_set():  # after it was added: it is in the list of _stop, or sees this
                await waiter
        finally:
            self._waiters.discard(waiter)

    def _stop(self) -> None:
        """The watcher: it is to stop."""
        self.stopping.set()
        for waiter in list(self._waiters):
            with contextlib.suppress(RuntimeError):  # its loop is closed
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    def __repr__(self) -> str:
        return f"<service of worker {self.number}, generation {self.generation}>"


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class ServiceWorker(Worker):
    """A worker whose main thread is the service's. Thread-safety: `ring` and `ask_to_leave` from anywhere."""

    Link = CrewLink
    link: CrewLink

    def __init__(self, arena: _core.Arena, orders: Orders, context: Context) -> None:
        super().__init__(arena, orders, context)
        context._report = None  # there is no task
        assert orders.service is not None
        self.service = orders.service
        self.declared = False  # it has said that it is ready
        self.is_ready = False
        self.asked = False  # SIGTERM has come
        self.over = False  # the service has ended
        self.began = 0.0
        self.bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watcher = threading.Thread(target=self.watch, name="runtime-watcher", daemon=True)

    def ring(self) -> None:
        """Make the watcher look at everything."""
        with contextlib.suppress(OSError):  # full: it is on its way
            os.write(self.bell[1], b".")

    def ask_to_leave(self) -> None:
        """SIGTERM: it stops, and the host starts the next worker."""
        if self.port.stopping and not self.began:  # the host says so, and there is nothing to finish
            os._exit(0)
        self.asked = True
        self.ring()

    # ---- starting ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Import the service, and make what it is called with."""
        super().prepare()
        self.target: Any = importlib.import_module(self.service.module)
        for name in self.service.path.split("."):
            self.target = getattr(self.target, name)
        if not callable(self.target):
            raise TypeError(
                f"{self.service.module}:{self.service.path} is {type(self.target).__name__}, not a function"
            )
        self.ctx = ServiceContext(self, self.context, self.service)

    def prepared(self) -> None:
        """Not ready yet: that is the watcher's to say."""
        self.began = time.monotonic()
        self.link.watch(self.bell[0])
        signal.set_wakeup_fd(self.bell[1], warn_on_full_buffer=False)
        self.watcher.start()

    # ---- the service ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Until the service has ended. The exit code."""
        error: BaseException | None = None
        try:
            result = self.target(self.ctx)
            if inspect.iscoroutine(result):
                import asyncio

                asyncio.run(result)
        except BaseException as failure:
            error = failure
        if Here.forked:  # a child of the service's has come here
            if error is not None:
                raise error
            return 0
        self.over = True
        self.ring()
        self.watcher.join()
        return self.ended(error)

    def ended(self, error: BaseException | None) -> int:
        """Tell the host how it ended; the watcher is gone, so whether it was ready changes no more."""
        if self.ctx.stopping.is_set():
            if isinstance(error, Exception):  # else it ended by what told it to: SystemExit, CancelledError
                self.context.log.error("the service raised as it stopped", exc_info=error)
            self.port.leave()
            self.notify()
            return 0
        if error is None:
            error = RuntimeError("the service returned without being asked to stop")
        if self.is_ready:
            self.context.log.error("the service ended", exc_info=error)
            return EXIT_SERVICE
        self.port.fail(self.packed_failure(error))
        self.notify()
        return EXIT_FAILED

    # ---- the watcher ---------------------------------------------------------------------------------

    def watch(self) -> None:
        """The thread: until the service has ended. A fault of ours ends the process."""
        try:
            while not self.over:
                self.look()
                self.link.wait(self.patience())
        except BaseException:
            if not Here.forked:
                sys.excepthook(*sys.exc_info())
            os._exit(1)

    def look(self) -> None:
        """At everything, once."""
        with contextlib.suppress(OSError):
            while len(os.read(self.bell[0], 4096)) == 4096:
                pass
        self.link.forget()
        if not self.is_ready and (self.declared or self.patience() <= 0.0):
            self.say_ready()
        self.children.reap()
        if self.ctx.stopping.is_set():
            return
        if self.asked or self.too_large():
            self.port.leave()  # the host starts the next one meanwhile
            self.notify()
            self.ctx._stop()
        elif self.port.stopping:
            self.ctx._stop()

    def patience(self) -> float:
        """Seconds until the next look."""
        if self.is_ready:
            return _LOOK
        return min(_LOOK, max(0.0, self.began + self.service.settle - time.monotonic()))

    def say_ready(self) -> None:
        """It has not failed: the host may rely on it."""
        if self.orphaned():
            os._exit(EXIT_ORPHANED)
        if not self.over:
            self.is_ready = True
            self.port.ready()
            self.notify()

    @property
    def worked(self) -> bool:
        """Whether it has run for so long that one which is too large may be replaced."""
        return time.monotonic() - self.began > _GROWN_UP
