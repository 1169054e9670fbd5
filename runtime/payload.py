"""What a pickle travels as: the stream, and the large buffers that stayed outside of it.

Buffers of OUT_OF_BAND_MIN bytes and more stay outside. `loads` reads a pickle back, and gives advice where
an import fails; `digest_of` recognises equal pickles.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from typing import Any

OUT_OF_BAND_MIN = 16 * 1024  # bytes: smaller buffers stay inside the pickle
_c_loads = pickle.loads


class Payload:
    """A pickle and the large buffers that stayed outside of it.

    data: the pickle stream. buffers: flat contiguous views of OUT_OF_BAND_MIN bytes or more each.
    readonly: per buffer, whether the original was read-only. nbytes: data and buffers together.
    """

    __slots__ = ("buffers", "data", "nbytes", "readonly")

    def __init__(
        self, data: bytes, buffers: tuple[memoryview, ...] = (), readonly: tuple[bool, ...] = ()
    ) -> None:
        self.data = data
        self.buffers = buffers
        self.readonly = readonly
        self.nbytes = len(data) + sum([b.nbytes for b in buffers]) if buffers else len(data)

    def __repr__(self) -> str:
        return f"Payload({len(self.data)} bytes, {len(self.buffers)} buffers, {self.nbytes} bytes in all)"


class Taken(list[memoryview]):
    """The buffers that a pickler put outside; `keep` is its buffer_callback (true: inside)."""

    def __init__(self, locate=None):
        super().__init__()
        self.locate = locate
        self.readonly = []

    def keep(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous: pickle says so in its own words
            return True
        found = self.locate(view) if self.locate is not None else None
        if found is None and view.nbytes < OUT_OF_BAND_MIN:
            return True
        self.append(view if found is None else found)
        self.readonly.append(view.readonly)
        return False


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
