"""What a worker does so that its output, log records and warnings are seen in the host.

    print, C code, children  ──►  descriptors 1 and 2, pipes to the host; lines leave when they are complete
    logging                  ──►  a handler on the root logger ──► the record channel
    warnings.warn            ──►  showwarning, after this process's filters ──► the record channel

A write waits while the host does not read, so nothing piles up on either side.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from runtime import _core, filters, logrecords

__all__ = ["adopt_streams", "flush", "forward_records"]


_old: list[TextIO] = []  # a stream that is dropped writes what it still has


# ---- text ----------------------------------------------------------------------------------------------


def adopt_streams() -> None:
    """Descriptors 1 and 2 are the host's pipes now: let whole lines through, of Python and of C.

    New stream objects: the old ones may have found out that they write to a file that can seek. A preloaded
    module may hold them, or have put its own in their place; these go on, line by line too.
    """
    for name, fd in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, f"__{name}__")
        new = open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        if getattr(sys, name) in (None, old):
            setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
        if old is not None:
            _old.append(old)
            with contextlib.suppress(AttributeError, OSError, ValueError):
                old.reconfigure(line_buffering=True)
    _core.line_buffer_stdio()
    # A child that a task forks would write what is in these buffers a second time.
    os.register_at_fork(before=flush)


def flush() -> None:
    """Let out what has no end of line yet."""
    for stream in (sys.stdout, sys.stderr, *_old):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    _core.flush_stdio()


# ---- log records and warnings --------------------------------------------------------------------------


def forward_records(channel: socket.socket, context: Callable[[], Any], levels: dict[str, int]) -> None:
    """From now on records and warnings go to the host. context: the Context of the thread that asks.
    levels: of the host's loggers, "" is the root's.
    """
    root = logging.getLogger()
    if not root.handlers:  # else a preloaded module has set up logging as it wants it
        root.setLevel(levels.get("", logging.WARNING))
    for name, level in levels.items():
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level)
    handler = _Handler(channel, context)
    root.addHandler(handler)

    plain_config, plain_show = logging.basicConfig, warnings.showwarning

    def basic_config(**arguments: Any) -> None:
        """It does nothing if the root has a handler; ours shall not count."""
        root.removeHandler(handler)
        try:
            plain_config(**arguments)
        finally:
            root.addHandler(handler)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if file is not None:
            plain_show(message, category, filename, lineno, file, line)
        elif filters.resolve():  # one of them may be about this
            warnings.warn_explicit(message, category, filename, lineno)
        else:
            _send(channel, logrecords.encode_warning(message, category, filename, lineno))

    logging.basicConfig = basic_config
    warnings.showwarning = show


def _send(channel: socket.socket, data: bytes) -> None:
    """One message; it waits for room. A host that does not listen any more is no error of the task's."""
    with contextlib.suppress(OSError):
        channel.send(data, socket.MSG_NOSIGNAL)


class _Handler(logging.Handler):
    """Sends records, but for those that a handler of the task's shows on this process's stdout or stderr:
    that text arrives in the host by itself.
    """

    def __init__(self, channel: socket.socket, context: Callable[[], Any]) -> None:
        super().__init__()
        self._channel = channel
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        if _is_shown(record):
            return
        try:
            context = self._context()
            data = logrecords.encode_log(record, context.number, context.task)
        except Exception:
            self.handleError(record)
            return
        _send(self._channel, data)


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a handler between the record's logger and the root writes it to stdout or stderr."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and record.levelno >= handler.level:
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    if handler.stream.fileno() in (1, 2):
                        return True
        logger = logger.parent if logger.propagate else None
    return False
