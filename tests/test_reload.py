"""Reloads: new code takes over, a worker at a time; what does not start is refused; who dies meanwhile."""

from __future__ import annotations

import itertools
import os
import py_compile
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import evil
import pytest
from watching import alive, all_ready, output, parent, ready, send, settled, until, zygote_of

from runtime import ReloadFailed, ReloadReport, Runtime, WorkerDied, WorkerStatus
from runtime.bytecode import _believable

Factory = Callable[..., Runtime]

FUNCTIONS = """
import os, time
def version(*_):
    return VERSION
def later(path, started):
    with open(started, "a") as file:
        file.write(f"{os.getpid()}\\n")
    while not os.path.exists(path):
        time.sleep(0.002)
    return VERSION
def where(*_):
    import runtime
    return runtime.current().generation, os.getpid()
def note(path, value):
    with open(path, "ab", buffering=0) as file:
        file.write(f"{value} {VERSION}\\n".encode())
    return value
def arrive(name):
    \"\"\"Say who has come; wait while `name` is not there.\"\"\"
    with open(name + ".came", "a") as file:
        file.write(f"{os.getpid()}\\n")
    while not os.path.exists(name):
        time.sleep(0.002)
"""


class Code:
    """A module of the user's, of which there are versions."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.path = folder / f"{name}.py"

    def write(self, version: object, more: str = "") -> None:
        self.path.write_text(f"VERSION = {version!r}\n{FUNCTIONS}\n{more}\n")

    @property
    def module(self) -> Any:
        """As the host has it."""
        return __import__(self.name)

    def came(self, name: str, count: int = 1) -> list[int]:
        """The pids of the first that came to `arrive`."""
        path = self.folder / f"{name}.came"

        def found() -> list[int]:
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            return [int(line) for line in lines] if len(lines) >= count else []

        return until(found, f"{count} came to {name}")  # type: ignore[no-any-return]


names = itertools.count()


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Code]:
    name = f"reloaded_{next(names)}"
    monkeypatch.syspath_prepend(str(tmp_path))
    one = Code(tmp_path, name)
    one.write(1)
    yield one
    sys.modules.pop(name, None)


@pytest.fixture
def asked() -> Iterator[Callable[..., Future[ReloadReport]]]:
    """Reloads in a thread of their own."""
    with ThreadPoolExecutor() as pool:
        yield lambda rt, **options: pool.submit(rt.reload, **options)


def pids_of(rt: Runtime) -> dict[int, int | None]:
    return {info.number: info.pid for info in rt.workers()}


def generations(rt: Runtime) -> list[int]:
    return [info.generation for info in rt.workers()]


def serves(rt: Runtime, code: Code, version: object) -> None:
    """All workers run this version, and every task has ended."""
    assert set(rt.map(code.module.version, range(50), chunksize=1)) == {version}
    settled(rt)
    until(lambda: not rt._core._others and not rt._core._old, "one zygote is left")


# ---- new code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preload", [True, False])
def test_new_code_in_new_processes_with_the_old_state(factory: Factory, code: Code, preload: bool) -> None:
    rt = factory(2, preload=[code.name] if preload else [])
    serves(rt, code, 1)
    before = all_ready(rt)
    rt.state.set("kept", b"1")
    ref = rt.put(b"x" * 100_000)
    assert generations(rt) == [1, 1]
    code.write(2)
    report = rt.reload()
    assert (report.generation, report.started, report.drained, report.killed) == (2, 2, 2, 0)
    assert 0 < report.seconds < 30
    after = pids_of(rt)
    assert set(after) == {0, 1} and not set(after.values()) & set(before.values())
    assert generations(rt) == [2, 2]
    assert not any(alive(pid) for pid in before.values())
    serves(rt, code, 2)
    assert {rt.submit(code.module.where).result()[0] for _ in range(10)} == {2}
    assert rt.state.get("kept") == b"1" and rt.submit(len, ref).result() == 100_000
    assert sum(info.tasks_done for info in rt.workers()) >= 111, "counts go on"
    assert rt.reload().generation == 3


@pytest.mark.parametrize("preload", [True, False])
def test_an_edit_of_the_same_size_within_the_same_second(factory: Factory, code: Code, preload: bool) -> None:
    """Python itself would take the old bytecode."""
    rt = factory(2, preload=[code.name] if preload else [])
    stamp = code.path.stat()
    serves(rt, code, 1)
    for version in (2, 3):
        py_compile.compile(str(code.path))  # as a worker does that reads it in the last moment
        code.write(version)
        os.utime(code.path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert code.path.stat().st_size == stamp.st_size
        rt.reload()
        serves(rt, code, version)


def test_packages_and_their_data_are_read_anew(factory: Factory, code: Code) -> None:
    package = code.folder / f"{code.name}_package"
    package.mkdir()

    def write(version: int) -> None:
        (package / "data.txt").write_text(str(version))
        (package / "part.py").write_text(f"PART = {version}")
        (package / "__init__.py").write_text(
            "import pkgutil\nfrom .part import PART\nDATA = pkgutil.get_data(__name__, 'data.txt')\n"
            "def both(*_):\n    return PART, DATA\n"
        )

    write(1)
    both = __import__(package.name).both
    rt = factory(2, preload=[package.name])
    assert rt.submit(both).result() == (1, b"1")
    write(2)
    rt.reload()
    assert rt.submit(both).result() == (2, b"2")
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def test_which_bytecode_is_believed(tmp_path: Path) -> None:
    source, bytecode = tmp_path / "a.py", tmp_path / "a.pyc"
    source.touch()
    bytecode.touch()
    assert not _believable(str(bytecode), str(source)), "it may be of the version before"
    at = source.stat().st_ctime_ns
    os.utime(bytecode, ns=(at, at + 3_000_000_000))
    assert _believable(str(bytecode), str(source))
    os.utime(source, ns=(0, 0))  # dated back: that is no proof
    os.utime(bytecode, ns=(at, at + 1))
    assert not _believable(str(bytecode), str(source))
    with pytest.raises(OSError):
        _believable(str(tmp_path / "missing.pyc"), str(source))
    assert _believable("any", threading.__file__), "the standard library's is"


def test_code_by_value_stays(factory: Factory, code: Code) -> None:
    rt = factory(1)
    value = [1]
    assert rt.submit(lambda: value[0]).result() == 1
    rt.reload()
    assert rt.submit(lambda: value[0]).result() == 1


def test_running_tasks_end_in_the_old_code(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]]
) -> None:
    """What waits in the queue runs in the new one; all the time there are as many ready workers as before."""
    rt = ready(factory(2))
    go, started = str(code.folder / "go"), str(code.folder / "started")
    future = rt.submit(code.module.later, go, started)
    until(lambda: Path(started).exists(), "it has started")
    code.write(2)
    reloading = asked(rt)

    def half() -> bool:
        assert sum(info.status is WorkerStatus.READY for info in rt.workers()) == 2
        return 2 in generations(rt)

    until(half, "a new worker")
    # One of the numbers has a new worker; if it was that of the task, the task is finished by the old one.
    until(lambda: rt.submit(code.module.version).result() == 2, "new tasks find the new code")
    assert not reloading.done() and future.running()
    (code.folder / "go").touch()
    assert future.result() == 1
    assert reloading.result(30).drained == 2
    serves(rt, code, 2)


def test_several_threads_in_a_worker(factory: Factory, code: Code) -> None:
    rt = ready(factory(2, threads=2))
    serves(rt, code, 1)
    code.write(2)
    assert rt.reload().started == 2
    serves(rt, code, 2)


def test_it_is_for_workers_that_recycle_too(factory: Factory, code: Code) -> None:
    """Under load; each task runs once."""
    rt = factory(2, max_tasks_per_child=3)
    path = code.folder / "log"
    results = rt.map(code.module.note, itertools.repeat(str(path)), range(120), chunksize=1)
    code.write(2)
    assert rt.reload().generation == 2
    assert list(results) == list(range(120))
    lines = [line.split() for line in path.read_text().splitlines()]
    assert sorted(int(value) for value, _ in lines) == list(range(120))
    serves(rt, code, 2)


def test_the_first_start_may_still_be_under_way(factory: Factory, code: Code) -> None:
    rt = factory(2, preload=[code.name])
    assert rt.reload().generation == 2
    serves(rt, code, 1)


def test_a_first_start_that_hangs_is_replaced(factory: Factory, code: Code) -> None:
    """The code of the first generation never becomes ready; that of the second does."""
    code.write(1, f"def setup():\n    arrive({str(code.folder / 'never')!r})")
    rt = factory(1, initializer=code.module.setup)
    code.came("never")
    code.write(2, "def setup():\n    pass")
    report = rt.reload()
    assert (report.started, report.drained) == (1, 0)
    serves(rt, code, 2)


# ---- what does not start -------------------------------------------------------------------------

BROKEN = {
    "syntax": ("def (:", "SyntaxError"),
    "import": ("import there_is_no_such_module", "ModuleNotFoundError"),
    "raise": ("raise RuntimeError('broken on purpose')", "broken on purpose"),
    "SystemExit": ("raise SystemExit(3)", "SystemExit"),
    "exit": ("os._exit(7)", "exit code 7"),
    "hang": ("time.sleep(1000)", "took longer than 1 s"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("preload", [True, False])
def test_modules_that_cannot_be_imported(factory: Factory, code: Code, how: str, preload: bool) -> None:
    """Also those that are not preloaded, but whose functions have been submitted."""
    # Without preload a worker that has not run such a function yet would read the broken file.
    rt = factory(2, preload=[code.name]) if preload else factory(1)
    serves(rt, code, 1)
    before = all_ready(rt)
    text, reason = BROKEN[how]
    code.write(2, text)
    if not preload:
        reason = {"exit": "exited with code 7", "hang": "a worker's start took"}.get(how, reason)
    with pytest.raises(ReloadFailed, match=reason) as caught:
        rt.reload(timeout=1 if how == "hang" else None)
    assert "generation 1 serves on" in str(caught.value)
    if how in ("syntax", "raise", "import"):
        assert "Traceback" in str(caught.value) and str(code.path) in str(caught.value)
    assert pids_of(rt) == before and set(generations(rt)) == {1}
    serves(rt, code, 1)
    if preload:  # else a new worker reads the file as it is now
        send(before[0], signal.SIGKILL)
        until(lambda: all_ready(rt)[0] != before[0], "its successor")
        serves(rt, code, 1)  # that was forked by the old zygote, too
    code.write(3)
    assert rt.reload().generation == 2
    serves(rt, code, 3)


INITIALIZERS = {
    "raise": ("raise ValueError('no database')", "no database"),
    "exit": ("os._exit(5)", "exited with code 5"),
    "hang": ("time.sleep(1000)", "took longer than 1 s"),
}


@pytest.mark.parametrize("how", INITIALIZERS)
def test_initializers_that_fail(factory: Factory, code: Code, how: str) -> None:
    code.write(1, "def setup():\n    pass")
    rt = factory(2, initializer=code.module.setup)
    serves(rt, code, 1)
    before = all_ready(rt)
    text, reason = INITIALIZERS[how]
    code.write(2, f"def setup():\n    {text}")
    with pytest.raises(ReloadFailed, match=reason):
        rt.reload(timeout=1 if how == "hang" else None)
    assert pids_of(rt) == before
    serves(rt, code, 1)
    code.write(3, "def setup():\n    pass")
    rt.reload()
    serves(rt, code, 3)


def test_a_module_that_is_gone_is_no_reason(factory: Factory, code: Code) -> None:
    """Its functions fail as they are called: that may be what was wanted."""
    rt = factory(1)
    serves(rt, code, 1)
    code.path.unlink()
    rt.reload()
    assert isinstance(rt.submit(code.module.version).exception(), ImportError)


def test_a_later_worker_that_fails_turns_all_back(factory: Factory, code: Code) -> None:
    """Numbers that had new workers get old code again, and no task is lost."""
    setup = "def setup():\n    import runtime\n    here = runtime.current()\n"
    code.write(1, f"{setup}    pass")
    rt = ready(factory(3, initializer=code.module.setup, preload=[code.name]))
    code.write(2, f"{setup}    if here.number == 1:\n        raise ValueError('not me')")
    results = rt.map(code.module.note, itertools.repeat(str(code.folder / "log")), range(100), chunksize=1)
    with pytest.raises(ReloadFailed, match="not me"):
        rt.reload()
    assert list(results) == list(range(100))
    all_ready(rt)
    assert generations(rt) == [1, 1, 1]
    serves(rt, code, 1)
    code.write(3, f"{setup}    pass")
    assert rt.reload().generation == 2
    serves(rt, code, 3)


def test_a_number_that_lost_its_worker_must_start_in_the_new_code(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]]
) -> None:
    """Its old worker dies while that of another number drains: a successor has nobody to replace."""
    setup = "def setup():\n    import runtime\n    here = runtime.current()\n"
    code.write(1, f"{setup}    pass")
    rt = factory(2, initializer=code.module.setup, preload=[code.name])
    before = all_ready(rt)
    both = [rt.submit(code.module.arrive, str(code.folder / "go")) for _ in range(2)]
    code.came("go", 2)
    code.write(2, f"{setup}    if here.number == 1:\n        raise ValueError('not me')")
    reloading = asked(rt)
    until(lambda: generations(rt)[0] == 2, "the first number has its new worker")
    send(before[1], signal.SIGKILL)
    until(lambda: rt._core._numbers[1].restarts.in_a_row, "it does not start")
    (code.folder / "go").touch()
    with pytest.raises(ReloadFailed, match="not me"):
        reloading.result(30)
    assert sorted(type(future.exception()).__name__ for future in both) == ["NoneType", "WorkerDied"]
    all_ready(rt)
    assert generations(rt) == [1, 1]
    serves(rt, code, 1)


def test_a_failed_rollback_and_the_next_reload(factory: Factory, code: Code) -> None:
    """Workers of the code that was refused serve on; the next reload replaces them, too."""
    setup = "def setup():\n    import runtime\n    here = runtime.current()\n"
    failed = str(code.folder / "failed")
    code.write(1, f"{setup}    if os.path.exists({failed!r}):\n        raise ValueError('nor me')")
    rt = ready(factory(3, initializer=code.module.setup, preload=[code.name]))
    code.write(
        2,
        f"{setup}    if here.number == 2:\n        open({failed!r}, 'w').close()\n"
        "        raise ValueError('not me')",
    )
    with pytest.raises(ReloadFailed, match="not me") as caught:
        rt.reload()
    assert "could not be rolled back" in caught.value.__notes__[0]
    assert "nor me" in caught.value.__notes__[0]
    assert generations(rt) == [2, 2, 1]
    code.write(3, f"{setup}    pass")
    report = rt.reload()
    assert (report.generation, report.started) == (3, 3)
    assert generations(rt) == [3, 3, 3]
    serves(rt, code, 3)


def test_the_failures_of_the_old_code_do_not_delay_the_new_one(factory: Factory, code: Code) -> None:
    """One number crashes again and again; as its code is mended, it starts at once."""
    setup = "def setup():\n    import runtime\n    here = runtime.current()\n"
    failing = code.folder / "failing"
    code.write(
        1,
        f"{setup}    if here.number == 1 and os.path.exists({str(failing)!r}):\n"
        "        raise ValueError('no more')",
    )
    rt = factory(2, initializer=code.module.setup, preload=[code.name])
    pids = all_ready(rt)
    failing.touch()
    send(pids[1], signal.SIGKILL)
    restarts = rt._core._numbers[1].restarts
    until(lambda: restarts.exhausted, "it is given up")
    restarts.not_before = time.monotonic() + 1000
    code.write(2, f"{setup}    pass")
    rt.reload()
    all_ready(rt)
    serves(rt, code, 2)


def test_a_module_that_leaves_a_thread_is_imported_in_workers(factory: Factory, code: Code) -> None:
    rt = factory(2, preload=[code.name])
    serves(rt, code, 1)
    code.write(2, "import threading\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()")
    with pytest.warns(RuntimeWarning, match="leaves a thread running"):
        rt.reload()
    serves(rt, code, 2)


# ---- draining ------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1])
def test_who_does_not_finish_in_time_is_killed(factory: Factory, code: Code, retries: int) -> None:
    """Which is a worker's death to its task: the second attempt runs in the new code."""
    rt = ready(factory(1, drain_timeout=0.3, retries=retries))
    go, started = code.folder / "go", code.folder / "started"
    future = rt.submit(code.module.later, str(go), str(started))
    until(started.exists, "it has started")
    code.write(2)
    report = rt.reload()
    assert (report.started, report.drained, report.killed) == (1, 0, 1)
    if retries:
        until(lambda: len(started.read_text().split()) == 2, "the second attempt")
        go.touch()
        assert future.result() == 2
    else:
        error = future.exception()
        assert isinstance(error, WorkerDied) and error.signal == signal.SIGKILL
        assert "drain_timeout of a reload" in error.reason
    serves(rt, code, 2)


def test_a_stopped_worker_does_not_hold_it_up(factory: Factory, code: Code) -> None:
    rt = factory(2, drain_timeout=0.3)
    pid = all_ready(rt)[1]
    send(pid, signal.SIGSTOP)
    report = rt.reload()
    assert (report.started, report.killed) == (2, 1)
    serves(rt, code, 1)


def test_a_worker_that_its_zygote_has_not_forked_yet_is_not_waited_for(factory: Factory, code: Code) -> None:
    """As that stands still."""
    rt = factory(2)
    pids = all_ready(rt)
    both = [rt.submit(code.module.arrive, str(code.folder / "go")) for _ in range(2)]
    code.came("go", 2)
    (code.folder / "go").touch()
    assert [future.result() for future in both] == [None, None]  # they have worked: there is no back-off
    zygote = zygote_of(pids[0])
    send(zygote, signal.SIGSTOP)
    try:
        send(pids[0], signal.SIGKILL)
        number = rt._core._numbers[0]
        until(lambda: number.worker is not None and number.worker.pid is None, "another is ordered")
        assert rt.reload().started == 2
        assert set(generations(rt)) == {2}
    finally:
        send(zygote, signal.SIGCONT)
    serves(rt, code, 1)


# ---- others at the same time ---------------------------------------------------------------------


def test_reloads_wait_for_each_other(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]]
) -> None:
    rt = factory(2)
    several = [asked(rt) for _ in range(4)]
    assert sorted(future.result(30).generation for future in several) == [2, 3, 4, 5]
    serves(rt, code, 1)


@pytest.mark.parametrize("how", ["shutdown", "kill_workers", "shutdown(wait=False)"])
@pytest.mark.parametrize("where", ["import", "initializer"])
def test_the_end_of_the_runtime_ends_it(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]], how: str, where: str
) -> None:
    code.write(1, "def setup():\n    pass")
    rt = ready(factory(2, preload=[code.name], initializer=code.module.setup))
    here = f"arrive({str(code.folder / 'never')!r})"
    code.write(2, f"def setup():\n    {here}" if where == "initializer" else here)
    reloading, waiting = asked(rt), asked(rt)
    code.came("never")
    if how == "kill_workers":
        rt.kill_workers()
    else:
        rt.shutdown(wait=how == "shutdown")
    for future in (reloading, waiting):
        with pytest.raises(ReloadFailed, match="the runtime ended"):
            future.result(30)
    rt.shutdown()
    with pytest.raises(RuntimeError):
        rt.reload()


@pytest.mark.parametrize("numbers", [4, 1, 0])
def test_scaling_meanwhile(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]], numbers: int
) -> None:
    code.write(1, "def setup():\n    pass")
    rt = ready(factory(2, initializer=code.module.setup))
    code.write(2, f"def setup():\n    arrive({str(code.folder / 'go')!r})")
    reloading = asked(rt)
    code.came("go")
    rt.scale(numbers)
    (code.folder / "go").touch()
    assert reloading.result(30).generation == 2
    rt.scale(max(numbers, 1))
    all_ready(rt)
    assert set(generations(rt)) == {2}
    serves(rt, code, 2)


def test_a_paused_runtime_checks_the_imports(factory: Factory, code: Code) -> None:
    rt = ready(factory(2, preload=[code.name]))
    rt.scale(0)
    until(lambda: not rt.workers(), "it is paused")
    code.write(2, "raise ValueError('not this')")
    with pytest.raises(ReloadFailed, match="not this"):
        rt.reload()
    code.write(3)
    assert rt.reload().started == 0
    rt.scale(2)
    serves(rt, code, 3)


# ---- who is killed -------------------------------------------------------------------------------


@pytest.fixture
def held(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]], request: pytest.FixtureRequest
) -> tuple[Runtime, Future[ReloadReport], dict[int, int], int]:
    """(runtime, its reload, the old pids, the pid of who is held): "import" or "initializer"."""
    code.write(1, "def setup():\n    pass")
    rt = factory(2, preload=[code.name], initializer=code.module.setup)
    before = all_ready(rt)
    here = f"arrive({str(code.folder / 'go')!r})"
    code.write(
        2, f"def setup():\n    {here}" if request.param == "initializer" else f"{here}\ndef setup(): 0"
    )
    reloading = asked(rt)
    return rt, reloading, before, code.came("go")[0]


@pytest.mark.parametrize("held", ["import", "initializer"], indirect=True)
@pytest.mark.parametrize("who", ["new zygote", "old zygote", "old workers", "successor"])
def test_a_kill_before_the_new_code_leads(held: Any, code: Code, who: str) -> None:
    rt, reloading, before, pid = held
    new = pid if parent(pid) == os.getpid() else zygote_of(pid)
    victims = {
        "new zygote": [new],
        "old zygote": [zygote_of(before[0])],
        "old workers": list(before.values()),
        "successor": [pid],
    }[who]
    for victim in victims:
        send(victim, signal.SIGKILL)
    if who in ("new zygote", "successor"):
        code.came("go", 2)  # another one
    (code.folder / "go").touch()
    assert reloading.result(30).generation == 2
    all_ready(rt)
    assert generations(rt) == [2, 2]
    serves(rt, code, 2)


@pytest.mark.parametrize("who", ["new zygote", "old zygote", "old worker", "successor", "both zygotes"])
def test_a_kill_when_the_new_code_leads(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]], who: str
) -> None:
    """The first number has its new worker, that of the second starts."""
    setup = "def setup():\n    import runtime\n    here = runtime.current()\n"
    code.write(1, f"{setup}    pass")
    rt = factory(2, initializer=code.module.setup)
    before = all_ready(rt)
    serves(rt, code, 1)
    code.write(2, f"{setup}    if here.number == 1:\n        arrive({str(code.folder / 'go')!r})")
    reloading = asked(rt)
    (pid,) = code.came("go")
    old, new = zygote_of(before[1]), zygote_of(pid)
    victims = {
        "new zygote": [new],
        "old zygote": [old],
        "old worker": [before[1]],
        "successor": [pid],
        "both zygotes": [old, new],
    }[who]
    for victim in victims:
        send(victim, signal.SIGKILL)
    (code.folder / "go").touch()
    assert reloading.result(30).generation == 2
    until(lambda: all_ready(rt) and generations(rt) == [2, 2], "all are new")
    serves(rt, code, 2)


def test_one_that_is_killed_again_and_again(factory: Factory, code: Code) -> None:
    """It is tried three times."""
    code.write(1, "def setup():\n    pass")
    rt = ready(factory(1, initializer=code.module.setup))
    path = str(code.folder / "kills")
    code.write(2, f"def setup():\n    open({path!r}, 'a').write('x')\n    os.kill(os.getpid(), 9)")
    with pytest.raises(ReloadFailed, match=r"SIGKILL.*the last of 3 attempts"):
        rt.reload()
    assert Path(path).read_text() == "xxx"
    serves(rt, code, 1)


def test_tasks_that_kill_their_workers_meanwhile(
    factory: Factory, code: Code, asked: Callable[..., Future[ReloadReport]]
) -> None:
    rt = ready(factory(2))
    reloading = asked(rt)
    deaths = 0
    while not reloading.done():
        deaths += isinstance(rt.submit(evil.misbehave, "kill").exception(20), WorkerDied)
    assert reloading.result().generation == 2 and deaths
    serves(rt, code, 1)


def test_a_host_that_forks_all_the_time() -> None:
    """No child of its, however long it lives, holds what a new zygote is waited for with."""
    script = """
        import os, threading
        import runtime

        rt = runtime.Runtime(1)
        rt.submit(abs, -1).result()
        reading, writing = os.pipe()
        children, ended = [], threading.Event()

        def fork():
            while not ended.wait(0.003) and len(children) < 500:
                pid = os.fork()
                if pid == 0:
                    os.close(writing)
                    os.read(reading, 1)
                    os._exit(0)
                children.append(pid)

        def reload():
            for _ in range(8):
                rt.reload()
            ended.set()

        threads = [threading.Thread(target=target) for target in (fork, reload)]
        for thread in threads:
            thread.start()
        print(ended.wait(20), len(children) > 20)
        ended.set()
        os.close(writing)
        for thread in threads:
            thread.join()
        for pid in children:
            os.waitpid(pid, 0)
        rt.shutdown()
    """
    assert output(textwrap.dedent(script)) == ["True True"]


def test_too_few_descriptors() -> None:
    """That is said; the soft limit is raised as far as it may be."""
    script = """
        import os, resource
        import runtime
        from watching import all_ready, until

        def limit(more, hard):
            until(lambda: not (rt._core._others or rt._core._old), "one zygote is left")
            soft = len(os.listdir("/proc/self/fd")) + more
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft if hard else most))

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        rt = runtime.Runtime(2)
        all_ready(rt)
        limit(5, hard=False)
        print(rt.reload().generation)
        limit(60, hard=True)
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]
        try:
            rt.reload(timeout=0.5)
        except runtime.ReloadFailed as error:
            print(error)
        while held:
            os.close(held.pop())
        print(rt.reload().generation, rt.submit(abs, -1).result())
        rt.shutdown()
    """
    assert output(textwrap.dedent(script)) == [
        "2",
        "the reload failed, and generation 2 serves on: "
        "waiting for free file descriptors took longer than 0.5 s",
        "3 1",
    ]


# ---- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_asked(factory: Factory) -> None:
    rt = factory(1)
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError):
            rt.reload(timeout=bad)
    for wrong in (True, "1"):
        with pytest.raises(TypeError):
            rt.reload(timeout=wrong)  # type: ignore[arg-type]
    raised: Future[Any] = Future()

    def call(_: object) -> None:
        try:
            raised.set_result(rt.reload())
        except BaseException as error:
            raised.set_exception(error)

    future = rt.submit(time.sleep, 0.05)
    future.add_done_callback(call)
    future.result()
    with pytest.raises(RuntimeError, match="in a callback"):
        raised.result(10)


def test_a_forked_runtime_cannot() -> None:
    script = """
        import runtime
        with runtime.Runtime(1, start_method="fork") as rt:
            rt.submit(abs, -1).result()
            try:
                rt.reload()
            except ValueError as error:
                print(error)
    """
    (line,) = output(textwrap.dedent(script))
    assert 'start_method="fork" cannot reload' in line
