"""Which compiled bytecode a reloaded generation believes.

Python takes the bytecode of a module if that names the second and the size of the source as they are now. An
edit within the same second that keeps the size is not seen, nor is a file that was put there with the times
of another (cp -p, archives without times). So a zygote that imports code anew believes only bytecode that is
clearly younger than the last change of the source's inode, which nobody can date back; any other is compiled
again, and written again, so that the next one believes it. The standard library is taken as it is.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import SourceFileLoader

__all__ = ["beware_of_old_bytecode"]

_MARGIN_NS = 2_000_000_000  # from reading a source to writing its bytecode; and the clocks of file systems


def beware_of_old_bytecode() -> None:
    """From now on, in this process and its forks."""
    SourceFileLoader.get_data = _get_data  # type: ignore[method-assign, assignment]


_read = SourceFileLoader.get_data


def _get_data(self: SourceFileLoader, path: str) -> bytes:
    """As FileLoader.get_data. Raises: OSError, too, for bytecode that may be older than its source."""
    if path.endswith(".pyc") and not _believable(path, self.path):
        raise OSError(f"{path} may be older than {self.path}")
    return _read(self, path)


def _believable(bytecode: str, source: str) -> bool:
    library = getattr(sys, "_stdlib_dir", None)
    if library and source.startswith(library + os.sep) and "-packages" + os.sep not in source:
        return True
    return os.stat(bytecode).st_mtime_ns > os.stat(source).st_ctime_ns + _MARGIN_NS
