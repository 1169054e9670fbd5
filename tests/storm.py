"""A storm in a host of its own: `python -c "import storm; storm.run(method, seconds, seed)"`.

Tasks and maps, while workers are killed and asked to leave, zygotes are killed, and the runtime is scaled
from 0 to 8. Prints what it did; every result is compared.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from collections import Counter

import evil

import runtime

_APART = 0.5  # seconds between two zygotes' deaths: a forked one needs an heir first


def run(method: str, seconds: float, seed: int) -> None:
    logging.disable()  # each death before ready is a warning
    draw = random.Random(seed)
    done: Counter[str] = Counter()
    tasks = 0
    with runtime.Runtime(3, start_method=method, retries=1000) as rt:
        end = time.monotonic() + seconds
        zygote_at = 0.0
        while time.monotonic() < end:
            futures = [rt.submit(evil.square, i) for i in range(200)]
            results = rt.map(evil.square, range(300), chunksize=draw.choice([None, 1, 50]))
            slow = [rt.submit(time.sleep, 0.002) for _ in range(20)]
            for _ in range(draw.randrange(1, 4)):
                what = draw.choice(["kill", "term", "scale", "zygote"])
                if what == "scale":
                    rt.scale(draw.randrange(9))
                elif what != "zygote":
                    hurt(rt, draw, signal.SIGKILL if what == "kill" else signal.SIGTERM)
                elif time.monotonic() - zygote_at > _APART and may_die(rt, method):
                    rt._core._zygote.kill()  # type: ignore[union-attr]
                    zygote_at = time.monotonic()
                else:
                    continue
                done[what] += 1
                time.sleep(draw.random() * 0.01)  # so that it strikes at any moment
            rt.scale(max(1, rt._max_workers))
            assert [f.result(60) for f in futures] == [i * i for i in range(200)]
            assert list(results) == [i * i for i in range(300)]
            assert [f.result(60) for f in slow] == [None] * 20
            tasks += 520
        stats = rt.stats()
        assert (stats.done, stats.failed, stats.cancelled) == (tasks, 0, 0), stats
    assert rt._core.arena.owners() == {}
    assert rt._core.dispatcher.counts() == (0, 0, 0)
    print(tasks, *(f"{what} {count}" for what, count in sorted(done.items())), flush=True)


def may_die(rt: runtime.Runtime, method: str) -> bool:
    zygote = rt._core._zygote
    return zygote is not None and zygote.started and (method == "exec" or rt._core._heir is not None)


def hurt(rt: runtime.Runtime, draw: random.Random, number: int) -> None:
    ready = [worker for worker in list(rt._core._slots.values()) if worker.ready and not worker.died]
    if ready:
        rt._core.dispatcher.signal(draw.choice(ready).slot, number)
