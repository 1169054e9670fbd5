"""A runtime in one thread whose worker writes what it likes: a program of writes and of the host's own steps.

As in test_model.py there are no processes. An input is a list of steps of 16 bytes: {what u8, where u8, which
u16, how u32, value u64}. Some are the worker's, who may write anywhere in its slot, and into the words of
extents; the others are what the host does all day. Whatever came of them, the end is the same: the worker is
dead, its slot is swept, the runtime closes. By then no step may have raised; nothing may be out; no future
may be without an outcome, and no failure without words.
"""

from __future__ import annotations

import gc
import os
import struct
from types import SimpleNamespace
from typing import Any

from runtime import Future, _core, serializer
from runtime.collector import Collector
from runtime.outcomes import Death

STEP = struct.Struct("<BBHIQ")
HEAD = struct.Struct("<QIIIIQQQQQQ")  # arena_t, in the first page of the region
LEASES, OUTBOX, EXTENTS = 8, 16, 64
SLOT, RECORD, LEASE, EXTENT = 832, 48, 640, 4096
STEPS = 256  # of a program, at most
NAMED = {  # offsets of words in slot_t that are the worker's, or that it may have no business with
    "ring_tail": 64, "ring_head": 128, "outbox_tail": 192, "outbox_head": 256, "phase": 320,
    "running": 324, "tasks_done": 328, "failure_bytes": 336, "rescued": 344, "busy": 352, "turn": 384,
    "parked": 448, "state": 0, "control": 4, "incarnation": 8,
}  # fmt: skip


def work(value: object) -> object:
    return value


class Sink:
    """Who gets the items of a map."""

    retries, retry_on = 1, (ValueError,)

    def __init__(self) -> None:
        self.items: dict[int, object] = {}

    def deliver(self, index: int, values: list[Any]) -> None:
        for at, value in enumerate(values, index):
            assert at not in self.items, "an item has two outcomes"
            self.items[at] = value

    def fail(self, span: Any, error: BaseException) -> None:
        for at in range(span.first, span.first + span.count):
            assert at not in self.items, "an item has two outcomes"
            self.items[at] = error


class Garbage:
    """One program, run."""

    def __init__(self) -> None:
        self.arena = _core.Arena.create(EXTENTS * EXTENT, 2, LEASES, OUTBOX, EXTENT)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.keeper = _core.DeadlineKeeper(self.arena, self.bell)
        self.dispatcher = _core.Dispatcher(self.arena, self.keeper)
        link: Any = SimpleNamespace(send=lambda *_: True, wake=lambda: None)
        self.collector = Collector(self.dispatcher, link, SimpleNamespace(stopping=False))  # type: ignore
        self.table = serializer.FunctionTable()
        self.region = self.arena.region
        head = HEAD.unpack(self.region.read_at(0, HEAD.size))
        self.slots_at, self.stride, self.words_at, self.extents_at = head[6:10]
        self.tasks: list[Any] = []
        self.futures: list[Future[Any]] = []
        self.sinks: list[tuple[Sink, int]] = []
        self.slot = -1
        self.born()

    def born(self) -> None:
        self.slot = self.dispatcher.open_slot(0, 1)
        assert self.slot >= 0, "no slot is free, though all were swept"
        self.base = self.slots_at + self.stride * self.slot
        self.records = self.base + SLOT + 4 * LEASES
        self.leases = self.records + RECORD * OUTBOX
        self.dispatcher.make_ready(self.slot)

    # ---- the host's steps ----

    def submit(self, value: int) -> None:
        future: Future[Any] = Future()
        argument = bytes(value % 9000) if value % 3 else value
        ref, payload = serializer.pack_call(self.table, work, (argument,), {})
        task = _core.Task(ref, future, value % 5, 0, value % 2, False)
        task.hold(payload.data, payload.buffers, payload.readonly)
        future._task = task
        self.tasks.append(task)
        self.futures.append(future)
        assert self.dispatcher.submit(task)

    def map(self, value: int) -> None:
        sink, count = Sink(), 1 + value % 40
        ref, _ = serializer.pack_call(self.table, work, (1,), {})
        batch = _core.Batch(ref, sink, value % 3, 0, bool(value & 4), False)
        span = _core.Span.pack(0, list(range(count)), 0, False)
        assert span is not None
        self.sinks.append((sink, span.count))
        self.dispatcher.add(batch, span)

    def look(self, value: int) -> None:
        """What users and the supervisor ask."""
        dispatcher, slot = self.dispatcher, self.slot
        dispatcher.look(slot)
        dispatcher.phase(slot)
        dispatcher.failure(slot)
        dispatcher.busy_ns(slot)
        dispatcher.worked(slot)
        _ = (dispatcher.rescues, dispatcher.untold, dispatcher.unread(), self.arena.used_bytes)
        for task in self.tasks[-4:]:
            dispatcher.progress(task)
            dispatcher.running(task)

    def cancel(self, value: int) -> None:
        if self.tasks:
            at = value % len(self.tasks)
            if self.dispatcher.cancel(self.tasks[at], bool(value & 256)) == _core.CANCEL_DONE:
                self.futures[at].cancel()

    def complete(self, value: int) -> None:
        self.dispatcher.drain(self.slot, bool(value & 1))
        self.collector.complete()

    def die(self, value: int) -> None:
        """The process is gone; another one moves in, or first and then the sweep."""
        slot = self.slot
        if value & 1:
            self.dispatcher.stop_slot(slot)
        self.dispatcher.vacate(slot)
        if value & 2:
            self.born()
        self.dispatcher.settle(slot, Death(None, 0, None, 9, "garbage", None))
        if not value & 2:
            self.born()
        self.collector.complete()

    # ---- the worker's steps ----

    def store(self, at: int, value: int, width: int = 8) -> None:
        if at >= 0 and at + width <= self.region.size:
            self.region.write_at(at, (value % 2 ** (8 * width)).to_bytes(width, "little"))

    def in_slot(self, which: int, how: int, value: int) -> None:
        names = list(NAMED)
        self.store(self.base + NAMED[names[which % len(names)]], value, 8 if how & 1 else 4)

    def in_lease(self, which: int, how: int, value: int) -> None:
        self.store(self.leases + which % LEASES * LEASE + how % LEASE // 4 * 4, value)

    def word(self, which: int, how: int, value: int) -> None:
        """A lease word, with the tag that it has."""
        at = self.leases + which % LEASES * LEASE
        now = int.from_bytes(self.region.read_at(at, 8), "little")
        self.store(at, now >> 24 << 24 | how % 8 | (value & 0x1FFFFF) << 3)

    def result(self, which: int, how: int, value: int) -> None:
        """A result that could be one."""
        at = self.leases + which % LEASES * LEASE
        frame = _core.Frame([(how % 3, serializer.dumps(value).data, (), ())]).tobytes()
        self.region.write_at(at + LEASE - 320, frame)
        self.store(at + 88, 1 + how // 3 % 3, 4)
        self.store(at + 112, len(frame) if how & 64 else value)

    def extent(self, which: int, how: int, value: int) -> None:
        """The word of an extent: any, or a state of ours with the tag that it has."""
        at = self.words_at + 8 * (which % EXTENTS)
        now = int.from_bytes(self.region.read_at(at, 8), "little")
        self.store(at, value if how & 8 else now >> 31 << 31 | self.slot << 3 | how % 8)

    def record(self, which: int, how: int, value: int) -> None:
        """A record, of a lease that may be out; with a block that may be the slot's."""
        tail = int.from_bytes(self.region.read_at(self.base + NAMED["outbox_tail"], 8), "little")
        entry = which % (LEASES + 2)
        word = int.from_bytes(self.region.read_at(self.leases + entry % LEASES * LEASE, 8), "little")
        extent = how >> 8 & 63
        tag = int.from_bytes(self.region.read_at(self.words_at + 8 * extent, 8), "little") >> 31
        body = self.extents_at + EXTENT * extent if how & 32 else value
        fields = (how % 8, entry, word if how & 16 else value, body, tag, value % 20_000, value >> 32)
        self.region.write_at(self.records + RECORD * (tail % OUTBOX), struct.pack("<IIQQQQQ", *fields))
        self.store(self.base + NAMED["outbox_tail"], tail + 1)

    def block(self, which: int, how: int, value: int) -> None:
        """A frame in the extents, whether or not they are the worker's."""
        data = serializer.dumps(list(range(value % 40))).data
        frame = bytearray(_core.Frame([(how % 7, data, (), (), 0, value % 41)]).tobytes())
        if how & 8:
            frame[how >> 8 & 31] = value >> 32 & 255
        self.region.write_at(self.extents_at + EXTENT * (which % EXTENTS), bytes(frame))

    def reference(self, which: int, how: int, value: int) -> None:
        """A result that refers to a part of a block: of any, or of a private one of its own."""
        extent, at = how >> 8 & 63, self.leases + which % LEASES * LEASE
        word = self.words_at + 8 * extent
        tag = int.from_bytes(self.region.read_at(word, 8), "little") >> 31
        if how & 1:
            self.store(word, (2 + (how >> 1 & 1)) | self.slot << 3 | tag << 31)
        data = serializer.dumps(value).data
        body = self.extents_at + EXTENT * extent if how & 4 else value
        part = struct.pack("<QIIQQQQ", value >> 32 & 0x3FFF, 2 | how >> 3 & 13, 0, body, EXTENT,
                           tag if how & 128 else value, value & 0x1FFF)  # fmt: skip
        frame = struct.pack("<IIQIIII", 1, 1, len(data), 1, 0, 0, 0) + part + data
        self.region.write_at(at + LEASE - 320, frame)
        self.store(at + 88, 1, 4)
        self.store(at + 112, len(frame))

    def keep(self, which: int, how: int, value: int) -> None:
        """A record that a block is seen, or no longer: of any that there may be."""
        extent = how >> 8 & 63
        tag = int.from_bytes(self.region.read_at(self.words_at + 8 * extent, 8), "little") >> 31
        tail = int.from_bytes(self.region.read_at(self.base + NAMED["outbox_tail"], 8), "little")
        body = self.extents_at + EXTENT * extent + (value if how & 2 else 0)
        fields = (3 if how & 1 else 6, which, 0, body % 2**64, tag if not how & 4 else value, 0, 0)
        self.region.write_at(self.records + RECORD * (tail % OUTBOX), struct.pack("<IIQQQQQ", *fields))
        self.store(self.base + NAMED["outbox_tail"], tail + 1)

    def share(self, value: int) -> None:
        """Arguments that lie in a block of the host's, which one more call may need, and then nobody."""
        if self.arena.largest_free_bytes < 4 * EXTENT:
            return
        block = self.arena.take(1 + value % (3 * EXTENT))
        block.share()
        part = self.arena.locate(memoryview(block))
        ref, payload = serializer.pack_call(self.table, work, (value,), {})
        future: Future[Any] = Future()
        task = _core.Task(ref, future, 0, 0, value % 2, False)
        task.hold(payload.data, (part,), (bool(value & 4),))
        future._task = task
        self.tasks.append(task)
        self.futures.append(future)
        assert self.dispatcher.submit(task)

    def step(self, what: int, which: int, how: int, value: int) -> None:
        host = (self.submit, self.map, self.look, self.cancel, self.complete, self.die)
        worker = (self.in_slot, self.in_lease, self.word, self.result, self.extent, self.record, self.block)
        what %= 24
        if what < 6:
            host[what](value)
        elif what < 8:
            self.dispatcher.rescan()
        elif what == 8:
            self.dispatcher.killed(self.slot)
        elif what < 20:
            worker[what % 7](which, how, value)
        elif what == 20:
            self.share(value)
        else:
            (self.reference, self.keep, self.keep)[what - 21](which, how, value)

    def end(self) -> None:
        """The worker dies, the runtime closes: what is promised of both."""
        dispatcher = self.dispatcher
        self.dispatcher.vacate(self.slot)
        self.dispatcher.settle(self.slot, Death(None, 0, None, 9, "garbage", None))
        self.collector.complete()
        kept, inflight, _ = dispatcher.counts()
        assert (kept, inflight, dispatcher.leased) == (0, 0, 0), "something is out, and nobody has it"
        dispatcher.abandon(False)
        self.collector.outcomes.broken = None
        self.collector.complete()
        assert dispatcher.waiting == 0 and dispatcher.idle, "the counts do not add up"
        for future in self.futures:
            assert future.done(), "a future has no outcome"
            if not future.cancelled() and (error := future.exception()) is not None:
                assert str(error), f"{type(error)} without words"
        future = error = None
        for sink, count in self.sinks:
            assert len(sink.items) == count, "an item has no outcome"
        self.futures.clear()
        self.tasks.clear()
        self.sinks.clear()
        dispatcher.close()
        if self.arena.held:
            gc.collect()
        assert self.arena.held == 0, f"{self.arena.held} bytes are the host's, and nobody names them"

    def close(self) -> None:
        self.dispatcher.close()
        self.arena.release()
        os.close(self.bell)


def run(program: bytes) -> None:
    garbage = Garbage()
    try:
        for at in range(0, min(len(program), STEPS * STEP.size) - STEP.size + 1, STEP.size):
            what, _, which, how, value = STEP.unpack_from(program, at)
            garbage.step(what, which, how, value)
        garbage.end()
    finally:
        garbage.close()


def steps(*given: tuple[int, int, int, int]) -> bytes:
    return b"".join(STEP.pack(what, 0, which, how, value) for what, which, how, value in given)


def programs() -> list[bytes]:
    """Such that go well, as a beginning."""
    claim, done, told = (16, 0, 2, 0), (16, 0, 3, 1), (19, 0, 16 + 1, 1)
    answer = [claim, (17, 0, 64, 5), done, told, (4, 0, 0, 0)]
    in_block = [claim, (13, 5, 3, 30), (18, 5, 3, 0), (19, 0, (5 << 8) + 32 + 16 + 2, 200 + (30 << 32))]
    private = (21, 0, (7 << 8) + 128 + 4 + 3, 8 << 32)
    own = [claim, private, (22, 0, 7 << 8, 0), done, told, (4, 0, 0, 0)]
    seen, unseen = (22, 0, 1 << 8, 0), (22, 0, (1 << 8) + 1, 0)
    return [
        steps((0, 0, 0, 3), (2, 0, 0, 0), *answer),
        steps(*[(0, 0, 0, 9 * i) for i in range(6)], *answer, (5, 0, 0, 2), *answer, (3, 0, 0, 257)),
        steps((1, 0, 0, 30), *in_block, (4, 0, 0, 1), (6, 0, 0, 0), done, told, (4, 0, 0, 0), (5, 0, 0, 1)),
        steps((0, 0, 0, 8000), (0, 0, 0, 4000), claim, (16, 0, 4, 0), (8, 0, 0, 0), *in_block, *answer),
        steps((20, 0, 0, 5), claim, seen, *answer[1:], unseen, (4, 0, 0, 0)),
        steps((0, 0, 0, 3), *own, (20, 0, 0, 7000), (0, 0, 0, 9), *own, (5, 0, 0, 1)),
    ]
