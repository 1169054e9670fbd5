"""Arrays and their kin: how they travel where their own pickling copies, ships too much, or fails.

    numpy.ndarray    what numpy exports stays numpy's own affair. Others (datetime64, bfloat16, structured,
                     strided, reversed, broadcast) are their memory from the first byte to the last, as one
                     buffer, and how they lie in it; one that lies in more memory than its items take
                     (`array[::3]`) is made dense first, at the price of a second copy, unless it travels by
                     reference.
    memoryview       its memory, in C order, with its format and shape
    pyarrow          a slice that keeps much more memory alive than its rows take becomes its rows alone;
                     one with extension types or views (string_view) by columns, of these the storage or rows

Subclasses, arrays of objects and of variable-length strings, and Arrow's unions and extension types within
other types are left to their own pickling. What the user has registered with copyreg goes first.

Thread-safety: any thread. Nothing is imported in the sender that the user has not imported.
"""

from __future__ import annotations

import copyreg
import importlib
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from runtime import _core

_Reducer = Callable[[Any], Any]
Locate = Callable[[memoryview], Any]  # the slice of a block that a view is part of, or None
_registered = copyreg.dispatch_table
_modules = sys.modules
_added: dict[type, _Reducer] = {}
own: dict[type, _Reducer] = {}  # what is reduced here
table: dict[Any, Any] = {}  # these, and what is registered with copyreg: a pickler's dispatch_table


class Seen:
    """The sizes that the tables were made for."""

    __slots__ = ("modules", "registered")

    def __init__(self) -> None:
        self.modules = self.registered = -1


seen = Seen()


class _Asked(threading.local):
    """Of the pickle that this thread is making: what gives a slice in place of a buffer."""

    locate: Locate | None = None


asked = _Asked()


def register(kind: type, reduce: _Reducer) -> None:
    """How objects of a type of ours travel to tasks; all other pickling goes on without it."""
    _added[kind] = reduce
    seen.registered = -1


def refresh() -> None:
    """Bring the tables up to date: for who finds that a module was imported, or registered with copyreg.

    An entry of copyreg's that is replaced by another one for the same type is not noticed until then.
    """
    modules, registered = len(_modules), len(_registered)
    found: dict[type, _Reducer] = {memoryview: _reduce_view, **_added}
    array = getattr(_modules.get("numpy"), "ndarray", None)
    if array is not None:
        found[array] = _reduce_array
    if "pyarrow" in _modules:
        found.update(dict.fromkeys(_arrow_types(_modules.get("pyarrow.lib")), _reduce_arrow))
    theirs = _registered.copy()
    own.update({kind: reduce for kind, reduce in found.items() if kind not in theirs})
    for kind in own.keys() & theirs.keys():
        own.pop(kind, None)
    table.update(own)
    table.update(theirs)
    for kind in table.keys() - own.keys() - theirs.keys():
        table.pop(kind, None)
    # What is being imported right now shows its names later, and adds no module then.
    importing = ("numpy" in _modules) != (array is not None) or _half_imported("pyarrow")
    seen.modules, seen.registered = (-1 if importing else modules), registered


def _half_imported(name: str) -> bool:
    spec = getattr(_modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _stays(view: memoryview) -> bool:
    """Whether this memory travels by reference, and nothing of it is copied."""
    locate = asked.locate
    return locate is not None and _core.in_region(view) and isinstance(locate(view), _core.BlockSlice)


# ---- numpy -----------------------------------------------------------------------------------------

_EXPORTED = frozenset("biufcSU")  # kinds of numbers and text: numpy gives them away as they are
_RAW = _EXPORTED | frozenset("mMV")  # kinds whose bytes are all there is
_USERS = 2  # dtype.isbuiltin of a registered type, as bfloat16
_AS_LIST = 2  # NPY_LIST_PICKLE among dtype.flags: the bytes of such a type do not say what it is


def _reduce_array(array: Any) -> Any:
    dtype, flags = array.dtype, array.flags
    kind = dtype.kind
    if flags.forc and kind in _EXPORTED:
        return array.__reduce_ex__(5)
    raw = kind in _RAW if dtype.isbuiltin != _USERS else not dtype.flags & _AS_LIST
    if not raw or dtype.hasobject or dtype.itemsize == 0:
        return array.__reduce_ex__(5)
    memory, offset = _memory_of(array)
    if memory.nbytes > array.nbytes and not _stays(memoryview(memory)):
        dense = array.copy(order="K")
        dense.flags.writeable = flags.writeable
        return _reduce_array(dense)
    return rebuild_array, (pickle.PickleBuffer(memory), dtype, array.shape, array.strides, offset)


class _Span:
    """Memory of an array, for numpy.asarray, which keeps this and so the array."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, array: Any, start: int, nbytes: int) -> None:
        self.array = array
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (start, not array.flags.writeable),
        }


def _memory_of(array: Any) -> tuple[Any, int]:
    """The bytes from the first to the last one that an array uses, and where in them its first item is."""
    first = array.__array_interface__["data"][0]
    low = 0
    high = array.itemsize if array.size else 0
    if high:
        for n, stride in zip(array.shape, array.strides, strict=True):
            if stride < 0:
                low += (n - 1) * stride
            else:
                high += (n - 1) * stride
    return _modules["numpy"].asarray(_Span(array, first + low, high - low)), -low


def rebuild_array(buffer: Any, dtype: Any, shape: Any, strides: Any, offset: int) -> Any:
    """An array in this memory. Raises: ValueError, TypeError if it does not lie within."""
    return importlib.import_module("numpy").ndarray(shape, dtype, buffer, offset, strides)


# ---- memoryview ------------------------------------------------------------------------------------


def _reduce_view(view: memoryview) -> Any:
    try:
        form = view.format, view.itemsize, view.shape
    except ValueError as error:
        raise ValueError(
            f"{error}: it has no memory any more that could be sent; send it before it is released"
        ) from None
    if not view.c_contiguous:
        dense = bytearray(view)
        view = memoryview(dense).toreadonly() if view.readonly else memoryview(dense)
    return rebuild_view, (pickle.PickleBuffer(view), *form)


def rebuild_view(buffer: Any, form: str, itemsize: int, shape: tuple[int, ...]) -> memoryview:
    """A view of this memory. Raises: ValueError, TypeError if the shape does not fit it."""
    return memoryview(_core.Shaped(buffer, form, itemsize, shape))


# ---- pyarrow ---------------------------------------------------------------------------------------

_SLACK, _SLACK_BYTES = 1.25, 64 * 1024  # what a slice may keep beyond its rows: a factor, and bytes
_VIEW_BYTES = 16  # of an item of string_view, beside its text


def _arrow_types(lib: Any) -> Iterator[type]:
    if getattr(lib, "Table", None) is None:
        return
    yield from (lib.Table, lib.RecordBatch, lib.ChunkedArray)
    pending = [lib.Array]
    while pending:
        for kind in pending.pop().__subclasses__():
            if kind.__module__ == lib.__name__:
                yield kind
                pending.append(kind)


def _reduce_arrow(data: Any) -> Any:
    arrow = _modules["pyarrow"]
    kinds = data.schema.types if hasattr(data, "schema") else [data.type]
    if any(_is_odd(arrow, kind) for kind in kinds):
        return _reduce_apart(arrow, data, kinds)
    try:
        if data.get_total_buffer_size() <= _SLACK * data.nbytes + _SLACK_BYTES or _is_shared(data):
            return data.__reduce_ex__(5)
        rows = _in_batches(arrow, data)
        whole, column = isinstance(rows, arrow.Table), rows is not data
        if rows.num_rows == 0 and not whole:  # of strings it would write all offsets
            columns = [arrow.nulls(0, field.type) for field in rows.schema]
            rows = arrow.RecordBatch.from_arrays(columns, schema=rows.schema)
        sink = arrow.BufferOutputStream()
        with arrow.ipc.new_stream(sink, rows.schema) as stream:
            stream.write(rows)
    except arrow.ArrowException:  # a type that cannot be measured, or not be written
        return data.__reduce_ex__(5)
    return rebuild_arrow, (pickle.PickleBuffer(sink.getvalue()), whole, column)


def _reduce_apart(arrow: Any, data: Any, kinds: list[Any]) -> Any:
    """Something with such types in it: its columns or chunks, the storage of an extension, the rows of views,
    each by its own reducer."""
    views = _views(arrow)
    if not any(isinstance(kind, arrow.BaseExtensionType) or kind in views for kind in kinds):
        return data.__reduce_ex__(5)
    if hasattr(data, "schema"):
        return type(data).from_arrays, (data.columns, None, data.schema)
    if isinstance(data, arrow.ChunkedArray):
        return arrow.chunked_array, (data.chunks, data.type)
    if data.type not in views:
        return arrow.ExtensionArray.from_storage, (data.type, data.storage)
    dense = _SLACK * _VIEW_BYTES * len(data)
    if data.get_total_buffer_size() <= _SLACK_BYTES or data.buffers()[1].size <= dense or _is_shared(data):
        return data.__reduce_ex__(5)
    try:
        return rebuild_views, (data.cast(views[data.type]), data.type)
    except arrow.ArrowException:  # text that is no UTF-8
        return data.__reduce_ex__(5)


def _views(arrow: Any) -> dict[Any, Any]:
    """Types whose arrays keep all of their text, however few rows are left; and types for the rows alone."""
    if not hasattr(arrow, "string_view"):  # an older pyarrow
        return {}
    return {arrow.string_view(): arrow.large_string(), arrow.binary_view(): arrow.large_binary()}


def rebuild_views(rows: Any, kind: Any) -> Any:
    return rows.cast(kind)


def _in_batches(arrow: Any, data: Any) -> Any:
    """The data as a table or record batch."""
    if isinstance(data, arrow.Table | arrow.RecordBatch):
        return data
    make = arrow.Table if isinstance(data, arrow.ChunkedArray) else arrow.RecordBatch
    return make.from_arrays([data], names=["0"])


def _is_odd(arrow: Any, kind: Any) -> bool:
    """Whether it has an extension in it, which needs more than what a stream tells, views, of which a stream
    has all the text, or a union: pyarrow crashes when it measures an empty one that came from a stream."""
    if isinstance(kind, arrow.BaseExtensionType | arrow.UnionType) or kind in _views(arrow):
        return True
    if isinstance(kind, arrow.DictionaryType):
        return _is_odd(arrow, kind.value_type)
    return any(_is_odd(arrow, kind.field(i).type) for i in range(kind.num_fields))


def _is_shared(data: Any) -> bool:
    """Whether all of its memory travels by reference."""
    columns = data.columns if hasattr(data, "columns") else [data]
    chunks = [chunk for column in columns for chunk in getattr(column, "chunks", [column])]
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers() if buffer is not None]
    return all(_stays(memoryview(buffer)) for buffer in buffers)


def rebuild_arrow(buffer: Any, whole: bool, column: bool) -> Any:
    """whole: it was a table or chunked array, else one batch or array. column: it was no table or batch."""
    arrow = importlib.import_module("pyarrow")
    with arrow.ipc.open_stream(arrow.py_buffer(buffer)) as stream:
        rows = stream.read_all() if whole else stream.read_next_batch()
    return rows.column(0) if column else rows
