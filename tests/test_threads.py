"""Workers with several threads: what they share, and what a death or a deadline means for neighbours."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import numpy as np
import pytest
import tasks
from tasks import Gate
from watching import until

import runtime
from runtime import Runtime, TaskCancelled, TaskTimeout, WorkerDied, config
from runtime.lanes import Crew

Factory = Callable[..., Runtime]


def where(path: str) -> tuple[int, int, int | None, int]:
    """Come to the gate; then (pid, thread, task, attempt) as `current` says."""
    tasks.pass_through(path)
    context = runtime.current()
    return os.getpid(), context.thread, context.task, context.attempt


def gated(path: str, line: str, value: Any) -> Any:
    """Note that it has begun, then come to the gate."""
    tasks.log_line(line, value)
    return tasks.pass_through(path, value)


def lines(path: Path) -> Counter[str]:
    return Counter(path.read_text().split()) if path.exists() else Counter()


# ---- side by side ----------------------------------------------------------------------------------------


def test_tasks_overlap_in_one_process(factory: Factory, gate: Gate) -> None:
    """Four are at the gate at once, in one process, each in a thread of its own, each with its own task."""
    rt = factory(1, threads=4)
    futures = [rt.submit(where, gate.path) for _ in range(4)]
    assert len(set(gate.arrived(4))) == 1
    assert rt.stats().running == 4
    info = rt.workers()[0]
    assert info.task in {1, 2, 3, 4} and info.slot == 0
    gate.open(4)
    found = [future.result() for future in futures]
    assert {thread for _, thread, _, _ in found} == {0, 1, 2, 3}
    assert [task for _, _, task, _ in found] == [1, 2, 3, 4]
    until(lambda: rt.workers()[0].tasks_done == 4, "all are counted for the worker")
    assert rt.stats().done == 4


def test_workers_come_before_threads(factory: Factory, gate: Gate) -> None:
    """A process has one GIL: two tasks go to two processes, not to two threads of one."""
    rt = factory(2, threads=4)
    until(lambda: rt.stats().workers == 2, "both are ready")
    futures = [rt.submit(where, gate.path) for _ in range(4)]
    assert sorted(Counter(gate.arrived(4)).values()) == [2, 2]
    gate.open(4)
    for future in futures:
        future.result()


@pytest.mark.parametrize("lanes", ["on", "off"])
def test_many_short_ones(factory: Factory, lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_LANES", lanes)
    rt = factory(2, threads=3)
    futures = [rt.submit(tasks.tick, n) for n in range(2000)]
    assert [future.result()[2] for future in futures] == list(range(2000))
    assert list(rt.map(abs, range(-5000, 0))) == list(range(5000, 0, -1))
    assert list(rt.map(str, range(300), chunksize=7)) == [str(n) for n in range(300)]
    for n in range(20):
        assert rt.submit(abs, -n).result() == n
    assert rt.stats().done == 7320


def test_a_lane_that_sleeps_is_woken(factory: Factory) -> None:
    """No rescan has to find anything."""
    rt = factory(1, threads=2)
    for _ in range(30):
        rt.submit(abs, 1).result()
        time.sleep(0.003)  # so that it parks
    assert rt.stats().rescued == 0
    assert rt.stats().message > 0


def _fail(kind: str) -> None:
    if kind == "exit":
        sys.exit(3)
    raise {"value": ValueError, "interrupt": KeyboardInterrupt}[kind](kind)


def test_exceptions(factory: Factory) -> None:
    rt = factory(1, threads=3)
    for kind, error in (("value", ValueError), ("exit", SystemExit), ("interrupt", KeyboardInterrupt)):
        future = rt.submit(_fail, kind)
        concurrent.futures.wait([future])
        assert isinstance(future.exception(), error)
    assert rt.submit(abs, -1).result() == 1
    with pytest.raises(TypeError, match="pickle"):
        rt.submit(threading.Lock).result()


# ---- arrays ----------------------------------------------------------------------------------------------


def _doubled(array: Any) -> Any:
    out = runtime.current().empty(array.shape, array.dtype)
    np.multiply(array, 2, out=out)
    return out


def _keep(array: Any) -> int:
    runtime.current().local.setdefault("kept", []).append(array)
    return len(runtime.current().local["kept"])


def _kept(_: int) -> list[Any]:
    return list(runtime.current().local["kept"])


def _add_one(array: Any) -> None:
    array += 1


def test_arrays_both_ways(factory: Factory) -> None:
    rt = factory(1, threads=4, region_size="16MiB")
    arrays = [np.full(50_000, n, dtype=float) for n in range(24)]
    for n, result in enumerate([rt.submit(_doubled, array) for array in arrays]):
        assert (result.result() == 2 * n).all()
    shared = rt.empty(20_000, float)
    shared[:] = 0
    for _ in range(10):
        rt.submit(_add_one, shared).result()
    assert (shared == 10).all()
    ref = rt.put(np.arange(30_000))
    futures = [rt.submit(np.sum, ref) for _ in range(8)]
    assert {int(future.result()) for future in futures} == {30_000 * 29_999 // 2}


def test_what_one_lane_keeps_another_returns(factory: Factory, gate: Gate) -> None:
    """`local` is one for all; views outlive their lease, whichever thread looks at them later."""
    rt = factory(1, threads=2, region_size="16MiB")
    futures = [rt.submit(_keep, np.full(20_000, n, dtype=float)) for n in range(8)]
    assert max(future.result() for future in futures) == 8
    blocked = rt.submit(tasks.pass_through, gate.path)  # so that the other lane is the one that returns them
    gate.arrived()
    for _ in range(2):
        found = rt.submit(_kept, 0).result()
        assert sorted(float(array[0]) for array in found) == list(range(8))
        assert all((array == array[0]).all() for array in found)
    gate.open()
    blocked.result()


# ---- what belongs to a thread, and what to the worker ------------------------------------------------------


def _side_thread(_: int) -> list[Any]:
    seen: list[Any] = []

    def look() -> None:
        context = runtime.current()
        context.report(1)  # nobody's
        seen.extend([context.number, context.task, context.empty(10, float).shape])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return seen


def _loop_in_task(value: int) -> int:
    async def work() -> int:
        await asyncio.sleep(0)
        return value + 1

    return asyncio.run(work())


def _report_at(path: str, done: int) -> int:
    runtime.current().report(done, 10)
    tasks.pass_through(path)
    return done


def _log_at(path: str) -> int | None:
    tasks.pass_through(path)
    logging.getLogger("of.task").warning("from %s", runtime.current().task)
    print(f"line of {runtime.current().task}")
    return runtime.current().task


def test_code_in_other_threads(factory: Factory) -> None:
    rt = factory(1, threads=2)
    assert rt.submit(_side_thread, 0).result() == [0, None, (10,)]
    assert [f.result() for f in [rt.submit(_loop_in_task, n) for n in range(4)]] == [1, 2, 3, 4]


def test_reports_are_of_their_task(factory: Factory, gate: Gate) -> None:
    rt = factory(1, threads=3)
    futures = [rt.submit(_report_at, gate.path, n) for n in range(3)]
    gate.arrived(3)
    assert [future.progress() for future in futures] == [(0, 10, ""), (1, 10, ""), (2, 10, "")]
    gate.open(3)
    assert [future.result() for future in futures] == [0, 1, 2]


def test_logs_and_prints(
    factory: Factory, gate: Gate, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    rt = factory(1, threads=3)
    futures = [rt.submit(_log_at, gate.path) for _ in range(3)]
    gate.arrived(3)
    gate.open(3)
    numbers = [future.result() for future in futures]
    rt.shutdown()
    records = [record for record in caplog.records if record.name == "of.task"]
    assert sorted(record.getMessage() for record in records) == [f"from {n}" for n in sorted(numbers)]
    assert all(record.getMessage() == f"from {record.task}" for record in records)  # type: ignore[attr-defined]
    out = capsys.readouterr().out
    assert all(f"line of {n}" in out for n in numbers)


_model = None


def _load_model(value: str) -> None:
    global _model
    _model = value
    runtime.current().local["model"] = value


def _use_model(path: str) -> tuple[Any, Any]:
    tasks.pass_through(path)
    return _model, runtime.current().local["model"]


def test_initializer_runs_once(factory: Factory, gate: Gate, tmp_path: Path) -> None:
    log = tmp_path / "log"
    rt = factory(1, threads=3, initializer=tasks.log_line, initargs=(str(log), "init"))
    rt.submit(abs, 1).result()
    assert lines(log) == {"init": 1}
    rt = factory(1, threads=3, initializer=_load_model, initargs=("m",))
    futures = [rt.submit(_use_model, gate.path) for _ in range(3)]
    gate.arrived(3)
    gate.open(3)
    assert [future.result() for future in futures] == [("m", "m")] * 3


BY_VALUE = """
import os, runtime
from tasks import Gate, pass_through
from pathlib import Path
from types import SimpleNamespace

model = None
x = 0

def load():
    global model
    model = "loaded"

def helper():
    return x

def look(path):
    before = helper(), x
    pass_through(path)
    return before, helper(), x, model

if __name__ == "__main__":
    gate = Gate(Path(os.environ["FOLDER"]))
    with runtime.Runtime(1, threads=4, initializer=load) as rt:
        futures = []
        for x in range(1, 5):
            futures.append(rt.submit(look, gate.path))
        gate.arrived(4)
        gate.open(4)
        print([future.result() for future in futures])
        y = []
        for x in range(100):
            y.append(rt.submit(lambda: helper() + x))
        print([future.result() for future in y] == [2 * n for n in range(100)])
        print(list(rt.map(lambda n: n + x, range(3), chunksize=1)))
    gate.close()
"""


def test_globals_by_value_at_once(tmp_path: Path) -> None:
    """x = 1; submit(f); x = 2; submit(f): each sees its own x, though they run side by side."""
    file = tmp_path / "program.py"
    file.write_text(BY_VALUE)
    root = Path(__file__).parent
    env = {**os.environ, "FOLDER": str(tmp_path), "PYTHONPATH": f"{root.parent}:{root}"}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=env, timeout=50)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == repr([((n, n), n, n, "loaded") for n in range(1, 5)])
    assert second == "True"
    assert third == "[99, 100, 101]"


# ---- deaths ----------------------------------------------------------------------------------------------


def test_a_deadline_spares_the_neighbours(factory: Factory, gate: Gate, tmp_path: Path) -> None:
    """The one whose time is over is told so; the one beside it runs again, at no cost."""
    rt = factory(1, threads=3)
    log = tmp_path / "log"
    neighbour = rt.options(retries=1).submit(gated, gate.path, str(log), "patient")
    without = rt.submit(gated, gate.path, str(log), "fragile")
    gate.arrived(2)
    culprit = rt.options(timeout=0.2).submit(tasks.pass_through, gate.path)
    with pytest.raises(TaskTimeout):
        culprit.result()
    with pytest.raises(WorkerDied) as caught:
        without.result()
    assert caught.value.reason == "neighbour" and caught.value.number == 0
    assert "timeout" in str(caught.value) and "pass_through" in str(caught.value)
    until(lambda: lines(log)["patient"] == 2, "it runs again")
    assert lines(log) == {"patient": 2, "fragile": 1}
    gate.open(8)
    assert neighbour.result() == "patient"


def test_a_neighbours_retry_is_not_counted(factory: Factory, gate: Gate, tmp_path: Path) -> None:
    """Four times beside a culprit, with one retry allowed; and it still is its first attempt."""
    rt = factory(1, threads=2)
    log = tmp_path / "log"
    neighbour = rt.options(retries=1).submit(where_logged, gate.path, str(log))
    for n in range(4):
        until(lambda n=n: lines(log)["began"] == n + 1, "it runs")  # type: ignore[misc]
        culprit = rt.submit(gated, gate.path, str(log), f"culprit{n}")
        until(lambda n=n: lines(log)[f"culprit{n}"] == 1, "the other runs beside it")  # type: ignore[misc]
        assert rt.cancel(culprit, running=True)
        with pytest.raises(TaskCancelled):
            culprit.result()
    until(lambda: lines(log)["began"] == 5, "it runs once more")
    gate.open(16)
    assert neighbour.result() == 1


def where_logged(path: str, log: str) -> int:
    tasks.log_line(log, "began")
    tasks.pass_through(path)
    return runtime.current().attempt


def test_items_of_a_map_beside_a_culprit(factory: Factory, tmp_path: Path) -> None:
    """Chunks that ran beside it go on where they were. Of two culprits one may be the other's neighbour."""
    rt = factory(1, threads=4, retries=1)
    culprits = [rt.options(timeout=0.1, retries=0).submit(time.sleep, 60) for _ in range(2)]
    found = list(rt.map(tasks.tick, range(3000)))
    assert [value for _, _, value in found] == list(range(3000))
    errors = [culprit.exception() for culprit in culprits]
    late = [error for error in errors if isinstance(error, TaskTimeout)]
    beside = [error for error in errors if isinstance(error, WorkerDied) and error.reason == "neighbour"]
    assert late and len(late) + len(beside) == 2


def _crash(path: str) -> None:
    tasks.pass_through(path)
    ctypes.string_at(0)


def test_a_crash_with_several_running(factory: Factory, gate: Gate, tmp_path: Path) -> None:
    """Nobody knows whose doing it was: each is blamed, and told how many ran. What waited runs."""
    rt = factory(1, threads=3)
    log = tmp_path / "log"
    beside = rt.submit(gated, gate.path, str(log), "beside")
    again = rt.options(retries=1).submit(gated, gate.path, str(log), "again")
    gate.arrived(2)
    own = Gate(tmp_path, "own")
    crash = rt.submit(_crash, str(tmp_path / "own"))
    own.arrived()
    waiting = [rt.submit(abs, -n) for n in range(20)]
    own.open()
    for future in (crash, beside):
        with pytest.raises(WorkerDied) as caught:
            future.result()
        assert caught.value.signal == signal.SIGSEGV
        assert "3 tasks were running in it" in caught.value.reason
    until(lambda: lines(log)["again"] == 2, "it runs again")
    gate.open(8)
    assert again.result() == "again"
    assert [future.result() for future in waiting] == list(range(20))
    own.close()


def _note(log: str, value: int) -> int:
    tasks.log_line(log, value)
    return value


def test_killed_with_many_leases(factory: Factory, tmp_path: Path) -> None:
    """Nothing is lost; without retries nothing runs twice, and what was running is what is blamed."""
    log = tmp_path / "log"
    rt = factory(2, threads=4)
    futures = [rt.submit(_note, str(log), n) for n in range(3000)]
    for _ in range(3):
        pid = next((info.pid for info in rt.workers() if info.pid and info.task is not None), None)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        until(lambda: rt.stats().workers == 2 or not rt.stats().leased, "both are back")
    died = 0
    for n, future in enumerate(futures):
        error = future.exception()
        if error is None:
            assert future.result() == n
        else:
            assert isinstance(error, WorkerDied)
            died += 1
    assert died <= 3 * 4
    assert max(lines(log).values()) == 1
    assert rt.stats().done == 3000 - died and rt.stats().failed == died


# ---- ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_lets_all_lanes_finish(factory: Factory, gate: Gate, number: int) -> None:
    rt = factory(1, threads=3)
    futures = [rt.submit(where, gate.path) for _ in range(3)]
    (pid,) = set(gate.arrived(3))
    more = rt.submit(os.getpid)
    os.kill(pid, number)
    assert more.result() != pid  # the next one has started meanwhile
    gate.open(3)
    assert [future.result()[0] for future in futures] == [pid] * 3


@pytest.mark.parametrize("chunksize", [None, 10])
def test_share_of_tasks_is_exact(factory: Factory, chunksize: int | None) -> None:
    rt = factory(2, threads=4, max_tasks_per_child=7)
    if chunksize is None:
        futures = [rt.submit(os.getpid) for _ in range(140)]
        counts = Counter(future.result() for future in futures)
    else:
        counts = Counter(rt.map(lambda _: os.getpid(), range(140), chunksize=chunksize))
    assert sum(counts.values()) == 140
    assert max(counts.values()) == 7
    assert sum(count < 7 for count in counts.values()) <= 2


def test_scale_and_shutdown(factory: Factory, gate: Gate) -> None:
    rt = factory(2, threads=2)
    futures = [rt.submit(where, gate.path) for _ in range(4)]
    gate.arrived(4)
    rt.scale(1)
    rt.scale(3)
    rt.scale(1)
    gate.open(4)
    assert len({future.result()[0] for future in futures}) == 2
    until(lambda: [info.number for info in rt.workers()] == [0], "one is left")
    last = [rt.submit(abs, -n) for n in range(50)]
    rt.shutdown()
    assert [future.result() for future in last] == list(range(50))


def _grow(_: int) -> int:
    runtime.current().local.setdefault("ballast", []).append(bytearray(8 << 20))
    return os.getpid()


def test_max_worker_rss(factory: Factory) -> None:
    rt = factory(1, threads=2, max_worker_rss="120MiB")
    first = rt.submit(_grow, 0).result()
    until(lambda: rt.submit(_grow, 0).result() != first, "it has grown too large and was replaced")


def test_the_main_thread_sees_short_tasks() -> None:
    """It looks after size and children ten times a second also if it never meets a task that runs."""
    lanes = [
        SimpleNamespace(port=SimpleNamespace(left=-1), context=SimpleNamespace(task=None)) for _ in range(2)
    ]
    crew = SimpleNamespace(lanes=lanes, ran=-2)
    assert not Crew.busy(crew)
    lanes[1].port.left -= 1
    assert Crew.busy(crew)
    assert not Crew.busy(crew)
    lanes[0].context.task = 1
    assert Crew.busy(crew)


def test_dump_stacks_shows_every_lane(factory: Factory, gate: Gate) -> None:
    rt = factory(1, threads=3)
    futures = [rt.submit(where, gate.path) for _ in range(3)]
    gate.arrived(3)
    text = rt.dump_stacks()[0]
    assert text.count("in pass_through") == 3
    assert all(f"runtime-lane-{n}" in text for n in range(3))
    gate.open(3)
    for future in futures:
        future.result()


# ---- forks -----------------------------------------------------------------------------------------------


def _fork(_: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            runtime.current()
        except RuntimeError:
            logging.getLogger("child").error("x")
            os._exit(7)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _subprocess(_: int) -> str:
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_forks_on_lanes(factory: Factory) -> None:
    """Beside neighbours that print, allocate and load functions."""
    rt = factory(1, threads=4)
    noise = [rt.submit(print, "noise", n) for n in range(200)]
    forks = [rt.submit(_fork, n) for n in range(12)]
    assert [future.result() for future in forks] == [7] * 12
    for future in noise:
        future.result()
    assert "SIGTERM" not in rt.submit(_subprocess, 0).result()
    assert rt.submit(abs, -1).result() == 1


# ---- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"threads": 0}, ValueError, "threads must be >= 1"),
        ({"threads": 65}, ValueError, "threads must be at most 64"),
        ({"threads": "2"}, TypeError, "threads must be an int"),
        ({"threads": True}, TypeError, "threads must be an int"),
        ({"max_workers": 1000, "threads": 4}, ValueError, "max_workers times threads must be at most 2,000"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Runtime(**arguments)


def test_many_threads_overlap(factory: Factory) -> None:
    """Tasks that wait; what they gain is measured in bench/threads.py."""
    rt = factory(1, threads=16)
    rt.submit(abs, 1).result()
    begin = time.monotonic()
    for future in [rt.submit(time.sleep, 0.01) for _ in range(160)]:
        future.result()
    assert time.monotonic() - begin < 1.6  # one after another it is at least that


TARGET = """
import runtime
def main(rt, argv):
    found = rt.submit(lambda: runtime.current().thread).result()
    print(rt._settings.threads, found)
"""


@pytest.mark.parametrize(
    ("options", "variable", "code", "said"),
    [
        (["--threads", "3"], "", 0, "3 0"),
        (["--threads", "3"], "2", 0, "3 0"),
        ([], "2", 0, "2 0"),
        ([], "", 0, "1 0"),
        ([], "two", 2, "RUNTIME_THREADS is 'two'"),
        (["--threads", "65"], "", 2, "threads must be at most 64"),
    ],
)
def test_command(tmp_path: Path, options: list[str], variable: str, code: int, said: str) -> None:
    (tmp_path / "target.py").write_text(TARGET)
    command = [sys.executable, "-m", "runtime", "run", "--workers", "1", "--no-progress", *options]
    env = {**os.environ, "RUNTIME_THREADS": variable, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [*command, f"{tmp_path}/target.py:main"], capture_output=True, text=True, env=env, timeout=50
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_thread_caps_count_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(config, "available_cpus", lambda: 16)
    assert config.thread_caps(2)["OMP_NUM_THREADS"] == "8"
    assert config.thread_caps(2, 4)["OMP_NUM_THREADS"] == "2"
    assert config.thread_caps(2, 64)["OMP_NUM_THREADS"] == "1"


def test_no_lane_ends_a_task_while_the_child_of_another_copies(factory: Factory, tmp_path: Path) -> None:
    """Else the host would give the memory to others that the child still has to copy."""
    numpy = pytest.importorskip("numpy")
    rt = factory(1, threads=2)
    held, copied = str(tmp_path / "held"), str(tmp_path / "copied")
    forks = rt.submit(forked.fork_slowly, numpy.ones(5000), held, copied)
    beside = rt.submit(forked.return_when, held, numpy.ones(5000))
    assert beside.result() == 5000 and os.path.exists(copied)
    assert forks.result() == 0
