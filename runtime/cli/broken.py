"""Where the package does not load, its command still starts: `runtime doctor` is there to say why.

Python imports the package before its command, in `python -m runtime` and in the script `runtime` alike.
So the package asks here, when its imports fail, whether it is the command that is being started.
"""

from __future__ import annotations

import os
import sys

__all__ = ["keep", "reason", "told"]

reason: Exception | None = None
"""Why the package did not load; None: it did."""


def keep(error: Exception) -> bool:
    """True if the command takes this error as its own; for everybody else the import has to fail."""
    global reason
    if not _is_command():
        return False
    reason = error
    return True


def told() -> str:
    """The reason in one line."""
    return f"does not load: {type(reason).__name__}: {reason}".rstrip(". ")


def _is_command() -> bool:
    argv: list[str] = getattr(sys, "argv", [])  # a program that embeds Python may have none
    if not argv:
        return False
    if argv[0] == "-m":  # so it reads until Python has found the module's file
        return sys.orig_argv[-len(argv)].removeprefix("-m") == "runtime"
    return os.path.basename(argv[0]) == "runtime"
