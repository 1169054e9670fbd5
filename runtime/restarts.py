"""When a worker number may try again: the back-off and the window of the restart policy.

Only deaths before ready count, and those of a worker that was ready and has done nothing since. They are
counted in a row: who has done some work, or lived for a while, begins anew. Times are monotonic seconds
that the caller brings, so all of it is arithmetic.
"""

from __future__ import annotations

from collections import deque

from runtime.retries import doubled

__all__ = ["FAILURES", "WINDOW", "Restarts", "backoff"]

FAILURES = 5  # so many deaths before ready …
WINDOW = 30.0  # … in so many seconds make a number give up: it goes on trying, but nobody counts on it
_FIRST = 0.05  # seconds before the second attempt; doubled each time
_MOST = 10.0  # seconds before any, for one number; what several in a row cost together must not grow


def backoff(failures: int, crowd: int = 1) -> float:
    """Seconds before the next attempt: doubled each time, with jitter so that numbers do not march in step.

    crowd: how many numbers fail like this; the longest pause grows with them.
    """
    return doubled(_FIRST, _MOST * max(crowd, 1), max(failures, 1) - 1, 0.8, 1.2)


class Restarts:
    """The failures of one number. Thread-safety: for the supervisor's thread; others may read."""

    __slots__ = ("_recent", "exhausted", "in_a_row", "not_before")

    def __init__(self) -> None:
        self.in_a_row = 0
        self.exhausted = False  # it has failed too often, and has not lived since
        self.not_before = 0.0  # the time of the next attempt
        self._recent: deque[float] = deque(maxlen=FAILURES)

    def failed(self, now: float, crowd: int = 1) -> None:
        """One more death before ready."""
        self.in_a_row += 1
        self._recent.append(now)
        self.exhausted |= len(self._recent) == FAILURES and self._recent[0] >= now - WINDOW
        self.not_before = now + backoff(self.in_a_row, crowd)

    def lived(self) -> None:
        """Its worker has worked, or was there for long enough: begin anew, at once."""
        self.in_a_row = 0
        self.exhausted = False
        self.not_before = 0.0
        self._recent.clear()
