"""The socket of a named runtime: `runtime ctl` asks, and is answered whatever the workers do.

One JSON object a line, in both directions; a connection may ask several times:

    {"command": "scale", "n": 4}      ->   {"ok": true, "result": null}
    {"command": "reload"}             ->   {"ok": false, "kind": "ReloadFailed", "error": "…"}

A thread accepts, and each connection has one of its own: so who asks for a reload, or says nothing, keeps
nobody else waiting. They are few, and each line is short: see the limits below. Nothing of the hot path is
touched but what `stats()` and `workers()` read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import struct
import time
import weakref
from collections.abc import Callable
from typing import Any

from runtime.listening import Listener
from runtime.names import Name

__all__ = ["Control", "Verbs"]

MAX_CLIENTS = 32
MAX_LINE = 4096  # bytes of a request
PATIENCE = 60.0  # seconds that a connection may be silent, or not read its answer

_UCRED = struct.Struct("3i")  # pid, uid, gid


class Verbs:
    """What can be asked of a Runtime, which this does not keep alive.

    Thread-safety: any thread. A main program has its own drain, stop, reload, and state.
    """

    def __init__(self, name: str, rt: Any) -> None:
        self._name = name
        self._rt = weakref.ref(rt)
        self._began = time.monotonic()

    @property
    def rt(self) -> Any:
        """The Runtime. Raises: RuntimeError when it is gone."""
        rt = self._rt()
        if rt is None:
            raise RuntimeError("the runtime is ending")
        return rt

    @property
    def state(self) -> str:
        """running, draining, stopping, or broken."""
        return str(self.rt._core.condition)

    def status(self) -> dict[str, Any]:
        """How it is, in about a hundred microseconds."""
        rt = self.rt
        stats = rt.stats()
        return {
            "name": self._name,
            "pid": os.getpid(),
            "state": self.state,
            "uptime": round(time.monotonic() - self._began, 3),
            "generation": rt._core.generation,
            "reloading": rt._core.reloading,
            "wanted": rt._max_workers,
            "workers": [_worker(it) for it in rt.workers()],
            **{key: getattr(stats, key) for key in _COUNTS},
        }

    def stats(self) -> dict[str, Any]:
        """Every field of Stats."""
        return dataclasses.asdict(self.rt.stats())

    def reload(self, timeout: float | None = None) -> dict[str, Any]:
        """Reload the code; returns when that is done."""
        return dataclasses.asdict(self.rt.reload(timeout=timeout))

    def scale(self, n: int) -> None:
        """Have so many workers."""
        self.rt.scale(n)

    def drain(self) -> None:
        """Take nothing new, finish what was accepted, end."""
        self.rt.shutdown(wait=False)

    def stop(self) -> None:
        """End now."""
        self.rt.terminate_workers()

    def dump_stacks(self, number: int | None = None) -> dict[int, str]:
        """The Python stacks of all workers, or of one."""
        found: dict[int, str] = self.rt.dump_stacks(number)
        return found


_COUNTS = ("queued", "leased", "running", "done", "failed", "cancelled")
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {  # of each command, besides "command"
    "status": {},
    "stats": {},
    "reload": {"timeout": (int, float, type(None))},
    "scale": {"n": (int,)},
    "drain": {},
    "stop": {},
    "dump-stacks": {"number": (int, type(None))},
}


def _worker(info: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(info), "status": info.status.value}


class Control:
    """Answers on the socket of a name, from `start` to `close`.

    Thread-safety: `close` from any thread. Fork-safety: a fork of this process has nothing of it.
    """

    def __init__(self, name: str) -> None:
        """Raises: NameTaken; NoPlace; OSError for want of descriptors."""
        self.verbs: Verbs
        self._name = Name(name)
        try:
            self._listener = Listener(
                self._name.socket, self._serve, self._refuse, most=MAX_CLIENTS, name="runtime-control",
                forget=self._name.forget,
            )  # fmt: skip
        except BaseException:
            self._name.release()
            raise

    @property
    def name(self) -> str:
        """Under which it is found."""
        return self._name.name

    def start(self, rt: Any) -> None:
        """Answer for this Runtime from now on. The caller may replace `verbs`."""
        self.verbs = Verbs(self._name.name, rt)
        self._listener.start()

    def close(self) -> None:
        """Give the name back, and end every connection. Idempotent."""
        self._listener.close()
        self._name.release()

    # ---- connections ---------------------------------------------------------------------------------

    def _refuse(self, client: socket.socket) -> None:
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.sendall(_line(_refusal(RuntimeError(f"{MAX_CLIENTS} clients are connected already"))))

    def _serve(self, client: socket.socket) -> None:
        """One connection: a line, an answer, and so on."""
        if _peer(client) not in (os.geteuid(), 0):
            return
        client.settimeout(PATIENCE)
        rest = b""
        while True:
            line, separator, rest = rest.partition(b"\n")
            if separator:
                client.sendall(_line(self._answer(line)))
                continue
            if len(line) > MAX_LINE:
                client.sendall(_line(_refusal(ValueError(f"a request has at most {MAX_LINE} bytes"))))
                return
            piece = client.recv(MAX_LINE)
            if not piece:
                return
            rest = line + piece

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            command, fields = _understood(line)
            verb: Callable[..., Any] = getattr(self.verbs, command.replace("-", "_"))
            return {"ok": True, "result": verb(**fields)}
        except Exception as error:
            return _refusal(error)


def _understood(line: bytes) -> tuple[str, dict[str, Any]]:
    """The command and its fields. Raises: ValueError that says what is wrong."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("a request is one line with a JSON object") from None
    command = request.pop("command", None) if isinstance(request, dict) else None
    if not isinstance(command, str) or command not in _FIELDS:
        raise ValueError(f'a request has a "command": {", ".join(_FIELDS)}; not {command!r:.60}')
    for key, value in request.items():
        kinds = _FIELDS[command].get(key)
        if kinds is None:
            raise ValueError(f"{command} has no field {key!r:.60}")
        if type(value) not in kinds:
            raise ValueError(f"{key} of {command} cannot be {value!r:.60}")
    if command == "scale" and "n" not in request:
        raise ValueError('scale needs "n", the number of workers')
    return command, request


def _refusal(error: Exception) -> dict[str, Any]:
    return {"ok": False, "kind": type(error).__name__, "error": str(error)}


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


def _peer(client: socket.socket) -> int:
    """The user at the other end."""
    _, uid, _ = _UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)
