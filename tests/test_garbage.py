"""Garbage: each decoder with the inputs that once failed and with new ones, and workers that scribble.

The long runs are promise 18 (tests/promises/test_garbage_anywhere.py) and `python tools/fuzz.py`.
"""

from __future__ import annotations

import gc
import logging
import random
import signal
import time
import weakref
from pathlib import Path

import evil
import fuzzing
import pytest
import scribbling
from hostile import round_of_scribbling
from watching import all_ready, pids, send, settled, shut_down_clean, until

from runtime import wire

KEPT = sorted((Path(__file__).parent / "data" / "fuzz").glob("*.bin"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_what_was_found_once_is_mended(path, tmp_path):
    code, said = fuzzing.run_again(path.name.rpartition("-")[0], path, tmp_path)
    assert code == 0, said


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_a_moment_of_garbage(name, tmp_path):
    count, finding = fuzzing.campaign(name, "1", 0.5, tmp_path)
    assert finding is None, finding
    assert count > 10


@pytest.mark.stress
@pytest.mark.parametrize(
    ("how", "told"), [("raise", "an exception"), ("segfault", "SIGSEGV"), ("hang", "a hang")]
)
def test_what_is_planted_is_found_and_made_smaller(how, told, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "SMALLER", 6.0)
    count, finding = fuzzing.campaign(f"planted-{how}", "5", 30, tmp_path)
    assert finding is not None and finding.how == told, finding
    assert finding.data[2:3] == b"\x07" and len(finding.data) < 20 and finding.inputs == count
    kept = finding.keep(tmp_path / "kept")
    assert kept.name.startswith("planted-") and kept.read_bytes() == finding.data


def test_the_same_seed_gives_the_same_inputs():
    corpus = fuzzing.TARGETS["frame"][2]()
    inputs = [[fuzzing.mutated(corpus, random.Random(f"3 {i}")) for i in range(50)] for _ in range(2)]
    assert inputs[0] == inputs[1]


def test_a_report_that_is_too_deep():
    with pytest.raises(wire.WireError):
        wire.decode_report(b"[" * 60_000)


def test_a_result_that_the_host_cannot_unpickle_keeps_nothing(rt, tmp_path):
    """The exception names frames of ours, these name the task, and the task named the future."""
    kept = []
    for _ in range(5):
        future = rt.submit(evil.give, "AtUnpickling", "raise", str(tmp_path / "note"), True)
        assert isinstance(future.exception(20), evil.Refused)
        kept.append(weakref.ref(future))
    del future
    until(lambda: gc.collect() or not any(one() for one in kept), "the futures are gone")
    settled(rt)


@pytest.mark.parametrize("part", scribbling.PARTS)
def test_a_worker_that_scribbles_hurts_only_what_it_has(part, runtime_factory, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    rt = runtime_factory(3, region_size="1MiB", region_max="1MiB")
    for seed in range(2):
        round_of_scribbling(rt, f"{part} {seed}", part, tmp_path)
    settled(rt)
    shut_down_clean(rt)


def spoil_the_headers(places, value):
    """Those of the region and of the arena, which the host wrote once."""
    base = scribbling.data_at()
    for at in places:
        scribbling.put(base + at, value)


HEADERS = {
    "all of it": ((*range(-scribbling.PAGE, 0, 8), *scribbling.CONSTANT), 0xDEADBEEF_DEADBEEF),
    "sizes that make no sense": (scribbling.CONSTANT[2:], 0),
}


@pytest.mark.parametrize(("places", "value"), HEADERS.values(), ids=HEADERS)
def test_a_new_zygote_goes_by_what_the_host_knows(places, value, runtime_factory):
    """A worker has written over the headers, and the zygote, which had read them, is gone."""
    rt = runtime_factory(2, start_method="exec")
    rt.submit(spoil_the_headers, places, value).result()
    old = pids(rt)
    send(rt._core._zygote.pid, signal.SIGKILL)
    until(lambda: len(all_ready(rt)) == 2 and not old & pids(rt), lambda: f"new workers: {rt.workers()}")
    data = bytes(range(256)) * 4000
    assert list(rt.map(bytes, [data] * 8)) == [data] * 8
    settled(rt)
    shut_down_clean(rt)


def spoil_busy():
    scribbling.put(scribbling.Slot().at + BUSY, 2**63)


BUSY = 352  # of slot_t


def test_times_that_make_no_sense(runtime_factory):
    """A worker that says it has worked for 292 years, and the next one in its place too."""
    rt = runtime_factory(1)
    for _ in range(3):
        rt.submit(spoil_busy).result()
        (worker,) = rt.workers()
        assert 0 <= worker.busy <= 3 * time.monotonic()
        send(worker.pid, signal.SIGKILL)
        until(lambda gone=worker.pid: gone not in all_ready(rt).values(), "a new worker")
    shut_down_clean(rt)
