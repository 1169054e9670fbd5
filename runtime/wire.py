"""The codec of messages, without I/O: bytes to records and back.

Two kinds of message leave a process. Hints travel by zmq between host and workers: one frame, a fixed
header, no payload; they say "look there" and are never trusted (the truth is in the region). Orders and
reports travel between host and zygote through a socket pair that only these two hold: one JSON object each.
"""

from __future__ import annotations

import enum
import functools
import json
import struct
from typing import Any, NamedTuple

__all__ = [
    "HINT_BYTES",
    "REPORT_BYTES",
    "Hint",
    "HintKind",
    "WireError",
    "decode_hint",
    "decode_report",
    "encode_hint",
    "encode_report",
]

_HINT = struct.Struct("<4sHHIIQ")
_MAGIC = b"RTH1"
HINT_BYTES = _HINT.size  # 24
REPORT_BYTES = 1 << 16  # of an order or a report, at most


class WireError(ValueError):
    """The bytes are no message of ours."""


class HintKind(enum.IntEnum):
    """What a hint says."""

    HELLO = 1  # worker to host: I am connected to your PULL
    WELCOME = 2  # host to worker: so am I to yours, and I have your subscription
    LOOK = 3  # either way: there is something in your ring, or in my outbox or phase
    CONTROL = 4  # host to worker, by PUB: read your control word
    AGAIN = 5  # host to worker: as LOOK, which may have been lost


_KINDS = frozenset(int(kind) for kind in HintKind)


class Hint(NamedTuple):
    """A message between host and worker: which slot it is about, and which process in it."""

    kind: int
    slot: int
    incarnation: int


@functools.lru_cache(1024)
def encode_hint(kind: int, slot: int, incarnation: int) -> bytes:
    """The bytes of a hint."""
    return _HINT.pack(_MAGIC, kind, HINT_BYTES, slot, 0, incarnation)


def decode_hint(data: bytes) -> Hint:
    """The hint in `data`. Raises: WireError for anything else."""
    if len(data) != HINT_BYTES:
        raise WireError(f"a hint has {HINT_BYTES} bytes, this message {len(data)}")
    magic, kind, size, slot, zero, incarnation = _HINT.unpack(data)
    if magic != _MAGIC or size != HINT_BYTES or zero != 0:
        raise WireError(f"not a hint: it begins with {data[:8]!r}")
    if kind not in _KINDS:
        raise WireError(f"unknown kind of hint: {kind}")
    return Hint(kind, slot, incarnation)


def encode_report(what: str, **fields: Any) -> bytes:
    """The bytes of an order or a report between host and zygote."""
    return json.dumps({"what": what, **fields}, separators=(",", ":")).encode()


def decode_report(data: bytes) -> dict[str, Any]:
    """The order or report in `data`: a dict with a str under "what". Raises: WireError for anything else."""
    try:
        report = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a report: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("what"), str):
        raise WireError("a report is an object that says what it is")
    return report
