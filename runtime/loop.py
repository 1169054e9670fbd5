"""What a worker does: one loop of look, run, answer.

    zygote ──fork──► main() ── connect ── initializer ── READY
                        │
                        └─► claim a lease ─► load function and arguments ─► run ─► deliver ─┐
                              ▲   nothing there: wait for a hint, at most 2 s               │
                              └─────────────────────────────────────────────────────────────┘

It leaves when the control word says so, when it has run its share of tasks, when it is asked by SIGTERM
(after the running item), and at once when it loses a lease or its host. What it held is swept by the host.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import warnings
from typing import NamedTuple

from runtime import _core, config, forking, memory, serializer
from runtime.calls import Calls, Leave, item_of
from runtime.children import Children
from runtime.contexts import Context, Here
from runtime.refs import resolve_with
from runtime.sockets import Paths, WorkerLink

__all__ = ["EXIT_DESCRIPTORS", "EXIT_FAILED", "EXIT_HOST_GONE", "EXIT_ORPHANED", "Orders", "Worker"]

EXIT_FAILED = 70  # the initializer raised; the exception is in the bounce block
EXIT_HOST_GONE = 72  # the host has ended
EXIT_DESCRIPTORS = 73  # a task closed descriptors that were not its own
EXIT_ORPHANED = 74  # the zygote died before this worker was ready; another one is started

_IDLE_WAIT = 2.0  # seconds between two looks without a hint; the host's rescan is what finds a lost one


class Orders(NamedTuple):
    """What a worker is told at its fork."""

    slot: int
    number: int
    generation: int
    paths: Paths
    host_pidfd: int
    zygote_pid: int
    initializer: tuple[int, bytes, bytes, tuple[bytes, ...], tuple[bool, ...]] | None
    max_tasks: int | None
    max_rss: int | None
    folder: bytes  # of the sockets: who ends last removes it
    imports: tuple[str, ...]
    records: socket.socket  # channels.py
    stack: int
    levels: dict[str, int] | None  # of the host's loggers; None: records stay here
    threads: int = 1
    known: tuple[str, ...] = ()  # modules whose functions the generation before has run
    service: config.Service | None = None  # what it runs instead of tasks


class Worker(Calls):
    """The loop, and what it needs."""

    Link: type[WorkerLink] = WorkerLink
    Cache: type[serializer.FunctionCache] = serializer.FunctionCache

    def __init__(self, arena: _core.Arena, orders: Orders, context: Context) -> None:
        self.orders = orders
        self.context = context
        self.arena = arena
        self.pid = os.getpid()
        self.port = _core.Runner(arena, orders.slot, self.notify)
        self.link = self.Link(orders.paths, orders.slot, self.port.incarnation)
        self.functions = self.Cache()
        self.children = Children()
        context.serve(self.port)
        resolve_with(self.port.resolve)
        self.waiting = False
        self.found = False  # there were leases when it woke up last
        self.rss_checked = 0.0
        # Workers that grow alike shall not all leave at once: each has a limit of its own, 90 to 100 % of it.
        self.max_rss = orders.max_rss and orders.max_rss * (1 - 0.1 * os.urandom(1)[0] / 255)
        self.share = (
            orders.max_tasks if orders.max_tasks is not None else -1
        )  # tasks and items that it may run
        self.port.attend(self, context, self.functions, orders.host_pidfd, self.share, EXIT_DESCRIPTORS)
        forking.watch(self)

    def forked(self) -> None:
        """In a child that a task forked: what it does to the region stays its own."""
        Here.forked = True
        self.arena.make_private()

    def notify(self) -> None:
        """Tell the host to look at the outbox."""
        self.link.notify()

    # ---- starting ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, import, initialise, and say so."""
        if not self.link.greet(self.orphaned):
            os._exit(EXIT_ORPHANED)
        try:
            self.prepare()
        except BaseException as error:
            if self.orphaned():
                os._exit(EXIT_ORPHANED)  # the slot may be another process's by now
            self.port.fail(self.packed_failure(error))
            self.notify()
            self.link.close()
            os._exit(EXIT_FAILED)
        if self.orphaned():
            os._exit(EXIT_ORPHANED)
        self.prepared()

    def prepare(self) -> None:
        """Import and initialise: what may fail by the user's code."""
        for name in self.orders.imports:
            __import__(name)
        self.initialise()
        self.import_known()

    def prepared(self) -> None:
        """From now on the host leases to this worker."""
        self.warn_of_size()
        self.port.ready()
        self.notify()

    def warn_of_size(self) -> None:
        """A limit that is exceeded before the first task costs a process for each."""
        if self.max_rss is not None and (memory.unshared() or 0) > self.max_rss:
            with contextlib.suppress(RuntimeWarning):  # under -W error
                warnings.warn(  # the same text from every worker: so it is shown once
                    f"max_worker_rss is {self.orders.max_rss} bytes, and workers have more, or over 90 % of "
                    f"that, before their first task, so they are replaced after every task; raise it",
                    RuntimeWarning,
                    stacklevel=1,
                )

    def ask_to_leave(self) -> None:
        """SIGTERM: what runs is finished. The host takes back what does not, and starts the next worker."""
        self.port.leaving = True
        self.port.leave()

    def orphaned(self) -> bool:
        """Whether the zygote died before the host can have heard of this process from it."""
        return os.getppid() != self.orders.zygote_pid

    def import_known(self) -> None:
        """After a reload: what is wrong with modules that tasks need shall be found before the first one."""
        for name in self.orders.known:
            try:
                __import__(name)
            except BaseException as error:
                missing = error.name if isinstance(error, ModuleNotFoundError) else None
                if missing is not None and f"{name}.".startswith(f"{missing}."):
                    continue  # the new code has no such module
                error.add_note(f"(imported for module {name!r}, whose functions have been submitted)")
                raise

    def initialise(self) -> None:
        """Run the initializer, if there is one."""
        if self.orders.initializer is None:
            return
        ident, fn_data, data, buffers, readonly = self.orders.initializer
        views = [
            memoryview(b).toreadonly() if r else memoryview(bytearray(b))
            for b, r in zip(buffers, readonly, strict=True)
        ]
        fn, args, kwargs = serializer.unpack_call(self.functions, ident, fn_data, data, views)
        fn(*args, **kwargs)

    def packed_failure(self, error: BaseException) -> bytes:
        """An exception as one frame that fits the bounce block."""
        limit = self.port.arena.bounce_bytes
        frame = _core.Frame([item_of(_core.S_ERROR, serializer.dump_exception(error))])
        if frame.nbytes > limit:
            short = RuntimeError(f"{type(error).__name__}: {ascii(error)[: limit // 64]} ...")
            frame = _core.Frame([item_of(_core.S_ERROR, serializer.dump_exception(short))])
        return bytes(frame.tobytes())

    # ---- the loop ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until told to leave. The exit code."""
        try:
            self.loop()
        except Leave:  # SIGTERM came just before or after the wait
            pass
        self.port.leave()
        self.notify()
        return 0

    def rest(self) -> None:
        """Wait for a hint, unless SIGTERM has come; or until it comes."""
        self.waiting = True
        try:
            if self.link.forget() and self.found:
                self.port.rescued()  # a repeated hint was what it took to find them
            self.found = False
            if not self.port.leaving and self.port.park() and not self.port.stopping:
                self.link.wait(_IDLE_WAIT)
                self.found = self.port.unseen
        except Leave:
            pass
        finally:
            self.waiting = False
            self.port.unpark()

    def check(self) -> None:
        """Now and then: give back what is not needed, see whether this process may stay."""
        self.port.flush()
        self.children.reap()
        if self.too_large():
            self.port.leaving = True

    @property
    def worked(self) -> bool:
        """Whether it has run anything."""
        return self.port.left != self.share

    def too_large(self) -> bool:
        """Whether it has grown over its limit, looked at ten times a second at most.

        One that has run nothing stays: what replaces it would be as large.
        """
        if self.max_rss is None or not self.worked or time.monotonic() - self.rss_checked <= 0.1:
            return False
        self.rss_checked = time.monotonic()
        return (memory.unshared() or 0) > self.max_rss
