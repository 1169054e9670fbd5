"""Of a worker's children those that a task forked are the task's to wait for, and no others."""

from __future__ import annotations

import os

import forked
import pytest
from watching import fields, until


@pytest.mark.parametrize(
    "task",
    [
        forked.forks_again,
        forked.beside_an_orphan,
        forked.killed_at_once,
        forked.without_memory,
        forked.while_a_thread_forks,
        forked.while_a_handler_forks,
        forked.by_multiprocessing,
        forked.by_spawning,
        forked.beside_a_popen_that_failed,
    ],
    ids=lambda task: task.__name__,
)
def test_a_worker_waits_for_what_it_adopted_and_for_nothing_else(runtime_factory, monkeypatch, task):
    # A numpy that starts threads would forbid the preloading: each worker would import for itself.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rt = runtime_factory(1, preload="forked")
    assert rt.submit(forked.preloaded).result(30)
    children, orphan = rt.submit(task).result(30)

    def reaped():
        rt.submit(os.getpid).result(30)
        return not fields(orphan)

    until(reaped, lambda: f"{orphan}, {fields(orphan)[:2]}, has been waited for", 10)
    for child, code in children.items():
        assert rt.submit(forked.exit_code, child).result(30) == code
