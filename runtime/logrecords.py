"""The codec of log records and warnings, without I/O: one JSON object per message, at most LIMIT bytes.

They come from a process of the same user that may run any code: every field is checked, nothing is unpickled
and nothing is imported. A record's message is formatted where it was logged; what travels are plain values.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from runtime.wire import WireError

__all__ = ["LIMIT", "RemoteWarning", "decode", "encode_log", "encode_warning"]

LIMIT = 160_000  # bytes of a message: the kernel takes 200 KB at once through a local socket
_TEXT = 48_000  # characters of one text, if that fits
_SHORT = 2_000  # the same if it does not: all of them escaped still fit
_NAME = 1_000  # characters of a name or a path
_EXTRAS = 64  # attributes of a record that the user has added

_NOW = logging.makeLogRecord({})
_LOGGING_STARTED = _NOW.created - _NOW.relativeCreated / 1000  # seconds since the epoch
_STANDARD = frozenset(_NOW.__dict__) | {"message", "asctime", "taskName"}
_OURS = frozenset({"worker", "task"})
_NONE = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "levelno": (int,),
    "levelname": (str,),
    "msg": (str,),
    "pathname": (str,),
    "filename": (str,),
    "module": (str,),
    "lineno": (int,),
    "funcName": (str, _NONE),
    "created": (int, float),
    "msecs": (int, float),
    "process": (int, _NONE),
    "processName": (str, _NONE),
    "thread": (int, _NONE),
    "threadName": (str, _NONE),
    "exc_text": (str, _NONE),
    "stack_info": (str, _NONE),
    "worker": (int,),
    "task": (int, _NONE),
}
_WARNING: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "category": (str,),
    "home": (str,),
    "filename": (str,),
    "lineno": (int,),
}


class RemoteWarning:
    """A warning of a worker: its text, its category by module (home) and name, and where it was given."""

    __slots__ = ("category", "filename", "home", "lineno", "text")

    def __init__(self, text: str, home: str, category: str, filename: str, lineno: int) -> None:
        self.text = text
        self.home = home
        self.category = category
        self.filename = filename
        self.lineno = lineno


def encode_log(record: logging.LogRecord, worker: int, task: int | None) -> bytes:
    """The bytes of a record. Raises: what formatting its message raises."""
    own = record.__dict__
    exc_text = record.exc_text
    if record.exc_info and not exc_text:
        exc_text = logging.Formatter().formatException(record.exc_info)
    process = record.processName
    fields: dict[str, Any] = {
        **{key: _as(types, own.get(key)) for key, types in _FIELDS.items()},
        "msg": record.getMessage(),
        "exc_text": exc_text,
        "processName": f"worker-{worker}" if process == "MainProcess" else process,
        "worker": worker,
        "task": task,
    }
    extras = {
        key: value
        for key, value in own.items()
        if key not in _STANDARD and key not in _OURS and _is_plain(value)
    }
    data = _packed("log", fields, extras, _TEXT)
    return data if len(data) <= LIMIT else _packed("log", fields, {}, _SHORT)


def encode_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int) -> bytes:
    """The bytes of a warning."""
    fields = {
        "text": str(message),
        "category": category.__qualname__,
        "home": category.__module__,
        "filename": filename,
        "lineno": lineno,
    }
    data = _packed("warning", fields, {}, _TEXT)
    return data if len(data) <= LIMIT else _packed("warning", fields, {}, _SHORT)


def _packed(kind: str, fields: dict[str, Any], extras: dict[str, Any], limit: int) -> bytes:
    shown = {
        key: _cut(value, limit if key in ("msg", "exc_text", "stack_info", "text") else _NAME)
        for key, value in fields.items()
    }
    more = {_cut(key, _NAME): _cut(value, _NAME) for key, value in list(extras.items())[:_EXTRAS]}
    return json.dumps({"what": kind, "fields": shown, "extras": more}, separators=(",", ":")).encode()


def _cut(value: Any, limit: int) -> Any:
    if isinstance(value, str) and len(value) > limit:
        return f"{value[:limit]} ... ({len(value) - limit} more characters)"
    return value


def _as(types: tuple[type, ...], value: Any) -> Any:
    """A field as the other side takes it: a record may have been made by hand."""
    if type(value) in types:
        return value
    return None if _NONE in types else str(value) if str in types else 0


def _is_plain(value: Any) -> bool:
    if isinstance(value, bool) or value is None or type(value) in (str, float):
        return True
    return type(value) is int and abs(value) < 1 << 64


def decode(data: bytes) -> logging.LogRecord | RemoteWarning:
    """The record or warning in `data`. Raises: WireError for anything else."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a record: {error}") from None
    if not isinstance(message, dict):
        raise WireError("a record is an object")
    fields, extras = message.get("fields"), message.get("extras")
    if message.get("what") == "warning":
        fields = _checked(fields, _WARNING)
        return RemoteWarning(
            fields["text"], fields["home"], fields["category"], fields["filename"], fields["lineno"]
        )
    if message.get("what") != "log" or not isinstance(extras, dict):
        raise WireError("it is neither a log record nor a warning")
    fields = _checked(fields, _FIELDS)
    for key, value in extras.items():
        if key in _STANDARD or key in _OURS or not _is_plain(value):
            raise WireError(f"the attribute {key[:100]!r} is not one that a record may bring along")
    record = logging.makeLogRecord({**fields, **extras, "args": (), "exc_info": None})
    record.relativeCreated = (record.created - _LOGGING_STARTED) * 1000
    return record


def _checked(fields: Any, kinds: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """The fields, if they are those and of these types."""
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise WireError("a record has other fields")
    for key, types in kinds.items():
        value = fields[key]
        if type(value) not in types or (type(value) is int and not -(1 << 63) <= value < 1 << 64):
            raise WireError(f"the field {key} holds {ascii(value)[:100]}")
    return fields
