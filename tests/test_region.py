"""SharedRegion: bytes, atomic words, life of the file, hostile files, forks, no memory."""

from __future__ import annotations

import copy
import ctypes
import errno
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from marks import FORKS_BESIDE_THREADS
from watching import fork, join

from runtime import RegionFull, SharedRegion
from runtime.memory import available_memory, memory_room

HEADER = 4096
SHM = Path("/dev/shm")
ROOT = Path(sys.modules["runtime"].__file__ or "").resolve().parent.parent

pytestmark = FORKS_BESIDE_THREADS


# ---- tools ---------------------------------------------------------------------------------------


def mappings() -> list[str]:
    """The mapped regions of this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "runtime-region" in line or "/dev/shm" in line]


def entries() -> set[Path]:
    """What this process may have put into /dev/shm; others use that folder, too, among them tests of ours."""
    ours = re.compile(rf"runtime(?!-test)|runtime-test-(\D+-)?{os.getpid()}\b")
    return {path for path in SHM.iterdir() if ours.search(path.name)}


@pytest.fixture
def region() -> Iterator[SharedRegion]:
    with SharedRegion.create(1 << 16) as region:
        yield region


@pytest.fixture
def name() -> Iterator[str]:
    name = f"runtime-test-{os.getpid()}"
    yield name
    (SHM / name).unlink(missing_ok=True)


@pytest.fixture
def file(name: str) -> Iterator[Path]:
    """The file of a closed region of 10000 bytes."""
    SharedRegion.create(10_000, name=name).close()
    yield SHM / name


# ---- bytes ---------------------------------------------------------------------------------------


def test_smoke(region: SharedRegion) -> None:
    region.write_at(100, b"hello")
    assert region.read_at(100, 5) == b"hello"
    assert region.read_at(99, 7) == b"\0hello\0"
    assert region.size == 1 << 16
    assert region.name is None
    assert "65536" in repr(region)


@pytest.mark.parametrize("size", [1, 7, 4095, 4096, 4097, 3 << 20])
def test_a_region_has_exactly_the_size_asked_for(size: int) -> None:
    with SharedRegion.create(size) as region:
        assert region.size == size
        assert region.read_at(0, size) == bytes(size)
        region.write_at(size - 1, b"x")
        assert region.read_at(size - 1, 1) == b"x"
        assert os.fstat(region.fd).st_size == HEADER + (size + 4095) // 4096 * 4096
        assert os.fstat(region.fd).st_blocks * 512 >= size, "the memory is reserved"
        with pytest.raises(ValueError, match="outside"):
            region.write_at(size, b"x")


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (2**63, ValueError),
        (2**64, ValueError),
        (True, TypeError),
        (1.5, TypeError),
        ("4MiB", TypeError),
        (None, TypeError),
    ],
)
def test_bad_sizes(size: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        SharedRegion.create(size)  # type: ignore[arg-type]
    with pytest.raises(error):
        SharedRegion.create(1, max_size=size if size is not None else 0.5)  # type: ignore[arg-type]


def test_there_is_no_constructor() -> None:
    with pytest.raises(TypeError, match="create"):
        SharedRegion()


OUTSIDE = [
    (-1, 1),
    (0, -1),
    (1 << 16, 1),
    (0, (1 << 16) + 1),
    ((1 << 16) + 1, 0),
    (1, 2**63 - 1),
    (2**63 - 1, 2**63 - 1),
    (2**63, 1),
    (2**64, 1),
    (2**64 - 8, 16),
    (0, 2**64),
    (-(2**63), 1),
    (-(2**70), 2**70 + 1),
]


@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
def test_outside_is_an_error_and_touches_nothing(region: SharedRegion, offset: int, length: int) -> None:
    with pytest.raises(ValueError):
        region.read_at(offset, length)
    with pytest.raises(ValueError):
        region.view(offset, length)
    if 0 <= length < 1 << 20:
        with pytest.raises(ValueError):
            region.write_at(offset, b"\xff" * length)
    assert region.read_at(0, region.size) == bytes(region.size)


def test_empty_ranges_are_inside_up_to_the_end(region: SharedRegion) -> None:
    assert region.read_at(region.size, 0) == b""
    assert len(region.view(region.size, 0)) == 0
    region.write_at(region.size, b"")


@pytest.mark.parametrize("bad", [1.0, "1", None, b"1"])
def test_offsets_are_ints(region: SharedRegion, bad: object) -> None:
    for call in (region.read_at, region.view):
        with pytest.raises(TypeError):
            call(bad, 1)  # type: ignore[operator]
        with pytest.raises(TypeError):
            call(0, bad)  # type: ignore[operator]
    for call in (region.load_u64, lambda at: region.store_u64(at, 1), lambda at: region.write_at(at, b"")):
        with pytest.raises(TypeError):
            call(bad)


def test_write_takes_any_contiguous_buffer(region: SharedRegion) -> None:
    for data in (b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4], (ctypes.c_char * 3)(*b"abc")):
        region.write_at(8, data)
        assert region.read_at(8, 3) == b"abc"
    region.write_at(0, region.view(8, 3))
    assert region.read_at(0, 3) == b"abc"
    with pytest.raises(BufferError, match="contiguous"):
        region.write_at(8, memoryview(b"abcdef")[::2])
    with pytest.raises(TypeError):
        region.write_at(8, "abc")  # type: ignore[arg-type]
    assert region.read_at(8, 3) == b"abc"


def test_what_numpy_sees_keeps_the_region() -> None:
    """It drops the memoryview, and keeps what is behind it."""
    numpy = pytest.importorskip("numpy")
    region = SharedRegion.create(100)
    array = numpy.ndarray(100, "u1", region.view(0, 100))
    with pytest.raises(BufferError):
        region.close()
    array[:] = 7
    assert region.read_at(0, 100) == b"\x07" * 100
    del array
    view = region.view(0, 10)
    view.release()
    region.close()


def test_overlapping_copy_within_a_region(region: SharedRegion) -> None:
    region.write_at(0, bytes(range(10)))
    region.write_at(2, region.view(0, 10))
    assert region.read_at(0, 12) == bytes([0, 1, *range(10)])


def test_arguments_that_run_code_cannot_pull_the_memory_away() -> None:
    class Evil(int):
        def __index__(self) -> int:
            region.close()
            return 0

    class Closes:
        def __index__(self) -> int:
            region.close()
            return 0

    for evil in (Evil(0), Closes()):
        for call in ("read_at", "view", "load_u64", "fetch_add_u64", "compare_exchange_u64"):
            region = SharedRegion.create(4096)
            arguments = {"load_u64": (evil,), "compare_exchange_u64": (0, 0, evil)}.get(call, (0, evil))
            try:
                getattr(region, call)(*arguments)
            except ValueError as error:
                assert "closed" in str(error)
            finally:
                region.close()


# ---- views ---------------------------------------------------------------------------------------


def test_a_view_is_the_memory(region: SharedRegion) -> None:
    view = region.view(8, 16)
    assert (view.nbytes, view.readonly, view.format, view.contiguous) == (16, False, "B", True)
    view[0:3] = b"abc"
    assert region.read_at(8, 3) == b"abc"
    region.store_u64(16, 7)
    assert view[8] == 7


def test_close_with_live_views_is_refused() -> None:
    region = SharedRegion.create(4096)
    view = region.view(0, 16)
    part = view[4:8]
    with pytest.raises(BufferError, match="1 views"):
        region.close()
    view.release()
    del view
    with pytest.raises(BufferError):
        region.close()
    region.write_at(4, b"live")
    assert bytes(part) == b"live"
    del part
    region.close()


def test_a_view_keeps_the_memory_without_the_region() -> None:
    region = SharedRegion.create(4096)
    view = region.view(0, 16)
    region.write_at(0, b"still here")
    del region
    assert bytes(view[:10]) == b"still here"
    assert len(mappings()) == 1
    del view
    assert mappings() == []


def test_numpy_sees_the_memory(region: SharedRegion) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.frombuffer(region.view(4096, 800), dtype="f8")
    array[:] = 1.5
    assert region.read_at(4096, 8) == struct.pack("d", 1.5)
    assert region.load_u64(numpy.int64(4096)) == region.load_u64(4096)
    region.write_at(0, array)
    assert region.read_at(0, 800) == array.tobytes()
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        region.write_at(0, array[::2])


# ---- atomic words --------------------------------------------------------------------------------


def test_words(region: SharedRegion) -> None:
    region.store_u64(8, 2**64 - 1)
    assert region.load_u64(8) == 2**64 - 1
    assert region.read_at(8, 8) == b"\xff" * 8
    assert region.fetch_add_u64(8, 3) == 2**64 - 1, "the old value"
    assert region.load_u64(8) == 2, "wraps"
    assert region.fetch_add_u64(8, -5) == 2
    assert region.load_u64(8) == 2**64 - 3
    assert region.fetch_add_u64(8, -(2**63)) == 2**64 - 3
    assert region.fetch_add_u64(8, 2**64 - 1) == 2**63 - 3
    assert region.load_u64(8) == 2**63 - 4
    assert region.compare_exchange_u64(8, 1, 2) is False
    assert region.load_u64(8) == 2**63 - 4
    assert region.compare_exchange_u64(8, 2**63 - 4, 2**64 - 1) is True
    assert region.load_u64(8) == 2**64 - 1
    region.store_u64(region.size - 8, 5)
    assert region.load_u64(region.size - 8) == 5


@pytest.mark.parametrize("offset", [-8, -1, 1, 4, 7, 9, (1 << 16) - 7, 1 << 16, 2**63, 2**64, 2**64 - 8])
def test_bad_word_offsets_touch_nothing(region: SharedRegion, offset: int) -> None:
    for call in (
        lambda: region.load_u64(offset),
        lambda: region.store_u64(offset, 1),
        lambda: region.fetch_add_u64(offset, 1),
        lambda: region.compare_exchange_u64(offset, 0, 1),
    ):
        with pytest.raises(ValueError):
            call()
    assert region.read_at(0, region.size) == bytes(region.size)


def test_a_word_that_ends_outside() -> None:
    with SharedRegion.create(12) as region:
        region.load_u64(0)
        with pytest.raises(ValueError):
            region.load_u64(8)
        with pytest.raises(ValueError):
            region.store_u64(8, 1)
    with SharedRegion.create(7) as region:
        with pytest.raises(ValueError):
            region.load_u64(0)


@pytest.mark.parametrize("value", [-1, 2**64, -(2**64), 2**100])
def test_values_out_of_range_touch_nothing(region: SharedRegion, value: int) -> None:
    with pytest.raises(ValueError):
        region.store_u64(0, value)
    with pytest.raises(ValueError):
        region.compare_exchange_u64(0, value, 0)
    with pytest.raises(ValueError):
        region.compare_exchange_u64(0, 0, value)
    with pytest.raises(ValueError):
        region.fetch_add_u64(0, value if value != -1 else -(2**63) - 1)
    with pytest.raises(TypeError):
        region.store_u64(0, 1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        region.fetch_add_u64(0, "1")  # type: ignore[arg-type]
    assert region.load_u64(0) == 0


def count_up(region: SharedRegion, rounds: int) -> None:
    for _ in range(rounds):
        region.fetch_add_u64(0, 1)
        while not region.compare_exchange_u64(64, old := region.load_u64(64), old + 1):
            pass


def test_words_are_atomic_between_threads_and_processes(region: SharedRegion) -> None:
    rounds = 20_000
    children = [fork(lambda: count_up(region, rounds)) for _ in range(3)]
    threads = [threading.Thread(target=count_up, args=(region, rounds)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    join(*children)
    assert region.load_u64(0) == region.load_u64(64) == 6 * rounds


# ---- life ----------------------------------------------------------------------------------------


def test_close_is_idempotent_and_final() -> None:
    region = SharedRegion.create(4096, max_size=1 << 20)
    fd = region.fd
    region.close()
    region.close()
    assert mappings() == []
    with pytest.raises(OSError):
        os.fstat(fd)
    for call in (
        lambda: region.read_at(0, 1),
        lambda: region.write_at(0, b""),
        lambda: region.view(0, 1),
        lambda: region.load_u64(0),
        lambda: region.store_u64(0, 1),
        lambda: region.fetch_add_u64(0, 1),
        lambda: region.compare_exchange_u64(0, 0, 1),
        lambda: region.flush(),
        lambda: region.fd,
        lambda: region.__enter__(),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert region.size == 4096
    assert "closed" in repr(region)
    region.unlink()


def test_the_last_reference_closes() -> None:
    fd = SharedRegion.create(4096).fd
    with pytest.raises(OSError):
        os.fstat(fd)
    assert mappings() == []


def test_close_leaves_a_foreign_descriptor_alone() -> None:
    region = SharedRegion.create(4096)
    number = region.fd
    ours, theirs = os.pipe()
    os.dup2(ours, number)  # a user's close-and-reopen of "all" descriptors
    region.close()
    os.fstat(number)
    for fd in (number, ours, theirs):
        os.close(fd)


def test_close_while_threads_copy() -> None:
    """Whatever the order: a whole copy, an error that says closed, or close() is refused. Never a crash."""
    data = b"\x55" * (1 << 20)

    def work(region: SharedRegion, started: threading.Barrier, outcomes: list[str]) -> None:
        started.wait()
        try:
            for _ in range(20):
                assert region.read_at(0, 1 << 20) == data
        except ValueError as error:
            assert str(error) == "the region is closed"
        outcomes.append("fine")

    for _ in range(20):
        region = SharedRegion.create(1 << 20)
        region.write_at(0, data)
        outcomes: list[str] = []
        started = threading.Barrier(3)
        threads = [threading.Thread(target=work, args=(region, started, outcomes)) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        while True:
            try:
                region.close()
                break
            except BufferError as error:
                assert "thread" in str(error)
        for thread in threads:
            thread.join()
        assert outcomes == ["fine", "fine"]


def test_no_pickle_no_copy(region: SharedRegion) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="fd"):
            attempt(region)


def test_flush(region: SharedRegion) -> None:
    region.write_at(0, b"x")
    region.flush()


def test_descriptors_do_not_survive_exec(region: SharedRegion) -> None:
    assert not os.get_inheritable(region.fd)


def test_the_memory_file_cannot_be_cut_under_us(region: SharedRegion) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 4096)


def test_max_size_reserves_addresses_not_memory() -> None:
    with SharedRegion.create(4096, max_size=1 << 40) as region:
        assert region.size == 4096
        assert os.fstat(region.fd).st_blocks * 512 == HEADER + 4096
        with pytest.raises(ValueError):
            region.read_at(4096, 1)
        with pytest.raises(ValueError):
            region.write_at(4095, b"xx")
        with SharedRegion.from_fd(region.fd) as again:
            again.write_at(0, b"same")
            with pytest.raises(ValueError):
                again.view(4096, 1)
        assert region.read_at(0, 4) == b"same"
    with pytest.raises(ValueError, match="less than size"):
        SharedRegion.create(4096, max_size=4095)
    with pytest.raises(RegionFull, match="address space"):
        SharedRegion.create(4096, max_size=1 << 47)
    assert mappings() == []


# ---- forks ---------------------------------------------------------------------------------------


def test_a_forked_child_shares_and_closes_for_itself(region: SharedRegion) -> None:
    def child() -> None:
        assert region.read_at(0, 6) == b"before"
        region.write_at(0, b"child!")
        region.close()
        region.close()
        with pytest.raises(ValueError):
            region.read_at(0, 1)
        assert mappings() == []

    region.write_at(0, b"before")
    join(fork(child))
    assert region.read_at(0, 6) == b"child!"
    os.fstat(region.fd)


def test_a_forked_child_drops_its_copy() -> None:
    holder = [SharedRegion.create(4096)]
    view = holder[0].view(0, 4)

    def child() -> None:
        nonlocal view
        number = holder[0].fd
        os.dup2(2, number)  # the child has put something else under this number
        holder.clear()
        view[:] = b"view"
        del view
        assert mappings() == []
        os.fstat(number)

    join(fork(child))
    assert holder[0].read_at(0, 4) == b"view"


def test_a_fork_while_another_thread_copies() -> None:
    """The child inherits the count of the copies under way, but not the threads that would lower it."""
    region = SharedRegion.create(8 << 20)
    stop = threading.Event()

    def copy_on() -> None:
        while not stop.is_set():
            region.read_at(0, region.size)

    thread = threading.Thread(target=copy_on)
    thread.start()
    try:
        for _ in range(10):
            join(fork(region.close))
    finally:
        stop.set()
        thread.join()
    region.close()


# ---- named regions -------------------------------------------------------------------------------


def test_named(name: str) -> None:
    mask = os.umask(0)
    try:
        region = SharedRegion.create(10_000, name=name)
    finally:
        os.umask(mask)
    assert region.name == name
    assert (SHM / name).stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError, match="open"):
        SharedRegion.create(10_000, name=name)
    with SharedRegion.open(name) as other:
        assert (other.name, other.size) == (name, 10_000)
        other.store_u64(0, 77)
        assert region.load_u64(0) == 77
    region.close()
    assert (SHM / name).exists(), "closing keeps the name"
    region.unlink()
    region.unlink()
    assert not (SHM / name).exists()
    with pytest.raises(FileNotFoundError, match="no region"):
        SharedRegion.open(name)


def test_named_from_a_fresh_interpreter(name: str) -> None:
    with SharedRegion.create(10_000, name=name, max_size=1 << 20) as region:
        code = f"from runtime import SharedRegion\nSharedRegion.open({name!r}).write_at(9, b'exec')"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        assert region.read_at(9, 4) == b"exec"
        region.unlink()
        assert region.read_at(9, 4) == b"exec", "unlinked, but mapped"


def test_unlink_leaves_a_successor_alone(name: str) -> None:
    old = SharedRegion.create(4096, name=name)
    with SharedRegion.open(name) as other:
        other.unlink()
    with SharedRegion.create(4096, name=name):
        old.unlink()
        assert (SHM / name).exists()
    old.close()


@pytest.mark.parametrize("bad", ["", "a/b", "/abs", ".", "..", "nul\0", "x" * 256, "ä" * 200])
def test_bad_names(bad: str) -> None:
    before = entries()
    for make in (lambda: SharedRegion.create(4096, name=bad), lambda: SharedRegion.open(bad)):
        with pytest.raises(ValueError):
            make()
    assert entries() == before


@pytest.mark.parametrize("bad", [7, b"bytes", Path("x")])
def test_names_are_strings(bad: object) -> None:
    with pytest.raises(TypeError):
        SharedRegion.create(4096, name=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        SharedRegion.open(bad)  # type: ignore[arg-type]


def test_nobody_sees_a_half_made_region(name: str) -> None:
    def maker() -> None:
        for _ in range(150):
            region = SharedRegion.create(20_000, name=name)
            region.unlink()
            region.close()

    children = [fork(maker)]
    seen = 0
    while os.waitpid(children[0], os.WNOHANG)[0] == 0:
        try:
            region = SharedRegion.open(name)
        except FileNotFoundError:
            continue
        assert region.size == 20_000
        region.close()
        seen += 1
    assert not (SHM / name).exists()


def test_one_of_many_creators_wins(name: str) -> None:
    def racer() -> None:
        while tally.load_u64(0) == 0:
            pass
        try:
            SharedRegion.create(4096, name=name).close()
            tally.fetch_add_u64(8, 1)
        except FileExistsError:
            tally.fetch_add_u64(16, 1)

    with SharedRegion.create(4096) as tally:
        children = [fork(racer) for _ in range(8)]
        tally.store_u64(0, 1)
        join(*children)
        assert (tally.load_u64(8), tally.load_u64(16)) == (1, 7)


def test_a_killed_creator_leaves_nothing_behind(name: str) -> None:
    def maker() -> None:
        while True:
            region = SharedRegion.create(1 << 20, name=name)
            tally.fetch_add_u64(0, 1)
            region.unlink()
            region.close()

    before = entries()
    with SharedRegion.create(4096) as tally:
        for round in range(40):
            pid = fork(maker)
            goal = tally.load_u64(0) + 1 + round % 3
            while tally.load_u64(0) < goal:
                pass
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert entries() - before <= {SHM / name}
            if (SHM / name).exists():  # killed between the two: whole, then
                with SharedRegion.open(name) as region:
                    region.unlink()


def test_a_file_system_without_unnamed_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = entries()
    really_open = os.open

    def open_without(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", open_without)
    with SharedRegion.create(10_000, name=name) as region:
        assert entries() - before == {SHM / name}
        assert os.fstat(region.fd).st_nlink == 1
        assert os.fstat(region.fd).st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError):
            SharedRegion.create(10_000, name=name)
        with pytest.raises(RegionFull):
            SharedRegion.create(1 << 46, name=name + "-large")
        region.unlink()
    assert entries() == before


def test_no_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.segment.FOLDER", "/nowhere/shm")
    with pytest.raises(FileNotFoundError, match="create the region without a name"):
        SharedRegion.create(4096, name="x")
    with pytest.raises(FileNotFoundError, match="no region"):
        SharedRegion.open("x")
    SharedRegion.create(4096).close()


def test_from_fd(region: SharedRegion) -> None:
    other = SharedRegion.from_fd(region.fd)
    assert other.fd != region.fd
    assert other.size == region.size
    other.write_at(3, b"shared")
    assert region.read_at(3, 6) == b"shared"
    other.unlink()  # nothing to do
    other.close()
    os.fstat(region.fd)


def test_from_fd_bad_descriptors() -> None:
    for bad, error in (
        (-1, ValueError),
        (2**31, ValueError),
        (2**70, ValueError),
        ("3", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error):
            SharedRegion.from_fd(bad)  # type: ignore[arg-type]
    ours, theirs = os.pipe()
    try:
        with pytest.raises(ValueError, match="regular"):
            SharedRegion.from_fd(ours)
    finally:
        os.close(ours)
        os.close(theirs)
    with pytest.raises(OSError):
        SharedRegion.from_fd(theirs)


def test_from_fd_read_only(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(PermissionError):
            SharedRegion.from_fd(fd)
    finally:
        os.close(fd)
    assert mappings() == []


# ---- files that are not regions ------------------------------------------------------------------


def damage(at: int, value: int, form: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        with file.open("r+b") as stream:
            stream.seek(at)
            stream.write(struct.pack(form, value))

    return write


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda file: os.truncate(file, 0), "0 bytes"),
    "half a header": (lambda file: os.truncate(file, 2000), "2000 bytes"),
    "header only": (lambda file: os.truncate(file, 4096), "truncated.*4096.*16384"),
    "last page missing": (lambda file: os.truncate(file, 16383), "truncated.*16383.*16384"),
    "zeros": (lambda file: file.write_bytes(bytes(16384)), "begins with 0x0000"),
    "text": (lambda file: file.write_bytes(b"#!/bin/sh\n" * 2000), "begins with"),
    "another version": (damage(8, 99, "I"), "version 99, expected 1"),
    "another header": (damage(12, 8192, "I"), "header of 8192|8192 bytes of header"),
    "no data": (damage(16, 0, "Q"), "damaged"),
    "more data than reserved": (damage(16, 2**63, "Q"), "damaged"),
    "data that overflows": (damage(16, 2**64 - 1, "Q"), "damaged"),
    "a huge reservation": (damage(24, 2**63, "Q"), "damaged"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_not_a_region(file: Path, kind: str) -> None:
    make, message = BAD_FILES[kind]
    make(file)
    with pytest.raises(ValueError, match=message) as caught:
        SharedRegion.open(file.name)
    assert str(file) in str(caught.value)
    fd = os.open(file, os.O_RDWR)
    try:
        with pytest.raises(ValueError, match=message):
            SharedRegion.from_fd(fd)
    finally:
        os.close(fd)
    assert mappings() == []


def test_a_name_that_is_no_file(name: str) -> None:
    path = SHM / name
    path.mkdir()
    with pytest.raises(ValueError, match="regular"):
        SharedRegion.open(name)
    with pytest.raises(FileExistsError):
        SharedRegion.create(4096, name=name)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="regular"):
        SharedRegion.open(name)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="regular"):
        SharedRegion.open(name)
    with pytest.raises(FileExistsError):
        SharedRegion.create(4096, name=name)


def test_a_file_of_another_user(file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(file, 12345, -1)
    with pytest.raises(PermissionError, match="user 12345"):
        SharedRegion.open(file.name)


def test_a_larger_file_is_room_to_grow(file: Path) -> None:
    os.truncate(file, 1 << 20)
    with SharedRegion.open(file.name) as region:
        assert region.size == 10_000


# ---- no memory -----------------------------------------------------------------------------------


def test_more_memory_than_there_is() -> None:
    with pytest.raises(
        RegionFull, match=r"needs \d+ bytes more, but \d+ bytes of memory are available"
    ) as caught:
        SharedRegion.create(1 << 46)
    assert isinstance(caught.value, MemoryError)
    assert mappings() == []


def test_more_than_the_file_system_has(name: str) -> None:
    """In a mount namespace of its own, with a /dev/shm of one MiB."""
    code = f"""
import os, sys
from runtime import RegionFull, SharedRegion
before = len(os.listdir("/proc/self/fd"))
for _ in range(3):
    try:
        SharedRegion.create(4 << 20, name={name!r})
    except RegionFull as error:
        assert "4198400 bytes more" in str(error) and "1048576 bytes available" in str(error), error
    else:
        sys.exit("no error")
    assert os.listdir("/dev/shm") == [], os.listdir("/dev/shm")
    assert os.statvfs("/dev/shm").f_bfree == 256
assert len(os.listdir("/proc/self/fd")) == before
with SharedRegion.create(900_000, name={name!r}) as small:
    small.write_at(0, b"x" * 900_000)
    small.unlink()
SharedRegion.create(8 << 20).close()
"""
    script = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$0" -c "$1"'
    arguments = ["unshare", "-m", "sh", "-c", script, sys.executable, code]
    try:
        probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare command")
    if probe.returncode:
        pytest.skip(f"no right to mount a tmpfs: {probe.stderr.decode().strip()}")
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("handled", [True, False], ids=["as Python has it", "by the default"])
def test_more_than_a_file_may_have(handled: bool) -> None:
    """RLIMIT_FSIZE comes with a signal, whose default would end the process."""
    code = f"""
import resource, signal, runtime
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
if not {handled}:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
for name in (None, "runtime-test-never-made"):
    try:
        runtime.SharedRegion.create(4 << 20, name=name)
    except runtime.RegionFull as error:
        print(error)
runtime.SharedRegion.create(1 << 19).close()
assert signal.sigpending() == set()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("files of this process may have 1048576 (RLIMIT_FSIZE, ulimit -f)") == 2


def test_signals_do_not_disturb_the_reservation() -> None:
    hits = []
    old = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(3):
            with SharedRegion.create(48 << 20) as region:
                assert os.fstat(region.fd).st_blocks * 512 >= 48 << 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert hits


def test_a_signal_handler_that_raises_ends_the_reservation() -> None:
    class Enough(Exception):
        pass

    def enough(*_: object) -> None:
        raise Enough

    old = signal.signal(signal.SIGALRM, enough)
    try:
        with pytest.raises(Enough):
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            while True:
                SharedRegion.create(64 << 20).close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert mappings() == []


# ---- how much memory there is --------------------------------------------------------------------

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
V2 = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 20 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def tree(root: Path, files: dict[str, str]) -> str:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return str(root)


def test_available_memory_of_the_machine(tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, {"proc/meminfo": MEMINFO})) == 8_000_000 * 1024
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_available_memory_without_any_knowledge(tmp_path: Path) -> None:
    assert available_memory(str(tmp_path)) == 2**63 - 1
    tree(tmp_path, {"proc/meminfo": "garbage\n", "proc/self/cgroup": "x", "proc/self/mountinfo": "y z\n"})
    assert available_memory(str(tmp_path)) == 2**63 - 1


def test_available_memory_in_cgroup_v2(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "5000\n",
            "sys/fs/cgroup/a/memory.max": "1000000\n",
            "sys/fs/cgroup/a/memory.current": "900000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1\nfile 500000\nshmem 200000\n"
            "inactive_file 200000\nactive_file 100000\n",
        },
    )
    assert available_memory(root) == 400_000, "the ancestor's limit, less what cannot be dropped"
    room, source = memory_room(root)
    assert (room, source) == (400_000, str(tmp_path / "sys/fs/cgroup/a/memory.max"))
    (tmp_path / "sys/fs/cgroup/a/b/memory.max").write_text("6000\n")
    assert available_memory(root) == 1000
    (tmp_path / "sys/fs/cgroup/a/b/memory.max").write_text("4000\n")
    assert available_memory(root) == 0, "over the limit, not negative"


def test_available_memory_in_cgroup_v1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/box"
    root = tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/box\n0::/\n",
            "proc/self/mountinfo": V1,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "123\n",
            f"{group}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{group}/memory.usage_in_bytes": "300000\n",
            f"{group}/memory.stat": "inactive_file 9\ntotal_inactive_file 50000\ntotal_active_file 50000\n",
        },
    )
    assert available_memory(root) == 8_000_000 * 1024, "a value near 2^63 is no limit"
    (tmp_path / group / "memory.limit_in_bytes").write_text("1000000\n")
    assert available_memory(root) == 800_000
