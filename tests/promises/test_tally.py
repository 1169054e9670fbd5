"""The proofs can fail: what they hold against the ledgers, shown ledgers and times that are wrong."""

from __future__ import annotations

import os

import pytest
import recording
from recording import END, START, Entry
from tally import Tally, Try, check_times
from test_deaths import check_wave

from runtime import WorkerDied

A, B = 101, 102  # pids


def ran(*runs):
    """The ledger of tasks that began and ended in a process, one after another."""
    return [Entry(key, pid, what) for key, pid in runs for what in (START, END)]


def died(pid):
    return WorkerDied(pid, 0, None, 9, "")


GOOD = [
    (ran((0, A), (1, B)), {0: 0, 1: 1}, set(), set(), set()),
    ([*ran((0, A)), Entry(1, A, START), *ran((1, B))], {0: 0, 1: 1}, set(), set(), {A}),
    (ran((0, A), (1, A), (1, B)), {0: 0, 1: 1}, set(), set(), {A}),  # killed after its end, before it said so
    (ran((0, A), (1, A), (2, A), (1, B), (2, B)), {0: 0, 1: 1, 2: 2}, set(), {1, 2}, {A}),
    ([Entry(0, A, START)], {0: died(A)}, {0}, set(), {A}),
    ([], {0: died(A)}, {0}, set(), {A}),
]
BAD = {
    "lost": (ran((1, A)), {0: 0, 1: 1}, set(), set(), set()),
    "of another": (ran((0, A)), {0: 1}, set(), set(), set()),
    "never ended": ([Entry(0, A, START)], {0: 0}, set(), set(), set()),
    "twice, for no kill": (ran((0, A), (0, B)), {0: 0}, set(), set(), set()),
    "twice, without retries": (ran((0, A), (0, B)), {0: 0}, {0}, set(), {A}),
    "not the last of the dead": (ran((0, A), (1, A), (0, B)), {0: 0, 1: 1}, set(), set(), {A}),
    "neighbours of no chunk": (ran((0, A), (1, A), (0, B), (1, B)), {0: 0, 1: 1}, set(), set(), {A}),
    "failed, with retries": ([Entry(0, A, START)], {0: died(A)}, set(), set(), {A}),
    "blamed on a live one": ([Entry(0, A, START)], {0: died(A)}, {0}, set(), {B}),
    "blamed on another": ([Entry(0, A, START)], {0: died(B)}, {0}, set(), {A, B}),
    "blamed, but not running": ([*ran((0, A)), Entry(1, A, START)], {0: died(A), 1: 1}, {0}, set(), {A}),
    "unasked": (ran((0, A), (7, A)), {0: 0}, set(), set(), set()),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_a_kill_may_cost(case):
    check_wave(*case)


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_it_may_not(case):
    with pytest.raises(AssertionError):
        check_wave(*case)


def test_records_keep_their_order(tmp_path):
    path = str(tmp_path / "ledger")
    for key in range(3):
        assert recording.recorded(path, key) == key
    assert [(entry.key, entry.what) for entry in recording.entries(path)] == [
        (key, what) for key in range(3) for what in (START, END)
    ]
    os.close(recording._open.popitem()[1])


def tries(*took):
    return [Try("it", 0.1, 10.0 * i, 10.0 * i + seconds) for i, seconds in enumerate(took)]


def test_times_of_a_slice():
    fast = [0.05] * 199
    check_times(tries(*fast, 0.09), [])
    check_times(tries(*fast, 0.3), [[1990.05, 1990.2], [1990.1, 1990.27]])  # 220 ms of two processors
    for stalls in ([], [[1990.05, 1990.2]], [[1980.0, 1989.9]], [[1990.05, 1990.2], [1990.06, 1990.19]]):
        with pytest.raises(AssertionError, match=r"300\.0 ms, promised 100 ms"):
            check_times(tries(*fast, 0.3), stalls)
    with pytest.raises(AssertionError, match="3 of 202"):
        check_times(tries(*fast, 0.3, 0.3, 0.3), [[0.0, 5000.0]])


def test_a_tally_says_what_is_missing():
    tally = Tally({"kills": 2}, "seed")
    assert tally.more()
    tally.counts["kills"] = 1
    with pytest.raises(AssertionError, match=r"missing: \{'kills': 1\}"):
        tally.finish()
    tally.counts["kills"] = 2
    assert not tally.more()
    tally.finish()
    tally.timed("it", 0.1, 0.0, 1.0)
    with pytest.raises(AssertionError, match="promised 100 ms"):
        tally.timed("it", 0.1, 0.0, 1.1)
