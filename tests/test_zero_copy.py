"""What goes out of band, and comes back as it was: arrays of every kind, views, bytes, frames, Arrow.

The sender's half (`dumps`), the frame that both ends share, and the receiver's half (`loads`) in one
process; a few through a Runtime. What stays in the stream is counted: large data must not be in it.
"""

from __future__ import annotations

import copyreg
import dataclasses
import importlib.util
import os
import pickle
import subprocess
import sys
import tracemalloc
import types
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from runtime import Runtime, _core, arrays, calls, serializer

np = pytest.importorskip("numpy")
# Now, not in a test: its allocator starts a thread that stays.
pa: Any = importlib.import_module("pyarrow") if importlib.util.find_spec("pyarrow") else None
pd: Any = importlib.import_module("pandas") if importlib.util.find_spec("pandas") else None
needs_arrow = pytest.mark.skipif(pa is None, reason="pyarrow is not installed")
needs_pandas = pytest.mark.skipif(pd is None, reason="pandas is not installed")

N = 20_000  # items of an array that is large enough to leave the stream
MIB = 1 << 20
STREAM = 600  # bytes that a pickle of one large object may take without its data


def loaded(payload: serializer.Payload) -> Any:
    """Through a frame, as a receiver gets it: views of memory that it may write to."""
    item = (_core.S_VALUE, payload.data, payload.buffers, payload.readonly)
    ((_, data, views, _, _),) = _core.read_frame(bytearray(_core.Frame([item]).tobytes()))
    return serializer.loads(data, views)


def in_stream(payload: serializer.Payload) -> int:
    """Bytes of the stream that are not the content of a large bytes or bytearray."""
    pieces = [payload.data] if isinstance(payload.data, bytes) else list(payload.data)
    return sum(len(p) for p in pieces if len(p) < 64 * 1024)


def assert_same(back: Any, array: Any) -> None:
    assert type(back) is type(array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.dtype.metadata == array.dtype.metadata
    for name in array.dtype.names or ():  # what lies between the fields is anything
        assert_same(back[name], array[name])
    assert array.dtype.names or back.tobytes() == array.tobytes()
    assert back.flags.writeable == array.flags.writeable
    assert back.flags.aligned or not array.flags.aligned


def order_of(array: Any) -> list[int]:
    return sorted(range(array.ndim), key=lambda axis: (abs(array.strides[axis]), axis))


def locked(array: Any) -> Any:
    array.flags.writeable = False
    return array


# ---- numpy ---------------------------------------------------------------------------------------

DTYPES = [
    "?", "i1", "u8", ">i4", "<i4", "f2", ">f8", "g", "c16", "S7", "U5", ">U5", "V9", "M8[s]",
    ">M8[ns]", "m8[D]", [("a", "i4"), ("b", ">f8")],
    np.dtype([("a", "u1"), ("when", "M8[us]"), ("sub", "i2", (2, 3))], align=True),
    np.dtype({"names": ["x"], "formats": ["i4"], "offsets": [8], "itemsize": 24}),
]  # fmt: skip


def filled(dtype: Any, shape: Any) -> Any:
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    if kind.kind == "U":  # code points, so not any bytes
        return np.array([f"{i % 999}é" for i in range(count)], kind).reshape(shape)
    low = 1 if kind.kind == "b" else 250
    raw = np.random.default_rng(7).integers(0, low + 1, count * kind.itemsize, dtype="u1")
    return np.frombuffer(bytearray(raw.tobytes()), kind).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: locked(a),
        lambda a: a.T,
        lambda a: a.transpose(2, 0, 1),
        lambda a: a[:, ::2],
        lambda a: a[::-1, :, ::-1],
        lambda a: a[1:-1, 3:, 1:],
        lambda a: locked(a[:, ::-3]),
        lambda a: a[:0],
        lambda a: a[0, 0, 0:1].reshape(()),
    ],
    ids=["plain", "locked", "T", "axes", "step", "reversed", "inner", "locked step", "empty", "0-d"],
)
def test_dtypes_and_layouts(dtype: Any, view: Callable[[Any], Any]) -> None:
    array = view(filled(dtype, (20, 80, 40)))
    payload = serializer.dumps(array)
    back = loaded(payload)
    assert_same(back, array)
    if array.size > 1:
        assert in_stream(payload) < STREAM
        assert sum(b.nbytes for b in payload.buffers) == array.nbytes
        assert order_of(back) == order_of(array)


def test_memory_is_shipped_as_it_lies() -> None:
    """Reversed axes and axes in any order cost no copy in the sender, and keep their strides."""
    base = np.arange(N).view("M8[s]").reshape(100, 200)
    for array in (base, base[::-1], base[:, ::-1].T, base.reshape(10, 10, 200).transpose(1, 2, 0)):
        payload = serializer.dumps(array)
        assert np.shares_memory(np.frombuffer(payload.buffers[0], "u1"), base)
        back = loaded(payload)
        assert back.strides == array.strides and (back == array).all()


def test_broadcast_ships_the_memory_that_there_is() -> None:
    row = np.arange(N)
    array = np.broadcast_to(row, (500, N))
    payload = serializer.dumps(array)
    assert [b.nbytes for b in payload.buffers] == [row.nbytes]
    back = loaded(payload)
    assert back.strides == array.strides and not back.flags.writeable and (back[499] == row).all()


@pytest.mark.parametrize("n", [1, 10])
def test_small_arrays_stay_inside(n: int) -> None:
    for array in (np.arange(n), locked(np.arange(n)), np.arange(2 * n)[::2], locked(np.arange(n)[::-1])):
        payload = serializer.dumps(array)
        assert payload.buffers == ()
        assert_same(loaded(payload), array)


def test_metadata_of_a_dtype() -> None:
    array = np.arange(N).view(np.dtype("i8", metadata={"unit": "m"}))[::-1]
    with pytest.warns(UserWarning, match="metadata"):
        np.save(__import__("io").BytesIO(), array)  # numpy's own file format would drop it
    assert loaded(serializer.dumps(array)).dtype.metadata == {"unit": "m"}


def test_types_that_others_have_registered() -> None:
    """As bfloat16 is: their bytes are all there is, unless they say otherwise."""
    rational = pytest.importorskip("numpy._core._rational_tests").rational
    base = np.arange(N).astype(rational).reshape(100, 200)
    for array in (base, locked(base.copy()), base[::-1], base[:, ::3], base.T):
        payload = serializer.dumps(array)
        assert in_stream(payload) < STREAM and sum(b.nbytes for b in payload.buffers) == array.nbytes
        back = loaded(payload)
        assert back.dtype == array.dtype and (back == array).all()
        assert back.flags.writeable == array.flags.writeable


class Sub(np.ndarray):  # type: ignore[misc]
    """Has a pickling of its own."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.array([{"any": 1}, None, "x"] * 10, dtype=object)[::2],
        lambda: np.array([(1, "x")], dtype=[("n", "i4"), ("o", object)]),
        lambda: np.arange(N).view(Sub)[::2],
        lambda: np.zeros(5, "V0"),
        lambda: np.zeros(3, "S0"),
    ],
    ids=["objects", "objects in records", "subclass", "no bytes", "no text"],
)
def test_left_to_numpy(make: Callable[[], Any]) -> None:
    array = make()
    back = loaded(serializer.dumps(array))
    assert type(back) is type(array) and back.dtype == array.dtype and back.tolist() == array.tolist()


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="this numpy has no StringDType")
def test_variable_strings_are_no_memory() -> None:
    array = np.array(["a", "b" * 100] * N, dtype=np.dtypes.StringDType())[::2]
    assert loaded(serializer.dumps(array)).tolist() == array.tolist()


@st.composite
def views(draw: Any) -> Any:
    """A random view of a random array."""
    shape = draw(st.lists(st.integers(0, 9), min_size=0, max_size=4))
    dtype = draw(st.sampled_from(["u1", ">i2", "f8", "M8[s]", "S3", [("a", "i1"), ("b", "f8")]]))
    array = filled(dtype, [*shape, draw(st.sampled_from([1, 3, 700]))])
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    step = st.sampled_from([None, 1, 2, -1, -2])
    place = st.none() | st.integers(-10, 10)
    array = array[tuple(draw(st.builds(slice, place, place, step)) for _ in range(array.ndim))]
    if draw(st.booleans()):
        array = np.lib.stride_tricks.as_strided(  # every row the same memory
            array, (3, *array.shape), (0, *array.strides), writeable=draw(st.booleans())
        )
    return array


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(views())
def test_any_view(array: Any) -> None:
    payload = serializer.dumps(array)
    assert_same(loaded(payload), array)
    assert payload.nbytes <= array.nbytes + 1000


def test_views_of_a_region_travel_by_reference(factory: Callable[..., Runtime]) -> None:
    """Of any size, strided or not: a task writes into the caller's array."""
    rt = factory(1)
    array = rt.empty((100, 100), "f8")
    array[:] = 1
    small, column = rt.empty(3, "M8[s]"), array[::7, 5]
    small[:] = 0
    for part in (array, column, array[::-1, ::3], small, small[::2]):
        payload = serializer.dumps(part, rt._core.arena.locate)
        assert [type(b) for b in payload.buffers] == [_core.BlockSlice]
        assert payload.nbytes < STREAM  # a slice counts nothing
    rt.submit(fill_with, column, 5.0).result()
    assert (column == 5).all() and array.sum() == 10_000 + 4 * len(column)
    del array, small, column, part, payload


def fill_with(array: Any, value: float) -> None:
    array[:] = value


# ---- memoryview ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: memoryview(b"x" * N),
        lambda: memoryview(bytearray(N)),
        lambda: memoryview(bytearray(range(256)) * 200)[::-3],
        lambda: memoryview(np.arange(N, dtype="i4").tobytes()).cast("i", (100, 200)),
        lambda: memoryview(np.zeros((20, 300), ">i4")),
        lambda: memoryview(np.arange(6000.0).reshape(20, 300).T),
        lambda: memoryview(np.arange(6000.0).reshape(20, 300)[:, ::2]),
        lambda: memoryview(filled([("a", "i4"), ("b", "f8")], 3000)),
        lambda: memoryview(np.zeros((0, 3))),
        lambda: memoryview(np.zeros((3, 0, 9))),
        lambda: memoryview(np.array(3.5)),
        lambda: memoryview(b""),
        lambda: memoryview(b"small"),
    ],
)
def test_memoryviews(make: Callable[[], memoryview]) -> None:
    view = make()
    payload = serializer.dumps({"view": [view]})
    back = loaded(payload)["view"][0]
    assert type(back) is memoryview
    assert (back.format, back.itemsize, back.shape) == (view.format, view.itemsize, view.shape)
    assert back.readonly == view.readonly and back.tobytes() == view.tobytes()
    assert in_stream(payload) < STREAM


def test_contiguous_memoryview_is_not_copied() -> None:
    raw = bytearray(N)
    payload = serializer.dumps(memoryview(raw))
    raw[7] = 9
    assert loaded(payload)[7] == 9


def test_released_memoryview_says_so() -> None:
    view = memoryview(bytes(N))
    view.release()
    with pytest.raises(ValueError, match=r"released memoryview.*before it is released"):
        serializer.dumps([view])


@pytest.mark.parametrize(
    ("nbytes", "itemsize", "shape"),
    [(10, 1, (11,)), (10, 2, (10,)), (10, 1, (-10,)), (10, 1, (-1, -10)), (8, 8, (1 << 62, 4)), (0, 1, (1,)),
     (10, 0, (10,)), (10, -1, (10,)), (1, 1, (1,) * 65), (10, 1, (0,)), (6, 1, (0, 6))],
)  # fmt: skip
def test_shape_that_does_not_fit(nbytes: int, itemsize: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"bytes"):
        arrays.rebuild_view(bytes(nbytes), "B", itemsize, shape)


# ---- bytes and bytearrays ------------------------------------------------------------------------


@dataclasses.dataclass
class Box:
    name: str
    data: Any
    more: Any = None


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("nbytes", [0, 100, 65_535, 65_536, 300_000])
def test_nested_at_any_depth(kind: type, nbytes: int) -> None:
    data = kind(b"\x95ab" * (nbytes // 3 + 1))[:nbytes]
    obj = {"a": [Box("x", (data, {"b": data}), [kind(data), "text" * 30_000])], "z": list(range(50_000))}
    payload = serializer.dumps(obj)
    back = loaded(payload)
    assert back == obj and type(back["a"][0].data[0]) is kind
    assert back["a"][0].data[0] is back["a"][0].data[1]["b"]
    if nbytes >= 65_536:
        assert any(p is data or getattr(p, "obj", None) is data for p in payload.data)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_one_copy_in_the_sender(kind: type) -> None:
    """64 MiB: beside the frame itself there is no second copy, and the receiver makes the object alone."""
    data = kind(64 * MIB)
    tracemalloc.start()
    try:
        payload = serializer.dumps([data, {"k": (1, 2)}])
        frame = _core.Frame([(_core.S_VALUE, payload.data, payload.buffers, payload.readonly)])
        assert tracemalloc.get_traced_memory()[1] < MIB
        block = frame.tobytes()
        assert tracemalloc.get_traced_memory()[1] < 65 * MIB
        del frame, payload
        ((_, stream, views, _, _),) = _core.read_frame(block)
        tracemalloc.reset_peak()
        back = serializer.loads(stream, views)
        assert tracemalloc.get_traced_memory()[1] < 129 * MIB  # the block and the object
    finally:
        tracemalloc.stop()
    assert back[0] == data


def test_frozen_does_not_see_later_changes() -> None:
    raw, fixed, view = bytearray(b"a" * 100_000), b"a" * 100_000, memoryview(bytearray(100_000))
    payload = serializer.dumps_frozen([raw, fixed, view])
    raw[:] = b"b" * 100_000
    view[0] = 1
    raw.append(1)  # nothing holds it
    assert loaded(payload) == [b"a" * 100_000, fixed, bytes(100_000)]
    assert any(piece is fixed for piece in payload.data)  # what cannot change is not copied


class Grows:
    """Changes a bytearray while it is being pickled."""

    def __init__(self, other: bytearray) -> None:
        self.other = other

    def __reduce__(self) -> Any:
        self.other.append(1)
        return int, ()


def test_bytearray_resized_meanwhile() -> None:
    raw = bytearray(100_000)
    with pytest.raises(BufferError, match="resized while"):
        serializer.dumps([raw, Grows(raw)])
    assert loaded(serializer.dumps([1, raw]))[1] == raw


def test_frame_of_pieces_is_the_frame_of_the_whole() -> None:
    pieces = (b"abc", bytearray(b"defg"), memoryview(b""), memoryview(b"hij"))
    one = _core.Frame([(0, pieces, (b"x" * 70,), (True,)), (1, b"", (), ())])
    whole = _core.Frame([(0, b"abcdefghij", (b"x" * 70,), (True,)), (1, b"", (), ())])
    assert one.nbytes == whole.nbytes and one.tobytes() == whole.tobytes()
    with pytest.raises(BufferError):
        pieces[1].append(1)  # held, like a buffer
    del one
    pieces[1].append(1)


@pytest.mark.parametrize(
    "bad", [(b"a", 7), (b"a", "text"), (b"a", memoryview(bytes(20))[::2]), 7, "text", None]
)
def test_what_no_frame_is_made_of(bad: Any) -> None:
    with pytest.raises((TypeError, BufferError)):
        _core.Frame([(0, bad, (), ())])


def test_by_value(script: Callable[[str], types.ModuleType]) -> None:
    """Instances of a script's class go by value, and their arrays as all others."""
    mod = script("class C:\n    def __init__(self, *a): self.a = a\n    def __call__(self): return self.a\n")
    view, array = memoryview(bytearray(N)), np.arange(2 * N)[::2]
    payload = serializer.dumps_frozen(mod.C(view, array, bytearray(100_000), locked(np.arange(N))))
    assert [b.nbytes for b in payload.buffers] == [N, array.nbytes, array.nbytes]
    back = loaded(payload).a
    assert back[0] == view and (back[1] == array).all() and back[2] == bytearray(100_000)
    assert [back[0].readonly, back[1].flags.writeable, back[3].flags.writeable] == [False, True, False]


def test_names_of_main_are_found_between_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only there: what the user's own bytes say is not looked at."""
    odd = type("Odd", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Odd", odd, raising=False)
    spelled = (b"\x8c\x08__main__" * 10_000, bytearray(b"\x8c\x08__main__" * 10_000))
    for before, behind in (((), spelled), (spelled, ()), (spelled, spelled)):
        payload = serializer.dumps([*before, odd(), *behind])
        assert b"class_by_id" in payload.joined()  # by value
    assert not serializer._names_any(serializer.dumps(spelled).data)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """A module that no import can find."""

    def make(source: str) -> types.ModuleType:
        module = types.ModuleType("a_script_of_zero_copy")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(source, module.__dict__)
        return module

    return make


# ---- through a Runtime ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("nbytes", [64 * 1024 - 40, 64 * 1024, 3 * MIB])
def test_there_and_back(pool: Runtime, kind: type, nbytes: int) -> None:
    data = kind(bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]
    assert pool.submit(tagged, data).result() == (kind.__name__, data)
    assert list(pool.map(tagged, [data, data[:100], data])) == [
        (kind.__name__, d) for d in (data, data[:100], data)
    ]
    assert pool.submit(lambda: (data, len(data))).result() == (data, len(data))


def tagged(data: Any) -> tuple[str, Any]:
    return type(data).__name__, data


@pytest.fixture(scope="module")
def shared_options() -> dict[str, Any]:
    return {"region_size": "4MiB"}


_reused = {"array": np.zeros(N), "bytearray": bytearray(100_000)}


def reuse(kind: str, value: int) -> Any:
    """As a function does that has a buffer of its own for its results."""
    memory = _reused[kind]
    memory[:] = type(memory)([value]) * len(memory) if kind == "bytearray" else value
    return memory


@pytest.mark.parametrize("kind", ["array", "bytearray"])
@pytest.mark.parametrize("size", ["64MiB", "256KiB"])
def test_results_in_memory_that_the_next_item_changes(
    factory: Callable[..., Runtime], kind: str, size: str
) -> None:
    """Also where there is no room to deliver one before the next item runs."""
    rt = factory(1, region_size=size, region_max=size)
    results = list(rt.map(reuse, [kind] * 24, range(24), chunksize=24))
    assert [int(result[-1]) for result in results] == list(range(24))
    del results


def test_arguments_of_a_call_that_waits_do_not_change(factory: Callable[..., Runtime]) -> None:
    rt = factory(1, region_size="256KiB", region_max="256KiB")  # too small for them
    raw = bytearray(b"a" * 400_000)
    futures = [rt.submit(tagged, raw) for _ in range(5)]
    raw[:] = b"b" * 400_000
    assert all(future.result()[1] == b"a" * 400_000 for future in futures)


# ---- pyarrow and pandas --------------------------------------------------------------------------


def arrow_objects() -> list[Any]:
    text = pa.chunked_array([[f"row {i}" for i in range(N)], ["x"] * N])
    numbers = pa.array(range(2 * N))
    table = pa.table({"n": numbers, "s": text}, metadata={"k": "v"})
    nested = pa.array([{"a": [i, None], "b": "x"} for i in range(N)])
    coded = pa.array(["one", "two"] * N).dictionary_encode()
    batch = table.combine_chunks().to_batches()[0]
    return [table, batch, text, text.chunk(0), numbers, nested, coded, pa.nulls(N)]


@needs_arrow
def test_arrow_goes_out_of_band() -> None:
    for data in arrow_objects():
        payload = serializer.dumps([data])
        assert in_stream(payload) < 10_000  # bitmaps
        assert loaded(payload)[0].equals(data) and type(loaded(payload)[0]) is type(data)


@needs_arrow
@pytest.mark.parametrize(("start", "rows"), [(7, 10), (0, 0), (3, 0), (N - 5, 9)])
def test_arrow_slice_ships_its_rows(start: int, rows: int) -> None:
    for data in arrow_objects():
        part = data.slice(start, rows)
        payload = serializer.dumps(part)
        back = loaded(payload)
        assert payload.nbytes < 3000, part.type if hasattr(part, "type") else part.schema
        assert type(back) is type(part) and back.equals(part)
        if hasattr(part, "schema"):
            assert back.schema.equals(part.schema, check_metadata=True)


def arrow_oddities() -> list[Any]:
    tensor = pa.fixed_shape_tensor(pa.int32(), (2, 2))
    return [
        pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([bytes([i % 256]) * 16 for i in range(N)], pa.binary(16))
        ),
        pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None] * (N // 2))),
        pa.ExtensionArray.from_storage(tensor, pa.array([[1, 2, 3, 4]] * N, tensor.storage_type)),
        pa.array(["a text of more than twelve bytes", None] * (N // 2), pa.string_view()),
        pa.array([b"bytes, more than twelve of them", b"few"] * (N // 2), pa.binary_view()),
    ]


@needs_arrow
@pytest.mark.parametrize(("start", "rows"), [(5, 4), (N - 3, 3), (N, 0), (0, 0)])
def test_arrow_slice_of_extensions_and_views_ships_its_rows(start: int, rows: int) -> None:
    for data in arrow_oddities():
        chunked = pa.chunked_array([data, data], data.type)
        table = pa.table({"x": range(N), "data": data}).replace_schema_metadata({"k": "v"})
        batch = pa.record_batch({"x": range(N), "data": data})
        for whole in (data, chunked, table, batch):
            part = whole.slice(start, rows)
            payload = serializer.dumps(part)
            back = loaded(payload)
            assert payload.nbytes < 4000, data.type
            assert type(back) is type(part) and back.equals(part)
            assert back.validate(full=True) is None
            if hasattr(part, "schema"):
                assert back.schema.equals(part.schema, check_metadata=True)
            else:
                assert back.type == part.type


@needs_arrow
def test_arrow_extensions_within_others_keep_their_own_pickling() -> None:
    inner = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * N, pa.binary(16)))
    outer = pa.StructArray.from_arrays([inner], names=["id"])
    for part in (outer[5:9], pa.table({"s": outer})[5:9], pa.table({"s": outer, "id": inner})[5:9]):
        assert loaded(serializer.dumps(part)).equals(part)


@needs_arrow
def test_empty_arrow_unions_are_not_measured() -> None:
    """pyarrow 26 reads memory that is not there when it measures one that came from a stream."""
    ids = pa.array([0, 1] * (N // 2), pa.int8())
    union = pa.UnionArray.from_sparse(ids, [pa.array(range(N)), pa.array(map(str, range(N)))])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("u", union.type)])) as stream:
        stream.write(pa.record_batch([union[5:5]], ["u"]))
    with pa.ipc.open_stream(sink.getvalue()) as stream:
        streamed = stream.read_next_batch().column(0)
    for data in (union[5:5], streamed):
        for again in (data, loaded(serializer.dumps(data))):  # a task returns it
            assert loaded(serializer.dumps(again)).equals(data)


@needs_pandas
def test_frames_of_pandas() -> None:
    frame = pd.DataFrame(
        {
            "i": np.arange(N),
            "f": np.linspace(0, 1, N),
            "d": pd.date_range("2000", periods=N, freq="s"),
            "z": pd.date_range("2000", periods=N, freq="s", tz="UTC"),
            "c": pd.Categorical(["a", "b"] * (N // 2)),
            "b": np.arange(N) % 2 == 0,
            "m": pd.array([1, None] * (N // 2), dtype="Int64"),
        }
    )
    for part in (frame, frame.set_index("d"), frame[["i", "f"]], frame["d"], frame.iloc[:-1]):
        payload = serializer.dumps({"frame": part})
        assert in_stream(payload) < 4000
        assert loaded(payload)["frame"].equals(part)
    thin = frame.iloc[::100]
    assert serializer.dumps(thin).nbytes < 12_000 + frame.memory_usage().sum() / 50
    assert loaded(serializer.dumps(thin)).equals(thin)


# ---- the tables ----------------------------------------------------------------------------------


class Thing:
    """Pickles as what is registered for it."""


def test_what_the_user_registers_goes_first() -> None:
    serializer.dumps(Thing())
    copyreg.pickle(Thing, lambda thing: (str, ("a thing",)))
    copyreg.pickle(np.ndarray, lambda array: (str, ("mine",)))
    try:
        assert loaded(serializer.dumps([Thing(), np.arange(3)])) == ["a thing", "mine"]
        assert loaded(serializer.dumps((lambda: 1, np.arange(3))))[1] == "mine"
    finally:
        del copyreg.dispatch_table[Thing], copyreg.dispatch_table[np.ndarray]
    assert type(loaded(serializer.dumps([Thing(), np.arange(3)]))[0]) is Thing
    assert (loaded(serializer.dumps(np.arange(N)[::2])) == np.arange(N)[::2]).all()


def test_nothing_is_imported_but_numpy_is_seen_when_it_is() -> None:
    code = """
import sys
from runtime import serializer
serializer.dumps([memoryview(bytes(20000)), object()])
assert not {"numpy", "pyarrow", "pandas", "cloudpickle"} & set(sys.modules)
import numpy
payload = serializer.dumps(numpy.arange(20000)[::2])
assert payload.buffers[0].nbytes == 80000, payload
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Reenters:
    """Pickles something else while it is being pickled."""

    def __reduce__(self) -> Any:
        inner = loaded(serializer.dumps([1, np.arange(N)]))
        return int, (int(inner[1][-1]),)


class Fails:
    def __reduce__(self) -> Any:
        raise ZeroDivisionError("no pickle")


def test_picklers_are_used_again_and_by_nobody_else() -> None:
    for _ in range(10):
        obj = [1, (2,), Reenters(), "x", Reenters()]
        assert loaded(serializer.dumps(obj)) == [1, (2,), N - 1, "x", N - 1]
        with pytest.raises(ZeroDivisionError):
            serializer.dumps([np.arange(N), bytes(100_000), Fails()])
        shared = ["a"]
        assert loaded(serializer.dumps([shared, shared])) == [["a"], ["a"]]


def test_picklers_keep_nothing() -> None:
    import weakref

    thing, array = Thing(), np.arange(N)
    alive = [weakref.ref(thing), weakref.ref(array)]
    serializer.dumps([thing, array])
    serializer.dumps([thing, array, bytes(100_000)])
    del thing, array
    assert [ref() for ref in alive] == [None, None]


def test_stream_that_claims_buffers_it_lacks() -> None:
    payload = serializer.dumps([np.arange(N)[::-1], memoryview(bytes(N))])
    with pytest.raises(Exception, match="buffers"):
        serializer.loads(payload.joined(), payload.buffers[:1])
    with pytest.raises(ValueError, match="bytes"):
        serializer.loads(payload.joined(), [payload.buffers[0], b"short"])
    with pytest.raises((TypeError, ValueError)):
        serializer.loads(payload.joined(), [b"short", payload.buffers[1]])


def claims_more() -> Any:
    """Its result's pickle refers to a buffer that does not come with it."""
    honest = calls.item_of

    def item_of(status: int, payload: Any) -> tuple[Any, ...]:
        calls.item_of = honest
        return status, payload.data, payload.buffers[:1], payload.readonly[:1]

    calls.item_of = item_of
    return [np.arange(N), np.arange(N)]


def test_a_result_that_claims_buffers_it_lacks(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    pid = rt.submit(os.getpid).result()
    error = rt.submit(claims_more).exception()
    assert isinstance(error, pickle.UnpicklingError) and "buffers" in str(error), repr(error)
    assert list(rt.map(len, [np.arange(N)] * 3)) == [N] * 3
    assert rt.submit(os.getpid).result() == pid
    del error
    rt.shutdown()
    assert rt._core.arena.owners() == {}


def test_arguments_that_claim_buffers_they_lack(
    factory: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    rt = factory(1)
    pid = rt.submit(os.getpid).result()
    honest = serializer.pack_call

    def pack_call(*args: Any, **options: Any) -> Any:
        ref, payload = honest(*args, **options)
        return ref, serializer.Payload(payload.data, payload.buffers[:1], payload.readonly[:1])

    with monkeypatch.context() as patch:
        patch.setattr(serializer, "pack_call", pack_call)
        error = rt.submit(len, [np.arange(N), np.arange(N)]).exception()
    assert isinstance(error, pickle.UnpicklingError) and "buffers" in str(error), repr(error)
    assert rt.submit(len, [np.arange(N)] * 2).result() == 2
    assert rt.submit(os.getpid).result() == pid


def test_arguments_that_cannot_travel_fail_their_call_alone(pool: Runtime) -> None:
    view = memoryview(bytes(N))
    view.release()
    assert isinstance(pool.submit(tagged, view).exception(), ValueError)
    error = pool.submit(returns_released).exception()
    assert isinstance(error, ValueError) and "could not be pickled" in str(error.__notes__)
    assert pool.submit(tagged, b"x").result() == ("bytes", b"x")


def returns_released() -> memoryview:
    view = memoryview(bytearray(N))
    view.release()
    return view


def test_current_empty_goes_back_by_reference(factory: Callable[..., Runtime]) -> None:
    rt = factory(1)
    result = rt.submit(lambda: runtime.current().empty(50_000, "f8")[::2]).result()
    assert result.shape == (25_000,) and result.strides == (16,)
    del result
