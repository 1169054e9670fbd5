#!/usr/bin/env python3
"""Garbage for every decoder, for as long as you like: `python tools/fuzz.py --minutes 60`.

    python tools/fuzz.py --seconds 30                 all targets, in turn
    python tools/fuzz.py --target frame --minutes 5   one of them
    python tools/fuzz.py --replay FILE                a finding again, as it was

The targets and how they are run are in tests/fuzzing.py. The seed is printed; the same one gives the same
inputs. A finding is made smaller, kept as TARGET-DIGEST.bin in the folder of --keep and named; once it is
mended, it belongs into tests/data/fuzz, which the suite runs. Exit code 1: something was found.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SLICE = 10.0  # seconds of a target before the next one has its turn


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--target", action="append", metavar="NAME")
    parser.add_argument("--seed", default=str(random.SystemRandom().randrange(2**32)))
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz", metavar="FOLDER")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    fuzzing = importlib.import_module("fuzzing")

    names = options.target or list(fuzzing.TARGETS)
    unknown = [name for name in names if name not in fuzzing.TARGETS]
    if unknown:
        parser.error(f"there is no target {unknown[0]}; there are {', '.join(fuzzing.TARGETS)}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        scratch = Path(folder)
        if options.replay:
            name = options.replay.name.rpartition("-")[0]
            code, said = fuzzing.run_again(name, options.replay, scratch)
            print(said or f"{options.replay.name}: nothing happens", end="\n")
            return 1 if code else 0
        print(f"fuzz: seed {options.seed}", flush=True)
        total = options.seconds + 60 * options.minutes or 30.0
        return run(fuzzing, names, options.seed, total, options.keep, scratch)


def run(fuzzing: Any, names: list[str], seed: str, total: float, keep: Path, scratch: Path) -> int:
    """All targets in turn, until the time is up. 1: something was found."""
    each = min(SLICE, total / len(names))
    counts: Counter[str] = Counter()
    found = 0
    begin = time.monotonic()
    turn = 0
    while turn < len(names) or time.monotonic() < begin + total:
        name = names[turn % len(names)]
        inputs, finding = fuzzing.campaign(name, f"{seed} {turn // len(names)}", each, scratch)
        counts[name] += inputs
        turn += 1
        if finding is not None:
            found += 1
            path = finding.keep(keep)
            print(f"fuzz: FOUND in {name}: {finding.how}, {len(finding.data)} bytes\n{finding.words}")
            print(f"again: python tools/fuzz.py --replay {path}", flush=True)
    said = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"fuzz: {time.monotonic() - begin:.0f} s, {found} found; inputs: {said}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
