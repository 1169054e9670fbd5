"""`Runtime.scale`: up, down, to nothing and back, while tasks run, workers start, crash, or leave."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import evil
import pytest
from tasks import Gate, die_until, echo, own_pid, pass_through, pid_and
from watching import alive, all_ready, read_pids, ready, until

import runtime
from runtime import BrokenRuntime, Runtime, WorkerStatus, _core, lifecycle

Factory = Callable[..., Runtime]


def numbers(rt: Runtime) -> list[int]:
    return [info.number for info in rt.workers()]


def ready_numbers(rt: Runtime) -> list[int]:
    return [info.number for info in rt.workers() if info.status is WorkerStatus.READY]


def scaled(rt: Runtime, n: int) -> None:
    """Scale, and wait until it is so."""
    rt.scale(n)
    until(
        lambda: numbers(rt) == ready_numbers(rt) == list(range(n)),
        lambda: f"{n} workers are ready: {rt.workers()}",
    )


def test_up_and_down(factory: Factory) -> None:
    rt = factory(2)
    assert len(set(rt.map(own_pid, range(100), chunksize=1))) <= 2
    for n in (4, 1, 3, 2):
        scaled(rt, n)
        assert rt._max_workers == rt.options(priority=1)._max_workers == n
        assert list(rt.map(echo, range(500), chunksize=1)) == list(range(500))
        assert rt.stats().workers == n


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_starts_after_a_pause(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """At once, though the workers are still there: the supervisor has not looked yet."""
    rt = factory(2, threads=threads)
    all_ready(rt)
    with monkeypatch.context() as patch:
        patch.setattr(rt._core, "wake", lambda: None)
        rt.scale(0)
        futures = [rt.submit(echo, n) for n in range(3)]
        assert not wait(futures, 0.3, FIRST_COMPLETED).done
        rt.scale(2)
        assert [future.result(10) for future in futures] == [0, 1, 2]
        rt.scale(0)
        future = rt.submit(echo, 3)
    rt.scale(1)
    assert future.result(10) == 3


def test_scaled_by_many_threads(factory: Factory) -> None:
    """The last one decides, also whether it is paused."""
    rt = factory(1)

    def scale(n: int) -> None:
        for _ in range(50):
            rt.scale(0)
            rt.scale(n)

    threads = [threading.Thread(target=scale, args=(n,)) for n in (1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if rt._max_workers == 0:
        rt.scale(1)
    assert rt.submit(echo, 1).result(10) == 1


def test_many_more_than_at_the_start(factory: Factory) -> None:
    """The slots of the new ones had no memory before."""
    rt = factory(1)
    before = rt.stats().reserved
    scaled(rt, 12)
    grown = rt.stats().reserved - before
    assert grown == (lifecycle.slots_for(12) - lifecycle.slots_for(1)) * _core.Arena.footprint(
        *lifecycle.geometry(1)
    )
    assert len(set(rt.map(own_pid, [None] * 2000, chunksize=1))) > 1


def test_a_spare_slot_costs_no_memory() -> None:
    """What is laid out for scaling is a hole in the region's file."""
    slots, *sizes = lifecycle.geometry(2)
    plain = _core.Arena.create(1 << 20, slots, *sizes)
    roomy = _core.Arena.create(1 << 20, slots, *sizes, True, 0, lifecycle.slots_for(lifecycle.room_for(2)))
    assert os.fstat(roomy.fd).st_size > 10 * os.fstat(plain.fd).st_size
    assert os.fstat(roomy.fd).st_blocks == os.fstat(plain.fd).st_blocks
    for arena in (plain, roomy):
        arena.release()


def test_down_while_tasks_run(factory: Factory, gate: Gate) -> None:
    """The running ones end where they are, what was leased ahead goes to the others, none is lost."""
    rt = factory(3)
    all_ready(rt)
    held = [rt.submit(pass_through, gate.path, i) for i in range(3)]
    gate.arrived(3)
    rest = [rt.submit(echo, i) for i in range(1000)]
    rt.scale(1)
    until(
        lambda: [i.number for i in rt.workers() if i.status is WorkerStatus.STOPPING] == [1, 2],
        lambda: f"the highest leave: {rt.workers()}",
    )
    assert not any(f.done() for f in held)
    gate.open(3)
    assert [f.result() for f in held] == [0, 1, 2]
    assert [f.result() for f in rest] == list(range(1000))
    until(lambda: numbers(rt) == [0], lambda: f"they are gone: {rt.workers()}")
    stats = rt.stats()
    assert (stats.done, stats.failed, stats.rescued) == (1003, 0, 0)


def test_a_number_that_comes_back_while_its_last_task_still_runs(factory: Factory, gate: Gate) -> None:
    """The new process starts at once, and its number counts on."""
    rt = factory(2)
    old = all_ready(rt)
    held = [rt.submit(pass_through, gate.path, i) for i in range(2)]
    gate.arrived(2)
    rt.scale(1)
    until(lambda: rt.workers()[1].status is WorkerStatus.STOPPING, "it is to leave")
    rt.scale(2)
    until(lambda: ready_numbers(rt) == [0, 1], lambda: f"the next one is there: {rt.workers()}")
    assert rt.workers()[1].pid != old[1]
    assert rt.submit(own_pid).result() == rt.workers()[1].pid
    gate.open(2)
    assert [f.result() for f in held] == [0, 1]
    until(lambda: not alive(old[1]), "the old one is gone")
    until(lambda: sum(i.tasks_done for i in rt.workers()) == 3, lambda: f"counts go on: {rt.workers()}")


def test_counts_of_a_number_go_on(factory: Factory) -> None:
    rt = factory(2)
    all_ready(rt)
    wait([rt.submit(echo, i) for i in range(200)])
    before = [info.tasks_done for info in rt.workers()]
    scaled(rt, 1)
    scaled(rt, 2)
    assert [info.tasks_done for info in rt.workers()] == before


def test_zero_pauses(factory: Factory) -> None:
    rt = factory(2)
    all_ready(rt)
    scaled(rt, 0)
    futures = [rt.submit(pid_and, i) for i in range(50)]
    results = rt.map(echo, range(100))
    assert (rt.stats().queued, rt.stats().leased, rt.workers()) == (150, 0, ())
    assert rt.cancel(futures[0]) and futures[0].cancelled()
    rt.scale(2)
    assert [f.result()[1] for f in futures[1:]] == list(range(1, 50))
    assert list(results) == list(range(100))


def test_zero_at_once(factory: Factory) -> None:
    """Before any worker was there; none is left, and scaling up starts them."""
    rt = factory(2)
    rt.scale(0)
    future = rt.submit(own_pid)
    until(lambda: rt.workers() == (), lambda: f"{rt.workers()}")
    assert not future.done()
    rt.scale(1)
    assert future.result() == rt.workers()[0].pid


def test_endless_map_in_a_paused_runtime(factory: Factory) -> None:
    """Its window is that of one worker: it neither takes all nor waits for ever."""
    rt = factory(1)
    scaled(rt, 0)
    results = rt.map(echo, iter(range(100_000)))
    timer = threading.Timer(0.0, rt.scale, (1,))
    timer.start()
    assert next(results) == 0
    timer.join()
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("pause", ["at once", "later"])
def test_shutdown_of_a_paused_runtime_finishes_what_was_accepted(factory: Factory, pause: str) -> None:
    rt = factory(2)
    if pause == "later":
        all_ready(rt)
    rt.scale(0)
    futures = [rt.submit(echo, i) for i in range(10)]
    rt.shutdown()
    assert [f.result(0) for f in futures] == list(range(10))


def test_shutdown_of_a_paused_runtime_that_cancels(factory: Factory) -> None:
    rt = factory(2)
    scaled(rt, 0)
    futures = [rt.submit(echo, i) for i in range(10)]
    rt.shutdown(cancel_futures=True)
    assert all(f.cancelled() for f in futures)


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_a_paused_runtime_ends_by_force(factory: Factory, how: str) -> None:
    rt = factory(2)
    scaled(rt, 0)
    future = rt.submit(echo)
    getattr(rt, how)()
    with pytest.raises(BrokenRuntime, match=how):
        future.result(0)


def test_interpreter_exit_of_a_paused_runtime(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import runtime

            rt = runtime.Runtime(1)
            rt.scale(0)
            rt.submit(open, "ran", "w").add_done_callback(lambda f: print("done", f.exception() is None))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(runtime.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("n", [None, "2", 2.0, True, object()])
def test_wrong_types(factory: Factory, n: Any) -> None:
    rt = factory(1)
    with pytest.raises(TypeError, match="workers must be an int"):
        rt.scale(n)
    assert rt._max_workers == 1


@pytest.mark.parametrize("n", [-1, 2001, 10**30])
def test_wrong_values(factory: Factory, n: int) -> None:
    rt = factory(1)
    with pytest.raises(ValueError, match="workers must be"):
        rt.scale(n)
    assert rt._max_workers == 1


def test_beyond_the_room(factory: Factory) -> None:
    rt = factory(2)
    with pytest.raises(ValueError, match=r"max_workers=2 and has room for 64 workers, not 65: make one"):
        rt.scale(65)
    assert lifecycle.room_for(2) == 64 and lifecycle.room_for(100) == 400
    assert lifecycle.room_for(2000) == 2000
    assert rt.submit(echo).result() == ()


def test_descriptors_are_checked_again() -> None:
    """libzmq would abort the host."""
    code = """if True:
        import resource
        import runtime
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        with runtime.Runtime(1) as rt:
            rt.submit(abs, -1).result()
            try:
                rt.scale(20)
            except OSError as error:
                print("limit is 100" in str(error), rt._max_workers, rt.submit(abs, -2).result())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True 1 2\n", done.stderr


def test_a_replacement_does_not_wait_for_those_that_start_slowly() -> None:
    """They are connected by then, and have all the descriptors that they will have."""
    code = """if True:
        import os, resource, time
        import runtime
        def init():
            if runtime.current().number:
                time.sleep(60)
        resource.setrlimit(resource.RLIMIT_NOFILE, (250, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        rt = runtime.Runtime(20, initializer=init)
        rt.submit(abs, -1).result()
        time.sleep(0.5)
        print(type(rt.submit(os._exit, 1).exception()).__name__, rt.submit(abs, -2).result(20))
        rt.kill_workers()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("WorkerDied 2\n", "")


def test_after_shutdown_and_in_a_fork(factory: Factory) -> None:
    rt = factory(1)
    rt.submit(echo).result()
    pid = os.fork()
    if pid == 0:
        try:
            rt.scale(2)
        except RuntimeError as error:
            os._exit(0 if str(os.getppid()) in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    rt.shutdown()
    with pytest.raises(RuntimeError, match="cannot scale a runtime after shutdown"):
        rt.scale(2)


def test_of_a_broken_runtime(factory: Factory) -> None:
    rt = factory(1)
    rt.kill_workers()
    with pytest.raises(BrokenRuntime, match="kill_workers"):
        rt.scale(2)


def test_from_many_threads_under_load(factory: Factory) -> None:
    """Whatever order the threads take, the last word counts, and no task is lost."""
    rt = factory(2, retries=0)
    start = threading.Barrier(4)

    def scale(seed: int) -> None:
        start.wait()
        for i in range(40):
            rt.scale((seed * 7 + i * 5) % 6)

    threads = [threading.Thread(target=scale, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    start.wait()
    futures = [rt.submit(echo, i) for i in range(2000)]
    for thread in threads:
        thread.join()
    rt.scale(3)
    assert [f.result() for f in futures] == list(range(2000))
    until(lambda: ready_numbers(rt) == numbers(rt) == [0, 1, 2], lambda: f"{rt.workers()}")
    assert rt.stats().failed == 0


def test_while_workers_start_and_never_get_ready(factory: Factory, tmp_path: Path) -> None:
    """One that is wanted no more does not have to become ready before it is gone."""
    rt = factory(2, initializer=evil.wait_for, initargs=(str(tmp_path / "go"), str(tmp_path / "pid")))
    pids = read_pids(tmp_path / "pid", 1)
    rt.scale(0)
    until(lambda: rt.workers() == (), lambda: f"{rt.workers()}")
    assert not any(alive(pid) for pid in pids)
    (tmp_path / "go").touch()
    rt.scale(1)
    assert rt.submit(echo, 1).result() == 1


def crash_unless(path: str) -> None:
    if not os.path.exists(path):
        os._exit(3)


def test_in_a_crash_loop(factory: Factory, tmp_path: Path) -> None:
    """Scaling down ends the loop of the number that leaves; nothing is broken by that."""
    ok = tmp_path / "ok"
    ok.touch()
    rt = factory(1, initializer=crash_unless, initargs=(str(ok),))
    first = rt.submit(own_pid).result()
    ok.unlink()
    rt.scale(3)
    until(
        lambda: any(info.status is WorkerStatus.RESTING for info in rt.workers()),
        lambda: f"the new ones fail: {rt.workers()}",
    )
    rt.scale(1)
    until(lambda: numbers(rt) == [0], lambda: f"{rt.workers()}")
    assert rt.submit(own_pid).result() == first
    ok.touch()
    scaled(rt, 2)


def test_retries_of_a_task_that_dies_as_its_worker_leaves(factory: Factory) -> None:
    rt = factory(2, retries=3)
    ready(rt)
    futures = [rt.submit(die_until, 3) for _ in range(4)]
    rt.scale(1)
    assert [f.result() for f in futures] == [3] * 4


def test_a_map_goes_on_while_scaled(factory: Factory) -> None:
    rt = factory(2)
    results = rt.map(echo, range(20_000))
    for i, value in enumerate(results):
        assert value == i
        if i % 4000 == 0:
            rt.scale(1 + i // 4000 % 3)
    assert rt.stats().done == 20_000


def test_new_workers_take_part_in_what_waits(factory: Factory, gate: Gate) -> None:
    rt = factory(1)
    futures = [rt.submit(pass_through, gate.path, i) for i in range(3)]
    gate.arrived()
    rt.scale(3)
    gate.arrived(2)  # what was leased to the first is taken back from it
    gate.open(3)
    assert [f.result() for f in futures] == [0, 1, 2]
