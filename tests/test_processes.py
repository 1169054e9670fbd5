"""Processes: no orphans, the zygote, forks by the user, every kind of host, start and end of a runtime."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import evil
import hosts
import pytest
from watching import (
    alive,
    all_ready,
    family,
    fields,
    host,
    output,
    parent,
    read_pids,
    run,
    send,
    settled,
    stopped,
    until,
    zygote_of,
)

import runtime
from runtime import BrokenRuntime, WorkerDied, WorkerStatus

# ---- no orphans: the host is killed --------------------------------------------------------------

# Two workers: one sleeps in C and holds the GIL, one waits for a `sleep` of its own; on a line each the
# zygote, the workers, the grandchild.
HOST = """if True:
    import os, subprocess, sys, time
    import evil, runtime
    from watching import all_ready, parent, read_pids
    folder, extra = sys.argv[1:3]
    if extra == "children":
        if os.fork() == 0:                   # a daemon of the host's own, from before ...
            os.read(0, 1)                    # ... that ends when the test closes its standard input
            os._exit(0)
    rt = runtime.Runtime(2)
    workers = list(all_ready(rt).values())
    if extra == "children":
        daemons = [subprocess.Popen(["cat"], close_fds=False).pid]
        if (pid := os.fork()) == 0:          # ... and one that has inherited all descriptors
            os.read(0, 1)
            os._exit(0)
    rt.submit(evil.hang_with_gil, folder + "/gil")
    rt.submit(evil.hang_with_children, folder + "/grandchild", "session")
    for _ in range(100):
        rt.submit(time.sleep, 100)
    read_pids(folder + "/gil")
    grandchildren = read_pids(folder + "/grandchild", 2)[1:]
    print(parent(workers[0]), flush=True)
    print(*workers, flush=True)
    print(*grandchildren, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def sockets():
    """The folders of runtimes that were made since the test began."""
    folder = Path(os.environ["XDG_RUNTIME_DIR"])
    before = set(folder.iterdir())
    return lambda: set(folder.iterdir()) - before


def shm():
    """But for the semaphores of multiprocessing: tests that run beside this one have pools of their own."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else ()
    return {name for name in names if not name.startswith("sem.mp-")}


def kill_host(one, before, sockets, spare=frozenset()):
    """SIGKILL to the host: all that it started is gone, and so are its files."""
    assert sockets(), "a live host has a folder"
    one.process.kill()
    one.gone(spare)
    until(lambda: not sockets(), lambda: f"the folder is gone: {[list(p.iterdir()) for p in sockets()]}", 10)
    until(lambda: not shm() - before, lambda: f"no segment is left: {shm() - before}", 10)


def test_host_killed(tmp_path, sockets):
    before = shm()
    with host(HOST, str(tmp_path), "") as one:
        (_zygote,), workers, grandchildren = one.pids(), one.pids(), one.pids()
        assert len(workers) == 2 and len(grandchildren) == 1
        assert {_zygote, *workers, *grandchildren} < family(one.mark)
        kill_host(one, before, sockets)


def test_host_killed_while_other_children_hold_all_it_had_open(tmp_path, sockets):
    """Those are the host's own and live on, but they keep nothing of ours alive."""
    before = shm()
    with host(HOST, str(tmp_path), "children") as one:
        (zygote,), workers, grandchildren = one.pids(), one.pids(), one.pids()

        def others_now():
            return {pid for pid in family(one.mark) if parent(pid) == one.pid and pid != zygote}

        until(lambda: len(others_now()) == 3, "the host's own three children are there")
        others = others_now()
        kill_host(one, before, sockets, frozenset(others))
        assert all(alive(pid) for pid in others)
        ours = {"zygote": zygote, "workers": workers, "grandchildren": grandchildren}

        def left():  # a process that is ending has no environment any more a moment before it is a zombie
            return [(pid, fields(pid)[:2]) for pid in (zygote, *workers, *grandchildren) if alive(pid)]

        until(lambda: not left(), lambda: f"{left()} are gone; {ours}, the host's own {others}", 10)


def test_host_killed_after_its_zygote_was_replaced(tmp_path, sockets):
    before = shm()
    with host(HOST, str(tmp_path), "") as one:
        (zygote,) = one.pids()
        send(zygote, signal.SIGKILL)

        def another():
            return [p for p in family(one.mark) if parent(p) == one.pid and p != zygote]

        until(another, "another zygote takes over, though both workers are busy", 10)
        kill_host(one, before, sockets)


def test_host_killed_while_its_zygote_is_dead(tmp_path, sockets):
    """Nobody is left who could forward anything: each worker sees for itself that the host has gone."""
    before = shm()
    with host(HOST, str(tmp_path), "") as one:
        (zygote,) = one.pids()
        one.line()
        one.line()
        send(one.pid, signal.SIGSTOP)  # so that it cannot start another one
        until(lambda: stopped(one.pid), "the host has stopped")
        send(zygote, signal.SIGKILL)
        until(lambda: not alive(zygote), "the zygote is dead")
        kill_host(one, before, sockets)


def test_host_killed_while_its_zygote_is_stopped(tmp_path, sockets):
    before = shm()
    with host(HOST, str(tmp_path), "") as one:
        (zygote,) = one.pids()
        one.line()
        one.line()
        send(zygote, signal.SIGSTOP)
        until(lambda: stopped(zygote), "the zygote has stopped")
        kill_host(one, before, sockets)


def test_host_killed_while_it_starts(tmp_path, sockets):
    """The zygote is still importing what it was told to preload."""
    (tmp_path / "endless_preload.py").write_text(
        f"import evil, time\nevil.note({str(tmp_path / 'here')!r})\ntime.sleep(100)\n"
    )
    before = shm()
    code = """if True:
        import sys, time, runtime
        sys.path.insert(0, sys.argv[1])
        rt = runtime.Runtime(2, preload="endless_preload")
        time.sleep(100)
    """
    with host(code, str(tmp_path)) as one:
        read_pids(tmp_path / "here")
        kill_host(one, before, sockets)


# ---- the zygote ----------------------------------------------------------------------------------


def test_a_killed_zygote_is_replaced_and_nobody_notices(runtime_factory, tmp_path):
    rt = runtime_factory(2)
    before = all_ready(rt)
    zygote = zygote_of(before[0])
    go = tmp_path / "go"
    running = [rt.submit(evil.wait_for, str(go), str(tmp_path / f"s{i}")) for i in range(2)]
    for i in range(2):
        read_pids(tmp_path / f"s{i}")
    queued = [rt.submit(evil.square, i) for i in range(50)]
    send(zygote, signal.SIGKILL)
    until(lambda: not alive(zygote), "it is dead")
    later = [rt.submit(evil.square, i) for i in range(50)]
    assert {i.number: i.pid for i in rt.workers()} == before
    go.touch()
    assert {future.result(30) for future in running} == set(before.values())
    for futures in (queued, later):
        assert [f.result(30) for f in futures] == [i * i for i in range(50)]

    def replaced():
        infos = rt.workers()
        assert sum(info.status is not WorkerStatus.READY for info in infos) <= 1, "replaced one by one"
        return not {info.pid for info in infos} & set(before.values()) and all(
            info.status is WorkerStatus.READY and info.pid for info in infos
        )

    until(replaced, lambda: f"workers of the dead zygote are replaced: {rt.workers()}")
    after = all_ready(rt)
    assert zygote_of(after[0]) == zygote_of(after[1]) != zygote
    assert list(rt.map(evil.square, range(100))) == [i * i for i in range(100)]
    settled(rt)


def test_a_killed_zygote_whose_child_holds_its_connection(runtime_factory, tmp_path, monkeypatch):
    """Its end is known from its pidfd, not from the end of the connection."""
    path = tmp_path / "child"
    text = (
        "import os, signal\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    while True:\n"
        "        signal.pause()\n"
        f"open({str(path)!r}, 'w').write(str(pid))\n"
    )
    name = slow_module(tmp_path, monkeypatch, "forking_preload", text)
    rt = runtime_factory(1, preload=name)
    all_ready(rt)
    child = int(path.read_text())
    try:
        before = rt.workers()[0].pid
        send(rt._core._zygote.pid, signal.SIGKILL)
        until(lambda: all_ready(rt) and rt.workers()[0].pid != before, "the worker was replaced")
        assert rt.submit(abs, -1).result() == 1
        last = int(path.read_text())
    finally:
        for pid in {child, int(path.read_text())}:
            if alive(pid):
                send(pid, signal.SIGKILL)
    until(lambda: not alive(child), "the child is gone")
    rt.shutdown()
    until(lambda: not alive(last), "so is the other one")


def test_zygotes_killed_again_and_again_under_load(rt):
    all_ready(rt)
    futures = [rt.submit(time.sleep, 0.002) for _ in range(500)]
    for _ in range(4):
        zygote = until(lambda: zygote_of(all_ready(rt)[0]), "worker 0 has a parent")
        send(zygote, signal.SIGKILL)
        until(lambda z=zygote: not alive(z), "it is dead")
    assert [f.result(30) for f in futures] == [None] * 500
    settled(rt)


def test_zygote_and_worker_killed_at_once(rt, tmp_path):
    """Nobody can say how the worker ended; that it did, its pidfd says."""
    pids = all_ready(rt)
    future = rt.submit(evil.hang, str(tmp_path / "started"))
    (pid,) = read_pids(tmp_path / "started")
    zygote = zygote_of(pid)
    send(zygote, signal.SIGSTOP)
    until(lambda: stopped(zygote), "the zygote has stopped")
    send(pid, signal.SIGKILL)
    send(zygote, signal.SIGKILL)
    error = future.exception(30)
    assert type(error) is WorkerDied
    assert error.pid == pid
    assert error.signal in (None, signal.SIGKILL)
    until(lambda: not set(all_ready(rt).values()) & set(pids.values()), "both workers are replaced")
    assert rt.submit(evil.square, 7).result(30) == 49


def test_a_stopped_zygote_delays_nothing_but_replacements(rt, tmp_path):
    pids = all_ready(rt)
    zygote = zygote_of(pids[0])
    send(zygote, signal.SIGSTOP)
    until(lambda: stopped(zygote), "the zygote has stopped")
    assert [f.result(30) for f in [rt.submit(evil.square, i) for i in range(50)]] == [
        i * i for i in range(50)
    ]
    future = rt.submit(evil.hang, str(tmp_path / "started"))
    (pid,) = read_pids(tmp_path / "started")
    send(pid, signal.SIGKILL)
    error = future.exception(30)  # "no answer in 100 ms: exit code unknown"
    assert type(error) is WorkerDied
    assert (error.pid, error.exitcode) == (pid, None)
    assert [f.result(30) for f in [rt.submit(evil.square, i) for i in range(50)]] == [
        i * i for i in range(50)
    ]
    send(zygote, signal.SIGCONT)
    assert pid not in all_ready(rt).values()


# ---- grandchildren -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "session", "daemon"])
def test_grandchildren_die_with_their_worker(rt, tmp_path, how):
    started = tmp_path / "started"
    future = rt.submit(evil.hang_with_children, str(started), how)
    worker, child = read_pids(started, 2)
    assert alive(child)
    send(worker, signal.SIGKILL)
    assert future.exception(30).pid == worker
    until(lambda: not alive(child), "its child is gone", 5)
    all_ready(rt)


@pytest.mark.parametrize("how", ["plain", "daemon"])
def test_grandchildren_die_at_a_timeout(rt, tmp_path, how):
    started = tmp_path / "started"
    future = rt.options(timeout=0.5).submit(evil.hang_with_children, str(started), how)
    worker, child = read_pids(started, 2)
    assert isinstance(future.exception(30), runtime.TaskTimeout)
    until(lambda: not alive(worker) and not alive(child), "worker and child are gone", 5)


def test_grandchildren_die_at_shutdown_and_at_recycling(runtime_factory):
    rt = runtime_factory(2, max_tasks_per_child=2)
    first = [rt.submit(evil.leave_child).result(30) for _ in range(5)]
    until(lambda: sum(map(alive, first)) <= 2, "those of recycled workers are gone")
    rt.shutdown()
    until(lambda: not any(map(alive, first)), "those of the last workers are gone")


# ---- forks by the user ---------------------------------------------------------------------------


def in_child(work):
    """What `work` returns (a text) in a fork of this process, which ends at once."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: this process has threads
        child = os.fork()
    if child == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return text


def test_submit_in_a_forked_child_names_both_processes(rt):
    assert rt.submit(evil.square, 3).result(30) == 9
    for call in (lambda: rt.submit(evil.square, 3), lambda: list(rt.map(evil.square, [3]))):
        text = in_child(lambda c=call: f"{os.getpid()} {c()!r}")
        assert text.startswith("RuntimeError: ")
        assert str(os.getpid()) in text
    text = in_child(lambda: tell_own_pid(rt))
    child, _, message = text.partition(" ")
    assert child in message and str(os.getpid()) in message
    settled(rt)


def tell_own_pid(rt):
    try:
        rt.submit(evil.square, 3)
    except RuntimeError as error:
        return f"{os.getpid()} {error}"
    return f"{os.getpid()} nothing was raised"


def test_what_a_forked_child_does_to_a_runtime_stays_its_own(rt):
    pids = all_ready(rt)
    pending = [rt.submit(time.sleep, 0.01) for _ in range(50)]

    def child():
        rt.shutdown(cancel_futures=True)
        rt.terminate_workers()
        rt.kill_workers()
        with rt:
            pass
        return "done"

    assert in_child(child) == "done"
    assert [f.result(30) for f in pending] == [None] * 50
    assert all_ready(rt) == pids
    settled(rt)


def test_views_stay_readable_in_a_forked_child_and_writes_stay_its_own(rt):
    numpy = pytest.importorskip("numpy")
    array = rt.submit(numpy.full, 100_000, 7.0).result(30)

    def child():
        good = bool((array == 7.0).all())
        array[:] = 8.0
        return good and bool((array == 8.0).all())

    assert in_child(child) == "True"
    assert (array == 7.0).all()


def test_views_of_a_forked_child_outlive_the_parents(runtime_factory):
    """The parent keeps the blocks that are viewed at the fork until the child is gone."""
    numpy = pytest.importorskip("numpy")
    rt = runtime_factory(1, region_size="4MiB", region_max="4MiB")
    array = rt.submit(numpy.full, 100_000, 7.0).result(30)
    go_on, tell = os.pipe()
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.read(go_on, 1)
        os.write(writing, str(set(array.tolist())).encode())
        os._exit(0)
    try:
        del array
        for value in range(20):  # four times through the region
            assert rt.submit(numpy.full, 100_000, float(value)).result(30)[0] == value
    finally:
        os.write(tell, b"x")
        os.waitpid(child, 0)
        seen = os.read(reading, 100)
        for fd in (go_on, tell, reading, writing):
            os.close(fd)
    assert seen == b"{7.0}"


def test_the_exit_of_a_forked_child_does_not_disturb_its_parent(sockets):
    code = """if True:
        import gc, os, sys, time, evil, runtime
        rt = runtime.Runtime(2)
        first = [rt.submit(time.sleep, 0.01) for _ in range(40)]
        rt.submit(evil.square, 1).result()
        for how in ("exit", "del", "fall off the end"):
            child = os.fork()
            if child == 0:
                if how == "del":
                    del rt, first
                    gc.collect()
                sys.exit(5)            # with all that the interpreter does at its end
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5, how
        print([f.result() for f in first] == [None] * 40, list(rt.map(evil.square, range(5))))
        rt.shutdown()
    """
    assert output(code) == ["True [0, 1, 4, 9, 16]"]
    assert not sockets()


def test_a_runtime_made_in_a_forked_child_works(rt):
    """The child of a host with a Runtime makes one of its own."""
    code = """if True:
        import os, evil, runtime
        rt = runtime.Runtime(1)
        rt.submit(evil.square, 1).result()
        child = os.fork()
        if child == 0:
            with runtime.Runtime(1) as mine:
                print(mine.submit(evil.square, 6).result(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(rt.submit(evil.square, 7).result())
    """
    assert output(code) == ["36", "49"]


# ---- every kind of host --------------------------------------------------------------------------

KINDS = {
    **hosts.SETUPS,
    "zmq instance": """
        import zmq
        own = zmq.Context.instance().socket(zmq.PUB)
        own.bind_to_random_port("tcp://127.0.0.1")
        after.append(lambda: (own.close(0), zmq.Context.instance().term()))
    """,
    "handlers": """
        import faulthandler, signal
        faulthandler.enable()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)      # the kernel reaps its children
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    """,
    "few signals": """
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    """,
    "no stdin": """
        import os
        os.close(0)
    """,
    "limits": """
        import os, sys
        sys.setrecursionlimit(5000)
        os.umask(0o777)
        os.nice(1)
    """,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_start_from_every_kind_of_host(kind):
    hosts.result(run(["-c", hosts.text(KINDS[kind])]))


def test_a_program_that_the_host_starts_inherits_nothing_of_ours(runtime_factory):
    before = set(os.listdir("/proc/self/fd"))
    all_ready(runtime_factory(2))
    inherited = {}
    for fd in set(os.listdir("/proc/self/fd")) - before:
        with contextlib.suppress(OSError):  # it was closed meanwhile
            if os.get_inheritable(int(fd)):
                inherited[fd] = os.readlink(f"/proc/self/fd/{fd}")
    assert inherited == {}


@pytest.mark.parametrize("method", ["exec", "fork"])
def test_a_host_that_has_a_thousand_files_open(method):
    """The runtime's descriptors have higher numbers than select() knows."""
    code = """if True:
        import os, resource, sys
        import runtime
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        with runtime.Runtime(1, start_method=sys.argv[1]) as rt:
            print(rt.submit(abs, -1).result())
        print("end")
    """
    done = run(["-c", code, method])
    assert (done.stdout.split(), done.stderr) == (["1", "end"], "")


def test_start_within_an_asyncio_loop():
    code = """if True:
        import asyncio, evil, runtime
        async def main():
            ticks = 0
            async def tick():
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0.001)
            ticking = asyncio.create_task(tick())
            loop = asyncio.get_running_loop()
            with runtime.Runtime(2) as rt:
                many = [loop.run_in_executor(rt, evil.square, i) for i in range(50)]
                assert await asyncio.gather(*many) == [i * i for i in range(50)]
                assert await asyncio.wrap_future(rt.submit(evil.square, 9)) == 81
            ticking.cancel()
            print("end", ticks > 5)
        asyncio.run(main())
    """
    assert output(code) == ["end True"]


BY_VALUE = """
import runtime
x = 20
def f(y):
    return x + y
with runtime.Runtime(2) as rt:
    print(rt.submit(f, 2).result(20), list(rt.map(lambda y: f(y), range(3))))
"""
ANSWER = ["22 [20, 21, 22]"]


def test_python_c():
    assert output(BY_VALUE) == ANSWER


def test_python_from_stdin():
    done = run(["-"], BY_VALUE)
    assert (done.returncode, done.stdout.splitlines()) == (0, ANSWER), done.stderr


def test_python_m(tmp_path):
    package = tmp_path / "a_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(BY_VALUE)
    (package / "part.py").write_text(BY_VALUE)
    for name in ("a_package", "a_package.part"):
        done = run(["-m", name], cwd=tmp_path)
        assert (done.returncode, done.stdout.splitlines()) == (0, ANSWER), done.stderr


def test_python_script_without_a_main_guard(tmp_path):
    (tmp_path / "script.py").write_text(BY_VALUE)
    done = run([str(tmp_path / "script.py")])
    assert (done.returncode, done.stdout.splitlines()) == (0, ANSWER), done.stderr


# ---- the end of a host ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep", ["rt = runtime.Runtime(2)", "import builtins; builtins.rt = rt = runtime.Runtime(2)"]
)
def test_interpreter_exit_at_once_after_submit(tmp_path, keep):
    log = tmp_path / "log"
    code = f"""if True:
        import evil, runtime
        {keep}
        for i in range(60):
            rt.submit(evil.counted, {str(log)!r}, i)
    """
    assert output(code) == []
    ended = [line.split()[1] for line in log.read_text().splitlines() if line[0] == "E"]
    assert sorted(map(int, ended)) == list(range(60))


def test_a_dropped_runtime_finishes_its_tasks(tmp_path):
    log = tmp_path / "log"
    code = f"""if True:
        import evil, runtime
        def start():
            rt = runtime.Runtime(2)
            return [rt.submit(evil.counted, {str(log)!r}, i) for i in range(60)]
        print([f.result(20) for f in start()] == list(range(60)))
    """
    assert output(code) == ["True"]


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "1 / 0", "import sys; sys.exit('text')"])
def test_exit_codes_are_the_scripts_own(code):
    done = run(["-c", f"import runtime\nrt = runtime.Runtime(2)\nf = rt.submit(abs, -1)\n{code}"])
    assert done.returncode == (3 if "3" in code else 1)
    assert "runtime" not in done.stderr.replace("import runtime", "").lower() or "Error" in done.stderr


def test_runtimes_made_and_dropped(capfd):
    """Thirty times, at every stage of the start: descriptors, threads and children do not grow."""

    def counts():
        return (
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            evil.own_children(os.getpid()),
        )

    def once(i):
        rt = runtime.Runtime(1 + i % 2)
        if i % 3 == 1:
            rt.submit(abs, -1)
        if i % 3 == 2:
            assert rt.submit(abs, -1).result(30) == 1

    once(0)
    gc.collect()
    until(lambda: threading.active_count() == 1, "the first one has ended")
    before = counts()
    for i in range(30):
        once(i)
    gc.collect()

    def settled_down():
        gc.collect()
        now = counts()
        return now[0] <= before[0] and now[1] <= before[1] and not set(now[2]) - set(before[2])

    until(settled_down, lambda: f"as before: {before}, now: {counts()}")


# ---- shutdown at odd moments ---------------------------------------------------------------------


def slow_module(folder, monkeypatch, name, text):
    """A module that workers and zygote can import; it is not imported here."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return name


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("cancel", [True, False])
def test_shutdown_during_start(runtime_factory, wait, cancel):
    rt = runtime_factory(2)
    futures = [rt.submit(evil.square, i) for i in range(20)]
    rt.shutdown(wait, cancel_futures=cancel)
    with pytest.raises(RuntimeError, match="after shutdown"):
        rt.submit(evil.square, 1)
    if cancel:
        assert not concurrent.futures.wait(futures, 30).not_done
        assert all(f.cancelled() or f.result() == i * i for i, f in enumerate(futures))
    else:
        assert [f.result(30) for f in futures] == [i * i for i in range(20)]
    rt.shutdown()


def test_shutdown_of_an_unused_runtime(runtime_factory):
    for _ in range(3):
        runtime_factory(2).shutdown()
    runtime_factory(2).shutdown(cancel_futures=True)
    runtime_factory(1).kill_workers()
    runtime_factory(1).terminate_workers()


@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_forced_end(runtime_factory, tmp_path, how):
    rt = runtime_factory(2)
    pids = all_ready(rt)
    done = rt.submit(evil.square, 5)
    assert done.result(30) == 25
    running = [
        rt.submit(evil.hang_with_gil, str(tmp_path / "a")),
        rt.submit(evil.hang_with_children, str(tmp_path / "b"), "daemon"),
    ]
    read_pids(tmp_path / "a")
    child = read_pids(tmp_path / "b", 2)[1]
    waiting = [rt.submit(evil.square, i) for i in range(100)]
    results = rt.map(evil.square, range(1000))
    getattr(rt, how)()
    for future in running + waiting:
        assert type(future.exception(0)) is BrokenRuntime
        assert how in str(future.exception(0))
    with pytest.raises(BrokenRuntime):
        list(results)
    with pytest.raises(RuntimeError):
        rt.submit(evil.square, 5)
    assert done.result() == 25
    assert not any(alive(pid) for pid in (*pids.values(), child))
    rt.shutdown()
    getattr(rt, how)()


# ---- initializers --------------------------------------------------------------------------------


def initializer(action, path):
    evil.note(path)
    if action == "hang":
        time.sleep(100)
    if action == "gil":
        evil.hang_with_gil(path)
    if action == "second worker" and runtime.current().number == 1:
        os._exit(3)
    if action in evil.RAISING or action in evil.DEADLY:
        evil.misbehave(action)


@pytest.mark.parametrize("action", list(evil.RAISING))
def test_initializer_raises(runtime_factory, tmp_path, action, caplog):
    rt = runtime_factory(2, initializer=initializer, initargs=(action, str(tmp_path / "note")))
    future = rt.submit(evil.square, 3)
    error = future.exception(30)
    assert type(error) is BrokenRuntime
    kind = evil.RAISING[action]
    assert isinstance(error.__cause__, kind)
    assert kind.__name__ in str(error)
    assert "in initializer" in str(error.__cause__.__cause__), "with its traceback"
    with pytest.raises(BrokenRuntime) as caught:
        rt.submit(evil.square, 3)
    assert isinstance(caught.value.__cause__, kind)
    with pytest.raises(BrokenRuntime):
        list(rt.map(evil.square, range(3)))
    assert isinstance(error, concurrent.futures.BrokenExecutor)


@pytest.mark.parametrize("action", ["os._exit", "kill"])
def test_initializer_ends_its_worker(runtime_factory, tmp_path, action):
    rt = runtime_factory(1, initializer=initializer, initargs=(action, str(tmp_path / "note")))
    error = rt.submit(evil.square, 3).exception(40)
    assert type(error) is BrokenRuntime
    pids = read_pids(tmp_path / "note")
    assert len(set(pids)) == len(pids) == 5, "five deaths before ready in 30 s"
    assert str(pids[-1]) in str(error)
    assert ("37" if action == "os._exit" else "SIGKILL") in str(error)


HANGS = [("hang", "shutdown"), ("gil", "shutdown"), ("gil", "terminate_workers"), ("hang", "kill_workers")]


@pytest.mark.parametrize(("action", "how"), HANGS)
def test_initializer_hangs(runtime_factory, tmp_path, action, how):
    rt = runtime_factory(2, initializer=initializer, initargs=(action, str(tmp_path / "note")))
    pids = read_pids(tmp_path / "note", 2)
    future = rt.submit(evil.square, 3)
    assert all(info.status is WorkerStatus.STARTING for info in rt.workers())
    if how == "shutdown":
        rt.shutdown(cancel_futures=True)
        assert future.cancelled()
    else:
        getattr(rt, how)()
        assert type(future.exception(0)) is BrokenRuntime
    assert not any(alive(pid) for pid in pids)


def crashing_initializer(path):
    evil.append(path, f"{time.monotonic()}\n")
    os._exit(3)


def test_a_crash_loop_before_ready_backs_off(runtime_factory, tmp_path):
    path = tmp_path / "times"
    rt = runtime_factory(1, initializer=crashing_initializer, initargs=(str(path),))
    assert isinstance(rt.submit(evil.square, 3).exception(40), BrokenRuntime)
    times = [float(line) for line in path.read_text().split()]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert len(pauses) == 4
    for n, pause in enumerate(pauses):
        assert pause >= 0.8 * 0.05 * 2**n, f"exponential, with jitter: {pauses}"


def test_a_crash_loop_of_one_worker_leaves_the_others_alone(runtime_factory, tmp_path):
    rt = runtime_factory(2, initializer=initializer, initargs=("second worker", str(tmp_path / "note")))
    pids = {rt.submit(os.getpid).result(30) for _ in range(50)}
    assert pids == {rt.workers()[0].pid}
    until(lambda: len((tmp_path / "note").read_text().split()) >= 4, "worker 1 is tried again")
    resting = until(lambda: rt.workers()[1].status is WorkerStatus.RESTING, "it waits out a back-off")
    assert resting
    assert list(rt.map(evil.square, range(100))) == [i * i for i in range(100)]
    assert rt.workers()[0].pid in pids


def test_an_idle_worker_that_dies_is_replaced(rt):
    pids = all_ready(rt)
    send(pids[0], signal.SIGKILL)
    until(lambda: pids[0] != all_ready(rt)[0], "it is replaced")
    assert all_ready(rt)[1] == pids[1]
    assert rt.submit(evil.square, 3).result(30) == 9


# ---- preload -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise KeyError('evil preload')", "evil preload"),
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("import sys; sys.exit(4)", "SystemExit"),
        ("def f(:", "SyntaxError"),
        ("import os; os._exit(4)", "exit code 4"),
        ("import ctypes; ctypes.string_at(0)", "exit code -11"),
    ],
)
def test_preload_fails(runtime_factory, tmp_path, monkeypatch, text, words):
    name = slow_module(tmp_path, monkeypatch, "bad_preload", text + "\n")
    rt = runtime_factory(2, preload=name)
    error = rt.submit(evil.square, 3).exception(30)
    assert type(error) is BrokenRuntime
    assert words in str(error)
    assert name in str(error)
    if "_exit" not in text and "ctypes" not in text:
        assert "bad_preload.py" in str(error.__cause__) or "SyntaxError" in str(error.__cause__)
    with pytest.raises(BrokenRuntime):
        rt.submit(evil.square, 3)


@pytest.mark.parametrize(("action", "how"), HANGS)
def test_preload_hangs(runtime_factory, tmp_path, monkeypatch, action, how):
    path = str(tmp_path / "note")
    text = "time.sleep(100)" if action == "hang" else "evil.hang_with_gil({path!r})"
    text = f"import evil, time\nevil.note({path!r})\n" + text.format(path=path) + "\n"
    rt = runtime_factory(2, preload=slow_module(tmp_path, monkeypatch, "slow_preload", text))
    (zygote, *_) = read_pids(path)
    future = rt.submit(evil.square, 3)
    if how == "shutdown":
        rt.shutdown(cancel_futures=True)
        assert future.cancelled()
    else:
        getattr(rt, how)()
        assert type(future.exception(0)) is BrokenRuntime
    assert not alive(zygote)


def test_preload_that_leaves_a_thread(runtime_factory, tmp_path, monkeypatch):
    """A fork would lose the thread: the module is named in a warning, and imported in each worker."""
    text = f"""if True:
        import evil, threading, time
        evil.note({str(tmp_path / "note")!r})
        thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
        thread.start()
    """
    name = slow_module(tmp_path, monkeypatch, "threaded_preload", text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rt = runtime_factory(2, preload=(name, "colorsys"))
        pids = all_ready(rt)
        assert rt.submit(thread_lives, name).result(30)
    assert [w for w in caught if name in str(w.message) and "thread" in str(w.message)]
    assert len(read_pids(tmp_path / "note", 3)) == 3, "once in the zygote, once in each worker"
    assert set(pids.values()) < set(read_pids(tmp_path / "note", 3))
    assert rt.submit(loaded, "colorsys").result(30)


def thread_lives(name):
    return sys.modules[name].thread.is_alive()


def loaded(name):
    return name in sys.modules


def test_preload_is_imported_once_for_all(runtime_factory, tmp_path, monkeypatch):
    text = f"import evil\nevil.note({str(tmp_path / 'note')!r})\n"
    name = slow_module(tmp_path, monkeypatch, "good_preload", text)
    rt = runtime_factory(2, preload=name)
    workers = all_ready(rt)
    assert read_pids(tmp_path / "note") == [zygote_of(workers[0])]
    assert rt.submit(loaded, name).result(30)
    assert name not in sys.modules
