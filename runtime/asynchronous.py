"""Calls and maps for asyncio: a callback tells of what is awaited; what nobody awaits any more is stopped.

    collector ──done──► call_soon_threadsafe ──► the loop's thread: a waiter is set, the task goes on
    task cancelled, coroutine closed, iterator dropped ──► cancel(running=True), drop(running=True)

No thread is made, none waits, and any number of loops may use one Runtime. asyncio is imported by who is in a
loop already, so `import runtime` does not pay for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from runtime.mapping import LATE, Results

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

__all__ = ["AsyncResults", "outcome_of"]

T = TypeVar("T")

_SLICE = 0.005  # seconds that a map keeps a loop to itself, unless one item of its input takes longer


class Canceller(Protocol):
    """What a call is cancelled by: a Runtime."""

    def cancel(self, future: concurrent.futures.Future[Any], *, running: bool = False) -> bool: ...


def _alarm(loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> Callable[..., None]:
    """A function that sets a waiter of a loop, from any thread; not any more when the loop is closed."""

    def ring(_: object = None) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_set, waiter)

    return ring


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def outcome_of(runtime: Canceller, future: concurrent.futures.Future[T]) -> T:
    """The result of a call. Whatever ends the waiting for it ends the call."""
    import asyncio

    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    try:
        future.add_done_callback(_alarm(loop, waiter))
        await waiter
    except BaseException:  # cancelled; or closed, in a loop that has ended
        if not future.done():
            runtime.cancel(future, running=True)
        raise
    try:
        return future.result()
    finally:
        del future  # its exception knows this frame: no cycle


class AsyncResults(AsyncIterator[T]):
    """The results of a map, for `async for`; made by `amap`.

    Thread-safety: for one task at a time; any loop. Blocking: it waits for results, the loop does not.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._items: list[T] = []  # the next ones, the last first
        self._taken = False  # a task is in __anext__
        self._over = False
        self._alarm: Callable[[], object] | None = None  # wakes that task
        self._until = 0.0  # monotonic time at which the loop has its turn

    def __aiter__(self) -> AsyncResults[T]:
        return self

    async def __anext__(self) -> T:
        if self._taken:
            raise RuntimeError("this amap() is being iterated by another task already")
        self._taken = True
        try:
            if time.monotonic() >= self._until:
                await self._yield()
            while not self._items:
                self._items = await self._more()
            return self._items.pop()
        except BaseException:
            self.close()
            raise
        finally:
            self._taken = False

    async def _yield(self) -> None:
        """Let the loop do other things."""
        import asyncio

        await asyncio.sleep(0)
        self._until = time.monotonic() + _SLICE

    async def _more(self) -> list[T]:
        """The next results. Raises: StopAsyncIteration at the end; what an item has raised."""
        import asyncio

        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        alarm = self._alarm = _alarm(loop, waiter)
        while True:
            if self._over:
                raise StopAsyncIteration
            found = self._results.step(self._until, alarm)
            if found is None:
                break
            if found:
                return found
            await self._yield()
        deadline = self._results.deadline
        if deadline is None:
            await waiter
            return []
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(LATE)
        timer = loop.call_later(left, _set, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
        return []

    def close(self) -> None:
        """Cancel what has not started, kill what runs. Idempotent."""
        self._over = True
        self._items = []
        self._results.close(running=True)
        if self._alarm is not None:
            self._alarm()

    async def aclose(self) -> None:
        """End the iteration: cancel what has not started, kill what runs. Idempotent."""
        self.close()

    def __del__(self) -> None:
        if not self._over:
            self.close()
