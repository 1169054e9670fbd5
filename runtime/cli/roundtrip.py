"""A real round trip, in a process of its own: `python -m runtime.cli.roundtrip`.

The doctor starts it, so that what would hang or crash here is a line in its table and not its end.
It prints one JSON object: worker's and own pid, seconds of the first and (median) of a later round trip.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

__all__ = ["main"]

ROUNDS = 100


def main(patience: float) -> None:
    """Prints the figures. Raises: what the Runtime raises; TimeoutError after `patience` seconds."""
    from runtime.executor import Runtime

    begin = time.perf_counter()
    with Runtime(1) as rt:
        worker = rt.submit(os.getpid).result(patience)
        first = time.perf_counter() - begin
        usual = statistics.median(_timed(rt, patience) for _ in range(ROUNDS))
    print(json.dumps({"worker": worker, "host": os.getpid(), "first": first, "usual": usual}))


def _timed(rt: Any, patience: float) -> float:
    begin = time.perf_counter()
    rt.submit(os.getpid).result(patience)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(float(sys.argv[1]))
