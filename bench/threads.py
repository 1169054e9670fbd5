"""What threads in a worker bring: tasks that wait, and tasks that release the GIL. A table on stdout.

    python bench/threads.py

Each row is one process: Runtime(1, threads=T). The rate is that of `submit`, all futures collected; the ratio
is to T=1 in the same run. CPU is that of host and worker together, for all tasks of the row.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable

from runtime import Runtime

WAIT = 0.01  # seconds that a waiting task takes
BLOCK = bytes(4 << 20)


def wait() -> None:
    """As one that waits for an answer."""
    time.sleep(WAIT)


def digest() -> bytes:
    """Computes without the GIL."""
    return hashlib.sha256(BLOCK).digest()


def nothing() -> None:
    """What the machinery takes."""


def rate(task: Callable[[], object], threads: int, count: int) -> tuple[float, float]:
    """(tasks a second, CPU seconds)"""
    before = os.times()
    with Runtime(1, threads=threads) as rt:
        for future in [rt.submit(task) for _ in range(threads)]:
            future.result()
        begin = time.perf_counter()
        for future in [rt.submit(task) for _ in range(count)]:
            future.result()
        took = time.perf_counter() - begin
    after = os.times()
    return count / took, sum(after[:4]) - sum(before[:4])


def main() -> None:
    print("| task | threads | tasks/s | x threads=1 | CPU s |")
    print("|---|---|---|---|---|")
    for task, count in ((wait, 400), (digest, 100), (nothing, 20_000)):
        base = 0.0
        for threads in (1, 4, 16):
            found, cpu = rate(task, threads, count if threads == 1 else count * 4)
            base = base or found
            print(
                f"| {task.__name__} | {threads} | {found:,.0f} | {found / base:.2f} | {cpu:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
