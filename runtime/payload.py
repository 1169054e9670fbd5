"""What a pickle travels as: the stream, and the large buffers that stayed outside of it.

Buffers of OUT_OF_BAND_MIN bytes and more stay outside. Bytes and bytearrays cannot; large ones (of 64 KiB and
more) become pieces of the stream that are the objects themselves, so nothing is copied before the stream is
laid out. `loads` reads a pickle back, and gives advice where an import fails; `digest_of` recognises equal
pickles.
"""

from __future__ import annotations

import copyreg
import os
import pickle
import sys
from collections.abc import Iterable
from typing import Any

from runtime import _core, arrays
from runtime.arrays import Locate

OUT_OF_BAND_MIN = 4 * 1024  # bytes: smaller buffers stay inside the pickle (docs/benchmarks.md has the curve)
Stream = bytes | tuple[bytes | memoryview, ...]  # of a pickle: whole, or in pieces that follow each other
_c_loads = pickle.loads
_modules, _registered, _seen = sys.modules, copyreg.dispatch_table, arrays.seen


class Payload:
    """A pickle and the large buffers that stayed outside of it.

    data: the pickle stream. buffers: flat contiguous views of OUT_OF_BAND_MIN bytes or more each, and
    slices of blocks, of any size. readonly: per buffer, whether the original was read-only.
    """

    __slots__ = ("buffers", "data", "readonly")

    def __init__(self, data: Stream, buffers: tuple[Any, ...] = (), readonly: tuple[bool, ...] = ()) -> None:
        self.data = data
        self.buffers = buffers
        self.readonly = readonly

    @property
    def nbytes(self) -> int:
        """What is copied when it is laid out: the stream and the views."""
        pieces = [self.data] if isinstance(self.data, bytes) else self.data
        nbytes: int = sum([len(piece) for piece in pieces]) + sum([b.nbytes for b in self.buffers])
        return nbytes

    @property
    def large(self) -> bool:
        """Whether it is worth while to lay it out at once."""
        return bool(self.buffers) or type(self.data) is tuple

    def joined(self) -> bytes:
        """The stream in one piece."""
        return self.data if isinstance(self.data, bytes) else b"".join(self.data)

    def freeze(self) -> None:
        """Copy what its owner may change, or give back; slices of blocks do not move."""
        if type(self.data) is tuple:
            self.data = tuple([piece if type(piece) is bytes else bytes(piece) for piece in self.data])
        self.buffers = tuple([memoryview(bytes(b)) if type(b) is memoryview else b for b in self.buffers])

    def __repr__(self) -> str:
        return f"Payload({len(self.buffers)} buffers, {self.nbytes} bytes in all)"


class Taken:
    """What a pickler put outside; `keep` is its buffer_callback (true: inside)."""

    __slots__ = ("buffers", "locate", "readonly")

    def __init__(self, locate: Locate | None = None) -> None:
        self.locate = locate
        self.buffers: list[Any] = []
        self.readonly: list[bool] = []

    def keep(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous: pickle says so in its own words
            return True
        part = None if self.locate is None else self.locate(view)
        if part is None and isinstance(view.obj, _core.HostBlock) and view.obj.holds:
            # A copy of its frame would name blocks that nobody keeps, or of another region.
            raise ValueError(
                "a Ref that refers to others travels only in the arguments of tasks of its own Runtime; "
                "send ref.get()"
            )
        if part is None and view.nbytes < OUT_OF_BAND_MIN:
            return True
        self.buffers.append(view if part is None else part)
        self.readonly.append(view.readonly)
        return False

    def payload(self, data: Stream) -> Payload:
        return Payload(data, tuple(self.buffers), tuple(self.readonly))


class Pieces(list[Any]):
    """The file of a pickler, to which C pickle gives large bytes and bytearrays as they are."""

    __slots__ = ()
    write = list.append

    def stream(self) -> Stream:
        """Raises: BufferError if a bytearray has changed its length since it was pickled."""
        for i, piece in enumerate(self):
            if type(piece) is not bytes:
                self[i] = memoryview(piece)  # from now on it keeps its length
                if not _is_content(self[i - 1], piece):
                    raise BufferError("a bytearray was resized while it was being pickled")
        return tuple(self) if len(self) > 1 else self[0]


def _is_content(before: bytes, piece: Any) -> bool:
    """Whether the opcode at the end of the piece before announces this one: an object of the user's."""
    return (before[-9:-8] in (b"\x8e", b"\x96") and before[-8:] == len(piece).to_bytes(8, "little")) or (
        before[-5:-4] in (b"B", b"X") and before[-4:] == len(piece).to_bytes(8, "little")[:4]
    )


def pickled_by_us(data: Stream) -> list[bytes]:
    """The parts of a stream that are not the content of large bytes and bytearrays."""
    if type(data) is bytes:
        return [data]
    pairs = zip((b"", *data), data, strict=False)
    return [piece for before, piece in pairs if type(piece) is bytes and not _is_content(before, piece)]


_REUSED = 4096  # bytes of a stream: the memo of a pickler that has made a longer one is cheaper made anew
_IDLE_MAX = 4
_idle: list[
    tuple[Any, Pieces, Taken]
] = []  # picklers for the next ones: making one takes longer than using it


def dump(obj: object, locate: Locate | None) -> Payload:
    """Pickle by reference. Raises what pickling raises."""
    if len(_modules) != _seen.modules or len(_registered) != _seen.registered:
        arrays.refresh()
    try:
        tool = _idle.pop()
    except IndexError:
        tool = _new_tool()
    pickler, pieces, taken = tool
    taken.locate = locate
    pickler.dump(obj)
    data = pieces.pop() if len(pieces) == 1 else pieces.stream()
    if taken.buffers:
        payload = taken.payload(data)
        taken.buffers, taken.readonly = [], []
    else:
        payload = Payload(data)
    if not pieces and len(data) <= _REUSED and len(_idle) < _IDLE_MAX:
        pickler.clear_memo()
        taken.locate = None
        _idle.append(tool)
    return payload


def _new_tool() -> tuple[Any, Pieces, Taken]:
    pieces, taken = Pieces(), Taken()
    pickler = pickle.Pickler(pieces, 5, buffer_callback=taken.keep)
    pickler.dispatch_table = arrays.table
    return pickler, pieces, taken


def loads(data: bytes | memoryview, buffers: Iterable[Any] = ()) -> Any:
    """The object again. Arrays are views of `buffers`, writable if these are."""
    try:
        return _c_loads(data, buffers=buffers)
    except (ImportError, AttributeError) as error:
        _advise_import(error)
        raise


def _advise_import(error: BaseException) -> None:
    if isinstance(error, ModuleNotFoundError):
        note = (
            f"The pickle refers to module {error.name!r}, which process {os.getpid()} cannot import. Install "
            "it, put its folder on PYTHONPATH or sys.path before the Runtime is made, or define the function "
            "in __main__ (it then travels by value)."
        )
    elif isinstance(error, AttributeError) and str(error).startswith("Can't get attribute"):
        note = (
            "The module was imported, but has no such name (any more): is it made only under "
            '`if __name__ == "__main__":`, at run time, or in another version of the file?'
        )
    else:
        return
    if note not in getattr(error, "__notes__", ()):  # pickles nest
        error.add_note(note)


def digest_of(*parts: bytes | memoryview) -> bytes:
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
