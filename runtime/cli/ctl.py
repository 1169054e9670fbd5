"""`runtime ctl NAME COMMAND`: asks a running runtime, through the socket of its name."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from runtime import names
from runtime.cli import exits

__all__ = ["Client", "Refused", "Unreachable", "command"]

_PATIENCE = 10.0  # seconds for an answer that needs no work
_SLOW = ("reload", "dump-stacks", "stop", "scale")  # whose answer takes as long as it takes


class Unreachable(Exception):
    """Nobody answers under this name."""


class Unanswered(Unreachable):
    """It was sent the command, and no answer came."""


class Refused(Exception):
    """The runtime has refused; the message is its."""


class Client:
    """A connection to a named runtime. Not for several threads. Raises: Unreachable."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.connect()

    def connect(self) -> None:
        """A new connection, in place of one that was closed. Raises: Unreachable."""
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_PATIENCE)
        try:
            names.trust_folder()
            self._socket.connect(names.control_path(self._name))
        except OSError as error:
            self._socket.close()
            if isinstance(error, BlockingIOError):  # more wait for it than it has room for
                raise Unreachable(f"{self._name!r} does not answer: too many wait for it") from None
            live = names.live_names()
            others = f"the names are {', '.join(live)}" if live else "there is no named runtime of this user"
            why = error.strerror or error
            raise Unreachable(f"no runtime is named {self._name!r} ({why}): {others}") from None

    def ask(self, command: str, **fields: Any) -> Any:
        """The result of a command. Raises: Refused; Unreachable, which is Unanswered once that was sent."""
        self._socket.settimeout(None if command in _SLOW else _PATIENCE)
        request = {"command": command, **{key: value for key, value in fields.items() if value is not None}}
        sent = False
        try:
            with contextlib.suppress(BrokenPipeError):  # closed already; perhaps it has said why
                self._socket.sendall(json.dumps(request).encode() + b"\n")
                sent = True
            line = self._line()
        except OSError as error:
            kind = Unanswered if sent else Unreachable
            raise kind(f"{self._name!r} does not answer: {error}") from None
        answer = json.loads(line)
        if not answer["ok"]:
            raise Refused(f"{answer['kind']}: {answer['error']}")
        return answer["result"]

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise ConnectionError("it closed the connection")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


def command(arguments: argparse.Namespace) -> int:
    """Carries out a parsed command line and returns the exit code."""
    try:
        with contextlib.closing(Client(arguments.name)) as client:
            _VERBS[arguments.verb](client, arguments)
            return exits.OK
    except Unreachable as error:
        print(f"runtime: {error}", file=sys.stderr)
        return exits.UNREACHABLE
    except Refused as error:
        print(f"runtime: {error}", file=sys.stderr)
        return exits.FAILED


# ---- the commands --------------------------------------------------------------------------------


def _status(client: Client, arguments: argparse.Namespace) -> None:
    _show(client.ask("status"), arguments, status_text)


def _stats(client: Client, arguments: argparse.Namespace) -> None:
    _show(client.ask("stats"), arguments, _pairs)


def _top(client: Client, arguments: argparse.Namespace) -> None:
    for frame in _frames(client, arguments.count, arguments.interval):
        if arguments.json:
            print(json.dumps(frame), flush=True)
        elif sys.stdout.isatty():
            print(f"\x1b[H\x1b[J{top_text(frame)}", end="", flush=True)  # home, and clear to the end
        else:
            print(top_text(frame), flush=True)


def _frames(client: Client, count: int | None, interval: float) -> Iterator[dict[str, Any]]:
    """The status again and again, with what has happened in between."""
    before: dict[str, Any] | None = None
    shown = 0
    while count is None or shown < count:
        frame = client.ask("status")
        if before and before["pid"] != frame["pid"]:  # another one has the name by now
            before = None
        since = frame["uptime"] - before["uptime"] if before else 0.0
        old = {it["number"]: it for it in before["workers"]} if before else {}
        done = frame["done"] + frame["failed"] - (before["done"] + before["failed"] if before else 0)
        frame["rate"] = round(done / since, 1) if since > 0 else None
        for it in frame["workers"]:
            last = old.get(it["number"])
            busy = (it["busy"] - last["busy"]) / since if last and since > 0 else None
            it["load"] = None if busy is None else round(min(1.0, max(0.0, busy)), 3)
        yield frame
        before, shown = frame, shown + 1
        if count is None or shown < count:
            client.close()  # who has a connection and says nothing for a minute loses it
            time.sleep(interval)
            client.connect()


def _reload(client: Client, arguments: argparse.Namespace) -> None:
    _show(
        client.ask("reload", timeout=arguments.timeout),
        arguments,
        lambda it: (
            f"generation {it['generation']}: {it['started']} started, {it['drained']} drained, "
            f"{it['killed']} killed, {it['seconds']:.2f} s\n"
        ),
    )


def _scale(client: Client, arguments: argparse.Namespace) -> None:
    _show(client.ask("scale", n=arguments.n), arguments, lambda _: "")


def _drain(client: Client, arguments: argparse.Namespace) -> None:
    _show(client.ask("drain"), arguments, lambda _: "")


def _stop(client: Client, arguments: argparse.Namespace) -> None:
    with contextlib.suppress(Unanswered):  # it was quicker than its answer
        _show(client.ask("stop"), arguments, lambda _: "")


def _dump_stacks(client: Client, arguments: argparse.Namespace) -> None:
    _show(
        client.ask("dump-stacks", number=arguments.number),
        arguments,
        lambda found: "".join(f"worker {number}\n{text.rstrip()}\n\n" for number, text in found.items()),
    )


_VERBS: dict[str, Callable[[Client, argparse.Namespace], None]] = {
    "status": _status,
    "top": _top,
    "stats": _stats,
    "reload": _reload,
    "scale": _scale,
    "drain": _drain,
    "stop": _stop,
    "dump-stacks": _dump_stacks,
}


# ---- what is shown -------------------------------------------------------------------------------


def _show(result: Any, arguments: argparse.Namespace, text: Callable[[Any], str]) -> None:
    print(json.dumps(result, indent=2) + "\n" if arguments.json else text(result), end="")


def status_text(it: dict[str, Any]) -> str:
    """A status, for people."""
    rows = [_row(worker) for worker in it["workers"]]
    return _head(it) + _columns(("worker", "pid", "gen", "status", "done", "task", "memory"), rows)


def _head(it: dict[str, Any]) -> str:
    ready = sum(worker["status"] == "ready" for worker in it["workers"])
    reloading = ", reloading" if it["reloading"] else ""
    return (
        f"{it['name']}: {it['state']}{reloading}, pid {it['pid']}, up {_span(it['uptime'])}, "
        f"generation {it['generation']}, {ready} of {it['wanted']} workers ready\n"
        f"{it['queued']:,} queued, {it['leased']:,} leased, {it['running']:,} running, {it['done']:,} done, "
        f"{it['failed']:,} failed, {it['cancelled']:,} cancelled\n"
    )


def top_text(it: dict[str, Any]) -> str:
    """A frame of `top`."""
    rate = "" if it["rate"] is None else f"{it['rate']:,} tasks/s\n"
    rows = [(*_row(worker), _percent(worker["load"])) for worker in it["workers"]]
    return (
        _head(it)
        + rate
        + _columns(("worker", "pid", "gen", "status", "done", "task", "memory", "busy"), rows)
    )


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    rss = worker["rss"]
    return (
        str(worker["number"]), str(worker["pid"] or "-"), str(worker["generation"]), worker["status"],
        f"{worker['tasks_done']:,}", "-" if worker["task"] is None else str(worker["task"]),
        "-" if rss is None else f"{rss / (1 << 20):.1f} MiB",
    )  # fmt: skip


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    texts = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    return "".join(f"{text}\n" for text in texts)


def _pairs(found: dict[str, Any]) -> str:
    width = max(map(len, found))
    return "".join(f"{key.ljust(width)}  {_plain(value)}\n" for key, value in found.items())


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else json.dumps(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
