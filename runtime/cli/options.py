"""The options of `runtime run` and `runtime serve`, and where a value comes from.

Precedence: the option, the variable RUNTIME_<KEY>, the key in [tool.runtime] of the nearest pyproject.toml
(in the current folder or above it), the default. A key is the name of the Runtime's argument, if it has one.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runtime.cli.exits import Usage

__all__ = ["RUN", "SERVE", "Option", "add", "resolve"]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is written: as text, in an option or a variable, and in TOML."""

    what: str  # for messages
    parse: Callable[[str], Any]
    types: tuple[type, ...]  # of TOML


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its key, kind, default, and what `--help` says."""

    key: str
    kind: Kind
    metavar: str
    help: str
    default: Any = None
    flag: str = ""  # by default the key with dashes

    @property
    def name(self) -> str:
        return self.flag or "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return "RUNTIME_" + self.key.upper()


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _truth(text: str) -> bool:
    try:
        return {"1": True, "on": True, "yes": True, "true": True,
                "0": False, "off": False, "no": False, "false": False}[text.lower()]  # fmt: skip
    except KeyError:
        raise ValueError(text) from None


NUMBER: Final = Kind("a number", int, (int,))
SECONDS: Final = Kind("a number of seconds", float, (int, float))
SIZE: Final = Kind('a size, like "64MiB"', str, (str, int))
TEXT: Final = Kind("a text", str, (str,))
NAMES: Final = Kind("one or several, with commas between them", _names, (str, list))
TRUTH: Final = Kind("true or false", _truth, (bool,))

_WORKERS = Option(
    "max_workers", NUMBER, "N", "worker processes (default: the CPUs that this process may use)",
    flag="--workers",
)  # fmt: skip
_PRELOAD = Option(
    "preload", NAMES, "MODULE",
    "import this before the workers are forked; may be repeated, or hold a list with commas", (),
)  # fmt: skip
_NAME = Option("name", TEXT, "NAME", "name for `runtime ctl` (default: the target's module)")
_METRICS = Option("metrics", TEXT, "HOST:PORT", "serve /metrics (Prometheus), /health and /ready there")
_DRAIN = Option(
    "drain_timeout", SECONDS, "SECONDS", "time that workers have to finish when they are to stop", 30.0
)
_RSS = Option("max_worker_rss", SIZE, "SIZE", "replace a worker that has more unshared memory")

RUN: Final = (
    _WORKERS,
    Option("threads", NUMBER, "N", "tasks that a worker runs at a time, in threads", 1),
    _PRELOAD,
    Option("timeout", SECONDS, "SECONDS", "end a task that runs longer"),
    Option("retries", NUMBER, "N", "run a task up to N times more if its worker dies", 0),
    Option("region_size", SIZE, "SIZE", "shared memory at the start", "4MiB"),
    _RSS,
    _DRAIN,
    _NAME,
    _METRICS,
    Option("progress", TRUTH, "", "a progress line on stderr", True),
)
SERVE: Final = (
    Option("bind", NAMES, "ADDRESS", "listen on HOST:PORT, or unix:PATH; may be repeated", ()),
    _WORKERS,
    _PRELOAD,
    _DRAIN,
    Option("settle", SECONDS, "SECONDS", "a service that has run so long is ready", 0.2),
    Option("backlog", NUMBER, "N", "connections that may wait to be accepted", 2048),
    _RSS,
    Option("shared_size", SIZE, "SIZE", "memory that all workers share, ctx.region", "4MiB"),
    Option("pool_blocks", NUMBER, "N", "blocks in it, of ctx.pool", 32),
    Option("pool_block_size", SIZE, "SIZE", "bytes of such a block", "64KiB"),
    _NAME,
    _METRICS,
    Option("reload", TRUTH, "", "reload when a source file changes, for development", False),
    Option("reload_dir", NAMES, "FOLDER", "watch this one instead of the current; may be repeated", ()),
)
_KEYS: Final = {option.key: option for option in (*RUN, *SERVE)}


def add(parser: argparse.ArgumentParser, options: tuple[Option, ...]) -> None:
    """Their flags. Without one on the command line its value is None."""
    for option in options:
        about = (
            f"{option.help} ({option.default})"
            if option.default not in (None, (), True, False)
            else option.help
        )
        if option.kind is TRUTH:
            parser.add_argument(
                option.name, dest=option.key, action=argparse.BooleanOptionalAction, help=about
            )
        elif option.kind is NAMES:
            parser.add_argument(
                option.name, dest=option.key, metavar=option.metavar, action="append", help=about
            )
        else:
            kind = option.kind.parse
            parser.add_argument(option.name, dest=option.key, metavar=option.metavar, type=kind, help=about)


def resolve(
    arguments: argparse.Namespace, options: tuple[Option, ...], environ: Mapping[str, str], folder: str
) -> dict[str, Any]:
    """{key: value} of every option. Raises: Usage that names the place of a value that cannot be."""
    table, file = _table(folder)
    found = {}
    for option in options:
        value = getattr(arguments, option.key)
        text = environ.get(option.variable, "").strip()
        if value is not None:
            found[option.key] = _flat(value) if option.kind is NAMES else value
        elif text:
            found[option.key] = _parsed(option, text)
        elif option.key in table:
            found[option.key] = _checked(option, table[option.key], file)
        else:
            found[option.key] = option.default
    return found


def _flat(texts: list[str]) -> list[str]:
    return [name for text in texts for name in _names(text)]


def _parsed(option: Option, text: str) -> Any:
    try:
        return option.kind.parse(text)
    except ValueError:
        raise Usage(
            f"{option.variable} is {text!r} in the environment: it must be {option.kind.what}"
        ) from None


def _checked(option: Option, value: Any, file: Path) -> Any:
    right = type(value) in option.kind.types  # a bool is no number
    if option.kind is NAMES and right:
        value = [value] if isinstance(value, str) else value
        right = all(isinstance(name, str) for name in value)
        return _flat(value) if right else _wrong(option, value, file)
    return value if right else _wrong(option, value, file)


def _wrong(option: Option, value: Any, file: Path) -> Any:
    raise Usage(f"{option.key} is {value!r} in [tool.runtime] of {file}: it must be {option.kind.what}")


def _table(folder: str) -> tuple[dict[str, Any], Path]:
    """[tool.runtime] of the nearest pyproject.toml, and that file. Raises: Usage."""
    here = Path(folder)
    for place in (here, *here.parents):
        file = place / "pyproject.toml"
        if os.path.isfile(file):  # nor is one in a folder that we may not look into
            return _read(file), file
    return {}, here


def _read(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        tool = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError) as error:  # of another's making, perhaps, but it may be meant for us
        raise Usage(f"{file} cannot be read: {error}") from None
    table = tool.get("runtime", {}) if isinstance(tool, dict) else None
    if not isinstance(table, dict):
        raise Usage(f"tool.runtime of {file} must be a table")
    for key in table:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(_KEYS))}"
            raise Usage(f"[tool.runtime] of {file} has no key {key!r}: {hint}")
    return table
