"""SharedState.watch: what changed is seen, in every process, once it is asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

from marks import FORKS_BESIDE_THREADS
from watching import fork, join

from runtime import Change, SharedState

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
