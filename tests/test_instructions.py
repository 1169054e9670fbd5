"""bench/instructions.py without valgrind: its driver works, its named lines exist, its parsers can read.

The count itself is a benchmark: `python bench/instructions.py`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("instructions", ROOT / "bench" / "instructions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["instructions"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["instructions"]


def test_the_driver_runs_tasks_from_submit_to_result() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "instructions_driver.py"), "3", "2"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "96\n"), done.stderr


def test_each_line_that_is_called_supervision_exists(bench: Any) -> None:
    named = bench.named_lines()
    assert set(named.values()) == {purpose for _, _, purpose in bench.SUPERVISION}
    check = [line for line, purpose in named.items() if line.source == "_runner.pyx" and purpose == "between"]
    text = (ROOT / "runtime" / "_runner.pyx").read_text().splitlines()
    assert any("sys_is_open" in text[line.number - 1] for line in check), "a function stands for its lines"
    assert not any("self.context.task" in text[line.number - 1] for line in check), "but for those above it"


def test_a_line_that_is_gone_is_named(bench: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(bench, "SUPERVISION", (("_lease.pyx", "no such line", "x"),))
    with pytest.raises(SystemExit) as caught:
        bench.named_lines()
    assert caught.value.code == 2
    assert "_lease.pyx has no line 'no such line'" in capsys.readouterr().err


def test_calls_count_where_they_leave_our_modules(bench: Any, tmp_path: Path) -> None:
    ours, other = ROOT / "runtime" / "_a.so", "/lib/libc.so"
    (tmp_path / "out").write_text(
        f"ob={ours}\nfn=one\n0x10 5\n0x14 1\ncob={other}\ncfn=clock_gettime\ncalls=3 0x1\n0x14 60\n"
        "cfn=two\ncalls=1 0x1\n0x18 900\n"  # in the same object: its own lines have it
        f"ob={other}\nfn=x\n0x10 1000\n"
    )
    found = bench.read_profile(tmp_path / "out")
    key = str(ours)
    assert found.costs == {(key, 0x10): (5, 0), (key, 0x14): (1, 60)}
    assert found.clocks == {(key, 0x14): 3}
    assert found.total == 1006


def test_lines_of_generated_c(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text(
        'head\n  /* "runtime/_lease.pyx":7\n * text\n */\n  code;\n\n  /* function exit code */\n  return;\n'
    )
    generated = bench.Generated(tmp_path / "x.c")
    assert [generated.at(n) for n in (1, 5, 8)] == [None, ("_lease.pyx", 7), None]
