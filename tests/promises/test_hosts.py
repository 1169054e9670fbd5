"""Promise 16: from each of twelve kinds of host: nothing hangs, lines come once, random streams differ."""

from __future__ import annotations

import os

import pytest
from hosts import HOSTS, missing


def test_every_kind_of_host(tally, tmp_path):
    lacking = {name: modules for name in HOSTS if (modules := missing(name))}
    strict = tally.is_slice or os.environ.get("RUNTIME_ALL_HOSTS")
    assert not (lacking and strict), f"all hosts are wanted; not installed: {lacking}"
    while tally.more():
        for name, start in HOSTS.items():
            if name in lacking:
                continue
            folder = tmp_path / f"{name}-{tally.counts['hosts']}".replace(" ", "")
            folder.mkdir()
            try:
                start(folder)
            except BaseException as error:
                error.add_note(f"host: {name}")
                raise
            tally.counts["hosts"] += 1
        if lacking:
            pytest.skip(f"{tally.counts['hosts']} of {len(HOSTS)} hosts are well; not installed: {lacking}")


def test_there_are_twelve():
    assert len(HOSTS) == 12
