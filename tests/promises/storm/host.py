"""A process that is stormed: `main()` with a JSON object as its argument. test_storm.py starts it.

One runtime after another, with settings that are drawn, each in a storm of its own. At the end of each wave
its orders are checked against the ledger; in the calm after a runtime's last wave, and when it has been shut
down, everything that it took must be back. What was counted is said in the end, as a JSON object.

    {"method": "exec" | "fork", "seed": text, "folder": path, "kills": n, "seconds": s}  until one is reached
    {"steady": true, ...}   one runtime for all of it and nothing but kills, a second apart; with samples
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import faulthandler
import functools
import gc
import itertools
import json
import logging
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque
from pathlib import Path

import recording
from watching import all_ready, until

import runtime

from . import accounts, arrays, kernels, orders, tasks
from .orders import PATIENCE, Wave
from .weather import KILLS_ALONE, STORM, Weather

ROUND = 8.0  # seconds of storm for a runtime
WAVE = 3.0  # seconds for which a wave rises
STEADY_WAVE = 0.4  # … where samples are taken after each
ZYGOTE = 24 << 20  # bytes that a fresh interpreter has, with what it imports
ROOM = 8 << 20  # bytes that a worker may grow
CLIENTS = (*orders.CLIENTS, kernels.grinding)
KILLS = ("kill", "newborn", "zygote", "heir", "usurper")
TIGHT = {"region_size": "256KiB", "region_max": "2MiB"}  # every other runtime's: it grows, and is full


TOLD = {tasks.BY_VALUE: "arguments by value", tasks.NO_ROOM: "arrays without room"}


class Storm:
    """All storms of one process."""

    def __init__(self, method, seed, folder, kills=None, seconds=None, steady=False, pause=None):
        self.method, self.seed, self.folder, self.steady = method, seed, Path(folder), steady
        self.draw = random.Random(f"{seed} {method}")
        self.wanted = kills or float("inf")
        self.until = time.monotonic() + (seconds or float("inf"))
        self.pause = pause or (1.0 if steady else 0.015)
        self.keys = itertools.count(1)
        self.counts = Counter()
        self.samples = {}  # what -> [(seconds, value)]
        self.settings = {}
        self.rt = self.weather = self.ledger = self.slow = None
        self.logs = deque(maxlen=50)  # what the runtime has warned of
        self.words = accounts.Words()
        self.out = self.folder / "stdout"

    def more(self):
        return self.killed < self.wanted and time.monotonic() < self.until

    @property
    def killed(self):
        return self.counts["kills"] + (sum(self.weather.counts[k] for k in KILLS) if self.weather else 0)

    def run(self):
        """Until there were enough kills, or it has lasted long enough."""
        prime()
        self.slow = kernels.compiled(self.folder)
        before = accounts.taken()
        while self.more():
            self.one_runtime()
            until(
                lambda: accounts.taken() == before, lambda: f"before: {before}\nnow: {accounts.taken()}", 10
            )

    def one_runtime(self):
        draw = self.draw
        self.settings = (
            {"region_size": "4MiB", "preload": ["numpy", "storm.tasks"]}
            if self.steady
            else drawn(draw, self.method)
        )
        workers = 2 if self.steady else draw.randrange(2, 5)
        if not self.steady and self.counts["runtimes"] % 2 == 0:
            self.settings |= TIGHT
        end = float("inf") if self.steady else time.monotonic() + ROUND
        self.words = accounts.Words()
        self.begun, self.descendants = Counter(), {}
        self.rt = rt = runtime.Runtime(workers, start_method=self.method, **self.settings)
        all_ready(rt)
        strikes = KILLS_ALONE if self.steady else STORM
        self.weather = Weather(rt, self.method, random.Random(draw.random()), self.pause, strikes, workers)
        self.weather.start()
        try:
            while self.more() and time.monotonic() < end:
                self.wave()
        finally:
            self.weather.stop()
        all_ready(rt)
        gc.collect()
        arrays.let_go(rt, workers)
        accounts.check_calm(rt)
        self.counts["growths"] += rt.stats().growths
        rt.shutdown()
        accounts.check_end(rt)
        faulthandler.cancel_dump_traceback_later()
        self.hear()
        if not self.steady:
            self.words.check()
        accounts.check_share(self.begun, self.settings.get("max_tasks_per_child"))
        ended = accounts.check_descendants(self.descendants, self.weather.orphans)
        self.counts["descendants that nobody ended"] += ended
        self.counts.update({"kills": sum(self.weather.counts[kind] for kind in KILLS), "runtimes": 1})
        self.counts.update(self.weather.counts)
        self.rt = self.weather = None

    def wave(self):
        """Orders of all kinds, until each has its outcome; then they are checked."""
        faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)
        path = self.folder / f"ledger-{next(self.keys)}"
        seconds = STEADY_WAVE if self.steady else WAVE
        wave = Wave(self.rt, str(path), self.keys, seconds, self.more, self.slow)
        draws = [random.Random(self.draw.random()) for _ in CLIENTS]
        with concurrent.futures.ThreadPoolExecutor(len(CLIENTS)) as pool:
            clients = [
                pool.submit(guarded, client, wave, draw) for client, draw in zip(CLIENTS, draws, strict=True)
            ]
        errors = [error for client in clients if (error := client.exception())]
        self.ledger = accounts.Ledger(recording.entries(str(path)))
        if errors:
            raise next((e for e in errors if "another client" not in str(e)), errors[0])
        del clients
        if not self.steady:
            self.check(wave, path)
        else:
            with self.weather.holding:
                self.check(wave, path)
                self.sample()
                self.weather.killed.clear()
                self.descendants.clear()
                self.begun.clear()
                self.words.forget()
        path.unlink(missing_ok=True)

    def check(self, wave, path):
        core = self.rt._core
        until(
            lambda: core.dispatcher.idle and not core.dispatcher.counts()[1],
            lambda: f"ended: {self.rt.stats()}",
        )
        self.ledger = accounts.Ledger(recording.entries(str(path)))
        self.counts.update(self.balance(wave))
        self.counts.update({"tasks": len(wave.orders), "runs": sum(map(len, self.ledger.starts.values()))})
        self.counts.update(wave.stock.counts)
        for (what, _), count in self.ledger.counts.items():
            if what in TOLD:
                self.counts[TOLD[what]] += count
        self.words.add(self.ledger)
        self.descendants.update(self.ledger.descendants)
        for pid, keys in self.ledger.begun.items():
            self.begun[pid] += len(keys)

    def balance(self, wave):
        """Every order of a wave against the ledger; counts of outcomes."""
        return accounts.check_orders(
            wave.orders, self.ledger, self.weather.killed, self.settings.get("threads", 1)
        )

    def hear(self):
        """What was printed, until now."""
        sys.stdout.flush()
        for line in self.out.read_text().splitlines():
            self.words.come(tasks.WROTE, line)
        os.truncate(self.out, 0)

    def heed(self, record):
        """A record that the host's loggers were given."""
        if record.name == "storm":
            self.words.come(tasks.LOGGED, record.getMessage())
        else:
            self.logs.append(record.getMessage())

    # ---- a steady storm ------------------------------------------------------------------------------

    def sample(self):
        """What the runtime takes, while nothing happens."""
        all_ready(self.rt)
        arrays.let_go(self.rt, 2)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free is no leak, however the allocator keeps it in pieces
        accounts.check_calm(self.rt)
        now = time.monotonic()
        taken = accounts.taken()
        values = {
            "memory of the host": unshared("self"),
            "memory of the zygote": unshared(self.rt._core._zygote.pid),
            "descriptors": taken["descriptors"].total(),
            "threads": taken["threads"],
            "blocks": sum(self.rt._core.arena.owners().values()),
        }
        for name, value in values.items():
            self.samples.setdefault(name, []).append((now, value))

    # ---- when something is wrong -----------------------------------------------------------------------

    def report(self, error):
        """All that is known, on stderr."""
        say = functools.partial(print, file=sys.stderr, flush=True)
        say(f"\nTHE STORM HAS FAILED: seed {self.seed!r}, {self.method}, {self.settings}")
        say("".join(traceback.format_exception(error)))
        say("counted:", dict(self.counts), "logged:", *self.logs, sep="\n  ")
        if self.weather is not None:
            say("the weather:", *self.weather.log, sep="\n  ")
        if self.ledger is not None:
            keys = getattr(error, "keys", ()) if isinstance(error, accounts.Unbalanced) else ()
            say(self.ledger.told(set(keys)) if keys else f"{len(self.ledger.entries)} records in the ledger")
        faulthandler.dump_traceback(sys.stderr)
        if self.rt is not None:
            say(self.rt.stats(), *self.rt.workers(), sep="\n")
            stacks = threading.Thread(
                target=lambda: say(*self.rt.dump_stacks().values(), sep="\n"), daemon=True
            )
            stacks.start()
            stacks.join(5)


def guarded(client, wave, draw):
    """Who fails lets the others know, so that nobody waits."""
    try:
        client(wave, draw)
    except BaseException:
        wave.broken.set()
        raise


def drawn(draw, method):
    """Settings of a runtime."""
    return {
        "region_size": draw.choice(["256KiB", "1MiB", "4MiB", "8MiB"]),
        "region_max": draw.choice([None, "8MiB"]),
        "max_tasks_per_child": draw.choice([None, None, 5, 30]),
        "max_worker_rss": draw.choice(
            [None, None, ROOM + (unshared("self") if method == "fork" else ZYGOTE)]
        ),
        "preload": draw.choice([["numpy"], ["numpy", "storm.tasks"], ["numpy", "storm.tasks"]]),
        "threads": draw.choice([1, 1, 3]),
    }


def unshared(pid):
    """Bytes of memory that a process shares with no file."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def prime():
    """Take what an interpreter takes once: the descriptor of libzmq's random numbers, asyncio."""
    import asyncio

    import zmq

    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.linger = 0
    asyncio.run(asyncio.sleep(0))


class Records(logging.Handler):
    """What comes out of the host's loggers."""

    def __init__(self, storm):
        super().__init__()
        self.storm = storm

    def emit(self, record):
        self.storm.heed(record)


def main():
    storm = Storm(**json.loads(sys.argv[1]))
    answer = os.dup(1)
    sys.stdout.flush()
    fd = os.open(storm.out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.close(fd)
    logging.getLogger().addHandler(Records(storm))
    try:
        storm.run()
        said = {"counts": storm.counts, "samples": storm.samples}
    except BaseException as error:
        storm.report(error)
        said = {"failed": f"{type(error).__name__}: {error}"[:2000]}
    with open(answer, "w") as file:
        print(json.dumps(said), file=file)
    os._exit("failed" in said)
