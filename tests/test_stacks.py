"""Python stacks of workers: of those that crash, that hang, that start, that are stopped."""

from __future__ import annotations

import concurrent.futures
import ctypes
import logging
import os
import pickle
import signal
import threading
import time
import types

import evil
import pytest
from watching import all_ready, fields, read_pids, send, stopped, until

import runtime
from runtime import channels, stacks, zygotes

# ---- what tasks do -------------------------------------------------------------------------------


def deepest_of_all(action, path):
    evil.note(path)
    if action == "sleep":
        time.sleep(evil.PATIENCE)
    elif action == "spin":
        while not os.path.exists(path + ".stop"):
            pass
    elif action == "gil":
        ctypes.PyDLL(None).sleep(int(evil.PATIENCE))
    elif action == "thread":
        thread = threading.Thread(target=deepest_of_all, args=("spin", path + "2"), name="a busy one")
        thread.start()
        thread.join()


def crash(number):
    if number == signal.SIGSEGV:
        ctypes.string_at(0)
    os.kill(os.getpid(), number)
    time.sleep(evil.PATIENCE)


def measured_sleep(path, seconds):
    evil.note(path)
    start = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - start


def sleep_in_c(path, seconds):
    evil.note(path)
    start = time.monotonic()
    return ctypes.PyDLL(None).sleep(seconds), time.monotonic() - start


def read_pipe_raw(path):
    """A read in C that would be lost if it were interrupted and not begun again."""
    reading, writing = os.pipe()
    threading.Timer(1.5, os.write, (writing, b"data")).start()
    evil.note(path)
    buffer = ctypes.create_string_buffer(10)
    # PyDLL: with the GIL held, the timer cannot write. CDLL lets it go.
    return ctypes.CDLL(None).read(reading, buffer, 10), buffer.value


# ---- crashes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL]
)
def test_the_stack_of_a_crash(rt, number):
    error = rt.submit(crash, number).exception(30)
    assert type(error) is runtime.WorkerDied
    assert error.signal == number
    assert error.stack.startswith("Fatal Python error: ")
    assert "test_stacks.py" in error.stack and "in crash\n" in error.stack
    assert error.stack in str(error)
    assert pickle.loads(pickle.dumps(error)).stack == error.stack


@pytest.mark.parametrize("how", ["kill", "os._exit"])
def test_other_deaths_have_none(rt, how):
    assert rt.submit(evil.misbehave, how).exception(30).stack == ""


def test_the_crash_of_a_forked_child_is_not_the_workers(rt):
    def fork_and_crash():
        pid = os.fork()
        if pid == 0:
            crash(signal.SIGABRT)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGABRT
        os._exit(3)

    error = rt.submit(fork_and_crash).exception(30)
    assert (error.exitcode, error.stack) == (3, "")


def test_all_threads_are_in_it(rt, tmp_path):
    def busy():
        threading.Thread(target=evil.wait_for, args=(path, path + ".note"), daemon=True).start()
        read_pids(path + ".note")
        crash(signal.SIGABRT)

    path = str(tmp_path / "never")
    stack = rt.submit(busy).exception(30).stack
    assert "in wait_for" in stack and "in busy" in stack


def test_a_deep_stack_is_bounded(rt):
    def deep(n):
        return deep(n - 1) if n else crash(signal.SIGABRT)

    stack = rt.submit(deep, 900).exception(30).stack
    assert "in deep" in stack and len(stack) <= stacks.LIMIT


def test_a_crash_after_dumps_has_its_own_stack(rt):
    all_ready(rt)
    for _ in range(3):
        rt.dump_stacks()
    stack = rt.submit(crash, signal.SIGSEGV).exception(30).stack
    assert stack.startswith("Fatal Python error: ") and "in crash\n" in stack


def test_the_file_does_not_grow_for_ever(runtime_factory, monkeypatch):
    monkeypatch.setattr(stacks, "_FULL", 20_000)
    rt = runtime_factory(1)
    all_ready(rt)
    ends = rt._core._numbers[0].worker.ends
    for _ in range(100):
        assert "in " in rt.dump_stacks()[0]
    assert os.fstat(ends.stack).st_size < 40_000
    assert "in crash\n" in rt.submit(crash, signal.SIGABRT).exception(30).stack


def test_a_crash_before_ready_shows_its_stack(runtime_factory):
    rt = runtime_factory(1, initializer=crash, initargs=(signal.SIGSEGV,))
    error = rt.submit(evil.square, 3).exception(40)
    assert type(error) is runtime.BrokenRuntime
    assert "SIGSEGV" in str(error) and "in crash\n" in str(error)


# ---- on demand -----------------------------------------------------------------------------------


def test_idle_workers(rt):
    all_ready(rt)
    found = rt.dump_stacks()
    assert found.keys() == {0, 1}
    for text in found.values():
        assert "(most recent call first):\n  File " in text and "worker.py" in text
    assert rt.dump_stacks(1).keys() == {1}


@pytest.mark.parametrize("action", ["sleep", "spin", "gil", "thread"])
def test_a_busy_or_stuck_worker(rt, tmp_path, action):
    path = str(tmp_path / "pid")
    future = rt.submit(deepest_of_all, action, path)
    (pid,) = read_pids(path)
    if action == "thread":
        read_pids(path + "2")
    (number,) = [info.number for info in rt.workers() if info.pid == pid]
    for _ in range(3):
        start = time.monotonic()
        text = rt.dump_stacks(number)[number]
        assert time.monotonic() - start < 10, "about a second is promised"
        assert "in deepest_of_all" in text and text.endswith("\n")
        assert ("holds the GIL" in text) == (action == "gil")
        assert (text.count("in deepest_of_all") == 2) == (action == "thread")
    assert rt.cancel(future, running=True)


def test_it_does_not_disturb_a_task(runtime_factory, tmp_path):
    rt = runtime_factory(2)
    sleep = rt.submit(measured_sleep, str(tmp_path / "one"), 1.0)
    read = rt.submit(read_pipe_raw, str(tmp_path / "two"))
    read_pids(tmp_path / "one")
    read_pids(tmp_path / "two")
    while not read.done():
        texts = rt.dump_stacks().values()
        assert all("test_stacks.py" in text for text in texts) or sleep.done() or read.done()
    assert sleep.result(30) >= 1.0
    assert read.result(30) == (4, b"data")


def test_a_system_call_goes_on_after_the_signal(rt, tmp_path):
    """SA_RESTART: a read that the signal interrupts is begun again by the kernel."""
    future = rt.submit(read_pipe_raw, str(tmp_path / "pid"))
    (pid,) = read_pids(tmp_path / "pid")
    for _ in range(20):
        send(pid, stacks.SIGNAL)
    assert future.result(30) == (4, b"data")


def test_a_sleep_in_c_is_not_cut_short(rt, tmp_path):
    """The signal goes to the answering thread, so a call that EINTR would end goes on."""
    future = rt.submit(sleep_in_c, str(tmp_path / "pid"), 3)
    (pid,) = read_pids(tmp_path / "pid")
    (number,) = [info.number for info in rt.workers() if info.pid == pid]
    while not future.done():
        text = rt.dump_stacks(number)[number]
        assert "in sleep_in_c" in text or future.done() or "worker.py" in text
    remaining, seconds = future.result(30)
    assert remaining == 0 and seconds >= 3


def test_several_callers_at_once(rt, tmp_path):
    path = str(tmp_path / "pid")
    future = rt.submit(deepest_of_all, "gil", path)
    (pid,) = read_pids(path)
    (number,) = [info.number for info in rt.workers() if info.pid == pid]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        texts = [found[number] for found in threads.map(lambda _: rt.dump_stacks(), range(4))]
    for text in texts:
        assert text.count("in deepest_of_all") == 1, text
    assert rt.cancel(future, running=True)


def test_while_a_crowd_asks_workers_come_and_go(rt):
    """Dumps race with deaths: no wrong descriptor, no exception, nobody is hurt."""
    over = threading.Event()
    errors = []

    def ask():
        try:
            while not over.is_set():
                assert rt.dump_stacks().keys() <= {0, 1}
        except BaseException as error:
            errors.append(error)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for thread in askers:
        thread.start()
    try:
        for _ in range(8):
            assert type(rt.submit(evil.misbehave, "kill").exception(30)) is runtime.WorkerDied
            assert rt.submit(evil.square, 3).result(30) == 9
    finally:
        over.set()
        for thread in askers:
            thread.join()
    assert errors == []
    all_ready(rt)


def test_a_stopped_worker(rt):
    pid = all_ready(rt)[0]
    send(pid, signal.SIGSTOP)
    until(lambda: stopped(pid), "it is stopped")
    try:
        start = time.monotonic()
        found = rt.dump_stacks()
        assert time.monotonic() - start < 5
        assert "stopped" in found[0] and str(pid) in found[0] and "SIGCONT" in found[0]
        assert "worker.py" in found[1]
    finally:
        send(pid, signal.SIGCONT)
    until(lambda: not stopped(pid), "it goes on")
    assert "worker.py" in rt.dump_stacks(0)[0]


def hang_at_start(path, how):
    deepest_of_all(how, path)


@pytest.mark.parametrize("how", ["sleep", "gil"])
def test_an_initializer_that_hangs(runtime_factory, tmp_path, how, monkeypatch, caplog):
    monkeypatch.setattr(zygotes, "_SLOW_START", 0.2)
    monkeypatch.setattr(zygotes, "_SLOW_AGAIN", 0.2)  # the first may come while it is still importing
    rt = runtime_factory(1, initializer=hang_at_start, initargs=(str(tmp_path / "pid"), how))
    read_pids(tmp_path / "pid")
    assert "in hang_at_start" in rt.dump_stacks()[0]

    def warned():
        texts = [r.getMessage() for r in caplog.records if "no worker is ready" in r.getMessage()]
        return [text for text in texts if "in deepest_of_all" in text]

    text, *_ = until(warned, "it is said what hangs")
    assert "hang_at_start" in text.partition("\n")[0], "names the initializer"
    assert "in hang_at_start" in text.partition("\n")[2], "with its stack"
    rt.kill_workers()


@pytest.mark.parametrize("kind", ["of something else", "of nothing"])
def test_a_socket_that_is_closed_as_it_is_duplicated(kind: str) -> None:
    """Its number may be anybody's by then. Nothing is raised, and nothing is left open."""
    reading, writing = os.pipe()
    number = reading if kind == "of something else" else 1 << 20

    class Closing:
        def __init__(self) -> None:
            self.known = [-1, number]

        def fileno(self) -> int:
            return self.known.pop() if len(self.known) > 1 else -1

    ends = types.SimpleNamespace(stack=writing, records=Closing())
    before = set(os.listdir("/proc/self/fd"))
    one = stacks.Asked(7, os.getpid(), reading, ends)  # type: ignore[arg-type]
    assert one.records is None
    one.ask(b"1")
    one.close()
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(reading)
    os.close(writing)


def test_a_worker_that_does_not_catch_the_signal_yet_gets_none():
    """At its very start the signal would end it. Here: a process that says it has heard, and catches none."""
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    made = channels.Channels()
    ends = channels.HostEnds(7, [os.dup(fd) for fd in made.host])
    pidfd = os.pidfd_open(pid)
    one = stacks.Asked(7, pid, pidfd, ends)
    try:
        assert "has not heard" in stacks.take([one])[7]
        ends.heard = 1 << 40, time.monotonic() - 60, 0
        assert "did not answer" in stacks.take([one])[7]
        assert fields(pid)[0] in "SR", "it lives"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        one.close()
        made.close()
        for fd in (ends.out, ends.err, ends.stack, pidfd):
            os.close(fd)
        ends.records.close()


# ---- bad input, and the end ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, -1, 10**20, "0", True, 0.5, [0]])
def test_an_unknown_number(rt, number):
    with pytest.raises(ValueError, match="no worker"):
        rt.dump_stacks(number)


def test_a_paused_runtime_has_no_worker(rt):
    rt.scale(0)
    until(lambda: not rt.workers())
    assert rt.dump_stacks() == {}
    with pytest.raises(ValueError, match="no worker 0; there is none now"):
        rt.dump_stacks(0)


def test_after_the_end(rt):
    rt.shutdown()
    assert rt.dump_stacks() == {}
    assert rt.dump_stacks(1) == {}


def test_in_a_forked_child(rt):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            rt.dump_stacks()
        except RuntimeError as error:
            code = 0 if str(os.getppid()) in str(error) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# ---- the file ------------------------------------------------------------------------------------


@pytest.fixture
def file():
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\x1d1 5\nabcde", b"Fatal Pyth", os.urandom(300_000)])
def test_a_file_without_a_crash(file, data):
    os.write(file, data)
    assert stacks.crash_stack(file) == ""


def test_a_crash_in_a_large_file(file):
    os.write(file, b"x" * 1_000_000 + b"Fatal Python error: one\n" + b"y" * 200_000)
    assert stacks.crash_stack(file) == ""
    os.write(file, b"Fatal Python error: two\n\nStack\n" + b"z" * 80_000)
    text = stacks.crash_stack(file)
    assert text.startswith("Fatal Python error: two\n\nStack\n") and len(text) == stacks.LIMIT


def test_no_file_any_more():
    assert stacks.crash_stack(-1) == ""


def test_an_answer_counts_when_it_is_complete(file):
    one = types.SimpleNamespace(stack=file)
    for data in (b"noise\n\x1d6 3\nold", b"\x1d7 5\nab", b"cd"):
        os.write(file, data)
        assert stacks._answered(one, 7, 0) is None
    os.write(file, b"e")
    assert stacks._answered(one, 7, 0) == "abcde"
    assert stacks._answered(one, 6, 0) == "old"
    assert stacks._answered(one, 6, 10) is None


def test_no_logging_is_needed_for_it(runtime_factory):
    rt = runtime_factory(1, forward_logs=False)
    all_ready(rt)
    logging.getLogger("runtime")
    assert "worker.py" in rt.dump_stacks()[0]
