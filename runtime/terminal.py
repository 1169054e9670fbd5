"""Lines of progress on a stream: drawn over and over on a terminal, now and then anywhere else.

    Line         one line at the bottom of a terminal; what the program prints meanwhile appears above it
    PlainLines   whole lines, for logs

A line is a list of (text, style) pieces; the styles show where rich is installed. Nothing here raises into
the program: a stream that is closed ends the drawing.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections import deque
from typing import Any, Final, TextIO

__all__ = ["PLAIN_INTERVAL", "TERMINAL_INTERVAL", "Line", "PlainLines", "Rate", "is_terminal", "rate_text"]

TERMINAL_INTERVAL: Final = 0.2  # seconds between two drawings on a terminal
PLAIN_INTERVAL: Final = 10.0  # the same elsewhere


class Rate:
    """Tasks finished per second over the last `window` seconds."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._points: deque[tuple[float, int]] = deque()

    def add(self, now: float, finished: int) -> float:
        """Takes a reading of the clock (seconds) and the total so far; the rate, 0.0 at first."""
        points = self._points
        points.append((now, finished))
        while len(points) > 2 and points[1][0] <= now - self._window:
            points.popleft()
        then, before = points[0]
        return max(0.0, (finished - before) / (now - then)) if now > then else 0.0


def rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


class PlainLines:
    """For logs: whole lines, nothing drawn over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def open(self) -> None:
        pass

    def draw(self, pieces: list[tuple[str, str]]) -> bool:
        return _write(self._stream, f"runtime: {_plain(pieces)}\n")

    def close(self, pieces: list[tuple[str, str]]) -> None:
        if pieces:
            self.draw(pieces)


class Line:
    """For terminals: one line at the bottom, erased before anything else is written.

    sys.stdout and sys.stderr are wrapped while it is open, if they are terminals, so that a
    program's print erases the line first; it is drawn again only where a line begins.
    """

    def __init__(self, stream: TextIO) -> None:
        self.lock = threading.RLock()
        self._stream = stream
        self._drawn = False
        self._at_start = True  # the cursor is at the start of a line (apart from ours)
        self._wrapped: dict[str, _Wrapped] = {}
        self._console: Any = None

    def open(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and is_terminal(stream):
                self._wrapped[name] = _Wrapped(stream, self)
                setattr(sys, name, self._wrapped[name])

    def draw(self, pieces: list[tuple[str, str]]) -> bool:
        text = self._styled(pieces)
        with self.lock:
            if not self._at_start:
                return True
            self._drawn = True
            return _write(self._stream, "\r\x1b[K" + text)

    def erase(self) -> None:
        with self.lock:
            if self._drawn:
                self._drawn = False
                _write(self._stream, "\r\x1b[K")

    def wrote(self, text: str) -> None:
        if text:
            self._at_start = text.endswith(("\n", "\r"))

    def close(self, pieces: list[tuple[str, str]]) -> None:
        self.erase()
        for name, wrapped in self._wrapped.items():
            if getattr(sys, name) is wrapped:
                setattr(sys, name, wrapped.stream)
        if pieces:
            self.keep([("runtime: ", ""), *pieces])

    def keep(self, pieces: list[tuple[str, str]]) -> None:
        """A line that stays."""
        with self.lock:
            self.erase()
            begin = "" if self._at_start else "\n"
            self._at_start = True
            _write(self._stream, f"{begin}{self._styled(pieces)}\n")

    def _styled(self, pieces: list[tuple[str, str]]) -> str:
        """One line that fits. rich is imported at the first drawing: short runs never pay for it."""
        if self._console is None:
            try:
                console = importlib.import_module("rich.console")
                self._console = console.Console(file=self._stream, highlight=False)
            except ImportError:
                self._console = False
        if self._console is False:
            return _plain(pieces)[: max(1, _columns(self._stream) - 1)]
        line = importlib.import_module("rich.text").Text.assemble(*pieces, no_wrap=True, overflow="ellipsis")
        line.truncate(max(1, self._console.width - 1))
        with self._console.capture() as capture:
            self._console.print(line, end="", soft_wrap=True)
        return str(capture.get())


class _Wrapped:
    """A text stream that erases the progress line before it writes."""

    def __init__(self, stream: TextIO, line: Line) -> None:
        self.stream = stream
        self._line = line
        self._pid = os.getpid()

    def write(self, text: str) -> int:
        if os.getpid() != self._pid:  # a forked child: the lock may be held by a thread that it has not got
            return self.stream.write(text)
        with self._line.lock:
            self._line.erase()
            self._line.wrote(text)
            return self.stream.write(text)

    def writelines(self, lines: Any) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _plain(pieces: list[tuple[str, str]]) -> str:
    return "".join(text for text, _ in pieces)


def _write(stream: TextIO, text: str) -> bool:
    """Writes at once; False if the stream is gone."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
