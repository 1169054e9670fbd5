"""`Runtime`: the Executor that users see. What it promises is in the docstrings; how, in what it imports."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

from runtime import _core, config, forking, serializer
from runtime.config import INHERIT, TaskOptions
from runtime.front import Front
from runtime.future import Future
from runtime.kernels import Kernel
from runtime.mapping import Results, Run, check_sizes, total_of
from runtime.native import KernelFuture, Kernels
from runtime.observable import Observable
from runtime.outcomes import again
from runtime.pressure import Pressure
from runtime.progress import open_bar
from runtime.reloadable import Reloadable
from runtime.state import SharedState
from runtime.store import Store
from runtime.supervisor import Supervisor

__all__ = ["Future", "Options", "Runtime"]

T = TypeVar("T")


class Runtime(Front, Store, Kernels, Reloadable, Observable):
    """A pool of worker processes that may crash, hang or leak without losing a task.

    Thread-safety: every method, from any thread. Fork-safety: in a fork of its process it is inert: `submit`
    raises. Blocking: the constructor returns at once; `submit` waits only with arguments of 16 KiB and more,
    for room in the region while tasks end that free some, and not in a callback or where an event loop runs:
    what finds none waits in the host's own memory. At the end of the interpreter, or when it is
    garbage-collected, pending tasks are finished, as the stdlib's executors do; but Ctrl-C that nobody
    catches ends running tasks after a second, and so it does when it leaves a `with` block.

    max_workers: processes; by default what the cgroup's quota and the affinity allow. threads: tasks that one
    of them runs at a time, in threads that share its memory, its GIL and its death (docs/threads.md); at most
    64, and 2,000 in all workers together. initializer, initargs: called in each worker before its first task.
    max_tasks_per_child: tasks, or items of a map, after which a worker is replaced. preload: modules to
    import before workers are forked. start_method: "exec", from a fresh interpreter; or "fork", from this
    process as it is now (its modules and data by copy-on-write, but no open file), while it has one thread.
    region_size: bytes of shared memory for arguments and results, or a text like "64MiB": these are reserved
    at once and kept. region_max: bytes to which that grows when it is needed, as far as there is memory; what
    is beyond region_size and has not been used for some seconds is given back. By default half of the
    machine's memory, or of the cgroup's limit. What finds no room travels by value, which is slower. retries:
    further attempts for a task whose worker died, or that raised one of retry_on: the first at once, the
    others after 50 ms and more, at most 5 s; the time is drawn anew for each. timeout: seconds that one
    attempt of a task, or one item of a map, may run. drain_timeout: seconds that workers have to leave at
    shutdown. max_worker_rss: bytes of unshared memory after which a worker is replaced; each draws its own
    limit between 90 and 100 % of that, so that workers that grow alike do not leave at once. state_max_items,
    state_max_bytes: limits of `state` (bytes of keys and values, each item rounded up to a multiple of 128 or
    more): memory for those bytes is taken at once; by default there are 16 MiB, which are taken as they are
    used. name: under which `runtime ctl` finds it; by default it has none. mp_context is accepted and
    ignored, with a warning.

    Raises: TypeError, ValueError for bad arguments; OSError, RegionFull when the machine lacks what it needs;
    RuntimeError for "fork" in a process with threads, and for a name that is taken.
    """

    _service: config.Service | None = None  # what the workers run instead of tasks: for `runtime serve`

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        threads: int = 1,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        max_tasks_per_child: int | None = None,
        mp_context: object = None,
        preload: str | Iterable[str] = (),
        start_method: str = "exec",
        region_size: int | str = "4MiB",
        region_max: int | str | None = None,
        retries: int = 0,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] = (),
        timeout: float | None = None,
        drain_timeout: float = 30.0,
        max_worker_rss: int | str | None = None,
        state_max_items: int | None = None,
        state_max_bytes: int | str | None = None,
        forward_logs: bool = True,
        name: str | None = None,
    ) -> None:
        settings = config.settings(
            max_workers, threads, initializer, initargs, max_tasks_per_child, mp_context, preload,
            start_method, region_size, region_max, retries, retry_on, timeout, drain_timeout, max_worker_rss,
            state_max_items, state_max_bytes, forward_logs, name,
        )  # fmt: skip
        self._settings = dataclasses.replace(settings, service=self._service)
        if _exiting:
            raise RuntimeError("cannot make a Runtime after interpreter shutdown")
        self._options = TaskOptions(
            self._settings.timeout, self._settings.retries, self._settings.retry_on, 0
        )
        self._short = None if self._options.plain else self._options
        self._table = serializer.FunctionTable()
        Kernels.__init__(self)
        self._shutdown = False
        self._core = Supervisor(self._settings, self._table)
        self._core.start()
        self._pressure = Pressure(self._core)
        _cores.add(self._core)
        forking.watch(self._core)
        self._submitter = _core.Submitter(self._core.dispatcher, Future, self._core, self._table.plain)
        self._finalizer = weakref.finalize(self, _stop, self._core)
        self._finalizer.atexit = False  # _at_exit waits for it, in the right order
        if self._core.control is not None:
            self._core.control.start(self)

    # ---- submitting ----------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run fn(*args, **kwargs) in a worker. The arguments are pickled before this returns. A Kernel is
        run as by `run_kernel(fn, src, dst, params=b"")`, in one piece.

        What cannot be pickled fails the future. Raises: RuntimeError after shutdown, and in a fork;
        BrokenRuntime when no worker can be started.
        """
        future: Future[T] | None = self._submitter.submit(self._short, fn, args, kwargs)
        return future if future is not None else self._submit_anything(self._options, fn, args, kwargs)

    def _target(self) -> Runtime:
        return self

    def _submit(self, options: TaskOptions, fn: Callable[..., T], args: Any, kwargs: Any) -> Future[T]:
        future: Future[T] | None = self._submitter.submit(
            None if options.plain else options, fn, args, kwargs
        )
        return future if future is not None else self._submit_anything(options, fn, args, kwargs)

    def _submit_anything(
        self, options: TaskOptions, fn: Callable[..., T], args: Any, kwargs: Any
    ) -> Future[T]:
        """What `submit` does with a call that cannot go the short way."""
        native: Any = fn
        if isinstance(native, Kernel):
            return self._submit_kernel(options, native, args, kwargs)
        core = self._usable()
        if not callable(fn):
            raise TypeError(f"submit() needs a callable, not {type(fn).__name__}")
        future: Future[T] = Future()
        future._core = core  # `cancel` knows it by that, whatever comes of its arguments
        try:
            ref, payload = serializer.pack_call(
                self._table, fn, args, kwargs, freeze=False, locate=core.arena.locate
            )
            task = _core.Task(
                ref, future, options.timeout_ns, options.priority, options.retries, options.retries_timeouts
            )
            if not (payload.large and self._pressure.place(task, payload)):
                payload.freeze()
                task.hold(payload.data, payload.buffers, payload.readonly)
            del payload
        except KeyboardInterrupt:
            raise  # Ctrl-C, in all likelihood, not the argument's doing
        except BaseException as error:
            core.dispatcher.refuse()
            future.set_exception(error)
            return future
        future.retry_on = options.retry_on
        self._enter(task, future)
        return future

    def _enter(self, task: _core.Task, future: Future[Any]) -> None:
        future._task = task
        if not self._core.dispatcher.submit(task):
            future._task = None  # the two would keep each other, and a block
            raise self._ended()
        self._core.tell()

    def _map(
        self,
        options: TaskOptions,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int | None,
        buffersize: int | None,
        return_exceptions: bool,
        ordered: bool,
        progress: bool,
        feed: bool = True,
    ) -> Results:
        core = self._usable()
        if not callable(fn):
            raise TypeError(f"map() needs a callable, not {type(fn).__name__}")
        check_sizes(chunksize, buffersize)
        bar = open_bar(getattr(fn, "__name__", "map"), total_of(iterables)) if progress else None

        def submit(batch: _core.Batch, span: _core.Span) -> None:
            self._usable()
            if not core.dispatcher.add(batch, span):
                raise self._ended()
            core.tell()

        def drop(batch: _core.Batch, running: bool) -> None:
            core.dispatcher.drop(batch, running)
            core.tell()
            core.wake()

        try:
            return Results(
                fn, iterables, run=Run(options, ordered, return_exceptions, bar), options=options,
                submit=submit, drop=drop, table=self._table,
                workers=max(1, self._max_workers) * self._settings.threads,
                timeout=timeout, chunksize=chunksize or 0, buffersize=buffersize, bar=bar, feed=feed,
                locate=core.arena.locate,
            )  # fmt: skip
        except BaseException:  # an input that is none, or Ctrl-C
            if bar is not None:
                bar.finish()
            raise

    def options(
        self,
        *,
        timeout: Any = INHERIT,
        retries: Any = INHERIT,
        retry_on: Any = INHERIT,
        priority: int = 0,
    ) -> Options:
        """This runtime with other settings for what is submitted through it. Larger priorities go first."""
        return Options(
            self,
            config.override(
                self._settings, timeout=timeout, retries=retries, retry_on=retry_on, priority=priority
            ),
        )

    def cancel(self, future: concurrent.futures.Future[Any], *, running: bool = False) -> bool:
        """Cancel a call; with `running` also one that a worker has started: its process is killed, and
        replaced, and the future gets TaskCancelled.

        True: the future is cancelled, or gets TaskCancelled; with `running` also a call that has just ended,
        if its future did not have the outcome yet. False: the future has an outcome and keeps it, or, without
        `running`, the call has started.
        """
        if not isinstance(future, Future) or future._core is not self._core:
            raise ValueError("this future is not of this runtime")
        if future.cancel():
            return True
        if isinstance(future, KernelFuture):
            return running and any([self.cancel(it, running=True) for it in future.participants()])
        task = future._task
        if not running or task is None or future.done() or self._core.pid != os.getpid():
            return False
        done = self._core.dispatcher.cancel(task, True)
        self._core.tell()
        self._core.wake()
        # Not killed: it waits once more, since its worker has died meanwhile, or this attempt is over. What
        # comes of that is not wanted, and no other attempt follows.
        return done == _core.CANCEL_KILLED or future.withdraw()

    # ---- scaling -------------------------------------------------------------------------------------

    @property
    def _max_workers(self) -> int:
        """What dask and others read: the number that there shall be."""
        return self._core.scaled

    def scale(self, n: int) -> None:
        """Have n workers from now on. Returns at once; new workers start, or the highest numbers leave.

        Who leaves finishes what it runs and is listed by `workers()`, STOPPING, until it is gone; what it
        has not started goes to the others. 0 pauses: tasks are accepted and wait. A shutdown, or the end of
        the interpreter, with tasks waiting in a paused runtime starts workers again to finish them, unless
        cancel_futures says otherwise. Maps that are under way keep their windows; thread caps of numeric
        libraries stay as they were at the start.

        Raises: TypeError, ValueError for what no runtime can have, and beyond the room that was laid out at
        the start (64 workers, or four times max_workers if that is more); RegionFull, OSError when memory or
        descriptors are lacking, and nothing has changed; RuntimeError after shutdown, and in a fork;
        BrokenRuntime.
        """
        workers = config.scaled(n)
        core = self._core
        if core.pid == os.getpid() and core.broken is not None:
            raise again(core.broken)
        if core.pid == os.getpid() and (self._shutdown or _exiting):
            raise RuntimeError("cannot scale a runtime after shutdown")
        self._usable().scale(workers)

    # ---- ending --------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no new task, finish the accepted ones, end the workers. Idempotent.

        wait: return when everything has ended; there is no deadline. cancel_futures: cancel what has not
        started.
        """
        core = self._core
        if core.pid != os.getpid():
            return
        self._shutdown = core.dispatcher.refusing = True
        if cancel_futures:
            core.dispatcher.abandon(True)
            core.link.wake()
        core.stop()
        if wait:
            core.join()

    def terminate_workers(self) -> None:
        """End the runtime now: SIGTERM to every worker. What has no result yet fails with BrokenRuntime."""
        self._end("terminate_workers() was called", signal.SIGTERM)

    def kill_workers(self) -> None:
        """End the runtime now: SIGKILL to every worker. What has no result yet fails with BrokenRuntime."""
        self._end("kill_workers() was called", signal.SIGKILL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down; but Ctrl-C waits for no task: as terminate_workers()."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._end(_INTERRUPTED, signal.SIGTERM)
        else:
            self.shutdown()

    def _end(self, reason: str, number: int) -> None:
        if self._core.pid == os.getpid():
            self._shutdown = self._core.dispatcher.refusing = True
            self._core.end(reason, number)
            self._core.join()

    @property
    def state(self) -> SharedState:
        """A map that the host and all workers share, where they find it as `runtime.current().state`.

        It outlives workers, and ends with the Runtime: after shutdown its methods raise ValueError. See
        docs/state.md.
        """
        return self._core.state

    # ---- small things --------------------------------------------------------------------------------

    def _usable(self) -> Supervisor:
        core = self._core
        if core.pid != os.getpid():
            raise RuntimeError(
                f"this Runtime belongs to process {core.pid}; this is process {os.getpid()}, a fork of it: "
                "make a Runtime here"
            )
        if core.broken is not None or self._shutdown:
            raise self._ended()
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        return core

    def _ended(self) -> Exception:
        """Why nothing can be submitted any more."""
        if self._core.broken is not None:
            return again(self._core.broken)
        return RuntimeError("cannot schedule new futures after shutdown")

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Runtime cannot be pickled; a task that needs one makes its own, and runtime.current() tells "
            "where it runs"
        )

    def __repr__(self) -> str:
        state = "shut down" if self._shutdown else "broken" if self._core.broken is not None else "running"
        return f"<Runtime of {self._max_workers} workers, {state}>"


class Options(Front):
    """A Runtime with other settings for what is submitted through it; made by `Runtime.options`."""

    def __init__(self, runtime: Runtime, options: TaskOptions) -> None:
        self._runtime = runtime
        self._options = options

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As `Runtime.submit`, with these settings."""
        return self._runtime._submit(self._options, fn, args, kwargs)

    @property
    def _max_workers(self) -> int:
        return self._runtime._max_workers

    def _target(self) -> Runtime:
        return self._runtime

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends nothing: the Runtime is its owner's to shut down."""


# ---- the ends of a process ---------------------------------------------------------------------------

_exiting = False
_cores: weakref.WeakSet[Supervisor] = weakref.WeakSet()  # that the end of the interpreter waits for
_INTERRUPTED = "Ctrl-C ended the program"


def _stop(core: Supervisor) -> None:
    """The Runtime was dropped: finish what is pending, in the background."""
    if core.pid == os.getpid():
        core.stop()


def _at_exit() -> None:
    """The interpreter ends: finish what is pending, as the stdlib's executors do.

    Unless it is Ctrl-C that ends it, before or meanwhile: then nobody waits for a task.
    """
    global _exiting
    _exiting = True
    mine = [core for core in list(_cores) if core.pid == os.getpid()]
    try:
        for core in mine:
            core.dispatcher.refusing = True
            core.stop()
        if _interrupted():
            raise KeyboardInterrupt
        for core in mine:
            core.join()
    except KeyboardInterrupt:
        for core in mine:
            core.end(_INTERRUPTED, signal.SIGTERM)
        for core in mine:
            core.join()


def _interrupted() -> bool:
    """Whether the program was ended by Ctrl-C that nobody caught. (At a prompt it ends only a statement.)"""
    last = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return isinstance(last, KeyboardInterrupt) and not hasattr(sys, "ps1")


threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
