"""Promises 1 to 3: workers die at random instants; nothing is lost, doubled, or blamed on an innocent."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import signal
import threading
from collections import Counter, defaultdict
from contextlib import suppress

import recording
from recording import END, START
from watching import all_ready, send, settled, shut_down_clean, until

from runtime import WorkerDied

PATIENCE = 60.0  # seconds without an outcome after which a task is lost
RETRIES = 1_000_000
WAVE = 1_000  # tasks that are under way together
SPINS = (0.0, 0.0, 0.0, 0.0002, 0.001)  # seconds


class Killer(threading.Thread):
    """SIGKILLs workers at random instants: in a task, between two, asleep, as they answer.

    Only such that have been seen with a task: who dies again and again before it has done anything is an
    initializer that crashes, and is given up by design.
    """

    def __init__(self, rt, draw, pause):
        super().__init__(name="killer")
        self.rt, self.draw, self.pause = rt, draw, pause
        self.stopping = threading.Event()
        self.killed: set[int] = set()
        self.problem: BaseException | None = None

    def run(self):
        seen: set[int] = set()
        try:
            while not self.stopping.wait(self.draw.uniform(0.0, 2 * self.pause)):
                workers = self.rt.workers()
                live = {worker.pid for worker in workers if worker.pid}
                seen = (seen & live) | {w.pid for w in workers if w.pid and w.task is not None}
                if victims := sorted(seen - self.killed):
                    with suppress(ProcessLookupError):
                        pid = self.draw.choice(victims)
                        self.killed.add(pid)  # first: the host may know of its death before we do
                        send(pid, signal.SIGKILL)
        except BaseException as error:
            self.problem = error

    def stop(self):
        self.stopping.set()
        self.join()
        if self.problem is not None:
            raise self.problem


def outcomes_of(futures):
    """Each future's result or WorkerDied; nothing else may come of it, and everything has to."""
    _, missing = concurrent.futures.wait(futures, PATIENCE)
    assert not missing, f"{len(missing)} of {len(futures)} tasks are lost"
    found = []
    for future in futures:
        error = future.exception(0)
        assert error is None or type(error) is WorkerDied, error
        found.append(future.result(0) if error is None else error)
    return found


def one_wave(rt, draw, path, first, killed):
    """Tasks and items of all kinds, until each has its outcome; then these are checked."""
    keys = list(range(first, first + WAVE))
    draw.shuffle(keys)
    cut = [0, 400, 600, 800, WAVE]  # retried, plain, single items, chunks
    retried, plain, single, chunks = (keys[a:b] for a, b in itertools.pairwise(cut))
    spin = {key: draw.choice(SPINS) for key in keys}
    patient = rt.options(retries=RETRIES)
    calls = Counter()
    futures = {}
    mixed = [(patient, key) for key in retried] + [(rt, key) for key in plain]
    draw.shuffle(mixed)
    maps = [
        patient.map(recording.recorded, [path] * len(some), some, [spin[k] for k in some], chunksize=size)
        for some, size in ((single, 1), (chunks, None))
    ]
    for view, key in mixed:
        futures[key] = view.submit(recording.recorded, path, key, spin[key])
        futures[key].add_done_callback(lambda _, key=key: calls.update([key]))
    outcomes = dict(zip(futures, outcomes_of(list(futures.values())), strict=True))
    for some, results in zip((single, chunks), maps, strict=True):
        for key, value in zip(some, results, strict=True):  # strict: one result for each item
            outcomes[key] = value
    assert set(calls.values()) == {1} and len(calls) == len(futures), "completed once each"
    check_wave(recording.entries(path), outcomes, set(plain), set(chunks), killed)


def check_wave(ledger, outcomes, plain, chunks, killed):
    """The outcomes against what really ran."""
    started, ended, order = defaultdict(list), Counter(), defaultdict(list)
    for key, pid, what in ledger:
        if what == START:
            started[key].append(pid)
            order[pid].append(key)
        else:
            assert what == END
            ended[key] += 1
    assert started.keys() <= outcomes.keys(), "nobody asked for it"
    for key, outcome in outcomes.items():
        if isinstance(outcome, WorkerDied):
            assert key in plain, f"{key} had retries left"
            assert outcome.pid in killed and outcome.signal in (signal.SIGKILL, None)
            assert started[key] in ([], [outcome.pid]), "blamed for the death of a process that never had it"
            assert not started[key] or order[outcome.pid][-1] == key, "blamed is not what it ran last"
        else:
            assert outcome == key and ended[key] >= 1, "a result without a run"
        if key in plain:
            assert len(started[key]) <= 1, "run twice, and nobody asked for that"
    # Whatever ran again, ran for a kill: it is the last that the dead worker began, or one of the finished
    # neighbours of a chunk, right before that, whose results had not been committed.
    again = defaultdict(list)
    for key, pids in started.items():
        for pid in pids[:-1]:
            again[pid].append(key)
    neighbours = 0
    for pid, keys in again.items():
        assert pid in killed, f"{keys} ran again, but {pid} was not killed"
        tail = order[pid][-len(keys) :]
        assert sorted(tail) == sorted(keys), f"{pid} began {order[pid][-40:]}; {keys} ran again"
        assert set(tail[:-1]) <= chunks
        neighbours += len(tail) - 1
    executions = sum(map(len, started.values()))
    assert executions <= len(outcomes) + len(again) + neighbours


def test_no_task_is_lost_or_doubled(tally, runtime_factory, tmp_path):
    rt = runtime_factory(2)
    all_ready(rt)
    killer = Killer(rt, tally.random, 0.03)
    killer.start()
    try:
        while tally.more():
            path = tmp_path / f"ledger-{tally.counts['tasks']}"
            one_wave(rt, tally.random, str(path), tally.counts["tasks"], killer.killed)
            path.unlink()
            tally.counts["tasks"] += WAVE
            tally.counts["kills"] = len(killer.killed)
    finally:
        killer.stop()
    tally.counts["kills"] = len(killer.killed)
    gc.collect()
    settled(rt)
    until(lambda: all_ready(rt), "every slot has a worker again")
    shut_down_clean(rt)


POISON = 25  # of a round
INNOCENTS = 475


def blamed_among_submits(rt, kinds, path):
    futures = {
        key: rt.submit(recording.poison, path, key, how) if how else rt.submit(recording.recorded, path, key)
        for key, how in kinds.items()
    }
    return dict(zip(futures, outcomes_of(list(futures.values())), strict=True))


def blamed_among_items(rt, kinds, path):
    results = rt.map(
        recording.poison_or_recorded, [path] * len(kinds), kinds, kinds.values(), return_exceptions=True
    )
    return dict(zip(kinds, results, strict=True))


def test_only_the_started_task_is_blamed(tally, runtime_factory, tmp_path):
    rt = runtime_factory(2)
    draw = tally.random
    while tally.more():
        path = tmp_path / f"ledger-{tally.counts['poison']}"
        keys = range(POISON + INNOCENTS)
        evil = set(draw.sample(keys, POISON))
        kinds = {key: draw.choice(["kill", "exit", "segfault"]) if key in evil else "" for key in keys}
        chunked = draw.random() < 0.3 if tally.is_slice else tally.counts["poison"] >= POISON
        outcomes = (blamed_among_items if chunked else blamed_among_submits)(rt, kinds, str(path))
        started = defaultdict(list)
        for key, pid, what in recording.entries(str(path)):
            if what == START:
                started[key].append(pid)
        for key, outcome in outcomes.items():
            if key in evil:
                assert type(outcome) is WorkerDied, outcome
                assert started[key] == [outcome.pid], "it ran once, in the worker that is named"
                if kinds[key] == "exit":
                    assert (outcome.exitcode, outcome.signal) == (3, None)
                else:
                    assert outcome.signal == (signal.SIGKILL if kinds[key] == "kill" else signal.SIGSEGV)
            else:
                assert outcome == key, f"an innocent was blamed: {outcome!r}"
                assert chunked or len(started[key]) == 1
        path.unlink()
        tally.counts["poison"] += POISON
        tally.counts["innocents"] += INNOCENTS
        all_ready(rt)
    settled(rt)
