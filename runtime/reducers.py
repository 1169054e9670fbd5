"""By value: how functions, classes, modules, cells and known globals travel inside a pickle.

The pickler is cloudpickle's with our reducer. It never embeds globals in functions: a function names its
space, and each global that it refers to becomes a record of the message that the pickle is a piece of. What
the pickle says in their place (a global's value, a class, a function) is a call of a function of `linking`.
"""

from __future__ import annotations

import collections
import functools
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from runtime import arrays, linking
from runtime.lookup import (
    ATOMS,
    IN_MARK,
    LRU_TYPE,
    OUT_MARK,
    cell_content,
    cloudpickle,
    global_names,
    importable,
    locate,
    modules,
)
from runtime.payload import Pieces
from runtime.versions import Scope


class Message(Protocol):
    """What reducers ask of the message in the making."""

    def scope(self, globals_: dict[str, Any]) -> Scope: ...
    def announce(self, scope: Scope) -> None: ...
    def want(self, scope: Scope, code: types.CodeType) -> None: ...
    def ship(self, scope: Scope, name: str) -> int | None: ...
    def ship_class(self, cls: type) -> str: ...
    def include_class(self, cls: type) -> str: ...


def new_pickler(
    file: Pieces,
    callback: Callable[[pickle.PickleBuffer], bool] | None,
    session: Message,
    scope: Scope | None,
    target: tuple[str, str] | None,
    code: bool,
) -> Any:
    """A pickler for one piece of a message. code: it is code or a global; then objects in it that are
    globals of `scope` keep their identity. target: the global it is.
    """
    arrays.refresh()
    pickler = _pickler_class()(file, 5, callback)
    pickler.session, pickler.cells = session, set()
    pickler.scope, pickler.target, pickler.code = scope, target, code
    return pickler


@functools.cache
def _pickler_class() -> type[Any]:
    base = cloudpickle().Pickler
    tables = collections.ChainMap(arrays.own, *base.dispatch_table.maps)
    return type("_Pickler", (base,), {"reducer_override": _reduce, "dispatch_table": tables})


def _reduce(self: Any, obj: Any) -> Any:
    """The pickler's reducer_override: how functions, classes, modules, cells and known globals travel."""
    kind = type(obj)
    if kind is types.FunctionType:
        return _reduce_function(self, obj)
    if issubclass(kind, type):
        return _reduce_class(self, obj)
    if kind is types.CodeType:
        return NotImplemented
    if kind is types.CellType and id(obj) in self.cells:
        return linking.make_cell, ()
    if kind is LRU_TYPE:
        return _reduce_lru(self, obj)
    if issubclass(kind, types.ModuleType):
        return _reduce_module(obj)
    if self.scope is not None:
        name = self.scope.name_of(obj)
        reference = None if name is None else _reference(self, self.scope, name)
        if reference is not None:
            return reference
    return _reduce_odd(obj, kind)


def _reference(self: Any, scope: Scope, name: str) -> tuple[Any, ...] | None:
    """The reduction to "this global's value", or None for the global that is being pickled."""
    if self.target == (scope.key, name):
        return None
    version = self.session.ship(scope, name)
    return None if version is None else (linking.global_value, (scope.key, name, version))


def _reduce_function(self: Any, fn: types.FunctionType) -> Any:
    if locate(fn) is not None:
        return NotImplemented
    session: Message = self.session
    scope = session.scope(fn.__globals__)
    session.announce(scope)
    if scope.globals.get(fn.__name__) is fn:
        reference = _reference(self, scope, fn.__name__)
        if reference is not None:
            return reference
    session.want(scope, fn.__code__)

    def kept(value: object) -> object:
        name = None if type(value) in ATOMS else scope.name_of(value)
        reference = None if name is None else _reference(self, scope, name)
        return value if reference is None else _Reduced(reference)

    cells = fn.__closure__ or ()
    self.cells.update([id(cell) for cell in cells])  # made empty first, so that two functions can share one
    contents = [cell_content(cell) for cell in cells]
    defaults, kwdefaults = fn.__defaults__, fn.__kwdefaults__
    values = [*contents, *[scope.globals.get(name) for name in global_names(fn.__code__)]]
    packages = [value for value in values if issubclass(type(value), types.ModuleType)]
    try:
        annotations = fn.__annotations__
    except Exception:  # evaluated late (3.14), and not all names exist
        annotations = {}
    state = (
        fn.__name__,
        fn.__qualname__,
        fn.__module__,
        fn.__doc__,
        None if defaults is None else tuple([kept(v) for v in defaults]),
        None if kwdefaults is None else {k: kept(v) for k, v in kwdefaults.items()},
        annotations,
        fn.__dict__.copy(),
        tuple([kept(v) for v in contents]),
        cloudpickle()._find_imported_submodules(fn.__code__, packages),
    )
    made = (scope.key, fn.__code__, cells or None)
    return linking.make_function, made, state, None, None, linking.set_function


class _Reduced:
    """Pickled as the call that it holds."""

    __slots__ = ("call",)

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def _reduce_class(self: Any, cls: Any) -> Any:
    cp = cloudpickle()
    if cls in (type(None), type(...), type(NotImplemented)) or cls in cp._BUILTIN_TYPE_NAMES:
        return cp._class_reduce(cls)
    if cp._should_pickle_by_reference(cls) and importable(cls.__module__):
        return NotImplemented
    session: Message = self.session
    key = session.ship_class(cls) if self.code else session.include_class(cls)
    return linking.class_by_id, (key, f"{cls.__module__}.{cls.__qualname__}")


def _reduce_lru(self: Any, cached: Any) -> Any:
    """functools reduces its caches to a name, which __main__ of another process has not."""
    if locate(cached) is not None:
        return NotImplemented
    inner = cached.__wrapped__
    if type(inner) is types.FunctionType:
        scope = self.session.scope(inner.__globals__)
        name = getattr(cached, "__name__", "")
        if scope.globals.get(name) is cached:
            reference = _reference(self, scope, name)
            if reference is not None:
                return reference
    parameters = cached.cache_parameters()
    return linking.make_lru, (inner, parameters["maxsize"], parameters["typed"])


def _reduce_module(module: types.ModuleType) -> Any:
    if modules.get(module.__name__) is not module or importable(module.__name__):
        return NotImplemented
    skip = ("__builtins__", "__spec__", "__loader__", OUT_MARK, IN_MARK)
    contents = {k: v for k, v in vars(module).items() if k not in skip}
    return cloudpickle().dynamic_subimport, (module.__name__, {}), contents, None, None, linking.fill_module


def _reduce_odd(obj: Any, kind: type) -> Any:
    """What neither pickle nor cloudpickle can send, or sends as a name that the receiver lacks."""
    if issubclass(kind, functools.cached_property):
        return linking.make_cached_property, (kind, obj.func, obj.attrname)
    if kind is weakref.WeakKeyDictionary or kind is weakref.WeakValueDictionary:
        return kind, (dict(obj),)
    if kind.__module__ == "typing" and not importable(getattr(obj, "__module__", None) or "builtins"):
        if kind.__name__ == "TypeVar":
            return cloudpickle()._make_typevar, cloudpickle()._decompose_typevar(obj)
        if kind.__name__ in ("ParamSpec", "TypeVarTuple"):
            return linking.make_typing, (kind, obj.__module__, obj.__name__)
        if kind.__name__ == "NewType":
            return linking.make_typing, (kind, obj.__module__, obj.__name__, obj.__supertype__)
    return NotImplemented
