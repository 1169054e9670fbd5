"""Promise 18: garbage on the wire or in the region never crashes the host.

A round fuzzes each decoder for some seconds (tests/fuzzing.py; "worker" is a whole host in one thread, whose
worker writes what it likes), then workers of a live runtime scribble over their own lease tables, outboxes,
slots, and block words while others work (tests/hostile.py).
"""

from __future__ import annotations

import logging

import fuzzing
import scribbling
from hostile import round_of_scribbling
from watching import settled, shut_down_clean

SECONDS = 3.4  # of each decoder in a round
SCRIBBLERS = 10  # of each kind in a round


def test_garbage_never_crashes_the_host(tally, runtime_factory, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    rounds = 0
    while tally.more():
        rounds += 1
        for name in fuzzing.TARGETS:
            inputs, finding = fuzzing.campaign(name, f"{tally.seed} {rounds}", SECONDS, tmp_path)
            assert finding is None, f"{finding}\nkept in {finding.keep(tmp_path / 'found')}"
            tally.counts[f"inputs of {name}"] += inputs
            tally.counts["seconds of fuzzing"] += SECONDS
        for part in scribbling.PARTS:
            rt = runtime_factory(3, region_size="1MiB", region_max="1MiB")
            for i in range(SCRIBBLERS):
                tally.counts.update(
                    round_of_scribbling(rt, f"{tally.seed} {rounds} {part} {i}", part, tmp_path)
                )
            settled(rt)
            shut_down_clean(rt)
