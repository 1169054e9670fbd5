"""The end of the interpreter at any moment, and Ctrl-C: nothing hangs, nothing is left, stderr is quiet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from watching import environment, host, run

METHODS = ["exec", "fork"]

ENDS = {
    "in the middle of the start": (
        """
        rt = runtime.Runtime(2, start_method=method)
        """,
        [],
    ),
    "in the middle of the start, with tasks": (
        """
        rt = runtime.Runtime(2, start_method=method)
        for i in range(5):
            rt.submit(say, i)
        """,
        ["0", "1", "2", "3", "4"],
    ),
    "with tasks running and waiting": (
        """
        rt = runtime.Runtime(2, start_method=method)
        rt.submit(abs, -1).result()
        for i in range(6):
            rt.submit(say, i, 0.1)
        """,
        ["0", "1", "2", "3", "4", "5"],
    ),
    "with a map half iterated": (
        """
        rt = runtime.Runtime(2, start_method=method)
        results = rt.map(say, range(6), chunksize=1)
        next(results)
        """,
        ["0", "1", "2", "3", "4", "5"],
    ),
    "with an endless map half iterated": (
        """
        import itertools
        rt = runtime.Runtime(2, start_method=method)
        results = rt.map(abs, itertools.count())
        next(results)
        """,
        [],
    ),
    "with a submit in an atexit callback": (
        """
        import atexit
        rt = runtime.Runtime(2, start_method=method)

        @atexit.register
        def late():
            try:
                rt.submit(say, 1)
            except RuntimeError as error:
                print("refused" if "cannot schedule new futures after" in str(error) else error)
            rt.shutdown()
        """,
        ["refused"],
    ),
    "with a Runtime made in an atexit callback": (
        """
        import atexit
        runtime.Runtime(1).shutdown()

        @atexit.register
        def late():
            try:
                runtime.Runtime(1, start_method=method)
            except RuntimeError as error:
                print(error)
        """,
        sorted(["cannot", "make", "a", "Runtime", "after", "interpreter", "shutdown"]),
    ),
    "with a daemon thread that submits": (
        """
        rt = runtime.Runtime(2, start_method=method)
        begun = threading.Event()

        def feed():
            try:
                while True:
                    rt.submit(abs, -1).result()
                    begun.set()
            except RuntimeError:
                pass

        threading.Thread(target=feed, daemon=True).start()
        begun.wait()
        """,
        [],
    ),
    "with a thread that still submits": (
        """
        rt = runtime.Runtime(2, start_method=method)

        def feed():
            for i in range(3):
                try:
                    rt.submit(say, "x").result()
                except RuntimeError as error:
                    print("x")

        threading.Thread(target=feed).start()
        """,
        ["x", "x", "x"],
    ),
    "by an exception": (
        """
        rt = runtime.Runtime(2, start_method=method)
        rt.submit(say, 1, 0.1)
        sys.exit(0)
        """,
        ["1"],
    ),
    "within a callback of a future": (
        """
        rt = runtime.Runtime(2, start_method=method)
        rt.submit(say, 1, 0.1).add_done_callback(lambda future: rt.shutdown(wait=False))
        """,
        ["1"],
    ),
}

SCRIPT = """
import sys, threading, time
import runtime

def say(text, seconds=0):
    time.sleep(seconds)
    print(text, flush=True)

method = sys.argv[1]
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", list(ENDS))
def test_the_end_of_the_interpreter(tmp_path: Path, when: str, method: str) -> None:
    text, lines = ENDS[when]
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + textwrap.dedent(text))
    done = run([str(path), method], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.split()) == lines


# ---- Ctrl-C --------------------------------------------------------------------------------------

INTERRUPTED = {
    "nobody catches it": """
        rt = runtime.Runtime(2, start_method=method)
        futures = [rt.submit(time.sleep, 1000) for _ in range(4)]
        wait(futures)
        futures[0].result()
        """,
    "in a with block": """
        with runtime.Runtime(2, start_method=method) as rt:
            futures = [rt.submit(time.sleep, 1000) for _ in range(4)]
            wait(futures)
            futures[0].result()
        """,
    "in a map": """
        with runtime.Runtime(2, start_method=method) as rt:
            futures = [rt.submit(time.sleep, 1000)]
            wait(futures)
            list(rt.map(time.sleep, [1000] * 10))
        """,
    "in code that holds the GIL in the worker": """
        import ctypes
        rt = runtime.Runtime(2, start_method=method)
        futures = [rt.submit(evil.hang_with_gil, sys.argv[2])]
        wait(futures)
        futures[0].result()
        """,
}

WAIT = """
import evil

def wait(futures):
    while not futures[0].running():
        time.sleep(0.001)
    print("running", flush=True)
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", list(INTERRUPTED))
def test_ctrl_c_ends_it_quietly(tmp_path: Path, where: str, method: str) -> None:
    """The whole group gets it. Two seconds are promised; no task would end in ten times that."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + WAIT + textwrap.dedent(INTERRUPTED[where]))
    with subprocess.Popen(
        [sys.executable, str(path), method, str(tmp_path / "note")], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "running\n"
            begin = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=40)
        except BaseException:
            process.kill()
            raise
    assert time.monotonic() - begin < 10 * 2.0
    assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err
    assert process.returncode == -signal.SIGINT


UNSEEN = """
    import os, signal
    rt = runtime.Runtime(1)
    futures = [rt.submit(time.sleep, 1000)]

    def interrupt():
        while not waits():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    def waits():  # in a lock, that is: not in what looks for signals before
        frame = sys._current_frames()[threading.main_thread().ident]
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        return HOW in names

    wait(futures)
    threading.Thread(target=interrupt, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
"""


@pytest.mark.parametrize(
    ("how", "call"),
    [("take", "list(rt.map(time.sleep, [1000]))"), ("wait", "futures[0].result()"),
     ("wait", "futures[0].exception()")],
)  # fmt: skip
def test_ctrl_c_that_interrupts_no_wait(tmp_path: Path, how: str, call: str) -> None:
    """CPython sees it late when it comes just as a wait begins; here another thread is given it."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + WAIT + textwrap.dedent(UNSEEN).replace("HOW", repr(how)) + call + "\n")
    done = run([str(path), "exec"])
    assert done.returncode in (-signal.SIGINT, 130), done.stderr  # it is blocked in the main thread
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_while_the_interpreter_waits_for_tasks(tmp_path: Path, method: str) -> None:
    path = tmp_path / "script.py"
    end = """
        import os, signal
        rt = runtime.Runtime(2, start_method=method)
        futures = [rt.submit(time.sleep, 1000) for _ in range(4)]
        wait(futures)

        def interrupt():
            while not rt._core.stopping:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        """
    path.write_text(SCRIPT + WAIT + textwrap.dedent(end))
    done = run([str(path), method])
    assert (done.returncode, done.stdout, done.stderr) == (0, "running\n", "")


def test_ctrl_c_that_was_caught_ends_nothing() -> None:
    code = """if True:
        import os, signal, time
        import runtime
        rt = runtime.Runtime(1)
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(100)
        except KeyboardInterrupt:
            pass
        rt.submit(print, "finished", flush=True)
    """
    with host(code) as one:
        assert one.line() == "finished"
        assert one.process.wait(20) == 0
        one.gone()


HANDLER = """if True:
    import os, random, signal, sys, threading
    import runtime
    what = sys.argv[1]
    for k in range(5):
        rt = runtime.Runtime(2)
        rt.submit(int, 1).result()
        signal.signal(signal.SIGTERM, lambda number, frame: rt.shutdown(cancel_futures=True))
        timer = threading.Timer(random.uniform(0.05, 0.15), os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            while timer.is_alive() or what == "submit":
                rt.submit(int, 1) if what == "submit" else rt._core.busy() and rt.workers()
        except RuntimeError as error:
            print(error, flush=True)
        rt.shutdown()
    print("end")
"""


@pytest.mark.parametrize("what", ["submit", "look"])
def test_a_signal_handler_that_shuts_down(what: str) -> None:
    """It runs in the middle of whatever the main thread does: nothing that the end needs may be locked."""
    done = run(["-c", HANDLER, what])
    said = ["cannot schedule new futures after shutdown"] * 5 if what == "submit" else []
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, [*said, "end"], "")
