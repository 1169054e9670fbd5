"""Promises 5 and 19: after any storm everything is accounted for; however long it lasts, nothing grows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from storm import slopes
from watching import host

METHODS = ("exec", "fork")
LONG = 60.0  # seconds of a slice for one process
CODE = "import sys; sys.path.append(sys.argv[2]); from storm import host; host.main()"
MANY = 1_000  # kills, in a storm that has met all there is
MET = (
    "growths", "trim", "arguments by value", "arrays without room", "Refs", "Refs released", "Refs of Refs",
    "looks while arguments were kept", "kernels", "reloads done",
)  # fmt: skip
GROWTH = {  # by which each may grow in a slice: what is less is no leak, or one for a longer slice to see
    "memory of the host": 4 << 20,
    "memory of the zygote": 1 << 20,
    "descriptors": 1,
    "threads": 1,
    "blocks": 1,
}


def storm(method, folder, **options):
    """What a process has counted that was stormed. It says on stderr what was wrong."""
    folder.mkdir()
    settings = json.dumps({"method": method, "folder": str(folder), **options})
    # Threads come and go here. Each would leave an arena in pieces, whose free memory looks like a leak.
    # Threads of numpy's would be in every fork's way.
    environ = {"MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with host(CODE, settings, str(Path(__file__).parent), environ=environ) as one:
        said = json.loads(one.line())
        one.process.wait(30)
        assert "failed" not in said, f"seed {options['seed']!r}, {method}: {said['failed']}"
        one.gone()
    return said


def test_every_account_is_balanced_after_a_storm(tally, tmp_path):
    lap = 0
    while tally.more():
        for method in METHODS:
            lap += 1
            if tally.is_slice:
                end = {"seconds": min(LONG, tally.seconds / 2)}
            else:
                end = {"kills": tally.goal["kills"] // len(METHODS)}
            said = storm(method, tmp_path / str(lap), seed=f"{tally.seed} {lap}", **end)
            tally.counts.update(said["counts"])
    if tally.counts["kills"] >= MANY:
        assert not [what for what in MET if not tally.counts[what]], tally.counts


def test_nothing_grows_in_a_steady_storm(tally, tmp_path):
    lap = 0
    while tally.more():
        lap += 1
        seconds = tally.seconds or tally.goal["seconds"]
        method = METHODS[lap % 2 if tally.is_slice else 0]
        said = storm(method, tmp_path / str(lap), seed=f"{tally.seed} {lap}", seconds=seconds, steady=True)
        tally.counts.update({name: said["counts"][name] for name in ("kills", "tasks")})
        tally.counts["seconds"] += int(seconds)
        for name, samples in said["samples"].items():
            if not tally.is_slice and len(samples) < 2 * slopes.FEWEST:
                warnings.warn(f"{name}: a slow machine, {len(samples)} samples tell nothing", stacklevel=1)
                continue
            found = slopes.check_flat(name, samples, GROWTH[name])
            print(
                f"{name}: {3600 * found.value:.3g} an hour, {3600 * found.low:.3g} to {3600 * found.high:.3g}"
            )


@pytest.mark.parametrize("method", METHODS)
def test_a_moment_of_it(method, tmp_path):
    """For `make test`. So many kills, not so many seconds: those of a slow machine may be too few."""
    counts = storm(method, tmp_path / "it", seed="a moment", kills=60)["counts"]
    assert counts["kills"] >= 60 and counts["results"] > 0 and counts["kernels"] > 0
