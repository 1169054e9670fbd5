"""What a worker still sees of the region: host and worker in one thread, so that each step comes in its turn.

The worker dies as by SIGKILL: it does nothing more, and the host sweeps its slot.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scribbling import CLAIM, FREEING, HEAD, LEASE, PRIVATE, PUBLISHING, RECORD, SLOT
from watching import until

from runtime import _core

FN = SimpleNamespace(id=1, data=b"a function")
PAGE = 4096


class World:
    """A host with one worker, whose leases are run by hand."""

    def __init__(self, outbox: int = 16, most: int = 0, pages: int = 64, spin: int = 50_000) -> None:
        self.arena = _core.Arena.create(pages * PAGE, 1, 8, outbox, PAGE, most=most, spin=spin)
        self.bell = os.eventfd(0)
        self.host = _core.Dispatcher(self.arena, _core.DeadlineKeeper(self.arena, self.bell))
        self.slot = self.host.open_slot(0, 1)
        self.notified: list[int] = []  # the threads that would have sent a message
        self.port = self.attend()

    def submit(self, *buffers: Any, data: bytes = b"x") -> Any:
        task = _core.Task(FN, _core.Promise())
        task.hold(data, buffers, (False,) * len(buffers))
        assert self.host.submit(task)
        return task

    def shared(self, pages: int = 1) -> _core.HostBlock:
        """As of rt.empty."""
        block = self.arena.take(pages * PAGE)
        block.share()
        return block

    def claim(self) -> tuple[int, list[Any]]:
        """The next lease, and the views of its arguments."""
        entry = self.port.serve()
        assert entry >= 0
        ((_, _, views, _, _),) = _core.read_frame(self.port.frame(entry), self.port.resolve)
        return entry, views

    def finish(self, entry: int, *views: Any) -> None:
        """The result: that these buffers of the region are returned."""
        parts = [self.port.locate(view) for view in views]
        assert None not in parts
        assert self.port.finish(entry, [(_core.S_VALUE, b"y", tuple(parts), (False,) * len(parts))], 1)

    def die(self) -> None:
        self.host.vacate(self.slot)
        self.host.settle(self.slot, "it was killed")

    def results(self) -> list[Any]:
        """Of each outcome, the buffers that lie elsewhere."""
        found = []
        for kind, _, _, _, exporter, blocks in self.host.take_outcomes():
            assert kind == _core.OUTCOME_FRAME
            ((_, _, views, _, _),) = _core.read_frame(exporter, lambda *key, blocks=blocks: blocks[key[:2]])
            found.append([bytes(view[:8]) for view in views])
        return found

    def end(self) -> None:
        self.host.close()
        self.arena.release()
        os.close(self.bell)

    def attend(self) -> _core.Runner:
        """A worker for the slot."""
        port = _core.Runner(self.arena, self.slot, lambda: self.notified.append(threading.get_ident()))
        port.attend(None, SimpleNamespace(), {}, self.bell, -1, 1)
        self.host.make_ready(self.slot)
        return port


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    assert world.host.malformed == 0
    world.end()


def test_a_result_in_a_block_that_only_a_view_keeps_outlives_its_worker(world: World) -> None:
    """What the worker has said of its views before it died counts for the results that came after it."""
    block = world.shared()
    memoryview(block)[:8] = b"the data"
    world.submit(world.arena.locate(memoryview(block)))
    world.submit()
    del block  # the host needs it for the first call only
    entry, views = world.claim()
    world.finish(entry)
    again, _ = world.claim()
    world.finish(again, *views)
    world.die()
    assert world.results() == [[], [b"the data"]]
    views.clear()
    assert world.arena.used_bytes <= PAGE  # the function


def test_a_worker_that_is_taken_for_dead_claims_nothing(world: World) -> None:
    """Its zygote may have been killed before it could tell the host: then another process has its slot."""
    unknown = world.port
    world.die()
    assert unknown.serve() == _core.LEASE_LOST, "the slot is free"
    world.slot = world.host.open_slot(0, 2)
    world.port = world.attend()
    task = world.submit()
    assert unknown.serve() == _core.LEASE_LOST, "the slot is another one's"
    entry, _ = world.claim()
    world.finish(entry)
    world.host.drain(world.slot)
    assert world.results() == [[]]
    del task


OUT_WHERE, OUT_BODY, OUT_TAG, OUT_BYTES = 88, 96, 104, 112  # of lease_t


def slot_at(world: World) -> int:
    """The offset of the worker's slot."""
    head = HEAD.unpack(world.arena.region.read_at(0, HEAD.size))
    return int(head[6] + head[7] * world.slot)


def lease_at(world: World, entry: int) -> int:
    """The offset of a lease of the worker."""
    head = HEAD.unpack(world.arena.region.read_at(0, HEAD.size))
    return slot_at(world) + SLOT + 4 * head[3] + RECORD * head[4] + LEASE * entry


def own_block(world: World, result: bytes) -> Any:
    """An outcome that names a block of the worker's own, as a task that returns it leaves it."""
    part = world.port.locate(memoryview(world.port.empty(3 * PAGE)))
    return (_core.S_VALUE, result, (part,), (False,))


def test_a_partial_result_that_makes_no_sense_is_let_go_of() -> None:
    """Items of a call, which has none."""
    world = World()
    world.submit()
    entry, _ = world.claim()
    used = world.arena.used_bytes
    assert world.port.commit(entry, [own_block(world, b"y")], 1)
    world.host.drain(world.slot)
    assert world.host.malformed == 1
    assert world.arena.used_bytes == used
    world.finish(entry)
    world.host.drain(world.slot)
    assert world.results() == [[]]
    world.end()


def word_at(world: World, offset: int) -> int:
    """The offset of the word of the extent that lies at an offset."""
    words_at, extents_at = HEAD.unpack(world.arena.region.read_at(0, HEAD.size))[8:10]
    return words_at + (offset - extents_at) // PAGE * 8


WILD = {
    f"{name} {value:#x}": (at, value)
    for name, at, values in (
        ("where", OUT_WHERE, (0, 1, 3, 7, 2**32 - 1)),
        ("body", OUT_BODY, (0, 1, PAGE, 2**40, 2**63, 2**64 - 1)),
        ("tag", OUT_TAG, (0, 2**33 - 1, 2**64 - 1)),
        ("bytes", OUT_BYTES, (3 * PAGE + 1, 2**40, 2**64 - 1)),
        ("lease", 0, (0, 2, 7, 2**63, 2**64 - 1)),
    )
    for value in values
}


@pytest.mark.parametrize(("at", "value"), WILD.values(), ids=WILD)
def test_a_result_whose_descriptor_makes_no_sense(at: int, value: int) -> None:
    """The host fails that task, or that worker, and has every block back."""
    world = World()
    region = world.arena.region
    world.submit()
    entry, _ = world.claim()
    assert world.port.finish(entry, [(_core.S_VALUE, bytes(2 * PAGE), (), ())], 1)
    region.write_at(lease_at(world, entry) + at, value.to_bytes(8, "little")[: 4 if at == OUT_WHERE else 8])
    world.host.drain(world.slot)
    world.die()
    outcomes = world.host.take_outcomes()
    assert [kind for kind, *_ in outcomes] in ([_core.OUTCOME_LOST], [_core.OUTCOME_DIED])
    outcomes.clear()
    assert world.arena.used_bytes <= PAGE  # the function
    again = world.host.open_slot(0, 1)
    assert again == world.slot, "the slot is free"
    world.end()


@pytest.mark.parametrize("state", range(8))
@pytest.mark.parametrize("whose", [0, 5, 0xFFFFFFF])
def test_a_result_in_a_block_whose_word_makes_no_sense(state: int, whose: int) -> None:
    world = World()
    region = world.arena.region
    world.submit()
    entry, _ = world.claim()
    assert world.port.finish(entry, [(_core.S_VALUE, bytes(2 * PAGE), (), ())], 1)
    word = word_at(world, region.load_u64(lease_at(world, entry) + OUT_BODY))
    said = region.load_u64(word)
    wild = said >> 31 << 31 | whose << 3 | state
    region.store_u64(word, wild)
    world.host.drain(world.slot)
    world.die()
    outcomes = world.host.take_outcomes()
    assert [kind for kind, *_ in outcomes] == [_core.OUTCOME_FRAME if wild == said else _core.OUTCOME_LOST]
    outcomes.clear()
    if whose or state not in (CLAIM, PRIVATE, PUBLISHING, FREEING):  # what is said to be another's stays his
        assert region.load_u64(word) == wild
        region.store_u64(word, said)
        world.slot = world.host.open_slot(0, 2)
        world.die()
    assert world.arena.used_bytes <= PAGE  # the function
    world.end()


def test_a_result_by_value_that_stays_incomplete_is_let_go_of() -> None:
    """It announces more than comes."""
    world = World()
    world.submit()
    entry, _ = world.claim()
    used = world.arena.used_bytes
    outcomes = [own_block(world, bytes(2 * PAGE))]
    everything = []
    while pages := world.arena.largest_free_bytes // PAGE:
        everything.append(world.arena.take(pages * PAGE))
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(world.port.finish(entry, outcomes, 1)))
    thread.start()
    bytes_at = lease_at(world, entry) + OUT_BYTES
    until(lambda: world.arena.region.load_u64(bytes_at), "the result is announced")
    world.arena.region.store_u64(bytes_at, 1 << 40)

    def over() -> bool:
        world.host.drain(world.slot)
        return not thread.is_alive()

    until(over, "all that there is has come")
    thread.join()
    assert done == [True]
    outcomes.clear()
    del everything
    world.host.drain(world.slot)
    assert [kind for kind, *_ in world.host.take_outcomes()] == [_core.OUTCOME_LOST]
    assert world.arena.used_bytes == used
    world.end()


def test_only_the_main_thread_of_a_worker_sends_messages() -> None:
    """Others may ask for a block, too; a socket belongs to one thread."""
    world = World(most=128 * PAGE)  # it might grow
    everything = world.arena.take(64 * PAGE)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(world.port.empty(PAGE)))
    world.host.park()
    thread.start()

    def over() -> bool:
        world.host.make_room()
        return not thread.is_alive()

    until(over, "it has found no room")
    thread.join()
    assert found == [None]
    assert world.notified == []
    del everything
    world.end()


# ---- what is about to come -----------------------------------------------------------------------------

COMING = 72  # of slot_t


def test_a_worker_stays_awake_while_its_arguments_are_copied() -> None:
    """The host's word, relative to the copy's size, holds longer than the watch of a nanosecond."""
    world = World(pages=512, spin=1)
    try:
        task = _core.Task(FN, _core.Promise())
        began = time.monotonic_ns()
        assert world.host.place(task, b"x", (bytes(400_000),), (False,))
        assert not world.port.watch()
        assert time.monotonic_ns() - began >= 100_000  # 4 bytes a nanosecond
    finally:
        world.end()


@pytest.mark.parametrize("word", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_worker_does_not_watch_for_ever(word: int) -> None:
    """Whatever another worker has written there."""
    world = World(spin=1)
    try:
        world.arena.region.store_u64(slot_at(world) + COMING, word)
        assert not world.port.watch()
    finally:
        world.end()


# ---- the kill of a chunk that goes on from item to item ------------------------------------------------

ADVANCING = """
#include <stdatomic.h>
#include <stdint.h>
/* RUNNING(i) to RUNNING(i+1), faster than any worker, until the word is no longer RUNNING. */
uint64_t advance(_Atomic uint64_t *word, _Atomic uint32_t *begun) {
    uint64_t seen = atomic_load(word), items = 0;
    while ((seen & 7) == 2) {
        if (atomic_compare_exchange_strong(word, &seen, seen + 8)) { seen += 8; items++; }
        if (items == 100) atomic_store(begun, 1);
        for (volatile int i = 0; i < 30; i++) {}
    }
    return seen;
}
"""


def test_a_kill_catches_a_chunk_between_any_two_items(tmp_path: Path) -> None:
    """By a thread that plays the worker, without the GIL; one look at the word often comes too late."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    (tmp_path / "advance.c").write_text(ADVANCING)
    library = str(tmp_path / "advance.so")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, f"{tmp_path}/advance.c"], check=True)
    advance = ctypes.CDLL(library).advance
    advance.restype, advance.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_void_p)
    world = World()
    child = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(child.pid)
    worker = ThreadPoolExecutor(1)
    for _ in range(300):
        world.host.occupy(world.slot, pidfd)
        task = world.submit()
        entry, _ = world.claim()
        begun = ctypes.c_uint32()
        word = _core.address_of(world.arena.region.view(lease_at(world, entry), 8))
        last = worker.submit(advance, word, ctypes.byref(begun))
        await_word(begun)
        outcome = world.host.cancel(task, True)
        world.arena.region.store_u64(lease_at(world, entry), 4)  # else it goes on for ever
        assert (outcome, last.result() & 7) == (_core.CANCEL_KILLED, 4)
        world.die()
        world.slot = world.host.open_slot(0, 1)
        world.port = world.attend()
        world.host.take_outcomes()
    worker.shutdown()
    child.wait()  # it was killed
    os.close(pidfd)
    world.end()


def await_word(word: ctypes.c_uint32) -> None:
    until(lambda: word.value == 1, "it advances", 10)
