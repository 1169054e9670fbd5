"""Counts what a proof has seen, and says when it has seen enough.

The body of a proof is one function for both its uses: in the suite it runs until it has reached the counts
in brackets; a slice of `make soak` runs the same loop until its time is up (and its round is finished).

    seed, counts          printed, and kept
    timed(…)              one try of something with a promised time. In the suite each may take ten times
                          as long. In a slice 99 of 100 must hold it, and each that does not must coincide
                          with a stall that the heartbeats (tools/heartbeat.py) saw on this machine.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

CI_FACTOR = 10


class Try(NamedTuple):
    """Something that was due at `begin` and was over at `end`, monotonic seconds."""

    what: str
    promised: float
    begin: float
    end: float

    @property
    def took(self) -> float:
        return self.end - self.begin

    def __str__(self) -> str:
        return f"{self.what}: {self.took * 1000:.1f} ms, promised {self.promised * 1000:g} ms"


class Tally:
    """The counts of one run of a proof."""

    def __init__(self, goal: dict[str, int], seed: str, seconds: float = 0.0, stalls: Path | None = None):
        self.goal = goal
        self.seed = seed
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.tries: list[Try] = []
        self.seconds = seconds
        self.stalls = stalls
        self.started = time.monotonic()

    @property
    def is_slice(self) -> bool:
        return self.seconds > 0

    def more(self) -> bool:
        """Whether another round is wanted."""
        if self.is_slice:
            return time.monotonic() < self.started + self.seconds
        return any(self.counts[name] < count for name, count in self.goal.items())

    def timed(self, what: str, promised: float, begin: float, end: float) -> None:
        one = Try(what, promised, begin, end)
        self.tries.append(one)
        assert self.is_slice or one.took <= CI_FACTOR * promised, str(one)

    def finish(self) -> None:
        """The run is over: was it enough, and in time?"""
        missing = {name: count - self.counts[name] for name, count in self.goal.items()}
        if self.is_slice:
            assert all(self.counts[name] for name in self.goal), f"not a round in {self.seconds:g} s"
            lines = self.stalls.read_text().splitlines() if self.stalls else []
            stalls = [json.loads(line) for line in lines]
            for what in sorted({one.what for one in self.tries}):
                check_times([one for one in self.tries if one.what == what], stalls)
        else:
            assert all(n <= 0 for n in missing.values()), f"missing: {missing}"

    def report(self) -> dict[str, Any]:
        """What the ledger keeps."""
        names = sorted({one.what for one in self.tries})
        took = {name: sorted(one.took for one in self.tries if one.what == name) for name in names}
        return {
            "seed": self.seed,
            "counts": dict(self.counts),
            "seconds": round(time.monotonic() - self.started, 1),
            "ms": {
                name: {"tries": len(of), "p50": ms(of, 0.5), "p99": ms(of, 0.99), "max": ms(of, 1)}
                for name, of in took.items()
            },
        }


def at(ordered: list[float], share: float) -> float:
    """The nearest-rank percentile."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def ms(ordered: list[float], share: float) -> float:
    return round(at(ordered, share) * 1000, 2)


def check_times(tries: list[Try], stalls: list[list[float]]) -> None:
    """p99 within what is promised, and each try beyond explained by stalls: [begin, end] each."""
    late = [
        (one, covered([(max(a, one.begin), min(b, one.end)) for a, b in stalls]))
        for one in tries
        if one.took > one.promised
    ]
    said = "".join(
        f"\n  {one}, from {one.begin:.3f} to {one.end:.3f}; the machine stalled for {stalled * 1000:.1f} ms"
        for one, stalled in late
    )
    assert not late or at(sorted(one.took / one.promised for one in tries), 0.99) <= 1, (
        f"{len(late)} of {len(tries)} took longer than promised:{said}"
    )
    assert all(stalled >= one.took - one.promised for one, stalled in late), f"without an alibi:{said}"


def covered(spans: list[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans: the processors may have stalled together."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
