"""Promise 10: of a worker, a zygote, a host that is killed nothing is left over after a second.

    processes    no child, no grandchild, no zombie of ours
    host         the descriptors that it had before, of each kind
    files        nothing in the socket folder's place, in TMPDIR, in /dev/shm
    segment      after the host: nobody maps the region or holds it open

Each second host has children of its own that inherited everything; they live on, and are spared.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from watching import alive, family, fields, host, send, until

WITHIN = 1.0  # seconds, promised

# Answers each line of its standard input by one of its own.
HOST = """if True:
    import os, subprocess, sys, time
    import evil, runtime
    from watching import all_ready, parent, read_pids, settled
    folder, extra = sys.argv[1:3]
    own = []
    def child():
        if (pid := os.fork()) == 0:
            sys.stdin.close()
            evil.wait_for(folder + "/go")
            os._exit(0)
        own.append(pid)
    if extra:
        child()
    rt = runtime.Runtime(2)
    all_ready(rt)
    if extra:
        child()                            # one that has inherited all descriptors, and the memory
        own.append(subprocess.Popen(["sleep", "600"], close_fds=False).pid)
    print(*own, flush=True)
    laps = 0
    for line in sys.stdin:
        laps += 1
        if line == "busy\\n":              # a worker with descendants: its pid, and theirs
            path = f"{folder}/started{laps}"
            rt.submit(evil.hang_with_children, path, ("plain", "session", "daemon")[laps % 3])
            print(*read_pids(path, 2), flush=True)
        else:                              # "idle": the zygote and its workers, once all are ready
            while True:
                workers = list(all_ready(rt).values())
                zygotes = {parent(pid) for pid in workers}
                if len(zygotes) == 1 and parent(min(zygotes)) == os.getpid():
                    break
            print(*zygotes, *workers, flush=True)
"""


def ask(one, what):
    one.process.stdin.write(f"{what}\n")
    one.process.stdin.flush()
    return one.pids()


def descriptors(pid):
    """How many of each kind a process has: pipe, socket, memfd:NAME, anon_inode:[eventpoll] …"""
    kinds = Counter()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            kinds[re.sub(r":\[\d+\]$|/\d+$", "", os.readlink(path))] += 1
    return kinds


def files():
    """What there is where a runtime may leave something."""
    found = set()
    for folder in (os.environ["XDG_RUNTIME_DIR"], os.environ["TMPDIR"], "/dev/shm"):
        if os.path.isdir(folder):
            found.update(f"{folder}/{name}" for name in os.listdir(folder))
    return found


def region_of(pid):
    """The inode of the memfd that this process maps as its region."""
    return re.search(r" (\d+) +/memfd:runtime", Path(f"/proc/{pid}/maps").read_text())[1]


def holders(inode):
    """Who maps that memfd or has it open."""
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if re.search(rf" {inode} +/memfd:runtime", Path(f"/proc/{name}/maps").read_text()):
                found.add(int(name))
            for path in Path(f"/proc/{name}/fd").iterdir():
                if os.stat(path).st_ino == int(inode) and "memfd:" in os.readlink(path):
                    found.add(int(name))
    return found


def kill(pid):
    """When it was."""
    begin = time.monotonic()
    send(pid, signal.SIGKILL)
    return begin


def exists(pid):
    return bool(fields(pid))


def gone(tally, what, begin, left):
    """Wait until `left()` says that nothing is; note how long that took."""
    until(lambda: not left(), lambda: f"{what}: left over: {left()}", 10 * WITHIN + 20)
    tally.timed(what, WITHIN, begin, time.monotonic())


def kill_worker(tally, one, before):
    """A busy one: it and its descendants are gone, waited for, and the host has closed all that was its."""
    worker, child = ask(one, "busy")
    begin = kill(worker)
    gone(tally, "worker", begin, lambda: [fields(pid)[:3] for pid in (worker, child) if exists(pid)])
    ask(one, "idle")
    until(
        lambda: descriptors(one.pid) == before,
        lambda: f"descriptors: before {before}, now {descriptors(one.pid)}",
        10,
    )
    tally.counts["workers"] += 1


def kill_zygote(tally, one, before):
    """It is waited for, its workers are replaced, and the host has the same descriptors again."""
    zygote, *workers = ask(one, "idle")
    begin = kill(zygote)
    gone(tally, "zygote", begin, lambda: [fields(pid)[:3] for pid in (zygote,) if exists(pid)])
    gone(tally, "workers of a dead zygote", begin, lambda: [pid for pid in workers if alive(pid)])
    ask(one, "idle")
    until(
        lambda: descriptors(one.pid) == before,
        lambda: f"descriptors: before {before}, now {descriptors(one.pid)}",
        10,
    )
    tally.counts["zygotes"] += 1


def kill_host(tally, one, spared, before):
    """Everything of it is gone, but for the children that are its own."""
    zygote, *workers = ask(one, "idle")
    inode = region_of(zygote)
    worker, child = ask(one, "busy")
    ours = {one.pid, zygote, worker, child, *workers}
    assert ours - {child} <= holders(inode)
    assert files() - before, "a live host has a folder"
    begin = time.monotonic()
    one.process.kill()

    def left():
        one.process.poll()  # its parent is this process: it must be waited for here
        return [
            *(("process", pid, fields(pid)[:3]) for pid in ours if alive(pid)),
            *(("process", pid) for pid in family(one.mark) - spared),
            *(("file", path) for path in files() - before),
            *(("region", pid) for pid in holders(inode) - spared),
        ]

    gone(tally, "host", begin, left)
    assert all(alive(pid) for pid in spared)
    assert one.process.wait(10) == -signal.SIGKILL
    tally.counts["hosts"] += 1


def test_nothing_is_left_of_what_is_killed(tally, tmp_path):
    while tally.more():
        before = files()
        folder = tmp_path / str(tally.counts["hosts"])
        folder.mkdir()
        extra = "children" if tally.counts["hosts"] % 2 else ""
        with host(HOST, str(folder), extra) as one:
            spared = frozenset(one.pids())
            ask(one, "idle")
            until(lambda one=one: not list_sockets(one), "the socket folder is empty")
            descriptors_before = descriptors(one.pid)
            kill_worker(tally, one, descriptors_before)
            kill_zygote(tally, one, descriptors_before)
            kill_host(tally, one, spared, before)
            (folder / "go").touch()


def list_sockets(one):
    """Paths of sockets of our runtimes: unlinked as soon as a worker is connected."""
    base = Path(os.environ["XDG_RUNTIME_DIR"])
    return [path for folder in base.glob("runtime-*") for path in folder.iterdir()]
