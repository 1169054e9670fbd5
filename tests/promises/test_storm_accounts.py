"""The storm's accounts can fail: each thing that they hold against a runtime, shown wrong ones."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import CancelledError

import pytest
from recording import END, START, Entry
from storm import slopes
from storm.accounts import Ledger, Unbalanced, Words, check_orders, check_share
from storm.orders import DROPPED, GOOD, Order
from storm.tasks import LOGGED, WROTE, Refused

from runtime import BrokenRuntime, TaskCancelled, TaskTimeout, WorkerDied

A, B, C = 101, 102, 103  # pids


def order(key, outcome=GOOD, kind="plain", **facts):
    one = Order(kind, key)
    one.outcome = outcome
    for name, value in facts.items():
        setattr(one, name, value)
    return one


def chunk(key, outcome=GOOD, **facts):
    return order(key, outcome, "item", chunk=True, **facts)


def began(key, pid, attempt=1):
    return Entry(key, pid, START | attempt << 8)


def ran(key, pid, attempt=1):
    return [began(key, pid, attempt), Entry(key, pid, END | attempt << 8)]


def died(pid, attempts=1):
    return WorkerDied(pid, 0, None, 9, "", attempts)


TWICE = [began(1, A), *ran(1, B, 2)]
# (orders, ledger, who was killed)
RIGHT = {
    "a result": ([order(1)], ran(1, A), set()),
    "again after a kill": ([order(1, runs=2)], TWICE, {A}),
    "again after its own death": ([order(1, runs=2, fatal=True)], TWICE, set()),
    "again because it had raised": ([order(1, runs=2, again=True)], [*ran(1, A), *ran(1, A, 2)], set()),
    "killed before it could say that it began": ([order(1, runs=2)], ran(1, B, 2), {A}),
    "blamed": ([order(1, died(A))], [began(1, A)], {A}),
    "blamed after two attempts": ([order(1, died(B, 2), runs=2)], [began(1, A), began(1, B, 2)], {A, B}),
    "neighbours": ([chunk(1), chunk(2, runs=2)], [*ran(1, A), began(2, A), *ran(1, B), *ran(2, B)], {A}),
    "neighbours of a failure": ([chunk(1), chunk(2, died(A))], [*ran(1, A), began(2, A), *ran(1, B)], {A}),
    "neighbours of what was dropped": (
        [chunk(1), chunk(2, DROPPED), chunk(3, DROPPED)],
        [*ran(1, A), *ran(2, A), began(3, A), *ran(1, B)],
        {A},
    ),
    "a neighbour that was blamed before it could say that it began again": (
        [chunk(1), chunk(2, died(B)), chunk(3, died(A))],
        [*ran(1, A), *ran(2, A), began(3, A), *ran(1, B), *ran(1, C)],
        {A, B},
    ),
    "an error of its own": ([order(1, Refused(1), errors=Refused)], ran(1, A), set()),
    "late": ([order(1, TaskTimeout(), timed=True)], [began(1, A)], set()),
    "cancelled": ([order(1, CancelledError(), asked=True, said=True)], [], set()),
    "cancelled when it had just died": (
        [order(1, CancelledError(), asked=True, said=True, fatal=True)],
        [began(1, A)],
        {A},
    ),
    "stopped": ([order(1, TaskCancelled(), asked=True, said=True)], [began(1, A)], set()),
    "dropped": ([chunk(1, DROPPED)], [began(1, A)], set()),
}
WRONG = {
    "no outcome": ([order(1, None)], [], set()),
    "called back twice": ([order(1, watched=True, calls=2)], ran(1, A), set()),
    "never called back": ([order(1, watched=True)], ran(1, A), set()),
    "a result without a run": ([order(1)], [began(1, A)], set()),
    "a wrong result": ([order(1, "a wrong result: 7")], ran(1, A), set()),
    "nobody's": ([order(1)], [*ran(1, A), *ran(7, A)], set()),
    "twice, without retries": ([order(1)], TWICE, {A}),
    "twice, for nothing": ([order(1, runs=2)], TWICE, set()),
    "an attempt twice": ([order(1, runs=2)], [began(1, A), *ran(1, B)], {A}),
    "an attempt too many": ([order(1, runs=2)], ran(1, A, 3), {A}),
    "not the last of the dead": ([order(1, runs=2), order(2)], [*ran(1, A), *ran(2, A), *ran(1, B, 2)], {A}),
    "neighbours of no chunk": (
        [order(1, kind="item", runs=2), order(2, kind="item", runs=2)],
        [*ran(1, A), began(2, A), *ran(1, B), *ran(2, B)],
        {A},
    ),
    "a neighbour far away": (
        [chunk(1), chunk(2), chunk(3)],
        [*ran(1, A), *ran(2, A), began(3, A), *ran(1, B), *ran(3, B)],
        {A},
    ),
    "blamed with attempts left": ([order(1, died(A), runs=2)], [began(1, A)], {A}),
    "blamed on the living": ([order(1, died(A))], [began(1, A)], {B}),
    "blamed on another": ([order(1, died(B))], [began(1, A)], {A, B}),
    "an error of another": ([order(1, Refused(2), errors=Refused)], ran(1, A), set()),
    "an error that it cannot have": ([order(1, Refused(1))], ran(1, A), set()),
    "broken": ([order(1, BrokenRuntime())], [], set()),
    "late without a timeout": ([order(1, TaskTimeout())], [began(1, A)], set()),
    "cancelled by nobody": ([order(1, CancelledError())], [], set()),
    "cancelled, and it ran": ([order(1, CancelledError(), asked=True, said=True)], ran(1, A), set()),
    "said to be cancelled": ([order(1, asked=True, said=True)], ran(1, A), set()),
}


@pytest.mark.parametrize(("orders", "entries", "killed"), RIGHT.values(), ids=RIGHT)
def test_what_may_be(orders, entries, killed):
    assert check_orders(orders, Ledger(entries), killed).total() == len(orders)


@pytest.mark.parametrize(("orders", "entries", "killed"), WRONG.values(), ids=WRONG)
def test_what_may_not(orders, entries, killed):
    with pytest.raises(Unbalanced):
        check_orders(orders, Ledger(entries), killed)


def test_a_second_outcome_is_kept():
    one = order(1, None, good=lambda value: value == 1)
    one.end(1)
    assert one.outcome is GOOD
    one.fail(Refused(1))
    assert one.outcome is not GOOD and "a second outcome" in one.outcome
    one = order(1, None, good=lambda value: value == 1)
    one.end(2)
    assert "a wrong result: 2" in one.outcome


def test_a_share_of_tasks():
    check_share(Counter({A: 3}), None)
    check_share(Counter({A: 3}), 3)
    with pytest.raises(Unbalanced, match="began 4 tasks, of 3"):
        check_share(Counter({A: 4}), 3)


def heard(*lines, noted=2):
    words = Words()
    words.add(Ledger([began(1, A), *[Entry(1, A, WROTE)] * noted, Entry(1, A, LOGGED)]))
    words.come(LOGGED, "storm 1 0")
    for line in lines:
        words.come(WROTE, line)
    words.check()


def test_words():
    heard("storm 1 0", "storm 1 1")
    heard("storm 1 0", "storm 1 1", noted=1)  # killed before it could note the second
    for lines, why in (
        (("storm 1 0",), "and 1 came"),
        (("storm 1 0", "storm 1 1", "storm 1 1"), "came 2 times, of 1 runs"),
        (("storm 1 0", "storm 1 1storm 1 2"), "not whole"),
    ):
        with pytest.raises(Unbalanced, match=why):
            heard(*lines)


# ---- slopes ----------------------------------------------------------------------------------------------


def series(value, count=300, seconds=600.0, noise=0.0):
    draw = random.Random(7)
    return [(i * seconds / count, value(i / count) + draw.gauss(0, noise)) for i in range(count)]


FLAT = {
    "constant": series(lambda t: 40),
    "noise": series(lambda t: 1e7, noise=1e6),
    "noise of counts": [(x, round(y)) for x, y in series(lambda t: 40, noise=1.0)],
    "a warm-up": series(lambda t: 1e7 + 1e6 * min(1, t / 0.15), noise=1e4),
    "taken once": series(lambda t: 40 + (t > 0.6)),
    "falling": series(lambda t: 1e7 * (1 - t)),
    "spikes": series(lambda t: 40 + 100 * (int(t * 300) % 17 == 0)),
}
GROWING = {
    "a descriptor each two minutes": (series(lambda t: 40 + int(5 * t)), 1),
    "a megabyte a minute, in noise": (series(lambda t: 1e7 + 1e7 * t, noise=2e6), 4 << 20),
    "many samples": (series(lambda t: 1e7 + 1e7 * t, count=20_000, noise=2e6), 4 << 20),
    "stairs": (series(lambda t: 1e7 + 3e6 * int(4 * t)), 4 << 20),
}


@pytest.mark.parametrize("samples", FLAT.values(), ids=FLAT)
def test_what_does_not_grow(samples):
    slopes.check_flat("it", samples, 1)


@pytest.mark.parametrize(("samples", "room"), GROWING.values(), ids=GROWING)
def test_what_grows(samples, room):
    with pytest.raises(AssertionError, match="it grows by"):
        slopes.check_flat("it", samples, room)


def test_slopes_are_those_of_the_line():
    found = slopes.slope([(float(x), 3.0 + 2.0 * x) for x in range(100)])
    assert found.value == found.low == found.high == 2.0 and found.grown == 2.0 * 79
    noisy = slopes.slope(series(lambda t: 1e7 * t, noise=1e6))
    assert noisy.low < 1e7 / 600 < noisy.high and noisy.high < 1.2 * noisy.low
    with pytest.raises(ValueError, match="12 can tell"):
        slopes.slope([(float(x), 0.0) for x in range(13)])
