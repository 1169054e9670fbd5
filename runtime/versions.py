"""By value, the sender's memory: which version of each global and class went out last.

A version is a number, unique in the process that `Origin` names; it rises when the pickle changes. Globals
are counted per space: one for each module, and one for each other dict that functions have as globals.
"""

from __future__ import annotations

import itertools
import os
import types
import weakref
from typing import Any

from runtime._core import replaced
from runtime.linking import nothing
from runtime.lookup import ATOMS, MISSING, NOT_GLOBALS, OUT_MARK, modules
from runtime.payload import digest_of

serial = itertools.count(1)  # versions, labels of spaces: unique in this process
_out_spaces: dict[str, _OutSpace] = {}  # module name -> its space
_class_versions: weakref.WeakKeyDictionary[type, dict[str, tuple[bytes, int]]] = weakref.WeakKeyDictionary()


class Origin:
    """Which process numbered the versions. Made on first use, again in a forked child."""

    token = ""

    @classmethod
    def get(cls) -> str:
        if not cls.token:
            cls.token = os.urandom(6).hex()
        return cls.token

    @classmethod
    def forget(cls) -> None:
        cls.token = ""


os.register_at_fork(after_in_child=Origin.forget)


class _Sent:
    """The last version of one global that went out. atom: its value, if comparing that is enough."""

    __slots__ = ("atom", "blob", "digest", "version")

    def __init__(self, version: int, digest: bytes, atom: object, blob: bytes) -> None:
        self.version, self.digest, self.atom, self.blob = version, digest, atom, blob


class _OutSpace:
    """What the sender remembers of one globals dict: label (a module's name, or #number), versions sent."""

    __slots__ = ("label", "names", "owner")

    def __init__(self, label: str, owner: int) -> None:
        self.label = label
        self.owner = owner  # id of the dict: a copied dict must not be taken for the original
        self.names: dict[str, _Sent] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()  # met only where somebody pickles a globals dict as data


def out_space(globals_: dict[str, Any]) -> _OutSpace:
    name = globals_.get("__name__")
    if isinstance(name, str) and getattr(modules.get(name), "__dict__", None) is globals_:
        space = _out_spaces.get(name)
        if space is None or space.owner != id(globals_):
            space = _out_spaces[name] = _OutSpace(name, id(globals_))
        return space
    space = globals_.get(OUT_MARK)
    if space is None or space.owner != id(globals_):
        space = globals_[OUT_MARK] = _OutSpace(f"#{next(serial)}", id(globals_))
    return space


class Scope:
    """A space as one message uses it."""

    __slots__ = ("_ids", "globals", "key", "names")

    def __init__(self, globals_: dict[str, Any], key: str, names: dict[str, _Sent]) -> None:
        self.globals, self.key, self.names = globals_, key, names
        self._ids: dict[int, str] | None = None

    def name_of(self, value: object) -> str | None:
        """The global that is this very object (mutable ones and sentinels: identity matters for those)."""
        if self._ids is None:
            skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, tuple, frozenset)
            self._ids = {
                id(v): k
                for k, v in self.globals.copy().items()
                if type(v) not in ATOMS and not issubclass(type(v), skip) and k not in NOT_GLOBALS
            }
        return self._ids.get(id(value))

    def base(self) -> dict[str, Any]:
        names = ("__name__", "__file__", "__package__", "__doc__")
        return {k: self.globals[k] for k in names if isinstance(self.globals.get(k), str)}


def next_version(names: dict[str, _Sent], name: str, value: object, digest: bytes, blob: bytes) -> int:
    small = type(value) in ATOMS and len(blob) < 4096
    atom, kept = (value, blob) if small else (MISSING, b"")
    while True:  # at most once more for each who was here meanwhile
        last = names.get(name)
        version = last.version if last is not None and last.digest == digest else next(serial)
        if replaced(names, name, last, _Sent(version, digest, atom, kept)):
            return version


def next_class_version(cls: type, contents: bytes) -> int:
    digest = digest_of(contents)
    sent = _class_versions.setdefault(cls, {})
    while True:
        last = sent.get("")
        if last is not None and last[0] == digest:
            return last[1]
        version = next(serial)
        if replaced(sent, "", last, (digest, version)):
            return version
