"""The progress line of `runtime run`, on stderr.

    terminal     one line, drawn again five times a second, coloured where rich is installed;
                 what the program prints meanwhile appears above it
    otherwise    a plain line every ten seconds
    at the end   one line with the totals, on both

A daemon thread reads `rt.stats()`. It never raises into the program: a Runtime that has ended,
or a stderr that is closed, ends the progress.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TextIO

__all__ = ["Progress", "Rate", "Sample", "sample", "segments"]

TERMINAL_INTERVAL: Final = 0.2
PLAIN_INTERVAL: Final = 10.0
_RATE_WINDOW: Final = 2.0  # seconds over which tasks/s is averaged on a terminal


@dataclass(frozen=True, slots=True)
class Sample:
    """What one line shows. Counts of tasks; `workers` of processes."""

    workers: int
    queued: int  # not started: in the host or leased to a worker
    running: int
    done: int
    failed: int

    @property
    def finished(self) -> int:
        return self.done + self.failed


def sample(stats: Any) -> Sample:
    return Sample(stats.workers, stats.queued + stats.leased, stats.running, stats.done, stats.failed)


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


def segments(now: Sample, rate: float) -> list[tuple[str, str]]:
    """The line as (text, style) pieces: joined, the texts are the plain line."""
    return [
        (f"{now.workers} worker{'' if now.workers == 1 else 's'}", "cyan"),
        (f", {now.queued:,} queued", ""),
        (f", {now.running:,} running", ""),
        (f", {now.done:,} done", "green"),
        (f", {now.failed:,} failed", "bold red" if now.failed else ""),
        (f", {_rate(rate)} tasks/s", "bold"),
    ]


def summary(last: Sample, seconds: float) -> list[tuple[str, str]]:
    rate = last.finished / seconds if seconds > 0 else 0.0
    return [
        (f"{last.done:,} done", "green"),
        (f", {last.failed:,} failed", "bold red" if last.failed else ""),
        (f" in {seconds:.1f} s, {_rate(rate)} tasks/s", ""),
    ]


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


class Progress:
    """Shows the progress of `rt` from `with` to its end.

    Thread-safety: one thread enters and leaves. Fork-safety: a child that prints passes through.
    Blocking: leaving waits for a line that is being drawn. Raises: nothing.
    """

    def __init__(self, rt: Any, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._rt = rt
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled and self._stream is not None
        self._terminal = self._enabled and _is_terminal(self._stream)
        self._line: _Line | _PlainLines = _Line(self._stream) if self._terminal else _PlainLines(self._stream)
        self._rate = Rate(_RATE_WINDOW if self._terminal else PLAIN_INTERVAL)
        self._last: Sample | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="runtime-progress", daemon=True)
        self._started = 0.0

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._enabled:
            self._line.open()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled:
            return
        self._stop.set()
        self._thread.join()
        last = self._read() or self._last
        quiet = last is None or (kind is not None and issubclass(kind, KeyboardInterrupt))
        self._line.close([] if quiet or last is None else summary(last, time.monotonic() - self._started))

    def _loop(self) -> None:
        interval = TERMINAL_INTERVAL if self._terminal else PLAIN_INTERVAL
        self._tick(draw=False)
        while not self._stop.wait(interval) and self._tick():
            pass

    def _tick(self, *, draw: bool = True) -> bool:
        """Reads and draws once; False ends the loop."""
        now = self._read()
        if now is None:
            return False
        rate = self._rate.add(time.monotonic(), now.finished)
        return not draw or self._line.draw(segments(now, rate))

    def _read(self) -> Sample | None:
        try:
            self._last = sample(self._rt.stats())
        except Exception:
            return None
        return self._last


class _PlainLines:
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


class _Line:
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
            if stream is not None and _is_terminal(stream):
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
            begin = "" if self._at_start else "\n"
            _write(self._stream, f"{begin}{self._styled([('runtime: ', ''), *pieces])}\n")

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

    def __init__(self, stream: TextIO, line: _Line) -> None:
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


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):
        return False


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
