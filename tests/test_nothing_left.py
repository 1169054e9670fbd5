"""The fixture of conftest.py that looks for leftovers sees each kind of them: here they are left on purpose.

Each test leaves a thing, sees it named, and takes it away again.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from watching import fork, until

from runtime import _core, config, serializer
from runtime.mapping import Results, Run


@pytest.fixture
def house(request: pytest.FixtureRequest) -> Any:
    """conftest.py, as pytest has loaded it."""
    return request.config.pluginmanager.getplugin(str(Path(__file__).with_name("conftest.py")))


@contextlib.contextmanager
def a_child() -> Iterator[str]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield str(child.pid)
        child.communicate()


@contextlib.contextmanager
def a_zombie() -> Iterator[str]:
    pid = fork(lambda: None)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield f"{pid} (zombie"
    os.waitpid(pid, 0)


@contextlib.contextmanager
def a_thread() -> Iterator[str]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left behind")
    thread.start()
    yield "'left behind'"
    end.set()
    thread.join()


@contextlib.contextmanager
def a_descriptor() -> Iterator[str]:
    fd = os.eventfd(0)
    yield f"{fd} -> anon_inode:[eventfd]"
    os.close(fd)


@contextlib.contextmanager
def a_mapping() -> Iterator[str]:
    with mmap.mmap(-1, 4096):
        yield "/dev/zero (deleted) at "


@contextlib.contextmanager
def a_region() -> Iterator[str]:
    """Its descriptor is closed: the view alone keeps the memory."""
    arena = _core.Arena.create(4096, 1, 4, 4, 4096)
    block = _core.HostBlock.take(arena, 100)
    assert block is not None
    view = memoryview(block)
    yield "/memfd:runtime-region (deleted) at "
    view.release()


@contextlib.contextmanager
def a_segment() -> Iterator[str]:
    fd, path = tempfile.mkstemp(dir="/dev/shm")
    os.close(fd)
    yield path
    os.unlink(path)


@contextlib.contextmanager
def a_socket() -> Iterator[str]:
    path = os.path.join(os.environ["XDG_RUNTIME_DIR"], "left")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    yield path
    os.unlink(path)


@contextlib.contextmanager
def a_temporary_file() -> Iterator[str]:
    fd, path = tempfile.mkstemp()
    os.close(fd)
    yield path
    os.unlink(path)


LEFT = {
    "process": a_child, "zombie": a_zombie, "thread": a_thread, "descriptor": a_descriptor,
    "mapping": a_mapping, "region": a_region, "shared memory": a_segment, "socket": a_socket,
    "file": a_temporary_file,
}  # fmt: skip
KINDS = {"zombie": "process", "region": "mapping", "socket": "file"}


@pytest.mark.parametrize("what", LEFT)
def test_leftover_is_named(house: Any, what: str) -> None:
    before = house.snapshot()
    with LEFT[what]() as words:
        found = house.leftovers(before)
        named = found[KINDS.get(what, what)].values()
        assert any(words in name for name in named), found
    until(lambda: house.leftovers(before) == {}, "it was taken away")


def test_leftover_fails_the_test(house: Any) -> None:
    before, blamed = house.snapshot(), set(house.session.blamed)
    with a_temporary_file() as path, pytest.raises(pytest.fail.Exception, match=path):
        house.check(before, "the test", grace=0.0)
    house.session.blamed = blamed
    house.check(before, "the test")


# ---- blocks and leases -----------------------------------------------------------------------------------


class Rig:
    """A host and a worker in one thread; what the worker does not sweep stays in the region."""

    def __init__(self) -> None:
        self.arena = _core.Arena.create(64 * 4096, 1, 4, 16, 4096)
        self.bell = os.eventfd(0)
        self.dispatcher = _core.Dispatcher(self.arena, _core.DeadlineKeeper(self.arena, self.bell))
        self.slot = self.dispatcher.open_slot(0, 1)
        self.port = _core.Runner(self.arena, self.slot, lambda: None)
        self.dispatcher.make_ready(self.slot)

    def map(self, values: list[int]) -> None:
        options = config.TaskOptions(None, 0, (), 0)
        self.results = Results(
            abs, (values,), run=Run(options, True, True), options=options, submit=self.dispatcher.add,
            drop=self.dispatcher.drop, table=serializer.FunctionTable(), workers=1, timeout=None, chunksize=1,
            buffersize=None,
        )  # fmt: skip

    def end(self) -> None:
        """Without the sweep. What the dispatcher still holds keeps the memory until it goes, too."""
        self.dispatcher.close()
        self.arena.release()
        os.close(self.bell)
        self.__dict__.clear()
        gc.collect()


def run_one(rig: Rig) -> None:
    """The worker answers one item with a result that takes a block; the host does not look."""
    worker = SimpleNamespace(
        function_data=lambda *_: None, failed=None, check=lambda: None,
        run_item=lambda *_: (_core.S_VALUE, b"x" * 5000, (), ()), succeeded=None,
        deliver=lambda entry, items, ran, count: rig.port.finish(
            entry, [(_core.S_VALUE, b"x" * 5000, (), ())], ran
        ),
    )  # fmt: skip
    functions = SimpleNamespace(load=lambda *_: abs)
    rig.port.attend(worker, SimpleNamespace(), functions, rig.bell, 1, 1)
    rig.port.serve()


@pytest.mark.parametrize(
    ("act", "expected"),
    [(lambda rig: None, "1 leased"), (run_one, "1 publishing, 1 done")],
    ids=["a lease", "a lease and a block"],
)
def test_what_a_region_has_lost_is_counted(house: Any, act: Callable[[Rig], None], expected: str) -> None:
    before = house.snapshot()
    rig = Rig()
    rig.map([-1])
    act(rig)
    rig.end()
    assert list(house.leftovers(before)["loss"].values()) == [expected]
    house.session.losses.pop()


def test_a_region_that_was_swept_has_lost_nothing(house: Any) -> None:
    before = house.snapshot()
    rig = Rig()
    rig.map([-1])
    run_one(rig)
    rig.dispatcher.vacate(rig.slot)
    rig.dispatcher.settle(rig.slot, None)
    rig.dispatcher.take_outcomes()
    rig.end()
    assert "loss" not in house.leftovers(before)
