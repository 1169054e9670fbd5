"""What strikes in a storm: one thread, that does something evil to a process or to the runtime now and then.

kill        SIGKILL to a worker that has been seen with a task
newborn     … to one that starts, or has done nothing yet: rarely, as such deaths count as a crash loop
zygote      … to the zygote. A forked one needs an heir that can take over
heir        … to the heir of a forked zygote
descendant  … to a child or grandchild of a worker
leave       SIGTERM or SIGUSR2 to a worker: it finishes its task, and is replaced
stop        SIGSTOP to a worker or to the zygote, SIGCONT a moment later
scale       more workers, fewer, or for a moment none
reload      the code is reloaded, in a thread; what is struck meanwhile may be the reason that it is refused
usurper     SIGKILL during a reload: to a zygote that does not lead, to a successor, to a worker that leaves
trim        nobody is hurt: memory of the region that is free for a moment is given back, which is sought
            every five seconds else
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter, deque
from pathlib import Path

from watching import send

from runtime import ReloadFailed, WorkerStatus

STORM = {
    "kill": 60, "newborn": 1, "zygote": 2, "heir": 1, "descendant": 6, "leave": 6, "stop": 6, "scale": 4,
    "trim": 30, "reload": 4, "usurper": 3,
}  # fmt: skip
KILLS_ALONE = {"kill": 1}
APART = {"zygote": 1.0, "heir": 1.0, "newborn": 2.0, "reload": 1.0}  # seconds between two of a kind, at least
RELOADED = 60.0  # seconds that a reload may take
STOPPED = 0.25  # seconds that a process stands still, at most
LATELY = 4 * STOPPED  # seconds in which a zygote that has stood still has ended what a dead worker left
PAUSED = 0.05  # seconds without a worker, at most


class Weather(threading.Thread):
    """Strikes the processes of one runtime, every `pause` seconds on the average, until told to stop."""

    def __init__(self, rt, method, draw, pause, strikes, workers):
        super().__init__(name="weather")
        self.rt, self.method, self.draw, self.pause, self.workers = rt, method, draw, pause, workers
        self.kinds, self.weights = list(strikes), list(strikes.values())
        self.counts = Counter()
        self.killed = set()  # pids of workers
        self.orphans = set()  # pids of workers whose zygote was killed before or soon after them
        self.log = deque(maxlen=60)
        self.problem = None
        self.holding = threading.Lock()  # who holds it has calm
        self._stopping = threading.Event()
        self._seen = set()  # pids of workers that had a task
        self._met = {}  # pid of a worker -> when it was there last
        self._ended = 0  # outcomes until the last kill
        self._lost = set()  # pids of zygotes and heirs that are killed
        self._last = {}  # when something of a kind was done
        self._later = []  # (when, what is to be done then), of what must not stay as it is
        self._reloads = []  # threads, one for each

    def run(self):
        try:
            while not self._stopping.wait(self.draw.uniform(0.0, 2 * self.pause)):
                self._clear_up(time.monotonic())
                with self.holding, contextlib.suppress(ProcessLookupError):
                    self._strike()
        except BaseException as error:
            self.problem = error
        finally:
            self._clear_up(float("inf"))
            for thread in self._reloads:
                thread.join(RELOADED)

    def _strike(self):
        self._meet()
        (kind,) = self.draw.choices(self.kinds, self.weights)
        now = time.monotonic()
        if now < self._last.get(kind, 0.0) + APART.get(kind, 0.0):
            return
        if what := getattr(self, f"do_{kind}")():
            self._last[kind] = now
            self.counts[kind] += 1
            self.log.append(f"{now:.3f} {kind} {what}")

    def stop(self):
        """Calm again: nobody stands still, and there are as many workers as in the beginning."""
        self._stopping.set()
        self.join()
        if self.problem is not None:
            raise self.problem
        self.rt.scale(self.workers)

    def _clear_up(self, now):
        due = [entry for entry in self._later if entry[0] <= now]
        for entry in due:
            self._later.remove(entry)
            with contextlib.suppress(ProcessLookupError):
                entry[1]()

    # ---- whom ----------------------------------------------------------------------------------------

    def _ready(self):
        infos = self.rt.workers()
        live = {info.pid for info in infos if info.pid}
        self._seen = (self._seen & live) | {info.pid for info in infos if info.pid and info.task is not None}
        return sorted(info.pid for info in infos if info.pid and info.status is WorkerStatus.READY)

    def _zygote(self):
        zygote = self.rt._core._zygote
        return zygote if zygote is not None and zygote.started else None

    def _meet(self):
        """Note whose descendants it may be that a zygote has not ended yet: it may have stood still."""
        now = time.monotonic()
        pids = {worker.pid for worker in list(self.rt._core._slots.values()) if worker.pid}
        self._met = {pid: at for pid, at in self._met.items() if at > now - LATELY} | dict.fromkeys(pids, now)

    def _exhausted(self):
        """Whether a number has failed to start, twice in a row: a few more, and it would be given up."""
        return max(it.restarts.in_a_row for it in list(self.rt._core._numbers.values())) > 1

    # ---- what ----------------------------------------------------------------------------------------

    def do_kill(self):
        """Once for each outcome at most: on a slow machine nothing would ever come to its end."""
        dispatcher = self.rt._core.dispatcher
        ended = dispatcher.done + dispatcher.failed + dispatcher.vanished
        if ended == self._ended:
            return None
        self._ended = ended
        self._ready()
        if victims := sorted(self._seen - self.killed):
            return self._kill(self.draw.choice(victims))

    def do_newborn(self):
        if self._exhausted():
            return None
        self._ready()
        pids = {info.pid for info in self.rt.workers() if info.pid}
        if victims := sorted(pids - self._seen - self.killed):
            return self._kill(self.draw.choice(victims))

    def _kill(self, pid):
        self.killed.add(pid)  # first: the host may know of its death before we do
        send(pid, signal.SIGKILL)
        return pid

    def do_zygote(self):
        zygote, heir = self._zygote(), self.rt._core._heir
        if zygote is None or self._exhausted():
            return None
        if self.method == "fork" and (heir is None or heir.pid in self._lost):
            return None
        pid = self._lose(zygote.pid)
        self._meet()
        self.orphans |= self._met.keys()
        return pid

    def do_heir(self):
        """The next one must have come before the zygote may be killed, and this one not be needed already."""
        zygote, heir = self._zygote(), self.rt._core._heir
        if zygote is None or zygote.pid in self._lost or not (heir and heir.pid) or heir.pid in self._lost:
            return None
        return self._lose(heir.pid)

    def _lose(self, pid):
        self._lost.add(pid)
        send(pid, signal.SIGKILL)
        return pid

    def do_descendant(self):
        workers = self._ready()
        found = [pid for worker in workers for pid in children_of(worker)]
        found += [pid for child in found for pid in children_of(child)]
        if found:
            pid = self.draw.choice(found)
            send(pid, signal.SIGKILL)
            return pid

    def do_reload(self):
        """Now and then another one is asked for before the last one has ended."""
        if self.method == "fork":
            return None
        self._reloads = [thread for thread in self._reloads if thread.is_alive()]
        if len(self._reloads) > (self.draw.random() < 0.1):
            return None
        thread = threading.Thread(target=self._reload, name="reload")
        thread.start()
        self._reloads.append(thread)
        return f"beside {len(self._reloads) - 1}"

    def _reload(self):
        """Nothing is wrong with the code: only who is killed again and again is a reason to refuse it."""
        try:
            self.rt.reload(timeout=RELOADED)
            self.counts["reloads done"] += 1
        except ReloadFailed as error:
            self.log.append(f"{time.monotonic():.3f} {error}")
            self.counts["reloads refused"] += 1
            if "attempts)" not in str(error):
                self.problem = error
        except BaseException as error:
            self.problem = error

    def _changing(self):
        """(workers, zygotes) that start or leave on account of a reload."""
        core = self.rt._core
        reload = core._reload
        workers = (reload.successor, reload.leaving) if reload is not None else ()
        return {it.pid for it in workers if it is not None and it.pid}, {it.pid for it in list(core._others)}

    def do_usurper(self):
        workers, zygotes = self._changing()
        victims = sorted((workers | zygotes) - self.killed - self._lost)
        if not victims or self._exhausted():
            return None
        pid = self.draw.choice(victims)
        if pid in workers:
            return self._kill(pid)
        self._lose(pid)
        self._meet()
        self.orphans |= self._met.keys()
        return pid

    def do_leave(self):
        if victims := [*self._ready(), *sorted(self._changing()[0])]:
            pid = self.draw.choice(victims)
            send(pid, self.draw.choice([signal.SIGTERM, signal.SIGUSR2]))
            return pid

    def do_stop(self):
        """A worker, or a zygote. It goes on in a moment, whatever comes."""
        zygote = self._zygote()
        if not (victims := self._ready()):
            return None
        victims += sorted(set.union(*self._changing()))
        pid = self.draw.choice([*victims, zygote.pid] if zygote is not None else victims)
        until = time.monotonic() + self.draw.uniform(0.0, STOPPED)
        self._later.append((until, lambda: send(pid, signal.SIGCONT)))
        send(pid, signal.SIGSTOP)
        return pid

    def do_scale(self):
        n = self.draw.choice([0, 1, 2, self.workers, self.workers, self.workers + 2])
        self.rt.scale(n)
        if n == 0:
            until = time.monotonic() + self.draw.uniform(0.0, PAUSED)
            self._later.append((until, lambda: self.rt.scale(self.workers)))
        return f"to {n}"

    def do_trim(self):
        """It looks twice: what was not used in between goes."""
        self.counts["looks while arguments were kept"] += self.rt.stats().pinned > 0
        arena = self.rt._core.arena
        if given_back := arena.trim(0) + arena.trim(0):
            return f"{given_back} bytes"


def children_of(pid):
    with contextlib.suppress(OSError):
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
