"""What each promise wants to see counted: here (CI, the figure in brackets) and in all (`make soak`).

Read by conftest.py of this folder and by tools/soak.py; plain data, so that both can load it by its path.
"""

from __future__ import annotations

from typing import NamedTuple


class Goal(NamedTuple):
    """One line of the table of promises, and the test that proves it."""

    promises: tuple[int, ...]  # by their numbers
    title: str
    test: str  # FILE::FUNCTION in this folder
    counts: dict[str, tuple[int, int]]  # what is counted: (in CI, in all)
    times: str = ""  # the promised time, in words
    longest: bool = False  # one run has to reach the count by itself


GOALS = (
    Goal(
        (1, 2),
        "no accepted task is lost, one recorded result each, whichever workers are killed",
        "test_deaths.py::test_no_task_is_lost_or_doubled",
        {"tasks": (20_000, 1_000_000), "kills": (100, 10_000)},
    ),
    Goal(
        (3,),
        "only the started task is blamed for a death",
        "test_deaths.py::test_only_the_started_task_is_blamed",
        {"poison": (50, 1_000)},
    ),
    Goal(
        (5,),
        "after any storm every task, run, block, descriptor, process and thread is accounted for",
        "test_storm.py::test_every_account_is_balanced_after_a_storm",
        {"kills": (500, 100_000)},
    ),
    Goal(
        (6,),
        "values of the shared state are never torn, whoever is killed as he writes",
        "test_shared_state.py::test_values_are_never_torn",
        {"kills": (300, 10_000)},
    ),
    Goal(
        (7,),
        "the shared state is linearizable per key, also under kills",
        "test_shared_state.py::test_histories_are_linearizable",
        {"histories": (200, 10_000)},
    ),
    Goal(
        (8,),
        "a dead holder's lock passes on, a living one's never",
        "test_shared_state.py::test_a_dead_holders_lock_passes_on",
        {"locks": (200, 10_000)},
        "10 ms",
    ),
    Goal(
        (9,),
        "full memory is an exception, never SIGBUS",
        "test_full_memory.py::test_full_memory_is_an_exception",
        {"over-allocations": (100, 10_000)},
    ),
    Goal(
        (10,),
        "nothing is left over of what is killed",
        "test_leftovers.py::test_nothing_is_left_of_what_is_killed",
        {"workers": (10, 1_000), "zygotes": (10, 1_000), "hosts": (10, 1_000)},
        "1 s",
    ),
    Goal(
        (11,),
        "hung code is stopped at its deadline, also C code that holds the GIL",
        "test_hung_code.py::test_hung_code_is_stopped_at_its_deadline",
        {"hung": (20, 1_000), "holding the GIL": (10, 500)},
        "100 ms",
    ),
    Goal(
        (12, 13),
        "reloads under load lose and double no task, never fewer than N - 1 ready; broken code is refused",
        "test_reloads.py::test_reloads_lose_no_task_and_broken_code_is_refused",
        {"reloads": (10, 1_000), "broken": (3, 100)},
    ),
    Goal(
        (14,),
        "a crash loop does not slow the other slots (its CPU has a test of its own)",
        "test_crash_loops.py::test_a_crash_loop_does_not_slow_the_other_slots",
        {"kinds": (4, 4)},
    ),
    Goal(
        (15,),
        "a producer ten times too fast: flat memory",
        "test_pressure.py::test_memory_is_flat_under_a_fast_producer",
        {"seconds": (10, 600)},
        longest=True,
    ),
    Goal(
        (16,),
        "every kind of host: no hang, output once, distinct random streams",
        "test_hosts.py::test_every_kind_of_host",
        {"hosts": (12, 1_200)},
    ),
    Goal(
        (17,),
        "forged, replayed and truncated messages on every socket have no effect",
        "test_forgery.py::test_forged_messages_have_no_effect",
        {"messages on each": (200, 10_000)},
    ),
    Goal(
        (18,),
        "garbage on the wire or in the region never crashes the host",
        "test_garbage_anywhere.py::test_garbage_never_crashes_the_host",
        {"seconds of fuzzing": (30, 86_400), "scribblers": (40, 10_000)},
    ),
    Goal(
        (19,),
        "a kill a second: memory of host and zygote, descriptors, threads and blocks do not grow",
        "test_storm.py::test_nothing_grows_in_a_steady_storm",
        {"seconds": (20, 28_800)},
    ),
    Goal(
        (20,),
        "steps of the wall clock by an hour change nothing: deadlines, timeouts, drains, back-off, ttl",
        "test_wall_clock.py::test_steps_of_the_wall_clock_change_nothing",
        {"steps": (150, 10_000)},
    ),
)
