"""Is it still the same? What must hold for the pickle of a function or class by value to be used again.

`watch` gives the guards of everything that goes into such a pickle, `holds` tests them. A guard is
(weak reference, test, what the test compares with).

An *expectation* says how to recognise an unchanged value without keeping it alive: an atom itself
(identity), a weak reference, or _Parts: the type of a container and an expectation per element. Small
lists, dicts and sets can be compared that way faster than pickled.
"""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from runtime.lookup import (
    ATOMS,
    LRU_TYPE,
    MISSING,
    EmptyCell,
    cell_content,
    global_names,
    importable,
    locate,
    modules,
)

# fmt: off
_IMMUTABLE = frozenset([
    "builtins.object", "re.Pattern", "logging.Logger", "logging.RootLogger", "decimal.Decimal", "uuid.UUID",
    "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.PurePosixPath", "pathlib._local.PureWindowsPath",
    "dataclasses._HAS_DEFAULT_FACTORY_CLASS", "dataclasses._MISSING_TYPE",
    "numpy.ufunc", "numpy.bool", "numpy.float32", "numpy.float64", "numpy.int32", "numpy.int64",
])
# What the interpreter, dataclasses, abc … put into a class's __dict__: not changed by users.
_CLASS_BOOKKEEPING = frozenset([
    "__dict__", "__weakref__", "__annotations__", "__annotate__", "__annotate_func__", "__slotnames__",
    "__annotations_cache__", "__dataclass_fields__", "__dataclass_params__", "__orig_bases__",
    "__parameters__", "__type_params__", "__firstlineno__", "__static_attributes__",
    "__abstractmethods__", "_abc_impl", "_field_defaults", "_is_protocol",
])
# fmt: on
_DESCRIPTORS = frozenset([types.GetSetDescriptorType, types.MemberDescriptorType])
_TAKEN_APART: dict[type, Callable[[Any], Sequence[Any]]] = {
    tuple: lambda t: t,
    list: list,
    set: list,
    frozenset: list,
    dict: lambda d: [part for item in list(d.items()) for part in item],
    property: lambda p: (p.fget, p.fset, p.fdel),
    staticmethod: lambda s: (s.__func__,),
    classmethod: lambda c: (c.__func__,),
    functools.cached_property: lambda c: (c.func, c.attrname),
}
_CONTAINERS = frozenset([tuple, list, set, frozenset, dict])
_MUTABLE = frozenset([list, set, dict])
Guard = tuple[Any, ...]  # (weak reference, test, what the test compares with)


def watch(root: object) -> tuple[Guard, ...] | None:
    """Guards that hold while `root` and all code by value that it refers to are the same; None if no
    guard can tell, because something mutable is among them.
    """
    try:
        return tuple(_Watch(root).guards)
    except (_UnstableError, RuntimeError, TypeError):  # endless, changed by another thread, no weak reference
        return None


def holds(guards: Iterable[Guard]) -> bool:
    for guard in guards:
        obj = guard[0]()
        if obj is None or not guard[1](obj, *guard[2:]):
            return False
    return True


class _Parts:
    """id: of the container, if it is a mutable one; else 0. size: its length, 0 for a wrapper."""

    __slots__ = ("id", "kind", "parts", "size")

    def __init__(self, kind: type, id: int, size: int, parts: list[Any]) -> None:
        self.kind, self.id, self.size, self.parts = kind, id, size, parts


class _UnstableError(Exception):
    """Something mutable is in it."""


class _Watch:
    def __init__(self, root: object) -> None:
        self.guards: list[Guard] = []
        self._budget = 300  # elements of containers: comparing more takes longer than pickling again
        self._seen: set[int] = set()
        self._queue: list[Any] = [root]
        while self._queue:
            obj = self._queue.pop()
            if id(obj) in self._seen:
                continue
            self._seen.add(id(obj))
            if type(obj) is types.FunctionType:
                self.guards.append(self._function(obj))
            elif type(obj) is LRU_TYPE:
                self._queue.append(obj.__wrapped__)
            elif not _is_enum(obj):
                self.guards.append(self._class(obj))

    def _function(self, fn: types.FunctionType) -> Guard:
        names = []
        for name in global_names(fn.__code__):
            value = fn.__globals__.get(name, MISSING)
            names.append((name, value if value is MISSING else self.expect(value)))
        cells = [self.expect(cell_content(cell)) for cell in fn.__closure__ or ()]
        kwdefaults = [(k, self.expect(v)) for k, v in (fn.__kwdefaults__ or {}).items()]
        attributes = [(k, self.expect(v)) for k, v in fn.__dict__.items()]
        rest = (cells, kwdefaults, attributes) if cells or kwdefaults or attributes else None
        return weakref.ref(fn), _same_function, fn.__code__, self.expect(fn.__defaults__), names, rest

    def _class(self, cls: type) -> Guard:
        items = []
        for name, value in cls.__dict__.items():
            if name in _CLASS_BOOKKEEPING or type(value) in _DESCRIPTORS or _is_field(value):
                continue
            items.append((name, self.expect(value)))
        bases = _Parts(tuple, 0, len(cls.__bases__), [self.expect(base) for base in cls.__bases__])
        return weakref.ref(cls), _same_class, bases, len(cls.__dict__), items

    def expect(self, value: Any) -> Any:
        kind = type(value)
        if kind in ATOMS or value is EmptyCell:
            return value
        if kind in _TAKEN_APART:
            size = len(value) if kind in _CONTAINERS else 0
            self._budget -= size
            if self._budget >= 0:
                elements = _TAKEN_APART[kind](value)
                parts = [self.expect(element) for element in elements]
                if kind is tuple and all(map(operator.is_, parts, elements)):
                    return value
                return _Parts(kind, id(value) if kind in _MUTABLE else 0, size, parts)
        elif kind is types.FunctionType or kind is LRU_TYPE or issubclass(kind, type):
            if locate(value) is None and value is not type(None):
                self._queue.append(value)
            return weakref.ref(value)
        elif issubclass(kind, types.ModuleType):
            if importable(value.__name__):
                return weakref.ref(value)
        elif kind is types.BuiltinFunctionType:
            if value.__self__ is None or isinstance(value.__self__, types.ModuleType | type):
                return weakref.ref(value)
        elif _is_immutable(kind):
            return value
        raise _UnstableError


def _is_immutable(kind: type) -> bool:
    if _is_enum(kind):  # a local one is kept alive by its members, and is not for us to keep
        return "<locals>" not in kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}" in _IMMUTABLE


def _is_enum(cls: object) -> bool:
    enum = modules.get("enum")
    return enum is not None and isinstance(cls, enum.EnumMeta)


def _is_field(value: object) -> bool:
    return type(value).__name__ == "_tuplegetter"  # of a namedtuple


def _meets(value: Any, expected: Any) -> bool:
    if value is expected:
        return True
    kind = type(expected)
    if kind is weakref.ref:
        return expected() is value
    if kind is _Parts and type(value) is expected.kind and expected.id in (0, id(value)):
        if expected.kind in _CONTAINERS and len(value) != expected.size:
            return False
        return all(map(_meets, _TAKEN_APART[expected.kind](value), expected.parts))
    return False


def _all_meet(values: Mapping[str, Any], expected: Iterable[tuple[str, Any]]) -> bool:
    for name, expectation in expected:
        value = values.get(name, MISSING)
        if value is not expectation and not _meets(value, expectation):
            return False
    return True


def _same_function(fn: Any, code: object, defaults: object, names: Any, rest: Any) -> bool:
    if fn.__code__ is not code:
        return False
    if fn.__defaults__ is not defaults and not _meets(fn.__defaults__, defaults):
        return False
    if names and not _all_meet(fn.__globals__, names):
        return False
    if rest is None:
        return not fn.__kwdefaults__ and not fn.__dict__
    cells, kwdefaults, attributes = rest
    if cells and not all(map(_meets, map(cell_content, fn.__closure__), cells)):
        return False
    if len(fn.__kwdefaults__ or ()) != len(kwdefaults) or not _all_meet(fn.__kwdefaults__ or {}, kwdefaults):
        return False
    return len(fn.__dict__) == len(attributes) and _all_meet(fn.__dict__, attributes)


def _same_class(cls: Any, bases: _Parts, size: int, items: Any) -> bool:
    return len(cls.__dict__) == size and _meets(cls.__bases__, bases) and _all_meet(cls.__dict__, items)
