"""`runtime serve TARGET`: services in supervised workers, on sockets that outlive them."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import threading
import traceback
from typing import Any

from runtime import _core, config
from runtime.cli import exits, options, targets
from runtime.cli.listeners import address_of, listeners
from runtime.cli.notify import Notifier
from runtime.cli.program import Phase, Program
from runtime.executor import Runtime
from runtime.lifecycle import WorkerStatus
from runtime.names import NameTaken, NoPlace

__all__ = ["Services", "command"]

_LOOK = 0.02  # seconds between two looks whether the first worker is ready

log = logging.getLogger("runtime")


class Services(Runtime):
    """A Runtime whose workers run a service instead of tasks."""

    def __init__(self, service: config.Service, **arguments: Any) -> None:
        self._service = service
        super().__init__(**arguments)


def command(arguments: argparse.Namespace) -> int:
    """Carries out a parsed command line: serves until it is told to stop. The exit code.

    Raises: exits.Usage
    """
    found = options.resolve(arguments, options.SERVE, os.environ, os.getcwd())
    module, path = targets.locate(arguments.target)
    notifier = Notifier(os.environ)
    _log_to_stderr()
    with contextlib.ExitStack() as stack:
        sockets = stack.enter_context(listeners(found["bind"], found["backlog"], os.environ))
        rt = _services(found, module, path, sockets, stack)
        program = Program(rt, notifier, drain_timeout=rt._settings.drain_timeout, interrupts=False)
        stack.enter_context(program)
        where = ", ".join(address_of(sock) for sock in sockets) or "no socket"
        log.info("serving %s with %d workers on %s (pid %d)",
                 arguments.target, rt._max_workers, where, os.getpid())  # fmt: skip
        if found["metrics"]:
            stack.enter_context(program.serve_metrics(found["metrics"]))
        if found["reload"]:
            from runtime.cli.watching import watch

            stack.enter_context(watch(found["reload_dir"] or [os.getcwd()], program.reload_soon))
        return _serve(rt, program, notifier)


def _services(
    found: dict[str, Any], module: str, path: str, sockets: list[socket.socket], stack: contextlib.ExitStack
) -> Services:
    """The runtime, and the memory that its services share. Raises: exits.Usage."""
    try:
        pool = found["pool_blocks"], config.parse_size(found["pool_block_size"])
        region = _core.SharedRegion.create(config.parse_size(found["shared_size"]))
        stack.callback(region.close)
        _core.MemoryPool(*pool, region=region)  # made here, so that what does not fit is said at once
        if not found["settle"] >= 0:
            raise ValueError(f"settle must be a number of seconds, at least 0, not {found['settle']}")
        fds = tuple(sock.fileno() for sock in sockets)
        service = config.Service(module, path, fds, region.fd, pool, found["settle"])
        keywords = {
            "max_workers": found["max_workers"],
            "preload": [*found["preload"], module],
            "drain_timeout": found["drain_timeout"],
            "max_worker_rss": found["max_worker_rss"],
        }
        rt = _named(service, keywords, found["name"], module)
    except (NameTaken, NoPlace, TypeError, ValueError) as error:
        raise exits.Usage(str(error)) from None
    stack.callback(rt.kill_workers)
    return rt


def _named(service: config.Service, keywords: dict[str, Any], name: str | None, default: str) -> Services:
    """Without a place for the socket of `ctl` it serves all the same, if nobody has asked for a name."""
    if name is None and config.is_name(default):
        try:
            return Services(service, name=default, **keywords)
        except NoPlace as error:
            log.warning("runtime ctl cannot be used: %s", error)
    return Services(service, name=name, **keywords)


def _serve(rt: Services, program: Program, notifier: Notifier) -> int:
    """Until the runtime has ended. The exit code: 0 if it was drained."""
    core, said = rt._core, False
    while not core.ended.wait(3600.0 if said else _LOOK):
        if not said and any(it.status is WorkerStatus.READY for it in rt.workers()):
            said = True
            notifier.ready(f"{rt._max_workers} workers")
            log.info("ready")
    broken = core.broken
    if program.phase is Phase.SERVING and broken is not None:
        print(f"runtime: {broken}", file=sys.stderr)
        if broken.__cause__ is not None:
            traceback.print_exception(broken.__cause__)
        return exits.FAILED
    return program.exit_code if program.hurried else exits.OK


def _log_to_stderr() -> None:
    """What the runtime and its services say, unless the program has a logging of its own."""
    threading.current_thread().name = "main"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
