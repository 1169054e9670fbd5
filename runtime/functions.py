"""Functions: pickled once and numbered by the sender, loaded once by each receiver.

`FunctionTable` keeps the pickle of a function for as long as everything that went into it is provably
the same and immutable (`guards`), else pickles again and compares digests.

`FunctionCache` keeps loaded functions. When a later message has moved a global to another version,
calling an older function moves it back first: `x = 1; submit(f); x = 2; submit(f)` gives 1 and 2 in
whatever order the two arrive.
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from runtime._core import Recent
from runtime.byvalue import SHARED, Session, dumps_by_value, raise_if_inherited
from runtime.guards import Guard, holds, watch
from runtime.linking import Crowd, Links, Record, load_logged, note_import, relink, went_apart
from runtime.lookup import LRU_TYPE, locate, names_by_value_module, resolve
from runtime.payload import digest_of

_c_dumps = pickle.dumps
_ref_ids = itertools.count(1)
CODE_TYPES = (types.FunctionType, types.BuiltinFunctionType, type, LRU_TYPE)


class FunctionRef:
    """A function as it travels. id: the same for equal content, never reused in this process.

    data: a pickle that yields the callable. by_value: whether the code itself is in it. module: where to
    import it from, or where it was defined. name: its qualified name, for messages.
    """

    __slots__ = ("by_value", "data", "id", "module", "name")

    def __init__(self, id: int, data: bytes, by_value: bool, module: str, name: str) -> None:
        self.id, self.data, self.by_value, self.module, self.name = id, data, by_value, module, name

    def __repr__(self) -> str:
        how = "by value" if self.by_value else "by reference"
        return f"FunctionRef({self.id}, {self.module}.{self.name} {how}, {len(self.data)} bytes)"


class FunctionTable:
    """Sender's side: which functions have been pickled.

    Thread-safety: any thread may call `ref`. Keeps no function alive. The contents of the last `size`
    functions, and at most `nbytes` bytes of them, are recognised when they come again.
    """

    def __init__(self, size: int = 1024, nbytes: int = 32 * 1024 * 1024) -> None:
        # id(fn) -> ref, module, name of importable top-level functions. No weak reference is
        # followed: if the name gives this very object, the entry is about it.
        self.plain: dict[int, tuple[FunctionRef, str, str]] = {}
        self._entries: dict[int, _Entry] = {}
        self._by_digest = Recent(size, nbytes)

    def ref(self, fn: Callable[..., Any]) -> FunctionRef:
        """The reference for any callable; bound methods, partials and instances are pickled whole.

        Raises what pickling raises.
        """
        entry = self._entries.get(id(fn))
        if entry is not None and entry.alive() is fn:
            if entry.guards is not None:
                if holds(entry.guards):
                    return entry.ref
            elif resolve(entry.ref.module, entry.ref.name) is fn:
                return entry.ref
        if issubclass(type(fn), CODE_TYPES):
            return self._ref_code(fn)
        return self._ref_object(fn)

    def modules(self) -> list[str]:
        """Those outside of the standard library in which another process finds what was sent by name."""
        entries = list(self._entries.values())
        names = {entry.ref.module for entry in entries if entry.guards is None}
        return sorted(name for name in names if name.partition(".")[0] not in sys.stdlib_module_names)

    def _ref_code(self, fn: Any) -> FunctionRef:
        where = locate(fn)
        guards = None
        if where is not None:
            data = _c_dumps(fn, 5)
            ref = self._intern(digest_of(data), lambda: data, False, *where)
        elif isinstance(fn, types.BuiltinFunctionType):
            return self._ref_object(fn)
        else:
            guards = watch(fn)  # before it is pickled: what changes meanwhile is noticed the next time
            ref = self._ref_by_value(fn)
            if guards is None:
                self._entries.pop(id(fn), None)
                return ref
        alive = weakref.ref(fn, functools.partial(_forget, self._entries, self.plain, id(fn)))
        self._entries[id(fn)] = _Entry(alive, ref, guards)
        if where is not None and "." not in where[1]:
            self.plain[id(fn)] = (ref, *where)
        return ref

    def _ref_by_value(self, fn: Any) -> FunctionRef:
        inner = fn.__wrapped__ if type(fn) is LRU_TYPE else fn
        session = Session(SHARED)
        scope = session.scope(inner.__globals__) if type(inner) is types.FunctionType else None
        try:
            root = session.collect(fn, scope)
        except Exception as error:
            raise_if_inherited(error)
            error.add_note(f"So {name_of(fn)} cannot be sent to a worker.")
            raise
        make = functools.partial(session.assemble, root, None)
        return self._intern(session.digest(root), make, True, str(getattr(fn, "__module__", "")), name_of(fn))

    def _ref_object(self, obj: Any) -> FunctionRef:
        try:
            data = _c_dumps(obj, 5)
            by_value = names_by_value_module(data)
        except BaseException as error:
            data, by_value = dumps_by_value(obj, SHARED, None, error).joined(), True
        else:
            if by_value:
                data = dumps_by_value(obj, SHARED, None, None).joined()
        return self._intern(digest_of(data), lambda: data, by_value, "", name_of(obj))

    def _intern(
        self, digest: bytes, make: Callable[[], bytes], by_value: bool, module: str, name: str
    ) -> FunctionRef:
        ref: FunctionRef | None = self._by_digest.find(digest)
        if ref is not None:
            return ref
        data = make()
        fresh = FunctionRef(next(_ref_ids), data, by_value, module, name)
        kept: FunctionRef = self._by_digest.keep(digest, fresh, len(data))
        return kept


class _Entry:
    """What the table knows of a live function. guards: None if it is found by name."""

    __slots__ = ("alive", "guards", "ref")

    def __init__(self, alive: weakref.ref[Any], ref: FunctionRef, guards: tuple[Guard, ...] | None) -> None:
        self.alive, self.ref, self.guards = alive, ref, guards


def _forget(entries: dict[int, Any], plain: dict[int, Any], key: int, _dead: object) -> None:
    entries.pop(key, None)
    plain.pop(key, None)


def name_of(obj: Any) -> str:
    while type(obj) is functools.partial:
        obj = obj.func
    try:
        name = obj.__qualname__
    except Exception:  # a proxy may raise anything
        name = None
    return name if isinstance(name, str) else type(obj).__qualname__


class FunctionCache:
    """Receiver's side: loaded functions by id, the least recently used dropped first."""

    def __init__(self, size: int = 1024, nbytes: int = 64 * 1024 * 1024) -> None:
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()
        self._size, self._limit, self._held = size, nbytes, 0

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, id: object) -> bool:
        return id in self._loaded

    def load(self, id: int, data: bytes | memoryview | None = None) -> Callable[..., Any]:
        """The callable; `data` is read only if the id is not known. Raises LookupError if it is not
        and there is no data (dropped meanwhile: ask for it again), or what unpickling raises.
        """
        loaded = self._loaded.get(id)
        if loaded is not None:
            self._loaded.move_to_end(id)
            if loaded.records and loaded.stamp != Links.stamp:
                relink(loaded.records)
                loaded.stamp = Links.stamp
            return loaded.fn  # type: ignore[no-any-return]
        if data is None:
            raise LookupError(
                f"function {id} is not loaded in process {os.getpid()}, and came without its pickle"
            )
        return self._load(id, data)

    def _load(self, id: int, data: bytes | memoryview) -> Callable[..., Any]:
        fn, records = load_logged(data)
        note_import(fn)
        self._loaded[id] = loaded = _Loaded(fn, records, len(data))
        self._held += loaded.nbytes
        while len(self._loaded) > self._size or (self._held > self._limit and len(self._loaded) > 1):
            self._held -= self._loaded.popitem(last=False)[1].nbytes
        return fn  # type: ignore[no-any-return]

    def settled(self, id: int) -> bool:
        """Whether a loaded function refers to no global that a message may rebind."""
        loaded = self._loaded.get(id)
        return loaded is not None and not loaded.records

    def needs(self, id: int) -> bool:
        """Whether `load` must be given the pickle."""
        return id not in self._loaded

    def leave(self) -> None:
        """The call has ended."""

    def drop(self, id: int) -> None:
        loaded = self._loaded.pop(id, None)
        if loaded is not None:
            self._held -= loaded.nbytes

    def clear(self) -> None:
        self._loaded.clear()
        self._held = 0


class SharedCache(FunctionCache):
    """That of a worker with several threads. Thread-safety: any thread, at the price of a lock."""

    def __init__(self) -> None:
        super().__init__()
        self._crowd = Crowd()

    def load(self, id: int, data: bytes | memoryview | None = None) -> Callable[..., Any]:
        """As FunctionCache.load; LookupError, too, when the function needs its globals to itself now, and
        there is no data. `leave` ends the call.
        """
        with self._crowd.lock:
            loaded = self._loaded.get(id)
            if loaded is not None and not self._crowd.fits(loaded.records):
                if data is None:
                    raise LookupError(f"function {id} must be loaded once more: other calls use its globals")
                fn: Callable[..., Any] = load_logged(data)[0]
                return fn
            if loaded is not None and loaded.records:
                self._crowd.enter()
            return super().load(id, data)

    def _load(self, id: int, data: bytes | memoryview) -> Callable[..., Any]:
        fn = super()._load(id, data)
        if went_apart():  # it is for this call alone
            self.drop(id)
        return fn

    def needs(self, id: int) -> bool:
        """Whether `load` must be given the pickle: it may be, if other calls use the function's globals."""
        loaded = self._loaded.get(id)
        return loaded is None or bool(loaded.records)

    def leave(self) -> None:
        """The call of this thread has ended."""
        self._crowd.leave()


class _Loaded:
    __slots__ = ("fn", "nbytes", "records", "stamp")

    def __init__(self, fn: Any, records: tuple[Record, ...], nbytes: int) -> None:
        self.fn, self.records, self.nbytes = fn, records, nbytes
        self.stamp = Links.stamp
