"""By value, the sender: one message, its root and the records that go before it.

What cannot be found by import in another process goes by value. A `Session` pickles it with `reducers`; each
global that a function refers to becomes a record of its own, and so does each class: first a skeleton, then
its contents. `linking` says what the records are. `dumps_by_value` is a session for one piece of data, and
explains what cannot be sent at all.
"""

from __future__ import annotations

import os
import pickle
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from runtime.guards import holds, watch
from runtime.linking import Record, foreign_classes, link
from runtime.lookup import MISSING, cloudpickle, global_names, modules
from runtime.payload import Payload, Pieces, Stream, Taken, digest_of
from runtime.reducers import new_pickler
from runtime.versions import Origin, Scope, next_class_version, next_version, out_space, serial

_c_dumps = pickle.dumps

# What a message may rely on in its receiver:
SHARED = "shared"  # arguments and functions: spaces live on, and are shared by messages
RESULT = "result"  # to the process whose by-value classes we have; functions bring a snapshot of globals
PORTABLE = "portable"  # nothing

_class_bundles: weakref.WeakKeyDictionary[type, tuple[Any, list[Record]]] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_class_bundles.clear)  # the versions in them were the parent's
_LOCK_CURE = (
    "take rt.state.lock(key) in the task instead (and rt.state, or the task's result, in place of a queue)"
)


def dumps_by_value(obj: object, mode: str, taken: Taken | None, first: BaseException | None) -> Payload:
    """`obj` by value; taken: what to put outside, None: nothing; first: what C pickle said, if it failed."""
    if first is not None:
        if not isinstance(first, Exception) or isinstance(first, MemoryError | RecursionError):
            raise first
        raise_if_inherited(first)
    try:
        data = Session(mode).stream(obj, taken)
        return Payload(data) if taken is None else taken.payload(data)
    except Exception as second:
        raise_if_inherited(second)
        error = second if first is None or _is_lookup_failure(first) else first
        if "_thread." in str(error) and "lock" in str(error).lower():
            error.add_note(f"A lock cannot leave its process; {_LOCK_CURE}.")
        if error is second:
            if first is not None:
                raise second from first
            raise
        if str(second) != str(first):
            error.add_note(f"By value it fails as well: {type(second).__name__}: {second}")
        raise error from error.__cause__


def raise_if_inherited(error: BaseException) -> None:
    """multiprocessing's locks and queues refuse to be pickled; say what works here."""
    if isinstance(error, RuntimeError) and "through inheritance" in str(error):
        raise TypeError(f"{error}; they cannot be arguments of a task: {_LOCK_CURE}") from error


def _is_lookup_failure(error: BaseException) -> bool:
    """True if C pickle only says that it found no name to refer to: the reason why by-value exists."""
    if not isinstance(error, pickle.PicklingError | AttributeError):
        return False
    text = str(error)
    return text.startswith(("Can't pickle", "Can't get")) or "not found as" in text


class Session:
    """One message by value in the making: the records that its root needs, in the order to load them.

    An object that *is* a global (a sentinel as default, a function in a table) is pickled as a
    reference to that global's record, which then precedes; so identity survives. Where two such
    refer to each other, the inner reference is a copy.
    """

    __slots__ = (
        "_active",
        "_announced",
        "_classes",
        "_filled",
        "_message",
        "_queue",
        "_scopes",
        "_sent",
        "_to_origin",
        "records",
        "shared",
    )

    def __init__(self, mode: str) -> None:
        self.shared = mode is SHARED
        self._to_origin = mode is RESULT
        self.records: list[Record] = []
        self._scopes: dict[int, Scope] = {}
        self._sent: dict[tuple[str, str], int] = {}
        self._active: set[tuple[str, str]] = set()
        self._announced: set[str] = set()
        self._classes: set[str] = set()  # with a skeleton on its way
        self._filled: set[str] = set()  # with contents
        self._queue: list[tuple[Scope, str]] = []
        self._message = "" if self.shared else f"~{next(serial)}"

    def stream(self, obj: object, taken: Taken | None) -> Stream:
        """The finished message for a piece of data."""
        pieces = self.write(obj, None, None if taken is None else taken.keep, code=False)
        self.ship_wanted()
        return self.assemble(b"".join(pieces), taken) if self.records else pieces.stream()

    def collect(self, code: object, scope: Scope | None = None) -> bytes:
        """Makes the records of a function or class, returns the root. scope: see `write`."""
        root = self.blob(code, scope)
        self.ship_wanted()
        return root

    def ship_wanted(self) -> None:
        while self._queue:
            self.ship(*self._queue.pop())

    def assemble(self, root: bytes, taken: Taken | None) -> bytes:
        """The message. Buffers of the root may stay outside; those of globals never do: globals outlive
        the call that brought them, and would keep its memory.
        """
        if not self.records:
            return root
        if taken is None:
            return _c_dumps(_Linked((tuple(self.records), root, [])), 5)
        records = [(*r[:5], tuple(map(_copied, r[5]))) if r[0] == "G" else r for r in self.records]
        # Stand for what the root's pickler has put outside, which goes outside once more, in the same order.
        views = [pickle.PickleBuffer(b"" if readonly else bytearray()) for readonly in taken.readonly]
        return _c_dumps(_Linked((tuple(records), root, views)), 5, buffer_callback=lambda view: False)

    def digest(self, root: bytes) -> bytes:
        """Of what `assemble` would make; versions stand for contents."""
        upto = {"N": 3, "C": 3, "S": 3, "G": 4}
        parts = [repr(r[: upto[r[0]]]).encode("utf-8", "surrogatepass") for r in self.records]
        return digest_of(root, *parts)

    def write(
        self,
        obj: object,
        scope: Scope | None,
        callback: Callable[[pickle.PickleBuffer], bool] | None = None,
        target: tuple[str, str] | None = None,
        code: bool = True,
    ) -> Pieces:
        """Pickle one part. code: it is code or a global; then objects in it that are globals of `scope`
        keep their identity (an argument must be a fresh copy each time). target: the global it is.
        """
        pieces = Pieces()
        new_pickler(pieces, callback, self, scope, target, code).dump(obj)
        return pieces

    def blob(self, obj: object, scope: Scope | None) -> bytes:
        """A part by itself, buffers inside."""
        return b"".join(self.write(obj, scope))

    def piece(self, obj: object, scope: Scope, target: tuple[str, str]) -> tuple[bytes, Sequence[memoryview]]:
        taken = Taken()
        return b"".join(self.write(obj, scope, taken.keep, target)), taken.buffers

    def scope(self, globals_: dict[str, Any]) -> Scope:
        scope = self._scopes.get(id(globals_))
        if scope is None:
            space = out_space(globals_)
            if self.shared:
                scope = Scope(globals_, f"{Origin.get()}:{space.label}", space.names)
            else:
                scope = Scope(globals_, f"{self._message}:{space.label}", {})
            self._scopes[id(globals_)] = scope
        return scope

    def announce(self, scope: Scope) -> None:
        if scope.key not in self._announced:
            self._announced.add(scope.key)
            self.records.append(("N", scope.key, scope.base()))

    def want(self, scope: Scope, code: types.CodeType) -> None:
        self._queue += [(scope, name) for name in global_names(code) if name in scope.globals]

    def ship(self, scope: Scope, name: str) -> int | None:
        """Adds the record of a global, returns its version; None while it is being pickled itself."""
        where = (scope.key, name)
        version = self._sent.get(where)
        if version is not None:
            return version
        value = scope.globals.get(name, MISSING)
        if where in self._active or value is MISSING:
            return None
        views: Sequence[memoryview] = ()
        last = scope.names.get(name)
        if last is not None and last.atom is value:
            version, blob = last.version, last.blob
        else:
            self._active.add(where)
            try:
                blob, views = self.piece(value, scope, where)
            except Exception as error:
                error.add_note(
                    f"This is the value of the global {name!r} of {scope.globals.get('__name__', '?')}, "
                    "which a function that travels by value refers to."
                )
                raise
            finally:
                self._active.discard(where)
            version = next_version(scope.names, name, value, digest_of(blob, *views), blob)
        self._sent[where] = version
        self.announce(scope)
        self.records.append(("G", scope.key, name, version, blob, tuple(map(pickle.PickleBuffer, views))))
        return version

    def ship_class(self, cls: type) -> str:
        """Adds the records of a class, returns its id."""
        cp = cloudpickle()
        key: str = cp._get_or_create_tracker_id(cls)
        if key in self._classes:
            return key
        self._classes.add(key)
        if self._to_origin and cls in foreign_classes and "<locals>" not in cls.__qualname__:
            return key  # the receiver of a result made this class, and still has it
        make, args, state, _, _, setter = cp._dynamic_class_reduce(cls)
        args = _complete(cls, args, state[0])
        skeleton = self.blob((make, args), None)
        self.records.append(("C", key, skeleton, self.shared))
        home = getattr(modules.get(cls.__module__), "__dict__", None) if self.shared else None
        contents = self.blob((setter, state), None if home is None else self.scope(home))
        version = (Origin.get(), next_class_version(cls, contents))
        self._filled.add(key)
        self.records.append(("S", key, version, contents))
        return key

    def include_class(self, cls: type) -> str:
        """Like ship_class, for a class met in arguments: all it needs is kept while it does not change."""
        if not self.shared or cls in foreign_classes:
            return self.ship_class(cls)
        bundle = _class_bundles.get(cls)
        if bundle is None or not holds(bundle[0]):
            guards = watch(cls)
            session = Session(SHARED)
            session.collect(cls)
            bundle = (guards or (), session.records)
            if guards is not None:
                _class_bundles[cls] = bundle
        for record in bundle[1]:
            self._merge(record)
        return cloudpickle()._get_or_create_tracker_id(cls)  # type: ignore[no-any-return]

    def _merge(self, record: Record) -> None:
        kind, key, *rest = record
        if kind == "G":
            if (key, rest[0]) in self._sent:
                return
            self._sent[key, rest[0]] = rest[1]
        else:
            known = self._announced if kind == "N" else self._classes if kind == "C" else self._filled
            if key in known:
                return
            known.add(key)
        self.records.append(record)


def _complete(cls: type, args: tuple[Any, ...], contents: dict[str, Any]) -> tuple[Any, ...]:
    """Puts right what cloudpickle leaves out: slots must be there when a class is made, not set later."""
    contents.pop("__slotnames__", None)  # copyreg's cache: comes and goes
    for name in [k for k, v in contents.items() if type(v) is types.MemberDescriptorType]:
        del contents[name]
    if "__slots__" not in contents or not isinstance(args[3], dict):
        return args
    kind, name, bases, keywords, *others = args
    if issubclass(cls, tuple):  # typing.NamedTuple among __orig_bases__ would make the class its own way
        bases = cls.__bases__
    return kind, name, bases, keywords | {"__slots__": contents.pop("__slots__")}, *others


def _copied(buffer: pickle.PickleBuffer) -> bytes | bytearray:
    view = buffer.raw()
    return bytes(view) if view.readonly else bytearray(view)


class _Linked(tuple[Any, ...]):
    """(records, root, buffers), pickled as the call that links them."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return link, tuple(self)
