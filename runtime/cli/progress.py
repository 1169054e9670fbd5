"""The progress line of `runtime run`, on stderr.

    terminal     one line, drawn again five times a second, coloured where rich is installed;
                 what the program prints meanwhile appears above it
    otherwise    a plain line every ten seconds
    at the end   one line with the totals, on both

A daemon thread reads `rt.stats()`. It never raises into the program: a Runtime that has ended,
or a stderr that is closed, ends the progress.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TextIO

from runtime.terminal import PLAIN_INTERVAL, TERMINAL_INTERVAL, Line, PlainLines, Rate, is_terminal, rate_text

__all__ = ["Progress", "Rate", "Sample", "sample", "segments"]

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


def segments(now: Sample, rate: float) -> list[tuple[str, str]]:
    """The line as (text, style) pieces: joined, the texts are the plain line."""
    return [
        (f"{now.workers} worker{'' if now.workers == 1 else 's'}", "cyan"),
        (f", {now.queued:,} queued", ""),
        (f", {now.running:,} running", ""),
        (f", {now.done:,} done", "green"),
        (f", {now.failed:,} failed", "bold red" if now.failed else ""),
        (f", {rate_text(rate)} tasks/s", "bold"),
    ]


def summary(last: Sample, seconds: float) -> list[tuple[str, str]]:
    rate = last.finished / seconds if seconds > 0 else 0.0
    return [
        (f"{last.done:,} done", "green"),
        (f", {last.failed:,} failed", "bold red" if last.failed else ""),
        (f" in {seconds:.1f} s, {rate_text(rate)} tasks/s", ""),
    ]


class Progress:
    """Shows the progress of `rt` from `with` to its end.

    Thread-safety: one thread enters and leaves. Fork-safety: a child that prints passes through.
    Blocking: leaving waits for a line that is being drawn. Raises: nothing.
    """

    def __init__(self, rt: Any, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._rt = rt
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled and self._stream is not None
        self._terminal = self._enabled and is_terminal(self._stream)
        self._line: Line | PlainLines = Line(self._stream) if self._terminal else PlainLines(self._stream)
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
