"""Programs that make a Runtime, of every kind that users have: what is in the host before, and how it is run.

Each runs the same CHECK: results, a worker that is killed, random numbers, and lines that must come out once.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections import Counter
from pathlib import Path

from watching import run

# What is already there when the Runtime is made: text that runs before, and calls that run in the end.
SETUPS = {
    "plain": "",
    "threads": """
        import threading
        lock, stop = threading.Lock(), threading.Event()
        def work():
            while not stop.wait(0.0001):
                with lock:
                    sum(range(1000))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        [t.start() for t in threads]
        after.append(lambda: (stop.set(), [t.join() for t in threads]))
    """,
    "blas": """
        import numpy, threading
        matrix = numpy.ones((300, 300))
        matrix @ matrix
        stop = threading.Event()
        def multiply():
            while not stop.is_set():
                matrix @ matrix
        thread = threading.Thread(target=multiply, daemon=True)  # BLAS is at work while the runtime starts
        thread.start()
        numpy.random.seed(7)
        options["preload"] += ["numpy.random"]   # numpy imports it when it is asked for
        after.append(lambda: (stop.set(), thread.join(), matrix @ matrix))
    """,
    "zmq": """
        import zmq
        context = zmq.Context()
        pair = [context.socket(zmq.PAIR), context.socket(zmq.PAIR)]
        pair[0].bind("inproc://own")
        pair[1].connect("inproc://own")
        pair[1].send(b"own")
        def check_own():
            assert pair[0].recv() == b"own"
            [socket.close(0) for socket in pair]
            context.term()
        after.append(check_own)
    """,
    "process pool": """
        import concurrent.futures, multiprocessing
        pool = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork"))
        assert pool.submit(evil.square, 5).result() == 25
        after.append(lambda: (pool.submit(evil.square, 5).result(), pool.shutdown()))
    """,
    "manager": """
        import multiprocessing
        manager = multiprocessing.get_context("fork").Manager()
        shared = manager.list()
        def check_manager(rt):
            list(rt.map(shared.append, range(5)))        # workers may use the user's proxies
            assert sorted(shared) == [0, 1, 2, 3, 4]
        during.append(check_manager)
        after.append(manager.shutdown)
    """,
}

CHECK = """
import os, random, sys
import evil, runtime
after, during, options = [], [], {{"preload": ["random"]}}  # so that a fork would inherit its state
print("once")                          # stays in the buffer of a pipe
{setup}
def draw(i):
    if {loud}:
        print("task", i, flush=True)   # what a killed process has in its buffer is lost, as anywhere
    numpy = sys.modules.get("numpy")
    return random.random(), numpy.random.random() if numpy else random.random()
def check(rt):
    pids = {{rt.submit(os.getpid).result(20) for _ in range(10)}}
    assert os.getpid() not in pids
    drawn = [x for pair in rt.map(draw, range(200), chunksize=5) for x in pair]
    assert len(set(drawn)) == len(drawn), "the workers draw the same random numbers"
    error = rt.submit(evil.misbehave, "kill").exception(20)
    assert type(error) is runtime.WorkerDied, error
    assert list(rt.map(evil.square, range(50))) == [i * i for i in range(50)]
    drawn += [x for pair in rt.map(draw, range(200, 300)) for x in pair]
    assert len(set(drawn)) == len(drawn), "the new worker draws the numbers of the old one"
    [call(rt) for call in during]
def main():
    with runtime.Runtime(2, **options) as rt:
        check(rt)
        [call() for call in after]
        after.clear()
    print("end")
"""

IN_A_LOOP = """
import asyncio
async def in_a_loop():
    ticks = 0
    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)
    ticking = asyncio.create_task(tick())
    loop = asyncio.get_running_loop()
    with runtime.Runtime(2, **options) as rt:
        many = [loop.run_in_executor(rt, evil.square, i) for i in range(50)]
        assert await asyncio.gather(*many) == [i * i for i in range(50)]
        await asyncio.to_thread(check, rt)
        assert await asyncio.wrap_future(rt.submit(evil.square, 9)) == 81
    assert ticks > 5, "the loop stood still"
    ticking.cancel()
    print("end")
asyncio.run(in_a_loop())
"""

# A client in a process of its own, as Jupyter's server is: the kernel gets the text, its output is printed.
KERNEL = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(startup_timeout=60, kernel_name="python3")
def show(message):
    content = message["content"]
    if message["msg_type"] == "stream":
        print(content["text"], end="")
    elif message["msg_type"] == "error":
        print(*content["traceback"], sep="\\n")
try:
    for cell in (sys.stdin.read(), "main()"):
        reply = client.execute_interactive(cell, timeout=60, output_hook=show)
        assert reply["content"]["status"] == "ok", reply["content"]
finally:
    client.stop_channels()
    manager.shutdown_kernel()
"""


def text(setup: str = "", call: str = "main()", loud: bool = True) -> str:
    return CHECK.format(setup=textwrap.dedent(setup), loud=loud) + call + "\n"


def result(done: object, loud: bool = True, sessions: int = 1) -> None:
    """It ended by itself, without a complaint, and each line came once (in each of its sessions)."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    ours = [line for line in done.stdout.splitlines() if line in ("once", "end") or line.startswith("task ")]
    wanted = ["once", "end"] + [f"task {i}" for i in range(300) if loud]
    found, expected = Counter(ours), Counter(sessions * wanted)
    assert found == expected, f"missing: {expected - found}; too often: {found - expected}"


def with_setup(name: str, folder: Path) -> None:
    path = folder / "script.py"
    path.write_text(text(SETUPS[name]))
    result(run([str(path)]))


def in_a_loop(folder: Path) -> None:
    result(run(["-c", text(call=IN_A_LOOP)]))


def by_command(folder: Path) -> None:
    result(run(["-c", text()]))


def as_module(folder: Path) -> None:
    package = folder / "a_package"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(text())
    result(run(["-m", "a_package"], cwd=folder))


def from_stdin(folder: Path) -> None:
    result(run(["-"], text()))


def in_an_xdist_worker(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"test_{name}.py").write_text(text(call="def test(): main()", loud=False))
    options = ["-n", "2", "-rP", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    done = run(["-m", "pytest", "-p", "xdist", *options, "test_a.py", "test_b.py"], cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 passed" in done.stdout and "2 workers" in done.stdout, done.stdout
    ours = Counter(line for line in done.stdout.splitlines() if line in ("once", "end"))
    assert ours["end"] == 2, done.stdout  # "once" belongs to the import, which pytest does not report


def in_a_kernel(folder: Path) -> None:
    result(run(["-c", KERNEL], text(call="", loud=False), cwd=folder), loud=False)


HOSTS = {
    **{name: lambda folder, name=name: with_setup(name, folder) for name in SETUPS},
    "asyncio": in_a_loop,
    "xdist": in_an_xdist_worker,
    "ipykernel": in_a_kernel,
    "python -c": by_command,
    "python -m": as_module,
    "stdin": from_stdin,
}
NEEDS = {"blas": ("numpy",), "xdist": ("xdist",), "ipykernel": ("ipykernel", "jupyter_client")}


def missing(name: str) -> list[str]:
    """Modules that this kind of host needs and that are not installed."""
    return [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
