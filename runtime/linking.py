"""By value, the receiver: takes the records of a message, then loads its root.

Records come in the order in which they must be taken:

    ("N", key, base)                        a space and its __name__, __file__ …
    ("C", class id, skeleton, keep)         a class without contents
    ("S", class id, version, contents)
    ("G", key, name, version, value, views) a global; large buffers in it are not copied before they must be

A *space* is one globals dict per process, so by-value functions of a module share their globals. A
global is set only when its version is not the current one: what the receiver itself assigned (an
initializer's `global model`) stays until the sender rebinds the name. Contents of a class likewise.
`relink` moves what an older function refers to back to the versions it was sent with.

In a worker with several threads (`Crowd`) a call may need other versions of a space's globals than those
in place, while another thread's call uses these. Then it gets the space to itself: a copy, with its own
versions, which no other call sees.

The functions at the end are what pickles name: `link` for the message, the others for what is in it.
"""

from __future__ import annotations

import functools
import os
import threading
import types
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.lookup import IN_MARK, MISSING, EmptyCell, cloudpickle, modules, resolve
from runtime.payload import loads

Record = tuple[Any, ...]  # see above


class _Current:
    """A global of a space as delivered last. own: what this process had assigned itself, by older version."""

    __slots__ = ("given", "own", "version")

    def __init__(self, version: int, given: object) -> None:
        self.version, self.given = version, given
        self.own: dict[int, object] = {}


class _InSpace:
    """One globals dict of this process, shared by all functions by value of one module of the sender."""

    __slots__ = ("__weakref__", "globals", "label", "names", "origin")

    def __init__(self, label: str, base: Mapping[str, Any], adopt: bool = True) -> None:
        import builtins

        self.label = label
        self.names: dict[str, _Current] = {}
        self.origin: _InSpace | None = None  # what this is a copy of
        adopted = _Adopted.module if adopt and label == "__main__" else None
        self.globals: dict[str, Any] = {} if adopted is None else adopted.__dict__
        self.globals.update(base)
        self.globals["__builtins__"] = builtins
        self.globals[IN_MARK] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()

    def copied(self) -> _InSpace:
        """A space for one call, which brings the globals that it needs along; what this process has assigned
        itself is there, too.
        """
        own = {name: value for name, value in self.globals.items() if name not in self.names}
        copy = _InSpace(self.label, own, False)
        copy.origin = self
        return copy

    def holds(self, name: str, version: int) -> bool:
        """Whether it would not have to change for this version."""
        current = self.names.get(name)
        return current is None or current.version == version

    def assigned(self, name: str, version: int) -> object:
        """What this process has assigned itself, in place of this version of a global; or MISSING."""
        current = self.names.get(name)
        if current is None:
            return MISSING
        if current.version != version:
            return current.own.get(version, MISSING)
        mine = self.globals.get(name, MISSING)
        return MISSING if mine is current.given else mine

    def deliver(self, name: str, version: int, blob: bytes, views: Sequence[Any]) -> None:
        """Sets the global unless this version of it is the current one."""
        current = self.names.get(name)
        if current is None:
            given = loads(blob, views)
            self.names[name] = _Current(version, given)
            self.globals[name] = self._locally_rebound(name, given)
        elif current.version != version:
            given = loads(blob, views)
            mine = self.globals.get(name, MISSING)
            if mine is not current.given and mine is not MISSING:
                current.own[current.version] = mine
                if len(current.own) > 4:
                    del current.own[min(current.own)]
            current.version, current.given = version, given
            self.globals[name] = current.own.pop(version, given)
            Links.stamp += 1

    def _locally_rebound(self, name: str, given: object) -> object:
        """That value, if the real module is loaded here and its code (an initializer) rebound the name."""
        if self.origin is not None:
            mine = self.origin.assigned(name, self.names[name].version)
            if mine is not MISSING:
                return mine
        at_import = _at_import.get(self.label)
        if at_import is not None:
            own = getattr(modules.get(self.label), "__dict__", {}).get(name, MISSING)
            if own is not MISSING and at_import.get(name) != id(own):
                return own
        return given


class _Adopted:
    module: types.ModuleType | None = None


def adopt_main() -> types.ModuleType:
    """For a worker, once, before it loads anything: give by-value functions of the host's __main__ a real
    module `__main__` as their globals, so that typing.get_type_hints, pickle and `import __main__` find it.
    """
    if _Adopted.module is None:
        _Adopted.module = types.ModuleType("__main__")
        modules["__main__"] = _Adopted.module
    return _Adopted.module


def keep_main() -> None:
    """For a zygote that was forked from the host: the real `__main__` is there, and stays."""
    _Adopted.module = modules["__main__"]


_in_spaces: dict[str, _InSpace] = {}  # of modules
_anonymous: weakref.WeakValueDictionary[str, _InSpace] = weakref.WeakValueDictionary()  # of other dicts
foreign_classes: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()  # -> their version
_recent_classes: deque[type] = deque(maxlen=256)  # not to make the classes of arguments anew for each task
_at_import: dict[str, dict[str, int]] = {}  # module -> name -> id of the value that the import left there


class Links(threading.local):
    """What the message that this thread is loading has brought."""

    stamp = 0  # on the class, for all threads: how often a global or class moved to another version
    spaces: dict[str, _InSpace] | None = None
    apart = False  # whether what was loaded has copies of spaces to itself
    log: list[Record] | None = None


_links = Links()


def _find_space(key: str) -> _InSpace | None:
    local = _links.spaces
    if local is not None and key in local:
        return local[key]
    return _in_spaces.get(key) or _anonymous.get(key)


def _in_space(key: str) -> _InSpace:
    space = _find_space(key)
    if space is None:
        raise KeyError(key)
    return space


def _open_space(key: str, base: Mapping[str, Any]) -> _InSpace:
    label = key.partition(":")[2]
    if key[0] == "~":  # a snapshot in a result: lives as long as the functions in it
        assert _links.spaces is not None
        table: Any = _links.spaces
    else:
        table = _anonymous if label[0] == "#" else _in_spaces
    space: _InSpace | None = table.get(key)
    if space is None:
        space = _InSpace("" if key[0] == "~" else label, base)
        table[key] = space
    return space


def link(records: Sequence[Record], root: bytes, buffers: Sequence[Any]) -> Any:
    """What a message by value unpickles to: takes the records, then loads the root."""
    outer = _links.spaces
    _links.spaces = dict(outer or ())
    keep: list[Any] = []  # a class that only the tracker knows would be gone before the root is loaded
    try:
        _take_all(records, keep)
        if _links.log is not None and outer is None:
            _links.log += records
        return loads(root, buffers)
    finally:
        _links.spaces = outer


def load_logged(data: bytes | memoryview) -> tuple[Any, tuple[Record, ...]]:
    """The object again, and the records that came with it, for `relink`."""
    log: list[Record] = []
    _links.log = log
    _links.apart = False
    try:
        loaded = loads(data)
    finally:
        _links.log = None
    return loaded, tuple(log)


def went_apart() -> bool:
    """Whether what this thread has loaded last got copies of spaces to itself."""
    return _links.apart


def relink(records: Sequence[Record]) -> None:
    """Moves what a function refers to back to the versions it was sent with, where others came since."""
    outer = _links.spaces
    _links.spaces = dict(outer or ())
    keep: list[Any] = []
    try:
        _take_all(records, keep)
    finally:
        _links.spaces = outer


def _take_all(records: Sequence[Record], keep: list[Any]) -> None:
    if _Crowded.crowd is not None:
        _Crowded.crowd.take(records, keep)
        return
    for record in records:
        _take(record, keep)


class Crowd:
    """The threads of one worker whose calls refer to globals by value, from when one is loaded to its end.

    Thread-safety: any thread. A fork has a lock of its own. Blocking: while another thread loads by value.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._inside: set[int] = set()  # threads whose call uses the spaces as they are
        os.register_at_fork(after_in_child=self._forked)
        _Crowded.crowd = self

    def _forked(self) -> None:
        self.lock = threading.RLock()
        self._inside.clear()

    def fits(self, records: Sequence[Record]) -> bool:
        """Whether these can be taken without a change under another thread's call. With the lock held."""
        if not self._inside - {threading.get_ident()}:
            return True
        for kind, key, *rest in records:
            if kind == "G":
                space = _find_space(key)
                if space is not None and not space.holds(rest[0], rest[1]):
                    return False
        return True

    def take(self, records: Sequence[Record], keep: list[Any]) -> None:
        """Take the records of a message, in copies of the spaces if another thread's call needs these."""
        with self.lock:
            if self.fits(records):
                self.enter()
            else:
                _links.apart = True
                assert _links.spaces is not None
                for record in records:
                    space = _find_space(record[1]) if record[0] == "G" else None
                    if space is not None and space.origin is None and record[1][0] != "~":
                        _links.spaces[record[1]] = space.copied()
            for record in records:
                _take(record, keep)

    def enter(self) -> None:
        """This thread's call uses the spaces as they are."""
        self._inside.add(threading.get_ident())

    def leave(self) -> None:
        """The call of this thread has ended."""
        self._inside.discard(threading.get_ident())


class _Crowded:
    crowd: Crowd | None = None  # in a worker with several threads


def _take(record: Record, keep: list[Any]) -> None:
    kind, key, *rest = record
    if kind == "G":
        _in_space(key).deliver(*rest)
    elif kind == "N":
        keep.append(_open_space(key, *rest))
    elif kind == "C":
        cls = cloudpickle()._DYNAMIC_CLASS_TRACKER_BY_ID.get(key)
        if cls is None:
            make, args = loads(rest[0])
            cls = make(*args)
            foreign_classes[cls] = None
            if rest[1]:
                _recent_classes.append(cls)
        keep.append(cls)
    else:
        cls = cloudpickle()._DYNAMIC_CLASS_TRACKER_BY_ID[key]
        if foreign_classes.get(cls, rest[0]) != rest[0]:  # a class of this process keeps its own contents
            setter, state = loads(rest[1])
            setter(cls, state)
            Links.stamp += foreign_classes[cls] is not None
            foreign_classes[cls] = rest[0]


def note_import(fn: Any) -> None:
    """Remembers what the import of a function's module left in it, before any of its code is called."""
    name, qualname = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if not isinstance(name, str) or not isinstance(qualname, str) or name in _at_import or name == "__main__":
        return
    if resolve(name, qualname) is fn:
        _at_import[name] = {k: id(v) for k, v in vars(modules[name]).copy().items()}


# ---- what pickles name ---------------------------------------------------------------------------


def nothing() -> None:
    return None


def global_value(key: str, name: str, version: int) -> Any:
    current = _in_space(key).names[name]
    if current.version != version:
        raise LookupError(f"global {name!r} of {key} is at version {current.version}, not {version}")
    return current.given


def class_by_id(key: str, name: str) -> Any:
    cls = cloudpickle()._DYNAMIC_CLASS_TRACKER_BY_ID.get(key)
    if cls is None:
        raise LookupError(f"class {name} came from this process, which has no such class any more")
    return cls


def make_cell() -> types.CellType:
    return types.CellType()


def make_function(
    key: str, code: types.CodeType, closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    return types.FunctionType(code, _in_space(key).globals, code.co_name, None, closure)


def set_function(fn: Any, state: tuple[Any, ...]) -> None:
    name, qualname, module, doc, defaults, kwdefaults, annotations, attributes, contents, _submodules = state
    fn.__name__, fn.__qualname__, fn.__module__, fn.__doc__ = name, qualname, module, doc
    fn.__defaults__, fn.__kwdefaults__, fn.__annotations__ = defaults, kwdefaults, annotations
    fn.__dict__.update(attributes)
    for cell, content in zip(fn.__closure__ or (), contents, strict=True):
        if content is not EmptyCell:
            cell.cell_contents = content


def make_lru(fn: Any, maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(fn)


def make_cached_property(kind: Any, fn: Any, name: str | None) -> Any:
    made = kind(fn)
    made.attrname = name
    return made


def make_typing(kind: Any, module: str, *args: Any) -> Any:
    made = kind(*args)
    made.__module__ = module
    return made


def fill_module(module: types.ModuleType, contents: dict[str, Any]) -> None:
    module.__dict__.update(contents)
