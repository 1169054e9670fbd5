"""The examples of the shared state do what they say; each checks itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rate_limiter", "100 calls in"),
        ("work_counter", "lines in"),
        ("config_push", "all workers use level 5"),
    ],
)
def test_an_example(name: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert says in done.stdout.splitlines()[-1]
