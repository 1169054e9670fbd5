"""When a task whose attempt has failed runs again."""

from __future__ import annotations

import random

__all__ = ["HISTORY", "RETRY_BACKOFF", "RETRY_BACKOFF_MAX", "retry_delay"]

RETRY_BACKOFF = 0.05  # seconds before the second retry, at least; the first comes at once
RETRY_BACKOFF_MAX = 5.0  # seconds before any, at most
HISTORY = 16  # deaths that a task remembers, the last ones
_JITTER = 1.25  # up to so many times as long, so that tasks that fell together do not rise together

_draw = random.Random()  # our own: the numbers that a user's seed promises stay the user's


def retry_delay(attempts: int) -> float:
    """Seconds from the end of the attempt of this number (1 for the first) to the start of the next one."""
    if attempts <= 1:
        return 0.0
    doubled = min(attempts - 2, 32)  # far beyond the limit
    base = min(RETRY_BACKOFF_MAX / _JITTER, RETRY_BACKOFF * 2.0**doubled)
    return base * _draw.uniform(1.0, _JITTER)
