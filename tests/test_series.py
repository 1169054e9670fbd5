"""Series: numbers and other plain values that travel in one piece, whole and in part."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import tasks

from runtime import Runtime
from runtime._core import Frame, Span, read_frame, read_series

LIST, INTS, FLOATS, CALLS = 3, 4, 5, 6  # _frame.pxd
EDGES = [0, 1, -1, 255, 256, -(1 << 31), (1 << 31) - 1, (1 << 63) - 1, -(1 << 63)]
REALS = [0.0, -0.0, 1.5, -1e308, 5e-324, math.inf, -math.inf]


class Whole(int):
    """An int by inheritance, which must stay one."""

    def __add__(self, other: int) -> Whole:
        return Whole(int(self) + other)


def same(got: list[Any], wanted: list[Any]) -> bool:
    """Equal in value, type, sign of zero."""
    return [(type(x), repr(x)) for x in got] == [(type(x), repr(x)) for x in wanted]


def spans(values: list[Any]) -> list[Span]:
    """All of `values`, which are plain, as a map would pack them."""
    found: list[Span] = []
    at = 0
    while at < len(values):
        span = Span.pack(at, values, at, False)
        assert span is not None and span.first == at
        found.append(span)
        at += span.count
    assert at == len(values)
    return found


@pytest.mark.parametrize(
    "values",
    [
        EDGES * 20,
        REALS * 20,
        [1 << 63] * 70,
        [*range(100), 1 << 64, *range(100)],
        [True, False] * 50,
        [1, 2.0] * 50,
        [None, "text", b"bytes", 3, (4, 5.0)] * 20,
        [*range(63), "text"] * 3,
        [*range(64), "text"] * 3,
        [7],
        [1.0],
    ],
)
def test_every_item_can_be_read_by_itself(values: list[Any]) -> None:
    for span in spans(values):
        part = values[span.first : span.first + span.count]
        assert same([span.value()], part[:1])
        assert same([single.value() for single in span.singles()], part)


def test_numbers_are_not_pickled() -> None:
    (ints,) = spans(list(range(4096)))
    (reals,) = spans([float(x) for x in range(4096)])
    assert ints.nbytes == reals.nbytes == 8 * 4096


def test_few_numbers_are_pickled_with_their_neighbours() -> None:
    assert len(spans([*range(63), "text"] * 3)) == 1
    assert [span.count for span in spans([*range(64), "text"] * 2)] == [64, 66]


def test_calls_are_never_numbers() -> None:
    span = Span.pack(0, [(1,), (2,)], 0, True)
    assert span is not None and span.several and span.value() == (1,)


def test_part_of_a_frame() -> None:
    data = Frame([(INTS, (5).to_bytes(8, "little") * 100, (), (), 17, 80)]).tobytes()
    ((status, piece, _, start, count),) = read_frame(data)
    assert read_series(status, piece, start, count) == [5] * 80


@pytest.mark.parametrize("status", [INTS, FLOATS])
@pytest.mark.parametrize(("nbytes", "start", "count"), [
    (0, 0, 1), (7, 0, 1), (8, 1, 1), (8, 0, 2), (16, (1 << 32) - 1, 2), (16, 1, (1 << 32) - 1),
])  # fmt: skip
def test_numbers_that_are_not_there(status: int, nbytes: int, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="hold no numbers"):
        read_series(status, bytes(nbytes), start, count)


@pytest.mark.parametrize("status", [LIST, CALLS])
@pytest.mark.parametrize("value", [[], [1], (1, 2, 3), {1: 2}, None])
def test_lists_that_are_too_short_or_none(status: int, value: object) -> None:
    with pytest.raises(ValueError, match="not a list with values"):
        read_series(status, pickle.dumps(value), 0, 2)


@pytest.mark.parametrize("status", [0, 1, 2, 7, 1 << 31])
def test_status_that_is_no_series(status: int) -> None:
    with pytest.raises(ValueError, match="is no series"):
        read_series(status, bytes(64), 0, 1)


@pytest.mark.parametrize("chunksize", [None, 1, 97, 5000])
@pytest.mark.parametrize("values", [EDGES * 300, REALS * 300, [1 << 63, 1, 2.5, "x", True] * 300])
def test_numbers_there_and_back(pool: Runtime, values: list[Any], chunksize: int | None) -> None:
    assert same(list(pool.map(tasks.echo, values, chunksize=chunksize)), values)
    backwards = dict(enumerate(pool.map_unordered(tasks.echo, values, chunksize=chunksize)))
    assert sorted(map(repr, backwards.values())) == sorted(map(repr, values))


def test_nan_keeps_its_bits(pool: Runtime) -> None:
    assert all(math.isnan(x) for x in pool.map(tasks.echo, [math.nan] * 1000))


def test_subclass_of_int_stays_one(pool: Runtime) -> None:
    got = list(pool.map(type, [Whole(x) for x in range(100)]))
    assert {kind.__name__ for kind in got} == {"Whole"}


def test_item_that_dies_among_numbers(factory: Callable[..., Runtime]) -> None:
    rt = factory(2, retries=1)
    values = list(range(20_000))
    random.Random(7).shuffle(values)
    got = list(rt.map(tasks.die_once_at, values, [19_999] * len(values), return_exceptions=True))
    assert got == values
