"""`Ref`: an object that lies in the region once, for any number of tasks to read.

A Ref holds a block with a frame in it that never changes. In the arguments of a task it travels as a buffer
that lies in the region, that is, by reference; the receiver reads the frame there (`load_ref`), so at any
depth of the arguments there is the object in place of the Ref. Its arrays are read-only views of the block.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from runtime import _core, serializer
from runtime.errors import StaleBlock

__all__ = ["Ref", "load_ref", "resolve_with", "resolver", "stored"]

T = TypeVar("T")
Resolve = Callable[[int, int, int, int], Any]  # block, tag, bytes of the block, flags -> what is the block

_resolve: Resolve | None = None  # in a worker: of its port


class Ref(Generic[T]):
    """An object in the region: made by `Runtime.put`, read by any number of tasks, in one copy.

    In a task's arguments, at any depth, it stands for the object; there and in `get()` arrays are read-only
    views of that one copy. The memory is given back when no Ref, no task and no array needs it any more.
    Thread-safety: any thread. Fork-safety: a forked child may `get()`. It cannot be pickled otherwise.
    """

    __slots__ = ("__weakref__", "_block")

    def __init__(self, block: _core.HostBlock) -> None:
        self._block: _core.HostBlock | None = block

    def get(self) -> T:
        """The object; each call makes a new one, but for its arrays' memory. Raises: StaleBlock after
        `release`, and what unpickling raises.
        """
        block = self._held()
        value: T = _read(block, resolver(block.holds))
        return value

    def release(self) -> None:
        """This Ref needs its object no longer; what has been submitted with it still does. Idempotent."""
        self._block = None

    @property
    def nbytes(self) -> int:
        """Bytes in the region."""
        return self._held().nbytes

    def _held(self) -> _core.HostBlock:
        block = self._block
        if block is None:
            raise StaleBlock("this Ref was released; put the object once more")
        return block

    def __reduce__(self) -> Any:
        raise TypeError("a Ref travels only in the arguments of tasks of its own Runtime; send ref.get()")

    def __repr__(self) -> str:
        block = self._block
        return "<Ref, released>" if block is None else f"<Ref of {block.nbytes} bytes>"


def stored(payload: serializer.Payload, take: Callable[[int], _core.HostBlock]) -> _core.HostBlock:
    """A new block, frozen, that holds a payload. Raises: RegionFull, as `take`."""
    frame = _core.Frame([(_core.S_VALUE, payload.data, payload.buffers, payload.readonly)])
    block = take(frame.nbytes)
    block.fill(frame)
    block.freeze({part.key: part.holder for part in payload.buffers if isinstance(part, _core.BlockSlice)})
    return block


def load_ref(frame: Any) -> Any:
    """In the receiver: the object whose frame lies in this buffer."""
    return _read(frame, _resolve)


def resolve_with(resolve: Resolve) -> None:
    """In a worker: how blocks are found that a Ref's frame refers to."""
    global _resolve
    _resolve = resolve


def resolver(blocks: Mapping[tuple[int, int], Any] | None) -> Resolve | None:
    """In the host: finds the blocks that a frame refers to among these."""
    if blocks is None:
        return None

    def resolve(block: int, tag: int, nbytes: int, flags: int) -> Any:
        found = blocks.get((block, tag))
        if found is None:
            raise ValueError(f"it refers to a block at offset {block} that is not there")
        return found

    return resolve


def _read(exporter: Any, resolve: Resolve | None) -> Any:
    ((_, data, views, _, _),) = _core.read_frame(exporter, resolve)
    return serializer.loads(data, views)


def _reduce(ref: Ref[Any]) -> Any:
    return load_ref, (pickle.PickleBuffer(ref._held()),)


serializer.register(Ref, _reduce)
