"""The command `runtime`: its parser and `main`. Each subcommand is a module, loaded when it is used."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence

from runtime.cli import broken, exits, options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; `argv` is without the program's name.

    Raises: SystemExit for `--help`, `--version` and options that the parser refuses (code 2).
    """
    arguments = parser().parse_args(argv)
    try:
        code = _subcommand(arguments)
        sys.stdout.flush()
        return code
    except exits.Usage as error:
        print(f"runtime: {error}", file=sys.stderr)
        return exits.USAGE
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`runtime doctor | head`). The interpreter flushes stdout
        # once more when it ends: let that go nowhere instead of failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.FAILED


def _subcommand(arguments: argparse.Namespace) -> int:
    if arguments.command == "doctor":
        from runtime.cli import doctor

        return doctor.command(arguments)
    if broken.reason is not None:
        print(f"runtime: the package {broken.told()}; ask `runtime doctor` why", file=sys.stderr)
        return exits.FAILED
    if arguments.command == "ctl":
        from runtime.cli import ctl

        return ctl.command(arguments)
    if os.getpid() == 1:
        from runtime.cli.init import become_init

        become_init()
    if arguments.command == "serve":
        from runtime.cli import serve

        return serve.command(arguments)
    from runtime.cli import run

    return run.command(arguments)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="runtime",
        description="Run Python functions in worker processes that share memory.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action=_Version)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_serve(commands)
    _add_ctl(commands)
    _add_doctor(commands)
    return top


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="call a function with a Runtime and the arguments that follow",
        description="Calls TARGET as function(rt, argv): rt is a Runtime, argv the arguments after TARGET. "
        "Options for the Runtime stand before TARGET; what follows it is the function's own. An int that the "
        "function returns is the exit code.",
        epilog="example: runtime run --workers 4 examples/census.py:main --limit 100",
        allow_abbrev=False,
    )
    run.add_argument("target", metavar="TARGET", help="module:function or file.py:function")
    run.add_argument("args", metavar="args", nargs=argparse.REMAINDER, help="arguments for the function")
    options.add(run, options.RUN)


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="run a service in supervised workers, on sockets that outlive them",
        description="Each worker calls TARGET as function(ctx), with a runtime.ServiceContext, until it is "
        "told to stop; an `async def` is run by asyncio.run. The listening sockets belong to this process "
        "and are kept over crashes and reloads. Signals: USR1 and HUP reload the code, TERM and INT drain "
        "and stop, QUIT stops now, TTIN and TTOU make one worker more or less.",
        epilog="example: runtime serve --bind 127.0.0.1:8000 --workers 4 examples/serve_raw.py:main",
        allow_abbrev=False,
    )
    serve.add_argument("target", metavar="TARGET", help="module:function or file.py:function")
    options.add(serve, options.SERVE)


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check whether this machine can run it, and how to cure what is wrong",
        description="Checks what the runtime needs of this machine and ends with a real round trip through a "
        "worker. The exit code is 1 if any check fails.",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")


def _add_ctl(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    ctl = commands.add_parser(
        "ctl",
        help="ask a running runtime how it is, and tell it what to do",
        description="NAME is that of `--name`, or of Runtime(name=...); by default the module of TARGET. The "
        "exit code is 1 if the runtime refuses, 3 if there is none of that name.",
        allow_abbrev=False,
    )
    ctl.add_argument("name", metavar="NAME")
    verbs = ctl.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, about: str) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        found.add_argument("--json", action="store_true", help="print JSON")
        return found

    verb("status", "its state, its workers, its queue")
    top = verb("top", "the same again and again, with rates")
    top.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="between two (%(default)s)"
    )
    top.add_argument("--count", type=_count, metavar="N", help="end after so many")
    verb("stats", "every count and size")
    reload = verb("reload", "reload the code; returns when that is done")
    reload.add_argument("--timeout", type=float, metavar="SECONDS", help="for the new code to be ready")
    verb("scale", "have N workers").add_argument("n", type=int, metavar="N")
    verb("drain", "take nothing new, finish what was accepted, end")
    verb("stop", "end now")
    stacks = verb("dump-stacks", "the Python stacks of the workers, stuck ones too")
    stacks.add_argument("--number", type=int, metavar="N", help="of this worker alone")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text} is no time to wait: write a number of seconds")
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of times: write 1 or more")
    return count


class _Version(argparse.Action):
    """`--version`, looked up only when somebody asks: reading package metadata takes milliseconds."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"runtime {version()}")
        parser.exit()


def version() -> str:
    """Of the installed distribution."""
    import importlib.metadata

    try:
        return importlib.metadata.version("runtime-workers")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed as a package)"
