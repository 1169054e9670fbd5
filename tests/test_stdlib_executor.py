"""CPython's own executor tests, imported from the interpreter that runs us, against Runtime and our Future.

A fixture of ours stands where theirs makes a ProcessPoolExecutor. What cannot apply is in EXCLUDED, by name
and with the reason; everything else runs, also what a later Python adds. Where an interpreter ships without
its `test` package this module is skipped; .ci/run fails if it was on 3.13.

Three words of theirs mean ours: the futures that they make by hand are `runtime.Future()`s with no runtime
behind them; BrokenProcessPool is WorkerDied, since a task fails where the stdlib's pool breaks; and their
scripts find a `Runtime` in concurrent.futures.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import multiprocessing
import sys
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from watching import all_ready

import runtime

PACKAGE = "test.test_concurrent_futures"


def shipped() -> bool:
    """Whether this interpreter has the tests; before 3.12 they are one file, that cannot be taken apart."""
    try:
        return importlib.util.find_spec(f"{PACKAGE}.executor") is not None
    except ModuleNotFoundError:
        return False


if not shipped():
    pytest.skip(f"{sys.executable} ships without {PACKAGE}", allow_module_level=True)

# Their classes, and the modules of PACKAGE that hold them.
CASES = {
    "ProcessPoolExecutorTest": "test_process_pool",  # a subclass of executor.ExecutorTest
    "AsCompletedTests": "test_as_completed",
    "WaitTests": "test_wait",
    "ProcessPoolShutdownTest": "test_shutdown",  # a subclass of ExecutorShutdownTest
    "InitializerMixin": "test_init",
    "FailingInitializerMixin": "test_init",
    "ExecutorDeadlockTest": "test_deadlock",
    "FutureTests": "test_future",
}

EXCLUDED = {
    "ProcessPoolExecutorTest": {
        "test_max_workers_too_large": "a limit of Windows; makes a ProcessPoolExecutor by name",
        "test_killed_child": "kills through _processes, and wants the whole pool broken",
        "test_saturation": "counts _processes",
        "test_idle_process_reuse_one": "counts _processes",
        "test_idle_process_reuse_multiple": "counts _processes",
        "test_max_tasks_per_child": "counts _processes",
        "test_max_tasks_per_child_defaults_to_spawn_context": "reads _mp_context",
        "test_python_finalization_error": "lets one thread start: the constructor needs three, and raises",
    },
    "ProcessPoolShutdownTest": {
        "test_cancel_futures": "wants one to have started; no worker is up by then, so all 50 are cancelled",
        "test_processes_terminate": "counts _processes",
        "test_context_manager_shutdown": "makes a ProcessPoolExecutor by name",
        "test_del_shutdown": "makes a ProcessPoolExecutor by name",
        "test_shutdown_no_wait": "makes a ProcessPoolExecutor by name",
    },
    "FailingInitializerMixin": {
        "test_initializer": "reads _broken, and what workers log from an mp.Queue",
    },
    "ExecutorDeadlockTest": {
        "test_exit_at_task_unpickle": "wants the pool broken: here one task fails, with SystemExit",
        "test_error_at_task_unpickle": "wants the pool broken: here one task fails, with that error",
        "test_exit_during_result_unpickle_in_result_handler": "as test_exit_at_task_unpickle",
        "test_error_during_result_unpickle_in_result_handler": "as test_error_at_task_unpickle",
        "test_shutdown_deadlock_pickle": "joins _executor_manager_thread",
    },
}


def imported(name: str) -> Any:
    """A module of CPython's tests: mypy knows none of them."""
    return importlib.import_module(name)


util = imported(f"{PACKAGE}.util")
script_helper = imported("test.support.script_helper")
test_futures = imported("test.test_asyncio.test_futures")
test_utils = imported("test.test_asyncio.utils")

PREFIX = f"""
import sys
sys.path.insert(0, {str(Path(runtime.__file__).parent.parent)!r})
import concurrent.futures, runtime
concurrent.futures.Runtime = runtime.Runtime
"""


def assert_python_ok(option: str, script: str) -> Any:
    """Theirs, which runs isolated, for a script that imports `Runtime` from concurrent.futures."""
    return script_helper.assert_python_ok(option, PREFIX + script)


def made_by_hand() -> dict[str, runtime.Future[Any]]:
    """util's PENDING_FUTURE and its like, as ours."""
    with mock.patch.object(util, "Future", runtime.Future):
        return {
            name: util.create_future(future._state, future._exception, future._result)
            for name, future in vars(util).items()
            if name.endswith("_FUTURE")
        }


class OurWords:
    """While a test runs, words in its module mean ours."""

    module: Any

    def setUp(self: Any) -> None:
        words = {
            "Future": runtime.Future,
            "BrokenProcessPool": runtime.WorkerDied,
            "assert_python_ok": assert_python_ok,
            **made_by_hand(),
        }
        for module in (self.module, util):
            for name in words.keys() & vars(module).keys():
                self.enterContext(mock.patch.object(module, name, words[name]))
        # Outside pytest what no handler takes goes to stderr, and some tests look there.
        logger = logging.getLogger("concurrent.futures")
        assert logging.lastResort is not None
        logger.addHandler(logging.lastResort)
        self.addCleanup(logger.removeHandler, logging.lastResort)
        self.enterContext(warnings.catch_warnings())
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", "mp_context is ignored")
        super().setUp()  # type: ignore[misc]


class RuntimeMixin(util.ExecutorMixin):  # type: ignore[name-defined, misc]
    """As util's ProcessPoolSpawnMixin, but without `ctx`, which would go to every constructor."""

    executor_type = runtime.Runtime
    worker_count = 4

    def get_context(self) -> Any:
        return multiprocessing.get_context("spawn")

    def tearDown(self) -> None:
        stats = self.executor.stats()
        if stats.queued or stats.leased or stats.running:  # sleepers, of no interest any more
            all_ready(self.executor)
            self.executor.kill_workers()
        super().tearDown()


for name in CASES:
    module = imported(f"{PACKAGE}.{CASES[name]}")
    bases: tuple[Any, ...] = (getattr(module, name),)
    if not issubclass(bases[0], unittest.TestCase):
        bases = (*bases, RuntimeMixin, util.BaseTestCase)
    without = dict.fromkeys(EXCLUDED.get(name, ()))  # None is no test
    globals()[name] = type(name, (OurWords, *bases), {"__module__": __name__, "module": module, **without})


class Concurrent:
    """What asyncio's tests know as `concurrent`."""

    class futures:
        Future = runtime.Future
        ThreadPoolExecutor = runtime.Runtime


class WrapFutureFixture(OurWords):
    """For the few of asyncio's tests that are about an executor's futures."""

    module = test_futures

    def setUp(self: Any) -> None:
        super().setUp()
        self.enterContext(mock.patch.object(test_futures, "concurrent", Concurrent))
        self.loop = self.new_test_loop()
        self.addCleanup(self.loop.close)

    def _new_future(self, **kwargs: Any) -> Any:
        return asyncio.Future(**kwargs)


found = {k: v for k, v in vars(test_futures.BaseFutureTests).items() if k.startswith("test_wrap_future")}
WrapFutureTests = type("WrapFutureTests", (WrapFutureFixture, test_utils.TestCase), found)


# On an older Python some of them are not there yet.
@pytest.mark.skipif(sys.version_info < (3, 13), reason="the table is that of 3.13")
def test_what_is_excluded_exists() -> None:
    excluded = {(name, test) for name, tests in EXCLUDED.items() for test in tests}
    theirs = [(name, getattr(imported(f"{PACKAGE}.{CASES[name]}"), name)) for name in CASES]
    existing = {(name, test) for name, case in theirs for test in dir(case)}
    assert excluded <= existing, f"no longer in CPython's tests: {sorted(excluded - existing)}"
    assert len(found) >= 5
