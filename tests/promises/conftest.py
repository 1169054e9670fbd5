"""Each test here proves promises of goals.py, to the counts in brackets or as a slice of `make soak`.

tools/soak.py sets RUNTIME_SOAK: a JSON object {seconds, seed, stalls, report}. A failure prints the seed, the
counts and the stacks of all threads; the files that the tasks wrote stay where pytest keeps its tmp_path.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from goals import GOALS, Goal
from tally import Tally

SLICE: dict[str, Any] = json.loads(os.environ.get("RUNTIME_SOAK", "{}"))
SEED = os.environ.get("RUNTIME_STRESS_SEED", "20260601")
PATIENCE = 240  # seconds for a test, or for a slice beyond its time, to end

here = Path(__file__).parent


def goal_of(item: pytest.Item) -> Goal | None:
    name = f"{item.path.name}::{item.originalname}"  # type: ignore[attr-defined]
    return next((goal for goal in GOALS if goal.test == name), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if here in item.path.parents and (goal := goal_of(item)) is not None:
            item.add_marker(pytest.mark.promise)
            item.add_marker(pytest.mark.timeout(SLICE.get("seconds", 0) + PATIENCE))
            item.user_properties.append(("promises", goal.promises))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    tally = getattr(item, "funcargs", {}).get("tally")
    if tally is not None and report.when == "call" and report.failed:
        report.sections.append(("proof", f"seed {tally.seed}, counted {dict(tally.counts)}\n{stacks()}"))
    return report


def stacks() -> str:
    """Of all threads, when a proof has failed: what it was waiting for."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    goal = goal_of(request.node)
    assert goal is not None, "tests of this folder have a line in goals.py"
    seed = f"{SLICE.get('seed', SEED)} {request.node.originalname}"
    print(f"RUNTIME_STRESS_SEED={SLICE.get('seed', SEED)}", file=sys.stderr)
    stalls = SLICE.get("stalls")
    return Tally(
        {name: count for name, (count, _) in goal.counts.items()},
        seed,
        float(SLICE.get("seconds", 0)),
        Path(stalls) if stalls else None,
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """After the body: is it enough, in time? Then a slice says what it has counted."""
    result = yield
    tally = pyfuncitem.funcargs.get("tally")
    if tally is not None:
        tally.finish()
        print(f"counted {dict(tally.counts)}, {tally.report()['ms']}", file=sys.stderr)
        if SLICE:
            Path(SLICE["report"]).write_text(json.dumps(tally.report()))
    return result
