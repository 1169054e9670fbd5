"""`Front`: maps and asyncio, the same for a Runtime and for its options()."""

from __future__ import annotations

import abc
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from runtime.asynchronous import AsyncResults, Canceller, outcome_of
from runtime.config import TaskOptions
from runtime.mapping import Results

__all__ = ["Front"]

T = TypeVar("T")


class Target(Canceller, Protocol):
    """Whose workers run it: a Runtime."""

    def _map(
        self,
        options: TaskOptions,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int | None,
        buffersize: int | None,
        return_exceptions: bool,
        ordered: bool,
        progress: bool,
        feed: bool = True,
    ) -> Results: ...


class Front(concurrent.futures.Executor, abc.ABC):
    """What a Runtime and its options() have in common: to submit with certain settings."""

    _options: TaskOptions

    @abc.abstractmethod
    def _target(self) -> Target:
        """Whose workers run it."""

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        return_exceptions: bool = False,
        progress: bool = False,
    ) -> Iterator[T]:
        """An iterator over fn(*items), in the order of the input.

        timeout: seconds from this call until each result must have come. chunksize: items that travel
        together; by default it adapts to their run time. buffersize: items that may be out at once; by
        default all of a sized input, and a bounded window of any other. return_exceptions: yield an item's
        exception instead of raising it. progress: show a bar on stderr: rich's if it is installed, else a
        line; where stderr is no terminal, a plain line every ten seconds. It counts results as they come.
        Raises: what an item raised, with a note that names the item.
        """
        results = self._target()._map(
            self._options, fn, iterables, timeout, chunksize, buffersize, return_exceptions, True, progress
        )
        return results.iterate()

    def map_unordered(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        return_exceptions: bool = False,
        progress: bool = False,
    ) -> Iterator[T]:
        """As `map`, in the order in which the results come."""
        results = self._target()._map(
            self._options, fn, iterables, timeout, chunksize, buffersize, return_exceptions, False, progress
        )
        return results.iterate()

    async def asubmit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """What fn(*args, **kwargs) returns in a worker. It is submitted when this is first awaited.

        Cancelling what awaits it stops the code: a call that has not started never runs, one that has is
        killed, as by `cancel(future, running=True)`. Blocking: the event loop never is. Raises: what the
        call raised; concurrent.futures.CancelledError if somebody else has cancelled it; as `submit`.
        """
        return await outcome_of(self._target(), self.submit(fn, *args, **kwargs))

    def amap(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        return_exceptions: bool = False,
        progress: bool = False,
    ) -> AsyncResults[T]:
        """An async iterator over fn(*items), in the order of the input; the arguments are those of `map`.

        The input is advanced while it is iterated, in the thread of the event loop, for a few milliseconds at
        a time. That bounds the number of items, not the time that one of them takes: an input whose next()
        blocks (it reads a slow file, say) blocks the loop, so let a thread read it.

        When the iteration ends early (its task is cancelled, an item raises, `aclose()`, or it is left and
        garbage-collected) what has not started never runs, and what runs is killed. For one task at a time.
        """
        results = self._target()._map(
            self._options, fn, iterables, timeout, chunksize, buffersize, return_exceptions, True, progress,
            feed=False,
        )  # fmt: skip
        return AsyncResults(results)
