"""`Store`: what a user keeps in the region: objects for many tasks, arrays that are born there."""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from runtime import _core, serializer
from runtime.refs import Ref, stored

if TYPE_CHECKING:
    import numpy

__all__ = ["Store", "new_array", "take_shared"]

T = TypeVar("T")


class HasArena(Protocol):
    """What owns the region: a Supervisor."""

    @property
    def arena(self) -> _core.Arena: ...


class Store(abc.ABC):
    """The part of a Runtime that gives out memory of its region."""

    @abc.abstractmethod
    def _usable(self) -> HasArena:
        """Raises: RuntimeError after shutdown, and in a fork; BrokenRuntime."""

    def put(self, obj: T) -> Ref[T]:
        """One copy of an object in the region, for any number of tasks to read; see `Ref`.

        Raises: RegionFull when it does not fit; what pickling raises; RuntimeError after shutdown, and in a
        fork.
        """
        arena = self._usable().arena

        def locate(view: memoryview) -> Any:
            found = arena.locate_frozen(view)
            return view if found is None else found  # small ones, too: what is in the block is read-only

        payload = serializer.dumps_portable(obj, locate)
        return Ref(stored(payload, arena.take))

    def empty(self, shape: int | tuple[int, ...], dtype: Any = float) -> numpy.ndarray[Any, Any]:
        """A new array in the region, uninitialised. As an argument it is not copied: tasks see and write the
        same memory, and it is the caller's to see to the order of that. It lives as long as a view of it.

        shape: of not negative ints; dtype: one without Python objects. Raises: ValueError, TypeError for
        others; RegionFull when it does not fit; ImportError without numpy; as `put`.
        """
        return new_array(partial(take_shared, self._usable().arena), shape, dtype)

    def alloc(self, nbytes: int) -> memoryview:
        """So many bytes of the region, uninitialised and writable; shared with tasks as `empty`. Raises:
        ValueError, TypeError for what is no size; RegionFull when it does not fit; as `put`.
        """
        arena = self._usable().arena
        if type(nbytes) is not int:
            raise TypeError(f"alloc() needs a number of bytes, not {type(nbytes).__name__}")
        if nbytes < 0:
            raise ValueError(f"alloc() needs a number of bytes that is not negative, not {nbytes}")
        if nbytes == 0:
            return memoryview(bytearray())
        return memoryview(take_shared(arena, nbytes))


def take_shared(arena: _core.Arena, nbytes: int) -> _core.HostBlock:
    """A new block that whoever has a view of it may write."""
    block = arena.take(nbytes)
    block.share()
    return block


def new_array(take: Callable[[int], Any], shape: Any, dtype: Any) -> numpy.ndarray[Any, Any]:
    """An array in memory that `take(bytes)` gives; None: there is none now, so in ordinary memory."""
    import numpy

    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"an array in shared memory cannot hold Python objects, as dtype {kind} does")
    sizes = tuple(map(operator.index, (shape,) if hasattr(shape, "__index__") else tuple(shape)))
    if any(size < 0 for size in sizes):
        raise ValueError(f"an array cannot have a negative size: {sizes}")
    nbytes = math.prod(sizes) * kind.itemsize
    block = take(nbytes) if nbytes else None
    if block is None:
        return numpy.empty(sizes, kind)
    return numpy.ndarray(sizes, kind, memoryview(block))
