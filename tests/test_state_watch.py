"""SharedState.watch: what changed is seen, in every process, once it is asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest
from marks import FORKS_BESIDE_THREADS
from watching import fork, join

from runtime import Change, RegionFull, SharedRegion, SharedState

pytestmark = FORKS_BESIDE_THREADS


def test_sets_and_deletions_of_others(state: SharedState) -> None:
    state.set("a/old", b"0")
    state.set("a/gone", b"0")
    watch = state.watch("a/")

    def change() -> None:
        state.set("b", b"not seen")
        state.set("a/new", b"1")
        state.set("a/old", b"1")
        state.delete("a/gone")
        state.add("a/n")

    pid = fork(change)
    seen: dict[object, Change] = {}
    while len(seen) < 4:
        change_seen = next(watch)
        assert change_seen.version > (seen[change_seen.key].version if change_seen.key in seen else 0)
        seen[change_seen.key] = change_seen
    join(pid)
    values = {key: change.value for key, change in seen.items()}
    assert values == {"a/new": b"1", "a/old": b"1", "a/gone": None, "a/n": (1).to_bytes(8, "little")}
    assert seen["a/new"].version == state.version("a/new")
    watch.close()
    assert list(watch) == []


def test_an_item_whose_time_is_over(state: SharedState) -> None:
    watch = state.watch()
    state.set("a", b"1", ttl=0.03)
    was, over = next(watch), next(watch)
    assert (was.value, over.value) == (b"1", None)
    state.set("a", b"2")
    assert was.version < over.version < next(watch).version


def test_a_key_that_came_and_went_between_two_looks(state: SharedState) -> None:
    """By hand, and by its time; each has a version of its own."""
    watch, other = state.watch("a/"), state.watch("b/")
    for turn in range(3):
        state.set("a/1", b"1")
        last = state.version("a/1")
        assert state.delete("a/1")
        assert not state.delete("a/1")
        assert (state.get("a/1"), "a/1" in state, state.version("a/1"), len(state)) == (None, False, 0, 0)
        assert state.items() == []
        state.set("a/2", b"2", ttl=1e-9)
        changes = {next(watch), next(watch)}
        assert {(change.key, change.value) for change in changes} == {("a/1", None), ("a/2", None)}
        assert all(change.version > last for change in changes if change.key == "a/1"), turn
    assert watch._watch.look() == other._watch.look() == []
    assert state.compare_and_set("a/1", None, b"3")
    assert state.add("a/2") == 1
    assert {next(watch).key, next(watch).key} == {"a/1", "a/2"}


def test_tombstones_stay_until_every_watch_has_seen_them(state: SharedState) -> None:
    whole = state.bytes_free()
    watch, late = state.watch(), state.watch()

    def gone(count: int) -> None:
        for i in range(count):
            state.set(f"k{i}", b"")
            state.delete(f"k{i}")

    gone(100)
    for _ in range(5):
        watch._watch.look()
    assert state.sweep() == 0
    assert state.bytes_free() < whole  # one has not looked yet
    assert len(late._watch.look()) == 100
    for one in (watch, late, watch, late, watch):
        assert one._watch.look() == []
    assert state.bytes_free() == whole
    gone(100)
    watch.close()
    assert state.sweep() == 0
    late.close()
    assert state.sweep() == 100  # nobody watches any more
    assert state.bytes_free() == whole


def test_two_mappings_of_a_process_watch_each_for_itself(state: SharedState) -> None:
    other = SharedState.open(SharedRegion.from_fd(state.region.fd))
    whole = state.bytes_free()
    watch, brief = state.watch(), other.watch()
    brief.close()
    state.set("k", b"")
    state.delete("k")
    assert [change[2] for change in watch._watch.look()] == [None]
    late = other.watch()
    other.set("k", b"")
    other.delete("k")
    for _ in range(4):
        watch._watch.look()
    assert state.bytes_free() < whole
    assert next(late).value is None
    for one in (watch, late, watch, watch, late):
        assert one._watch.look() == []
    assert state.bytes_free() == whole
    late.close()
    region = other.region
    del other, late
    region.close()


def test_watches_of_other_processes_count_too(state: SharedState) -> None:
    """Also after a fork that has an open watch of its parent's, and until they die."""
    whole = state.bytes_free()
    watch = state.watch()
    told, answer = os.pipe(), os.pipe()

    def child() -> None:
        mine = state.watch()
        os.write(answer[1], b".")
        os.read(told[0], 1)
        assert [(change.key, change.value) for change in (next(mine),)] == [("k", None)]
        os.write(answer[1], b".")
        os.read(told[0], 1)

    pid = fork(child)
    os.read(answer[0], 1)
    state.set("k", b"")
    state.delete("k")
    for _ in range(4):
        watch._watch.look()
    assert state.bytes_free() < whole
    os.write(told[1], b".")
    os.read(answer[0], 1)
    state.set("k", b"")
    state.delete("k")
    assert next(watch).value is None
    watch.close()
    assert state.sweep() == 0  # the child has not seen this one
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert state.sweep() >= 1
    assert state.bytes_free() == whole
    for end in (*told, *answer):
        os.close(end)


def test_a_change_of_which_nobody_was_told(state: SharedState) -> None:
    """As by a process that is killed between the change and its word of it: one looks now and then."""
    watch = state.watch()
    assert watch._watch.wait(0) == []
    words = state.region.load_u64(192)  # sequence, and above it the flag that somebody may sleep
    state.region.store_u64(192, words & 0xFFFFFFFF)
    state.set("k", b"1")
    assert state.region.load_u64(192) == words & 0xFFFFFFFF  # nobody was told
    assert watch._watch.wait(0) == []
    assert next(watch).value == b"1"


def test_a_watch_that_a_fork_has_inherited(state: SharedState) -> None:
    watch = state.watch()
    assert watch._watch.wait(0) == []

    def child() -> None:
        assert watch._watch.wait(0) == []
        state.set("k", b"")
        state.delete("k")
        assert next(watch).value is None

    join(fork(child))
    assert next(watch).value is None


def test_when_room_is_short_tombstones_make_it(state: SharedState) -> None:
    """A watch that nobody asks costs others nothing; what it has shown it does not lose."""
    state.set("shown", b"1")
    watch = state.watch()
    for i in range(20_000):
        state.set(f"k{i}", b"")
        state.delete(f"k{i}")
    state.set("shown", b"2")
    state.delete("shown")
    changes = watch._watch.look()
    assert [change[2] for change in changes if change[0] == "shown"] == [None]
    assert len(changes) > 100
    assert all(value is None for _, _, value in changes)


def test_tombstones_are_no_items() -> None:
    with SharedRegion.create(1 << 16) as region:
        state = SharedState.create(region, max_items=2)
        watch = state.watch()
        for i in range(20):
            state.set("other", b"")
            state.set(f"k{i}", b"")
            with pytest.raises(RegionFull, match="has 2 items, and max_items is 2"):
                state.set("one more", b"")
            if i >= 2:
                with pytest.raises(RegionFull):
                    state.add("k0")  # which had a tombstone
            if i < 19:
                state.delete(f"k{i}")
        gone = {key for key, _, value in watch._watch.look() if value is None}
        assert gone == {f"k{i}" for i in range(19)}
        state.delete("other")
        assert state.add("k0") == 1
        watch.close()
        del state, watch


def test_a_watch_that_is_dropped_or_outlives_its_region() -> None:
    with SharedRegion.create(1 << 16) as region:
        state = SharedState.create(region)
        whole = state.bytes_free()
        dropped, kept = state.watch(), state.watch()
        state.set("k", b"")
        state.delete("k")
        del dropped
        kept.close()
        assert (state.sweep(), state.bytes_free()) == (1, whole)
        kept = state.watch()
    kept.close()
    del state, kept


def test_the_last_value_always_arrives(state: SharedState) -> None:
    """However fast it changes, and however its writers end."""
    watch = state.watch("k")

    def count() -> None:
        for _ in range(3000):
            state.add("k")
        os.kill(os.getpid(), signal.SIGKILL)

    pids = [fork(count) for _ in range(2)]
    version = total = 0
    while total < 6000:
        change = next(watch)
        assert change.version > version
        version, total = change.version, int.from_bytes(change.value or b"", "little")
    for pid in pids:
        os.waitpid(pid, 0)


def test_close_ends_who_waits(state: SharedState) -> None:
    watch = state.watch()
    seen: list[Change] = []
    thread = threading.Thread(target=lambda: seen.extend(watch))
    thread.start()
    watch.close()
    thread.join()
    assert seen == []


def test_in_coroutines(state: SharedState) -> None:
    async def first() -> Change:
        async for change in state.awatch("k"):
            return change
        raise AssertionError

    async def run() -> Change:
        task = asyncio.create_task(first())
        await asyncio.sleep(0)
        await state.aset("k", b"1")
        return await task

    assert asyncio.run(run()).value == b"1"


def test_coroutines_that_come_back_miss_nothing(state: SharedState) -> None:
    """`anext`, and a loop that was left: what came in one look is not lost."""

    async def run() -> set[object]:
        watch = state.awatch("k")
        for key in ("k1", "k2", "k3"):
            await state.aset(key, b"1")
        assert bytes(await state.aget("k1", view=True)) == b"1"
        seen = {(await asyncio.wait_for(anext(watch), 5)).key}
        for _ in range(2):
            async for change in watch:
                seen.add(change.key)
                break
        watch.close()
        assert [change async for change in watch] == []
        return seen

    assert asyncio.run(asyncio.wait_for(run(), 10)) == {"k1", "k2", "k3"}
