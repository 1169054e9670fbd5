"""`runtime run TARGET [args...]`: a function, a Runtime, and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from runtime import config
from runtime.cli import exits, targets
from runtime.cli.progress import Progress

__all__ = ["command"]


def command(arguments: argparse.Namespace) -> int:
    """Carries out a parsed command line and returns the exit code.

    Raises: exits.Usage
    """
    options = _options(arguments)
    try:
        function = targets.load(arguments.target)
        result = _call(function, arguments.args, options, not arguments.no_progress)
        return _exit_code(result, arguments.target)
    except exits.Usage:
        raise
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except SystemExit as error:
        return _system_exit(error)
    except BaseException as error:
        traceback.print_exception(error.with_traceback(_below_here(error)))
        return exits.FAILED


def _call(
    function: Callable[[Any, list[str]], object], argv: list[str], options: dict[str, Any], progress: bool
) -> object:
    """`function(rt, argv)`; tasks that it left behind are finished if it succeeds, dropped if it fails."""
    from runtime.executor import Runtime

    rt = Runtime(**options)
    try:
        with Progress(rt, enabled=progress):
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


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The Runtime's arguments. Precedence: option, environment, default."""
    workers, threads = arguments.workers, arguments.threads
    if workers is None:
        workers = _number_of_environment("RUNTIME_MAX_WORKERS")
    if threads is None:
        threads = _number_of_environment("RUNTIME_THREADS")
    options = {
        "max_workers": workers,
        "threads": 1 if threads is None else threads,
        "preload": [name for names in arguments.preload for name in names.split(",") if name],
        "timeout": arguments.timeout,
        "retries": arguments.retries,
        "region_size": arguments.region_size,
    }
    try:
        config.settings(**options)
    except (TypeError, ValueError) as error:
        raise exits.Usage(str(error)) from None
    return options


def _number_of_environment(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        raise exits.Usage(f"{name} is {text!r} in the environment: it must be a number") from None


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
