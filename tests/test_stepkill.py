"""tools/stepkill in small: the stepper, one primitive, and that it can find what is wrong.

The whole table is a command of its own: `python -m tools.stepkill`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from marks import FORKS_BESIDE_THREADS

from runtime import _extent, _slab  # type: ignore[attr-defined]
from tools.stepkill import cli, engine, primitives, report, trace
from tools.stepkill.extents import HeapWorld
from tools.stepkill.primitive import Primitive

ROOT = Path(__file__).resolve().parent.parent

reason = trace.why_not()
pytestmark = [
    pytest.mark.skipif(bool(reason), reason=reason),
    FORKS_BESIDE_THREADS,
]

# increments what it is given, as often as it is told: rdi, the word; esi, how often
LOOP = (
    b"\x89\xf1"  # mov ecx, esi
    b"\xf0\xff\x07"  # lock inc dword [rdi]
    b"\xff\xc9"  # dec ecx
    b"\x75\xf9"  # jnz, back to the increment
    b"\xc3"  # ret
)
INCREMENT = 2  # offset of it


def stepkill(*argv: str) -> tuple[int, str]:
    """The command: (exit code, what it printed)."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.stepkill", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 2, done.stderr
    return done.returncode, done.stdout


class Machine(NamedTuple):
    """The loop above in memory of its own, and a word that forks share."""

    call: Callable[[int, int], None]
    at: int
    word: mmap.mmap
    where: int

    def text(self) -> list[tuple[int, int]]:
        return [(self.at, self.at + len(LOOP))]

    def count(self) -> int:
        return self.word[0]


@pytest.fixture
def machine() -> Iterator[Machine]:
    code = mmap.mmap(
        -1,
        mmap.PAGESIZE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC,
    )
    code[: len(LOOP)] = LOOP
    word = mmap.mmap(-1, mmap.PAGESIZE)
    pins: list[Any] = [ctypes.c_char.from_buffer(code), ctypes.c_char.from_buffer(word)]
    at, where = (ctypes.addressof(pin) for pin in pins)
    yield Machine(ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(at), at, word, where)
    pins.clear()
    code.close()
    word.close()


def test_every_instruction_is_stepped_once(machine: Machine) -> None:
    stepper = trace.Stepper(lambda: machine.call(machine.where, 3), machine.text())
    stepper.enter([machine.at])
    seen = [(address - machine.at, machine.count()) for address in stepper.steps()]
    assert stepper.finish() == 0
    body = [(2, n) for n in (0, 1, 2)], [(5, n) for n in (1, 2, 3)], [(7, n) for n in (1, 2, 3)]
    assert seen == [(0, 0), *[step for turn in zip(*body, strict=True) for step in turn], (9, 3)]


def test_what_is_outside_is_run_over_and_calls_from_there_are_not_missed(machine: Machine) -> None:
    def run() -> None:
        for _ in range(3):
            machine.call(machine.where, 1)

    stepper = trace.Stepper(run, machine.text())
    stepper.enter([machine.at])
    assert [address - machine.at for address in stepper.steps()] == [0, 2, 5, 7, 9] * 3
    assert stepper.finish() == 0


@pytest.mark.parametrize("hits", [1, 3])
def test_killed_where_it_was_told(machine: Machine, hits: int) -> None:
    stepper = trace.Stepper(lambda: machine.call(machine.where, 5), machine.text())
    assert stepper.reach(machine.at + INCREMENT, hits)
    assert machine.count() == hits - 1
    stepper.kill()
    assert (stepper.status, machine.count()) == (-signal.SIGKILL, hits - 1)


def test_an_address_that_is_not_reached_so_often(machine: Machine) -> None:
    stepper = trace.Stepper(lambda: machine.call(machine.where, 5), machine.text())
    assert not stepper.reach(machine.at + INCREMENT, 6)
    assert (stepper.finish(), machine.count()) == (0, 5)


def test_the_end_of_a_process_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("as it should")

    assert trace.Stepper(fail, ()).finish() == 1
    assert "as it should" in capfd.readouterr().err


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], object]]:
    """Sleeps for ever, in a process that has the alarm's signal blocked."""
    monkeypatch.setattr(trace, "PATIENCE", 1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    reading, writing = os.pipe()
    yield lambda: os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


READ = 0  # the number of the system call


def test_a_child_that_sleeps_is_given_up(machine: Machine, asleep: Callable[[], object]) -> None:
    def run() -> None:
        machine.call(machine.where, 1)
        asleep()

    stepper = trace.Stepper(run, machine.text())
    stepper.enter([machine.at])
    last = machine.at + len(LOOP) - 1
    told = rf"no end after 1 s: asleep in system call {READ} at 0x\w+, after the instruction at {last:#x}"
    with pytest.raises(trace.Strayed, match=told):
        list(stepper.steps())
    assert stepper.status == -signal.SIGKILL


def test_a_child_that_runs_on_is_given_up(machine: Machine, asleep: Callable[[], object]) -> None:
    stepper = trace.Stepper(lambda: machine.call(machine.where, -1), ())
    with pytest.raises(trace.Strayed, match="no end after 1 s: running at 0x"):
        stepper.finish()


def test_a_child_that_sleeps_before_it_can_be_stepped(asleep: Callable[[], object]) -> None:
    with pytest.raises(trace.Strayed, match="not prepared after 1 s"):
        trace.Stepper(lambda: None, (), asleep)


@pytest.mark.usefixtures("lossy")
def test_the_primitive_of_a_child_that_sleeps_is_named(
    monkeypatch: pytest.MonkeyPatch, asleep: Callable[[], object]
) -> None:
    monkeypatch.setattr(HeapWorld, "free", lambda self: asleep())
    with pytest.raises(trace.Strayed, match=r"extent free, .+: no end after 1 s: asleep in system call"):
        cli.measure("extent free", "1", engine.SHARE)


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in trace.why_not()


def test_a_sandbox_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: int, pid: int, address: int = 0, data: int = 0) -> int:
        raise PermissionError(1, "Operation not permitted", f"ptrace({request})")

    monkeypatch.setattr(trace, "ptrace", refuse)
    assert "not allowed" in trace.why_not()


def test_a_wrong_list_is_caught() -> None:
    code, text = stepkill("--wrong")
    assert code == 1, text
    found = re.search(r"LOST at (\d+) boundaries, DOUBLED at (\d+)", text)
    assert found is not None and int(found[1]) > 0 and int(found[2]) > 0, text
    assert "copy:" not in text, "a real kill and the sweep of a copy agree"


def test_a_primitive_passes_and_its_line_says_so() -> None:
    code, text = stepkill("--quick", "extent free")
    assert code == 0, text
    row = next(line.split() for line in text.splitlines() if line.startswith("extent free"))
    boundaries, addresses, regions, killed, lost, doubled = map(int, row[2:8])
    assert boundaries > 200 and 50 < addresses < boundaries and regions > 10
    assert killed == boundaries, "each scenario is short, so all of it is killed for real"
    assert (lost, doubled) == (0, 0)


def entry(name: str) -> Primitive:
    return next(primitive for primitive in primitives.PRIMITIVES if primitive.name == name)


def measured(primitive: Primitive) -> report.Line:
    parts = [(s.name, engine.run(s, primitive.modules(), "1")) for s in primitive.scenarios]
    return report.line(primitive, parts, 0.0)


def test_what_is_not_stepped_fails(capsys: pytest.CaptureFixture[str]) -> None:
    freeing = entry("extent free")
    line = measured(freeing._replace(scenarios=freeing.scenarios[-1:]))
    assert (line.outcome.lost, line.outcome.doubled) == (0, 0)
    assert line.share < report.ENOUGH and not line.good
    report.show([line], "1", False, 0.0)
    assert f"only {line.share:.1%} of its instructions were stepped" in capsys.readouterr().out


@pytest.fixture
def lossy(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is lost here on purpose is not for conftest.py to complain of."""
    yield
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest is not None and conftest.session.losses
    conftest.session.losses.clear()


@pytest.mark.usefixtures("lossy")
def test_a_survivor_that_does_not_sweep_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeapWorld, "recover", lambda self: None)
    claiming = entry("extent claim")
    line = measured(claiming._replace(scenarios=claiming.scenarios[1:2]))
    assert line.outcome.lost > 10 and not line.outcome.remarks and not line.good


def test_each_function_of_blocks_and_extents_has_a_line() -> None:
    listed = {name for p in primitives.PRIMITIVES for name in (*p.whole, *p.atomic)}
    exported = {f"_slab.{name}" for name in _slab.__pyx_capi__} | {
        f"_extent.{name}" for name in _extent.__pyx_capi__
    }
    only_read = {"_slab.pool_count_free", "_extent.heap_used", "_extent.heap_largest"}
    assert exported - listed == only_read


@pytest.mark.stress
def test_it_runs_from_its_folder_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "stepkill"), "--quick", "extent hand over"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "extent hand over" in done.stdout
