"""The pools that are compared, behind one face.

Each runs with its defaults and as its manual shows it; where a library can choose, workers are forked,
which is the fastest that it has. Importing is not opening: `Contender.load` does the first, so that it can
be kept out of what is timed.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any


@dataclass(frozen=True)
class Pool:
    """A pool of workers that is open."""

    submit: Callable[..., Any]  # submit(fn, *args) -> a handle
    result: Callable[[Any], Any]  # of a handle; waits, raises what the task raised
    done: Callable[[Any], bool]  # whether a handle's result() would not wait
    map: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
    close: Callable[[], object]
    ready: Callable[[], set[int]] | None = None  # pids of the workers that are ready, if it can tell
    put: Callable[[Any], Any] | None = None  # keep an object once for many tasks, which get what this returns
    empty: Callable[..., Any] | None = None  # empty(shape, dtype): an array in memory that its workers share


@dataclass(frozen=True)
class Contender:
    """A kind of pool. `module` is imported by `load` and handed to `start`."""

    name: str
    package: str | None  # the distribution that it comes with; None: Python
    module: str
    start: Callable[[Any, int], Pool]  # start(module, workers)

    def load(self) -> Any:
        """Import what it needs; ImportError if that is missing."""
        return importlib.import_module(self.module)

    @contextmanager
    def open(self, workers: int) -> Iterator[Pool]:
        """A pool with that many workers, closed at the end."""
        pool = self.start(self.load(), workers)
        try:
            yield pool
        finally:
            pool.close()


def _executor(executor: Any, **more: Any) -> Pool:
    """What follows concurrent.futures."""
    return Pool(
        submit=executor.submit,
        result=methodcaller("result"),
        done=methodcaller("done"),
        map=lambda fn, items: list(executor.map(fn, items)),
        close=executor.shutdown,
        **more,
    )


def runtime_with(name: str = "runtime", **options: Any) -> Contender:
    """Ours, with `options` of its constructor."""

    def start(module: Any, workers: int) -> Pool:
        rt = module.Runtime(workers, **options)
        ready = module.WorkerStatus.READY
        pids = lambda: {w.pid for w in rt.workers() if w.status is ready}  # noqa: E731
        return _executor(rt, ready=pids, put=rt.put, empty=rt.empty)

    return Contender(name, "runtime-workers", "runtime", start)


def _process_pool_executor(module: Any, workers: int) -> Pool:
    return _executor(module.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")))


def _loky(module: Any, workers: int) -> Pool:
    return _executor(module.ProcessPoolExecutor(workers))


def _multiprocessing(module: Any, workers: int) -> Pool:
    pool = module.get_context("fork").Pool(workers)

    def close() -> None:
        pool.terminate()
        pool.join()

    return Pool(
        submit=lambda fn, *args: pool.apply_async(fn, args),
        result=methodcaller("get"),
        done=methodcaller("ready"),
        map=pool.map,
        close=close,
    )


def _pebble(module: Any, workers: int) -> Pool:
    pool = module.ProcessPool(max_workers=workers, context=multiprocessing.get_context("fork"))

    def close() -> None:
        pool.stop()
        pool.join()

    return Pool(
        submit=lambda fn, *args: pool.schedule(fn, args),
        result=methodcaller("result"),
        done=methodcaller("done"),
        map=lambda fn, items: list(pool.map(fn, items).result()),
        close=close,
    )


def _mpire(module: Any, workers: int) -> Pool:
    pool = module.WorkerPool(workers, start_method="fork", keep_alive=True)
    return Pool(
        submit=lambda fn, *args: pool.apply_async(fn, args),
        result=methodcaller("get"),
        done=methodcaller("ready"),
        map=pool.map,
        close=pool.terminate,
    )


def _joblib(module: Any, workers: int) -> Pool:
    """The pool below joblib.Parallel: it writes arrays of over 1 MB to a file, which its workers map."""
    return _executor(module.get_memmapping_executor(workers))


def _ray(module: Any, workers: int) -> Pool:
    folder = tempfile.TemporaryDirectory(prefix="ray")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else it leaves one in the home folder
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    module.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, _temp_dir=folder.name)
    remote = functools.cache(module.remote)

    def submit(fn: Callable[..., Any], *args: Any) -> Any:
        return remote(fn).remote(*args)

    def close() -> None:
        module.shutdown()
        folder.cleanup()

    return Pool(
        submit=submit,
        result=module.get,
        done=lambda handle: bool(module.wait([handle], timeout=0)[0]),
        map=lambda fn, items: module.get([submit(fn, item) for item in items]),
        close=close,
        put=module.put,
    )


OURS = runtime_with()
PEERS = (
    Contender("ProcessPoolExecutor", None, "concurrent.futures.process", _process_pool_executor),
    Contender("multiprocessing.Pool", None, "multiprocessing", _multiprocessing),
    Contender("loky", "loky", "loky", _loky),
    Contender("pebble", "pebble", "pebble", _pebble),
    Contender("mpire", "mpire", "mpire", _mpire),
)
JOBLIB = Contender("joblib", "joblib", "joblib.executor", _joblib)
RAY = Contender("Ray", "ray", "ray", _ray)
