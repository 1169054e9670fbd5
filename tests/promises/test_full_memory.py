"""Promise 9: full memory is an exception, never SIGBUS: in the host, in workers, in whatever way it is full.

What is scarce is in hoarding.py, each in a process of its own: what the machine has, what its files may have,
its address space, a /dev/shm of 1 MiB, the memory of a cgroup. The last two need rights; where these are
lacking a warning says so.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from watching import environment, until

from runtime import limits

CODE = "import sys; sys.path.append(sys.argv[2]); import hoarding; hoarding.main()"
EACH = 20  # refusals of one process
LIMIT = 96 << 20  # bytes of the cgroup
MOUNT = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]


def hoard(place, seed, prefix=(), start=None):
    """What a process has counted in a place."""
    settings = json.dumps({"place": place, "seed": seed, "count": EACH})
    done = subprocess.run(
        [*prefix, sys.executable, "-c", CODE, settings, str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=200, env=environment(), preexec_fn=start,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"place {place!r}, seed {seed!r}: exit code {done.returncode}\n{done.stdout}{done.stderr[-3000:]}"
    )
    return json.loads(done.stdout)


@contextlib.contextmanager
def group():
    """A memory cgroup below our own, with a limit: its file for pids. Raises: OSError where it cannot be."""
    for version, folder in limits.memory_groups("/"):
        path = Path(folder) / f"runtime-test-{os.getpid()}"
        path.mkdir()
        try:
            (path / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(LIMIT))
            yield path / "cgroup.procs"
        finally:
            until(functools.partial(removed, path), f"the last process has left {path}")
        return
    raise OSError("there is no memory cgroup")


def removed(path):
    """Whether a cgroup could be removed. For a moment after its last process was waited for it is busy."""
    try:
        path.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def places():
    """What can be scarce here: name -> a function that hoards in it. Says what cannot."""
    found = {
        place: lambda seed, place=place: hoard(place, seed)
        for place in ("machine", "file size", "address space")
    }
    if shutil.which("unshare") and subprocess.run([*MOUNT, "true"], capture_output=True).returncode == 0:
        found["tmpfs"] = lambda seed: hoard("tmpfs", seed, MOUNT)
    else:
        warnings.warn("no right to mount a tmpfs: that part of promise 9 is left out", stacklevel=1)
    try:
        with group():
            found["cgroup"] = in_group
    except OSError as error:
        warnings.warn(
            f"no memory cgroup can be made ({error}): that part of promise 9 is left out", stacklevel=1
        )
    return found


def in_group(seed):
    with group() as procs:
        return hoard("cgroup", seed, start=lambda: procs.write_text(str(os.getpid())))


def test_a_group_that_is_busy_for_a_moment(monkeypatch, tmp_path):
    refusals = [errno.EBUSY] * 3

    def rmdir(path):
        if refusals:
            raise OSError(refusals.pop(), "Device or resource busy")
        shutil.rmtree(path)

    monkeypatch.setattr(limits, "memory_groups", lambda root: [(2, tmp_path)])
    monkeypatch.setattr(Path, "rmdir", rmdir)
    with group() as procs:
        assert procs.parent.is_dir()
    assert not refusals and not list(tmp_path.iterdir())


def test_full_memory_is_an_exception(tally):
    found = places()
    lap = 0
    while tally.more():
        for place, run in found.items():
            lap += 1
            counts = run(f"{tally.seed} {lap}")
            tally.counts["over-allocations"] += counts["refused"]
            tally.counts.update(
                {f"{place}: {what}": count for what, count in counts.items() if ":" not in what}
            )
            print(place, counts)
