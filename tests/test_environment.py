"""Hostile surroundings: few descriptors, no place for sockets, no /dev/shm, strangers at the sockets."""

from __future__ import annotations

import gc
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys

import evil
import pytest
import zmq
from strangers import folders, garbage, waiting_runtime
from watching import ROOT, all_ready, environment, output, run, send, stopped, until

import runtime
from runtime import wire

# ---- descriptors ---------------------------------------------------------------------------------


def limited(number):
    """A preexec_fn: this many descriptors, soft and hard."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


WORK = """if True:
    import sys, evil, runtime
    try:
        rt = runtime.Runtime(int(sys.argv[1]))
    except OSError as error:
        print("refused", error)
        raise SystemExit
    with rt:
        assert list(rt.map(evil.square, range(200))) == [i * i for i in range(200)]
        print("works")
"""


def test_64_descriptors_are_enough_for_two_workers_or_it_says_so():
    (line,) = output(WORK, "2", preexec_fn=limited(64))
    assert line == "works" or re.match(r"refused 2 workers need about \d+ .*descriptors.* 64", line), line


def test_2000_workers_under_a_low_hard_limit_are_an_oserror():
    (line,) = output(WORK, "2000", preexec_fn=limited(1024))
    assert re.match(r"refused 2000 workers need about \d+ file descriptors", line)
    assert "1024" in line and "ulimit" in line and "fewer workers" in line


def test_a_low_soft_limit_is_raised():
    (line,) = output(WORK, "4", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 4096)))
    assert line == "works"


def test_kills_under_the_lowest_limit_that_is_accepted():
    """What the constructor accepts has to be enough for replacements: libzmq aborts without descriptors."""
    code = """if True:
        import re, resource, runtime
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
            runtime.Runtime(2)
            raise AssertionError("40 descriptors were accepted")
        except OSError as error:
            need = int(re.search(r"about (\\d+) file descriptors", str(error))[1])
        print(need, flush=True)
    """
    (need,) = map(int, output(code))
    code = """if True:
        import contextlib, signal, time, evil, runtime
        from watching import all_ready, send
        with runtime.Runtime(2, retries=50) as rt:
            all_ready(rt)
            futures = [rt.submit(evil.square, i) for i in range(50)]
            for lap in range(8):
                futures += [rt.submit(time.sleep, 0.01) for _ in range(10)]
                for pid in all_ready(rt).values():
                    with contextlib.suppress(ProcessLookupError):  # killed in the last lap
                        send(pid, signal.SIGKILL)
            assert all(f.exception(20) is None for f in futures)
            all_ready(rt)
        print("works")
    """
    assert output(code, preexec_fn=limited(need)) == ["works"]


def test_a_worker_is_not_started_with_the_last_descriptors():
    """libzmq aborts if there is none when a worker connects: what is opened for a moment finds one, too."""
    code = """if True:
        import os, resource
        from runtime import lifecycle
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd")) - 1
        free = 0
        while lifecycle.starts_possible(0) != 1 or free == 0:
            free += 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + free, hard))
        taken = [os.dup(1) for _ in range(lifecycle._FDS_TAKEN)]
        assert lifecycle.starts_possible(0) <= 0
        taken += [os.dup(1) for _ in range(3)]
        print(len(os.listdir("/proc/self/fd")) - 1 < used + free)
    """
    assert output(code) == ["True"]


def test_a_host_that_has_used_up_its_descriptors():
    """Workers die meanwhile: nothing aborts, and all goes on as soon as there are descriptors again."""
    code = """if True:
        import os, signal, time, evil, runtime
        from watching import all_ready, alive, send, until
        def accepted(folder):
            rows = [line.split() for line in open("/proc/net/unix") if folder in line]
            return sum(row[5] == "03" and row[6] != "0" for row in rows)
        with runtime.Runtime(2, retries=5) as rt:
            pids = all_ready(rt)
            until(lambda: accepted(rt._core.link.folder) == 6, "three of each are accepted")
            futures = [rt.submit(time.sleep, 0.01) for _ in range(100)]
            victims = [(os.pidfd_open(pid), pid) for pid in pids.values()]
            taken = []
            try:
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError as error:
                assert "Too many open files" in str(error)
            for fd, _ in victims:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and not futures[-1].done():
                pass
            for fd in taken:
                os.close(fd)
            assert all(f.exception(20) is None for f in futures)
            assert not set(all_ready(rt).values()) & set(pids.values())
        print("works")
    """
    assert output(code, preexec_fn=limited(256)) == ["works"]


# ---- a place for sockets -------------------------------------------------------------------------

NOWHERE = "/proc"  # nobody, not even root, can make a folder there


def where(**environ):
    """The folder that a runtime with this environment takes, seen from the inside."""
    code = """if True:
        import evil, runtime
        with runtime.Runtime(1) as rt:
            assert rt.submit(evil.square, 3).result(20) == 9
            print(rt._core.link.folder)
    """
    (line,) = output(code, environ=environ)
    assert not os.path.exists(line)
    return line


def long_folder(folder):
    path = folder / ("x" * 60) / ("y" * 60)
    path.mkdir(parents=True)
    return str(path)


def test_sockets_go_to_xdg_runtime_dir(tmp_path):
    here = tmp_path / "x"
    here.mkdir()
    if len(str(here)) > 70:
        pytest.skip("the temporary folder of pytest has a long path")
    assert os.path.dirname(where(XDG_RUNTIME_DIR=str(here))) == str(here)


@pytest.mark.parametrize("bad", ["", NOWHERE, "/no/such/folder", "long"])
def test_an_unusable_xdg_runtime_dir_falls_back_to_the_temporary_folder(tmp_path, bad):
    bad = long_folder(tmp_path) if bad == "long" else bad
    temporary = os.environ["TMPDIR"]
    assert os.path.dirname(where(XDG_RUNTIME_DIR=bad)) == temporary


@pytest.mark.parametrize("bad", [NOWHERE, "/no/such/folder", "long"])
def test_an_unusable_tmpdir_falls_back(tmp_path, bad):
    bad = long_folder(tmp_path) if bad == "long" else bad
    found = where(XDG_RUNTIME_DIR="", TMPDIR=bad)
    assert len(found) < 100
    assert os.path.dirname(found) != bad


def test_a_read_only_tmpdir_falls_back(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert os.path.dirname(where(XDG_RUNTIME_DIR=str(folder), TMPDIR=str(folder))) != str(folder)


def unshared(*mounts):
    """The start of a command that runs with these mounts of its own; skips where that is not allowed."""
    script = " && ".join([*mounts, 'exec "$@"'])
    prefix = ["unshare", "-m", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"mounting is not permitted here: {probe.stderr.strip()}")
    return prefix


def in_namespace(mounts, code, cwd="/", **environ):
    return subprocess.run(
        [*unshared(*mounts), sys.executable, "-c", code],
        capture_output=True, text=True, cwd=cwd, env=environment(**environ), timeout=40,
    )  # fmt: skip


def test_no_place_at_all_is_an_oserror_that_says_what_to_do():
    if ROOT.startswith(("/tmp/", "/var/tmp/")) or sys.prefix.startswith(("/tmp/", "/var/tmp/")):
        pytest.skip("this test hides the folder that it runs from")
    mounts = [f"mount -t tmpfs -o ro none {folder}" for folder in ("/tmp", "/var/tmp")]
    code = "import runtime; runtime.Runtime(1)"
    done = in_namespace(mounts, code, cwd="/proc", XDG_RUNTIME_DIR=NOWHERE, TMPDIR="/no/such")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(("OSError: ", "FileNotFoundError: ", "PermissionError: "))
    assert "no folder for the runtime's sockets" in last
    assert "TMPDIR" in last and "XDG_RUNTIME_DIR" in last
    assert "Traceback" not in done.stderr.split("OSError")[-1]


def test_no_dev_shm():
    """Docker's 64 MiB, or none: neither is needed."""
    code = """if True:
        import os, evil, runtime
        assert not os.access("/dev/shm/x", os.W_OK)
        try:
            open("/dev/shm/x", "w")
            raise SystemExit("/dev/shm can be written")
        except OSError:
            pass
        with runtime.Runtime(2) as rt:
            data = bytes(3_000_000)
            assert rt.submit(len, data).result(20) == len(data)
            assert rt.submit(bytes, 3_000_000).result(20) == data
            assert type(rt.submit(evil.misbehave, "kill").exception(20)) is runtime.WorkerDied
            assert list(rt.map(evil.square, range(100))) == [i * i for i in range(100)]
        print("works")
    """
    done = in_namespace(["mount -t tmpfs -o ro,mode=000,size=4k none /dev/shm"], code)
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr


def test_a_named_region_without_dev_shm_is_a_clear_error():
    code = "import runtime; runtime.SharedRegion.create(4096, name='x')"
    done = in_namespace(["mount -t tmpfs -o ro,mode=000,size=4k none /dev/shm"], code)
    assert done.returncode == 1
    assert "/dev/shm" in done.stderr.splitlines()[-1]


# ---- the folder ----------------------------------------------------------------------------------


def test_the_socket_folder_is_private_and_paths_vanish(runtime_factory):
    before = folders()
    rt = runtime_factory(2)
    (folder,) = folders() - before
    status = folder.stat()
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert status.st_uid == os.getuid()
    pids = all_ready(rt)
    until(lambda: not list(folder.iterdir()), lambda: f"paths are unlinked: {list(folder.iterdir())}")
    send(pids[0], signal.SIGKILL)
    until(lambda: all_ready(rt)[0] != pids[0], "it is replaced")
    until(lambda: not list(folder.iterdir()), "paths of the next one, too")
    rt.shutdown()
    assert not folder.exists()


def test_socket_files_are_private_while_they_exist(waiting):
    for path in waiting.paths():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_ISSOCK(path.stat().st_mode)


def test_a_wide_umask_changes_nothing(runtime_factory):
    old = os.umask(0)
    try:
        before = folders()
        rt = runtime_factory(1)
        (folder,) = folders() - before
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        all_ready(rt)
    finally:
        os.umask(old)


@pytest.mark.parametrize("number", [0, -1, -(2**70)])
def test_no_workers(number):
    with pytest.raises(ValueError, match=r"^max_workers must be greater than 0$"):
        runtime.Runtime(number)


@pytest.mark.parametrize("number", [2001, 10_000, 2**70])
def test_too_many_workers(number):
    with pytest.raises(ValueError, match="2,000"):
        runtime.Runtime(number)


@pytest.mark.parametrize("number", [True, False, 2.0, "2"])
def test_workers_of_a_wrong_type(number):
    with pytest.raises((TypeError, ValueError), match="max_workers"):
        runtime.Runtime(number)


# ---- strangers -----------------------------------------------------------------------------------


@pytest.fixture
def waiting(runtime_factory, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    with waiting_runtime(runtime_factory, tmp_path) as one:
        yield one


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context
        context.destroy(0)


def test_strange_messages_are_counted_and_dropped(waiting, context):
    messages = garbage(random.Random(5))
    for path in waiting.paths(".up"):
        push = context.socket(zmq.PUSH)
        push.linger = 5000
        push.connect(f"ipc://{path}")
        for message in messages:
            push.send(message)
        push.close()
    until(lambda: waiting.rt._core.link.strangers >= 2 * len(messages), "all are counted")
    assert waiting.works() == 2 * len(messages)


def test_oversized_and_multipart_messages_have_no_effect(waiting, context):
    for path in waiting.paths(".up"):
        for _ in range(3):
            push = context.socket(zmq.PUSH)
            push.linger = 0
            push.connect(f"ipc://{path}")
            push.send(bytes(5_000_000))
            push.send_multipart([b"a", b"b", wire.encode_hint(wire.HintKind.LOOK, 0, 1)])
    waiting.works()


def test_forged_messages_with_the_right_numbers_have_no_effect(waiting, context):
    """They say "look there"; what is to be seen there is what counts."""
    for path in waiting.paths(".up"):
        push = context.socket(zmq.PUSH)
        push.linger = 5000
        push.connect(f"ipc://{path}")
        for slot in range(4):
            for kind in wire.HintKind:
                for _ in range(50):
                    push.send(wire.encode_hint(kind, slot, 1))
    waiting.works()


def test_a_stranger_that_takes_the_hosts_messages_stops_nothing(waiting, context):
    """It connects before the workers do, to where the host sends: what it gets, the worker does not."""
    thieves = []
    for ending, kind in ((".down", zmq.PULL), (".ctl", zmq.SUB)):
        for path in waiting.paths(ending):
            thief = context.socket(kind)
            if kind == zmq.SUB:
                thief.subscribe(b"")
            monitor = thief.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            thief.connect(f"ipc://{path}")
            assert monitor.poll(10_000), "connected"
            thief.disable_monitor()
            thieves.append(thief)
    waiting.works()


def test_raw_connections_with_garbage_have_no_effect(waiting):
    draw = random.Random(6)
    connections = []
    for path in waiting.paths():
        for nbytes in (0, 1, 10, 64, 1000):
            raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            raw.connect(str(path))
            raw.send(draw.randbytes(nbytes))
            connections.append(raw)
        half = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        half.connect(str(path))
        half.send(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03")  # the beginning of a real greeting
        connections.append(half)
    waiting.works()
    for raw in connections:
        raw.close()


def test_a_path_that_somebody_else_has_taken_is_not_used(runtime_factory, monkeypatch):
    """Files where the next worker's socket goes: the runtime neither binds over it nor gives up."""
    before = folders()
    rt = runtime_factory(1, retries=5)
    (folder,) = folders() - before
    all_ready(rt)
    taken = [folder / f"{slot}-2.{end}" for slot in range(4) for end in ("up", "down", "ctl")]
    for path in taken:
        path.write_text("mine")
    send(rt.workers()[0].pid, signal.SIGKILL)
    assert rt.submit(evil.square, 4).result(30) == 16
    assert all(path.read_text() == "mine" for path in taken)
    for path in taken:
        path.unlink()


def test_a_stopped_worker_does_not_fill_the_host(rt):
    """Hints to a worker that does not read pile up nowhere without bound, and block nobody."""
    pids = all_ready(rt)
    send(pids[0], signal.SIGSTOP)
    until(lambda: stopped(pids[0]), "it has stopped")
    try:
        results = rt.map(evil.square, range(5000), timeout=15)
        assert sum(results) == sum(i * i for i in range(5000))
    finally:
        send(pids[0], signal.SIGCONT)
    assert all_ready(rt) == pids


# ---- import --------------------------------------------------------------------------------------


def test_import_runtime_loads_nothing_heavy():
    heavy = ("rich", "numpy", "asyncio", "multiprocessing", "cloudpickle", "psutil", "pyarrow")
    (line,) = output(f"import sys, runtime; print(*[n for n in {heavy} if n in sys.modules])") or [""]
    assert line.split() == []


def test_a_runtime_at_work_loads_nothing_heavy():
    heavy = ("rich", "numpy", "asyncio", "multiprocessing")
    code = f"""if True:
        import sys, evil, runtime
        with runtime.Runtime(1) as rt:
            assert list(rt.map(evil.square, range(5))) == [0, 1, 4, 9, 16]
            found = rt.submit(lambda: [n for n in {heavy} if n in sys.modules]).result()
        print("host", *[n for n in {heavy} if n in sys.modules])
        print("worker", *found)
    """
    assert [line.split() for line in output(code)] == [["host"], ["worker"]]


def test_import_starts_nothing():
    code = """if True:
        import os, runtime
        print(len(os.listdir("/proc/self/task")), evil.own_children(os.getpid()))
    """
    assert output("import evil\n" + code) == ["1 []"]


def test_python_o_and_isolated_mode():
    code = "import sys; sys.path[:0] = {path!r}; import runtime, evil; {rest}"
    rest = "print(runtime.Runtime(1).submit(evil.square, 5).result(20))"
    text = code.format(path=[ROOT, os.path.join(ROOT, "tests")], rest=rest)
    for flags in (["-O"], ["-OO"], ["-I"], ["-X", "dev"], ["-W", "error"], ["-s", "-E"]):
        done = run([*flags, "-c", text])
        assert (done.returncode, done.stdout) == (0, "25\n"), (flags, done.stderr)


# ---- the interpreter of a worker -----------------------------------------------------------------


@pytest.mark.parametrize("preload", [[], ["json"]])
def test_the_collector_runs_in_workers_and_has_little_to_look_at(runtime_factory, preload):
    """It is off while the zygote starts, and what is there by then is out of its sight."""
    rt = runtime_factory(1, preload=preload)
    assert rt.submit(gc.isenabled).result() is True
    assert rt.submit(gc.get_freeze_count).result() > 10_000
    assert rt.submit(gc.get_threshold).result() == gc.get_threshold()
