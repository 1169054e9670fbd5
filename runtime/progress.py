"""The progress bars of maps, on stderr: `map(..., progress=True)`.

    collector ──add()──► Bar ◄──looks── one daemon thread, while there is a bar ──draws──► stderr

    terminal     rich's bars where rich is installed, else one line; drawn five times a second and at the end
    otherwise    a plain line every ten seconds, and one at the end if there was any before

A bar counts outcomes as they arrive, whether or not they are taken. Nothing here raises into the user's code:
a stream that is closed, or a rich that fails, ends the drawing.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from typing import Any, Final, Protocol, TextIO

from runtime.terminal import PLAIN_INTERVAL, TERMINAL_INTERVAL, Line, PlainLines, Rate, is_terminal, rate_text

__all__ = ["Bar", "open_bar"]

_LAST_DRAWING: Final = 1.0  # seconds that the end of a map waits for it, at most
_LOOK: Final = 0.2  # seconds between two looks at whether a bar has come to its end


class Bar:
    """The counts of one map. total: items in all, or None.

    Thread-safety: `add` under a lock of the caller's; the rest from any thread, destructors included.
    """

    def __init__(self, name: str, total: int | None, display: Display | None) -> None:
        self.name, self.total = name, total
        self.done = self.failed = 0
        self.rate = Rate(2.0)
        self.over = False  # nothing more is counted
        self.gone = False  # and it was drawn for the last time
        self._display = display

    def add(self, count: int, failed: int) -> None:
        """So many outcomes have come, so many of them failures."""
        self.done += count
        self.failed += failed

    def cut(self, total: int) -> None:
        """The input has ended, after so many items."""
        self.total = total

    def finish(self, wait: bool = False) -> None:
        """The map is over. wait: return when the bar was drawn for the last time, or after a second."""
        display = self._display
        self.over = True
        if display is not None and display.pid == os.getpid():
            display.finished(self, wait)

    def text(self) -> str:
        """The counts in words."""
        many = f"{self.done:,}"
        if self.total is not None:
            percent = 100 * self.done // self.total if self.total else 100
            many += f"/{self.total:,} ({percent} %)"
        failed = f", {self.failed:,} failed" if self.failed else ""
        return f"{self.name}: {many}{failed}, {rate_text(self.rate.add(time.monotonic(), self.done))} items/s"


class Screen(Protocol):
    """Where bars are drawn."""

    interval: float

    def draw(self, bars: list[Bar]) -> bool:
        """Show them as they are now. False: it cannot be shown any more."""

    def end(self, bar: Bar) -> None:
        """Show a bar for the last time."""

    def close(self) -> None:
        """No bar is left."""


class Lines:
    """A line on a terminal, or plain lines."""

    def __init__(self, stream: TextIO, terminal: bool) -> None:
        self.interval = TERMINAL_INTERVAL if terminal else PLAIN_INTERVAL
        self._line: Line | PlainLines = Line(stream) if terminal else PlainLines(stream)
        self._terminal = terminal
        self._shown: set[Bar] = set()
        self._line.open()

    def draw(self, bars: list[Bar]) -> bool:
        self._shown.update(bars)
        if self._terminal:
            return self._line.draw([(" | ".join(bar.text() for bar in bars), "")])
        return all([self._line.draw([(bar.text(), "")]) for bar in bars])

    def end(self, bar: Bar) -> None:
        if isinstance(self._line, Line):
            self._line.keep([(bar.text(), "")])
        elif bar in self._shown:
            self._line.draw([(bar.text(), "")])
        self._shown.discard(bar)

    def close(self) -> None:
        self._line.close([])


class RichBars:
    """rich's bars on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.interval = TERMINAL_INTERVAL
        rich = importlib.import_module("rich.progress")
        console = importlib.import_module("rich.console").Console(file=stream)
        self._progress: Any = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[failed]}", style="bold red"),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._tasks: dict[Bar, Any] = {}
        self._progress.start()

    def draw(self, bars: list[Bar]) -> bool:
        for bar in bars:
            self._update(bar)
        self._progress.refresh()
        return True

    def _update(self, bar: Bar) -> None:
        if bar not in self._tasks:
            self._tasks[bar] = self._progress.add_task(bar.name, total=bar.total, failed="")
        failed = f"{bar.failed:,} failed" if bar.failed else ""
        self._progress.update(self._tasks[bar], completed=bar.done, total=bar.total, failed=failed)

    def end(self, bar: Bar) -> None:
        self._update(bar)
        self._progress.stop_task(self._tasks.pop(bar))
        self._progress.refresh()

    def close(self) -> None:
        self._progress.stop()


def _screen(stream: TextIO) -> Screen:
    if is_terminal(stream):
        with contextlib.suppress(ImportError):
            return RichBars(stream)
        return Lines(stream, True)
    return Lines(stream, False)


class Display:
    """The thread that draws, while there are bars. One for a process."""

    def __init__(self, stream: TextIO) -> None:
        self.pid = os.getpid()
        self.stream = stream
        self._changed = threading.Condition()  # re-entrant: a destructor may come in
        self._bars: list[Bar] = []
        self.drawing = False  # there is a thread

    def show(self, bar: Bar) -> None:
        with self._changed:
            self._bars.append(bar)
            if self.drawing:
                return
            self.drawing = True
        try:
            threading.Thread(target=self._run, name="runtime-progress", daemon=True).start()
        except RuntimeError:  # no more threads, or the interpreter ends: no bar
            self._give_up()

    def finished(self, bar: Bar, wait: bool) -> None:
        with self._changed:
            self._changed.notify_all()
            if wait:
                self._changed.wait_for(lambda: bar.gone, _LAST_DRAWING)

    def _run(self) -> None:
        try:
            self._draw()
        except Exception:  # whatever it is, it is not worth a task of the user's
            pass
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Nobody draws any more."""
        with self._changed:
            self.drawing = False
            for bar in self._bars:
                bar.gone = True
            self._bars.clear()
            self._changed.notify_all()

    def _draw(self) -> None:
        """Until no bar is left."""
        drawn = time.monotonic()
        screen: Screen | None = None
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: any(bar.over for bar in self._bars), _LOOK)
                    bars = list(self._bars)
                screen = screen or _screen(self.stream)
                for bar in bars:
                    if bar.over or (bar.total is not None and bar.done >= bar.total):
                        screen.end(bar)
                        with self._changed:
                            self._bars.remove(bar)
                            bar.gone = True
                            self._changed.notify_all()
                with self._changed:
                    bars = list(self._bars)
                    if not bars:
                        self.drawing = False
                        return
                if time.monotonic() - drawn >= screen.interval:
                    drawn = time.monotonic()
                    if not screen.draw(bars):
                        return
        finally:
            if screen is not None:
                screen.close()


_display: Display | None = None


def open_bar(name: str, total: int | None) -> Bar:
    """A bar on stderr, beside those that are drawn already; one that only counts if there is no stderr."""
    global _display
    display = _display
    if display is None or display.pid != os.getpid() or not display.drawing:
        if sys.stderr is None:
            return Bar(name, total, None)
        display = _display = Display(sys.stderr)
    bar = Bar(name, total, display)
    display.show(bar)
    return bar
