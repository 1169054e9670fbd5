"""The accounts of a storm: every order against the ledger, and every thing that a runtime takes.

A death explains that something ran twice: of what the dead process had begun it is the last; or, in a chunk
of a map, one of the finished neighbours right before that, whose results had not been committed. The dead are
those that the weather has killed, and those whose own task was the reason: it dies, hangs, or was cancelled.

With several threads in a worker (`threads`) its tasks share that: one that dies, hangs or was cancelled
explains the death of whatever ran beside it, and that may run again without a new attempt.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
import signal
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

from recording import END, START
from watching import FAMILY, family, send, until

from runtime import TaskCancelled, TaskTimeout, WorkerDied

from . import tasks
from .orders import DROPPED, GOOD

PAGE = 4096
CANCELLED = (concurrent.futures.CancelledError, asyncio.CancelledError)


class Unbalanced(AssertionError):
    """An account that is not balanced, and the keys that it is about."""

    def __init__(self, message, *keys):
        super().__init__(message)
        self.keys = keys


class Ledger:
    """What the tasks of a wave have noted."""

    def __init__(self, entries):
        self.entries = entries
        self.starts = defaultdict(list)  # key -> [(pid, attempt)]
        self.begun = defaultdict(list)  # pid -> the keys that it has begun, in order
        self.counts = Counter()  # (what, key) -> how often
        self.descendants = {}  # pid of a child or grandchild -> pid of its worker
        for key, pid, what in entries:
            what, attempt = what & 0xFF, what >> 8
            if what == tasks.CHILD:
                self.descendants[pid] = self.starts[key][-1][0]
            self.counts[what, key] += 1
            if what == START:
                self.starts[key].append((pid, attempt))
                self.begun[pid].append(key)

    def told(self, keys):
        """All that is noted of some keys, and the last that their processes have begun."""
        pids = {pid for key, pid, _ in self.entries if key in keys}
        lines = [str((key, pid, what & 0xFF, what >> 8)) for key, pid, what in self.entries if key in keys]
        lines += [f"{pid} began {self.begun[pid][-30:]}" for pid in sorted(pids) if pid in self.begun]
        return "\n".join(["(key, pid, what, attempt), in the order of the file", *lines])


# ---- outcomes --------------------------------------------------------------------------------------------


def check_orders(orders, ledger, killed, threads=1):
    """Each has exactly one outcome, one that it may have, and ran as often as it may. Counts by kind."""
    known = {order.key for order in orders}
    if strange := ledger.starts.keys() - known:
        raise Unbalanced("nobody asked for these", *strange)
    if threads > 1:
        killed = Explained(killed, [order for order in orders if order.fatal or order.timed], ledger)
    kinds = Counter()
    for order in orders:
        kinds[check_outcome(order, ledger, killed)] += 1
    by_key = {order.key: order for order in orders}
    if threads > 1:
        check_runs_beside(by_key, ledger, killed)
    else:
        check_runs(by_key, ledger, killed)
    return kinds


class Explained:
    """Processes whose death is explained, where tasks run side by side: also by what ran beside others.

    One that was ended between its claim and its first record has noted no process: each explains one more.
    """

    def __init__(self, killed, guilty, ledger):
        self.known = {*killed, *(pid for order in guilty for pid, _ in ledger.starts.get(order.key, ()))}
        unnoted = [order for order in guilty if len(ledger.starts.get(order.key, ())) < order.runs]
        self.more = len(unnoted)

    def __contains__(self, pid):
        if pid not in self.known and self.more:
            self.more -= 1
            self.known.add(pid)
        return pid in self.known


def check_outcome(order, ledger, killed):
    """One outcome, of a kind that is allowed. What kind it is."""
    outcome, starts = order.outcome, ledger.starts.get(order.key, [])

    def hold(fact, words):
        if not fact:
            raise Unbalanced(f"{words}: {order}", order.key)

    hold(outcome is not None, "no outcome")
    hold(order.calls == order.watched, "completed more or less often than once")
    if order.said:
        hold(isinstance(outcome, CANCELLED), "it was said to be cancelled, and was not")
    if outcome is GOOD:
        hold(ledger.counts[END, order.key], "a result without a run")
        return "results"
    if outcome is DROPPED:
        return "dropped"
    hold(isinstance(outcome, BaseException), "not what it had to be")
    if isinstance(outcome, CANCELLED):
        hold(order.asked, "nobody has cancelled it")
        # Cancelled while it ran (so it is `fatal`) it may just have ended, by itself or with its process.
        ran = starts and not order.fatal and order.runs == 1
        hold(type(outcome) is TaskCancelled or not order.said or not ran, "it ran all the same")
        return "cancelled"
    if isinstance(outcome, WorkerDied):
        check_death(order, starts, killed, hold)
        return "died"
    if isinstance(outcome, TaskTimeout):
        hold(order.timed, "it had all the time")
        return "timeouts"
    hold(order.errors and isinstance(outcome, order.errors), "not an error that it may have")
    hold(order.key in outcome.args or not isinstance(outcome, tasks.Refused | tasks.Abandoned), "of another")
    return "errors"


def check_death(order, starts, killed, hold):
    """It is blamed for the death of the process that ran it last, after all its attempts."""
    death = order.outcome
    hold(death.attempts == order.runs, "it had attempts left")
    hold(death.pid in killed or order.fatal, "blamed for the death of a process that nobody has killed")
    if not order.chunk and len(starts) == order.runs:
        hold(starts[-1][0] == death.pid, "blamed for the death of a process that never had it")


# ---- runs ------------------------------------------------------------------------------------------------


def check_runs(orders, ledger, killed):
    """Whatever ran more than once, ran for a death, or because it had raised."""
    again = defaultdict(list)
    for key, starts in ledger.starts.items():
        order = orders[key]
        if not order.chunk:
            attempts = [attempt for _, attempt in starts]
            if order.kind != "item" and (attempts != sorted(set(attempts)) or attempts[-1] > order.runs):
                raise Unbalanced(f"attempts {attempts}, of {order.runs}: {order}", key)
            if len(starts) > order.runs:
                raise Unbalanced(f"ran {len(starts)} times, of {order.runs}: {order}", key)
        for pid, _ in starts[:-1]:
            if not order.again:
                again[pid].append(key)
    for pid, keys in again.items():
        begun = ledger.begun[pid]
        last = orders[begun[-1]]
        if not (pid in killed or last.fatal):
            raise Unbalanced(f"{keys} ran again, but nobody has killed {pid}", *keys)
        # They are the last that it began. One in between that did not run again has had its outcome
        # otherwise: blamed for this death, or dropped or lost with another worker before it began again.
        tail = begun[min(map(begun.index, keys)) :]
        missing = [orders[key] for key in tail if key not in keys]
        if len(tail) != len(keys) + len(missing) or any(it.outcome is GOOD or not it.chunk for it in missing):
            raise Unbalanced(f"{keys} ran again, but {pid} ended in {tail}", *keys)
        if not all(orders[key].chunk for key in keys if key != last.key):
            raise Unbalanced(f"{keys} ran again, and are no neighbours", *keys)


def check_runs_beside(orders, ledger, killed):
    """The same where tasks run beside others: each further run is a further attempt, or for a death."""
    for key, starts in ledger.starts.items():
        order = orders[key]
        attempts = [attempt for _, attempt in starts]
        if not order.chunk and (attempts != sorted(attempts) or attempts[-1] > order.runs):
            raise Unbalanced(f"attempts {attempts}, of {order.runs}: {order}", key)
        for pid, _ in starts[:-1]:
            if not (order.again or order.fatal or pid in killed):
                raise Unbalanced(f"it ran again, but nobody has killed {pid}: {order}", key)


def check_share(begun, limit):
    """No process has begun more than its share of tasks."""
    if limit is not None:
        for pid, count in begun.items():
            if count > limit:
                raise Unbalanced(f"worker {pid} began {count} tasks, of {limit}")


class Words:
    """What tasks have printed and logged. When a runtime has ended all of it has come, and is compared."""

    def __init__(self):
        self.came = Counter()  # (what, key, number of the line)
        self.noted = Counter()  # (what, key): so many are out
        self.runs = {}  # key -> how often it has begun
        self.torn = []  # what is no line of ours

    def add(self, ledger):
        for (what, key), count in ledger.counts.items():
            if what in (tasks.WROTE, tasks.LOGGED):
                self.noted[what, key] += count
                self.runs[key] = len(ledger.starts[key])

    def come(self, what, text):
        """A line or a message that is here now."""
        if found := re.fullmatch(r"storm (\d+) (\d+)", text):
            self.came[what, int(found[1]), int(found[2])] += 1
        else:
            self.torn.append(text)

    def forget(self):
        """What came and was noted until now, where it is not compared."""
        for kept in (self.came, self.noted, self.runs):
            kept.clear()

    def check(self):
        """Whole, as often as they were written, and no more often than somebody may have written them."""
        if self.torn:
            raise Unbalanced(f"{len(self.torn)} lines are not whole: {self.torn[:3]!r:.300}")
        found = Counter()
        for (what, key, n), count in self.came.items():
            found[what, key] += count
            # One that was killed right after it had written has not noted it.
            if key in self.runs and count > self.runs[key]:
                raise Unbalanced(f"line {n} of {key} came {count} times, of {self.runs[key]} runs", key)
        for (what, key), count in self.noted.items():
            if found[what, key] < count:
                raise Unbalanced(f"{count} lines of {key} were written, and {found[what, key]} came", key)


# ---- what a runtime takes --------------------------------------------------------------------------------


def check_calm(rt):
    """Everything has ended. What is not free in the region is what the host still holds: no block is lost."""
    core = rt._core
    until(
        lambda: core.dispatcher.idle and not core.dispatcher.counts()[1],
        lambda: f"all has ended: {rt.stats()}",
    )
    stats = rt.stats()
    assert stats.done + stats.failed + stats.cancelled == core.dispatcher.accepted, stats
    assert (stats.queued, stats.leased, stats.running, stats.pinned) == (0, 0, 0, 0), stats
    # Pickles of functions stay in the region while there is room.
    until(
        lambda: stats_of_blocks(rt)[0] == stats_of_blocks(rt)[1],
        lambda: f"blocks, and those of the host's: {stats_of_blocks(rt)}, {core.arena.owners()}",
    )
    assert set(core.arena.owners()) <= {"host"}, core.arena.owners()
    # What was given back is given back, what is reserved is there; the ends of tables take a page each.
    until(
        lambda: abs(memory_of(core.arena) - core.arena.reserved_bytes) <= 4 * PAGE,
        lambda: f"memory of the region: {memory_of(core.arena)} of {core.arena.reserved_bytes} reserved",
    )


def memory_of(arena):
    """Bytes that its file takes."""
    return os.fstat(arena.fd).st_blocks * 512


def stats_of_blocks(rt):
    """(bytes that are not free, bytes that objects of the host hold)."""
    return rt._core.arena.used_bytes, rt._core.arena.held


def check_end(rt):
    """After its shutdown nothing of it is there: no lease, no block."""
    kept, inflight, _ = rt._core.dispatcher.counts()
    assert (kept, inflight) == (0, 0), (kept, inflight)
    assert rt._core.arena.owners() == {}, rt._core.arena.owners()


def check_descendants(descendants, orphans):
    """No child of a task outlives its worker; but when the zygote was killed before, nobody ends it.

    Those end here. How many there were.
    """
    mark = os.environ[FAMILY]
    ended = 0
    until(
        lambda: not (family(mark) & descendants.keys()) - excused(descendants, orphans),
        lambda: family(mark),
        5,
    )
    for pid in family(mark) & descendants.keys():
        with suppress(ProcessLookupError):
            send(pid, signal.SIGKILL)
            ended += 1
    return ended


def excused(descendants, orphans):
    return {pid for pid, worker in descendants.items() if worker in orphans}


def taken():
    """What this process has: descriptors by kind, threads, children; and files of a runtime."""
    kinds = Counter()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            kinds[re.sub(r":\[\d+\]$|/\d+/fd$", "", os.readlink(path))] += 1
    children = sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    files = {name for name in os.listdir(folder) if name.startswith("runtime")} if folder else set()
    return {
        "descriptors": kinds,
        "threads": len(os.listdir("/proc/self/task")),
        "children": children,
        "files": files,
    }
