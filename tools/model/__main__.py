"""See __init__.py."""

from __future__ import annotations

import argparse
import sys

from tools.model.catalogue import FAULTS, MODELS
from tools.model.checker import explore


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 if a model is broken, or if a fault is not found."""
    parser = argparse.ArgumentParser(prog="python -m tools.model", description="Check the models.")
    parser.add_argument("name", nargs="?", default="", help="only models and faults whose name begins so")
    parser.add_argument("--models", action="store_true", help="no faults")
    parser.add_argument("--faults", action="store_true", help="nothing but faults")
    options = parser.parse_args(arguments)
    ok = True
    if not options.faults:
        ok = check_models(options.name)
    if not options.models:
        ok = check_faults(options.name) and ok
    return 0 if ok else 1


def check_models(name: str) -> bool:
    """Visit all states of each model. Whether every property holds."""
    ok, states, transitions, seconds = True, 0, 0, 0.0
    print(f"{'model':<20}{'states':>10}{'transitions':>14}{'depth':>8}{'CPU s':>8}   found")
    for model, thaw in MODELS.items():
        if not model.startswith(name):
            continue
        report = explore(thaw)
        states, transitions = states + report.states, transitions + report.transitions
        seconds += report.seconds
        print(
            f"{model:<20}{report.states:>10,}{report.transitions:>14,}{report.depth:>8}"
            f"{report.seconds:>8.1f}   {report.broken or 'nothing'}"
        )
        sys.stdout.flush()
        if report.broken:
            ok = False
            print("\n".join(f"    {line}" for line in report.trace))
    print(f"{'all':<20}{states:>10,}{transitions:>14,}{'':>8}{seconds:>8.1f}")
    return ok


def check_faults(name: str) -> bool:
    """Break a line of a protocol, and print the shortest way to what comes of it. Whether each is found."""
    ok = True
    for fault, (model, words, thaw) in FAULTS.items():
        if not (fault.startswith(name) or model.startswith(name)):
            continue
        report = explore(thaw)
        found = f"found after {report.steps} steps: {report.broken}" if report.broken else "NOT FOUND"
        print(f"\n{fault}: {words}\n  {found}")
        print("\n".join(f"    {line}" for line in report.trace))
        ok = ok and bool(report.broken)
    return ok


if __name__ == "__main__":
    sys.exit(main())
