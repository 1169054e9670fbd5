"""The crash matrix, and tasks that are rude to their process.

Evil object × moment → expected outcome, as loky's crash_cases. The moments:

    pickling in the host ─► unpickling in the worker ─► running ─► pickling what it returned or raised
                                                                        └─► unpickling that in the host

After each: the runtime still works, all other tasks have completed, and the exception says exactly what
happened. What would end the host's own process (os._exit, a signal, at a moment in the host) is not tried.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
import signal
from collections import Counter
from pathlib import Path

import evil
import pytest
from watching import (
    alive,
    all_ready,
    fields,
    output,
    read_pids,
    send,
    settled,
    shut_down_clean,
    stopped,
    until,
)

import runtime

INNOCENTS = 12


@pytest.fixture
def note(tmp_path):
    """Where the misbehaving process leaves its pid."""
    return str(tmp_path / "note")


class Crash:
    """Two ready workers with innocents before and behind the evil task."""

    def __init__(self, rt):
        self.rt = rt
        self.numbers = {pid: number for number, pid in all_ready(rt).items()}

    def error_of(self, fn, *args):
        before = [self.rt.submit(evil.square, i) for i in range(INNOCENTS)]
        future = self.rt.submit(fn, *args)
        after = [self.rt.submit(evil.square, i) for i in range(INNOCENTS)]
        error = future.exception(30)
        for i, innocent in enumerate(before + after):
            assert innocent.result(30) == (i % INNOCENTS) ** 2
        self.still_works()
        return error

    def still_works(self):
        rt = self.rt
        assert list(rt.map(evil.square, range(20), chunksize=3)) == [i * i for i in range(20)]
        all_ready(rt)
        settled(rt)

    def died(self, error, action, note):
        """A WorkerDied that says exactly what happened to the process that left the note."""
        exitcode, number = evil.DEADLY[action]
        pids = [int(line) for line in Path(note).read_text().split()]
        assert type(error) is runtime.WorkerDied
        assert len(pids) == 1, "it ran more than once"
        assert (error.pid, error.exitcode, error.signal) == (pids[0], exitcode, number)
        assert error.number == self.numbers[pids[0]]
        assert error.attempts == 1
        assert str(pids[0]) in str(error)
        assert (number.name if number else str(exitcode)) in str(error)
        survivors = all_ready(self.rt)
        assert pids[0] not in survivors.values()
        assert len(set(survivors.values()) & self.numbers.keys()) == 1, "the other worker was replaced, too"

    def lives(self, note, where="worker"):
        """No worker was replaced, and what happened, happened in one of them, or in the host."""
        assert set(all_ready(self.rt).values()) == set(self.numbers)
        pids = {int(line) for line in Path(note).read_text().split()}
        assert pids <= ({os.getpid()} if where == "host" else set(self.numbers))


@pytest.fixture
def crash(rt):
    return Crash(rt)


def each_way_to_raise(note):
    """(action, where it leaves its note): they leave the workers alive, so one runtime serves them all."""
    return [(action, f"{note}-{action}") for action in evil.RAISING]


def check_raised(error, action):
    assert type(error) is evil.RAISING[action]
    if action == "sys.exit":
        assert error.code == evil.EXIT_CODE
    elif action != "recursion":
        assert error.args == ("evil",)


deadly = pytest.mark.parametrize("action", list(evil.DEADLY))

# ---- the matrix: arguments -----------------------------------------------------------------------


def test_argument_raises_at_pickling_in_the_host(crash, note):
    for action, path in each_way_to_raise(note):
        check_raised(crash.error_of(evil.take, evil.AtPickling(action, path)), action)
        crash.lives(path, "host")


def test_argument_raises_at_unpickling_in_the_worker(crash, note):
    for action, path in each_way_to_raise(note):
        error = crash.error_of(evil.take, evil.AtUnpickling(action, path))
        check_raised(error, action)
        assert "arrive" in str(error.__cause__), "the remote traceback shows the culprit"
        crash.lives(path)


@deadly
def test_argument_kills_the_worker_at_unpickling(crash, note, action):
    crash.died(crash.error_of(evil.take, evil.AtUnpickling(action, note)), action, note)


# ---- the matrix: running -------------------------------------------------------------------------


def test_task_raises(crash, note):
    for action, path in each_way_to_raise(note):
        error = crash.error_of(evil.act, action, path)
        check_raised(error, action)
        assert "misbehave" in str(error.__cause__)
        crash.lives(path)


@deadly
def test_task_kills_its_worker(crash, note, action):
    crash.died(crash.error_of(evil.act, action, note), action, note)


@deadly
def test_item_of_a_map_kills_its_worker(crash, note, action):
    evil_item = 7
    items = [(evil_item, action, note) if i == evil_item else (i, "", "") for i in range(20)]
    results = list(crash.rt.map(one_evil_item, items, chunksize=5, return_exceptions=True))
    error = results.pop(evil_item)
    assert results == [i for i in range(20) if i != evil_item]
    crash.still_works()
    crash.died(error, action, note)


def one_evil_item(item):
    number, action, path = item
    if action:
        evil.act(action, path)
    return number


@deadly
def test_retries_run_it_again_elsewhere(crash, note, action):
    future = crash.rt.options(retries=2).submit(evil.act, action, note)
    error = future.exception(30)
    pids = read_pids(note, 3)
    assert len(pids) == len(set(pids)) == 3
    exitcode, number = evil.DEADLY[action]
    assert type(error) is runtime.WorkerDied
    assert (error.pid, error.exitcode, error.signal, error.attempts) == (pids[-1], exitcode, number, 3)
    crash.still_works()


# ---- the matrix: results -------------------------------------------------------------------------


def test_result_raises_at_pickling(crash, note):
    for action, path in each_way_to_raise(note):
        error = crash.error_of(evil.give, "AtPickling", action, path)
        check_raised(error, action)
        assert any("could not be pickled" in line for line in error.__notes__)
        crash.lives(path)


@deadly
def test_result_kills_the_worker_at_pickling(crash, note, action):
    crash.died(crash.error_of(evil.give, "AtPickling", action, note), action, note)


def test_result_raises_at_unpickling_in_the_host(crash, note):
    for action, path in each_way_to_raise(note):
        error = crash.error_of(evil.give, "AtUnpickling", action, path)
        check_raised(error, action)
        assert any("unpickled in the host" in line for line in error.__notes__)
        crash.lives(path, "host")


# ---- the matrix: exceptions ----------------------------------------------------------------------


def check_remote(error, action, name):
    assert type(error) is runtime.RemoteError
    assert error.type_name == f"evil.{name}"
    assert error.text == f"evil text of {action}"
    assert "in throw" in error.traceback
    assert "in throw" in str(error.__cause__)


def test_exception_raises_at_pickling(crash, note):
    for action, path in each_way_to_raise(note):
        check_remote(crash.error_of(evil.throw, "PicklingError", action, path), action, "PicklingError")
        crash.lives(path)


@deadly
def test_exception_kills_the_worker_at_pickling(crash, note, action):
    crash.died(crash.error_of(evil.throw, "PicklingError", action, note), action, note)


def test_exception_raises_at_unpickling_anywhere(crash, note):
    for action, path in each_way_to_raise(note):
        error = crash.error_of(evil.throw, "UnpicklingError", action, path, True)
        check_remote(error, action, "UnpicklingError")
        assert set(all_ready(crash.rt).values()) == set(crash.numbers)


def test_exception_raises_at_unpickling_in_the_host(crash, note):
    for action, path in each_way_to_raise(note):
        error = crash.error_of(evil.throw, "UnpicklingError", action, path)
        check_remote(error, action, "UnpicklingError")
        crash.lives(path, "host")


@deadly
def test_exception_that_would_kill_at_unpickling_kills_the_worker_not_the_host(crash, note, action):
    crash.died(crash.error_of(evil.throw, "UnpicklingError", action, note, True), action, note)


# ---- who is blamed, what is lost, what runs twice ------------------------------------------------


class Executions:
    """What tasks have appended to their file: who started and who ended what, in order."""

    def __init__(self, path):
        lines = [line.split() for line in Path(path).read_text().splitlines()] if os.path.exists(path) else []
        self.started = Counter(int(key) for kind, key, _ in lines if kind == "S")
        self.ended = Counter(int(key) for kind, key, _ in lines if kind == "E")
        self.last = {int(pid): (kind, int(key)) for kind, key, pid in lines}  # of each process
        self.where = {}  # key -> pids that started it
        for kind, key, pid in lines:
            if kind == "S":
                self.where.setdefault(int(key), []).append(int(pid))


def test_only_poison_is_blamed_among_prefetched_innocents(rt, tmp_path):
    path, count = str(tmp_path / "log"), 240
    poison = set(random.Random(3).sample(range(count), 12))
    futures = [rt.submit(evil.counted_poison if i in poison else evil.counted, path, i) for i in range(count)]
    blamed = set()
    for i, future in enumerate(futures):
        error = future.exception(50)
        if error is not None:
            assert type(error) is runtime.WorkerDied
            assert (error.signal, error.exitcode) == (signal.SIGKILL, None)
            blamed.add(i)
    log = Executions(path)
    assert blamed == poison
    assert log.started == Counter(range(count)), "each ran exactly once"
    assert all(futures[i].exception().pid == log.where[i][0] for i in poison)
    settled(rt)


@pytest.mark.parametrize("retries", [0, 9])
def test_kills_of_running_workers(runtime_factory, tmp_path, retries):
    """Workers are killed at random instants while they run; the instants come from a seed."""
    rt = runtime_factory(2, retries=retries)
    draw = random.Random(20 + retries)
    path, count, kills = str(tmp_path / "log"), 400, 12
    futures = [rt.submit(evil.counted, path, i, draw.uniform(0.0, 0.006)) for i in range(count)]
    killed = kill_running(rt, kills, draw, lambda: all(f.done() for f in futures))
    failed = {}
    for i, future in enumerate(futures):
        error = future.exception(50)
        if error is None:
            assert future.result() == i
        else:
            assert type(error) is runtime.WorkerDied
            failed[i] = error
    log = Executions(path)
    assert len(killed) == kills, "the tasks were over before the kills"
    if retries:
        assert not failed, "a retry was not taken"
        assert all(log.ended[i] for i in range(count))
        assert sum(log.started.values()) <= count + kills
    for i in range(count):
        if not retries:
            assert log.started[i] <= 1, "run twice"
            assert log.ended[i] == 1 or i in failed, "a result without a run"
    for i, error in failed.items():
        assert error.pid in killed
        assert error.signal == signal.SIGKILL
        if log.started[i]:
            assert log.where[i] == [error.pid]
            assert log.last[error.pid][1] == i, "blamed is not what it ran last"
        else:
            assert log.last.get(error.pid, ("E",))[0] == "E", "blamed is not what it was running"
    blamed = Counter(error.pid for error in failed.values())
    assert all(n == 1 for n in blamed.values()), "one process ran one task"
    settled(rt)


def kill_running(rt, kills, draw, over):
    """SIGKILL `kills` workers that run a task at that moment. Their pids."""
    killed = []
    while len(killed) < kills and not over():
        wanted = rt.stats().done + draw.randrange(1, 25)
        until(lambda n=wanted: rt.stats().done + rt.stats().failed >= n or over(), "the tasks go on")
        infos = [i for i in rt.workers() if i.task is not None and i.pid is not None and i.pid not in killed]
        if infos:
            victim = draw.choice(infos).pid
            try:
                send(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(victim)
    return killed


def test_kills_during_maps(rt, tmp_path):
    draw = random.Random(8)
    path, count = str(tmp_path / "log"), 600
    results = rt.options(retries=9).map(evil.counted, [path] * count, range(count), [0.001] * count)
    killed = kill_running(rt, 8, draw, lambda: False)
    assert list(results) == list(range(count))
    log = Executions(path)
    assert len(killed) == 8
    assert all(log.ended[i] for i in range(count))
    settled(rt)


def test_kills_of_a_map_with_chunksize_one_repeat_only_what_was_running(rt, tmp_path):
    draw = random.Random(9)
    path, count = str(tmp_path / "log"), 300
    results = rt.options(retries=9).map(
        evil.counted, [path] * count, range(count), [0.002] * count, chunksize=1
    )
    killed = kill_running(rt, 6, draw, lambda: False)
    assert list(results) == list(range(count))
    log = Executions(path)
    assert sum(log.started.values()) <= count + len(killed)
    settled(rt)


def test_blocks_are_back_after_deaths_with_large_arguments_and_results(runtime_factory):
    rt = runtime_factory(2, region_size="8MiB", region_max="8MiB")
    data = bytearray(300_000)
    futures = [rt.submit(echo_or_die, data, i % 5 == 2) for i in range(40)]
    for i, future in enumerate(futures):
        if i % 5 == 2:
            assert isinstance(future.exception(30), runtime.WorkerDied)
        else:
            assert len(future.result(30)) == len(data)
    settled(rt)
    del futures, future
    shut_down_clean(rt)


def echo_or_die(data, die):
    if die:
        evil.misbehave("kill")
    return data


# ---- tasks that fork -----------------------------------------------------------------------------


def childless(pid):
    """The worker has no children, not even dead ones."""
    return not evil.own_children(pid)


def test_a_forked_child_that_returns_delivers_nothing(crash, tmp_path):
    for _ in range(5):
        assert crash.rt.submit(evil.fork_and_return).result(30) in crash.numbers
    crash.still_works()
    assert set(all_ready(crash.rt).values()) == set(crash.numbers)
    for pid in crash.numbers:
        until(lambda p=pid: not any(alive(c) for c in evil.own_children(p)), "the children have left")


@pytest.mark.parametrize("how", ["raise", "sys.exit", "os._exit", "kill", "raise-base"])
def test_a_forked_child_that_leaves_disturbs_nobody(crash, how):
    for _ in range(2):
        assert crash.rt.submit(evil.fork_and_leave, how).result(30) in crash.numbers
    crash.still_works()
    assert set(all_ready(crash.rt).values()) == set(crash.numbers)


def test_a_worker_reaps_what_it_adopts_between_tasks(runtime_factory):
    rt = runtime_factory(1)
    orphans = [rt.submit(evil.fork_an_orphan).result(30) for _ in range(3)]
    (worker,) = all_ready(rt).values()

    def reaped():
        assert rt.submit(os.getpid).result(30) == worker
        return not any(fields(pid) for pid in orphans)

    until(reaped, lambda: f"{[(pid, fields(pid)[:2]) for pid in orphans]} have been waited for", 10)


# ---- tasks that are rude in other ways -----------------------------------------------------------


@pytest.mark.parametrize("daemon", [True, False])
def test_a_thread_that_outlives_its_task(crash, tmp_path, daemon):
    stop = tmp_path / "stop"
    pid = crash.rt.submit(evil.start_thread, daemon, str(stop)).result(30)
    assert pid in crash.numbers
    crash.still_works()
    assert set(all_ready(crash.rt).values()) == set(crash.numbers)
    stop.touch()  # a thread that is not a daemon would hold its worker's exit


@pytest.mark.parametrize("low", [0, 3])
def test_closing_descriptors_of_others(crash, low):
    """The worker may be lost, nothing else: it is replaced before it claims what it could not answer for."""
    rt = crash.rt
    before = [rt.submit(evil.square, i) for i in range(INNOCENTS)]
    future = rt.submit(evil.close_all, low)
    after = [rt.submit(evil.square, i) for i in range(INNOCENTS)]
    error = future.exception(30)
    assert error is None or isinstance(error, runtime.WorkerDied)
    culprit = future.result() if error is None else error.pid
    assert culprit in crash.numbers
    for i, innocent in enumerate(before + after):
        assert innocent.result(30) == (i % INNOCENTS) ** 2
    until(lambda: not alive(culprit), "the worker without descriptors has left")
    crash.still_works()


def test_chdir(crash, tmp_path):
    assert crash.rt.submit(evil.change_directory, str(tmp_path)).result(30) == str(tmp_path)
    assert crash.rt.submit(lambda: evil.square(3)).result(30) == 9
    crash.still_works()
    assert set(all_ready(crash.rt).values()) == set(crash.numbers)


def test_output_comes_once():
    code = """if True:
        import sys, runtime
        def hello(i):
            print("task", i)
            sys.stderr.write("note %d\\n" % i)
        print("before")          # in the buffer of a pipe when the workers are made
        with runtime.Runtime(2) as rt:
            list(rt.map(hello, range(20), chunksize=1))
        print("after")
    """
    lines = output(code)
    assert sorted(lines) == sorted(["before", "after", *(f"task {i}" for i in range(20))])


def test_exception_of_5_mb(crash):
    error = crash.error_of(evil.big_exception, 5_000_000)
    assert type(error) is ValueError
    assert len(error.args[0]) == 5_000_000
    assert set(all_ready(crash.rt).values()) == set(crash.numbers)


def test_lambda_as_result(crash):
    assert crash.rt.submit(evil.make_lambda, 5).result(30)(6) == 11
    crash.still_works()


# ---- stopped workers -----------------------------------------------------------------------------


def test_a_stopped_worker_is_not_dead(rt, tmp_path):
    numbers = all_ready(rt)
    go, started = tmp_path / "go", tmp_path / "started"
    future = rt.submit(evil.wait_for, str(go), str(started))
    (pid,) = read_pids(started)
    send(pid, signal.SIGSTOP)
    until(lambda: stopped(pid), "it has stopped")
    try:
        others = [rt.submit(evil.square, i) for i in range(300)]
        assert [f.result(15) for f in others] == [i * i for i in range(300)]
        assert list(rt.map(evil.square, range(300), timeout=15)) == [i * i for i in range(300)]
        assert not future.done()
        assert future.running()
        assert {i.number: i.pid for i in rt.workers()} == numbers
    finally:
        go.touch()
        send(pid, signal.SIGCONT)
    assert future.result(30) == pid
    assert all_ready(rt) == numbers
    settled(rt)


def test_an_idle_stopped_worker_holds_nothing_back(rt):
    numbers = all_ready(rt)
    send(numbers[0], signal.SIGSTOP)
    until(lambda: stopped(numbers[0]), "it has stopped")
    futures = [rt.submit(os.getpid) for _ in range(200)]
    try:
        assert {f.result(15) for f in futures} == {numbers[1]}
        assert {i.number: i.pid for i in rt.workers()} == numbers
    finally:
        send(numbers[0], signal.SIGCONT)
    assert all_ready(rt) == numbers


def test_the_timeout_of_a_stopped_task_holds(rt, tmp_path):
    started = tmp_path / "started"
    all_ready(rt)
    future = rt.options(timeout=0.5).submit(evil.hang, str(started))
    (pid,) = read_pids(started)
    send(pid, signal.SIGSTOP)
    others = [rt.submit(evil.square, i) for i in range(50)]
    assert type(future.exception(30)) is runtime.TaskTimeout
    assert [f.result(30) for f in others] == [i * i for i in range(50)]
    until(lambda: not alive(pid), "its worker is gone")
    until(lambda: pid not in all_ready(rt).values(), "it is replaced")
    settled(rt)


def test_shutdown_with_a_stopped_idle_worker(runtime_factory):
    """It cannot leave by itself; the drain timeout ends it."""
    rt = runtime_factory(2, drain_timeout=0.3)
    pid = all_ready(rt)[1]
    send(pid, signal.SIGSTOP)
    until(lambda: stopped(pid), "it has stopped")
    rt.shutdown()
    assert not alive(pid)


# ---- signals to workers --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_leave_lets_the_task_finish(rt, tmp_path, number):
    numbers = all_ready(rt)
    go, started = tmp_path / "go", tmp_path / "started"
    future = rt.submit(evil.wait_for, str(go), str(started))
    (pid,) = read_pids(started)
    queued = [rt.submit(evil.square, i) for i in range(100)]
    send(pid, number)
    assert [f.result(30) for f in queued] == [i * i for i in range(100)]
    assert future.running()
    assert alive(pid)
    go.touch()
    assert future.result(30) == pid
    until(lambda: not alive(pid), "it has left")
    until(lambda: pid not in all_ready(rt).values(), "it is replaced")
    after = all_ready(rt)
    assert len(set(after.values()) & set(numbers.values())) == 1
    settled(rt)


def test_sigterm_to_idle_workers_replaces_them(rt):
    before = all_ready(rt)
    for pid in before.values():
        send(pid, signal.SIGTERM)
    futures = [rt.submit(evil.square, i) for i in range(100)]
    assert [f.result(30) for f in futures] == [i * i for i in range(100)]
    until(lambda: not any(alive(pid) for pid in before.values()), "the old ones have left")
    assert not set(all_ready(rt).values()) & set(before.values())
    settled(rt)


def test_sigterm_in_a_map_loses_and_doubles_nothing(rt, tmp_path):
    path, count = str(tmp_path / "log"), 300
    results = rt.map(evil.counted, [path] * count, range(count), [0.001] * count)
    draw = random.Random(4)
    for _ in range(6):
        infos = until(
            lambda: [i for i in rt.workers() if i.task is not None and i.pid], "a worker runs something"
        )
        victim = draw.choice(infos).pid
        send(victim, signal.SIGTERM)
        until(lambda v=victim: not alive(v), "it leaves after its item")
    assert list(results) == list(range(count))
    log = Executions(path)
    assert log.started == log.ended == Counter(range(count))
    settled(rt)


def test_sigint_to_a_worker_does_nothing(rt, tmp_path):
    numbers = all_ready(rt)
    go, started = tmp_path / "go", tmp_path / "started"
    future = rt.submit(evil.wait_for, str(go), str(started))
    (pid,) = read_pids(started)
    for worker in numbers.values():
        send(worker, signal.SIGINT)
    go.touch()
    assert future.result(30) == pid
    assert {rt.submit(os.getpid).result(30) for _ in range(20)} <= set(numbers.values())
    assert all_ready(rt) == numbers


# ---- hanging code --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [evil.hang, evil.hang_with_gil])
@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_hanging_code_is_stopped(rt, tmp_path, task, how):
    started = tmp_path / "started"
    all_ready(rt)
    view = rt.options(timeout=0.3) if how == "timeout" else rt
    future = view.submit(task, str(started))
    (pid,) = read_pids(started)
    if how == "cancel":
        assert rt.cancel(future, running=True)
    with pytest.raises((runtime.TaskTimeout, runtime.TaskCancelled)) as caught:
        future.result(30)
    error = caught.value
    assert type(error) is (runtime.TaskTimeout if how == "timeout" else runtime.TaskCancelled)
    assert isinstance(error, TimeoutError if how == "timeout" else concurrent.futures.CancelledError)
    until(lambda: not alive(pid), "its worker is gone")
    until(lambda: pid not in all_ready(rt).values(), "it is replaced")
    settled(rt)


@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_kills_of_first_tasks_are_no_failed_starts(runtime_factory, tmp_path, how):
    """Each worker becomes ready and is killed in its first task, by us: the runtime is not broken by that."""
    rt = runtime_factory(1)
    for i in range(7):
        all_ready(rt)
        view = rt.options(timeout=0.05) if how == "timeout" else rt
        future = view.submit(evil.hang, str(tmp_path / f"started{i}"))
        if how == "cancel":
            read_pids(tmp_path / f"started{i}")
            assert rt.cancel(future, running=True)
        with pytest.raises((runtime.TaskTimeout, runtime.TaskCancelled)):
            future.result(30)
    assert rt.submit(evil.square, 3).result(30) == 9
