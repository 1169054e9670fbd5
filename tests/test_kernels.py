"""Kernels: how they are found, what run_kernel makes of them, what deaths leave.

The C library of kernels.c is compiled once. What has to be slow waits at a gate, a word in a file that both
sides map: nothing here depends on time.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import gc
import importlib.util
import math
import mmap
import os
import pickle
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import all_ready, fork, join, send, until

import runtime
from runtime import Kernel, KernelFailed, Runtime, TaskTimeout, WorkerDied, _core, jobs, native
from runtime.config import TaskOptions

np = pytest.importorskip("numpy")
numba: Any = importlib.import_module("numba") if importlib.util.find_spec("numba") else None
if numba is not None:  # now, not in a test: its compiler starts a thread that stays
    numba.cfunc("int32(int32)")(lambda x: x)
PAGE = 4096
COMPILER = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C compiler")

CRC, COUNT, HISTOGRAM, SUM, MINMAX, COPY, AXPY = (
    Kernel(f"runtime:{name}")
    for name in ("crc32", "count_byte", "histogram_u8", "sum_f64", "minmax_f64", "copy", "axpy_f64")
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """kernels.c, compiled."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("kernels") / "libkernels.so"
    source = Path(__file__).with_name("kernels.c")
    subprocess.run([*COMPILER, "-O1", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return str(path)


class Doorway:
    """The gate of kernels.c."""

    def __init__(self, folder: Path) -> None:
        path = folder / "doorway"
        path.write_bytes(bytes(16))
        self.params = os.fsencode(path) + b"\0"
        with open(path, "r+b") as file:
            self.words = mmap.mmap(file.fileno(), 16)

    @property
    def entered(self) -> int:
        """Grains that have come so far."""
        return int(struct.unpack_from("q", self.words, 8)[0])

    def wait(self, count: int) -> None:
        until(lambda: self.entered >= count, lambda: f"{self.entered} of {count} are there")

    def open(self) -> None:
        struct.pack_into("q", self.words, 0, 1)

    def shut(self) -> None:
        struct.pack_into("q", self.words, 0, 0)

    def close(self) -> None:
        self.open()
        self.words.close()


@pytest.fixture
def doorway(tmp_path: Path) -> Iterator[Doorway]:
    doorway = Doorway(tmp_path)
    yield doorway
    doorway.close()


def background(run: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """What it returns, in a thread."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def body() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


def kill_one(rt: Runtime) -> int:
    """SIGKILL to a worker that is ready; its pid."""

    def found() -> int | None:
        return next((w.pid for w in rt.workers() if w.status.name == "READY" and w.task is not None), None)

    pid: int = until(found, "a worker that is at work")
    send(pid, signal.SIGKILL)
    return pid


# ---- finding them ------------------------------------------------------------------------------------


def test_names_of_the_package() -> None:
    assert repr(CRC) == "<Kernel runtime:crc32>"
    with pytest.raises(LookupError, match=r"no C function 'nonsense'; it has axpy_f64, copy, .*crc32"):
        Kernel("runtime:nonsense")
    with pytest.raises(ModuleNotFoundError):
        Kernel("no_such_module_anywhere:name")
    with pytest.raises(LookupError, match="it has none"):
        Kernel("json:dumps")
    for name in ("", "crc32", "runtime:", ":crc32"):
        with pytest.raises(ValueError, match="named as"):
            Kernel(name)


def test_a_cython_module() -> None:
    kernel = Kernel("runtime._builtin:crc32", partial=4)
    with Runtime(1) as rt:
        assert rt.run_kernel(kernel, b"some bytes") == [struct.pack("I", zlib.crc32(b"some bytes"))]


def test_another_signature_shows_both() -> None:
    with pytest.raises(TypeError) as caught:
        Kernel("runtime._extent:heap_free")
    assert "int (const void *, size_t" in str(caught.value) and "heap_t" in str(caught.value)


def test_libraries(library: str, pool: Runtime) -> None:
    data = os.urandom(100_000)
    for kernel in (
        Kernel.from_library(library, "upper"),
        Kernel.from_library(Path(library), "upper"),
        Kernel.from_ctypes(ctypes.CDLL(library).upper),
    ):
        out = bytearray(len(data))
        assert pool.run_kernel(kernel, data, out, grain=PAGE) is None
        assert out == data.upper()
    with pytest.raises(LookupError, match="no symbol 'lower'"):
        Kernel.from_library(library, "lower")
    with pytest.raises(OSError, match="no_such"):
        Kernel.from_library("/no_such/library.so", "upper")
    with pytest.raises(LookupError):
        Kernel.from_library("libc.so.6", "no_such_function")
    with pytest.raises(LookupError, match=r"'environ' .* is no function"):
        Kernel.from_library("libc.so.6", "environ")
    assert Kernel.from_library(os.fsencode(library), "upper").name == f"{library}:upper"


def test_the_example_package(tmp_path: Path) -> None:
    """Built against this package, into a folder of its own, and found by a worker there."""
    pytest.importorskip("Cython")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("no C compiler")
    root = Path(__file__).resolve().parent.parent
    source = shutil.copytree(root / "examples" / "kernel_package", tmp_path / "source")
    (tmp_path / "check.py").write_text(EXAMPLE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(tmp_path / "built")])}
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "built")]
    subprocess.run(build, cwd=source, env=env, check=True, timeout=300)
    subprocess.run(
        [sys.executable, str(tmp_path / "check.py")], cwd=tmp_path, env=env, check=True, timeout=60
    )


EXAMPLE = """
import runtime

with runtime.Runtime(2) as rt:
    image = bytes(range(256)) * 100
    out = bytearray(len(image))
    rt.run_kernel(runtime.Kernel("brighten.kernels:brighten"), image, out, params=b"\\x20", grain=4096)
    assert out == bytes(min(255, pixel + 0x20) for pixel in image)
"""


def test_functions_of_ctypes_that_are_none() -> None:
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p, ctypes.c_size_t] * 2, ctypes.c_void_p)
    with pytest.raises(LookupError, match="no other process"):
        Kernel.from_ctypes(kind(lambda *_: 0))
    short = ctypes.CDLL("libc.so.6").abs
    short.argtypes = [ctypes.c_int]
    with pytest.raises(TypeError, match="c_int"):
        Kernel.from_ctypes(short)
    with pytest.raises(TypeError, match="function of ctypes"):
        Kernel.from_ctypes(len)


def test_types_that_ctypes_was_told(library: str) -> None:
    """A function that was told none cannot be checked; all that differ from a kernel's are refused."""

    def told(result: Any, *arguments: Any) -> Any:
        function = ctypes.CDLL(library).upper
        function.restype, function.argtypes = result, list(arguments)
        return function

    word, number = ctypes.c_void_p, ctypes.c_size_t
    doubles = ctypes.POINTER(ctypes.c_double)
    for arguments in (
        (word, number, word, number, word),
        (doubles, number, ctypes.c_char_p, number, doubles),
    ):
        assert Kernel.from_ctypes(told(ctypes.c_int, *arguments)).name == f"{library}:upper"
    for result, *others in (
        (ctypes.c_double, word, number, word, number, word),
        (None, word, number, word, number, word),
        (ctypes.c_int, number, word, number, word, word),
        (ctypes.c_int, word, ctypes.c_int, word, ctypes.c_int, word),
        (ctypes.c_int, word, number),
    ):
        with pytest.raises(TypeError, match=r"a kernel is int .*; this function is \w+ \("):
            Kernel.from_ctypes(told(result, *others))


def test_numba(pool: Runtime) -> None:
    if numba is None:
        pytest.skip("numba is not installed")
    types = numba.types
    shift = 3

    @numba.cfunc(types.intc(types.voidptr, types.uintp, types.voidptr, types.uintp, types.voidptr))
    def shifted(src: Any, n: int, dst: Any, m: int, params: Any) -> int:
        numba.carray(dst, (m,), numba.uint8)[:] = numba.carray(src, (n,), numba.uint8) + shift
        return 0

    data = np.arange(50_000, dtype=np.uint8)
    out = np.empty_like(data)
    pool.run_kernel(pickle.loads(pickle.dumps(Kernel.from_numba(shifted))), data, out, grain=PAGE)
    assert np.array_equal(out, data + shift)

    @numba.cfunc(types.float64(types.float64))
    def wrong(x: float) -> float:
        return x

    with pytest.raises(TypeError, match="float64"):
        Kernel.from_numba(wrong)
    with pytest.raises(TypeError):
        Kernel.from_numba(len)


def test_scipy(library: str, pool: Runtime) -> None:
    scipy = pytest.importorskip("scipy")
    function = ctypes.CDLL(library).upper
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t] * 2 + [ctypes.c_void_p]
    function.restype = ctypes.c_int
    out = bytearray(3)
    pool.run_kernel(Kernel.from_scipy(scipy.LowLevelCallable(function)), b"abc", out)
    assert out == b"ABC"
    with pytest.raises(ValueError, match="user_data"):
        Kernel.from_scipy(scipy.LowLevelCallable(function, ctypes.c_void_p(1)))
    with pytest.raises(LookupError):
        Kernel.from_scipy(scipy.LowLevelCallable.from_cython(runtime._builtin, "crc32"))


def test_names_that_are_no_text(library: str) -> None:
    with pytest.raises(TypeError, match="name must be text, not int"):
        Kernel(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="symbol must be text, not bytes"):
        Kernel.from_library(library, b"upper")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LowLevelCallable"):
        Kernel.from_scipy(())


def test_arguments_of_kernels(library: str) -> None:
    for wrong in (-1, 1 << 32):
        with pytest.raises(ValueError, match="partial"):
            Kernel.from_library(library, "upper", partial=wrong)
    with pytest.raises(TypeError, match="partial"):
        Kernel.from_library(library, "upper", partial=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="combine"):
        Kernel.from_library(library, "upper", partial=8, combine=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="combine"):
        Kernel.from_library(library, "upper", combine=len)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inout"):
        Kernel.from_library(library, "upper", partial=8, inout=True)
    with pytest.raises(ValueError, match="its own"):
        Kernel("runtime:crc32", partial=4)


def test_pickling(library: str) -> None:
    kernel = pickle.loads(pickle.dumps(Kernel.from_library(library, "add_up", partial=8, combine=total)))
    assert (kernel.partial, kernel.combine, kernel.inout) == (8, total, False)
    assert repr(pickle.loads(pickle.dumps(AXPY))) == "<Kernel runtime:axpy_f64>"


def total(parts: list[bytes], lengths: list[int]) -> int:
    return sum(int.from_bytes(part, "little") for part in parts)


# ---- what runs over what -----------------------------------------------------------------------------


def test_sources_and_targets_of_all_origins(pool: Runtime, tmp_path: Path) -> None:
    data = os.urandom(3 * PAGE + 5)
    (tmp_path / "data").write_bytes(data)
    with (
        open(tmp_path / "data", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        locked = np.frombuffer(data, np.uint8)
        born = pool.empty(len(data), np.uint8)
        born[:] = locked
        put = pool.put(locked)
        result = pool.submit(bytes_of, locked).result()
        odd = pool.alloc(len(data) + 1)[1:]
        odd[:] = data
        sources = [data, bytearray(data), locked, born, put, put.get(), mapped, memoryview(data), result, odd]
        for src in sources:
            targets = [bytearray(len(data)), np.zeros_like(born), pool.empty(len(data), np.uint8)]
            targets += [pool.alloc(len(data) + 1)[1:], pool.submit(bytes_of, np.zeros_like(born)).result()]
            for dst in targets:
                pool.run_kernel(COPY, src, dst, grain=PAGE)
                assert bytes(dst) == data
                assert pool.run_kernel(CRC, src) == zlib.crc32(data)
        del sources, src, mapped


def bytes_of(array: Any) -> Any:
    return array.copy()


def test_arrays_of_any_type_are_their_bytes(pool: Runtime) -> None:
    for array in (
        np.arange(6000.0).reshape(2, 3, 1000),
        np.zeros(999, [("a", "i4"), ("b", ">f8")]),
        np.array(7),
    ):
        assert pool.run_kernel(CRC, array) == zlib.crc32(array.tobytes())


def test_buffers_that_are_not_fit(pool: Runtime) -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        pool.run_kernel(CRC, np.zeros((10, 10))[:, 1])
    with pytest.raises(ValueError, match="C-contiguous"):
        pool.run_kernel(CRC, np.zeros((10, 10)).T)
    with pytest.raises(ValueError, match="C-contiguous"):
        pool.run_kernel(COPY, bytes(5), np.zeros(10, np.uint8)[::2])
    with pytest.raises(TypeError, match="read-only"):
        pool.run_kernel(COPY, bytes(5), bytes(5))
    with pytest.raises(TypeError, match="src must be a buffer"):
        pool.run_kernel(CRC, "text")
    with pytest.raises(TypeError):
        pool.run_kernel(len, b"")  # type: ignore[arg-type]


def test_ratios(library: str, pool: Runtime) -> None:
    kernel = Kernel.from_library(library, "stretch")
    src = np.repeat(np.arange(1, 9, dtype=np.uint8), 3 * PAGE)
    for times in (1, 2, 5):
        dst = np.zeros(src.size * times, np.uint8)
        pool.run_kernel(kernel, src, dst, grain=3 * PAGE)
        assert np.array_equal(dst, np.repeat(src, times))
    for over in (2, 3, 8):
        dst = np.zeros(src.size // over, np.uint8)
        pool.run_kernel(kernel, src, dst, grain=1)  # a page of dst at least
        first = src[:: PAGE * over]
        assert np.array_equal(dst, np.repeat(first, PAGE)[: dst.size])
    for length in (0, 1000, src.size + 1, 2 * src.size - 1):
        with pytest.raises(ValueError, match="whole multiple or a whole fraction"):
            pool.run_kernel(kernel, src, np.zeros(length, np.uint8))
    with pytest.raises(ValueError, match="as long as src"):
        pool.run_kernel(COPY, bytes(10), bytearray(20))
    with pytest.raises(ValueError, match="takes no dst"):
        pool.run_kernel(CRC, bytes(10), bytearray(10))
    with pytest.raises(ValueError, match="needs a dst"):
        pool.run_kernel(COPY, bytes(10))


def test_in_place(pool: Runtime) -> None:
    for array in (np.arange(5000.0), pool.empty(5000)):
        array[:] = np.arange(5000.0)
        with pytest.raises(ValueError, match="inout"):
            pool.run_kernel(COPY, array, array)
        with pytest.raises(ValueError, match="in part"):
            pool.run_kernel(AXPY, array[1:], array[:-1], params=struct.pack("d", 1))
        pool.run_kernel(AXPY, array, array, params=struct.pack("d", 1), grain=PAGE)
        assert np.array_equal(array, 2 * np.arange(5000.0))


def test_in_place_by_a_view_that_is_read_only(pool: Runtime) -> None:
    for array in (np.ones(3000), pool.empty(3000)):
        array[:] = 1
        view = array.view()
        view.flags.writeable = False
        kernel, params = Kernel("runtime:axpy_f64"), struct.pack("d", 2.0)
        pool.run_kernel(kernel, view, array, params=params)
        assert (array == 3).all()
        assert pool.submit(kernel, view, array, params=params).result() is None
        assert (array == 9).all()


def test_partials(library: str, pool: Runtime) -> None:
    kernel = Kernel.from_library(library, "lengths", partial=24)
    parts = pool.run_kernel(kernel, bytes(5 * PAGE + 1), grain=2 * PAGE)
    assert [struct.unpack("3Q", part) for part in parts] == [
        (2 * PAGE, 24, 1), (2 * PAGE, 24, 1), (PAGE + 1, 24, 1),
    ]  # fmt: skip
    seen: list[Any] = []

    def combine(parts: list[bytes], lengths: list[int]) -> str:
        seen.append((len(parts), lengths, threading.current_thread()))
        return "combined"

    kernel = Kernel.from_library(library, "lengths", partial=24, combine=combine)
    assert pool.run_kernel(kernel, bytes(3 * PAGE), grain=2 * PAGE) == "combined"
    assert pool.run_kernel(kernel, b"") == "combined"
    assert seen == [(2, [2 * PAGE, PAGE], threading.current_thread()), (0, [], threading.current_thread())]


def test_nothing(pool: Runtime) -> None:
    empty = np.empty((0, 3))
    assert pool.run_kernel(CRC, b"") == 0 and pool.run_kernel(COUNT, empty, params=b"a") == 0
    assert pool.run_kernel(HISTOGRAM, b"") == [0] * 256
    assert pool.run_kernel(SUM, empty) == 0.0 and pool.run_kernel(MINMAX, empty) == (math.inf, -math.inf)
    assert pool.run_kernel(COPY, b"", bytearray()) is None
    assert pool.submit(CRC, b"").result() == 0
    with pytest.raises(ValueError):
        pool.run_kernel(COPY, b"", bytearray(5))


@pytest.mark.parametrize(
    ("grain", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_grains_that_are_none(pool: Runtime, grain: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="grain"):
        pool.run_kernel(CRC, b"abc", grain=grain)


def test_grains_are_whole_pages_and_adapt(library: str, factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    kernel = Kernel.from_library(library, "lengths", partial=24)
    src = rt.alloc(256 * PAGE)

    def sizes(**kwargs: Any) -> list[int]:
        return [struct.unpack("3Q", part)[0] for part in rt.run_kernel(kernel, src, **kwargs)]

    assert sizes() == [8 * PAGE] * 32  # sixteen for each of two workers
    assert sizes(grain=1) == [PAGE] * 256
    assert sizes(grain=PAGE + 1) == [2 * PAGE] * 128
    assert sizes(grain=1 << 70) == [256 * PAGE]
    rt._rates[kernel._spec] = 100_000 / PAGE / 2  # ns per byte: so two pages take the least time for a grain
    assert sizes() == [2 * PAGE] * 128
    rt._rates[kernel._spec] = 1e9
    assert sizes() == [PAGE] * 256
    src = rt.alloc(100)
    assert sizes() == [100]


def test_what_is_soon_done_wakes_one_participant(
    library: str, factory: Callable[..., Runtime], doorway: Doorway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others, if it takes longer than the last time."""
    rt = factory(2)
    kernel, data = Kernel.from_library(library, "forever"), bytes(2 * PAGE)
    before = rt.stats().done
    monkeypatch.setattr(native, "_SOON", 60.0)
    rt._rates[kernel._spec] = 1e-9
    doorway.open()
    rt.run_kernel(kernel, data, params=doorway.params, grain=PAGE)
    assert rt.stats().done == before + 1
    doorway.shut()
    monkeypatch.undo()
    rt._rates[kernel._spec] = 1e-9
    job = background(lambda: rt.run_kernel(kernel, data, params=doorway.params, grain=PAGE))
    doorway.wait(2 + 2)
    doorway.open()
    assert job.result(30) is None


def test_submit(library: str, pool: Runtime) -> None:
    data = os.urandom(20_000)
    out = bytearray(len(data))
    assert pool.submit(Kernel.from_library(library, "upper"), data, dst=out).result() is None
    assert out == data.upper()
    assert pool.submit(COUNT, data, params=b"x").result() == data.count(b"x")
    assert pool.options(priority=5).submit(CRC, data).result() == zlib.crc32(data)
    assert isinstance(pool.submit(CRC, "text").exception(), TypeError)
    assert isinstance(pool.submit(CRC).exception(), TypeError)
    assert isinstance(pool.submit(COPY, b"abc", bytearray(1)).exception(), ValueError)
    failed = pool.submit(
        Kernel.from_library(library, "picky"), b"\xff", params=struct.pack("i", 5)
    ).exception()
    assert isinstance(failed, KernelFailed) and failed.code == 5


@pytest.mark.parametrize("submit", [False, True])
def test_room_that_others_are_about_to_make(
    submit: bool,
    library: str,
    factory: Callable[..., Runtime],
    doorway: Doorway,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job before holds what it lay in until its last participant has ended: no RegionFull for that."""
    rt = factory(1, region_max="16MiB")
    before = rt.submit(Kernel.from_library(library, "forever"), bytes(9 << 20), params=doorway.params)
    doorway.wait(1)
    wait = rt._pressure.wait

    def opened(attempt: Callable[[], bool]) -> bool:
        doorway.open()
        return wait(attempt)

    monkeypatch.setattr(rt._pressure, "wait", opened)
    data = bytes(9 << 20)
    got = rt.submit(CRC, data).result() if submit else rt.run_kernel(CRC, data)
    assert got == zlib.crc32(data)
    before.result()
    with pytest.raises(runtime.RegionFull):
        rt.run_kernel(CRC, bytes(17 << 20))


def test_many_at_once(pool: Runtime) -> None:
    data = os.urandom(200_000)
    futures = [pool.submit(CRC, data[i:]) for i in range(50)]
    jobs = [background(lambda i=i: pool.run_kernel(CRC, data[i:], grain=PAGE)) for i in range(8)]  # type: ignore[misc]
    assert [future.result() for future in futures] == [zlib.crc32(data[i:]) for i in range(50)]
    assert [job.result() for job in jobs] == [zlib.crc32(data[i:]) for i in range(8)]


# ---- what is built in --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=40_000), grain=st.integers(1, 5 * PAGE), shift=st.integers(0, 9))
def test_bytes_as_zlib_and_numpy(shared: Runtime, data: bytes, grain: int, shift: int) -> None:
    data = data[shift:]
    assert shared.run_kernel(CRC, data, grain=grain) == zlib.crc32(data)
    assert shared.run_kernel(COUNT, data, params=b"\x01", grain=grain) == data.count(1)
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256).tolist()
    assert shared.run_kernel(HISTOGRAM, data, grain=grain) == counts


def test_crc_of_many_lengths(pool: Runtime) -> None:
    data = os.urandom(3 * PAGE + 70)
    for length in [*range(70), *range(PAGE - 2, PAGE + 3), *range(3 * PAGE, len(data) + 1)]:
        assert pool.run_kernel(CRC, data[:length], grain=PAGE) == zlib.crc32(data[:length])


def test_sums_have_the_same_bits(factory: Callable[..., Runtime]) -> None:
    numbers = np.random.default_rng(7).standard_normal(700_003) * 10.0 ** np.random.default_rng(8).integers(
        -200, 200, 700_003
    )
    found = set()
    for workers in (1, 2, 3):
        rt = factory(workers)
        for grain in (4096, 8192, 1 << 20, None):
            found.add(struct.pack("d", rt.run_kernel(SUM, numbers, grain=grain)))
        found.add(struct.pack("d", rt.submit(SUM, numbers).result()))
        rt.shutdown()
    assert len(found) == 1
    assert struct.unpack("d", found.pop())[0] == pytest.approx(math.fsum(numbers), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16, 17, 511, 512, 513, 5000])
def test_doubles(pool: Runtime, count: int) -> None:
    numbers = np.random.default_rng(count).standard_normal(count)
    assert pool.run_kernel(SUM, numbers, grain=PAGE) == pytest.approx(math.fsum(numbers), abs=1e-9)
    assert pool.run_kernel(MINMAX, numbers, grain=PAGE) == (numbers.min(), numbers.max())
    for at in {0, count // 2, count - 1}:
        for value in (math.inf, -math.inf, math.nan):
            changed = numbers.copy()
            changed[at] = value
            pair = (changed.min(), changed.max())
            assert np.array_equal(pool.run_kernel(MINMAX, changed, grain=PAGE), pair, equal_nan=True)
            assert np.array_equal(pool.run_kernel(SUM, changed), changed.sum(), equal_nan=True)
    y = np.ones(count)
    pool.run_kernel(AXPY, numbers, y, params=struct.pack("d", 2.5), grain=PAGE)
    assert np.array_equal(y, 1 + 2.5 * numbers)


def test_doubles_that_are_none(pool: Runtime) -> None:
    for kernel in (SUM, MINMAX):
        with pytest.raises(ValueError, match="whole items of 8 bytes"):
            pool.run_kernel(kernel, bytes(15))
    with pytest.raises(ValueError, match="8 bytes of params"):
        pool.run_kernel(AXPY, bytes(8), bytearray(8), params=b"abc")
    with pytest.raises(ValueError, match="1 bytes of params"):
        pool.run_kernel(COUNT, bytes(8))
    with pytest.raises(TypeError):
        pool.run_kernel(COUNT, bytes(8), params="x")


# ---- when it goes wrong ------------------------------------------------------------------------------


def test_a_code(library: str, pool: Runtime) -> None:
    kernel = Kernel.from_library(library, "picky")
    src = bytearray(40 * PAGE)
    src[6 * PAGE] = 255
    for code in (1, -1, 2**31 - 1, -(2**31)):
        with pytest.raises(KernelFailed) as caught:
            pool.run_kernel(kernel, src, params=struct.pack("i", code), grain=2 * PAGE)
        assert (caught.value.code, caught.value.grain, caught.value.offset) == (code, 3, 6 * PAGE)
        assert pickle.loads(pickle.dumps(caught.value)).code == code
    assert pool.run_kernel(kernel, bytes(PAGE), params=struct.pack("i", 1)) is None


def test_a_code_stops_the_others(library: str, pool: Runtime) -> None:
    kernel = Kernel.from_library(library, "picky")
    src = pool.alloc(1000 * PAGE)
    src[:] = b"\xff" * len(src)
    with pytest.raises(KernelFailed) as caught:
        pool.run_kernel(kernel, src, params=struct.pack("i", 9), grain=PAGE)
    assert caught.value.grain < 1000 and caught.value.offset == caught.value.grain * PAGE


@pytest.mark.parametrize("size", [4, 1000, 100_000])
def test_params_of_any_size(library: str, pool: Runtime, size: int) -> None:
    """They travel within the task's lease, in a block, as a pickle."""
    params = struct.pack("i", 7).ljust(size, b"\0")
    for _ in range(2):  # the second time the worker knows the function, and the kernel
        with pytest.raises(KernelFailed) as caught:
            pool.run_kernel(Kernel.from_library(library, "picky"), b"\xff" * PAGE, params=params)
        assert caught.value.code == 7


def test_timeout_of_a_kernel_that_never_returns(
    library: str, factory: Callable[..., Runtime], doorway: Doorway
) -> None:
    rt = factory(2)
    before = all_ready(rt)
    kernel = Kernel.from_library(library, "forever")
    with pytest.raises(TaskTimeout, match="0 of 4 grains"):
        rt.run_kernel(kernel, bytes(4 * PAGE), params=doorway.params, grain=PAGE, timeout=0.3)
    until(lambda: not {*all_ready(rt).values()} & {*before.values()}, "both workers are replaced")
    assert rt.run_kernel(CRC, b"abc") == zlib.crc32(b"abc")
    with pytest.raises(TaskTimeout):
        rt.options(timeout=0.2).submit(kernel, bytes(10), params=doorway.params).result()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="timeout"):
            rt.run_kernel(CRC, b"abc", timeout=wrong)


def test_ctrl_c(library: str, factory: Callable[..., Runtime], doorway: Doorway) -> None:
    rt = factory(2)
    kernel = Kernel.from_library(library, "forever")

    def interrupt() -> None:
        doorway.wait(2)
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    helper = background(interrupt)
    with pytest.raises(KeyboardInterrupt):
        rt.run_kernel(kernel, bytes(40 * PAGE), params=doorway.params, grain=PAGE)
    helper.result()
    assert rt.stats().kernels == ()
    assert rt.run_kernel(CRC, b"abc") == zlib.crc32(b"abc")


def test_cancelling(library: str, factory: Callable[..., Runtime], doorway: Doorway) -> None:
    rt = factory(1)
    kernel = Kernel.from_library(library, "forever")
    running = rt.submit(kernel, bytes(10), params=doorway.params)
    waiting = rt.submit(CRC, b"abc")
    doorway.wait(1)
    assert running.running() and not waiting.running()
    assert waiting.cancel() and waiting.cancelled() and not running.cancel()
    assert rt.cancel(running, running=True)
    with pytest.raises(runtime.TaskCancelled):
        running.result()
    assert rt.submit(CRC, b"abc").result() == zlib.crc32(b"abc")
    assert rt.stats().kernels == ()


def test_what_has_run_cannot_be_cancelled(library: str, factory: Callable[..., Runtime]) -> None:
    combining, go_on = threading.Event(), threading.Event()

    def combine(parts: list[bytes], lengths: list[int]) -> int:
        combining.set()
        assert go_on.wait(30)
        return 7

    rt = factory(1)
    future = rt.submit(Kernel.from_library(library, "lengths", partial=24, combine=combine), b"abc")
    assert combining.wait(30)
    assert future.running() and not future.cancel() and not future.done()
    go_on.set()
    assert future.result() == 7 and not future.running() and not future.cancel()


def test_futures_of_kernels_that_failed_are_let_go_of(library: str, pool: Runtime) -> None:
    failing, code = Kernel.from_library(library, "picky"), struct.pack("i", 5)
    gone = []
    for _ in range(20):
        future = pool.submit(failing, b"\xff" * PAGE, params=code)
        assert isinstance(future.exception(), KernelFailed)
        gone.append(weakref.ref(future))
        del future
    until(lambda: gc.collect() >= 0 and sum(ref() is not None for ref in gone) <= 1, "they are gone")


def test_shutdown(library: str, factory: Callable[..., Runtime], doorway: Doorway) -> None:
    rt = factory(2)
    kernel = Kernel.from_library(library, "forever")
    job = background(lambda: rt.run_kernel(kernel, bytes(8 * PAGE), params=doorway.params, grain=PAGE))
    doorway.wait(2)
    rt.shutdown(wait=False)
    for run in (lambda: rt.run_kernel(CRC, b"abc"), lambda: rt.submit(CRC, b"abc")):
        with pytest.raises(RuntimeError, match="after shutdown"):
            run()
    doorway.open()
    assert job.result(30) is None


def test_a_death_after_shutdown(library: str, factory: Callable[..., Runtime], doorway: Doorway) -> None:
    """What was accepted before is finished, by a worker that comes after."""
    rt = factory(2)
    kernel = Kernel.from_library(library, "add_up", partial=8, combine=total)
    data = b"\1" * (8 * PAGE)
    job = background(lambda: rt.run_kernel(kernel, data, params=doorway.params, grain=PAGE))
    doorway.wait(2)
    one = rt.submit(kernel, data, params=doorway.params)
    rt.shutdown(wait=False)
    for entered in (3, 4):
        kill_one(rt)
        doorway.wait(entered)
    doorway.open()
    assert job.result(30) == one.result(30) == len(data)
    rt.shutdown()


def test_ctrl_c_while_it_is_launched(
    library: str, factory: Callable[..., Runtime], doorway: Doorway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No participant works on after that."""
    rt = factory(2)
    whole = rt._participate

    def interrupted(*args: Any) -> None:
        whole(*args)
        doorway.wait(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(rt, "_participate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rt.run_kernel(Kernel.from_library(library, "forever"), bytes(2 * PAGE), params=doorway.params)
    stats = rt.stats()
    assert (stats.queued, stats.running, stats.kernels) == (0, 0, ())
    until(lambda: rt.stats().leased == 0, "its worker is gone")


def test_end_by_force(library: str, factory: Callable[..., Runtime], doorway: Doorway) -> None:
    rt = factory(2)
    kernel = Kernel.from_library(library, "forever")
    job = background(lambda: rt.run_kernel(kernel, bytes(8 * PAGE), params=doorway.params, grain=PAGE))
    doorway.wait(2)
    rt.kill_workers()
    assert isinstance(job.exception(30), runtime.BrokenRuntime)


def test_stats(library: str, factory: Callable[..., Runtime], doorway: Doorway) -> None:
    rt = factory(2)
    kernel = Kernel.from_library(library, "forever")
    job = background(lambda: rt.run_kernel(kernel, bytes(8 * PAGE), params=doorway.params, grain=PAGE))
    doorway.wait(2)
    assert rt.stats().kernels == ((f"{library}:forever", 8, 0),)
    doorway.open()
    job.result(30)
    assert rt.stats().kernels == ()


def held(flag: Any) -> None:
    """A task that has the GIL, but for what others take of it."""
    while not flag[0]:
        pass


def test_progress_grows_while_a_neighbour_holds_the_gil(
    library: str, factory: Callable[..., Runtime]
) -> None:
    """A participant needs no GIL between its grains: once it has begun, all are done without it."""
    rt = factory(1, threads=2)
    name, grains, ns = f"{library}:add_slowly", 2_000, 100_000
    kernel = Kernel.from_library(library, "add_slowly", inout=True)
    src, flag = np.ones(grains * 512), rt.alloc(1)
    dst = np.zeros_like(src)
    flag[0] = 0
    neighbour = rt.submit(held, flag)
    until(neighbour.running, "the other thread is busy")
    seen: set[int] = set()
    began = time.monotonic()
    job = background(lambda: rt.run_kernel(kernel, src, dst, params=struct.pack("q", ns), grain=PAGE))
    try:
        while not job.done():
            seen |= {done for *what, done in rt.stats().kernels if what == [name, grains]}
            time.sleep(0.001)  # the other processor is the kernel's
        took = time.monotonic() - began
    finally:
        flag[0] = 1
    neighbour.result(30)
    job.result(30)
    assert (dst == 1).all() and len(seen) > 10
    # 5 ms (sys.getswitchinterval) more for each grain if it needed the GIL: 10 s.
    assert took < 5


# ---- deaths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("born", [False, True], ids=["outside", "in the region"])
def test_kills_in_the_middle_of_an_in_place_job(
    library: str, factory: Callable[..., Runtime], doorway: Doorway, born: bool
) -> None:
    rt = factory(2)
    kernel = Kernel.from_library(library, "half_and_half", inout=True)
    x = np.random.default_rng(1).standard_normal(20 * 512)
    y = rt.empty(x.size) if born else np.empty(x.size)
    y[:] = start = np.random.default_rng(2).standard_normal(x.size)
    job = background(lambda: rt.run_kernel(kernel, x, y, params=doorway.params, grain=PAGE))
    entered = 2
    for _ in range(20):
        doorway.wait(entered)  # two workers are in the middle of a grain
        kill_one(rt)
        entered += 1
    doorway.wait(entered)
    doorway.open()
    assert job.result(60) is None
    assert np.array_equal(y, start + x)
    assert rt.stats().failed == 20


def test_kills_in_the_middle_of_partials(
    library: str, factory: Callable[..., Runtime], doorway: Doorway
) -> None:
    rt = factory(2)
    kernel = Kernel.from_library(library, "add_up", partial=8, combine=total)
    data = np.random.default_rng(3).integers(0, 256, 10 * PAGE + 3, np.uint8)
    job = background(lambda: rt.run_kernel(kernel, data, params=doorway.params, grain=PAGE))
    one = rt.submit(kernel, data, params=doorway.params)
    for entered in (2, 3, 4, 5):
        doorway.wait(entered)
        kill_one(rt)
    doorway.wait(6)
    doorway.open()
    assert job.result(60) == one.result(60) == int(data.sum())


def test_axpy_with_kills(factory: Callable[..., Runtime]) -> None:
    """No gate: whatever instruction they are at."""
    rt = factory(2)
    x, y = rt.empty(2_000_000), rt.empty(2_000_000)
    x[:] = np.random.default_rng(1).standard_normal(x.size)
    y[:] = start = np.random.default_rng(2).standard_normal(x.size)
    killed = 0
    jobs = 0
    while killed < 10:
        job = background(lambda: rt.run_kernel(AXPY, x, y, params=struct.pack("d", 0.5), grain=PAGE))
        while not job.done():
            for info in rt.workers():
                if info.task is not None and info.pid and killed < 10:
                    with pytest.MonkeyPatch.context(), _gone():
                        send(info.pid, signal.SIGKILL)
                        killed += 1
        assert job.result() is None
        start = start + 0.5 * x
        jobs += 1
        assert np.array_equal(y, start)
    assert jobs


def _gone() -> Any:
    import contextlib

    return contextlib.suppress(ProcessLookupError)


def test_a_kernel_that_crashes(library: str, factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    with pytest.raises(WorkerDied) as caught:
        rt.run_kernel(Kernel.from_library(library, "crash"), bytes(3 * PAGE), grain=PAGE)
    assert caught.value.signal == signal.SIGABRT
    assert f"kernel {library}:crash" in str(caught.value)
    failed = rt.submit(Kernel.from_library(library, "crash"), bytes(10)).exception(30)
    assert isinstance(failed, WorkerDied)
    assert rt.run_kernel(CRC, b"abc") == zlib.crc32(b"abc")


def test_deaths_without_a_grain(pool: Runtime) -> None:
    """They end a job only while nothing is finished between them."""
    job = jobs.Job(pool, jobs.Plan(CRC, bytes(PAGE), None, b""), TaskOptions(None, 0, (), 0), PAGE, 1)
    whole, job.block = job.block, SimpleNamespace(done=0)
    done = job.block
    try:
        for done.done in range(10):
            assert not job.hopeless([], False)
        assert [job.hopeless([], False) for _ in range(2)] == [False, True]
        assert not job.hopeless([9], False)
    finally:
        job.block = whole
        job.close()


def test_a_kernel_that_writes_over_its_own_job(library: str, factory: Callable[..., Runtime]) -> None:
    """The word of a grain that is not its own: nobody can run that grain any more."""
    rt = factory(1)
    kernel = Kernel.from_library(library, "scribble", partial=8)
    with pytest.raises(runtime.RuntimeFailure, match=r"1 of 8 grains .* kernel .*:scribble has written over"):
        rt.run_kernel(kernel, b"\xff" + bytes(8 * PAGE - 1), grain=PAGE)
    assert rt.run_kernel(CRC, b"abc") == zlib.crc32(b"abc")


# ---- the words ---------------------------------------------------------------------------------------

KIND = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
)
FREE, CLAIM, SAVED, DONE, FAILED = range(5)  # G_* of _kernel.pxd


def adder(die_in: int = -1, fail_in: int = -1) -> Any:
    """A kernel: dst += src, of bytes. It ends its process half-way in the n-th grain that it gets."""
    count = [0]

    def run(src: int, n: int, dst: int, m: int, params: int) -> int:
        x = np.frombuffer((ctypes.c_char * n).from_address(src), np.uint8)
        y = np.frombuffer((ctypes.c_char * m).from_address(dst), np.uint8)
        y[: m // 2] += x[: m // 2]
        count[0] += 1
        if count[0] - 1 == die_in:
            os._exit(0)
        if count[0] - 1 == fail_in:
            return -7
        y[m // 2 :] += x[m // 2 :]
        return 0

    return KIND(run)


def participate(arena: Any, job: Any, src: Any, dst: Any, kernel: Any, number: int) -> None:
    address = ctypes.cast(kernel, ctypes.c_void_p).value or 0
    src, dst = [_core.place_of(_core.locate_shared(arena, view)) for view in (src, dst)]
    _core.run_grains(arena, (job.block.offset, job.block.nbytes), src, dst, address, b"", number)


@pytest.mark.parametrize("inout", [True, False])
@pytest.mark.parametrize("count", range(4))
def test_deaths_in_each_grain(count: int, inout: bool) -> None:
    """The second of three participants begins with its own part, the grain 2; it has done `count`."""
    order = (2, 3, 0, 1)
    grain = order[count]
    arena = _core.Arena.create(16 * PAGE, 2, 4, 4, PAGE)
    try:
        src, dst = memoryview(arena.take(100)), memoryview(arena.take(100))
        src[:], dst[:] = bytes(range(100)), bytes([50]) * 100
        job = _core.JobBlock.create(arena, 100, 100, 32, 3, inout=inout)
        pid = fork(functools.partial(participate, arena, job, src, dst, adder(die_in=count), 1))
        join(pid)
        states = [(DONE, 1)] * count + [(SAVED if inout else CLAIM, 1)] + [(FREE, 0)] * (3 - count)
        assert [job.word_states()[grain] for grain in order] == states
        assert (job.left, job.done, job.lengths()) == (4 - count, count, [32, 32, 32, 4])
        assert job.recover(0, dst) == [] and job.recover(2, dst) == []  # others have nothing there
        assert job.recover(1, dst) == [grain] and job.recover(1, dst) == []
        assert job.word_states()[grain] == (FREE, 0)
        half = (grain * 32, min(100, grain * 32 + 32))
        assert inout == (bytes(dst[slice(*half)]) == bytes([50]) * (half[1] - half[0]))
        participate(arena, job, src, dst, adder(), 2)
        assert job.left == 0 and job.failure is None
        if inout:
            assert bytes(dst) == bytes(50 + i for i in range(100))
        job = None
        src.release(), dst.release()
    finally:
        arena.release()


def test_the_first_failure_counts_and_stops() -> None:
    arena = _core.Arena.create(16 * PAGE, 2, 4, 4, PAGE)
    try:
        src, dst = memoryview(arena.take(100)), memoryview(arena.take(100))
        job = _core.JobBlock.create(arena, 100, 100, 32, 2)
        participate(arena, job, src, dst, adder(fail_in=1), 0)
        assert job.word_states() == [(DONE, 0), (FAILED, 0), (FREE, 0), (FREE, 0)]
        participate(arena, job, src, dst, adder(), 1)  # it claims nothing
        assert job.failure == (-7, 1) and job.left == 3 and job.done == 1
        with pytest.raises(ValueError, match="no job"):
            participate(arena, job, src[:50], dst, adder(), 1)
        with pytest.raises(ValueError, match="no job"):
            participate(arena, job, src, dst, adder(), 2)
        with pytest.raises(ValueError, match="another dst"):
            participate(arena, job, src, dst[:50], adder(), 1)
        with pytest.raises(ValueError, match="no blocks with 4096 bytes"):
            _core.run_grains(arena, (1 << 40, PAGE), (0, 1), None, 0, b"", 0)
        job = None
        src.release(), dst.release()
    finally:
        arena.release()
