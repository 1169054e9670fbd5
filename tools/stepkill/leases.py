"""Worlds of leases: a worker is killed between claim and answer, or the host between lease and sweep.

This process is the host. What is stepped is a fork of it that acts as the worker in slot 0 (WorkerDies), or
as the host itself (HostDies): then this process stands for the worker that the host leaves behind, and for a
next host, which knows nothing but the region. In the end a worker of this process runs what is to be run.
"""

from __future__ import annotations

import contextlib
import ctypes
import marshal
import mmap
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from runtime import _core
from tools.stepkill.engine import Verdict
from tools.stepkill.extents import HOST, PAGE, Words
from tools.stepkill.shipped import method

LEASES = 4
L_FREE, L_LEASED, L_RUNNING, L_DONE, L_KILLED = range(5)
PARKED, PARKED_HERE = 1, 2
PARKED_AT = 2 * PAGE + 64  # arena_t.parked, in the file
WANTED_AT = 2 * PAGE + 128  # arena_t.wanted
SLOTS_AT = 3 * PAGE
FN = SimpleNamespace(id=1, data=b"a function")
AT_INLINE, AT_BLOCK = 1, 2
FRESH = LEASES + 1  # calls that show that a slot can be used again
REPORTS = (None, (1, 2.0, "half of it"), (2, None, ""))
RAISED = contextlib.suppress(RuntimeError, KeyboardInterrupt)  # what `notify` may lead to


def item(nbytes: int = 20) -> tuple[int, bytes, tuple[()], tuple[()]]:
    """An outcome of so many bytes."""
    return (_core.S_VALUE, b"x" * nbytes, (), ())


class LeaseWorld:
    """A host with one worker in a region of few extents, some calls or a chunk leased to it.

    act: the method that is stepped. calls, items: what is leased, calls or the items of one chunk. args,
    result: bytes of each. claimed: leases that the worker has claimed before. full: extents that the host
    takes meanwhile. parked: how the host sleeps. notify: what the worker calls to wake it. grows: the region
    may, as far as the worker knows.
    """

    def __init__(self, act: str, *, calls: int = 1, items: int = 0, args: int = 20, result: int = 20,
                 claimed: int = 0, pages: int = 6, full: int = 0, outbox: int = 4, parked: int = 0,
                 lanes: bool = True, notify: str = "", asleep: bool = False, guarded: bool = True,
                 grows: bool = False, how: str = "") -> None:  # fmt: skip
        self.act, self.name, self.how = getattr(self, act), act, how
        self.args, self.result, self.claims = args, result, claimed
        most = (pages + grows) * PAGE
        self.arena = _core.Arena.create(pages * PAGE, 2, LEASES, outbox, PAGE, lanes, 0, 0, most)
        self.memory = mmap.mmap(self.arena.fd, os.fstat(self.arena.fd).st_size)
        self.words = Words(self.memory)
        self.bell = os.eventfd(0)
        self.host = self.new_host()
        self.notify: Any = {
            "": self.told,
            "plain": lambda: None,
            "raises": self.told_badly,
            "interrupts": ctypes.pythonapi.PyErr_SetInterrupt,
            "refuses": self.refused,
        }[notify]
        self.guarded = guarded
        self.outcomes: dict[Any, list[int]] = defaultdict(list)
        self.tasks: list[Any] = []
        self.port = self.open()
        self.ref = _core.HostBlock.take(self.arena, 2 * PAGE) if "ref" in how else None
        self.block = _core.HostBlock.take(self.arena, full * PAGE) if full else None
        self.items = items
        if items:
            span = _core.Span.pack(0, list(range(items)), 0, False)
            assert span is not None
            self.batch = _core.Batch(FN, None, chunksize=items)
            self.host.add(self.batch, span)
        else:
            self.submit(calls)
        self.memory[PARKED_AT] = parked
        if asleep:
            self.port.park()
        self.entry = -1
        self.cancelled = False
        self.missing = 0  # blocks to which results refer, and that are not there

    # ---- the host, and a worker ----

    def new_host(self) -> _core.Dispatcher:
        return _core.Dispatcher(self.arena, _core.DeadlineKeeper(self.arena, self.bell))

    def open(self) -> _core.Runner:
        """A worker in the next free slot, which takes leases."""
        slot = self.host.open_slot(0, 1)
        if self.guarded:
            self.host.occupy(slot, -1)  # of no process: a signal reaches nobody
        port = _core.Runner(self.arena, slot, self.notify)
        self.host.make_ready(slot)
        return port

    def told(self) -> Any:
        """The worker has something to tell; nobody is called."""
        return object()

    def refused(self) -> Any:
        """The host has seen the wish for room, and there is none to be had."""
        self.memory[WANTED_AT : WANTED_AT + 8] = bytes(8)

    def told_badly(self) -> Any:
        raise RuntimeError("the hint cannot be sent")

    def submit(self, calls: int) -> None:
        for _ in range(calls):
            task = _core.Task(FN, _core.Promise())
            parts = () if self.ref is None else (self.arena.locate(memoryview(self.ref)),)
            task.hold(b"a" * self.args, parts, (False,) * len(parts))
            self.tasks.append(task)
            self.host.submit(task)

    def claim(self) -> int:
        entry: int = method("_lease", "WorkerPort.claim", ctypes.c_int64)(self.port)
        return entry

    def lease_at(self, entry: int) -> int:
        """Where a lease of slot 0 lies in the file."""
        return SLOTS_AT + 832 + 4 * LEASES + 48 * self.arena.outbox + 640 * entry

    def state(self, entry: int) -> int:
        return self.memory[self.lease_at(entry)] & 7

    def collect(self) -> None:
        """What has come out: a list of kinds for each call and item."""
        for kind, task, *rest in self.host.take_outcomes():
            if kind == _core.OUTCOME_FRAME and rest[-1]:
                self.missing += sum([not isinstance(b, _core.HostBlock) for b in rest[-1].values()])
            if task.batch is None:
                self.outcomes[task.number].append(kind)
            elif kind == _core.OUTCOME_FRAME:
                for index, count in task.stretches(rest[0], rest[1]):
                    for k in range(count):
                        self.outcomes[index + k].append(kind)
            else:
                self.outcomes[task.item(rest[0]).first].append(kind)

    def own(self) -> Any:
        """An outcome that lies in a block which the worker has taken."""
        made = memoryview(self.port.empty(self.result))
        return (_core.S_VALUE, b"x" * 20, (self.port.locate(made),), (False,))

    def work(self) -> None:
        """A worker of this process answers all that is leased to it."""
        while (entry := self.claim()) >= 0:
            count = 1
            if self.items:
                parts = _core.read_frame(self.port.frame(entry))
                count = sum([max(1, part[4]) for part in parts])
                del parts
            self.port.finish(entry, [item()] * count, count)
            self.host.drain(self.port.index)
        self.collect()

    # ---- in the process that dies, before it is stepped ----

    def prepare(self) -> None:
        self.arena.adopt_process()
        for _ in range(self.claims):
            self.entry = self.claim()
            self.port.begin_item(self.entry)

    # ---- afterwards ----

    def usable(self) -> int:
        """What cannot be used again, of slot 0 with its leases, ring and outbox, and of the extents."""
        lost = sum([self.state(entry) != L_FREE for entry in range(LEASES)])
        if self.host.waiting or self.host.leased:
            lost += 1
        self.outcomes.clear()
        self.tasks.clear()
        self.items = 0
        self.args = 20
        self.submit(FRESH)
        self.work()
        for task in self.tasks:
            lost += self.outcomes.pop(task.number, None) != [_core.OUTCOME_FRAME]
        lost += len(self.outcomes) + self.host.malformed
        self.tasks.clear()
        self.host.close()
        return lost

    def close(self) -> None:
        self.tasks.clear()
        self.block = self.ref = None
        self.words.close()
        self.memory.close()
        del self.host, self.port
        self.arena.release()
        os.close(self.bell)


class WorkerDies(LeaseWorld):
    """The worker in slot 0 is killed; the host settles its slot."""

    def prepare(self) -> None:
        super().prepare()
        if self.name == "unkeep":
            exporter = self.port.frame(self.entry)
            self.view = memoryview(exporter)
            self.port.end_item(self.entry)
            self.port.finish(self.entry, [item()], 1)
        elif self.name == "answer" and self.how == "seen":
            self.view = memoryview(self.port.frame(self.entry))

    def take_lease(self) -> None:
        self.claim()

    def answer(self) -> None:
        self.port.end_item(self.entry)
        with RAISED:
            self.port.finish(self.entry, [item(self.result)], 1)

    def answer_all(self) -> None:
        with RAISED:
            while (entry := self.claim()) >= 0:
                self.port.finish(entry, [item(self.result)], 1)

    def answer_own(self) -> None:
        """The result lies in a block that was born here; the worker may go on seeing it."""
        outcome = self.own()
        if self.how == "seen":
            self.view = memoryview(outcome[2][0].holder)
        self.port.finish(self.entry, [outcome], 1)

    def waste(self) -> None:
        """A block that is born here is not needed."""
        self.port.empty(self.result)

    def fetch(self) -> None:
        """The arguments come piece by piece."""
        with RAISED:
            self.port.frame(self.entry)

    def commit(self) -> None:
        """The items of a chunk, each by itself."""
        lease = method("_lease", "WorkerPort.lease", ctypes.c_void_p, ctypes.c_uint32)
        advance = method("_lease", "WorkerPort.advance", ctypes.c_int, ctypes.c_void_p)
        for i in range(self.items):
            if i and not advance(self.port, lease(self.port, self.entry)):
                return
            if i + 1 < self.items:
                self.port.commit(self.entry, [item(self.result)], 1)
        self.port.finish(self.entry, [item(self.result)], self.items)

    def report(self) -> None:
        self.port.report(1, 2.0, "half of it")
        self.port.report(2, None, "")

    def unkeep(self) -> None:
        """The last view of an argument goes."""
        self.view.release()

    def meddle(self) -> None:
        """The host takes in what there is and serves a piece; or it cancels the call, or frees a block."""
        if self.how == "cancel":
            self.cancelled = self.host.cancel(self.tasks[0], running=True) != _core.CANCEL_NO
        elif self.how == "drop":
            self.host.drop(self.batch, running=True)
            self.cancelled = True
        elif self.how == "room":
            self.block = None
        else:
            self.host.drain(0)

    def recover(self) -> None:
        self.block = None
        self.notify = self.told
        self.left = [self.state(entry) for entry in range(LEASES)]
        self.host.vacate(0)
        self.host.settle(0, "it was killed")
        self.port = self.open()
        self.work()

    def audit(self) -> Verdict:
        """Each call and item has one outcome: its answer, unless it was running."""
        lost = doubled = 0
        expected = range(self.items) if self.items else [task.number for task in self.tasks]
        for entry, key in enumerate(expected):
            kinds = self.outcomes.pop(key, [])
            if self.cancelled and (entry == 0 or self.items):
                doubled += len(kinds) > 1 or (kinds == [_core.OUTCOME_FRAME] and not self.items)
                continue
            lost += not kinds or _core.OUTCOME_LOST in kinds
            doubled += len(kinds) > 1
            if not self.items and kinds == [_core.OUTCOME_DIED]:
                lost += self.left[entry] != L_RUNNING  # it was not started, or had been answered
        lost += len(self.outcomes)
        lost += sum([task.future.reported not in REPORTS for task in self.tasks])
        lost += self.missing + self.usable()
        blocks = self.words.audit(set())
        return Verdict(lost + blocks.lost, doubled + blocks.doubled)


class HostDies(LeaseWorld):
    """The host is killed; its worker runs what it was leased, then a next host takes the region over."""

    def __init__(self, act: str, *, answered: int = 0, asks: bool = False, **others: Any) -> None:
        """answered: calls whose answers are in the outbox. asks: so is a question, or offer, of a piece."""
        super().__init__(act, **others)
        self.ran: dict[int, int] = defaultdict(int)
        self.views: list[Any] = []  # of the worker: what it sees
        for _ in range(answered):
            entry = self.claim()
            if "seen" in self.how:
                self.views.append(_core.read_frame(self.port.frame(entry), self.port.resolve))
            self.port.finish(entry, [self.outcome()], 1)
            if "unseen" in self.how:
                self.views.clear()
            if self.how == "malformed":  # it lies in a block that there is not
                self.memory[self.lease_at(entry) + 88] = AT_BLOCK
        for _ in range(self.claims):
            entry = self.claim()
            self.port.begin_item(entry)
            if self.items:
                self.port.commit(entry, [item(self.result)], 1)
            with RAISED:  # what `notify` brings about: else the worker would wait
                if asks and self.args > 1000:
                    self.port.frame(entry)
                elif asks:
                    self.port.finish(entry, [item(self.result)], 1)
        if self.how == "wild":  # it has written into words that were none of its leases
            for entry in range(LEASES):
                self.memory[self.lease_at(entry)] = self.memory[self.lease_at(entry)] or 5
        self.notify = self.told

    def outcome(self) -> Any:
        if self.how == "plain":
            return (_core.S_PLAIN, marshal.dumps(7, 2), (), ())
        if not self.how.startswith("own"):
            return item(self.result)
        outcome = self.own()
        if "seen" in self.how:
            self.views.append(memoryview(outcome[2][0].holder))
        return outcome

    def prepare(self) -> None:
        self.arena.adopt_process()

    def lease(self) -> None:
        self.submit(1)

    def lease_chunk(self) -> None:
        span = _core.Span.pack(0, [1, 2], 0, False)
        assert span is not None
        self.host.add(_core.Batch(FN, None, timeout=10**12, retryable=True, chunksize=2), span)

    def take_back(self) -> None:
        self.host.stop_slot(0)

    def cancel(self) -> None:
        self.host.cancel(self.tasks[0])

    def kill(self) -> None:
        self.host.cancel(self.tasks[0], running=True)

    def harvest(self) -> None:
        self.host.drain(0)

    def let_go(self) -> None:
        self.ref = None

    def let_go_and_harvest(self) -> None:
        """The tasks are forgotten as they end."""
        self.ref = None
        self.tasks.clear()
        self.host.drain(0)
        self.host.take_outcomes()

    def settle(self) -> None:
        self.host.vacate(0)
        self.host.settle(0, "it was killed")

    def open_slot(self) -> None:
        self.host.open_slot(0, 2)

    def meddle(self) -> None:
        """The worker is faster."""
        self.claim()

    def recover(self) -> None:
        """The worker runs what it was leased, the next host sweeps the words that are left."""
        self.wrong = 0
        if self.name == "settle":
            self.settle()
            self.collect()
            # What was not started, or not finished, waits for another worker.
            self.wrong += self.host.waiting + len(self.outcomes) != (self.items or len(self.tasks))
        else:
            self.run_leased()
        self.views.clear()
        self.tasks.clear()
        self.block = self.ref = None
        self.host.close()
        self.host = self.new_host()
        for entry in range(LEASES):
            self.memory[self.lease_at(entry)] &= ~7 & 0xFF
        self.words.sweep(self.words.heap, 0)
        self.words.sweep(self.words.heap, HOST)
        self.words.free_dead_hosts()
        self.port = self.open()

    def run_leased(self) -> None:
        before = [entry for entry in range(LEASES) if self.state(entry) == L_LEASED]
        while (entry := self.claim()) >= 0:
            self.ran[entry] += 1
            at = self.lease_at(entry)
            where = int.from_bytes(self.memory[at + 60 : at + 64], "little")
            if where in (AT_INLINE, AT_BLOCK) and self.name != "lease_chunk":
                whole = bytes(self.port.frame(entry)).endswith(b"a" * self.args)
                self.wrong += not whole  # it was published before it was filled
        # Its word is there, but not yet its place in the ring: only the lease that was being made.
        stranded = len(set(before) - set(self.ran))
        self.wrong += max(0, stranded - self.name.startswith("lease"))

    def audit(self) -> Verdict:
        lost = self.wrong
        doubled = sum([count > 1 for count in self.ran.values()])
        if self.name == "settle":
            for kinds in self.outcomes.values():
                doubled += len(kinds) > 1
        lost += self.usable()
        blocks = self.words.audit(set())
        return Verdict(lost + blocks.lost, doubled + blocks.doubled)
