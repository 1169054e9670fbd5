"""`--reload`: source files are watched, and a change has the code reloaded. For development."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator

from runtime.cli.exits import Usage

__all__ = ["watch"]

log = logging.getLogger("runtime")


@contextlib.contextmanager
def watch(folders: Iterable[str], reload: Callable[[], None]) -> Iterator[None]:
    """While this lasts, `reload` is called when a .py, .pyi or .so file in one of the folders changes.

    Raises: Usage if watchfiles is not installed, or a folder does not exist.
    """
    try:
        import watchfiles
    except ImportError:
        raise Usage("--reload needs watchfiles: pip install 'runtime-workers[reload]'") from None
    folders = list(folders)
    for folder in folders:
        if not os.path.isdir(folder):
            raise Usage(f"--reload-dir: there is no folder {folder!r}")
    ended = threading.Event()

    def run() -> None:
        changes = watchfiles.watch(
            *folders, watch_filter=watchfiles.PythonFilter(extra_extensions=(".so",)), stop_event=ended
        )
        for changed in changes:
            log.info("changed: %s", ", ".join(sorted({os.path.relpath(path) for _, path in changed})[:5]))
            reload()

    thread = threading.Thread(target=run, name="runtime-watchfiles", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5.0)
