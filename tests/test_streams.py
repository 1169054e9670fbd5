"""What workers print comes out in the host: of Python, C, children and the dead, whole and once."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time

import evil
import pytest
from watching import ROOT, alive, all_ready, environment, host, output, read_pids, run, send, until

import runtime
from runtime import channels, relay
from runtime.handle import Zygote

# ---- what tasks do -------------------------------------------------------------------------------


def say(text, stream="stdout"):
    print(text, file=getattr(sys, stream))


def say_without_end(text):
    sys.stdout.write(text)


def say_in_c(text):
    ctypes.CDLL(None).printf(text)


def say_in_child(text):
    return subprocess.run(["sh", "-c", f"echo {text}; echo {text} >&2"]).returncode


def say_raw(data, fd=1):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def say_and_die(text, how):
    print(text)
    sys.stderr.write(text + "\n")
    evil.misbehave(how)


def say_and_fork(text):
    """Half a line before a fork; the child ends as an interpreter does, with a flush."""
    sys.stdout.write(text)
    pid = os.fork()
    if pid == 0:
        print("child")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
    print("parent")


def say_until_killed(path, size):
    evil.note(path)
    while True:
        os.write(1, b"x" * size + b"\n")


def say_numbers(worker, count):
    for i in range(count):
        print(f"<{worker}:{i}>")


def leave_a_child(path):
    """A child in a session of its own that outlives its parent's task, and prints when the file appears."""
    code = f"import sys; sys.path[:] = {sys.path}; import evil; evil.wait_for({path!r}); print('later')"
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid


# ---- ordinary ------------------------------------------------------------------------------------


def printed(capsys, *calls, workers=2, **options):
    """(stdout, stderr) after these calls, each (fn, *args), in a Runtime that has ended."""
    with runtime.Runtime(workers, **options) as rt:
        for future in [rt.submit(*call) for call in calls]:
            future.exception(30)
    return capsys.readouterr()


def test_print_reaches_the_streams_of_the_host(capsys):
    out, err = printed(capsys, (say, "to out"), (say, "to err", "stderr"))
    assert (out, err) == ("to out\n", "to err\n")


def test_it_arrives_while_the_runtime_runs(rt, capsys):
    rt.submit(say, "now").result(30)
    found = []
    until(lambda: found.append(capsys.readouterr().out) or "now\n" in "".join(found), "the line is there")


@pytest.mark.parametrize("where", ["redirect", "replaced later"])
def test_whatever_the_stream_is_when_the_line_arrives(where):
    target = io.StringIO()
    with contextlib.ExitStack() as stack:
        if where == "redirect":
            stack.enter_context(contextlib.redirect_stdout(target))
        rt = stack.enter_context(runtime.Runtime(1))
        all_ready(rt)
        if where != "redirect":
            stack.enter_context(contextlib.redirect_stdout(target))
        rt.submit(say, "here").result(30)
        rt.shutdown()
    assert target.getvalue() == "here\n"


def test_c_code_and_children(capsys):
    out, err = printed(capsys, (say_in_c, b"from C\n"), (say_in_child, "from sh"))
    assert sorted(out.splitlines()) == ["from C", "from sh"]
    assert err == "from sh\n"


def test_the_streams_of_a_worker_are_line_buffered(rt):
    def state():
        return sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding, sys.stdout.isatty()

    assert rt.submit(state).result(30) == (True, True, "utf-8", False)


def test_an_initializer_prints(capsys):
    out, _ = printed(capsys, initializer=say, initargs=("hello",), workers=2)
    assert out == "" or set(out.splitlines()) == {"hello"}  # the end may come before a worker has begun
    with runtime.Runtime(2, initializer=say, initargs=("hello",)) as rt:
        all_ready(rt)
    assert capsys.readouterr().out == "hello\nhello\n"


def test_lines_of_several_workers_stay_whole(capsys):
    with runtime.Runtime(2) as rt:
        list(rt.map(say_numbers, range(4), [2000] * 4, chunksize=1))
    lines = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r"<\d:\d+>", line) for line in lines)
    for worker in range(4):
        mine = [line for line in lines if line.startswith(f"<{worker}:")]
        assert mine == [f"<{worker}:{i}>" for i in range(2000)], "complete, and in order"


# ---- edges ---------------------------------------------------------------------------------------


def test_a_line_without_an_end_comes_when_the_worker_ends(capsys):
    out, _ = printed(capsys, (say_without_end, "unfinished"), workers=1)
    assert out == "unfinished"


def test_a_line_over_64_kib_comes_in_pieces_and_is_whole(capsys):
    text = "".join(f"{i:07d} " for i in range(50_000))
    out, _ = printed(capsys, (say, text), workers=1)
    assert out == text + "\n"


def test_characters_that_a_read_cuts_in_two(capsys):
    text = "é" * 200_001
    out, _ = printed(capsys, (say, "x" + text), workers=1)
    assert out == "x" + text + "\n"


def test_bytes_that_are_no_text(capsys):
    out, _ = printed(capsys, (say_raw, b"a\xff\xfe\0b\n"), (say, "\udc80 lone"), workers=1)
    assert out == "a\\xff\\xfe\0b\n\\udc80 lone\n"


def test_ten_megabytes_at_once(capsys):
    line = b"y" * 99 + b"\n"
    with runtime.Runtime(2) as rt:
        for future in [rt.submit(say_raw, line * 50_000), rt.submit(say_raw, line * 50_000, 2)]:
            assert future.exception(50) is None
    out, err = capsys.readouterr()
    assert out == err == line.decode() * 50_000


def test_a_flood_does_not_grow_the_host(tmp_path):
    """The host takes nothing for a while: the worker waits, and the rest of the pool works on."""
    code = """if True:
        import io, sys, threading, runtime, evil, test_streams
        class Slow(io.StringIO):
            gate, entered = threading.Event(), threading.Event()
            size = 0
            def write(self, text):
                self.entered.set()
                self.gate.wait()
                self.size += len(text)
        slow, real = Slow(), sys.stdout
        sys.stdout = slow
        with runtime.Runtime(2) as rt:
            flood = rt.submit(test_streams.say_raw, b"z" * 999 + b"\\n", 1)
            flood = rt.submit(test_streams.say_raw, (b"z" * 999 + b"\\n") * 5000)
            assert slow.entered.wait(20)
            assert [f.result(20) for f in [rt.submit(evil.square, i) for i in range(50)]] == [
                i * i for i in range(50)]
            assert not flood.done(), "it waits for room"
            slow.gate.set()
            assert flood.exception(20) is None
        sys.stdout = real
        print(slow.size)
    """
    assert output(code) == [str(5001 * 1000)]


@pytest.mark.parametrize("what", ["None", "closed", "raises", "ascii"])
def test_a_stream_of_the_host_that_takes_nothing(what):
    code = """if True:
        import io, sys, runtime, test_streams
        class Raises:
            def write(self, text): raise SystemExit("no")
            def flush(self): raise KeyboardInterrupt
        real, raw = sys.stdout, io.BytesIO()
        closed = io.StringIO(); closed.close()
        ascii = io.TextIOWrapper(raw, "ascii")
        sys.stdout = {"None": None, "closed": closed, "raises": Raises(), "ascii": ascii}[sys.argv[1]]
        with runtime.Runtime(2) as rt:
            assert rt.submit(test_streams.say_raw, b"\\xc3\\xa9 line\\n" * 50_000).exception(30) is None
            assert rt.submit(test_streams.say, "also here").exception(30) is None
        if sys.argv[1] == "ascii":
            assert raw.getvalue().count(b"\\\\xe9 line\\n") == 50_000, raw.getvalue()[:100]
        sys.stdout = real
        print("works")
    """
    assert output(code, what) == ["works"]


def test_a_host_whose_stdout_is_a_closed_pipe():
    code = """if True:
        import os, sys, runtime, test_streams
        with runtime.Runtime(2) as rt:
            assert rt.submit(test_streams.say_raw, b"line\\n" * 100_000).exception(30) is None
        os.write(2, b"works\\n")
        os._exit(0)
    """
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=40,
        )
    finally:
        os.close(writing)
    assert done.stderr == b"works\n"


@pytest.mark.parametrize("closed", ["1", "2", "1 2", "0 1 2"])
def test_a_host_without_descriptors_1_and_2(closed, tmp_path):
    """As a daemon that has closed them: workers still print, into nothing, and nothing else is hit."""
    code = """if True:
        import os, sys
        for fd in sys.argv[2].split():
            os.close(int(fd))
        import traceback
        says = "works"
        try:
            import evil, runtime, test_streams
            with runtime.Runtime(2) as rt:
                say = test_streams.say
                futures = [rt.submit(say, "x", s) for s in ("stdout", "stderr") for _ in range(50)]
                assert [f.exception(20) for f in futures] == [None] * 100
                assert rt.submit(test_streams.say_in_child, "y").result(20) == 0
                assert list(rt.map(evil.square, range(100))) == [i * i for i in range(100)]
        except BaseException:
            says = traceback.format_exc()
        with open(sys.argv[1], "w") as file:
            file.write(says)
        os._exit(0)
    """
    path = tmp_path / "answer"
    run(["-c", code, str(path), closed])
    assert path.read_text() == "works"


def test_a_slow_reader_gets_all_of_it():
    """The pipe is full when the interpreter ends: it waits, as a print of its own would."""
    code = """if True:
        import sys, runtime, test_streams
        from runtime import relay
        relay._STUCK = 0.05
        with runtime.Runtime(1) as rt:
            rt.submit(test_streams.say_raw, (b"l" * 99 + b"\\n") * 1000).result(30)
        sys.stderr.write("ended\\n")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
        text=True,
    )  # fmt: skip
    with process:
        said = process.stderr.readline()
        assert said.startswith("the host takes none of its output: "), "100 kB do not fit the pipe"
        left = int(said.split(": ")[1].split()[0])
        assert process.stderr.readline() == "ended\n"
        out = process.stdout.read()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert out == ("l" * 99 + "\n") * 1000
    assert 0 < left <= len(out)


def test_the_end_waits_a_second_for_a_stream_that_takes_nothing(caplog):
    class Stuck:
        ident, waited = 1, 0.0

        def is_alive(self):
            return True

        def join(self, seconds):
            self.waited += seconds

    thread, one = Stuck(), relay.Relay()
    one.finish(thread)
    assert thread.waited == 1.0
    assert [record.args for record in caplog.records] == [(0,)]
    one._bell.close()


def test_a_stream_that_blocks_does_not_hold_the_end_for_ever(monkeypatch):
    """The thread that ends the runtime is the one that would read: it gets its turn."""
    monkeypatch.setattr(relay, "_STUCK", 0.1)
    gate, entered = threading.Event(), threading.Event()

    class Blocked(io.StringIO):
        def write(self, text):
            entered.set()
            gate.wait()
            return super().write(text)

    target = Blocked()
    rt = runtime.Runtime(1)
    try:
        with contextlib.redirect_stdout(target):
            rt.submit(say, "stuck").result(30)
            assert entered.wait(30)
            rt.shutdown()
    finally:
        gate.set()
    rt._core.relaying.join(30)
    assert target.getvalue() == "stuck\n"


# ---- deaths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "segfault", "os._exit"])
def test_what_was_printed_before_a_death(capsys, how):
    out, err = printed(capsys, (say_and_die, "last words", how), workers=1)
    assert out == err == "last words\n"


def test_a_worker_that_is_killed_while_it_prints(capsys, tmp_path):
    with runtime.Runtime(2) as rt:
        future = rt.submit(say_until_killed, str(tmp_path / "pid"), 1000)
        (pid,) = read_pids(tmp_path / "pid")
        seen = []
        until(lambda: seen.append(capsys.readouterr().out) or "x\n" in "".join(seen), "it prints")
        send(pid, signal.SIGKILL)
        assert type(future.exception(30)) is runtime.WorkerDied
        assert rt.submit(say, "next").exception(30) is None
    lines = "".join([*seen, capsys.readouterr().out]).split("\n")
    assert "".join(lines).count("next") == 1
    torn = [line for line in lines if line not in ("x" * 1000, "next", "")]
    assert len(torn) <= 1, "only the line that the kill cut may be short"


def test_a_worker_that_waits_for_room_is_killed(tmp_path):
    """Its pipe is full because the host takes nothing: it can be killed, and replaced, all the same."""
    gate, entered = threading.Event(), threading.Event()

    class Blocked(io.StringIO):
        def write(self, text):
            entered.set()
            gate.wait()
            return len(text)

    with contextlib.redirect_stdout(Blocked()), runtime.Runtime(1) as rt:
        future = rt.submit(say_until_killed, str(tmp_path / "pid"), 1000)
        assert entered.wait(30)
        assert rt.cancel(future, running=True)
        assert type(future.exception(30)) is runtime.TaskCancelled
        assert rt.submit(evil.square, 3).result(30) == 9
        gate.set()


def test_a_child_that_prints_after_its_task(rt, capsys, tmp_path):
    go = tmp_path / "go"
    rt.submit(leave_a_child, str(go)).result(30)
    go.touch()
    seen = []
    until(lambda: seen.append(capsys.readouterr().out) or "later\n" in "".join(seen), "it prints, too")


def test_a_write_end_that_nobody_closes(capsys):
    """A process that got away holds it for ever: what was written is taken, and the stream ends."""
    made = channels.Channels()
    held = [os.dup(fd) for fd in made._worker]
    ends = channels.HostEnds(0, [os.dup(fd) for fd in made.host])
    made.close()
    one = relay.Relay()
    thread = threading.Thread(target=one.run)
    thread.start()
    one.begin(ends)
    os.write(held[0], b"line\nhalf")
    one.end(ends)
    one.finish(thread)
    assert not thread.is_alive()
    with pytest.raises(OSError):
        os.fstat(ends.out)
    assert capsys.readouterr().out == "line\nhalf"
    for fd in (*held, ends.stack):
        os.close(fd)


def test_no_worker_holds_the_streams_of_another(rt):
    def pipes():
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.append((int(name), os.readlink(f"/proc/self/fd/{name}")))
        return os.getpid(), [target for fd, target in found if target.startswith("pipe:") and fd > 0]

    one, two = (rt.submit(pipes) for _ in range(2))
    all_ready(rt)
    both = dict([one.result(30), two.result(30)])
    for found in both.values():
        assert len(found) == len(set(found)) == 2, "its own two, once"
    if len(both) == 2:
        first, second = both.values()
        assert not set(first) & set(second)


def test_descriptors_of_the_host_are_back_after_deaths(rt):
    def count():
        return len(os.listdir("/proc/self/fd"))

    all_ready(rt)
    rt.submit(evil.square, 1).result(30)
    before = count()
    for _ in range(3):
        pids = set(all_ready(rt).values())
        for pid in pids:
            send(pid, signal.SIGKILL)
        until(lambda old=pids: not set(all_ready(rt).values()) & old, "they are replaced")
    until(lambda: count() <= before, lambda: f"{count()} descriptors, {before} before")


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_descriptors_that_do_not_arrive(runtime_factory, monkeypatch, kept, caplog):
    """The host had none left when its ends came: nobody could hear that worker, so another one is started."""
    plain, cut = Zygote.reports, []

    def reports(self):
        found = plain(self)
        for report in found:
            if report.what == "forked" and not cut:
                cut.append(report.fields["pid"])
                for fd in report.fds[kept:]:
                    os.close(fd)
                del report.fds[kept:]
        return found

    monkeypatch.setattr(Zygote, "reports", reports)
    rt = runtime_factory(1)
    assert rt.submit(say, "x" * 100_000).exception(30) is None
    assert not alive(cut[0])
    assert "no descriptors left" in caplog.text


# ---- forks ---------------------------------------------------------------------------------------


def test_a_fork_inside_a_task_doubles_nothing(capsys):
    out, _ = printed(capsys, (say_and_fork, "half "), workers=1)
    assert out == "half child\nparent\n"


def test_a_fork_of_the_host_can_print():
    """While the relay writes: the child finds no lock of sys.stdout held."""
    code = """if True:
        import os, sys, threading, runtime, test_streams
        with runtime.Runtime(1) as rt:
            flood = rt.submit(test_streams.say_raw, b"line\\n" * 2_000_000)
            for i in range(30):
                pid = os.fork()
                if pid == 0:
                    import faulthandler
                    faulthandler.dump_traceback_later(10, exit=True)
                    print("child", i, flush=True)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            flood.result(60)
    """
    lines = output(code)
    assert sorted(line for line in lines if line != "line") == sorted(f"child {i}" for i in range(30))
    assert lines.count("line") == 2_000_000


def test_the_zygotes_own_output_goes_where_it_did(tmp_path):
    (tmp_path / "talking_preload.py").write_text(
        "import ctypes\nprint('preloaded', flush=True)\nctypes.CDLL(None).printf(b'in C\\n')\n"
    )
    code = """if True:
        import runtime, evil
        with runtime.Runtime(2, preload="talking_preload") as rt:
            rt.submit(evil.square, 1).result()
    """
    path = os.pathsep.join([ROOT, f"{ROOT}/tests", str(tmp_path)])
    done = run(["-c", code], environ={"PYTHONPATH": path, "PYTHONUNBUFFERED": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "preloaded\nin C\n", "")


def test_the_end_of_an_interpreter_without_shutdown():
    code = """if True:
        import runtime, test_streams
        rt = runtime.Runtime(2)
        for i in range(20):
            rt.submit(test_streams.say, f"line {i}")
    """
    assert sorted(output(code)) == sorted(f"line {i}" for i in range(20))


def test_a_host_that_is_killed_leaves_nobody():
    code = """if True:
        import runtime, test_streams
        from watching import all_ready
        with runtime.Runtime(1) as rt:
            print(*all_ready(rt).values(), flush=True)
            rt.submit(test_streams.say_until_killed, "/dev/null", 10_000).result()
    """
    with host(code, stderr=subprocess.DEVNULL) as one:
        one.pids()
        one.line()
        send(one.pid, signal.SIGKILL)
        one.gone()


def test_idle_costs_nothing(rt):
    """The relay's thread sleeps: no wake-up while nobody prints."""
    all_ready(rt)
    rt.submit(say, "").result(30)
    thread = rt._core.relaying

    def switches():
        with open(f"/proc/self/task/{thread.native_id}/status") as file:
            return sum(int(line.split()[1]) for line in file if "voluntary_ctxt_switches" in line)

    def unchanged():
        before = switches()
        time.sleep(0.5)  # the time over which is counted, not a synchronisation
        return switches() == before

    until(unchanged, "it sleeps")
