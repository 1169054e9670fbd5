"""map and map_unordered: order, windows, errors, endings, kills in the middle of a chunk."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tasks
from tasks import Gate, pass_through
from watching import idle, until

import runtime
from runtime import BrokenRuntime, Runtime, TaskTimeout, WorkerDied


class Counted:
    """An iterator without a length that counts how far it was advanced, and by whom."""

    def __init__(self, stop: int | None = None) -> None:
        self.count = 0
        self.threads: set[int] = set()
        self.stop = stop

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> int:
        self.threads.add(threading.get_ident())
        if self.count == self.stop:
            raise StopIteration
        self.count += 1
        return self.count - 1


BOTH = pytest.mark.parametrize("name", ["map", "map_unordered"])
SIZES = pytest.mark.parametrize("chunksize", [None, 1, 7, 10_000])


# ---- results -----------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_order(pool: Runtime, chunksize: int | None, count: int) -> None:
    assert list(pool.map(tasks.echo, range(count), chunksize=chunksize)) == list(range(count))
    assert list(pool.map(tasks.echo, Counted(count), chunksize=chunksize)) == list(range(count))


@SIZES
def test_unordered(pool: Runtime, chunksize: int | None) -> None:
    assert sorted(pool.map_unordered(tasks.echo, range(1000), chunksize=chunksize)) == list(range(1000))
    assert sorted(pool.map_unordered(tasks.echo, Counted(3000), chunksize=chunksize)) == list(range(3000))
    assert list(pool.map_unordered(tasks.echo, [])) == []


def test_unordered_does_not_wait_for_the_first(pool: Runtime, gate: Gate) -> None:
    def run(i: int) -> int:
        return pass_through(gate_path, i) if i == 0 else i

    gate_path = gate.path
    results = pool.map_unordered(run, range(50), chunksize=1)
    assert sorted(next(results) for _ in range(49)) == list(range(1, 50))
    gate.open()
    assert list(results) == [0]


def test_several_iterables(pool: Runtime) -> None:
    assert list(pool.map(tasks.add, range(10), range(100, 200), [5] * 7)) == [105 + 2 * i for i in range(7)]
    assert list(pool.map(tasks.add, itertools.count(), range(5))) == [2 * i for i in range(5)]
    assert list(pool.map(tasks.add, [], range(5))) == []
    assert list(pool.map(divmod, iter([7, 8]), iter([3, 3]))) == [(2, 1), (2, 2)]


def test_items_of_all_kinds(pool: Runtime) -> None:
    items = [None, 1, "text", b"bytes", (1, 2), [3], {"k": "v"}, {4}, 1.5, Exception("not raised")]
    results = list(pool.map(tasks.echo, items))
    assert results[:-1] == items[:-1]
    assert str(results[-1]) == "not raised"


def test_items_run_in_workers(pool: Runtime) -> None:
    ran_in = set(pool.map(lambda _: os.getpid(), range(2000)))
    assert ran_in <= {w.pid for w in pool.workers()} and os.getpid() not in ran_in


def test_chunksize_is_what_travels_together(pool: Runtime) -> None:
    before = pool.stats().done
    seen = list(pool.map(lambda i: (tasks_here().task, i), range(100), chunksize=10))
    groups = [{task for task, i in seen if i // 10 == tens} for tens in range(10)]
    assert all(len(group) == 1 for group in groups)
    assert len(set().union(*groups)) == 10
    assert pool.stats().done == before + 100  # items count one by one


def tasks_here() -> Any:
    """runtime.current()"""
    import runtime

    return runtime.current()


def test_chunks_adapt(pool: Runtime) -> None:
    seen = list(pool.map(lambda i: tasks_here().task, range(20_000)))
    lengths = [len(list(group)) for _, group in itertools.groupby(sorted(seen))]
    assert max(lengths) >= 16, "quick items travel together"
    assert seen.count(seen[0]) <= 2, "the first chunk is small: nothing is known yet"
    slow = list(pool.map(lambda i: (time.sleep(0.01), tasks_here().task)[1], range(20)))
    assert max(slow.count(task) for task in slow) <= 2, "slow items travel alone"


def test_wrong_sizes(pool: Runtime) -> None:
    for wrong in ({"chunksize": 0}, {"chunksize": -1}, {"buffersize": 0}):
        with pytest.raises(ValueError):
            pool.map(abs, [1], **wrong)
    for wrong in ({"chunksize": 1.5}, {"buffersize": "1"}):
        with pytest.raises(TypeError):
            pool.map(abs, [1], **wrong)
    with pytest.raises(TypeError):
        pool.map(abs, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        list(pool.map(5, [1]))  # type: ignore[arg-type]


# ---- the input ---------------------------------------------------------------------------------------


@BOTH
def test_endless_input_keeps_a_bounded_lead(pool: Runtime, name: str) -> None:
    endless = Counted()
    results = getattr(pool, name)(tasks.echo, endless)
    first = endless.count
    lead = 0
    for taken in range(1, 5001):
        next(results)
        lead = max(lead, endless.count - taken)
    assert first <= 2 * 1024 and lead <= 2 * 1024
    results.close()


def test_buffersize_bounds_the_lead(pool: Runtime) -> None:
    for stop in (None, 100):
        counted = Counted(stop)
        results = pool.map(tasks.echo, counted, buffersize=5)
        assert counted.count <= 5
        for i in range(50):
            assert next(results) == i
            assert counted.count <= i + 1 + 5
        results.close()


def test_buffersize_of_a_sized_input(pool: Runtime) -> None:
    assert list(pool.map(tasks.echo, range(500), buffersize=3)) == list(range(500))
    assert list(pool.map(tasks.echo, range(500), buffersize=3, chunksize=100)) == list(range(500))
    assert sorted(pool.map_unordered(tasks.echo, range(500), buffersize=1)) == list(range(500))


def test_memory_of_an_endless_map_is_flat(pool: Runtime) -> None:
    """Items of 8 KiB: 20,000 of them are 160 MB, and what is held at a time is a bounded window."""
    results = pool.map(len, (bytes(8192) for _ in itertools.count()))

    def take(count: int) -> int:
        assert all(length == 8192 for length in itertools.islice(results, count))
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    warm = take(4000)
    later = max(take(4000) for _ in range(4))
    assert later - warm < 40 << 20
    results.close()


def test_input_is_advanced_only_by_who_calls(pool: Runtime) -> None:
    counted = Counted(5000)
    assert list(pool.map(tasks.echo, counted)) == list(range(5000))
    assert counted.threads == {threading.get_ident()}


def test_sized_input_runs_to_its_end_if_nobody_iterates(pool: Runtime, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    results = pool.map(tasks.log_line, [str(log)] * 500, range(500))
    until(lambda: len(log.read_text().splitlines()) == 500, "all items ran")
    del results
    gc.collect()
    assert sorted(map(int, log.read_text().split())) == list(range(500))


def test_sized_input_runs_to_its_end_if_the_iterator_is_dropped_at_once(
    factory: Callable[..., Runtime], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    rt = factory(2)
    rt.map(tasks.log_line, [str(log)] * 300, range(300))
    rt.shutdown()
    assert sorted(map(int, log.read_text().split())) == list(range(300))


def test_dropped_iterator_cancels_the_rest(pool: Runtime, gate: Gate, tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = pool.stats()

    def run(i: int) -> int:
        tasks.log_line(str(log), i)
        return tasks.pass_through(gate_path, i) if i else i

    gate_path = gate.path
    results = pool.map(run, range(1000), chunksize=1)
    assert next(results) == 0
    gate.arrived(2)
    del results
    gc.collect()
    gate.open(2)
    until(lambda: idle(pool))
    ran = len(log.read_text().split())
    assert ran == 3
    stats = pool.stats()
    assert stats.cancelled - before.cancelled == 1000 - ran
    assert stats.done - before.done == ran


def test_close(pool: Runtime) -> None:
    results = pool.map(tasks.echo, Counted())
    assert [next(results) for _ in range(10)] == list(range(10))
    results.close()
    results.close()
    assert list(results) == []


def test_exception_of_the_input_comes_after_the_results_before_it(pool: Runtime) -> None:
    def items() -> Iterator[int]:
        yield from range(600)
        raise ZeroDivisionError("in the input")

    for call in (pool.map, pool.map_unordered):
        results = call(tasks.echo, items())
        seen = [next(results) for _ in range(600)]
        assert sorted(seen) == list(range(600))
        with pytest.raises(ZeroDivisionError, match="in the input"):
            next(results)
        assert list(results) == []


def test_item_that_cannot_be_pickled(pool: Runtime) -> None:
    results = pool.map(tasks.echo, [1, threading.Lock(), 3], return_exceptions=True)
    seen = list(results)
    assert (seen[0], type(seen[1]), seen[2]) == (1, TypeError, 3)
    failing = pool.map(tasks.echo, [1, threading.Lock(), 3])
    assert next(failing) == 1
    with pytest.raises(TypeError):
        next(failing)


# ---- errors ------------------------------------------------------------------------------------------


def third_fails(i: int) -> int:
    if i % 3 == 2:
        raise ValueError(f"no {i}")
    return i


@SIZES
def test_exception_arrives_in_its_place(pool: Runtime, chunksize: int | None) -> None:
    results = pool.map(third_fails, range(100), chunksize=chunksize)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="no 2") as caught:
        next(results)
    assert any("item 2" in note and note.rstrip(".").endswith("2") for note in caught.value.__notes__)
    assert "third_fails" in str(caught.value.__cause__)
    assert list(results) == []  # as a generator that has raised


def test_note_names_index_and_item(pool: Runtime) -> None:
    with pytest.raises(ValueError) as caught:
        list(pool.map(third_fails_named, ["a", "b", "an item"]))
    (note,) = caught.value.__notes__
    assert "item 2" in note and "'an item'" in note


def third_fails_named(item: str) -> str:
    if item == "an item":
        raise ValueError("no")
    return item


@SIZES
def test_return_exceptions(pool: Runtime, chunksize: int | None) -> None:
    results = list(pool.map(third_fails, range(99), chunksize=chunksize, return_exceptions=True))
    assert [r for r in results if isinstance(r, int)] == [i for i in range(99) if i % 3 != 2]
    errors = {i: r for i, r in enumerate(results) if not isinstance(r, int)}
    assert all(i % 3 == 2 and isinstance(r, ValueError) and str(r) == f"no {i}" for i, r in errors.items())
    assert all(f"item {i}" in r.__notes__[0] for i, r in errors.items())


def test_return_exceptions_of_base_exceptions(pool: Runtime) -> None:
    kinds = [SystemExit, KeyboardInterrupt, ValueError]
    results = list(pool.map(tasks.throw_type, kinds, return_exceptions=True))
    assert [type(r) for r in results] == kinds
    with pytest.raises(SystemExit):
        list(pool.map(tasks.throw_type, kinds))


def test_result_that_cannot_be_pickled(pool: Runtime) -> None:
    results = list(pool.map(tasks.make, ["lock", "loads badly"], return_exceptions=True))
    assert [type(r) for r in results] == [TypeError, ValueError]


def test_timeout_of_the_whole_map(pool: Runtime, gate: Gate) -> None:
    results = pool.map(pass_through, [gate.path] * 2, [0, 1], timeout=0.3)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        list(results)
    assert time.monotonic() - start < 3
    gate.open(2)
    assert list(pool.map(abs, range(10), timeout=30)) == list(range(10))


def test_timeout_counts_from_the_call(pool: Runtime, gate: Gate) -> None:
    results = pool.map(pass_through, [gate.path] * 2, timeout=0.2)
    time.sleep(0.3)  # the point: the time goes by before anybody iterates
    with pytest.raises(TimeoutError):
        next(results)
    gate.open(2)


# ---- timeouts and deaths inside a chunk -----------------------------------------------------------------


def run_logged(log: str, i: int, bad: int, how: str) -> int:
    """Write that it ran; the bad one hangs, or dies."""
    tasks.log_line(log, i)
    if i == bad:
        if how == "hang":
            tasks.hang()
        tasks.kill_self()
    return i


def run_counts(log: Path) -> dict[int, int]:
    lines = list(map(int, log.read_text().split()))
    return {i: lines.count(i) for i in set(lines)}


@pytest.mark.parametrize("chunksize", [None, 1, 10, 100])
@pytest.mark.parametrize("how", ["hang", "die"])
def test_only_the_item_that_ran_is_blamed(
    factory: Callable[..., Runtime], tmp_path: Path, how: str, chunksize: int | None
) -> None:
    log = tmp_path / "log"
    rt = factory(2, preload=(__name__,))  # importing it takes a part of the time that its first item has
    view = rt.options(timeout=0.3) if how == "hang" else rt
    args = [[str(log)] * 100, range(100), [37] * 100, [how] * 100]
    results = list(view.map(run_logged, *args, chunksize=chunksize, return_exceptions=True))
    assert [r for i, r in enumerate(results) if i != 37] == [i for i in range(100) if i != 37]
    assert isinstance(results[37], TaskTimeout if how == "hang" else WorkerDied)
    assert "item 37" in results[37].__notes__[0]
    ran = run_counts(log)
    assert set(ran) == set(range(100)) and ran[37] == 1
    if chunksize == 1:
        assert set(ran.values()) == {1}  # what chunksize=1 is for
    until(lambda: idle(rt))
    stats = rt.stats()
    assert (stats.done, stats.failed, stats.rescued) == (99, 1, 0)


def test_slow_items_of_a_chunk_run_once_although_a_neighbour_dies(
    factory: Callable[..., Runtime], tmp_path: Path
) -> None:
    """Items of more than 50 us are committed one by one, so the death of the last repeats none of them."""
    log = tmp_path / "log"

    def run(i: int) -> int:
        tasks.log_line(path, i)
        time.sleep(0.002)
        if i == 9:
            tasks.kill_self()
        return i

    path = str(log)
    results = list(factory(1).map(run, range(20), chunksize=20, return_exceptions=True))
    assert results[:9] + results[10:] == [*range(9), *range(10, 20)]
    assert isinstance(results[9], WorkerDied)
    assert set(run_counts(log).values()) == {1}


def test_every_item_dies(factory: Callable[..., Runtime]) -> None:
    results = list(factory(2).map(lambda _: tasks.kill_self(), range(6), chunksize=3, return_exceptions=True))
    assert [type(r) for r in results] == [WorkerDied] * 6


def test_kills_from_outside_in_the_middle_of_chunks(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(2)

    def run(i: int) -> int:
        return tasks.pass_through(gate_path, i) if i % 50 == 25 else i

    gate_path = gate.path
    results = rt.map(run, range(200), chunksize=50, return_exceptions=True)
    for _ in range(4):  # chunk after chunk, its item 25 is killed
        (pid,) = gate.arrived()
        os.kill(pid, signal.SIGKILL)
    found = list(results)
    dead = [i for i, r in enumerate(found) if isinstance(r, WorkerDied)]
    assert dead == [25, 75, 125, 175]
    assert all(found[i].signal == signal.SIGKILL for i in dead)
    assert [r for i, r in enumerate(found) if i % 50 != 25] == [i for i in range(200) if i % 50 != 25]


def test_retries_of_items(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    def run(i: int) -> tuple[int, int]:
        attempt = tasks_here().attempt
        if i % 40 == 7 and attempt < 3:
            tasks.kill_self()
        return i, attempt

    rt = factory(2, retries=2)
    results = list(rt.map(run, range(100)))
    assert [i for i, _ in results] == list(range(100))
    assert [(i, n) for i, n in results if i % 40 == 7] == [(7, 3), (47, 3), (87, 3)]
    assert rt.stats().failed == 0
    (result,) = rt.options(retries=1).map(run, [7], return_exceptions=True)
    assert isinstance(result, WorkerDied) and result.attempts == 2


def test_retry_on_for_items(factory: Callable[..., Runtime]) -> None:
    view = factory(1).options(retries=1, retry_on=ValueError)
    results = list(view.map(fails_first, range(30), chunksize=10))
    assert results == [(i, 2 if i % 10 == 3 else 1) for i in range(30)]
    (error,) = view.map(tasks.fail_until, [99], [ValueError], return_exceptions=True)
    assert str(error) == "attempt 2"


def fails_first(i: int) -> tuple[int, int]:
    attempt = tasks_here().attempt
    if i % 10 == 3 and attempt == 1:
        raise ValueError(i)
    return i, attempt if i % 10 == 3 else 1


def test_timeout_is_per_item(factory: Callable[..., Runtime]) -> None:
    def run(_: int) -> None:
        time.sleep(0.05)

    assert list(factory(1).options(timeout=1.0).map(run, range(40), chunksize=40)) == [None] * 40


# ---- many, large, and ended ------------------------------------------------------------------------------


def test_maps_from_many_threads(pool: Runtime) -> None:
    def use(n: int) -> bool:
        return list(pool.map(tasks.add, range(1000), [n] * 1000)) == [i + n for i in range(1000)]

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(use, range(6)))


def test_maps_side_by_side(pool: Runtime) -> None:
    first, second = pool.map(tasks.echo, Counted()), pool.map(tasks.echo, range(300))
    pairs = [(next(first), next(second)) for _ in range(300)]
    assert pairs == [(i, i) for i in range(300)]
    first.close()


def test_map_and_submit_side_by_side(pool: Runtime) -> None:
    results = pool.map(tasks.echo, range(2000))
    futures = [pool.submit(tasks.echo, -i) for i in range(500)]
    assert list(results) == list(range(2000))
    assert [f.result() for f in futures] == [-i for i in range(500)]


def test_map_in_a_map_of_another_runtime(factory: Callable[..., Runtime], pool: Runtime) -> None:
    inner = factory(1)
    assert list(pool.map(tasks.echo, inner.map(tasks.echo, range(500)))) == list(range(500))


@pytest.mark.parametrize("nbytes", [20_000, 300_000, 6 << 20])
def test_large_arrays_as_items(pool: Runtime, nbytes: int) -> None:
    numpy = pytest.importorskip("numpy")
    count = 40 if nbytes < 1 << 20 else 4  # 6 MiB: more than the region has
    arrays = (numpy.full(nbytes, i % 251, dtype=numpy.uint8) for i in range(count))
    for i, (total, back) in enumerate(pool.map(lambda a: (int(a.sum()), a), arrays)):
        assert total == (i % 251) * nbytes
        assert back.shape == (nbytes,) and int(back[0]) == int(back[-1]) == i % 251


@pytest.mark.parametrize("region_size", ["1MiB", "16MiB"])
def test_an_array_that_each_item_fills_anew(factory: Callable[..., Runtime], region_size: str) -> None:
    """What an item has returned is not what the next one writes there, with room for it and without."""
    numpy = pytest.importorskip("numpy")

    def fill(i: int, kept: dict[str, Any]) -> Any:
        scratch = kept.setdefault("scratch", numpy.empty(10_000))
        scratch[:] = i
        return scratch, float(i)

    rt = factory(1, region_size=region_size, region_max=region_size)
    found = list(rt.map(lambda i: fill(i, runtime.current().local), range(60), chunksize=20))
    assert [(array[0], array[-1]) for array, _ in found] == [(i, i) for i in range(60)]


def test_no_reference_to_yielded_items(pool: Runtime) -> None:
    results = pool.map(tasks.Tracked, range(1000))
    seen = []
    gc.disable()
    try:
        for result in results:
            seen.append(weakref.ref(result))
            del result
            assert sum(ref() is not None for ref in seen[-20:]) == 0
    finally:
        gc.enable()
    assert len(seen) == 1000


def test_no_reference_to_items_of_the_input(pool: Runtime) -> None:
    made: list[weakref.ref[Any]] = []

    def items() -> Iterator[tasks.Tracked]:
        for i in range(500):
            item = tasks.Tracked(i)
            made.append(weakref.ref(item))
            yield item
            del item

    results = pool.map(lambda tracked: tracked.value, items())
    assert list(results) == list(range(500))
    gc.collect()
    assert [ref for ref in made if ref() is not None] == []


def test_shutdown_finishes_a_sized_map(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    results = rt.map(tasks.echo, range(2000))
    rt.shutdown()
    assert list(results) == list(range(2000))


def test_shutdown_that_cancels_ends_a_map(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1)
    results = rt.map(pass_through, [gate.path] * 50, range(50), chunksize=1)
    gate.arrived()
    rt.shutdown(wait=False, cancel_futures=True)
    gate.open(50)
    seen = []
    with pytest.raises(BaseException) as caught:
        for result in results:
            seen.append(result)
    assert type(caught.value).__name__ == "CancelledError"
    assert seen == [0]


def test_input_that_submits_to_a_runtime_that_was_shut_down(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    results = rt.map(tasks.echo, Counted())
    assert next(results) == 0
    rt.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        for _ in results:
            pass


def test_kill_workers_ends_a_map(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1)
    results = rt.map(pass_through, [gate.path] * 50, range(50))
    gate.arrived()
    rt.kill_workers()
    with pytest.raises(BrokenRuntime):
        list(results)


def test_abandoned_maps_leave_nothing_behind(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    for _ in range(50):
        with contextlib.closing(rt.map(tasks.echo, Counted())) as results:
            assert next(results) == 0
    until(lambda: idle(rt))
    stats = rt.stats()
    assert stats.failed == 0
    assert rt.submit(abs, -1).result() == 1
    assert set(rt._core.arena.owners()) <= {"host"}


# ---- found in review ---------------------------------------------------------------------------------


def test_chunksize_beyond_any_chunk(pool: Runtime) -> None:
    """The lease word has room for the index of an item, but not for any index."""
    assert list(pool.map(abs, range(70_000), chunksize=1 << 40)) == list(range(70_000))


def test_functions_give_way_to_arguments(factory: Callable[..., Runtime]) -> None:
    """Pickles of functions used long ago do not keep the region full for good."""
    rt = factory(1, region_size="1MiB", region_max="1MiB")
    for i in range(40):
        ballast = bytes(60_000)
        assert rt.submit(lambda ballast=ballast, i=i: (len(ballast), i)).result() == (60_000, i)
    assert rt.submit(len, bytes(700_000)).result() == 700_000
    assert rt._core.arena.held < 700_000


@BOTH
def test_an_item_cannot_end_the_iteration(pool: Runtime, name: str) -> None:
    """It is an error, as in the stdlib's executors, and does not hide the items after it."""
    results = getattr(pool, name)(next, [iter([1]), iter([])], chunksize=1)
    with pytest.raises(RuntimeError, match="item 1 of the map raised StopIteration") as info:
        list(results)
    assert isinstance(info.value.__cause__, StopIteration)
    (error,) = pool.map(next, [iter([])], return_exceptions=True)
    assert type(error) is StopIteration
