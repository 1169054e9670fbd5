"""`map` and `map_unordered`: items in, results out, as the workers finish them.

    input ──feed()──► Batch (waiting) ──chunks──► workers ──► deliver() ──► Results ──next()──► user
             in the user's thread alone                in the collector

A sized input is taken whole when `map` is called, as the stdlib does, and runs to its end even if nobody
iterates. Of any other a bounded window is taken, and more as results are consumed.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from runtime import _core, serializer
from runtime.config import TaskOptions

__all__ = ["Results", "Run", "check_sizes"]

_WINDOW_PER_WORKER = 256  # items of an unsized input that are out per worker, at most
_WINDOW_BYTES = 32 << 20  # bytes of their pickles, at most
_GROUP = 256  # items handed to the dispatcher at a time
_REPR = 200  # characters of an item in the note on its error


class Run:
    """One map under way: what the collector delivers to and the iterator takes from.

    Thread-safety: `deliver` belongs to the collector, `take` to the thread that iterates.
    """

    def __init__(self, options: TaskOptions, ordered: bool, return_exceptions: bool) -> None:
        self.retries = options.retries
        self.retry_on = options.retry_on
        self.return_exceptions = return_exceptions
        self.reprs: dict[int, str] = {}  # of items that are out, for the notes on errors
        self.sizes: dict[int, int] = {}  # bytes of their pickles
        self.bytes_out = 0
        self._ordered = ordered
        self._ready: dict[int, tuple[bool, Any]] = {}  # results that were not taken yet, by index
        self._arrived: deque[int] = deque()  # their order of arrival
        self._changed = threading.Condition()  # re-entrant: a destructor may come in
        self._next = 0
        self._settled: set[int] = set()  # indices above _next whose outcome has come

    def deliver(self, index: int, ok: bool, value: Any) -> None:
        """The outcome of an item; the first one counts."""
        with self._changed:
            if index in self._settled or index not in self.sizes:
                return
            self._settled.add(index)
            self._ready[index] = (ok, value)
            self._arrived.append(index)
            self._changed.notify()

    def take(self, deadline: float | None) -> tuple[int, bool, Any]:
        """The next outcome: (index, ok, value). Raises: TimeoutError at `deadline` (monotonic seconds)."""
        with self._changed:
            while True:
                index = self._next if self._ordered else self._arrived[0] if self._arrived else -1
                if index in self._ready:
                    break
                if deadline is None:
                    self._changed.wait()
                elif (
                    not self._changed.wait(max(0.0, deadline - time.monotonic()))
                    and time.monotonic() >= deadline
                ):
                    raise TimeoutError("the results of map() did not come within its timeout")
            ok, value = self._ready.pop(index)
            if self._ordered:
                self._next += 1
            else:
                self._arrived.popleft()
            self._settled.discard(index)
            self.bytes_out -= self.sizes.pop(index, 0)
            return index, ok, value


class Results(Iterator[Any]):
    """The iterator that `map` returns.

    Dropping it, or `close()`, cancels what has not started, once iteration has begun (before that, the
    items run to their end as the stdlib's do). Thread-safety: for one thread at a time.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        *,
        run: Run,
        options: TaskOptions,
        submit: Callable[[_core.Batch, list[Any]], None],
        drop: Callable[[_core.Batch], None],
        table: serializer.FunctionTable,
        workers: int,
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
    ) -> None:
        self._fn = fn
        self._input: Iterator[tuple[Any, ...]] | None = zip(*iterables, strict=False)
        self._run = run
        self._options = options
        self._submit = submit
        self._drop = drop
        self._table = table
        self._chunksize = chunksize
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._batches: list[_core.Batch] = []
        self._fed = 0  # items taken from the input
        self._taken = 0  # outcomes handed out
        self._failure: BaseException | None = None  # what the input raised, or why an item cannot travel
        self._begun = False
        sized = any(isinstance(iterable, Sized) for iterable in iterables)
        self._window: int | None = buffersize
        if buffersize is None and not sized:
            self._window = _WINDOW_PER_WORKER * workers
        self._feed()

    def _feed(self) -> None:
        """Take items from the input, up to the window."""
        group: list[Any] = []
        try:
            self._fill(group)
        finally:
            self._flush(group)

    def _fill(self, group: list[Any]) -> None:
        run = self._run
        while self._input is not None:
            out = self._fed - self._taken
            if self._window is not None and (out >= self._window or (out and run.bytes_out > _WINDOW_BYTES)):
                break
            try:
                args = next(self._input)
            except StopIteration:
                self._input = None
                break
            except BaseException as error:
                self._input = None
                self._failure = error  # it arrives after the results before it
                break
            self._pack(args, group)
            if len(group) >= _GROUP:
                self._flush(group)

    def _pack(self, args: tuple[Any, ...], group: list[Any]) -> None:
        index = self._fed
        self._fed += 1
        run = self._run
        run.reprs[index] = _short(args)
        run.sizes[index] = 0
        try:
            ref, payload = serializer.pack_call(self._table, self._fn, args)
        except BaseException as error:
            run.deliver(index, False, error)
            if not isinstance(error, Exception):
                raise
            return
        run.sizes[index] = payload.nbytes
        run.bytes_out += payload.nbytes
        if not self._batches or self._batches[-1].fn.id != ref.id:
            self._flush(group)  # the function's globals have changed: what follows is another function
            self._batches.append(
                _core.Batch(
                    ref, run, int((self._options.timeout or 0) * 1e9), self._options.priority,
                    self._options.retries > 0, self._options.retries_timeouts,
                    min(self._chunksize, 1 << 31),
                )
            )  # fmt: skip
        group.append((index, (0, payload.data, payload.buffers, payload.readonly)))

    def _flush(self, group: list[Any]) -> None:
        if not group:
            return
        items = group[:]
        group.clear()
        try:
            self._submit(self._batches[-1], items)
        except BaseException as error:  # the runtime has ended meanwhile: nobody else will answer for these
            self._input = None
            for index, _ in items:
                self._run.deliver(index, False, error)
            if not isinstance(error, Exception):
                raise

    def __next__(self) -> Any:
        self._begun = True
        if self._window is not None and (self._fed - self._taken) * 4 <= self._window * 3:
            self._feed()
        if self._taken == self._fed:
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
            raise StopIteration
        try:
            index, ok, value = self._run.take(self._deadline)
        except TimeoutError:
            self.close()
            raise
        self._taken += 1
        shown = self._run.reprs.pop(index, "")
        if ok:
            return value
        assert isinstance(value, BaseException)
        value.add_note(f"This is the outcome of item {index} of the map: {shown}")
        if self._run.return_exceptions:
            return value
        self.close()
        try:
            raise value
        finally:
            del value  # no cycle between the exception and this frame

    def close(self) -> None:
        """Cancel what has not started. Idempotent."""
        self._input = None
        self._failure = None
        self._fed = self._taken
        for batch in self._batches:
            self._drop(batch)
        self._batches = []

    def __del__(self) -> None:
        if getattr(self, "_begun", False):
            self.close()


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
