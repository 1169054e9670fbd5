"""Many threads at the shared primitives: run by tools/sanitize.py under ThreadSanitizer.

    python tools/sanitize_threads.py SCALE          all scenes; exit code 1 if one ends as it must not
    python tools/sanitize_threads.py --plant NAME   what the sanitizer has to report

The actors are in tools/sanitize_driver.pyx; here is who plays together and what must hold in the end.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runtime._lease import WorkerPort  # type: ignore[import-not-found]
from runtime._threads import DeadlineKeeper  # type: ignore[import-not-found]

import runtime
from runtime import MemoryPool
from runtime import _sanitize_driver as driver
from runtime._core import Arena

PATIENCE = 120  # seconds for all scenes

Act = tuple[Any, ...]  # a function of the driver and its arguments


def play(*acts: Act) -> list[Any]:
    """Each in a thread of its own, all at once; what they return."""
    with ThreadPoolExecutor(len(acts)) as threads:
        return [future.result() for future in [threads.submit(*act) for act in acts]]


def pools(scale: int) -> None:
    """Four owners, of which two share their hints as threads of a process do, and one who is dead."""
    for capacity in (1, 3, 64):
        pool = MemoryPool(capacity, 64)
        driver.ready_pool(pool)
        times = 20_000 * scale
        users = [(driver.use_pool, pool, 11 + i, times, i > 1) for i in range(4)]
        ghost = (driver.die_in_pool, pool, 300 * scale)
        *found, _ = play(*users, ghost)
        check(f"pool of {capacity}", found == [(0, times)] * 4, found)
        check("every block is back", pool.available == capacity, pool.available)


def blocks(scale: int) -> None:
    """Three workers, of which one dies, and the host."""
    for extents in (8, 64):
        arena = Arena.create(extents * 4096, 3, 8, 8, 4096)
        times = 10_000 * scale
        makers = [(driver.make_blocks, arena, i, 5 + i, times, i == 2) for i in range(3)]
        *given, (taken, torn, swept, late) = play(*makers, (driver.take_blocks, arena, 3, 9))
        check("handed over whole", (taken, torn, late) == (sum(given), 0, 0), (given, taken, torn, late))
        check("the dead one's blocks are swept", swept >= 1, swept)
        check("every extent is free", driver.used_extents(arena) == 0, arena.owners())


def leases(scale: int) -> None:
    """Two workers, the host, the deadline keeper."""
    arena = Arena.create(16 * 4096, 2, 8, 8, 4096)
    bell = os.eventfd(0)
    try:
        keeper = DeadlineKeeper(arena, bell)
        workers = [(driver.work, WorkerPort(arena, i, None), 3 + i) for i in range(2)]
        tasks = 20_000 * scale
        host = (driver.lead, arena, keeper, 2, 7, tasks)
        kills = (driver.keep, arena, keeper, 2, 13, 400 * scale)
        *ran, (done, settled, back, torn), killed = play(*workers, host, kills)
        ended = done + settled >= tasks and torn == sum(wrong for _, wrong in ran) == 0
        check("leases", ended, (ran, done, settled, back, torn, killed))
        check("some were killed, some taken back", killed > 0 and back > 0, (killed, back))
    finally:
        os.close(bell)


def reports(scale: int) -> None:
    """A worker that reports on and on, and two who look."""
    arena = Arena.create(4096, 1, 4, 4, 4096)
    times = 300_000 * scale
    looker = (driver.read_reports, arena, times)
    _, *found = play((driver.write_reports, arena, times), looker, looker)
    check("reports are whole", all(torn == 0 for _, torn in found), found)


def plant_race() -> None:
    arena = Arena.create(8192, 1, 4, 4, 4096)
    play(*[(driver.plant_race, arena, 1000)] * 2)


def plant_relaxed() -> None:
    arena = Arena.create(8192, 1, 4, 4, 4096)
    play((driver.plant_relaxed, arena, True, 1000), (driver.plant_relaxed, arena, False, 1000))


def plant_in_worker(plant: Callable[[int], object]) -> None:
    with runtime.Runtime(1) as rt:
        rt.submit(plant, 40).exception()


SCENES: tuple[Callable[[int], None], ...] = (pools, blocks, leases, reports)
PLANTS: dict[str, Callable[[], object]] = {
    "race": plant_race,
    "relaxed": plant_relaxed,
    "overflow": lambda: driver.plant_overflow(40),
    "shift": lambda: driver.plant_shift(40),
    "overflow-in-a-worker": lambda: plant_in_worker(driver.plant_overflow),
    "shift-in-a-worker": lambda: plant_in_worker(driver.plant_shift),
}
wrong = 0


def check(what: str, holds: bool, found: object) -> None:
    global wrong
    if not holds:
        wrong += 1
        print(f"  WRONG: {what}: {found}", flush=True)


def main() -> int:
    if sys.argv[1] == "--plant":
        PLANTS[sys.argv[2]]()
        return 0
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    for scene in SCENES:
        begin = time.monotonic()
        scene(int(sys.argv[1]))
        print(f"  {scene.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
