"""Is a recorded history of one key linearizable? A search as Wing and Gong's, with the states seen kept.

An operation has the time at which it was called and at which it returned (the same clock for all
processes); one whose process was killed has no return, and may have happened at any time after its call, or
not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FOREVER = 1 << 63


class Op(NamedTuple):
    """get, set, delete, add or cas, its arguments, and what it has returned."""

    kind: str
    args: tuple[int | None, ...]
    result: object
    called: int
    returned: int = FOREVER  # FOREVER: its process was killed

    @property
    def known(self) -> bool:
        return self.returned != FOREVER


def apply(op: Op, value: int | None) -> tuple[object, int | None]:
    """(result, value afterwards) of an operation on a register of one key."""
    if op.kind == "get":
        return value, value
    if op.kind == "set":
        return None, op.args[0]
    if op.kind == "delete":
        return value is not None, None
    if op.kind == "add":
        total = (value or 0) + (op.args[0] or 0)
        return total, total
    if op.kind == "cas":
        return (True, op.args[1]) if value == op.args[0] else (False, value)
    raise ValueError(op.kind)


def linearizable(history: Sequence[Op], start: int | None = None) -> bool:
    """Some order of the operations that agrees with real time gives every result that was seen."""
    ops = sorted(history, key=lambda op: op.called)
    everything = sum(1 << i for i, op in enumerate(ops) if op.known)
    seen: set[tuple[int, int | None]] = set()
    stack: list[tuple[int, int | None]] = [(0, start)]
    while stack:
        done, value = stack.pop()
        if done & everything == everything:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        first = min(op.returned for i, op in enumerate(ops) if not done >> i & 1)
        for i, op in enumerate(ops):
            if op.called > first:
                break
            if done >> i & 1:
                continue
            result, after = apply(op, value)
            if not op.known or result == op.result:
                stack.append((done | 1 << i, after))
    return False


def overlapping(history: Sequence[Op]) -> float:
    """The share of operations that were under way together with another one."""
    ops = sorted(history, key=lambda op: op.called)
    touching = set()
    for i, op in enumerate(ops):
        for j in range(i + 1, len(ops)):
            if ops[j].called > op.returned:
                break
            touching |= {i, j}
    return len(touching) / max(1, len(ops))
