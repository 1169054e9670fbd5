"""`runtime run TARGET [args...]`: a function, a Runtime, and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from runtime import config
from runtime.cli import exits, options, targets
from runtime.cli.notify import Notifier
from runtime.cli.program import Program
from runtime.cli.progress import Progress
from runtime.executor import Runtime
from runtime.names import NameTaken, NoPlace

__all__ = ["command"]

_GRACE = 1.0  # seconds that running tasks have after Ctrl-C


def command(arguments: argparse.Namespace) -> int:
    """Carries out a parsed command line and returns the exit code.

    Raises: exits.Usage
    """
    found = options.resolve(arguments, options.RUN, os.environ, os.getcwd())
    keywords = _keywords(found)
    program: Program | None = None
    try:
        function = targets.load(arguments.target)
        notifier = Notifier(os.environ)
        rt = _named(keywords, function.__module__)
        program = Program(rt, notifier, drain_timeout=found["drain_timeout"], interrupt_grace=_GRACE)
        with contextlib.ExitStack() as stack:
            stack.enter_context(program)
            if found["metrics"]:
                stack.enter_context(program.serve_metrics(found["metrics"]))
            stack.enter_context(Progress(rt, enabled=found["progress"]))
            notifier.ready()
            result = _call(rt, function, arguments.args)
        return _exit_code(result, arguments.target)
    except exits.Usage:
        raise
    except BaseException as error:
        if program is not None and program.ended_by:
            return program.exit_code
        if isinstance(error, KeyboardInterrupt):
            return exits.INTERRUPTED
        if isinstance(error, SystemExit):
            return _system_exit(error)
        traceback.print_exception(error.with_traceback(_below_here(error)))
        return exits.FAILED


def _call(rt: Runtime, function: Callable[[Any, list[str]], object], argv: list[str]) -> object:
    """`function(rt, argv)`; tasks that it left behind are finished if it succeeds, dropped if it fails."""
    try:
        try:
            result = function(rt, argv)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            success = isinstance(error, SystemExit) and not error.code
            rt.shutdown(wait=True, cancel_futures=not success)
            raise
        rt.shutdown(wait=True)
        return result
    except KeyboardInterrupt:  # also the one that comes while the shutdown waits
        rt.kill_workers()
        raise


def _named(keywords: dict[str, Any], default: str) -> Runtime:
    """The Runtime. One that was given no name has that of its module, if it can be had: two may run at once.

    Raises: exits.Usage for a name that is taken.
    """
    try:
        if keywords["name"] is None and config.is_name(default):
            with contextlib.suppress(NameTaken, NoPlace):
                return Runtime(**{**keywords, "name": default})
        return Runtime(**keywords)
    except (NameTaken, NoPlace) as error:
        raise exits.Usage(str(error)) from None


def _keywords(found: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the Runtime. Raises: exits.Usage."""
    keywords = {key: value for key, value in found.items() if key not in ("progress", "metrics")}
    try:
        config.settings(**keywords)
    except (TypeError, ValueError) as error:
        raise exits.Usage(str(error)) from None
    return keywords


def _exit_code(result: object, target: str) -> int:
    if result is None:
        return exits.OK
    if isinstance(result, int):
        # A shell sees the lowest 8 bits: 256 must not look like success.
        return result & 0xFF or (exits.FAILED if result else exits.OK)
    print(
        f"runtime: {target} returned {type(result).__name__}; it must return None or an int, the exit code",
        file=sys.stderr,
    )
    return exits.FAILED


def _system_exit(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return _exit_code(error.code, "")
    print(error.code, file=sys.stderr)
    return exits.FAILED


def _below_here(error: BaseException) -> TracebackType | None:
    """The traceback from the user's first frame on: ours, and those of the import, are noise above it."""
    rest = error.__traceback__
    while rest is not None and _is_noise(rest.tb_frame.f_code.co_filename):
        rest = rest.tb_next
    # A file that does not parse has no frame; its exception names the line.
    return rest if rest is not None or isinstance(error, SyntaxError) else error.__traceback__


def _is_noise(file: str) -> bool:
    return file in (__file__, targets.__file__, importlib.__file__) or file.startswith("<frozen importlib")
