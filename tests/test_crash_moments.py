"""The crash matrix in time: what is lost when a worker or its zygote is killed at an awkward moment, or a
worker stopped and continued.

moment × (worker killed, zygote killed, worker stopped and continued) → expected outcome. At each moment the
worker says where it is, by leaving its pid in a file, and waits for another file before it goes on; where it
cannot wait (a transfer by value is compiled code) the payload is so large that it is still under way.

    start      in the initializer · in an import of its own · ready, before its first task
    map        between two items
    by value   as the arguments come, as the result goes, piece by piece
    end        asked to leave (recycling) · as the host shuts down
"""

from __future__ import annotations

import atexit
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evil
import pytest
from watching import alive, all_ready, read_pids, send, settled, shut_down_clean, stopped, until, zygote_of

from runtime import TaskCancelled, WorkerDied

LARGE = 32 << 20  # bytes; the region has one MiB, so this goes in more than a hundred pieces
INNOCENTS = 12


@dataclass
class Place:
    """Where the two sides meet: files that a worker leaves, and the one it waits for."""

    folder: Path

    @property
    def go(self) -> Path:
        return self.folder / "go"

    @property
    def here(self) -> Path:
        return self.folder / "here"

    @property
    def paths(self) -> tuple[str, str, str]:
        return str(self.go), str(self.here), str(self.folder / "once")


@dataclass
class Moment:
    """A worker that has come to it. `held`: the future of the task it has, and the value it should have."""

    rt: Any
    pid: int
    held: Any = None
    value: Any = None
    over: bool = False  # the runtime was asked to end


def pause(go: str, here: str, once: str) -> None:
    """The first one to come here waits."""
    try:
        os.mkdir(once)
    except FileExistsError:
        return
    evil.wait_for(go, here)


# ---- the moments ---------------------------------------------------------------------------------


def in_the_initializer(factory: Any, place: Place, _: Any) -> Moment:
    rt = factory(2, initializer=pause, initargs=place.paths)
    return Moment(rt, read_pids(place.here)[0])


def in_an_import(factory: Any, place: Place, patch: Any) -> Moment:
    """A module that leaves a thread is imported in each worker instead of the zygote."""
    patch.syspath_prepend(str(place.folder))
    (place.folder / "pausing_module.py").write_text(
        f"""if True:
        import os, threading, time
        import test_crash_moments
        marker = {str(place.folder / "zygote")!r}
        if os.path.exists(marker):
            test_crash_moments.pause(*{place.paths!r})
        else:
            os.mkdir(marker)
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    """
    )
    rt = factory(2, preload="pausing_module")
    return Moment(rt, read_pids(place.here)[0])


def right_after_ready(factory: Any, place: Place, _: Any) -> Moment:
    rt = factory(2)
    return Moment(rt, all_ready(rt)[0])


def between_two_items(factory: Any, place: Place, _: Any) -> Moment:
    """A builtin lets no signal handler run: it comes when the item is over, before the next one begins."""
    rt = factory(1, retries=1, initializer=pause_at_signal, initargs=place.paths)
    (pid,) = all_ready(rt).values()
    results = rt.map(max, [range(3_000)] * 3_000, chunksize=1_000)
    until(lambda: rt.workers()[0].task is not None, "it works")
    send(pid, signal.SIGUSR1)
    assert read_pids(place.here) == [pid]
    return Moment(rt, pid, results, [2_999] * 3_000)


def pause_at_signal(*paths: str) -> None:
    signal.signal(signal.SIGUSR1, lambda *_: pause(*paths))


def as_arguments_come(factory: Any, place: Place, _: Any) -> Moment:
    rt = factory(2, region_size="1MiB", region_max="1MiB")
    pids = all_ready(rt)
    future = rt.submit(note_and_measure, str(place.here), bytes(LARGE))
    number = until(lambda: [i.number for i in rt.workers() if i.task is not None], "it is claimed")[0]
    assert not place.here.exists(), "it has got everything already"
    return Moment(rt, pids[number], future, LARGE)


def note_and_measure(here: str, data: bytes) -> int:
    evil.note(here)
    return len(data)


def as_the_result_goes(factory: Any, place: Place, _: Any) -> Moment:
    rt = factory(2, region_size="1MiB", region_max="1MiB")
    all_ready(rt)
    future = rt.submit(Noted, str(place.here))
    return Moment(rt, read_pids(place.here)[0], future, LARGE)


class Noted:
    """A large result that says when it is pickled."""

    def __init__(self, here: str) -> None:
        self.here = here

    def __reduce__(self) -> Any:
        evil.note(self.here)
        return len, (bytes(LARGE),)


def asked_to_leave(factory: Any, place: Place, _: Any) -> Moment:
    """It has run its last task, and is held up by a callback of atexit."""
    rt = factory(2, max_tasks_per_child=1)
    assert rt.submit(pause_at_exit, *place.paths).result(30)
    return Moment(rt, read_pids(place.here)[0])


def pause_at_exit(*paths: str) -> bool:
    atexit.register(pause, *paths)
    return True


def as_the_host_shuts_down(factory: Any, place: Place, _: Any) -> Moment:
    rt = factory(2)
    all_ready(rt)
    future = rt.submit(evil.wait_for, str(place.go), str(place.here))
    (pid,) = read_pids(place.here)
    rt.shutdown(wait=False)
    return Moment(rt, pid, future, pid, over=True)


def at_the_end_of_a_shutdown(factory: Any, place: Place, _: Any) -> Moment:
    rt = factory(2)
    assert rt.submit(pause_at_exit, *place.paths).result(30)
    rt.shutdown(wait=False)
    return Moment(rt, read_pids(place.here)[0], over=True)


MOMENTS = {
    "initializer": in_the_initializer,
    "import": in_an_import,
    "ready": right_after_ready,
    "between items": between_two_items,
    "arguments by value": as_arguments_come,
    "result by value": as_the_result_goes,
    "asked to leave": asked_to_leave,
    "shutdown": as_the_host_shuts_down,
    "end of shutdown": at_the_end_of_a_shutdown,
}
pytestmark = pytest.mark.filterwarnings("ignore:preload module:RuntimeWarning")  # in_an_import
moments = pytest.mark.parametrize("name", list(MOMENTS))

# What of a killed worker the task that it had is told; a retry of an item is none of it.
BLAMED = ("arguments by value", "result by value", "shutdown")


@pytest.fixture
def reach(runtime_factory, tmp_path, monkeypatch):
    """Come to a moment; in the end nobody waits any more."""
    place = Place(tmp_path)

    def reach(name: str) -> Moment:
        moment = MOMENTS[name](runtime_factory, place, monkeypatch)
        assert alive(moment.pid)
        moment.place = place  # type: ignore[attr-defined]
        return moment

    yield reach
    place.go.touch()


def value_of(held: Any) -> Any:
    return held.result(60) if hasattr(held, "result") else list(held)


def others_work(moment: Moment) -> None:
    """While the moment lasts, and after it."""
    if not moment.over and len(moment.rt.workers()) > 1:
        futures = [moment.rt.submit(evil.square, i) for i in range(INNOCENTS)]
        assert [f.result(30) for f in futures] == [i * i for i in range(INNOCENTS)]


def all_is_well(moment: Moment) -> None:
    """Every worker is there, everything has ended once, and every block is back."""
    rt = moment.rt
    if not moment.over:
        others_work(moment)
        all_ready(rt)
        settled(rt)
    moment.held = None
    shut_down_clean(rt)
    assert not alive(moment.pid)


@moments
def test_the_worker_is_killed(reach, name):
    moment = reach(name)
    send(moment.pid, signal.SIGKILL)
    until(lambda: not alive(moment.pid), "it is dead")
    others_work(moment)
    moment.place.go.touch()
    if name in BLAMED:
        error = moment.held.exception(30)
        assert type(error) is WorkerDied
        assert (error.pid, error.signal, error.attempts) == (moment.pid, signal.SIGKILL, 1)
    elif moment.held is not None:
        assert value_of(moment.held) == moment.value
    all_is_well(moment)


@pytest.mark.stress  # half a minute in all
@moments
def test_the_zygote_is_killed(reach, name):
    """A worker that runs a task finishes it, and is then replaced; one that was starting is made anew."""
    moment = reach(name)
    zygote = until(lambda: zygote_of(moment.pid), "it has a zygote")
    send(zygote, signal.SIGKILL)
    until(lambda: not alive(zygote), "it is dead")
    others_work(moment)
    moment.place.go.touch()
    if moment.held is not None:
        assert value_of(moment.held) == moment.value
    if not moment.over:
        until(
            lambda: (pids := all_ready(moment.rt).values()) and not any(zygote_of(p) == zygote for p in pids)
            and moment.pid not in pids,
            "its workers are replaced",
        )  # fmt: skip
    all_is_well(moment)


@moments
def test_the_worker_is_stopped_and_goes_on(reach, name):
    """It is not taken for dead, however long that lasts; nobody else waits for it."""
    moment = reach(name)
    send(moment.pid, signal.SIGSTOP)
    try:
        until(lambda: stopped(moment.pid), "it has stopped")
        others_work(moment)
        assert stopped(moment.pid)
        moment.place.go.touch()
        if name in BLAMED or name == "between items":
            assert not getattr(moment.held, "done", lambda: False)()
    finally:
        send(moment.pid, signal.SIGCONT)
    if moment.held is not None:
        assert value_of(moment.held) == moment.value
    if name in ("initializer", "import", "ready", *BLAMED) and not moment.over:
        assert moment.pid in all_ready(moment.rt).values(), "it was replaced"
    all_is_well(moment)


@pytest.mark.parametrize("name", BLAMED)
def test_a_stopped_worker_can_be_cancelled(reach, name):
    """Also before its task's own code has begun, and after that."""
    moment = reach(name)
    send(moment.pid, signal.SIGSTOP)
    until(lambda: stopped(moment.pid), "it has stopped")
    assert moment.rt.cancel(moment.held, running=True)
    assert type(moment.held.exception(30)) is TaskCancelled
    until(lambda: not alive(moment.pid), "it is gone")
    moment.place.go.touch()
    all_is_well(moment)
