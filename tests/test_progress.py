"""The bars of maps: what is drawn, when it ends, and that it never gets in the way."""

from __future__ import annotations

import asyncio
import gc
import io
import operator
import os
import pty
import select
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tasks
from tasks import Gate, pass_through
from watching import idle, settled, until

from runtime import Runtime, progress
from runtime import terminal as lines
from runtime.progress import Bar, open_bar

NAMES = pytest.mark.parametrize("name", ["map", "map_unordered"])


class Terminal:
    """A pseudo terminal as stderr; everything that is written to it is read at once."""

    def __init__(self) -> None:
        self.reader, writer = pty.openpty()
        self.stream = os.fdopen(writer, "w", encoding="utf-8")
        self.text = ""
        # Not the real one: between the parts of a test pytest puts its own streams there.
        self.sys = SimpleNamespace(stdout=self.stream, stderr=self.stream)

    def read(self) -> str:
        """All that has appeared so far."""
        while select.select([self.reader], [], [], 0)[0]:
            self.text += os.read(self.reader, 65536).decode(errors="replace")
        return self.text

    def close(self) -> None:
        self.stream.close()
        os.close(self.reader)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(progress, "sys", terminal.sys)
    monkeypatch.setattr(lines, "sys", terminal.sys)
    monkeypatch.setattr(progress, "TERMINAL_INTERVAL", 0.01)
    monkeypatch.setattr(progress, "_LOOK", 0.01)
    yield terminal
    gone()
    monkeypatch.undo()
    terminal.close()


@pytest.fixture
def no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console", "rich.text", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """stderr is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "_LOOK", 0.01)
    yield stream
    gone()


def gone() -> None:
    """No bar is drawn any more."""
    until(lambda: not any(t.name == "runtime-progress" for t in threading.enumerate()), "the bars are gone")


# ---- what is drawn ---------------------------------------------------------------------------------


@NAMES
def test_a_line_on_a_terminal(pool: Runtime, terminal: Terminal, no_rich: None, name: str) -> None:
    assert sorted(getattr(pool, name)(tasks.echo, range(200), progress=True)) == list(range(200))
    text = terminal.read()  # it was drawn before the iteration ended
    assert text.splitlines()[-1].endswith("items/s")
    assert "echo: 200/200 (100 %)" in text and "failed" not in text
    assert text.endswith("\n")


def test_richs_bar(pool: Runtime, terminal: Terminal) -> None:
    pytest.importorskip("rich")
    assert list(pool.map(tasks.echo, range(200), progress=True)) == list(range(200))
    gone()
    text = terminal.read()
    assert "echo" in text and "200/200" in text
    assert text.endswith("\n") or text.endswith("\x1b[?25h"), "the cursor is shown again"


def test_it_counts_what_nobody_has_taken(
    factory: Callable[..., Runtime], terminal: Terminal, no_rich: None, gate: Gate
) -> None:
    rt = factory(1)
    results = rt.map(pass_through, [gate.path] * 3, range(3), progress=True, chunksize=1)
    gate.arrived()
    until(lambda: "pass_through: 0/3 (0 %)" in terminal.read(), terminal.read)
    gate.open(2)
    until(lambda: "pass_through: 2/3 (66 %)" in terminal.read(), terminal.read)
    gate.open()
    until(lambda: "pass_through: 3/3 (100 %)" in terminal.read(), terminal.read)
    gone()  # though nobody has iterated
    assert list(results) == [0, 1, 2]


def test_failures_are_counted(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    got = pool.map(tasks.throw_type, [ValueError] * 5, progress=True, return_exceptions=True)
    assert len(list(got)) == 5
    assert "throw_type: 5/5 (100 %), 5 failed" in terminal.read()


def test_an_input_of_unknown_length(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    assert list(pool.map(tasks.echo, iter(range(50)), progress=True)) == list(range(50))
    assert "echo: 50/50 (100 %)" in terminal.read()  # known when the input has ended


def test_no_items_at_all(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    assert list(pool.map(tasks.echo, [], progress=True)) == []
    gone()
    assert "echo: 0/0 (100 %)" in terminal.read()


def test_amap(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    async def main() -> list[int]:
        return [value async for value in pool.amap(tasks.echo, range(100), progress=True)]

    assert asyncio.run(main()) == list(range(100))
    gone()
    assert "echo: 100/100 (100 %)" in terminal.read()


def test_what_is_printed_meanwhile_stands_above(
    pool: Runtime, terminal: Terminal, no_rich: None, gate: Gate
) -> None:
    results = pool.map(pass_through, [gate.path], ["x"], progress=True)
    gate.arrived()
    until(lambda: "0/1" in terminal.read(), terminal.read)
    print("hello", file=terminal.sys.stderr)
    until(lambda: "\r\x1b[Khello" in terminal.read(), terminal.read)
    gate.open()
    assert list(results) == ["x"]
    gone()
    assert terminal.sys.stderr is terminal.stream


def test_several_bars_share_the_terminal(
    factory: Callable[..., Runtime], terminal: Terminal, no_rich: None, gate: Gate
) -> None:
    rt = factory(2)
    first = rt.map(pass_through, [gate.path], ["x"], progress=True)
    second = rt.map(pass_through, [gate.path], ["y"], progress=True)
    gate.arrived(2)
    until(lambda: "items/s | pass_through: 0/1" in terminal.read(), terminal.read)
    assert sum(t.name == "runtime-progress" for t in threading.enumerate()) == 1
    gate.open(2)
    assert [*first, *second] == ["x", "y"]
    gone()
    assert terminal.sys.stderr is terminal.stream


def test_logs_are_not_filled(pool: Runtime, log: io.StringIO) -> None:
    assert list(pool.map(tasks.echo, range(100), progress=True)) == list(range(100))
    gone()
    assert log.getvalue() == ""


def test_a_line_now_and_then_in_a_log(
    factory: Callable[..., Runtime], log: io.StringIO, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.05)
    results = factory(1).map(pass_through, [gate.path] * 2, "ab", progress=True, chunksize=1)
    gate.arrived()
    until(lambda: log.getvalue().count("\n") >= 2, "two lines")
    gate.open(2)
    assert list(results) == ["a", "b"]
    lines = log.getvalue().splitlines()
    assert all(line.startswith("runtime: pass_through: ") for line in lines)
    assert "2/2 (100 %)" in lines[-1], "the last line says how it ended"


# ---- how it ends -------------------------------------------------------------------------------------


def test_an_item_that_raises_ends_it(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    with pytest.raises(ValueError):
        list(pool.map(tasks.throw_type, [ValueError] * 3, progress=True, chunksize=1))
    gone()
    assert terminal.read().endswith("\n")


@pytest.mark.parametrize("how", ["close", "drop", "shutdown", "kill"])
def test_ends_before_the_items(
    factory: Callable[..., Runtime], terminal: Terminal, no_rich: None, gate: Gate, how: str
) -> None:
    rt = factory(1)
    results: Any = rt.map(pass_through, [gate.path] * 9, range(9), progress=True, chunksize=1)
    gate.arrived()
    gate.open()
    assert next(results) == 0
    gate.arrived()
    until(lambda: "1/9" in terminal.read(), terminal.read)
    if how == "close":
        results.close()
    elif how == "drop":
        del results
        gc.collect()
    elif how == "shutdown":
        rt.shutdown(wait=False, cancel_futures=True)
    else:
        rt.kill_workers()
    gate.open(9)
    gone()
    until(lambda: idle(rt), "all is over")


def test_an_endless_input_that_nobody_takes(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    results = pool.map(tasks.echo, iter(int, 1), progress=True, buffersize=10)
    until(lambda: "echo: 10" in terminal.read(), terminal.read)
    del results
    gc.collect()
    gone()
    until(lambda: idle(pool), "what was taken has run")


def test_bad_arguments_leave_no_bar(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    for wrong in (lambda: pool.map(abs, 5, progress=True), lambda: pool.map(abs, [1], 5, progress=True)):
        with pytest.raises(TypeError):
            wrong()
    gone()


# ---- that it never gets in the way -------------------------------------------------------------------


def test_a_stream_that_is_closed(pool: Runtime, terminal: Terminal, no_rich: None, gate: Gate) -> None:
    results = pool.map(pass_through, [gate.path], "x", progress=True)
    gate.arrived()
    until(lambda: "0/1" in terminal.read(), terminal.read)
    terminal.stream.close()
    gone()
    gate.open()
    assert list(results) == ["x"]


def test_no_stderr(pool: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=None))
    assert list(pool.map(tasks.echo, range(9), progress=True)) == list(range(9))
    gone()


@pytest.mark.parametrize("wrong", [ValueError, AttributeError, MemoryError])
def test_a_rich_that_fails(
    pool: Runtime, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, wrong: type[Exception]
) -> None:
    def broken(*_: Any) -> Any:
        raise wrong("not today")

    monkeypatch.setattr(progress, "RichBars", broken)
    assert list(pool.map(tasks.echo, range(9), progress=True)) == list(range(9))
    gone()


def test_a_len_that_raises(pool: Runtime, terminal: Terminal, no_rich: None) -> None:
    class Odd(list[int]):
        def __len__(self) -> int:
            raise OSError("not now")

    assert list(pool.map(tasks.echo, Odd([1, 2]), progress=True)) == [1, 2]
    gone()


def test_the_end_waits_for_a_stuck_stream_a_moment_only(
    pool: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()

    class Stuck(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            stuck.wait(30)
            return len(text)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=Stuck()))
    monkeypatch.setattr(progress, "_LAST_DRAWING", 0.1)
    assert list(pool.map(tasks.echo, range(9), progress=True)) == list(range(9))
    stuck.set()
    gone()


def test_after_a_fork_the_child_draws_for_itself(
    pool: Runtime, terminal: Terminal, no_rich: None, gate: Gate
) -> None:
    results = pool.map(pass_through, [gate.path], "x", progress=True)
    gate.arrived()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            bar = open_bar("child", 1)  # not the parent's, whose thread is not here
            bar.add(1, 0)
            bar.finish(wait=True)
            code = 0 if bar.gone else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.open()
    assert list(results) == ["x"]


def test_without_a_bar_nothing_is_made(pool: Runtime, terminal: Terminal) -> None:
    before = threading.active_count()
    assert list(pool.map(tasks.echo, range(9))) == list(range(9))
    assert threading.active_count() == before and terminal.read() == ""


# ---- others' bars --------------------------------------------------------------------------------------


@NAMES
def test_length_hint(pool: Runtime, name: str) -> None:
    results = getattr(pool, name)(tasks.echo, [1, 2, 3], range(10))
    assert operator.length_hint(results) == 3
    next(results)
    assert operator.length_hint(results) == 2
    assert len(list(results)) == 2
    assert operator.length_hint(results) == 0
    unsized = getattr(pool, name)(tasks.echo, iter([1]), [2])
    assert operator.length_hint(unsized, -1) == -1
    assert list(unsized) == [(1, 2)]
    closed = getattr(pool, name)(tasks.echo, range(100))
    next(closed)
    closed.close()
    assert operator.length_hint(closed) == 0


def test_tqdm_wraps_it(pool: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm itself if it is installed, else what it does: iterate, and count."""
    try:
        from tqdm import tqdm

        monkeypatch.setattr(tqdm, "monitor_interval", 0)  # its thread would stay
    except ImportError:

        def tqdm(iterable: Any, total: int, file: Any) -> Iterator[Any]:
            seen = 0
            for value in iterable:
                yield value
                seen += 1
            assert seen == total

    assert list(tqdm(pool.map(tasks.echo, range(30)), total=30, file=io.StringIO())) == list(range(30))
    settled(pool)


def test_the_text_of_a_bar() -> None:
    bar = Bar("resize", 1200, None)
    assert bar.text() == "resize: 0/1,200 (0 %), 0.0 items/s"
    bar.add(1100, 3)
    assert bar.text().startswith("resize: 1,100/1,200 (91 %), 3 failed, ")
    bar.cut(1100)
    assert "(100 %)" in bar.text()
    assert Bar("x", None, None).text() == "x: 0, 0.0 items/s"
