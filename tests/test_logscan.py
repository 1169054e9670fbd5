"""The log scanner: its kernel agrees with the others on any log, cut anywhere; and what it does if not."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import runtime

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "logscan.py"
GOOD = b'198.51.100.7 - - [23/Nov/2026:10:00:01 +0000] "GET / HTTP/1.1" 200 512 "curl/8.5.0" 97'
LINES = (
    GOOD,
    GOOD.replace(b" 200 ", b" 599 "),
    GOOD.replace(b" 97", b" 0"),
    GOOD.replace(b" 97", b" 999999999999999999"),
    GOOD.replace(b" 97", b" 9999999999999999999"),  # more digits than are read
    GOOD.replace(b" 200 ", b" 600 "),
    GOOD + b" ",
    GOOD[:60],
    b"",
    b'"" 1 2 "" 3',
    b'"" 1 2 "3',
    b'"' * 4,
    b"x" * 2000,
)


@pytest.fixture(scope="module")
def logscan() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("logscan_under_test", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def kernel(logscan: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> runtime.Kernel:
    return logscan.build_kernel(tmp_path_factory.mktemp("logscan"))


@pytest.mark.parametrize("end", [b"", b"\n", b"\n" + GOOD[:70]], ids=["no newline", "newline", "cut off"])
def test_any_line_cut_anywhere(logscan: ModuleType, kernel: runtime.Kernel, end: bytes) -> None:
    chance = random.Random(7)
    lines = [chance.choice(LINES) for _ in range(3000)]
    log = b"\n".join(lines) + end
    *whole, rest = log.split(b"\n")
    expected = logscan.Answer()
    for line in [*whole, rest] if rest else whole:
        expected.add(line)
    with runtime.Runtime(2) as rt:
        for grain in (4096, 1 << 16, 1 << 20):
            assert rt.run_kernel(kernel, log, grain=grain) == expected
    assert expected.malformed > 100 and len(expected.status) > 2


def test_a_line_that_is_too_long_is_said_to_be(logscan: ModuleType, kernel: runtime.Kernel) -> None:
    with runtime.Runtime(1) as rt, pytest.raises(runtime.KernelFailed) as failed:
        rt.run_kernel(kernel, GOOD + b"\n" + b"x" * 10_000, grain=4096)
    assert failed.value.code == 1


@pytest.mark.stress
def test_the_whole_with_kills(tmp_path: Path) -> None:
    report, picture = tmp_path / "logscan.json", tmp_path / "logscan.svg"
    options = ["--size", "24MiB", "--workers", "2", "--kill", "3", "--rounds", "1", "--json", report]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 3 workers" in done.stdout and "all answers are equal" in done.stdout
    assert "numpy, one thread" in done.stdout and done.stderr == ""
    chart = SCRIPT.parent.parent / "tools" / "chart.py"
    subprocess.run([sys.executable, chart, report, picture], check=True, timeout=30)
    assert "numpy, one thread" in picture.read_text()


def test_an_answer_that_differs_is_a_failure(
    logscan: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logscan, "OTHERS", (("sys", "wrong", lambda path: logscan.Answer(lines=1)),))
    assert logscan.main(["--size", "1MiB", "--workers", "1", "--rounds", "1"]) == 1
    assert "NOT EQUAL: wrong says" in capfd.readouterr().err


def test_sizes(logscan: ModuleType) -> None:
    assert [logscan.bytes_of(text) for text in ("7", "3KiB", "2 MiB", "1GiB")] == [7, 3072, 2 << 20, 1 << 30]
    with pytest.raises(Exception, match="'many' is no size"):
        logscan.bytes_of("many")
