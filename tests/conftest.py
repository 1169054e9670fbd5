"""What holds for every test: a watchdog, and nothing left over.

**Watchdog.** A test that takes longer than `--watchdog` seconds (60; its own `timeout(n)` mark wins)
is hung: all stacks are printed to the real stderr and the process ends. Its workers end with it.

**Nothing left over.** Around each test, and around each module (for what module fixtures own), we
compare what there is before and after:

    processes     children, their descendants, and orphans that got away: each process started by
                  this session carries MARK in its environment or, forked without exec, our addresses
    threads       all of them, also native ones that Python does not know
    descriptors   by number and target
    mappings      of memory that is shared: regions, also deleted ones
    /dev/shm      new entries that no stranger has mapped
    files         sockets and all else: XDG_RUNTIME_DIR and the temporary folder are the session's own
    losses        blocks and leases that were neither free nor swept when their region ended

What is still ending gets a moment (processes 5 s, everything else 1 s), then the test fails with a
message that names it. In the clean case this costs about a millisecond. A thing that stays around
by design (numpy's threads, zmq's first context) is started before the first test (`prime`), instead
of being excused in the comparison.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tasks import Gate
from watching import SESSION as MARK
from watching import fields, idle, parent, pids, ready, until

if TYPE_CHECKING:
    import runtime

# A shell that runs us in the background has SIGINT ignored, and what we start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


PROCESS_GRACE = 5.0  # seconds in which a process may still be ending
OTHER_GRACE = 1.0  # the same for threads, descriptors, files

SHM = "/dev/shm"


# ---- the session ---------------------------------------------------------------------------------


@dataclass
class Session:
    """What pytest_configure sets up and pytest_unconfigure takes down."""

    stderr: int  # a duplicate of the real stderr: pytest captures the other one
    folder: str  # of this session: XDG_RUNTIME_DIR and TMPDIR are in it
    environ: dict[str, str | None] = field(default_factory=dict)  # to be put back
    tempdir: str | None = None
    watchdog: frozenset[int] = frozenset()  # its thread: a new one for each test
    losses: list[dict[str, int]] = field(default_factory=list)  # of regions that have ended; the core's list
    blamed: set[tuple[str, object]] = field(default_factory=set)  # on a test: not on its module, too


session: Session
failed = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--watchdog",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="end the process, with all stacks, when a test takes longer (0: never)",
    )


def pytest_configure(config: pytest.Config) -> None:
    global session
    # Short, because a socket path has at most 107 bytes.
    base = "/tmp" if os.access("/tmp", os.W_OK) else None
    folder = tempfile.mkdtemp(prefix=f"rt-{os.getpid()}-", dir=base)
    remove_stale(os.path.dirname(folder))
    session = Session(os.dup(2), folder, tempdir=tempfile.tempdir)
    changes = {
        MARK: f"{os.getpid()}-{uuid.uuid4().hex}",
        "XDG_RUNTIME_DIR": os.path.join(session.folder, "x"),
        "TMPDIR": os.path.join(session.folder, "t"),
        # pytest keeps the tmp_path folders of the last runs: not in a folder that we remove.
        "PYTEST_DEBUG_TEMPROOT": os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir()),
    }
    for name, value in changes.items():
        session.environ[name] = os.environ.get(name)
        os.environ[name] = value
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        os.mkdir(os.environ[name], 0o700)
    tempfile.tempdir = None
    prime()


def pytest_unconfigure(config: pytest.Config) -> None:
    for name, value in session.environ.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = session.tempdir
    shutil.rmtree(session.folder, ignore_errors=True)
    os.close(session.stderr)


def remove_stale(base: str) -> None:
    """Folders of sessions that the watchdog ended, or that were killed."""
    for path in Path(base).glob("rt-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(path, ignore_errors=True)


def prime() -> None:
    """Start what would otherwise start, and stay, in the middle of some test."""
    with suppress(ImportError):
        import numpy

        numpy.ones((64, 64)) @ numpy.ones((64, 64))  # BLAS threads
        numpy.random.default_rng()
    with suppress(ImportError):
        import zmq

        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:  # libsodium, its descriptor
            socket.linger = 0
    with suppress(ImportError):
        from runtime import _core

        _core.note_losses(session.losses)
    import asyncio
    import concurrent.futures.process  # noqa: F401
    import multiprocessing.connection  # noqa: F401

    asyncio.run(asyncio.sleep(0))


def pytest_collection_finish(session: pytest.Session) -> None:
    # What lives now lives to the end: a collection during the tests need not look at it.
    gc.collect()
    gc.freeze()


# ---- the watchdog --------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0]) if marker else float(item.config.getoption("--watchdog"))
    if seconds <= 0 or item.config.getoption("usepdb"):
        return (yield)
    before = threads()
    faulthandler.dump_traceback_later(seconds, exit=True, file=session.stderr)
    session.watchdog = threads() - before
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[failed] = True
    return report


# ---- what there is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    pids: frozenset[int]  # of the whole machine: who is ours is asked of the new ones only
    threads: frozenset[int]
    descriptors: frozenset[tuple[int, str]]
    mappings: frozenset[tuple[str, str]]
    losses: int
    shm: frozenset[str]
    files: frozenset[str]


def snapshot() -> Snapshot:
    return Snapshot(
        everyone(),
        threads() - session.watchdog,
        frozenset(descriptors()),
        frozenset(mappings()),
        len(session.losses),
        frozenset(os.listdir(SHM)) if os.path.isdir(SHM) else frozenset(),
        frozenset(files()),
    )


def everyone() -> frozenset[int]:
    return frozenset(int(name) for name in os.listdir("/proc") if name.isdecimal())


def threads() -> frozenset[int]:
    return frozenset(map(int, os.listdir("/proc/self/task")))


def descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself is closed by now
            yield int(name), os.readlink(f"/proc/self/fd/{name}")


def mappings() -> Iterator[tuple[str, str]]:
    """(addresses, what) of memory that is shared with other processes, by a file, a memfd or a fork."""
    for line in read("/proc/self/maps").decode(errors="replace").splitlines():
        parts = line.split(None, 5)
        path = parts[5] if len(parts) > 5 else ""
        if parts[1][3] == "s" and not path.startswith("/usr/"):  # what libc maps for its own use
            yield parts[0], path


def files() -> Iterator[str]:
    """Files and folders in the session's own XDG_RUNTIME_DIR and temporary folder.

    The folder that holds the control sockets, `runtime` or `runtime-UID`, may stay when it is empty.
    """
    permanent = ("runtime", f"runtime-{os.getuid()}")
    for name in ("x", "t"):
        top = os.path.join(session.folder, name)
        for entry in os.listdir(top):
            path = os.path.join(top, entry)
            if entry in permanent and os.path.isdir(path):
                yield from (os.path.join(path, x) for x in os.listdir(path))
            else:
                yield path


# ---- what is left over ---------------------------------------------------------------------------


def leftovers(before: Snapshot) -> dict[str, dict[object, str]]:
    """What is there now and was not before: kind -> {what identifies it: words}; empty if all is well."""
    after = snapshot()
    # What multiprocessing makes for its locks is none of ours, and tests that run beside this one use it.
    shm = (os.path.join(SHM, name) for name in after.shm - before.shm if not name.startswith("sem.mp-"))
    found: dict[str, dict[object, str]] = {
        "process": {pid: describe_process(pid) for pid in our_processes(after.pids - before.pids)},
        "thread": {tid: describe_thread(tid) for tid in after.threads - before.threads},
        "descriptor": {fd: f"{fd[0]} -> {fd[1]}" for fd in after.descriptors - before.descriptors},
        "mapping": {
            key: f"{key[1] or 'anonymous'} at {key[0]}"
            for key in after.mappings - before.mappings
            if not key[1].startswith(f"{SHM}/sem.")  # glibc's, for locks of multiprocessing: tqdm keeps one
        },
        "loss": {
            number: ", ".join(f"{count} {state}" for state, count in session.losses[number].items())
            for number in range(before.losses, after.losses)
        },
        "shared memory": {path: path for path in shm if ours(path)},
        "file": {path: path for path in after.files - before.files},
    }
    return {kind: things for kind, things in found.items() if things}


def read(path: str) -> bytes:
    with suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def layout(pid: int | str) -> list[str] | None:
    """Where the stack and the arguments lie: the kernel draws it at exec, and a fork keeps it."""
    found = fields(pid)
    return [found[25], found[45]] if len(found) > 45 and found[25] != "0" else None


def our_processes(new: frozenset[int]) -> set[int]:
    """Those of the new processes that this session started, directly or not."""
    if not new:
        return set()
    me = os.getpid()
    mark = f"{MARK}={os.environ.get(MARK, me)}".encode()
    addresses = layout("self")
    found = set()
    for pid in new:
        ancestor, steps = parent(pid), 0
        while ancestor not in (0, 1, me) and steps < 100:
            ancestor, steps = parent(ancestor), steps + 1
        if (
            ancestor == me
            or mark in read(f"/proc/{pid}/environ").split(b"\0")
            or (addresses is not None and addresses == layout(pid))
        ):
            found.add(pid)
    return found


def describe_process(pid: int) -> str:
    if fields(pid)[:1] in (["Z"], []):
        return f"{pid} (zombie: ended, and nobody has waited for it)"
    command = read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    return f"{pid} (child of {parent(pid)}): {command[:200] or '?'}"


def describe_thread(tid: int) -> str:
    for thread in threading.enumerate():
        if thread.native_id == tid:
            return f"{tid} {thread.name!r}{', daemon' if thread.daemon else ''}"
    name = read(f"/proc/self/task/{tid}/comm").decode(errors="replace").strip()
    return f"{tid} {name!r}, native"


def ours(path: str) -> bool:
    """False if a process of somebody else has the file mapped, or its name says that it is that one's test's
    (which may have closed it), or it is not this user's.
    """
    try:
        info = os.stat(path)
    except OSError:
        return False
    if info.st_uid != os.getuid() or stat.S_ISDIR(info.st_mode):
        return False
    all_of_them = everyone()
    strangers = all_of_them - our_processes(all_of_them) - {os.getpid()}
    named = re.match(rf"{SHM}/runtime-test-(?:[a-z]+-)*(\d+)", path)
    if named is not None and int(named[1]) in strangers:
        return False
    return not any(os.fsencode(path) in read(f"/proc/{pid}/maps") for pid in strangers)


def check(before: Snapshot, what: str, grace: float = PROCESS_GRACE, *, excuse: bool = False) -> None:
    """Fail with the names of what is left over, after the time that it may take to end.

    excuse: say nothing of what a test was blamed for.
    """
    start, pause = time.monotonic(), 0.0005
    excused = session.blamed if excuse else set()
    while found := {
        (kind, key): words
        for kind, things in leftovers(before).items()
        for key, words in things.items()
        if (kind, key) not in excused
    }:
        gc.collect()
        stop_resource_tracker()
        has_process = any(kind == "process" for kind, _ in found)
        if time.monotonic() - start > (grace if has_process else min(grace, OTHER_GRACE)):
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    else:
        return
    session.blamed |= found.keys()
    for pid in our_processes(everyone() - before.pids):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)  # so that it does not disturb the next test
    lines = [f"  {kind} {words}" for (kind, _), words in sorted(found.items(), key=str)]
    pytest.fail(f"{what} left something over:\n" + "\n".join(lines), pytrace=False)


def stop_resource_tracker() -> None:
    """multiprocessing's tracker process belongs to the interpreter, not to the test that woke it."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    tracker: Any = getattr(module, "_resource_tracker", None)
    if getattr(tracker, "_pid", None) is not None and hasattr(tracker, "_stop"):
        tracker._stop()


# ---- fixtures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def nothing_left_by_module(request: pytest.FixtureRequest) -> Iterator[None]:
    before = snapshot()
    session.blamed.clear()
    yield
    check(before, f"a fixture of the module {request.path.name}", excuse=True)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    before = snapshot()
    yield
    if request.node.stash.get(failed, False):
        # The traceback of a failed test keeps its locals alive: say what there is, and do not wait long.
        check(before, "the test failed (its traceback may keep things alive) and", grace=OTHER_GRACE)
    else:
        check(before, "the test")


@pytest.fixture
def runtime_factory() -> Iterator[Callable[..., runtime.Runtime]]:
    """Makes Runtimes, with the arguments of Runtime; those not yet shut down are, in the end."""
    import runtime

    made: list[runtime.Runtime] = []

    def make(*args: Any, **kwargs: Any) -> runtime.Runtime:
        made.append(runtime.Runtime(*args, **kwargs))
        return made[-1]

    yield make
    while made:
        made.pop().shutdown(wait=True, cancel_futures=True)


@pytest.fixture
def rt(runtime_factory: Callable[..., runtime.Runtime]) -> runtime.Runtime:
    """A Runtime with two workers."""
    return runtime_factory(2)


@pytest.fixture
def factory(runtime_factory: Callable[..., runtime.Runtime]) -> Callable[..., runtime.Runtime]:
    """`runtime_factory`, in short."""
    return runtime_factory


@pytest.fixture
def state() -> Iterator[runtime.SharedState]:
    """A map of its own, in a region of 256 KiB."""
    import runtime

    with runtime.SharedRegion.create(1 << 18) as region:
        state = runtime.SharedState.create(region)
        yield state
        del state


@pytest.fixture(scope="module")
def shared_options() -> dict[str, Any]:
    """Options of `shared`, for a module to replace."""
    return {}


@pytest.fixture(scope="module")
def shared(shared_options: dict[str, Any]) -> Iterator[runtime.Runtime]:
    """Two workers for all tests of a module that leave them alive."""
    import runtime

    with runtime.Runtime(2, **shared_options) as rt:
        ready(rt).submit(abs, -1).result()
        yield rt
        assert rt.stats().rescued == 0


@pytest.fixture
def pool(shared: runtime.Runtime) -> Iterator[runtime.Runtime]:
    """The shared Runtime; the test must leave it idle, with the same workers."""
    before = pids(shared)
    yield shared
    until(lambda: idle(shared), lambda: f"the shared runtime is idle: {shared.stats()}")
    assert pids(shared) == before


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()
