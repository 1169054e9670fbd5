"""Whether a series of samples grows: its slope, with bounds, without a word on how its noise is distributed.

The slope is the median of the slopes between any two samples (Theil and Sen). Its bounds are order statistics
of the same slopes, as many places from the median as chance can move Kendall's sum at 99 %. Leaks are ramps
or stairs; what is taken once, late, is neither.
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import NamedTuple

BUCKETS = 200  # samples that are compared with each other, at most; more are joined to their medians
WARM_UP = 0.2  # of the samples, in the beginning: caches fill, the allocator learns
FEWEST = 12  # samples that can tell
_Z = 2.576  # two-sided, 99 %


class Slope(NamedTuple):
    """By how much a series grows in a second, between which bounds, and by how much it has grown in all."""

    value: float
    low: float
    high: float
    grown: float


def slope(samples):
    """Of (seconds, value) pairs, in order. Raises: ValueError for too few to tell."""
    samples = joined(samples[int(WARM_UP * len(samples)) :])
    n = len(samples)
    if n < FEWEST:
        raise ValueError(f"{n} samples, {FEWEST} can tell")
    slopes = sorted(
        (y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.combinations(samples, 2) if x1 > x0
    )
    spread = _Z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = slopes[max(0, int((len(slopes) - spread) / 2))]
    high = slopes[min(len(slopes) - 1, math.ceil((len(slopes) + spread) / 2))]
    value = statistics.median(slopes)
    return Slope(value, low, high, value * (samples[-1][0] - samples[0][0]))


def joined(samples):
    """The medians of neighbours, so that no more than BUCKETS are left."""
    size = math.ceil(len(samples) / BUCKETS) or 1
    pieces = [samples[i : i + size] for i in range(0, len(samples), size)]
    return [
        (statistics.median(x for x, _ in piece), statistics.median(y for _, y in piece)) for piece in pieces
    ]


def check_flat(name, samples, room):
    """Fail if a series surely grows, and by more than `room` in all."""
    found = slope(samples)
    assert not (found.low > 0 and found.grown > room), (
        f"{name} grows by {3600 * found.value:.3g} an hour (at least {3600 * found.low:.3g}), "
        f"by {found.grown:.3g} in these {samples[-1][0] - samples[0][0]:.0f} s; "
        f"from {samples[0][1]:g} to {samples[-1][1]:g}"
    )
    return found
