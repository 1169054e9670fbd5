"""What the exit codes of the command mean."""

from typing import Final

__all__ = ["FAILED", "INTERRUPTED", "OK", "UNREACHABLE", "USAGE", "Usage"]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2  # the command line is wrong; nothing was started
UNREACHABLE: Final = 3  # ctl: nobody answers under this name
INTERRUPTED: Final = 130  # Ctrl-C, as a shell reports it: 128 + SIGINT


class Usage(Exception):
    """The command line cannot be carried out: one line that says why and what to write instead."""
