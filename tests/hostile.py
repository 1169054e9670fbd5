"""A round with a worker that scribbles, among others that work: shared by the suite and promise 18."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import evil
import scribbling
from watching import all_ready, pids, read_pids, send, settled, until

from runtime import RuntimeFailure, WorkerDied

HOSTILE_TIMEOUT = 1.0  # seconds, for those that hang
INNOCENTS = 120


def round_of_scribbling(rt: Any, seed: str, part: str, folder: Path) -> Counter[str]:
    """Everything has an outcome, failures say why, and in the end the runtime is as good as new."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    guarded = rt.options(timeout=HOSTILE_TIMEOUT)
    path = folder / seed.replace(" ", "-")
    all_ready(rt)
    innocents = [rt.submit(scribbling.honest, i) for i in range(INNOCENTS)]
    bad = guarded.submit(scribbling.scribble, str(path), seed, part, draw.choice((1, 5, 50, 500)))
    innocents += [rt.submit(scribbling.honest, i) for i in range(INNOCENTS, 2 * INNOCENTS)]
    items = rt.map(scribbling.honest, range(INNOCENTS), return_exceptions=True)
    _, missing = concurrent.futures.wait([bad, *innocents], 40)
    assert not missing, f"{len(missing)} tasks have no outcome: {rt.stats()}, {rt.workers()}"
    outcomes = [(i, f.exception(0) or f.result(0)) for i, f in enumerate(innocents)]
    outcomes += list(enumerate(items))
    for i, outcome in outcomes:
        if outcome == scribbling.honest(i):
            counts["right"] += 1
        elif isinstance(outcome, BaseException):
            # A worker may answer for its own leases whatever it likes, also with an exception.
            assert str(outcome) or not isinstance(outcome, RuntimeFailure)
            counts["failed"] += 1
        else:
            counts["forged"] += 1
    error = bad.exception(0)
    assert error is None or str(error), "it failed without words"
    counts["died"] += isinstance(error, WorkerDied)
    counts["scribblers"] += 1
    recovered(rt, read_pids(path)[-1])
    assert counts["right"] > len(outcomes) // 3, counts
    return counts


def recovered(rt: Any, scribbler: int) -> None:
    """Without the process that has scribbled, should it live on, all is well."""
    with contextlib.suppress(ProcessLookupError):
        send(scribbler, signal.SIGKILL)
    until(
        lambda: scribbler not in pids(rt) and len(all_ready(rt)) == 3,
        lambda: f"three workers: {rt.workers()}",
    )
    assert [f.result(20) for f in [rt.submit(evil.square, i) for i in range(60)]] == [
        i * i for i in range(60)
    ]
    settled(rt)
