"""Workers that are replaced while they are well: by count, by memory, by a signal; and how they leave."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import evil
import pytest
from recycled import (
    grow,
    grow_slowly,
    in_a_pool,
    leave_late,
    noted,
    noted_until,
    own_limit,
    terminate_a_child,
)
from tasks import own_pid
from watching import alive, all_ready, output, read_pids, run_script, send, settled, until

import runtime
from runtime import Runtime, loop

Factory = Callable[..., Runtime]


# ---- by count ------------------------------------------------------------------------------------


def executions(path: Path) -> list[int]:
    """How many items each process has run, in the order of their first."""
    return list(Counter(path.read_text().split()).values())


@pytest.mark.parametrize("chunksize", [1, 3, 4, 5, 100, None])
def test_items_of_chunks_are_counted_exactly(factory: Factory, tmp_path: Path, chunksize: int | None) -> None:
    """What is left of a chunk goes to the next process."""
    path = tmp_path / "log"
    rt = factory(1, max_tasks_per_child=4)
    assert list(rt.map(noted, [str(path)] * 22, range(22), chunksize=chunksize)) == list(range(22))
    assert executions(path) == [4, 4, 4, 4, 4, 2]


def test_retries_are_counted(factory: Factory, tmp_path: Path) -> None:
    path = tmp_path / "log"
    rt = factory(1, max_tasks_per_child=4, retries=2, retry_on=ValueError)
    futures = [rt.submit(noted_until, str(path), 3) for _ in range(4)]
    results = rt.map(noted_until, [str(path)] * 4, [3] * 4, chunksize=4)
    assert [f.result() for f in futures] == list(results) == [3] * 4
    assert executions(path) == [4] * 6
    assert rt.stats().failed == 0


def test_calls_and_maps_at_once_with_several_workers(factory: Factory, tmp_path: Path) -> None:
    path = tmp_path / "log"
    rt = factory(2, max_tasks_per_child=3)
    futures = [rt.submit(noted, str(path), i) for i in range(20)]
    results = rt.map(noted, [str(path)] * 20, range(20), chunksize=7)
    assert [f.result() for f in futures] == list(results) == list(range(20))
    counts = executions(path)
    assert sum(counts) == 40 and max(counts) == 3 and sum(n < 3 for n in counts) <= 2
    settled(rt)


# ---- by memory -----------------------------------------------------------------------------------


def test_a_limit_below_the_size_of_a_new_worker(factory: Factory) -> None:
    """Who has run nothing stays, instead of being replaced for ever by others as large; and it is said."""
    with pytest.warns(RuntimeWarning, match="max_worker_rss is 1048576 bytes, and workers have more"):
        rt = factory(1, max_worker_rss="1MiB")
        (first,) = all_ready(rt).values()
        threading.Event().wait(0.5)  # it looks at its size whenever it has nothing to do
        assert list(all_ready(rt).values()) == [first]
        assert rt.submit(own_pid).result() == first
        until(lambda: not alive(first), "it leaves when it has worked")
        assert rt.submit(own_pid).result() != first
        rt.shutdown()


def test_a_worker_that_is_above_its_own_limit_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is below what was said; that is what it is replaced by."""
    orders = SimpleNamespace(max_rss=1000)
    monkeypatch.setattr(loop.memory, "unshared", lambda: 950)
    with pytest.warns(RuntimeWarning, match="max_worker_rss is 1000 bytes"):
        loop.Worker.warn_of_size(SimpleNamespace(orders=orders, max_rss=940.0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop.Worker.warn_of_size(SimpleNamespace(orders=orders, max_rss=960.0))
    assert not told


def test_a_worker_that_has_grown_is_replaced(factory: Factory) -> None:
    rt = factory(1, max_worker_rss="200MiB")
    (first,) = all_ready(rt).values()
    assert rt.submit(grow, 1 << 20).result() == first
    futures = [rt.submit(grow, 300 << 20), *(rt.submit(own_pid) for _ in range(50))]
    assert futures[0].result() == first
    assert all(f.exception() is None for f in futures)
    until(lambda: not alive(first), "it has left")
    assert rt.submit(grow, 1 << 20).result() != first
    settled(rt)
    assert rt.stats().failed == 0


def test_in_the_middle_of_a_chunk(factory: Factory) -> None:
    """The item that runs is finished, the others go on elsewhere."""
    rt = factory(1, max_worker_rss="150MiB")
    ran_in = list(rt.map(grow_slowly, [2 << 20] * 200, chunksize=200))
    counts = Counter(ran_in)
    assert len(ran_in) == 200 and len(counts) >= 2
    assert max(counts.values()) < 150, "one process would have kept 400 MiB"
    assert rt.stats().failed == 0


def test_workers_that_grow_alike_do_not_leave_at_once(factory: Factory) -> None:
    """Each has a limit of its own, from 90 to 100 % of what was said."""
    rt = factory(1, max_worker_rss="1GiB", max_tasks_per_child=1)
    limits = [f.result() for f in [rt.submit(own_limit) for _ in range(12)]]
    assert all(0.9 * (1 << 30) <= limit <= 1 << 30 for limit in limits)
    assert len(set(limits)) > 3


# ---- by a signal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_the_next_worker_starts_while_the_task_is_finished(
    factory: Factory, tmp_path: Path, number: int
) -> None:
    rt = factory(1)
    go, started = tmp_path / "go", tmp_path / "started"
    future = rt.submit(evil.wait_for, str(go), str(started))
    (pid,) = read_pids(started)
    send(pid, number)
    assert rt.submit(own_pid).result() != pid
    assert future.running() and alive(pid)
    assert rt.stats().running == 1
    go.touch()
    assert future.result() == pid
    until(lambda: not alive(pid), "it has left")
    until(lambda: sum(info.tasks_done for info in rt.workers()) == 2, "both are counted")


def test_a_long_last_task_is_not_cut_short(factory: Factory, tmp_path: Path) -> None:
    """drain_timeout is for what keeps a worker from ending after its last task."""
    rt = factory(1, drain_timeout=0.05)
    go, started = tmp_path / "go", tmp_path / "started"
    future = rt.submit(evil.wait_for, str(go), str(started))
    (pid,) = read_pids(started)
    send(pid, signal.SIGTERM)

    def leaving() -> float:
        return float(max((it.leave_by for it in list(rt._core._slots.values()) if it.pid == pid), default=0))

    first = until(leaving, "the host knows")
    until(lambda: leaving() > first + 0.1, "its time has come and was prolonged, twice")
    assert alive(pid)
    go.touch()
    assert future.result() == pid


def test_sigterm_in_the_initializer(factory: Factory, tmp_path: Path) -> None:
    """It becomes ready, and leaves; nothing counts as a failure."""
    go, started = tmp_path / "go", tmp_path / "started"
    rt = factory(1, initializer=evil.wait_for, initargs=(str(go), str(started)))
    (pid,) = read_pids(started)
    future = rt.submit(own_pid)
    send(pid, signal.SIGTERM)
    go.touch()
    assert future.result() != pid
    assert rt._core.broken is None and rt._core._numbers[0].restarts.in_a_row == 0


def test_a_lost_word_of_being_ready_is_found(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """While something waits: the words in the region are read again, whatever became of the message."""
    rt = factory(1)
    look = rt._core.look
    monkeypatch.setattr(rt._core, "look", lambda slot: look(slot) if slot < 0 else None)
    assert rt.submit(own_pid).result(20) > 0


def test_one_that_leaves_faster_than_the_host_looks_has_not_failed(
    factory: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, started = tmp_path / "go", tmp_path / "started"
    rt = factory(1, initializer=evil.wait_for, initargs=(str(go), str(started)))
    (pid,) = read_pids(started)
    with monkeypatch.context() as patch:
        patch.setattr(rt._core, "look", lambda slot: None)  # the collector's word does not arrive
        send(pid, signal.SIGTERM)
        go.touch()
        until(lambda: pid not in [worker.pid for worker in rt._core._slots.values()], "it is settled")
    assert rt.submit(own_pid).result() != pid
    assert rt._core.broken is None and rt._core._numbers[0].restarts.in_a_row == 0


# ---- how a worker leaves -------------------------------------------------------------------------


def test_callbacks_run_and_streams_are_flushed_however_it_leaves() -> None:
    code = """if True:
        import atexit, os, signal, sys
        import runtime

        def work(name):
            sys.stdout.write(f"{name}: not flushed\\n")
            atexit.register(lambda: sys.stdout.write(f"{name}: atexit\\n"))
            return os.getpid()

        with runtime.Runtime(1, max_tasks_per_child=1) as rt:
            rt.submit(work, "recycled").result()
        with runtime.Runtime(1) as rt:
            os.kill(rt.submit(work, "signalled").result(), signal.SIGTERM)
            rt.submit(work, "shut down").result()
        rt = runtime.Runtime(2)
        rt.submit(work, "scaled").result()
        rt.scale(0)
        rt.shutdown()
    """
    names = ("recycled", "signalled", "shut down", "scaled")
    assert sorted(output(code)) == sorted(
        f"{name}: {what}" for name in names for what in ("not flushed", "atexit")
    )


def test_the_next_worker_does_not_wait_for_a_slow_end(factory: Factory, tmp_path: Path) -> None:
    rt = factory(1, max_tasks_per_child=1)
    path = str(tmp_path / "go")
    pid = rt.submit(leave_late, path).result()
    assert rt.submit(own_pid).result() != pid
    assert read_pids(path + ".leaving") == [pid]
    Path(path).touch()
    until(lambda: not alive(pid), "it has left")


# ---- what a worker finds -------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["random", "numpy.random"])
def test_random_numbers_differ_between_workers_and_between_generations(factory: Factory, module: str) -> None:
    pytest.importorskip(module)
    rt = factory(2, preload=module, max_tasks_per_child=5)

    def draw(_: int) -> tuple[int, float]:
        import sys

        return os.getpid(), float(sys.modules[module].random())  # type: ignore[attr-defined]

    drawn = list(rt.map(draw, range(40), chunksize=1))
    assert len({pid for pid, _ in drawn}) >= 8
    assert len({value for _, value in drawn}) == 40


def test_signal_handlers_of_preloaded_modules_are_reset(tmp_path: Path) -> None:
    (tmp_path / "handles.py").write_text(
        "import signal\nfor n in (signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD):\n"
        "    signal.signal(n, lambda *_: None)\nsignal.signal(signal.SIGWINCH, signal.SIG_IGN)\n"
    )
    text = """
        import signal, sys
        import runtime
        sys.path.insert(0, ".")

        def look():
            numbers = (signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD, signal.SIGWINCH)
            return [signal.getsignal(n).name for n in numbers], callable(signal.getsignal(signal.SIGINT))

        with runtime.Runtime(1, preload="handles") as rt:
            print(rt.submit(look).result())
    """
    assert run_script(tmp_path, text) == "(['SIG_DFL', 'SIG_DFL', 'SIG_DFL', 'SIG_IGN'], True)\n"


def test_a_host_that_ignores_sigchld_is_told_how_workers_end() -> None:
    code = """if True:
        import signal, subprocess, sys
        import evil, runtime
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

        def child():
            return subprocess.run([sys.executable, "-c", "raise SystemExit(7)"]).returncode

        for method in ("exec", "fork"):
            with runtime.Runtime(1, start_method=method) as rt:
                print(rt.submit(evil.misbehave, "kill").exception().signal, rt.submit(child).result())
    """
    assert output(code) == ["9 7", "9 7"]


def test_inheritable_descriptors_of_the_host_stay_there() -> None:
    code = """if True:
        import os
        import runtime
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        with runtime.Runtime(2) as rt:
            rt.submit(abs, -1).result()
            os.close(writing)
            print(os.read(reading, 10))
    """
    assert output(code) == ["b''"]


def test_thread_caps_reach_the_workers() -> None:
    code = """if True:
        import os
        import runtime
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        for method in ("exec", "fork"):
            with runtime.Runtime(2, start_method=method) as rt:
                print(*(rt.submit(os.getenv, name).result() for name in names))
        print(*(os.environ.get(name) for name in names))
    """
    unset = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"))
    share = str(max(1, runtime.config.available_cpus() // 2))
    with pytest.MonkeyPatch.context() as patch:
        for name in unset:
            patch.delenv(name, raising=False)
        assert output(code) == [" ".join([share] * 4)] * 2 + ["None None None None"]
        assert output(code, environ={"OMP_NUM_THREADS": "7"}) == [f"7 None None {share}"] * 2 + [
            "7 None None None"
        ]


def test_sigterm_ends_what_a_task_has_forked(factory: Factory) -> None:
    """multiprocessing.Pool waits for its children after SIGTERM: the worker's handler is not theirs."""
    rt = factory(1)
    assert rt.submit(terminate_a_child).result() == signal.SIGTERM
    assert rt.workers()[0].status is runtime.WorkerStatus.READY


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_inside_tasks(factory: Factory, method: str) -> None:
    rt = factory(2)
    pids = all_ready(rt)
    futures = [rt.submit(in_a_pool, method) for _ in range(3)]
    assert [f.result() for f in futures] == [[5, 4, 3, 2, 1] * 2] * 3
    assert all_ready(rt) == pids
    settled(rt)


def test_nothing_is_signalled_by_a_bare_pid() -> None:
    """But children that nobody has waited for: their pids cannot be reused."""
    found = []
    for path in sorted(Path(runtime.__file__).parent.rglob("*.py*")):
        if path.suffix in (".py", ".pyx"):
            lines = path.read_text().splitlines()
            found += [
                f"{path.name}: {line.split('#')[0].strip()}"
                for line in lines
                if "kill(" in line.replace("self.kill(", "").replace(".kill()", "").replace("sent_kill(", "")
                and not line.strip().startswith(("def ", "#"))
                and "kill(pid, 0)" not in line
                and "pthread_kill(" not in line
                and "sent_kill(" not in line
            ]
    assert found == [
        "_threads.pyx: kill(found[i], SIGKILL)",
        "_threads.pyx: kill(parent, SIGKILL)",
        "init.py: os.kill(child, number)",
        "zygote.py: os.kill(pid, signal.SIGKILL)",
    ]
