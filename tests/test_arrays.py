"""Large buffers through the region: in place, writable as promised, kept as long as needed, full or not.

What crosses is checked by its bytes; what is left in the region, by who owns its blocks.
"""

from __future__ import annotations

import concurrent.futures
import gc
import hashlib
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import tasks
from tasks import Gate
from watching import blocks_are_back, idle, output, send, until

import runtime
from runtime import Runtime, WorkerDied

numpy = pytest.importorskip("numpy")

KIB, MIB = 1 << 10, 1 << 20
THRESHOLD = 16 * KIB  # where a buffer leaves the pickle


@pytest.fixture(scope="module")
def shared_options() -> dict[str, Any]:
    return {"region_size": "4MiB", "region_max": "4MiB"}


@pytest.fixture
def pool(pool: Runtime) -> Iterator[Runtime]:
    """The shared Runtime; all blocks must be back in the end, too."""
    yield pool
    blocks_are_back(pool, FUNCTION_BYTES)


FUNCTION_BYTES = 64 * 4096  # more than the functions of this file need, less than any leaked series


def pattern(nbytes: int, seed: int = 1) -> Any:
    """An array that looks nowhere the same."""
    return numpy.random.default_rng(seed).integers(0, 256, nbytes, dtype=numpy.uint8)


def digest(data: Any) -> str:
    return hashlib.sha256(memoryview(data).cast("B")).hexdigest()


def describe(data: Any) -> tuple[str, int, str, bool]:
    """(type, bytes, digest, read-only)."""
    view = memoryview(data)
    return type(data).__name__, view.nbytes, hashlib.sha256(view.cast("B")).hexdigest(), view.readonly


SIZES = [
    0,
    1,
    319,
    320,
    321,
    4095,
    4096,
    THRESHOLD - 1,
    THRESHOLD,
    THRESHOLD + 1,
    65_537,
    MIB,
    4 * MIB - 8192,
    5 * MIB,
]


# ---- there and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", SIZES)
def test_arrays_of_all_sizes(pool: Runtime, nbytes: int) -> None:
    array = pattern(nbytes)
    assert pool.submit(describe, array).result()[1:3] == (nbytes, digest(array))
    back = pool.submit(tasks.echo, array).result()
    assert back.dtype == array.dtype and numpy.array_equal(back, array)
    back[:] = 0  # results are writable
    assert nbytes == 0 or array.any()


@pytest.mark.parametrize("kind", [bytes, bytearray], ids=["bytes", "bytearray"])
@pytest.mark.parametrize("nbytes", [0, 1, THRESHOLD - 1, THRESHOLD, MIB, 5 * MIB])
def test_bytes_of_all_sizes(pool: Runtime, kind: type, nbytes: int) -> None:
    data = kind(pattern(nbytes).tobytes())
    assert pool.submit(describe, data).result()[:3] == (kind.__name__, nbytes, digest(data))
    back = pool.submit(tasks.echo, data).result()
    assert type(back) is kind and back == data


@pytest.mark.parametrize("nbytes", [100, THRESHOLD, MIB])
def test_pickle_buffers(pool: Runtime, nbytes: int) -> None:
    raw = bytearray(pattern(nbytes).tobytes())
    _, size, seen, readonly = pool.submit(describe, pickle.PickleBuffer(raw)).result()
    assert (size, seen, readonly) == (nbytes, digest(raw), False)
    assert pool.submit(describe, pickle.PickleBuffer(bytes(raw))).result()[1:] == (nbytes, digest(raw), True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: numpy.arange(60_000, dtype="f8").reshape(200, 300),
        lambda: numpy.asfortranarray(numpy.arange(60_000, dtype="f8").reshape(200, 300)),
        lambda: numpy.arange(60_000, dtype="f8")[::3],
        lambda: numpy.arange(60_000, dtype="f8")[5:],
        lambda: numpy.zeros((0, 5)),
        lambda: numpy.float64(3.5),
        lambda: numpy.array([{"any": "object"}, None] * 5000, dtype=object),
        lambda: numpy.zeros(9000, dtype=[("a", "i4"), ("b", "f8")]),
        lambda: numpy.ma.masked_array(numpy.arange(30_000.0), mask=numpy.arange(30_000) % 2),
    ],
    ids=["C", "Fortran", "strided", "slice", "empty", "scalar", "objects", "records", "masked"],
)
def test_arrays_of_all_kinds(pool: Runtime, make: Callable[[], Any]) -> None:
    array = make()
    back = pool.submit(tasks.echo, array).result()
    assert type(back) is type(array) and back.dtype == array.dtype and back.shape == array.shape
    assert (numpy.asarray(back) == numpy.asarray(array)).all()


def test_many_buffers_in_one_call(pool: Runtime) -> None:
    arrays = [pattern(THRESHOLD + i, i) for i in range(40)]
    back = pool.submit(tasks.echo, arrays, {"named": arrays[0]}, [arrays[0], arrays[0]]).result()
    assert all(numpy.array_equal(a, b) for a, b in zip(arrays, back[0], strict=True))
    assert numpy.array_equal(back[1]["named"], arrays[0])
    assert back[2][0] is back[2][1]


def test_keyword_arguments_and_defaults(pool: Runtime) -> None:
    array = pattern(MIB)
    assert pool.submit(lambda *, data: digest(data), data=array).result() == digest(array)


def test_array_in_a_closure(pool: Runtime) -> None:
    array = pattern(300 * KIB)
    assert pool.submit(lambda: digest(array)).result() == digest(array)


def test_array_in_an_exception(factory: Callable[..., Runtime]) -> None:
    """Its traceback must not keep the frame, and so the argument's block, in the worker."""
    rt = factory(1)
    array = pattern(MIB)
    error = rt.submit(tasks.throw, ValueError(array)).exception()
    assert isinstance(error, ValueError)
    assert numpy.array_equal(error.args[0], array)
    del error
    blocks_are_back(rt, FUNCTION_BYTES)


# ---- who may write, and who sees it --------------------------------------------------------------------


def overwrite(array: Any) -> tuple[str, str]:
    """Write into an argument in place: (digest before, digest after)."""
    before = digest(array)
    array[:] = 7
    return before, digest(array)


@pytest.mark.parametrize("nbytes", [100, THRESHOLD, MIB, 5 * MIB])
def test_arguments_are_writable_and_the_callers_stay(pool: Runtime, nbytes: int) -> None:
    array = pattern(nbytes)
    original = digest(array)
    sevens = digest(numpy.full(nbytes, 7, numpy.uint8))
    for _ in range(3):
        assert pool.submit(overwrite, array).result() == (original, sevens)
    assert digest(array) == original


@pytest.mark.parametrize("nbytes", [100, THRESHOLD, MIB, 5 * MIB])
def test_what_is_read_only_stays_so(pool: Runtime, nbytes: int) -> None:
    array = pattern(nbytes)
    array.flags.writeable = False
    assert pool.submit(lambda a: a.flags.writeable, array).result() is False
    assert isinstance(pool.submit(overwrite, array).exception(), ValueError)


@pytest.mark.parametrize("nbytes", [100, THRESHOLD, MIB, 5 * MIB])
def test_results_are_writable(pool: Runtime, nbytes: int) -> None:
    result = pool.submit(numpy.zeros, nbytes, "u1").result()
    assert result.flags.writeable
    result[:] = 5
    other = pool.submit(numpy.zeros, nbytes, "u1").result()
    assert not other.any() and (result == 5).all()


def test_results_do_not_change_while_others_are_made(pool: Runtime) -> None:
    kept = [(seed, pool.submit(pattern, 100 * KIB, seed).result()) for seed in range(10)]
    for seed in range(200):
        pool.submit(pattern, 200 * KIB, seed).result()[:] = 0
    for seed, array in kept:
        assert numpy.array_equal(array, pattern(100 * KIB, seed))


def write_and_die_until(attempt: int, array: Any) -> tuple[int, str]:
    """The digest that this attempt sees, after it has overwritten what the next one gets."""
    import runtime

    here = runtime.current().attempt
    seen = digest(array)
    array[:] = 0
    if here < attempt:
        os.kill(os.getpid(), signal.SIGKILL)
    return here, seen


@pytest.mark.parametrize("nbytes", [100, THRESHOLD, MIB, 3 * MIB, 5 * MIB])
def test_next_attempt_sees_the_original(factory: Callable[..., Runtime], nbytes: int) -> None:
    rt = factory(2, retries=2)
    array = pattern(nbytes)
    assert rt.submit(write_and_die_until, 3, array).result() == (3, digest(array))
    assert isinstance(rt.options(retries=0).submit(write_and_die_until, 3, array).exception(), WorkerDied)
    blocks_are_back(rt, FUNCTION_BYTES)


def write_and_raise_until(attempt: int, array: Any) -> tuple[int, str]:
    import runtime

    here = runtime.current().attempt
    seen = digest(array)
    array[:] = 0
    if here < attempt:
        raise ValueError(here)
    return here, seen


@pytest.mark.parametrize("nbytes", [100, THRESHOLD, 3 * MIB])
def test_next_attempt_after_an_exception_sees_the_original(
    factory: Callable[..., Runtime], nbytes: int
) -> None:
    rt = factory(1, retries=2, retry_on=ValueError)
    array = pattern(nbytes)
    assert rt.submit(write_and_raise_until, 3, array).result() == (3, digest(array))


def test_items_of_a_chunk_that_are_repeated_see_the_original(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, retries=1)
    arrays = [pattern(THRESHOLD * 2, i) for i in range(10)]

    def run(i: int, array: Any) -> str:
        import runtime

        seen = digest(array)
        array[:] = 0
        if i == 6 and runtime.current().attempt == 1:
            tasks.kill_self()
        return seen

    assert list(rt.map(run, range(10), arrays, chunksize=10)) == [digest(a) for a in arrays]
    blocks_are_back(rt, FUNCTION_BYTES)


# ---- views that outlive their call -----------------------------------------------------------------------


kept: list[Any] = []


def keep(array: Any) -> str:
    """Keep a view of an argument in the worker."""
    kept.append(array)
    return digest(array)


def look_at_kept() -> tuple[int, list[str]]:
    return os.getpid(), [digest(array) for array in kept]


def let_go() -> None:
    kept.clear()


def test_view_that_a_worker_keeps_stays_intact(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, region_size="1MiB", region_max="1MiB")
    arrays = [pattern(100 * KIB, i) for i in range(5)]
    expected = [rt.submit(keep, array).result() for array in arrays]
    assert expected == [digest(array) for array in arrays]
    assert rt.stats().pinned >= 500 * KIB
    for i in range(300):
        nbytes = (i % 40 + 1) * 10 * KIB
        assert rt.submit(len, pattern(nbytes)).result() == nbytes
        if i % 50 == 0:
            assert rt.submit(look_at_kept).result()[1] == expected
    assert rt.submit(look_at_kept).result()[1] == expected
    rt.submit(let_go).result()
    until(lambda: rt.submit(gc.collect).result() is not None and rt.stats().pinned == 0, "nothing is pinned")
    blocks_are_back(rt, FUNCTION_BYTES)


def keep_and_fail_first(array: Any) -> None:
    kept.append(array)
    if runtime.current().attempt == 1:
        raise ValueError("keep it once more")


def drop_kept(which: int) -> None:
    del kept[which]


@pytest.mark.parametrize("first", [0, 1], ids=["the older view goes first", "the newer view goes first"])
def test_views_of_two_attempts_are_counted(factory: Callable[..., Runtime], first: int) -> None:
    """Both attempts ran in one worker, and kept the same block: it is free when both views are gone."""
    rt = factory(1, region_size="4MiB", region_max="4MiB", retries=1, retry_on=(ValueError,))
    argument = pattern(500 * KIB)
    rt.submit(keep_and_fail_first, argument).result()
    assert rt.submit(look_at_kept).result()[1] == [digest(argument)] * 2
    rt.submit(drop_kept, first).result()
    rt.submit(gc.collect).result()
    for seed in range(2, 30):  # more than the region holds: what is free is written over
        rt.submit(len, pattern(500 * KIB, seed)).result()
        assert rt.submit(look_at_kept).result()[1] == [digest(argument)]
    assert 500 * KIB <= rt.stats().pinned < 600 * KIB
    rt.submit(drop_kept, 0).result()
    until(lambda: rt.submit(gc.collect).result() is not None and rt.stats().pinned == 0, "nothing is pinned")
    blocks_are_back(rt, FUNCTION_BYTES)


def test_kept_views_go_with_their_worker(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, region_size="1MiB", region_max="1MiB")
    rt.submit(keep, pattern(300 * KIB)).result()
    pid, _ = rt.submit(look_at_kept).result()
    assert rt.stats().pinned >= 300 * KIB
    assert isinstance(rt.submit(tasks.kill_self).exception(), WorkerDied)
    assert rt.submit(look_at_kept).result() != pid
    blocks_are_back(rt, FUNCTION_BYTES)


def test_writing_into_a_kept_view_disturbs_nobody(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, region_size="1MiB", region_max="1MiB")

    def scribble() -> None:
        for array in kept_here():
            array[:] = 255

    def kept_here() -> list[Any]:
        import test_arrays

        return test_arrays.kept

    rt.submit(keep, pattern(100 * KIB)).result()
    for i in range(50):
        array = pattern(100 * KIB, i)
        future = rt.submit(digest, array)
        rt.submit(scribble).result()
        assert future.result() == digest(array)


def test_part_of_a_result_keeps_it(pool: Runtime) -> None:
    result = pool.submit(pattern, MIB).result()
    part = result[1000:2000]
    del result
    for i in range(100):
        pool.submit(pattern, 900 * KIB, i).result()[:] = 0
    assert numpy.array_equal(part, pattern(MIB)[1000:2000])
    del part


def test_result_outlives_its_runtime(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    result = rt.submit(pattern, MIB).result()
    rt.shutdown()
    del rt
    gc.collect()
    assert numpy.array_equal(result, pattern(MIB))
    result[:] = 3
    del result


def test_block_of_a_result_is_free_when_the_result_is(pool: Runtime) -> None:
    """At once: a program that handles arrays does not wait for the cycle collector."""
    pool.submit(pattern, 10).result()
    before = pool._core.arena.used_bytes
    gc.collect()
    gc.disable()
    try:
        for i in range(20):
            assert pool.submit(pattern, MIB, i).result().nbytes == MIB
        until(lambda: pool._core.arena.used_bytes <= before + 8192, "the blocks of 20 dropped results")
    finally:
        gc.enable()


# ---- a region that is small, or full ---------------------------------------------------------------------


def test_100_mib_through_a_region_of_1_mib(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, region_size="1MiB", region_max="1MiB")
    array = pattern(100 * MIB)
    assert rt.submit(digest, array).result() == digest(array)
    back = rt.submit(tasks.echo, array).result()
    assert numpy.array_equal(back, array)
    assert back.flags.writeable
    del back
    blocks_are_back(rt, FUNCTION_BYTES)


def test_many_that_do_not_fit_at_once(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, region_size="1MiB", region_max="1MiB")
    arrays = [pattern(400 * KIB, i) for i in range(8)]
    futures = [(i % 8, rt.submit(tasks.echo, arrays[i % 8])) for i in range(200)]
    for i, future in futures:
        assert numpy.array_equal(future.result(), arrays[i])
    futures.clear()
    del future
    blocks_are_back(rt, FUNCTION_BYTES)


@pytest.mark.stress
def test_2000_results_of_1_mib_uncollected(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, region_size="4MiB", region_max="256MiB")
    futures = [rt.submit(numpy.full, MIB // 8, i, "i8") for i in range(2000)]
    concurrent.futures.wait(futures)
    results = [f.result() for f in futures]
    assert all((array == i).all() for i, array in enumerate(results))
    assert rt.stats().failed == 0 and rt.stats().rescued == 0
    futures.clear()
    results.clear()
    blocks_are_back(rt, FUNCTION_BYTES)


def test_worker_dies_in_the_middle_of_a_transfer_by_value(factory: Callable[..., Runtime]) -> None:
    """Arguments and results of 8 MiB travel through the bounce block of a region of 1 MiB."""
    rt = factory(2, region_size="1MiB", region_max="1MiB", retries=100)
    array = pattern(8 * MIB)
    expected = digest(array)
    futures = [rt.submit(tasks.echo, array) for _ in range(12)]
    for future in futures[::2]:
        until(lambda f=future: f.running() or f.done())
        for worker in rt.workers():
            if worker.pid is not None and worker.task is not None:
                with suppress(ProcessLookupError):  # it may have gone by itself
                    send(worker.pid, signal.SIGKILL)
        assert digest(future.result()) == expected
    assert all(digest(f.result()) == expected for f in futures)
    futures.clear()
    del future
    blocks_are_back(rt, FUNCTION_BYTES)


def test_killed_workers_leave_no_blocks(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)

    def use(i: int, array: Any) -> Any:
        if i % 5 == 0:
            tasks.kill_self()
        return array + 1

    arrays = [pattern(200 * KIB, i) for i in range(3)]
    futures = [rt.submit(use, i, arrays[i % 3]) for i in range(60)]
    for i, future in enumerate(futures):
        if i % 5 == 0:
            assert isinstance(future.exception(), WorkerDied)
        else:
            assert numpy.array_equal(future.result(), arrays[i % 3] + 1)
    futures.clear()
    del future
    blocks_are_back(rt, FUNCTION_BYTES)


def test_cancelled_tasks_give_their_blocks_back(pool: Runtime, gate: Gate) -> None:
    held = [pool.submit(tasks.pass_through, gate.path) for _ in range(2)]
    gate.arrived(2)
    array = pattern(100 * KIB)
    line = [pool.submit(len, array) for _ in range(300)]
    assert all(f.cancel() for f in line)
    gate.open(2)
    concurrent.futures.wait(held)


def test_results_nobody_asks_for_give_their_blocks_back(pool: Runtime) -> None:
    futures = [pool.submit(pattern, 500 * KIB, i) for i in range(40)]
    concurrent.futures.wait(futures)


def test_results_that_the_host_has_no_memory_for() -> None:
    """Each fails by itself, and what had come of it is let go of."""
    code = """if True:
        import resource, tasks, runtime
        from watching import blocks_are_back, shut_down_clean
        rt = runtime.Runtime(1, region_max="4MiB")
        assert list(rt.map(len, [b"x"])) == [1]
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (100 << 20), resource.RLIM_INFINITY))
        for _ in range(3):
            print(repr(rt.submit(bytes, 200 << 20).exception(tasks.PATIENCE)))
            assert len(rt.submit(bytes, 40 << 20).result(tasks.PATIENCE)) == 40 << 20
        found = rt.map(bytes, [5, 200 << 20, 5], return_exceptions=True, chunksize=1)
        print(*[type(one).__name__ for one in found])
        del found
        beside = rt.submit(lambda n: (runtime.current().empty(1 << 20, "u1"), bytes(n)), 200 << 20)
        print(type(beside.exception(tasks.PATIENCE)).__name__)
        blocks_are_back(rt, 1 << 18)  # what it had of its own in the region, too
        assert rt._core.dispatcher.malformed == 0
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shut_down_clean(rt)
        # A chunk that ends early, since its worker has had its share: what never ran is not lost with it.
        with runtime.Runtime(1, region_max="4MiB", max_tasks_per_child=2) as rt:
            assert rt.submit(abs, -1).result() == 1
            resource.setrlimit(resource.RLIMIT_AS, (mapped + (100 << 20), resource.RLIM_INFINITY))
            found = rt.map(bytes, [5, 200 << 20, 5, 5], return_exceptions=True, chunksize=4)
            print(*[type(one).__name__ for one in found])
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    """
    lines = output(code)
    assert lines == [
        *["MemoryError('the task has ended, but the host has no memory for its result')"] * 3,
        "bytes MemoryError bytes",
        "MemoryError",
        "bytes MemoryError MemoryError bytes",  # the third had run, and its result lay in the same frame
    ]


@pytest.mark.stress
@pytest.mark.timeout(300)
def test_an_argument_of_1_gib(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    array = numpy.zeros(1 << 30, numpy.uint8)
    array[[0, 12345, -1]] = 1, 2, 3
    assert rt.submit(lambda a: (a.nbytes, int(a[0]), int(a[12345]), int(a[-1])), array).result() == (
        1 << 30,
        1,
        2,
        3,
    )
    assert rt.submit(abs, -1).result() == 1
    blocks_are_back(rt, FUNCTION_BYTES)


def test_worker_that_is_woken_ahead_of_a_large_argument(factory: Callable[..., Runtime]) -> None:
    np = pytest.importorskip("numpy")
    rt = factory(2, region_size="64MiB", region_max="64MiB")
    data = np.arange(1 << 20, dtype="f8")
    for _ in range(30):
        until(lambda: idle(rt), lambda: f"idle: {rt.stats()}")
        assert rt.submit(tasks.echo, data).result(tasks.PATIENCE).sum() == data.sum()
    busy = [rt.submit(tasks.echo, data) for _ in range(20)]
    assert all(future.result(tasks.PATIENCE)[-1] == data[-1] for future in busy)
    assert rt.stats().rescued == 0
