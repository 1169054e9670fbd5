"""What a SIGKILL is put down to: the counters of cgroups, recorded and made, and real workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tasks
from watching import all_ready, send

from runtime import Runtime, TaskTimeout, WorkerDied, limits
from runtime.oom import MemoryWatch

V2 = {
    "proc/41/cgroup": "0::/pod/worker\n",
    "proc/41/mountinfo": "29 22 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/pod/worker/memory.events": "low 0\nhigh 12\nmax 7\noom 4\noom_kill 3\noom_group_kill 0\n",
    "sys/fs/cgroup/pod/worker/memory.max": "536870912\n",
}
V1 = {
    "proc/41/cgroup": "9:cpu,cpuacct:/w\n5:memory:/w\n",
    "proc/41/mountinfo": "35 28 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    "sys/fs/cgroup/memory/w/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    "sys/fs/cgroup/memory/w/memory.limit_in_bytes": "536870912\n",
}
COUNTER = {
    "v2": "sys/fs/cgroup/pod/worker/memory.events",
    "v1": "sys/fs/cgroup/memory/w/memory.oom_control",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def count(root: Path, version: str, kills: int) -> None:
    (root / COUNTER[version]).write_text(f"oom 9\noom_kill {kills}\n")


BOTH = pytest.mark.parametrize(("version", "tree"), [("v2", V2), ("v1", V1)])


@BOTH
def test_a_counter_that_rose_says_out_of_memory(version: str, tree: dict[str, str], tmp_path: Path) -> None:
    plant(tmp_path, tree)
    watch = MemoryWatch(str(tmp_path))
    before = watch.reading(41)
    assert before.kills == 3
    assert watch.suspicion(before, None) == ""
    count(tmp_path, version, 4)
    text = watch.suspicion(before, 600 << 20)
    for part in ("probably out of memory", "from 3 to 4", "limit is 512 MiB", "600 MiB"):
        assert part in text


@BOTH
def test_one_rise_explains_one_death(version: str, tree: dict[str, str], tmp_path: Path) -> None:
    plant(tmp_path, tree)
    watch = MemoryWatch(str(tmp_path))
    first, second = watch.reading(41), watch.reading(41)
    count(tmp_path, version, 4)
    third = watch.reading(41)
    assert "out of memory" in watch.suspicion(first, None)
    assert watch.suspicion(second, None) == ""
    count(tmp_path, version, 6)
    assert "out of memory" in watch.suspicion(second, None)
    assert "out of memory" in watch.suspicion(third, None)
    assert watch.suspicion(watch.reading(41), None) == ""


def test_an_ancestor_counts_where_the_group_has_no_counter(tmp_path: Path) -> None:
    plant(tmp_path, V2)
    counter = tmp_path / COUNTER["v2"]
    (tmp_path / "sys/fs/cgroup/pod/memory.events").write_text("oom_kill 8\n")
    assert limits.oom_kills(limits.memory_groups(str(tmp_path), 41)) == 3
    counter.unlink()
    assert limits.oom_kills(limits.memory_groups(str(tmp_path), 41)) == 8


@pytest.mark.parametrize("text", ["", "oom_kill\n", "oom_kill many\n", "oom_kill -1\n", "low 0\n\x00"])
def test_without_a_readable_counter_it_says_where_to_look(text: str, tmp_path: Path) -> None:
    plant(tmp_path, {**V2, COUNTER["v2"]: text})
    watch = MemoryWatch(str(tmp_path))
    for before in (None, watch.reading(41), watch.reading(999)):
        said = watch.suspicion(before, 1 << 20)
        assert "may have been the kernel's OOM killer" in said and "dmesg" in said
        assert "probably" not in said


def test_a_counter_that_has_gone(tmp_path: Path) -> None:
    plant(tmp_path, V2)
    watch = MemoryWatch(str(tmp_path))
    before = watch.reading(41)
    (tmp_path / COUNTER["v2"]).unlink()
    assert "dmesg" in watch.suspicion(before, None)


# ---- real workers ------------------------------------------------------------------------------------


def kill_self_and_count(counter: str, kills: int) -> None:
    """As the kernel does: first the counter, then the signal."""
    with open(counter, "w") as file:
        file.write(f"oom_kill {kills}\n")
    tasks.kill_self()


def watching(rt: Runtime, root: Path, tree: dict[str, str]) -> None:
    """From the next worker on, the counters are those of the tree."""
    plant(root, {name: text for name, text in tree.items() if not name.startswith("proc")})
    watch = MemoryWatch(str(root))
    reading = watch.reading

    def planted(pid: int):  # type: ignore[no-untyped-def]
        plant(root, {n.replace("41", str(pid)): t for n, t in tree.items() if n.startswith("proc")})
        return reading(pid)

    watch.reading = planted  # type: ignore[method-assign]
    rt._core._memory = watch


@BOTH
def test_a_worker_that_the_kernel_has_killed(
    factory: Callable[..., Runtime], tmp_path: Path, version: str, tree: dict[str, str]
) -> None:
    rt = factory(1)
    all_ready(rt)
    watching(rt, tmp_path, tree)
    assert isinstance(rt.submit(tasks.kill_self).exception(), WorkerDied)
    all_ready(rt)
    error = rt.submit(kill_self_and_count, str(tmp_path / COUNTER[version]), 4).exception()
    assert isinstance(error, WorkerDied)
    assert error.signal == signal.SIGKILL and error.rss
    assert "probably out of memory" in error.reason and "from 3 to 4" in error.reason
    assert "SIGKILL" in error.reason and error.reason in str(error)


def test_other_ends_are_not_put_down_to_memory(factory: Callable[..., Runtime], tmp_path: Path) -> None:
    rt = factory(1)
    all_ready(rt)
    watching(rt, tmp_path, {"proc/41/cgroup": "0::/\n"})  # no counter
    rt.submit(tasks.kill_self).exception()
    (pid,) = all_ready(rt).values()
    future = rt.submit(tasks.hang)
    while not future.running():
        os.sched_yield()
    send(pid, signal.SIGKILL)
    foreign = future.exception()
    assert isinstance(foreign, WorkerDied) and "may have been the kernel's OOM killer" in foreign.reason
    for number in (signal.SIGSEGV, signal.SIGTERM):
        error = rt.submit(kill_self_with_default, number).exception()
        assert isinstance(error, WorkerDied) and "OOM" not in error.reason
    assert isinstance(rt.options(timeout=0.1).submit(tasks.hang).exception(), TaskTimeout)


def kill_self_with_default(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    tasks.kill_self(number)
