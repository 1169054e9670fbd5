"""SIGKILL at every instruction of each shared-memory primitive, as shipped: python -m tools.stepkill

    python -m tools.stepkill                the whole table, on every processor
    python -m tools.stepkill --quick        the same, with a hundredth of the real kills instead of a tenth
    python -m tools.stepkill "block take"   some lines of it
    python -m tools.stepkill --wrong        a deliberately wrong free list instead: something must be found

A forked process is stepped by ptrace through the compiled modules (runtime/*.so; what they call outside, in
libc or the interpreter, is run over). After each instruction its region is what a SIGKILL there would leave:
a survivor sweeps a copy of every content that the region has had, and counts what is lost or there twice. At
a seeded tenth of the boundaries, at all of them where they are under 300, the process is killed for real.

The table: boundaries stepped; addresses, of distinct instructions; regions, distinct contents that were
swept; killed, for real; lost and doubled, the boundaries after which something was; share, the instructions
of the primitive's functions that were stepped. Exit code 1: anything lost or doubled, or a share under 95 %.
Exit code 2: a scenario did not run as it should. 77: nothing can be stepped on this machine; it says why.

primitives.py is the table, engine.py steps and kills, trace.py is the stepper, shipped.py reads the modules.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence

from tools.stepkill import engine, primitives, report, shipped, trace, wrong

SEED = os.environ.get("RUNTIME_STRESS_SEED", "20260601")
NOT_RUN = 77
QUICK = 100  # with --quick one in so many is killed for real


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stepkill", description=(__doc__ or "").split(":")[0])
    parser.add_argument("names", nargs="*", metavar="PRIMITIVE", help="lines of the table (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer real kills")
    parser.add_argument("--wrong", action="store_true", help="step a wrong free list, which must be caught")
    parser.add_argument("--seed", default=SEED, help="of the boundaries that are killed for real")
    parser.add_argument("--verbose", action="store_true", help="each scenario, and what was not stepped")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that step")
    return parser.parse_args(argv)


def settle_on(processors: multiprocessing.Queue[int]) -> None:
    """Each process that steps stays on one processor."""
    os.sched_setaffinity(0, {processors.get()})


def measure(name: str, seed: str, share: int) -> report.Line:
    """One line of the table."""
    table = (wrong.primitive(),) if name == wrong.NAME else primitives.PRIMITIVES
    primitive = next(p for p in table if p.name == name)
    started = time.monotonic()
    parts = []
    for scenario in primitive.scenarios:
        try:
            parts.append((scenario.name, engine.run(scenario, primitive.modules(), seed, share)))
        except trace.Strayed as error:
            raise trace.Strayed(f"{name}, {scenario.name}: {error}") from None
    return report.line(primitive, parts, time.monotonic() - started)


def measure_all(names: Sequence[str], jobs: int, seed: str, share: int) -> dict[str, report.Line]:
    """All these lines, by some processes side by side. Raises: what stepping raises."""
    context = multiprocessing.get_context("spawn")
    processors: multiprocessing.Queue[int] = context.Queue()
    usable = sorted(os.sched_getaffinity(0))
    jobs = max(1, min(jobs, len(names)))
    for k in range(jobs):
        processors.put(usable[k % len(usable)])
    lines = {}
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=settle_on, initargs=(processors,)
    ) as pool:
        order = sorted(names, key=primitives.SLOW.__contains__, reverse=True)
        waiting = {pool.submit(measure, name, seed, share): name for name in order}
        try:
            for future in concurrent.futures.as_completed(waiting):
                line = lines[waiting[future]] = future.result()
                print(f"  {line.name}: {line.seconds:.0f} s", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # A shell that runs us in the background has SIGINT ignored; scenarios that are interrupted would wait on.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    reason = trace.why_not()
    if reason:
        print(f"NOT RUN: nothing can be stepped: {reason}", file=sys.stderr)
        return NOT_RUN
    known = [wrong.NAME] if options.wrong else [p.name for p in primitives.PRIMITIVES]
    unknown = set(options.names) - set(known)
    if unknown:
        print(f"no such primitive: {', '.join(sorted(unknown))}", file=sys.stderr)
        print(f"there is: {', '.join(known)}", file=sys.stderr)
        return 2
    names = [name for name in known if not options.names or name in options.names]
    share = QUICK if options.quick else engine.SHARE
    started = time.monotonic()
    try:
        lines = measure_all(names, options.jobs, options.seed, share)
    except (shipped.Unreadable, trace.Refused, trace.Strayed) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    report.show([lines[name] for name in names], options.seed, options.verbose, time.monotonic() - started)
    return 0 if all(line.good for line in lines.values()) else 1
