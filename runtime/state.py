"""SharedState as users have it: _state.pyx, and what needs no speed. Pickles, asyncio."""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from runtime._core import SharedRegion, StateLock, StateMap, StateWatch

_DEFAULT = 16 << 20  # bytes of items of a runtime's state


class Change(NamedTuple):
    """A key that was set, or is gone (`value` is None)."""

    key: str | bytes
    version: int
    value: bytes | None


class SharedState(StateMap):
    __doc__ = StateMap.__doc__
    __slots__ = ()

    def get_object(self, key: str | bytes, default: Any = None) -> Any:
        """The object that set_object() has stored: unpickled, so only of those who may run code here."""
        value = self.get(key)
        return default if value is None else pickle.loads(value)

    def set_object(self, key: str | bytes, value: Any, *, ttl: float | None = None) -> None:
        """Store an object as its pickle."""
        self.set(key, pickle.dumps(value, pickle.HIGHEST_PROTOCOL), ttl=ttl)

    def get_or_set(self, key: str | bytes, factory: Callable[[], bytes]) -> bytes:
        """The value of `key`; if it has none, factory() makes it, in one process only.

        Others who ask meanwhile wait; if the factory raises, or its process dies, one of them makes it.
        """
        while True:
            value: bytes | None = self.get(key)
            if value is not None:
                return value
            with self._once(key):
                value = self.get(key)
                if value is not None:
                    return value
                made = bytes(memoryview(factory()))  # not of an int or a list, as bytes() would
                if self.compare_and_set(key, None, made):  # somebody may have set it without asking
                    return made

    def watch(self, prefix: str | bytes = "") -> Watch:
        """What changes from now on, of keys that begin so."""
        return Watch(self, prefix)

    def awatch(self, prefix: str | bytes = "") -> Watch:
        """watch() for `async for`: other coroutines run while it waits."""
        return Watch(self, prefix)

    async def aget(self, key: str | bytes, default: Any = None, *, view: bool = False) -> Any:
        """get() for coroutines: it does not wait."""
        return self.get(key, default, view=True) if view else self.get(key, default)

    async def aset(self, key: str | bytes, value: Any, *, ttl: float | None = None) -> None:
        """set() for coroutines: it does not wait."""
        self.set(key, value, ttl=ttl)

    def alock(self, key: str | bytes, timeout: float | None = None) -> AsyncLock:
        """lock() for `async with`: other coroutines run while it waits."""
        return AsyncLock(self.lock(key, timeout), timeout)


def state_of_runtime(max_items: int | None, max_bytes: int | None) -> SharedState:
    """A map in a region of its own. Memory for `max_bytes` is there from the start; without it, for 16 MiB,
    it comes with the pages that are touched. Raises: RegionFull when it is not there.
    """
    room = max_bytes or _DEFAULT
    size = room + room * 5 // 16 + (256 << 10)  # words and buckets of the smallest blocks; rows of processes
    region = SharedRegion.create(size, _later=((0, size),) if max_bytes is None else ())
    return SharedState.create(region, max_items=max_items, max_bytes=room, _fresh=True)


def open_state(fd: int) -> SharedState | None:
    """That of a runtime, by its descriptor. None: some process has written over its header."""
    try:
        return SharedState.open(SharedRegion.from_fd(fd))
    except ValueError:
        return None


class Watch:
    """Yields a Change for each key that changes after watch() was called, until close().

    Several changes of a key in a short time are one, the last. Versions of a key only grow.
    Thread-safety: one thread iterates; any may close(). Blocking: waits for the next change; Ctrl-C ends it.
    """

    def __init__(self, state: SharedState, prefix: str | bytes) -> None:
        self._watch = StateWatch(state, prefix)
        self._ready: deque[Change] = deque()
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            self._ready.extend(Change(*change) for change in self._watch.wait(1.0))
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        import asyncio

        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            self._ready.extend(Change(*change) for change in self._watch.wait(0))
            if not self._ready:
                await asyncio.sleep(0.005)
        raise StopAsyncIteration

    def close(self) -> None:
        """End the iteration, within 50 ms if it waits."""
        self._closed = True
        self._watch.close()


class AsyncLock:
    """A StateLock that is awaited: it looks every millisecond, with no thread of its own."""

    __slots__ = ("_lock", "_timeout")

    def __init__(self, lock: StateLock, timeout: float | None) -> None:
        self._lock, self._timeout = lock, timeout

    async def __aenter__(self) -> StateLock:
        import asyncio

        if not self._lock._try(0):
            since = time.monotonic_ns()
            while not self._lock._try(since):
                if self._timeout is not None and time.monotonic_ns() - since >= self._timeout * 1e9:
                    self._lock.acquire(0)  # says so
                    break
                await asyncio.sleep(0.001)
        return self._lock

    async def __aexit__(self, *error: object) -> None:
        self._lock.release()
