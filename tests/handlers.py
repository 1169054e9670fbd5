"""A signal handler that runs at every place where one may: tests of what it finds locked.

Python runs handlers in the main thread, between bytecodes. So instead of waiting for a signal to strike the
one place where it would hurt, the handler is called before each bytecode in turn, of the package and of what
it calls: each place once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

Place = tuple[CodeType, int]  # and the number of a bytecode in it, or of a line


def strike(
    call: Callable[[], object],
    handler: Callable[[], object],
    seen: set[Place],
    most: int = 1,
    files: tuple[str, ...] = ("",),
    lines: bool = False,
) -> int:
    """Call, with the handler before some bytecodes that are not in `seen` yet, at most so many; how many.

    Bytecodes of files whose names contain one of `files`; never those of the handler itself. lines: one
    bytecode of each line.
    """
    struck = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal struck
        if struck >= most:
            return None
        frame.f_trace_opcodes = True
        place = (frame.f_code, frame.f_lineno if lines else frame.f_lasti)
        if (
            event == "opcode"
            and place not in seen
            and any(name in frame.f_code.co_filename for name in files)
        ):
            seen.add(place)
            struck += 1
            handler()  # no trace function is called meanwhile
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return struck


def strike_everywhere(
    call: Callable[[], object],
    handler: Callable[[], object],
    files: tuple[str, ...] = ("/runtime/",),
    most: int = 1,
) -> int:
    """Call again and again, until the handler has run at every place once. How many there were.

    most: places in one call.
    """
    seen: set[Place] = set()
    while strike(call, handler, seen, most, files):
        pass
    return len(seen)
