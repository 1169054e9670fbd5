"""Promises 12 and 13: reloads under load lose and double no task, and broken code is refused.

Two producers keep the queue filled, one with calls, one with maps, while a reload follows the other;
in a fourth of the rounds the new code is broken in some way. Nobody is killed here (the tests of reloads do
that at each moment, the storm at any), so each task must have run exactly once, and as many workers as there
are numbers must have been ready at every look: one more than was promised.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import threading
from collections import Counter

import pytest
from watching import all_ready, settled, shut_down_clean, until

from runtime import ReloadFailed, WorkerStatus

WORKERS = 2
MODULE = "promised_code"
TEXT = """
import os, time
VERSION = {version}
def work(path, key):
    with open(path, "ab", buffering=0) as file:
        file.write(b"%s\\n" % key.encode())
    time.sleep(0.0005)
    return key, VERSION
def setup():
    {setup}
{more}
"""
BROKEN = (
    {"more": "def (:"},
    {"more": "import there_is_no_such_module"},
    {"more": "os._exit(3)"},
    {"setup": "raise ValueError('not yet')"},
    {"setup": "os._exit(4)"},
    {"setup": "time.sleep(1000)"},
)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes a version of the module."""

    def write(version, setup="pass", more=""):
        (tmp_path / f"{MODULE}.py").write_text(TEXT.format(version=version, setup=setup, more=more))

    write(1)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    sys.modules.pop(MODULE, None)


class Load:
    """What runs all the time, and what is looked at meanwhile."""

    def __init__(self, rt, path, work):
        self.rt, self.path, self.work = rt, str(path), work
        self.stopping = threading.Event()
        self.problems: list[BaseException] = []
        self.expected: Counter[str] = Counter()
        self.fewest = WORKERS
        self.threads = [
            threading.Thread(target=self.guarded, args=(what,)) for what in (self.calls, self.maps, self.look)
        ]

    def guarded(self, what):
        try:
            what()
        except BaseException as error:
            self.problems.append(error)

    def took(self, outcomes, keys):
        assert [key for key, _ in outcomes] == keys, "a task has another's result"

    def calls(self):
        for n in itertools.count():
            if self.stopping.is_set():
                return
            keys = [f"c{n}.{i}" for i in range(100)]
            self.expected.update(keys)
            futures = [self.rt.submit(self.work, self.path, key) for key in keys]
            self.took([future.result(60) for future in futures], keys)

    def maps(self):
        for n in itertools.count():
            if self.stopping.is_set():
                return
            keys = [f"m{n}.{i}" for i in range(100)]
            self.expected.update(keys)
            self.took(list(self.rt.map(self.work, itertools.repeat(self.path), keys, timeout=60)), keys)

    def look(self):
        while not self.stopping.wait(0.001):
            ready = sum(info.status is WorkerStatus.READY for info in self.rt.workers())
            self.fewest = min(self.fewest, ready)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        if self.problems:
            raise self.problems[0]


def test_reloads_lose_no_task_and_broken_code_is_refused(tally, runtime_factory, code, tmp_path):
    module = importlib.import_module(MODULE)
    version = 1
    for wave in itertools.count():
        if not tally.more():
            return
        path = tmp_path / f"ran-{wave}"
        rt = runtime_factory(WORKERS, preload=[MODULE], initializer=module.setup)
        all_ready(rt)
        generation = rt.workers()[0].generation
        with Load(rt, path, module.work) as load:
            for n in range(12):
                if load.problems or not tally.more():
                    break
                version += 1
                if n % 4 == 3:
                    how = BROKEN[tally.counts["broken"] % len(BROKEN)]
                    code(version, **how)
                    before = all_ready(rt)
                    with pytest.raises(ReloadFailed):
                        rt.reload(timeout=1 if "sleep" in how.get("setup", "") else None)
                    assert all_ready(rt) == before
                    tally.counts["broken"] += 1
                    assert rt.submit(module.work, str(path), f"b{n}").result(60)[1] < version
                    load.expected[f"b{n}"] += 1
                    continue
                code(version)
                report = rt.reload()
                generation += 1
                assert (report.generation, report.started) == (generation, WORKERS)
                assert (report.drained, report.killed) == (WORKERS, 0)
                assert rt.submit(module.work, str(path), f"r{n}").result(60)[1] == version
                load.expected[f"r{n}"] += 1
                tally.counts["reloads"] += 1
        settled(rt)
        ran = Counter(path.read_text().split())
        assert ran == load.expected, (load.expected - ran, ran - load.expected)
        assert load.fewest >= WORKERS - 1, "fewer than all but one were ready"
        tally.counts["tasks"] += len(ran)
        tally.counts["looks with one less"] += load.fewest < WORKERS
        until(lambda rt=rt: len(rt._core._living()) == 1, "one zygote is left")
        shut_down_clean(rt)
        code(version := version + 1)
