"""Reports of a running task, as its future shows them; what is counted of a worker's time."""

from __future__ import annotations

import ctypes
import decimal
import gc
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import tasks
from tasks import Gate, pass_through
from watching import all_ready, settled, shut_down_clean, until

import runtime
from runtime import Runtime, TaskTimeout, WorkerDied, WorkerInfo


def report(*args: Any) -> Any:
    """Report this, and return."""
    runtime.current().report(*args)


def report_and_pass(path: str, *reports: tuple[Any, ...]) -> str:
    """Report each, with a stop at the gate behind it."""
    for args in reports:
        runtime.current().report(*args)
        pass_through(path)
    return "done"


def report_and(what: Callable[..., Any], *args: Any) -> Any:
    runtime.current().report(1, 2, "before")
    return what(*args)


def report_by_attempt(path: str) -> int:
    """Only the first attempt reports; the second one waits at the gate."""
    attempt = runtime.current().attempt
    if attempt == 1:
        runtime.current().report(99)
        tasks.kill_self()
    pass_through(path)
    return attempt


def count_up(stop: int, note: bool) -> None:
    """Report without end: all three say the same."""
    say = runtime.current().report
    for i in range(stop):
        say(i, i, str(i) * 8 if note else "")


def count_up_for_ever() -> None:
    while True:
        count_up(1_000_000, True)


def time_of_report(count: int) -> float:
    """Seconds for a report, the least of several runs, less those of an empty loop with a call in it."""
    say = runtime.current().report

    def nothing(done: int, total: int | None = None, note: str = "") -> None: ...

    def run(call: Callable[[int], Any]) -> float:
        began = time.perf_counter()
        for i in range(count):
            call(i)
        return (time.perf_counter() - began) / count

    return min(run(say) for _ in range(20)) - min(run(nothing) for _ in range(20))


# ---- what is shown -----------------------------------------------------------------------------------


def test_the_newest_report_while_it_runs_and_the_last_one_after(pool: Runtime, gate: Gate) -> None:
    future = pool.submit(report_and_pass, gate.path, (1, 3, "one"), (2.5, 3.0), (3,))
    seen = []
    for _ in range(3):
        gate.arrived()
        seen.append(future.progress())
        gate.open()
    assert seen == [(1, 3, "one"), (2.5, 3.0, ""), (3, None, "")]
    assert [type(value) for value in seen[0][:2]] == [int, int]
    assert [type(value) for value in seen[1][:2]] == [float, float]
    assert future.result() == "done"
    assert future.progress() == (3, None, "")


def test_none_before_the_first_report(pool: Runtime, gate: Gate) -> None:
    held = [pool.submit(pass_through, gate.path) for _ in range(2)]
    gate.arrived(2)
    waiting = pool.submit(report, 5)
    assert [f.progress() for f in (*held, waiting)] == [None] * 3
    gate.open(2)
    waiting.result()
    assert waiting.progress() == (5, None, "")
    assert held[0].result() is None
    assert held[0].progress() is None
    assert runtime.Future().progress() is None


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ((tasks.throw_type, ValueError), ValueError),
        ((tasks.kill_self,), WorkerDied),
        ((os._exit, 3), WorkerDied),
    ],
)
def test_the_last_report_of_a_task_that_failed(
    factory: Callable[..., Runtime], what: tuple[Any, ...], kind: type
) -> None:
    future = factory(1).submit(report_and, *what)
    assert isinstance(future.exception(), kind)
    assert future.progress() == (1, 2, "before")


def test_the_last_report_of_a_task_that_was_killed(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    rt.submit(report, 1).result()  # its module is imported: that takes time, too
    late = rt.options(timeout=0.2).submit(report_and, tasks.hang)
    assert isinstance(late.exception(), TaskTimeout)
    assert late.progress() == (1, 2, "before")
    future = rt.submit(report_and, tasks.hang)
    until(lambda: future.progress() is not None, "it has reported")
    assert rt.cancel(future, running=True)
    assert future.exception() is not None
    assert future.progress() == (1, 2, "before")


def test_a_retry_starts_without_a_report(factory: Callable[..., Runtime], gate: Gate) -> None:
    future = factory(1, retries=1).submit(report_by_attempt, gate.path)
    gate.arrived()
    assert future.progress() is None
    gate.open()
    assert future.result() == 2
    assert future.progress() is None


def test_a_lease_entry_that_is_used_again_shows_nothing_of_before(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    for i in range(600):  # more than a lease table has entries
        future = rt.submit(report, i) if i % 2 else rt.submit(abs, -i)
        future.result()
        assert future.progress() == ((i, None, "") if i % 2 else None)


def test_many_results_at_once(pool: Runtime) -> None:
    futures = [pool.submit(report, i, 2 * i, str(i)) for i in range(2000)]
    assert [f.result() for f in futures] == [None] * 2000
    assert [f.progress() for f in futures] == [(i, 2 * i, str(i)) for i in range(2000)]


def test_items_of_a_map_may_report(pool: Runtime) -> None:
    assert list(pool.map(report, range(500), chunksize=50)) == [None] * 500


def test_a_large_result_takes_nothing_away(pool: Runtime) -> None:
    future = pool.submit(report_and, bytes, 1_000_000)
    assert future.result() == bytes(1_000_000)
    assert future.progress() == (1, 2, "before")


# ---- what is accepted --------------------------------------------------------------------------------


@pytest.mark.parametrize("note", ["", "short", "ä" * 34, "x" * 69, "with a \0 in it"])
def test_notes_that_fit(pool: Runtime, note: str) -> None:
    future = pool.submit(report, 1, None, note)
    future.result()
    assert future.progress() == (1, None, note)


@pytest.mark.parametrize(
    ("note", "shown"),
    [
        ("x" * 70, "x" * 69),
        ("y" * 100_000, "y" * 69),
        ("ä" * 35, "ä" * 34),
        ("x" * 67 + "€", "x" * 67),
        ("x" * 66 + "\N{PILE OF POO}", "x" * 66),
        ("\N{PILE OF POO}" * 20, "\N{PILE OF POO}" * 17),
        ("half \ud800", "half ?"),
    ],
)
def test_notes_are_cut_between_two_characters(pool: Runtime, note: str, shown: str) -> None:
    future = pool.submit(report_codes, [ord(c) for c in note])
    future.result()
    assert future.progress() == (1, None, shown)


def report_codes(codes: list[int]) -> None:
    runtime.current().report(1, None, "".join(map(chr, codes)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, 0), (2**63 - 1, 2**63 - 1), (True, 1), (1e300, 1e300), (0.0, 0.0), (decimal.Decimal("2.5"), 2.5)],
)
def test_numbers(pool: Runtime, value: Any, shown: Any) -> None:
    future = pool.submit(report, value, value)
    future.result()
    assert future.progress() == (shown, shown, "")


def test_numbers_of_numpy(pool: Runtime) -> None:
    numpy = pytest.importorskip("numpy")
    future = pool.submit(report, numpy.int32(3), numpy.float32(4.5))
    future.result()
    assert future.progress() == (3, 4.5, "")


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ((-1,), ValueError),
        ((-0.5,), ValueError),
        ((math.nan,), ValueError),
        ((1, math.inf), ValueError),
        ((1, -2), ValueError),
        ((2**63,), OverflowError),
        ((1, 2**200), OverflowError),
        (("1",), TypeError),
        ((None,), TypeError),
        ((1j,), TypeError),
        ((1, "2"), TypeError),
        ((1, 2, b"note"), TypeError),
        ((1, 2, None), TypeError),
    ],
)
def test_what_is_no_report_is_refused_and_changes_nothing(
    pool: Runtime, args: tuple[Any, ...], kind: type[Exception]
) -> None:
    future = pool.submit(report_and, report, *args)
    assert type(future.exception()) is kind
    assert str(future.exception())
    assert future.progress() == (1, 2, "before")


def test_where_no_task_runs_a_report_does_nothing(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1, initializer=report, initargs=(1,))
    assert rt.submit(keep_reporting_behind).result() is None
    idle_report = rt.submit(pass_through, gate.path)
    gate.arrived()
    gate.open()
    assert idle_report.result() is None


def keep_reporting_behind() -> None:
    """A thread that outlives its task goes on reporting."""
    say = runtime.current().report

    def run() -> None:
        for _ in range(10_000):
            say(7)

    threading.Thread(target=run, daemon=True).start()


# ---- one writer, one reader, no lock ---------------------------------------------------------------


def test_no_torn_mix_is_ever_shown(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    seen = 0
    while seen <= 10:  # on a busy machine one call may be over before the host has looked so often
        future = rt.submit(count_up, 150_000, True)
        last = -1
        while not future.done():
            shown = future.progress()
            if shown is not None:
                done, total, note = shown
                assert done == total and note == (str(done) * 8)[:69]
                assert done >= last, "an older report after a newer one"
                seen += done != last
                last = int(done)
        assert future.exception() is None
        assert future.progress() == (149_999, 149_999, ("149999" * 8)[:69])


@pytest.mark.stress
def test_killed_in_the_middle_of_a_report_a_whole_one_is_left(factory: Callable[..., Runtime]) -> None:
    rt = factory(2)
    all_ready(rt)
    for _ in range(25):
        future = rt.submit(count_up_for_ever)
        until(lambda f=future: f.progress() is not None, "it has reported")  # type: ignore[misc]
        assert rt.cancel(future, running=True)
        shown = future.progress()
        assert shown is not None and shown[0] == shown[1] and shown[2] == (str(shown[0]) * 8)[:69]
        assert future.exception() is not None
    settled(rt)


def test_a_report_that_is_half_written_hides_none(factory: Callable[..., Runtime]) -> None:
    """What a worker leaves that is killed as it writes: the next report is spoilt, not the last one."""
    future = factory(1, region_max="4MiB").submit(spoil_the_older_and_die)  # it looks at all that is mapped
    assert isinstance(future.exception(), WorkerDied)
    assert future.progress() == (2, 4, "KEEPKEEPKEEP")


def spoil_the_older_and_die() -> None:
    runtime.current().report(1, 2, "OLD!" * 3)
    runtime.current().report(2, 4, "KEEP" * 3)
    if overwrite(b"OLD!" * 3, -19, 69) == 1:  # all of it: numbers, kinds, note
        tasks.kill_self()


@pytest.mark.parametrize("field", ["kind", "length"])
def test_a_worker_that_writes_nonsense_shows_nothing(factory: Callable[..., Runtime], field: str) -> None:
    future = factory(1, region_max="4MiB").submit(scribble, field)
    future.result()
    assert future.progress() is None


def scribble(field: str) -> None:
    """Report, then overwrite the kind, or the length of the note."""
    runtime.current().report(1, 1, "MARK" * 3)
    at = -3 if field == "kind" else -1
    if overwrite(b"MARK" * 3, at, at + 1) != 1:
        raise AssertionError("it is not where it should be")


def overwrite(note: bytes, start: int, end: int) -> int:
    """Fill a stretch around each such note in the region with 0xFF; how many there are."""
    count = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "memfd:" in line and " rw" in line:
                first, last = (int(n, 16) for n in line.split()[0].split("-"))
                memory = (ctypes.c_char * (last - first)).from_address(first)
                at = memory.raw.find(note)
                while at >= 0:
                    ctypes.memset(first + at + start, 0xFF, end - start)
                    count += 1
                    at = memory.raw.find(note, at + 1)
    return count


def test_a_report_costs_less_than_ten_microseconds_and_no_call_of_the_system(pool: Runtime) -> None:
    """Promised is one; ten times that is asserted."""
    assert pool.submit(time_of_report, 5000).result() < 10e-6


# ---- the time of workers -----------------------------------------------------------------------------


def test_busy_counts_the_time_in_user_code(factory: Callable[..., Runtime], gate: Gate) -> None:
    rt = factory(1)
    all_ready(rt)
    before = rt.workers()[0].busy
    assert rt.submit(spin, 0.2).result() >= 0.2
    after = rt.workers()[0].busy
    assert after - before >= 0.2
    future = rt.submit(pass_through, gate.path)
    gate.arrived()
    first = until(
        lambda: rt.workers()[0].busy - after > 0.01 and rt.workers()[0].busy, "the running task counts"
    )
    gate.open()
    future.result()
    assert rt.workers()[0].busy >= first
    idle = rt.workers()[0].busy
    assert rt.workers()[0].busy == idle, "it stands still while nothing runs"


def spin(seconds: float) -> float:
    began = time.monotonic()
    while (took := time.monotonic() - began) < seconds:
        pass
    return took


def test_busy_never_goes_backwards_and_outlives_processes(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, max_tasks_per_child=20)
    stop = threading.Event()
    wrong: list[Any] = []

    def look() -> None:
        last = [0.0, 0.0]
        while not stop.is_set():
            now = [w.busy for w in rt.workers()]
            if any(b < a for a, b in zip(last, now, strict=True)):
                wrong.append((last, now))
            last = now

    watcher = threading.Thread(target=look)
    watcher.start()
    total = sum(rt.map(spin, [0.001] * 300))
    assert isinstance(rt.submit(report_and, tasks.kill_self).exception(), WorkerDied)
    stop.set()
    watcher.join()
    assert not wrong
    assert sum(w.busy for w in rt.workers()) >= total
    shut_down_clean(rt)


def test_busy_of_items_too_quick_for_the_clock(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, max_tasks_per_child=1000)
    assert list(rt.map(abs, range(3500))) == list(range(3500))
    (info,) = rt.workers()
    assert info.tasks_done == 3500, "an item was counted twice where a process left"
    assert 0 < info.busy < 60


def test_the_new_field_is_the_last_one() -> None:
    assert list(WorkerInfo.__dataclass_fields__) == [
        "number", "slot", "pid", "generation", "status", "started", "tasks_done", "task", "rss", "busy",
    ]  # fmt: skip
    gc.collect()


# ---- numbers that take their time ----------------------------------------------------------------

converting, converted = threading.Event(), threading.Event()  # in the worker


class Slow:
    def __index__(self) -> int:
        converting.set()
        converted.wait(30)
        return 77


def leave_a_thread_that_reports() -> None:
    thread = runtime.current().local["thread"] = threading.Thread(target=report, args=(Slow(),))
    thread.start()
    assert converting.wait(30)


def let_it_report() -> None:
    converted.set()
    runtime.current().local["thread"].join()


def test_a_report_does_not_reach_the_task_that_runs_when_its_number_is_there(
    factory: Callable[..., Runtime],
) -> None:
    rt = factory(1)
    rt.submit(leave_a_thread_that_reports).result(30)
    future = rt.submit(let_it_report)
    assert future.result(30) is None
    assert future.progress() is None
