"""`map` and `map_unordered`: items in, results out, as the workers finish them.

    input ──feed()──► Batch (waiting) ──chunks──► workers ──► deliver() ──► Results ──next()──► user
             in the user's thread alone                in the collector

A sized input is taken whole when `map` is called, as the stdlib does, and runs to its end even if nobody
iterates. Of any other a bounded window is taken, and more as results are consumed.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from queue import Empty, SimpleQueue
from typing import Any

from runtime import _core, serializer
from runtime.config import TaskOptions
from runtime.locks import SLICE
from runtime.progress import Bar

__all__ = ["LATE", "Results", "Run", "check_sizes", "total_of"]

_WINDOW_PER_WORKER = 256  # items of an unsized input that are out per worker, at most
_WINDOW_BYTES = 32 << 20  # bytes of their pickles, at most
_GROUP = 4096  # items that are taken from the input at a time, at most
_QUICK = 0.0005  # seconds: an input that needs longer for a group gives smaller ones
LATE = "the results of map() did not come within its timeout"
_REPR = 200  # characters of an item in the note on its error
_ENDINGS = (StopIteration, StopAsyncIteration)  # what ends an iterator


class Run:
    """One map under way: what the collector delivers to and the iterator takes from.

    Thread-safety: `deliver` and `fail` may be called from any thread, `take` from the one that iterates.
    There is no lock (see locks.py): who delivers stores first and looks whether somebody waits afterwards,
    who waits says so first and looks afterwards, so one of the two sees the other.
    """

    def __init__(
        self, options: TaskOptions, ordered: bool, return_exceptions: bool, bar: Bar | None = None
    ) -> None:
        self.retries = options.retries
        self.retry_on = options.retry_on
        self.return_exceptions = return_exceptions
        self._ordered = ordered
        # Outcomes that were not taken yet, by the index of the first: results in a row, or one exception.
        self._ready: dict[int, list[Any] | Failure] = {}
        self._arrived: deque[int] = deque()  # their order of arrival
        self._waits = False  # somebody does, or is about to
        self._wakes: SimpleQueue[None] = SimpleQueue()  # what wakes him; one too many does no harm
        self._next = 0
        self._bar = bar
        self._listener: Callable[[], object] | None = None  # who cannot wait here: called once

    def deliver(self, index: int, values: list[Any]) -> None:
        """The results of items index .. index+len(values)-1. The list is ours from now on."""
        values.reverse()  # so that the iterator can pop them, and keeps none that it has yielded
        self._put(index, values)

    def fail(self, span: _core.Span, error: BaseException) -> None:
        """The outcome of the first item of a span is an exception."""
        self._put(span.first, Failure(error, span))

    def _put(self, index: int, outcome: list[Any] | Failure) -> None:
        if self._bar is not None:
            failed = isinstance(outcome, Failure)
            self._bar.add(1 if isinstance(outcome, Failure) else len(outcome), int(failed))
        self._ready[index] = outcome
        if not self._ordered:
            self._arrived.append(index)
        elif index != self._next:
            return
        if self._waits:
            self._waits = False
            self._wakes.put(None)
        listener, self._listener = self._listener, None
        if listener is not None:
            listener()

    def take(self, deadline: float | None) -> tuple[int, list[Any] | Failure]:
        """The next outcomes, and the index of the first. Raises: TimeoutError at `deadline` (monotonic
        seconds).
        """
        while (found := self._pop()) is None:
            self._waits = True
            if (found := self._pop()) is not None:
                break
            left = SLICE if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(LATE)
            try:  # suppress() is code: Ctrl-C that came meanwhile would tell of Empty, too
                self._wakes.get(timeout=min(left, SLICE))
            except Empty:
                pass
        return found

    def take_now(self, listener: Callable[[], object]) -> tuple[int, list[Any] | Failure] | None:
        """As `take`, without waiting. None: there is nothing yet; `listener` is called when there is."""
        if (found := self._pop()) is None:
            self._listener = listener
            if (found := self._pop()) is not None:
                self._listener = None
        return found

    def _pop(self) -> tuple[int, list[Any] | Failure] | None:
        index = self._next if self._ordered else self._arrived[0] if self._arrived else -1
        if index not in self._ready:
            return None
        outcome = self._ready.pop(index)
        if self._ordered:
            self._next += len(outcome) if isinstance(outcome, list) else 1
        else:
            self._arrived.popleft()
        return index, outcome


class Failure:
    """The outcome of an item that raised. span: the item itself, for the note on its error."""

    __slots__ = ("error", "span")

    def __init__(self, error: BaseException, span: _core.Span) -> None:
        self.error = error
        self.span = span


class Results:
    """What feeds a map, and where the iterator that `map` returns has its results from."""

    _bar: Bar | None = None  # for a destructor, when the input is none

    def __init__(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        *,
        run: Run,
        options: TaskOptions,
        submit: Callable[[_core.Batch, _core.Span], None],
        drop: Callable[[_core.Batch, bool], None],
        table: serializer.FunctionTable,
        workers: int,
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
        bar: Bar | None = None,
        feed: bool = True,
        locate: Callable[[memoryview], _core.BlockSlice | None] | None = None,
    ) -> None:
        self._fn = fn
        self._locate = locate  # buffers that lie in the region
        self._several = len(iterables) != 1  # then each item is a tuple of arguments
        self._input: Iterator[Any] | None = (
            zip(*iterables, strict=False) if self._several else iter(iterables[0])
        )
        self._run = run
        self._options = options
        self._submit = submit
        self._drop = drop
        self._table = table
        self._chunksize = min(chunksize, 1 << 31)
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._bar = bar
        self._batches: list[_core.Batch] = []
        self._fed = 0  # items taken from the input
        self._taken = 0  # outcomes handed out
        self._sizes: deque[tuple[int, int]] = deque()  # (number of items up to here, bytes) of what is out
        self._bytes_out = 0
        self._failure: BaseException | None = None  # what the input raised
        sized = any(isinstance(iterable, Sized) for iterable in iterables)
        self._window: int | None = buffersize
        if buffersize is None and not sized:
            self._window = _WINDOW_PER_WORKER * workers
        self._group = _GROUP if sized and feed else 1  # items that are taken at a time
        self._total = total_of(iterables)  # items in all, or None
        if feed:
            self._feed()

    # ---- in ------------------------------------------------------------------------------------------

    def _feed(self, until: float | None = None) -> None:
        """Take items from the input, up to the window, or until that time (monotonic) has come."""
        began = -1.0
        while self._input is not None and (until is None or began < until):
            room = self._group
            if self._window is not None:
                out = self._fed - self._taken
                room = min(room, self._window - out)
                if room <= 0 or (out and self._bytes_out > _WINDOW_BYTES):
                    return
            values: list[Any] = []
            began = time.monotonic()
            try:
                values.extend(itertools.islice(self._input, room))
            except KeyboardInterrupt:
                self._input = None
                raise  # Ctrl-C, in all likelihood, not the input's doing
            except BaseException as error:  # what came before it stays in `values`
                self._input = None
                self._failure = error  # it arrives after the results before it
            else:
                if len(values) < room:
                    self._input = None
            # An input that takes its time is not made to wait for a group to be full.
            quick = time.monotonic() - began < _QUICK
            self._group = min(_GROUP, 2 * self._group) if quick else max(1, self._group // 4)
            self._send(values)
            if until is not None and time.monotonic() - began >= _QUICK:
                self._group = max(1, self._group // 4)  # items that are large take their time, too
        if self._input is None and self._bar is not None:
            self._bar.cut(self._fed)

    def _send(self, values: list[Any]) -> None:
        """Queue items: plain ones in a row together, others one by one."""
        at = 0
        ref = self._shared_function()
        while at < len(values):
            span = None
            if ref is not None:
                span = _core.Span.pack(self._fed, values, at, self._several)
            if span is not None:
                self._queue(ref, span)
                at += span.count
            else:
                self._send_one(values[at])
                at += 1

    def _shared_function(self) -> serializer.FunctionRef | None:
        """The function, if all items may share its pickle; one that is bound to objects travels with each."""
        try:
            return serializer.pack_function(self._table, self._fn)
        except Exception:  # each item says so by itself
            return None

    def _send_one(self, item: Any) -> None:
        """Queue an item by itself."""
        args = item if self._several else (item,)
        shown = _short(args)
        try:
            ref, payload = serializer.pack_call(self._table, self._fn, args, locate=self._locate)
        except BaseException as error:
            span = _core.Span.of(self._fed, (), shown)
            self._fed += 1
            self._run.fail(span, error)
            if not isinstance(error, Exception):
                raise
            return
        packed = (_core.S_VALUE, payload.data, payload.buffers, payload.readonly)
        self._queue(ref, _core.Span.of(self._fed, packed, shown))

    def _queue(self, ref: Any, span: _core.Span) -> None:
        self._fed += span.count
        if self._window is not None:
            self._sizes.append((self._fed, span.nbytes))
            self._bytes_out += span.nbytes
        if not self._batches or self._batches[-1].fn.id != ref.id:  # its globals have changed since
            self._batches.append(
                _core.Batch(
                    ref, self._run, self._options.timeout_ns, self._options.priority,
                    self._options.retries > 0, self._options.retries_timeouts, self._chunksize,
                )
            )  # fmt: skip
        try:
            self._submit(self._batches[-1], span)
        except BaseException as error:  # the runtime has ended meanwhile: nobody else will answer for these
            self._input = None
            for one in span.singles():
                self._run.fail(one, error)
            if not isinstance(error, Exception):
                raise

    # ---- out -----------------------------------------------------------------------------------------

    def iterate(self) -> Iterator[Any]:
        """The results. Dropped or closed after it has begun, it cancels what has not started."""
        return _core.Stream(self._more, self.close, self.left)

    def left(self) -> int | None:
        """Items whose outcome was not handed out yet, or None if nobody can know."""
        return None if self._total is None else max(0, self._total - self._taken)

    def __del__(self) -> None:
        if self._bar is not None:
            self._bar.cut(self._fed)  # nobody takes more of the input; what was taken may go on

    def _more(self) -> list[Any]:
        """The next results, the last one first. Raises: StopIteration at the end; what an item has raised."""
        run = self._run
        if self._input is not None and self._thirsty():
            self._feed()
        if self._taken == self._fed:
            failure, self._failure = self._failure, None
            self._finish_bar()
            raise failure if failure is not None else StopIteration
        return self._accept(*run.take(self.deadline))

    def step(self, until: float, listener: Callable[[], object]) -> list[Any] | None:
        """As `_more`, for who must not wait: takes items from the input until that time (monotonic seconds).

        []: there is more to take from it. None: there is nothing to do; `listener` is called when there is.
        Raises: StopAsyncIteration at the end.
        """
        more = self._input is not None and self._thirsty()
        if more:
            self._feed(until)
            more = self._input is not None and self._thirsty()
        if self._taken == self._fed and not more:
            failure, self._failure = self._failure, None
            raise failure if failure is not None else StopAsyncIteration
        found = self._run.take_now(listener)
        if found is not None:
            return self._accept(*found)
        return [] if more else None

    def _finish_bar(self) -> None:
        """The iteration has ended: nothing that the user prints now comes before the bar's last drawing."""
        if self._bar is not None:
            self._bar.finish(wait=True)

    def _accept(self, index: int, outcome: list[Any] | Failure) -> list[Any]:
        """Outcomes to hand out, the last one first. Raises: what an item has raised."""
        run = self._run
        if isinstance(outcome, list):
            self._count(len(outcome))
            return outcome
        self._count(1)
        error = outcome.error
        error.add_note(f"This is the outcome of item {index} of the map: {_short_of(outcome.span)}")
        if run.return_exceptions:
            return [error]
        try:
            if isinstance(error, _ENDINGS):  # it would pass for the end, and what follows be lost in silence
                what = type(error).__name__
                raise RuntimeError(f"item {index} of the map raised {what}") from error
            raise error
        finally:
            del error, outcome  # no cycle between the exception and this frame

    def _thirsty(self) -> bool:
        """Whether there is room for more of the input."""
        return self._window is None or (self._fed - self._taken) * 4 <= self._window * 3

    def _count(self, outcomes: int) -> None:
        self._taken += outcomes
        while self._sizes and self._sizes[0][0] <= self._taken:
            self._bytes_out -= self._sizes.popleft()[1]

    def close(self, running: bool = False) -> None:
        """Cancel what has not started, and with `running` kill what has. Idempotent."""
        self._input = self._failure = None
        self._total = self._taken if self._total is not None else None
        if self._bar is not None:
            self._bar.finish()
        batches, self._batches = self._batches, []
        if self._taken < self._fed:
            self._fed = self._taken
            for batch in batches:
                self._drop(batch, running)


def total_of(iterables: tuple[Iterable[Any], ...]) -> int | None:
    """Items that a map of these has, if all can say so."""
    try:
        return (
            min([len(it) for it in iterables if isinstance(it, Sized)])
            if all(isinstance(it, Sized) for it in iterables)
            else None
        )
    except Exception:  # a __len__ of the user's that only works sometimes
        return None


def _short_of(span: _core.Span) -> str:
    """The first item of a span, for a note."""
    if span.shown is not None:
        return str(span.shown)
    item = span.value()
    return _short(item if span.several else (item,))


def _short(args: tuple[Any, ...]) -> str:
    """An item for a note. Only of plain values: a repr of the user's may be slow, or raise."""
    item = args[0] if len(args) == 1 else args
    if type(item) in (int, float, bool, type(None)):
        return repr(item)
    if type(item) in (str, bytes):
        return repr(item[:_REPR])
    return f"a {type(item).__qualname__}"


def check_sizes(chunksize: int | None, buffersize: int | None) -> None:
    """Raises: TypeError, ValueError for what no map can use."""
    for name, value in (("chunksize", chunksize), ("buffersize", buffersize)):
        if value is not None and operator.index(value) < 1:
            raise ValueError(f"{name} must be >= 1 or None, not {value}")
