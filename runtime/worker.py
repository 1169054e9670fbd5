"""A worker process: one loop of look, run, answer.

    zygote ──fork──► main() ── connect ── initializer ── READY
                        │
                        └─► claim a lease ─► load function and arguments ─► run ─► deliver ─┐
                              ▲   nothing there: wait for a hint, at most 2 s               │
                              └─────────────────────────────────────────────────────────────┘

It leaves when the control word says so, when it has run its share of tasks, when it is asked by SIGTERM
(after the running item), and at once when it loses a lease or its host. What it held is swept by the host.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from runtime import _core, forwarding, limits, memory, serializer, stacks
from runtime.children import Children
from runtime.refs import resolve_with
from runtime.sockets import Paths, WorkerLink
from runtime.store import new_array

__all__ = [
    "EXIT_DESCRIPTORS",
    "EXIT_FAILED",
    "EXIT_HOST_GONE",
    "EXIT_KILLED",
    "EXIT_ORPHANED",
    "Context",
    "Orders",
    "current",
    "main",
    "reset_signals",
]

EXIT_FAILED = 70  # the initializer raised; the exception is in the bounce block
EXIT_KILLED = 71  # the host killed the lease that this worker was finishing
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


class Context:
    """What `runtime.current()` returns in a worker: who runs this, and for whom.

    number: the worker's number. slot: its row in the region. generation: of the code. thread: of the
    worker, from 0. task: number of the running task. attempt: 1 for its first. local: a dict that lives
    as long as the worker. log: a logger named after the worker.
    """

    __slots__ = (
        "_report",
        "_take",
        "attempt",
        "generation",
        "local",
        "log",
        "number",
        "slot",
        "task",
        "thread",
    )

    def __init__(self, orders: Orders) -> None:
        self.number = orders.number
        self.slot = orders.slot
        self.generation = orders.generation
        self.thread = 0
        self.task: int | None = None
        self.attempt = 0
        self.local: dict[Any, Any] = {}
        self._report: Callable[[Any, Any, Any], None] | None = None
        self._take: Callable[[int], Any] | None = None
        self.log = logging.getLogger(f"runtime.worker.{orders.number}")

    def report(self, done: float, total: float | None = None, note: str = "") -> None:
        """Say how far the running task is: `Future.progress()` in the host shows the newest report.

        done, total: numbers that are not negative, ints below 2**63. note: of its UTF-8, 69 bytes travel.
        It costs less than a microsecond: nothing is sent. While no task runs, and in an item of a map,
        nobody sees it. Raises: TypeError, ValueError, OverflowError for what is no such number or text.
        """
        if self._report is not None:
            self._report(done, total, note)

    def empty(self, shape: int | tuple[int, ...], dtype: Any = float) -> Any:
        """A new array in the region, uninitialised: returned from the task, it is not copied.

        When there is no room, it lies in ordinary memory. shape, dtype, errors: as `Runtime.empty`.
        """
        return new_array(self._take or (lambda nbytes: None), shape, dtype)

    def __repr__(self) -> str:
        return f"<worker {self.number}, task {self.task}, attempt {self.attempt}>"


_context: Context | None = None
_forked = False  # a task has forked, and this is the child: it may not touch what the worker owns


def current() -> Context:
    """The worker, task and attempt that this code runs in. Raises: RuntimeError outside of a worker."""
    if _context is None or _forked:
        raise RuntimeError("runtime.current() is for code that runs in a worker; this process is none")
    return _context


class _Leave(BaseException):
    """Raised by the SIGTERM handler in a worker that waits for work."""


class Worker:
    """The loop, and what it needs."""

    def __init__(self, arena: _core.Arena, orders: Orders, context: Context) -> None:
        self.orders = orders
        self.context = context
        self.port = _core.Runner(arena, orders.slot, self.notify)
        self.link = WorkerLink(orders.paths, orders.slot, self.port.incarnation)
        self.functions = serializer.FunctionCache()
        self.children = Children()
        context._report = self.port.report
        context._take = self.port.empty
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

    def notify(self) -> None:
        """Tell the host to look at the outbox."""
        self.link.notify()

    # ---- starting ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, import, initialise, and say so."""
        if not self.link.greet(self.orphaned):
            os._exit(EXIT_ORPHANED)
        try:
            for name in self.orders.imports:
                __import__(name)
            self.initialise()
        except BaseException as error:
            if self.orphaned():
                os._exit(EXIT_ORPHANED)  # the slot may be another process's by now
            self.port.fail(self.packed_failure(error))
            self.notify()
            self.link.close()
            os._exit(EXIT_FAILED)
        if self.orphaned():
            os._exit(EXIT_ORPHANED)
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

    def orphaned(self) -> bool:
        """Whether the zygote died before the host can have heard of this process from it."""
        return os.getppid() != self.orders.zygote_pid

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
        frame = _core.Frame([_item(_core.S_ERROR, serializer.dump_exception(error))])
        if frame.nbytes > limit:
            short = RuntimeError(f"{type(error).__name__}: {ascii(error)[: limit // 64]} ...")
            frame = _core.Frame([_item(_core.S_ERROR, serializer.dump_exception(short))])
        return bytes(frame.tobytes())

    # ---- the loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until told to leave."""
        try:
            self.loop()
        except _Leave:  # SIGTERM came just before or after the wait
            pass
        self.port.leave()
        self.notify()

    def loop(self) -> None:
        """Look, run, answer."""
        port = self.port
        while not (port.leaving or port.stopping):
            entry = port.serve()
            if entry >= 0:
                self.execute(entry)
            elif entry == _core.LEASE_LOST:
                os._exit(EXIT_KILLED)
            elif not port.watch():
                self.check()
                port.tell_untold()
                self.rest()

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
        except _Leave:
            pass
        finally:
            self.waiting = False
            self.port.unpark()

    def execute(self, entry: int) -> None:
        """Run a call that is not ordinary: its function is new here, or its arguments are large."""
        try:
            exporter: Any = self.port.frame(entry)
        except MemoryError as error:  # no memory for arguments that travel by value
            exporter, item = b"", self.failed(error)
        else:
            self.port.begin_item(entry)
            item = self.run_call(entry, exporter)
            self.port.end_item(entry)
        del exporter  # what still holds it now is the task's
        if not self.deliver(entry, [item], 1, 1):
            os._exit(EXIT_KILLED)
        self.port.ended()

    def run_call(self, entry: int, exporter: Any) -> tuple[Any, ...]:
        """Load and run one call; its outcome as an item of a frame."""
        try:
            items = _core.read_frame(exporter, self.port.resolve)
            fn_data = self.function_data(entry, items)
            status, data, views, _, _ = items.pop()
            fn = self.functions.load(self.port.describe(entry)[0], fn_data)
            call = _core.unpack_plain(data) if status == _core.S_PLAIN else serializer.loads(data, views)
            fn = serializer.bound(fn, call)
            args, kwargs = call[0], call[1] or {}
            del items, data, views, call
            result = fn(*args, **kwargs)
        except BaseException as error:
            return self.failed(error)
        return self.port.plain_outcome(result) or self.succeeded(result)

    def function_data(self, entry: int, items: list[Any]) -> bytes | None:
        """The function's pickle: from its block, or the item that leads the frame; None: it is loaded."""
        fn_id, leads = self.port.describe(entry)
        data = bytes(items.pop(0)[1]) if leads else None
        if fn_id in self.functions:
            return None
        return data if data is not None else bytes(self.port.function(entry))

    def run_item(self, fn_id: int, fn_data: bytes | None, data: Any, views: list[Any]) -> tuple[Any, ...]:
        """Load and run one item of a map that came with a pickle of its own."""
        try:
            fn, args, kwargs = serializer.unpack_call(self.functions, fn_id, fn_data, data, views)
            del data, views
            result = fn(*args, **kwargs)
        except BaseException as error:
            return self.failed(error)
        return self.succeeded(result)

    def bound(self, fn: Any, call: tuple[Any, ...]) -> Any:
        """The function of a call that brings what it is bound to along."""
        return serializer.bound(fn, call)

    def succeeded(self, result: Any) -> tuple[Any, ...]:
        """A result as an item; if it cannot be pickled, the reason is the outcome."""
        if _forked:
            os._exit(0)  # a task forked and its child came back here: it has nothing to deliver
        try:
            return _item(_core.S_VALUE, serializer.dumps(result, self.port.locate))
        except BaseException as error:
            error.add_note(f"The result of the task, a {type(result).__qualname__}, could not be pickled.")
            return self.failed(error)

    def frozen(self, item: tuple[Any, ...]) -> tuple[Any, ...]:
        """An outcome that no longer changes when the objects change that it was made of."""
        status, data, buffers, readonly = item
        mine = [memoryview(b) if isinstance(b, _core.BlockSlice) and not b.shared else b for b in buffers]
        payload = serializer.Payload(data, tuple(mine), readonly)
        payload.freeze()
        return _item(status, payload)

    def failed(self, error: BaseException) -> tuple[Any, ...]:
        """An exception as an item."""
        if _forked:
            os._exit(1)
        if isinstance(error, _Leave):
            error = KeyboardInterrupt()
        item = _item(_core.S_ERROR, serializer.dump_exception(error))
        # Its frames know the error and the arguments: a cycle that would keep both.
        error.__traceback__ = None
        return item

    def deliver(self, entry: int, items: list[Any], ran: int, count: int) -> bool:
        """End the lease with its last `count` outcomes. False: the host has killed it."""
        try:
            return bool(self.port.finish(entry, items, ran))
        except (BufferError, MemoryError) as error:  # a result that cannot be laid out
            return bool(self.port.finish(entry, [self.failed(error)] * count, ran))

    def check(self) -> None:
        """Now and then: give back what is not needed, see whether this process may stay."""
        self.port.flush()
        self.children.reap()
        # One that has run nothing stays: what replaces it would be as large.
        worked = self.port.left != self.share
        if self.max_rss is not None and worked and time.monotonic() - self.rss_checked > 0.1:
            self.rss_checked = time.monotonic()
            if (memory.unshared() or 0) > self.max_rss:
                self.port.leaving = True


def _item(status: int, payload: serializer.Payload) -> tuple[Any, ...]:
    return (status, payload.data, payload.buffers, payload.readonly)


# ---- the process -------------------------------------------------------------------------------------


def main(arena: _core.Arena, orders: Orders) -> None:
    """Be a worker, from the fork on. Never returns."""
    global _context
    code = 1
    try:
        arena.adopt_process()
        limits.in_worker = True
        stacks.leave_stacks(orders.records, orders.stack)
        forwarding.adopt_streams()
        reset_signals()
        _reseed()
        _prefer_for_oom()
        _core.become_subreaper()
        arguments = (orders.host_pidfd, -1, EXIT_HOST_GONE, orders.folder, orders.zygote_pid)
        threading.Thread(
            target=_core.watch_host, args=arguments, name="runtime-host-watch", daemon=True
        ).start()
        os.register_at_fork(
            before=_before_fork, after_in_parent=_unmask, after_in_child=lambda: _after_fork(arena)
        )
        _context = Context(orders)
        if orders.levels is not None:
            forwarding.forward_records(orders.records, _context, orders.levels)
        serializer.adopt_main()
        worker = Worker(arena, orders, _context)
        _on_term(worker)
        worker.start()
        worker.run()
        worker.link.close()
        code = 0
    except BaseException:  # a fault of ours: the traceback is all that can be given
        if not _forked:
            sys.excepthook(*sys.exc_info())
    finally:
        if not _forked:
            _goodbye()
        os._exit(code)


_LEAVERS = (signal.SIGTERM, signal.SIGUSR2)
_masks: dict[int, set[signal.Signals | int]] = {}  # thread that forks -> its mask from before


def _before_fork() -> None:
    """CPython drops a signal that comes while a fork is under way; the child's SIGTERM shall wait instead."""
    _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, _LEAVERS)


def _unmask() -> None:
    mask = _masks.pop(threading.get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork(arena: _core.Arena) -> None:
    """In a child that a task forked: what it does to the region stays its own, and SIGTERM ends it."""
    global _forked
    _forked = True
    for number in _LEAVERS:
        if signal.getsignal(number) is _leave:  # a task may have set its own
            signal.signal(number, signal.SIG_DFL)
    _unmask()
    arena.make_private()
    stacks.forked()


def reset_signals() -> None:
    """Handlers that the host or a preloaded module has set are for the program they came from."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # Ctrl-C goes to the whole group; the host decides. A handler, since SIG_IGN would survive exec.
    signal.signal(signal.SIGINT, _nothing)
    signal.set_wakeup_fd(-1)


def _nothing(number: int, frame: object) -> None:
    """SIGINT does nothing here."""


_leaver: Worker | None = None  # who leaves when SIGTERM comes


def _on_term(worker: Worker) -> None:
    global _leaver
    _leaver = worker
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGUSR2, _leave)


def _leave(number: int, frame: object) -> None:
    worker = _leaver
    if worker is None or _forked:
        return
    worker.port.leaving = True
    worker.port.leave()  # the host takes back what is not started, and starts the next worker, meanwhile
    if worker.waiting:
        raise _Leave


def _reseed() -> None:
    """Each worker draws its own random numbers (CPython reseeds `random` at a fork itself)."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _prefer_for_oom() -> None:
    """When memory runs out, the kernel should end a worker, not the host."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as file:
        score = int(file.read())
        file.seek(0)
        file.write(str(min(score + 300, 1000)))


def _goodbye() -> None:
    """What an interpreter does at its end: join threads, run callbacks, flush."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    forwarding.flush()
    _core.kill_descendants()
