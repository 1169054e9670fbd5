"""When a task whose attempt has failed runs again."""

from __future__ import annotations

import random

__all__ = ["HISTORY", "RETRY_BACKOFF", "RETRY_BACKOFF_MAX", "doubled", "retry_delay"]

RETRY_BACKOFF = 0.05  # seconds before the second retry, at least; the first comes at once
RETRY_BACKOFF_MAX = 5.0  # seconds before any, at most
HISTORY = 16  # deaths that a task remembers, the last ones
_JITTER = 1.25  # up to so many times as long, so that tasks that fell together do not rise together

_draw = random.Random()  # our own: the numbers that a user's seed promises stay the user's


def doubled(first: float, most: float, times: int, low: float, high: float) -> float:
    """Seconds: the first pause, doubled so many times, but no more than `most`; then drawn anew between so
    many times of it, so that those that fell together do not march in step.
    """
    return min(most, first * 2.0 ** min(times, 60)) * _draw.uniform(low, high)


def retry_delay(attempts: int) -> float:
    """Seconds from the end of the attempt of this number (1 for the first) to the start of the next one."""
    if attempts <= 1:
        return 0.0
    return doubled(RETRY_BACKOFF, RETRY_BACKOFF_MAX / _JITTER, attempts - 2, 1.0, _JITTER)
