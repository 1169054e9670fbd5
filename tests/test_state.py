"""SharedState: a map against a dict, limits, times, views, forks, and processes that are killed or stopped.

Values of the storms carry their own checksum: one that is torn, or another key's, is found by who reads it.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from marks import FORKS_BESIDE_THREADS
from sealing import check_sealed, chunks, sealed, writer
from watching import fork, join, stopped, until

from runtime import MemoryPool, RegionFull, SharedRegion, SharedState

pytestmark = FORKS_BESIDE_THREADS

SIZE = 1 << 18


def number(n: int) -> bytes:
    return n.to_bytes(8, "little", signed=True)


def check_blocks(state: SharedState) -> None:
    """Every unit is in use by a key that is there, or free; nothing is left of the dead."""
    state.sweep()
    for key, _value in state.items():
        state.delete(key)
    assert len(state) == 0
    state.sweep()
    # All that remains are cells of chains, which are never freed: no value can have kept a unit.
    whole = SharedState.create(SharedRegion.create(state.region.size)).bytes_free()
    names = chunks(state)
    assert state.bytes_free() + names * 128 == whole


# ---- one process ---------------------------------------------------------------------------------


def test_a_key_and_its_values(state: SharedState) -> None:
    assert state.get("a") is None
    assert state.get("a", 7) == 7
    state.set("a", b"one")
    assert state.get("a") == b"one"
    assert state.get(b"a") == b"one"
    assert "a" in state
    assert b"b" not in state
    state.set(b"a", memoryview(bytearray(b"two")))
    assert (state.get("a"), len(state), state.items()) == (b"two", 1, [("a", b"two")])
    assert state.delete("a")
    assert not state.delete("a")
    assert (len(state), state.items(), state.get("a")) == (0, [], None)


def test_keys_that_are_no_text_and_empty_ones(state: SharedState) -> None:
    state.set(b"\xff", b"1")
    state.set("", b"2")
    state.set("é" * 512, b"")
    assert sorted(state.items(), key=repr) == sorted(
        [(b"\xff", b"1"), ("", b"2"), ("é" * 512, b"")], key=repr
    )
    assert state.items(b"\xff") == [(b"\xff", b"1")]
    assert state.items("é") == [("é" * 512, b"")]
    assert state.items("e") == []


@pytest.mark.parametrize("key", [1, None, bytearray(b"a"), ("a",)])
def test_keys_of_another_type(state: SharedState, key: Any) -> None:
    for call in (state.get, state.delete, state.add, state.version, state.lock, state.__contains__):
        with pytest.raises(TypeError, match="must be str or bytes"):
            call(key)
    with pytest.raises(TypeError, match="must be str or bytes"):
        state.set(key, b"")


def test_what_is_refused(state: SharedState) -> None:
    with pytest.raises(ValueError, match="1024 bytes"):
        state.set("k" * 1025, b"")
    with pytest.raises(TypeError):
        state.set("a", "text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        state.set("a", None)  # type: ignore[arg-type]
    for ttl in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="ttl"):
            state.set("a", b"", ttl=ttl)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(state)
    with pytest.raises(TypeError, match="create"):
        SharedState()  # type: ignore[call-arg]
    assert len(state) == 0


def test_compare_and_set(state: SharedState) -> None:
    assert not state.compare_and_set("a", b"", b"1")
    assert state.compare_and_set("a", None, b"1")
    assert not state.compare_and_set("a", None, b"2")
    assert not state.compare_and_set("a", b"2", b"3")
    assert not state.compare_and_set("a", b"", b"3")
    assert state.compare_and_set("a", b"1", b"")
    assert state.compare_and_set("a", b"", b"4")
    assert state.get("a") == b"4"


def test_add(state: SharedState) -> None:
    assert state.add("n") == 1
    assert state.add("n", -5) == -4
    assert state.get("n") == number(-4)
    state.set("n", number(2**63 - 1))
    with pytest.raises(OverflowError):
        state.add("n")
    with pytest.raises(OverflowError):
        state.add("n", 2**63)
    state.set("n", number(-(2**63)))
    with pytest.raises(OverflowError):
        state.add("n", -1)
    assert state.add("n", 2**63 - 1) == -1
    state.set("n", b"seven..")
    with pytest.raises(TypeError, match="8 bytes"):
        state.add("n")
    assert state.get("n") == b"seven.."
    for amount in (1.5, "1", None):
        with pytest.raises(TypeError):
            state.add("float", amount)
    assert "float" not in state


def test_versions_grow_with_every_change(state: SharedState) -> None:
    assert state.version("a") == 0
    seen = [0]
    for _ in range(5):
        for change in (lambda: state.set("a", b"1"), lambda: state.add("b"), lambda: state.set("a", b"1")):
            change()
            if state.version("a") != seen[-1]:
                seen.append(state.version("a"))
        state.delete("a")
        assert state.version("a") == 0
    assert seen == sorted(set(seen))
    assert len(seen) == 11


def test_objects(state: SharedState) -> None:
    state.set_object("o", {"a": [1, 2]})
    assert state.get_object("o") == {"a": [1, 2]}
    assert state.get_object("p", 3) == 3


def test_values_of_all_sizes(state: SharedState) -> None:
    for size in [*range(200), 1000, 4095, 4096, 65535, 65536, 65537, 100_000]:
        value = random.randbytes(size)
        state.set("v", value)
        assert state.get("v") == value
        assert bytes(state.get("v", view=True)) == value
    check_blocks(state)


def test_many_keys_in_few_buckets() -> None:
    """A bucket's chain grows as it must."""
    with SharedRegion.create(SIZE) as region:
        state = SharedState.create(region, max_bytes=128 * 1500)
        wide = {f"key {i}": number(i) for i in range(1300)}
        for key, value in wide.items():
            state.set(key, value)
        assert dict(state.items()) == wide
        assert chunks(state) > 0
        for key in wide:
            assert state.delete(key)
        assert len(state) == 0
        del state


class AgainstDict(RuleBasedStateMachine):
    """Any order of operations gives what a dict gives."""

    watched = False
    keys = st.sampled_from([f"key{i}" for i in range(40)]) | st.text(max_size=3)
    values = st.binary(max_size=400)

    def __init__(self) -> None:
        super().__init__()
        self.region = SharedRegion.create(SIZE)
        self.state = SharedState.create(self.region)
        self.other = SharedState.open(SharedRegion.from_fd(self.region.fd))
        self.model: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.watch = self.state.watch() if self.watched else None
        self.changed: set[str] = set()
        self.seen: dict[str, int] = {}  # key -> version that the watch has shown last

    @rule(key=keys, value=values)
    def set(self, key: str, value: bytes) -> None:
        self.state.set(key, value)
        self.model[key] = value
        self.changed.add(key)

    @rule(key=keys)
    def delete(self, key: str) -> None:
        if key in self.model:
            self.changed.add(key)
        assert self.other.delete(key) == (self.model.pop(key, None) is not None)

    @rule(key=keys, n=st.integers(-(2**62), 2**62))
    def add(self, key: str, n: int) -> None:
        before = self.model.get(key, number(0))
        if len(before) != 8:
            with pytest.raises(TypeError):
                self.state.add(key, n)
            return
        total = int.from_bytes(before, "little", signed=True) + n
        if not -(2**63) <= total < 2**63:
            with pytest.raises(OverflowError):
                self.state.add(key, n)
            return
        assert self.state.add(key, n) == total
        self.model[key] = number(total)
        self.changed.add(key)

    @rule(key=keys, expected=st.none() | values, value=values, right=st.booleans())
    def compare_and_set(self, key: str, expected: bytes | None, value: bytes, right: bool) -> None:
        if right:
            expected = self.model.get(key)
        done = self.other.compare_and_set(key, expected, value)
        assert done == (self.model.get(key) == expected)
        if done:
            self.model[key] = value
            self.changed.add(key)

    @rule(key=keys)
    def look(self, key: str) -> None:
        assert self.other.get(key) == self.model.get(key)
        assert (key in self.state) == (key in self.model)
        version = self.state.version(key)
        assert (version > 0) == (key in self.model)
        assert version == 0 or version >= self.versions.get(key, 0)
        self.versions[key] = version or self.versions.get(key, 0)

    @rule(prefix=st.sampled_from(["", "key1", "k"]))
    def items(self, prefix: str) -> None:
        wanted = {k: v for k, v in self.model.items() if k.startswith(prefix)}
        assert dict(self.other.items(prefix)) == wanted

    @rule()
    def sweep(self) -> None:
        self.state.sweep()

    @rule()
    def see(self) -> None:
        """A watch shows each key that has changed once, as it is now, by its newest version."""
        if self.watch is not None:
            changes = self.watch._watch.look()
            assert sorted((key, value) for key, _, value in changes) == sorted(
                (key, self.model.get(key)) for key in self.changed
            )
            assert all(version > self.seen.get(key, 0) for key, version, _ in changes)
            self.seen.update({key: version for key, version, _ in changes})
            self.changed.clear()

    @invariant()
    def as_many(self) -> None:
        assert len(self.state) == len(self.model)

    def teardown(self) -> None:
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        check_blocks(self.state)
        other = self.other.region
        del self.state, self.other
        other.close()
        self.region.close()


class AgainstDictWatched(AgainstDict):
    """The same where what is deleted leaves tombstones."""

    watched = True


TestAgainstDict = AgainstDict.TestCase
TestAgainstDictWatched = AgainstDictWatched.TestCase
TestAgainstDict.settings = TestAgainstDictWatched.settings = settings(
    max_examples=25, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


# ---- limits, times, views ------------------------------------------------------------------------


def test_a_full_map_says_so_and_goes_on(state: SharedState) -> None:
    stored = 0
    with pytest.raises(RegionFull, match=r"no room for 1000 bytes.* of its \d+ bytes, \d+ are free"):
        while True:
            state.set(f"k{stored}", bytes(1000))
            stored += 1
    assert len(state) == stored
    state.delete("k0")
    state.set("again", bytes(1000))
    with pytest.raises(RegionFull):
        state.set("large", bytes(SIZE))
    check_blocks(state)


def test_max_items() -> None:
    with SharedRegion.create(SIZE) as region:
        state = SharedState.create(region, max_items=3)
        for key in "abc":
            state.set(key, b"")
        with pytest.raises(RegionFull, match="has 3 items, and max_items is 3"):
            state.set("d", b"")
        state.set("a", b"anew")
        state.delete("b")
        state.set("d", b"", ttl=0.001)
        until(lambda: state.get("d") is None)
        state.add("e")
        assert sorted(key for key, _ in state.items()) == ["a", "c", "e"]


def test_max_bytes_and_sizes() -> None:
    with SharedRegion.create(SIZE) as region:
        for bad in (0, -1):
            with pytest.raises(ValueError):
                SharedState.create(region, max_bytes=bad)
            with pytest.raises(ValueError):
                SharedState.create(region, max_items=bad)
        with pytest.raises(TypeError):
            SharedState.create(region, max_items="3")  # type: ignore[arg-type]
        state = SharedState.create(region, max_bytes=2048)
        assert state.bytes_free() == 2048
        del state
    with SharedRegion.create(1000) as region, pytest.raises(ValueError, match="at least"):
        SharedState.create(region)


def test_one_map_a_region_and_nothing_else(state: SharedState) -> None:
    with pytest.raises(ValueError, match="already"):
        SharedState.create(state.region)
    with pytest.raises(ValueError, match="SharedState"):
        MemoryPool(1, 64, region=state.region)
    with SharedRegion.create(SIZE) as region:
        with pytest.raises(ValueError, match="no SharedState"):
            SharedState.open(region)
        MemoryPool(1, 64, region=region)
        with pytest.raises(ValueError, match="MemoryPool"):
            SharedState.create(region)


def test_a_closed_region() -> None:
    region = SharedRegion.create(SIZE)
    state = SharedState.create(region)
    state.set("a", b"1")
    view = state.get("a", view=True)
    with pytest.raises(BufferError):
        region.close()
    del view
    lock = state.lock("l")
    region.close()
    calls: list[Callable[[], object]] = [
        lambda: state.get("a"), lambda: state.set("a", b""), lambda: state.add("a"), lambda: len(state),
        state.items, state.sweep, lambda: "a" in state, lambda: state.delete("a"), lock.acquire,
        lambda: state.version("a"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()


def test_items_whose_time_is_over(state: SharedState) -> None:
    state.set("a", b"1", ttl=0.02)
    state.set("n", number(5), ttl=0.02)
    assert state.get("a") == b"1"
    until(lambda: state.get("a") is None)
    until(lambda: "n" not in state)
    assert (len(state), state.items(), state.version("a")) == (0, [], 0)
    assert state.get("a", view=True) is None
    assert not state.compare_and_set("a", b"1", b"2")
    assert state.compare_and_set("a", None, b"2")
    assert state.add("n") == 1
    assert state.get("a") == b"2"
    state.set("a", b"3", ttl=1e10)
    assert state.get("a") == b"3"
    state.set("b", b"4", ttl=0.001)
    until(lambda: "b" not in state)
    assert not state.delete("b")


def test_an_item_keeps_its_time_when_it_is_added_to(state: SharedState) -> None:
    state.set("n", number(5), ttl=0.05)
    assert state.add("n") == 6
    until(lambda: "n" not in state)


def test_what_is_over_makes_room(state: SharedState) -> None:
    with pytest.raises(RegionFull):
        for i in range(10_000):
            state.set(f"k{i}", bytes(1000), ttl=3600 if i % 2 else 0.01)
    until(lambda: state.get("k0") is None)
    state.set("more", bytes(1000))
    # and without need, with later writes
    for i in range(100_000):
        state.set(f"t{i % 100}", b"", ttl=1e-6)
        if i % 1000 == 0 and state.bytes_free() < 1000:
            raise AssertionError("nothing is freed")


def test_views_stay_what_they_are(state: SharedState) -> None:
    free = state.bytes_free()
    values = [random.randbytes(300) for _ in range(10)]
    views = []
    for value in values:
        state.set("v", value)
        views.append(state.get("v", view=True))
    assert [bytes(view) for view in views] == values
    assert all(view.readonly for view in views)
    state.delete("v")
    assert [bytes(view) for view in views] == values
    views.clear()
    assert state.bytes_free() == free


def test_get_or_set_makes_it_once(state: SharedState) -> None:
    made = []

    def make() -> bytes:
        made.append(1)
        return b"made"

    threads = [threading.Thread(target=lambda: state.get_or_set("k", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert state.get_or_set("k", make) == b"made"
    with pytest.raises(ZeroDivisionError):
        state.get_or_set("other", lambda: bytes(1 // 0))
    for nothing in (5, [1, 2], None, "text"):
        with pytest.raises(TypeError):
            state.get_or_set("other", lambda value=nothing: value)
    assert "other" not in state
    assert state.get_or_set("other", make) == b"made"


# ---- processes -----------------------------------------------------------------------------------


def test_adds_of_processes_and_threads_are_all_counted(state: SharedState) -> None:
    def count() -> None:
        threads = [threading.Thread(target=lambda: [state.add("n") for _ in range(5000)]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    join(*[fork(count) for _ in range(3)])
    assert state.add("n", 0) == 30_000
    check_blocks(state)


def test_a_named_region_from_another_mapping(state: SharedState) -> None:
    def other() -> None:
        with SharedRegion.from_fd(state.region.fd) as region:
            mine = SharedState.open(region)
            assert mine.get("a") == b"1"
            mine.set("b", b"2")
            del mine

    state.set("a", b"1")
    join(fork(other))
    assert state.get("b") == b"2"


def test_one_key_is_inserted_once_by_many(state: SharedState) -> None:
    """All processes insert and delete the same few keys: each success is exactly one."""

    def run(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(4000):
            key = f"k{chance.randrange(3)}"
            if state.compare_and_set(key, None, number(seed)):
                state.add("live")
            elif state.delete(key):
                state.add("live", -1)

    join(*[fork(lambda seed=seed: run(seed)) for seed in range(4)])
    live = [key for key, _ in state.items("k")]
    assert len(live) == len(set(live)) == state.add("live", 0)
    check_blocks(state)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kills", [50])
@pytest.mark.parametrize("watched", [False, True])
def test_killed_anywhere(state: SharedState, kills: int, watched: bool) -> None:
    """No value is torn, no block is lost, and nobody waits for the dead.

    Watched: what goes leaves tombstones, and whoever is killed has watched, too.
    """
    watch = state.watch("nothing") if watched else None
    chance = random.Random(kills)
    pids = {fork(lambda seed=seed: writer(state, seed, watched)): seed for seed in range(3)}
    for turn in range(kills):
        pid = chance.choice(list(pids))
        seed = pids.pop(pid)
        before = state.add(f"ops {seed}", 0)
        until(lambda seed=seed, before=before: state.add(f"ops {seed}", 0) > before + 20)
        time.sleep(chance.random() * 0.001)  # the kill may hit any instruction: no synchronisation
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for key, value in state.items("key "):
            check_sealed(str(key), value)
        if watch is not None:
            assert watch._watch.look() == []
        pids[fork(lambda seed=seed, turn=turn: writer(state, seed, watched))] = seed
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if watch is not None:
        watch.close()
    check_blocks(state)


def test_stopped_processes_hinder_nobody(state: SharedState) -> None:
    pids = [fork(lambda seed=seed: writer(state, seed)) for seed in range(3)]
    chance = random.Random(1)
    for _ in range(40):
        for pid in pids[:2]:
            os.kill(pid, signal.SIGSTOP)
            until(lambda pid=pid: stopped(pid))
        before = state.add("ops 2", 0)
        until(lambda before=before: state.add("ops 2", 0) > before + 50)
        for i in range(24):
            key = f"key {i}"
            state.set(key, sealed(key, i, 20))
            check_sealed(key, state.get(key) or sealed(key, 0, 0))
        assert state.sweep() >= 0  # a stopped process is not swept
        for pid in pids[:2]:
            os.kill(pid, signal.SIGCONT)
        time.sleep(chance.random() * 0.002)  # another instruction next time
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    check_blocks(state)


def test_a_fork_of_a_process_that_has_not_written_yet(state: SharedState) -> None:
    """It takes a row of its own: without one nobody would know that its blocks and locks are a dead one's."""

    def child() -> None:
        lock = state.lock("l")
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(child)
    os.waitpid(pid, 0)
    with state.lock("l", 5) as lock:
        assert lock.inherited


def test_rows_of_the_dead_are_used_again(state: SharedState) -> None:
    for i in range(150):
        join(fork(lambda i=i: state.set("k", number(i))))
    assert state.get("k") == number(149)
    check_blocks(state)


def test_rows_of_those_who_died_with_locks_are_used_again(state: SharedState) -> None:
    def child(i: int) -> None:
        lock = state.lock(f"l{i}")
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    for i in range(150):
        pid = fork(lambda i=i: child(i))
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    for at in (0, 8, 24, 32, 40, 48):
        with SharedRegion.create(SIZE) as region:
            state = SharedState.create(region)
            del state
            region.store_u64(at, 0xFFFFFFFFFFFF)
            with pytest.raises(ValueError):
                SharedState.open(region)
