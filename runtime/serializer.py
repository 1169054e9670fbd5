"""Bytes for everything that crosses between processes: arguments, results, exceptions, functions.

    sender                                                receiver
    dumps(obj)            ── C pickle, protocol 5 ──►     loads
         │ fails, or names __main__ (which the receiver does not have)
         └► _Session      ── records + root ───────►      _link ─► _InSpace, classes, root
    FunctionTable.ref(fn) ── FunctionRef.data ─────►      FunctionCache.load
    pack_call(fn, a, kw)  ── FunctionRef, Payload ─►      unpack_call
    dump_exception        ── Payload ──────────────►      load_exception

Sender:
1. `dumps` tries C pickle; buffers of OUT_OF_BAND_MIN and more stay outside the stream.
2. What cannot be found by import in another process goes by value: a `_Session` pickles it with
   cloudpickle's reducers, but never embeds globals in functions. A function names its *space*
   (the module its globals belong to); each global it refers to becomes a record of its own:
   (space, name, version, pickle of the value). The version rises when that pickle changes.
   Classes are records too: a skeleton, then its contents, with a version.
3. `FunctionTable` keeps the pickle of a function for as long as everything that went into it
   is provably the same and immutable (`_watch`), else pickles again and compares digests.

Receiver:
4. `_link` walks the records. A space is one globals dict per process, so by-value functions of a
   module share their globals. A global is set only when its version is not the current one: what
   the receiver itself assigned (an initializer's `global model`) stays until the sender rebinds
   the name. Contents of a class likewise.
5. `FunctionCache` keeps loaded functions. When a later message has moved a global to another
   version, calling an older function moves it back first (`_relink`): `x = 1; submit(f); x = 2;
   submit(f)` gives 1 and 2 in whatever order the two arrive.

Arguments and functions are *shared* messages (spaces live on in the receiver). Results are not: a
function in a result brings its globals along as a snapshot.

Nothing here keeps a function, its closure or a bound object alive in the sender. Everything may
be used from many threads at once. cloudpickle is imported when something goes by value first.
"""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import operator
import os
import pickle
import sys
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import RemoteError

__all__ = [
    "OUT_OF_BAND_MIN",
    "FunctionCache",
    "FunctionRef",
    "FunctionTable",
    "Payload",
    "adopt_main",
    "dump_exception",
    "dumps",
    "dumps_frozen",
    "dumps_item",
    "dumps_portable",
    "load_exception",
    "loads",
    "pack_call",
    "split_callable",
    "unpack_call",
]

OUT_OF_BAND_MIN = 16 * 1024  # bytes: smaller buffers stay inside the pickle

_c_dumps = pickle.dumps
_c_loads = pickle.loads
_modules = sys.modules
_MISSING: Any = object()
_Record = tuple[Any, ...]

# What a message by value may rely on in its receiver:
_SHARED = "shared"  # arguments and functions: spaces live on, and are shared by messages
_RESULT = "result"  # to the process whose by-value classes we have; functions bring a snapshot of globals
_PORTABLE = "portable"  # nothing


# ---------------------------------------------------------------------------------------------
# Payloads
# ---------------------------------------------------------------------------------------------


class Payload:
    """A pickle and the large buffers that stayed outside of it.

    data: the pickle stream. buffers: flat contiguous views of OUT_OF_BAND_MIN bytes or more each.
    readonly: per buffer, whether the original was read-only. nbytes: data and buffers together.
    """

    __slots__ = ("buffers", "data", "nbytes", "readonly")

    def __init__(
        self, data: bytes, buffers: tuple[memoryview, ...] = (), readonly: tuple[bool, ...] = ()
    ) -> None:
        self.data = data
        self.buffers = buffers
        self.readonly = readonly
        self.nbytes = len(data) + sum([b.nbytes for b in buffers]) if buffers else len(data)

    def __repr__(self) -> str:
        return f"Payload({len(self.data)} bytes, {len(self.buffers)} buffers, {self.nbytes} bytes in all)"


class _Taken(list[memoryview]):
    """The buffers that a pickler put outside; `keep` is its buffer_callback (true: inside)."""

    def keep(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous: pickle says so in its own words
            return True
        if view.nbytes < OUT_OF_BAND_MIN:
            return True
        self.append(view)
        return False


def dumps(obj: object) -> Payload:
    """Pickle a result. A class that came by value from the process that asked goes back as its id.
    Raises whatever makes pickling impossible, BaseExceptions of the object included.
    """
    return _encode(obj, False, _RESULT)


def dumps_portable(obj: object) -> Payload:
    """Like `dumps`, for any process, not only the one that asked: classes by value are complete."""
    return _encode(obj, False, _PORTABLE)


def dumps_frozen(obj: object) -> Payload:
    """Pickle arguments: buffers are copied (once), so later changes to the caller's arrays do not show."""
    return _encode(obj, True, _SHARED)


dumps_item = dumps_frozen


def loads(data: bytes | memoryview, buffers: Iterable[Any] = ()) -> Any:
    """The object again. Arrays are views of `buffers`, writable if these are."""
    try:
        return _c_loads(data, buffers=buffers)
    except (ImportError, AttributeError) as error:
        _advise_import(error)
        raise


def _encode(obj: object, freeze: bool, mode: str) -> Payload:
    taken = _Taken()
    try:
        data = _c_dumps(obj, 5, buffer_callback=taken.keep)
    except BaseException as error:
        taken.clear()
        data = _dumps_by_value(obj, mode, taken, error)
    else:
        # The shortest stream that can name a class or function of __main__ is longer than 24 bytes.
        if len(data) > 24 and _names_by_value_module(data):
            taken.clear()
            data = _dumps_by_value(obj, mode, taken, None)
    if not taken:
        return Payload(data)
    buffers = tuple([memoryview(bytes(view)) for view in taken]) if freeze else tuple(taken)
    return Payload(data, buffers, tuple([view.readonly for view in taken]))


def _dumps_by_value(obj: object, mode: str, taken: _Taken | None, first: BaseException | None) -> bytes:
    """The pickle of `obj` by value; `first` is what C pickle said, if it failed."""
    if first is not None:
        if not isinstance(first, Exception) or isinstance(first, MemoryError | RecursionError):
            raise first
        _raise_if_inherited(first)
    try:
        return _Session(mode).stream(obj, taken)
    except Exception as second:
        _raise_if_inherited(second)
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


_LOCK_CURE = (
    "take rt.state.lock(key) in the task instead (and rt.state, or the task's result, in place of a queue)"
)


def _raise_if_inherited(error: BaseException) -> None:
    """multiprocessing's locks and queues refuse to be pickled; say what works here."""
    if isinstance(error, RuntimeError) and "through inheritance" in str(error):
        raise TypeError(f"{error}; they cannot be arguments of a task: {_LOCK_CURE}") from error


def _is_lookup_failure(error: BaseException) -> bool:
    """True if C pickle only says that it found no name to refer to: the reason why by-value exists."""
    if not isinstance(error, pickle.PicklingError | AttributeError):
        return False
    text = str(error)
    return text.startswith(("Can't pickle", "Can't get")) or "not found as" in text


def _advise_import(error: BaseException) -> None:
    if isinstance(error, ModuleNotFoundError):
        note = (
            f"The pickle refers to module {error.name!r}, which process {os.getpid()} cannot import. Install "
            "it, put its folder on PYTHONPATH or sys.path before the Runtime is made, or define the function "
            "in __main__ (it then travels by value)."
        )
    elif isinstance(error, AttributeError) and str(error).startswith("Can't get attribute"):
        note = (
            "The module was imported, but has no such name (any more): is it made only under "
            '`if __name__ == "__main__":`, at run time, or in another version of the file?'
        )
    else:
        return
    if note not in getattr(error, "__notes__", ()):  # pickles nest
        error.add_note(note)


# ---------------------------------------------------------------------------------------------
# By reference or by value
# ---------------------------------------------------------------------------------------------

_importable_cache: dict[str, tuple[int, bool]] = {}  # module name -> (id of the module, answer)


def _pattern(module: str) -> bytes:
    """How a protocol-5 stream spells the module of a global; later uses of it are memo references."""
    raw = module.encode("utf-8", "surrogatepass")
    return (
        b"\x8c" + bytes([len(raw)]) + raw if len(raw) < 256 else b"X" + len(raw).to_bytes(4, "little") + raw
    )


_MAIN = _pattern("__main__")
_other_patterns: tuple[bytes, ...] = (_pattern("__mp_main__"),) if "__mp_main__" in sys.modules else ()


def _names_by_value_module(data: bytes) -> bool:
    """True if the stream names a module that other processes lack (or has its name as a string: no harm)."""
    if data.find(_MAIN) >= 0:  # `in` takes 0.3 µs longer: it first tries whether the pattern is an int
        return True
    return bool(_other_patterns) and any(data.find(pattern) >= 0 for pattern in _other_patterns)


def _importable(name: str) -> bool:
    """True if another process that imports `name` gets the same code: the file is found by import."""
    global _other_patterns
    module = _modules.get(name)
    if module is None or name in ("__main__", "__mp_main__"):
        return False
    known = _importable_cache.get(name)
    if known is not None and known[0] == id(module):
        return known[1]
    try:
        answer = _search(name, module)
    except Exception:  # a finder that fails: trust sys.modules, as pickle does
        answer = True
    _importable_cache[name] = (id(module), answer)
    if not answer and _pattern(name) not in _other_patterns:
        _other_patterns += (_pattern(name),)
    return answer


def _search(name: str, module: object) -> bool:
    own = getattr(module, "__spec__", None)
    if own is not None and own.name != name:  # os.path is posixpath, put under that name by os
        return _importable(own.name)
    if name in sys.builtin_module_names:
        return True
    path = None
    parent = name.rpartition(".")[0]
    if parent:
        if not _importable(parent):
            return False
        path = getattr(_modules[parent], "__path__", None)
        if path is None:  # not a package: it has put this name into sys.modules itself
            return True
    finders = [f.find_spec for f in sys.meta_path if hasattr(f, "find_spec")]
    spec = next((found for find in finders if (found := find(name, path, None)) is not None), None)
    if spec is None:
        return False
    here, there = getattr(own, "origin", None) or getattr(module, "__file__", None), spec.origin
    if here == there or not (here and there and os.path.exists(here) and os.path.exists(there)):
        return True
    return os.path.samefile(here, there)


def _resolve(module: str, qualname: str) -> Any:
    """The object that this name stands for, or _MISSING."""
    found: Any = _modules.get(module, _MISSING)
    try:
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception:  # a module's own __getattr__ may raise anything
        return _MISSING
    return found


def _locate(obj: Any) -> tuple[str, str] | None:
    """(module, qualname) if `obj` can be found by that name in another process, else None."""
    module = getattr(obj, "__module__", None)
    name = getattr(obj, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or "<" in name:
        return None
    if _resolve(module, name) is not obj or not _importable(module):
        return None
    loaded = _modules.get("cloudpickle")  # the user may have asked for by value there
    asked: set[str] = getattr(loaded, "list_registry_pickle_by_value", set)()
    if asked and _cp()._is_registered_pickle_by_value(_modules[module]):
        return None
    return module, name


@functools.cache
def _cp() -> Any:
    import cloudpickle.cloudpickle as module

    return module


def _digest(*parts: bytes | memoryview) -> bytes:
    from hashlib import blake2b

    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


# ---------------------------------------------------------------------------------------------
# By value, sender
# ---------------------------------------------------------------------------------------------

_lru_type: Any = type(functools.lru_cache(lambda: None))
_ATOMS = frozenset(
    [int, float, complex, str, bytes, bool, type(None), type(...), type(NotImplemented), range]
)
_OUT_MARK = "__runtime_out__"  # in a globals dict that is no module's: its _OutSpace
_IN_MARK = "__runtime_in__"  # in a receiver's globals dict: its _InSpace, so that both live equally long
_NOT_GLOBALS = frozenset(["__builtins__", _OUT_MARK, _IN_MARK])
_GLOBAL_OPS = frozenset(
    ["LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"]
)

_serial = itertools.count(1)  # versions, labels of spaces: unique in this process
_version_lock = threading.Lock()


class _Origin:
    """Which process numbered the versions. Made on first use, again in a forked child."""

    token = ""

    @classmethod
    def get(cls) -> str:
        if not cls.token:
            cls.token = os.urandom(6).hex()
        return cls.token

    @classmethod
    def forget(cls) -> None:
        global _version_lock
        cls.token = ""
        _version_lock = threading.Lock()
        _class_bundles.clear()


os.register_at_fork(after_in_child=_Origin.forget)


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
        return _nothing, ()  # met only where somebody pickles a globals dict as data


def _nothing() -> None:
    return None


_out_spaces: dict[str, _OutSpace] = {}  # module name -> its space


def _out_space(globals_: dict[str, Any]) -> _OutSpace:
    name = globals_.get("__name__")
    if isinstance(name, str) and getattr(_modules.get(name), "__dict__", None) is globals_:
        space = _out_spaces.get(name)
        if space is None or space.owner != id(globals_):
            space = _out_spaces[name] = _OutSpace(name, id(globals_))
        return space
    space = globals_.get(_OUT_MARK)
    if space is None or space.owner != id(globals_):
        space = globals_[_OUT_MARK] = _OutSpace(f"#{next(_serial)}", id(globals_))
    return space


class _Scope:
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
                if type(v) not in _ATOMS and not issubclass(type(v), skip) and k not in _NOT_GLOBALS
            }
        return self._ids.get(id(value))

    def base(self) -> dict[str, Any]:
        names = ("__name__", "__file__", "__package__", "__doc__")
        return {k: self.globals[k] for k in names if isinstance(self.globals.get(k), str)}


class _Session:
    """One message by value in the making: the records that its root needs, in the order to load them.

    ("N", key, base)                        a space and its __name__, __file__ …
    ("C", class id, skeleton, keep)         a class without contents
    ("S", class id, version, contents)
    ("G", key, name, version, value, views) a global; large buffers in it are not copied before they must be

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
        self.shared = mode is _SHARED
        self._to_origin = mode is _RESULT
        self.records: list[_Record] = []
        self._scopes: dict[int, _Scope] = {}
        self._sent: dict[tuple[str, str], int] = {}
        self._active: set[tuple[str, str]] = set()
        self._announced: set[str] = set()
        self._classes: set[str] = set()  # with a skeleton on its way
        self._filled: set[str] = set()  # with contents
        self._queue: list[tuple[_Scope, str]] = []
        self._message = "" if self.shared else f"~{next(_serial)}"

    def stream(self, obj: object, taken: _Taken | None) -> bytes:
        """The finished message for a piece of data."""
        return self.assemble(self.collect(obj, taken), taken)

    def collect(
        self, obj: object, taken: _Taken | None, scope: _Scope | None = None, code: bool = False
    ) -> bytes:
        """Makes the records, returns the root. scope, code: see `blob`."""
        root = self.blob(obj, scope, None if taken is None else taken.keep, code=code)
        while self._queue:
            self.ship(*self._queue.pop())
        return root

    def assemble(self, root: bytes, taken: _Taken | None) -> bytes:
        """The message. Buffers of the root may stay outside; those of globals never do: globals outlive
        the call that brought them, and would keep its memory.
        """
        if not self.records:
            return root
        views = [pickle.PickleBuffer(view) for view in taken or ()]
        if taken is None:
            return _c_dumps(_Linked((tuple(self.records), root, views)), 5)
        taken.clear()
        records = [(*r[:5], tuple(map(_copied, r[5]))) if r[0] == "G" else r for r in self.records]
        return _c_dumps(_Linked((tuple(records), root, views)), 5, buffer_callback=taken.keep)

    def digest(self, root: bytes) -> bytes:
        """Of what `assemble` would make; versions stand for contents."""
        upto = {"N": 3, "C": 3, "S": 3, "G": 4}
        parts = [repr(r[: upto[r[0]]]).encode("utf-8", "surrogatepass") for r in self.records]
        return _digest(root, *parts)

    def blob(
        self,
        obj: object,
        scope: _Scope | None,
        callback: Callable[[pickle.PickleBuffer], bool] | None = None,
        target: tuple[str, str] | None = None,
        code: bool = True,
    ) -> bytes:
        """The pickle of one piece. code: it is code or a global; then objects in it that are globals of
        `scope` keep their identity (an argument must be a fresh copy each time). target: the global it is.
        """
        file = io.BytesIO()
        pickler = _pickler_class()(file, 5, callback)
        pickler.session, pickler.cells = self, set()
        pickler.scope, pickler.target, pickler.code = scope, target, code
        pickler.dump(obj)
        return file.getvalue()

    def piece(
        self, obj: object, scope: _Scope, target: tuple[str, str]
    ) -> tuple[bytes, Sequence[memoryview]]:
        taken = _Taken()
        return self.blob(obj, scope, taken.keep, target), taken

    def scope(self, globals_: dict[str, Any]) -> _Scope:
        scope = self._scopes.get(id(globals_))
        if scope is None:
            space = _out_space(globals_)
            if self.shared:
                scope = _Scope(globals_, f"{_Origin.get()}:{space.label}", space.names)
            else:
                scope = _Scope(globals_, f"{self._message}:{space.label}", {})
            self._scopes[id(globals_)] = scope
        return scope

    def announce(self, scope: _Scope) -> None:
        if scope.key not in self._announced:
            self._announced.add(scope.key)
            self.records.append(("N", scope.key, scope.base()))

    def want(self, scope: _Scope, code: types.CodeType) -> None:
        self._queue += [(scope, name) for name in _global_names(code) if name in scope.globals]

    def ship(self, scope: _Scope, name: str) -> int | None:
        """Adds the record of a global, returns its version; None while it is being pickled itself."""
        where = (scope.key, name)
        version = self._sent.get(where)
        if version is not None:
            return version
        value = scope.globals.get(name, _MISSING)
        if where in self._active or value is _MISSING:
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
            version = _next_version(scope.names, name, value, _digest(blob, *views), blob)
        self._sent[where] = version
        self.announce(scope)
        self.records.append(("G", scope.key, name, version, blob, tuple(map(pickle.PickleBuffer, views))))
        return version

    def ship_class(self, cls: type) -> str:
        """Adds the records of a class, returns its id."""
        cp = _cp()
        key: str = cp._get_or_create_tracker_id(cls)
        if key in self._classes:
            return key
        self._classes.add(key)
        if self._to_origin and cls in _foreign_classes and "<locals>" not in cls.__qualname__:
            return key  # the receiver of a result made this class, and still has it
        make, args, state, _, _, setter = cp._dynamic_class_reduce(cls)
        args = _complete(cls, args, state[0])
        skeleton = self.blob((make, args), None)
        self.records.append(("C", key, skeleton, self.shared))
        home = getattr(_modules.get(cls.__module__), "__dict__", None) if self.shared else None
        contents = self.blob((setter, state), None if home is None else self.scope(home))
        version = (_Origin.get(), _next_class_version(cls, contents))
        self._filled.add(key)
        self.records.append(("S", key, version, contents))
        return key

    def include_class(self, cls: type) -> str:
        """Like ship_class, for a class met in arguments: all it needs is kept while it does not change."""
        if not self.shared or cls in _foreign_classes:
            return self.ship_class(cls)
        bundle = _class_bundles.get(cls)
        if bundle is None or not _holds(bundle[0]):
            guards = _watch(cls)
            session = _Session(_SHARED)
            session.collect(cls, None, code=True)
            bundle = (guards or (), session.records)
            if guards is not None:
                _class_bundles[cls] = bundle
        for record in bundle[1]:
            self._merge(record)
        return _cp()._get_or_create_tracker_id(cls)  # type: ignore[no-any-return]

    def _merge(self, record: _Record) -> None:
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


def _next_version(names: dict[str, _Sent], name: str, value: object, digest: bytes, blob: bytes) -> int:
    small = type(value) in _ATOMS and len(blob) < 4096
    atom, kept = (value, blob) if small else (_MISSING, b"")
    with _version_lock:
        last = names.get(name)
        version = last.version if last is not None and last.digest == digest else next(_serial)
        names[name] = _Sent(version, digest, atom, kept)
    return version


_class_versions: weakref.WeakKeyDictionary[type, tuple[bytes, int]] = weakref.WeakKeyDictionary()
_class_bundles: weakref.WeakKeyDictionary[type, tuple[Any, list[_Record]]] = weakref.WeakKeyDictionary()
_code_names: weakref.WeakKeyDictionary[types.CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _next_class_version(cls: type, contents: bytes) -> int:
    digest = _digest(contents)
    with _version_lock:
        last = _class_versions.get(cls)
        if last is None or last[0] != digest:
            last = _class_versions[cls] = (digest, next(_serial))
    return last[1]


def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that the code, and the code within it, reads or writes."""
    names = _code_names.get(code)
    if names is None:
        import dis

        found = {i.argval: None for i in dis.get_instructions(code) if i.opname in _GLOBAL_OPS}
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                found.update(dict.fromkeys(_global_names(const)))
        names = _code_names[code] = tuple([name for name in found if name not in _NOT_GLOBALS])
    return names


class _Reduced:
    """Pickled as the call that it holds."""

    __slots__ = ("call",)

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class _Empty:
    """In place of the content of an empty cell (the class itself is the marker)."""


@functools.cache
def _pickler_class() -> type[Any]:
    return type("_Pickler", (_cp().Pickler,), {"reducer_override": _reduce})


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
        return _make_cell, ()
    if kind is _lru_type:
        return _reduce_lru(self, obj)
    if issubclass(kind, types.ModuleType):
        return _reduce_module(obj)
    if self.scope is not None:
        name = self.scope.name_of(obj)
        reference = None if name is None else _reference(self, self.scope, name)
        if reference is not None:
            return reference
    return _reduce_odd(obj, kind)


def _reduce_module(module: types.ModuleType) -> Any:
    if _modules.get(module.__name__) is not module or _importable(module.__name__):
        return NotImplemented
    skip = ("__builtins__", "__spec__", "__loader__", _OUT_MARK, _IN_MARK)
    contents = {k: v for k, v in vars(module).items() if k not in skip}
    return _cp().dynamic_subimport, (module.__name__, {}), contents, None, None, _fill_module


def _reduce_odd(obj: Any, kind: type) -> Any:
    """What neither pickle nor cloudpickle can send, or sends as a name that the receiver lacks."""
    if issubclass(kind, functools.cached_property):
        return _make_cached_property, (kind, obj.func, obj.attrname)
    if kind is weakref.WeakKeyDictionary or kind is weakref.WeakValueDictionary:
        return kind, (dict(obj),)
    if kind.__module__ == "typing" and not _importable(getattr(obj, "__module__", None) or "builtins"):
        if kind.__name__ == "TypeVar":
            return _cp()._make_typevar, _cp()._decompose_typevar(obj)
        if kind.__name__ in ("ParamSpec", "TypeVarTuple"):
            return _make_typing, (kind, obj.__module__, obj.__name__)
        if kind.__name__ == "NewType":
            return _make_typing, (kind, obj.__module__, obj.__name__, obj.__supertype__)
    return NotImplemented


def _reference(self: Any, scope: _Scope, name: str) -> tuple[Any, ...] | None:
    """The reduction to "this global's value", or None for the global that is being pickled."""
    if self.target == (scope.key, name):
        return None
    version = self.session.ship(scope, name)
    return None if version is None else (_global_value, (scope.key, name, version))


def _reduce_function(self: Any, fn: types.FunctionType) -> Any:
    if _locate(fn) is not None:
        return NotImplemented
    session: _Session = self.session
    scope = session.scope(fn.__globals__)
    session.announce(scope)
    if scope.globals.get(fn.__name__) is fn:
        reference = _reference(self, scope, fn.__name__)
        if reference is not None:
            return reference
    session.want(scope, fn.__code__)

    def kept(value: object) -> object:
        name = None if type(value) in _ATOMS else scope.name_of(value)
        reference = None if name is None else _reference(self, scope, name)
        return value if reference is None else _Reduced(reference)

    cells = fn.__closure__ or ()
    self.cells.update([id(cell) for cell in cells])  # made empty first, so that two functions can share one
    contents = [_cell_content(cell) for cell in cells]
    defaults, kwdefaults = fn.__defaults__, fn.__kwdefaults__
    values = [*contents, *[scope.globals.get(name) for name in _global_names(fn.__code__)]]
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
        _cp()._find_imported_submodules(fn.__code__, packages),
    )
    return _make_function, (scope.key, fn.__code__, cells or None), state, None, None, _set_function


def _cell_content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _Empty


def _reduce_class(self: Any, cls: Any) -> Any:
    cp = _cp()
    if cls in (type(None), type(...), type(NotImplemented)) or cls in cp._BUILTIN_TYPE_NAMES:
        return cp._class_reduce(cls)
    if cp._should_pickle_by_reference(cls) and _importable(cls.__module__):
        return NotImplemented
    session: _Session = self.session
    key = session.ship_class(cls) if self.code else session.include_class(cls)
    return _class_by_id, (key, f"{cls.__module__}.{cls.__qualname__}")


def _reduce_lru(self: Any, cached: Any) -> Any:
    """functools reduces its caches to a name, which __main__ of another process has not."""
    if _locate(cached) is not None:
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
    return _make_lru, (inner, parameters["maxsize"], parameters["typed"])


def _copied(buffer: pickle.PickleBuffer) -> bytes | bytearray:
    view = buffer.raw()
    return bytes(view) if view.readonly else bytearray(view)


class _Linked(tuple[Any, ...]):
    """(records, root, buffers), pickled as the call that links them."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _link, tuple(self)


# ---------------------------------------------------------------------------------------------
# By value, receiver
# ---------------------------------------------------------------------------------------------


class _Current:
    """A global of a space as delivered last. own: what this process had assigned itself, by older version."""

    __slots__ = ("given", "own", "version")

    def __init__(self, version: int, given: object) -> None:
        self.version, self.given = version, given
        self.own: dict[int, object] = {}


class _InSpace:
    """One globals dict of this process, shared by all functions by value of one module of the sender."""

    __slots__ = ("__weakref__", "globals", "label", "names")

    def __init__(self, label: str, base: Mapping[str, Any]) -> None:
        import builtins

        self.label = label
        self.names: dict[str, _Current] = {}
        adopted = _Adopted.module if label == "__main__" else None
        self.globals: dict[str, Any] = {} if adopted is None else adopted.__dict__
        self.globals.update(base)
        self.globals["__builtins__"] = builtins
        self.globals[_IN_MARK] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def deliver(self, name: str, version: int, blob: bytes, views: Sequence[Any]) -> None:
        """Sets the global unless this version of it is the current one."""
        current = self.names.get(name)
        if current is None:
            given = loads(blob, views)
            self.names[name] = _Current(version, given)
            self.globals[name] = self._locally_rebound(name, given)
        elif current.version != version:
            given = loads(blob, views)
            mine = self.globals.get(name, _MISSING)
            if mine is not current.given and mine is not _MISSING:
                current.own[current.version] = mine
                if len(current.own) > 4:
                    del current.own[min(current.own)]
            current.version, current.given = version, given
            self.globals[name] = current.own.pop(version, given)
            _Links.stamp += 1

    def _locally_rebound(self, name: str, given: object) -> object:
        """That value, if the real module is loaded here and its code (an initializer) rebound the name."""
        at_import = _at_import.get(self.label)
        if at_import is not None:
            own = getattr(_modules.get(self.label), "__dict__", {}).get(name, _MISSING)
            if own is not _MISSING and at_import.get(name) != id(own):
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
        _modules["__main__"] = _Adopted.module
    return _Adopted.module


_in_spaces: dict[str, _InSpace] = {}  # of modules
_anonymous: weakref.WeakValueDictionary[str, _InSpace] = weakref.WeakValueDictionary()  # of other dicts
_foreign_classes: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()  # -> their version
_recent_classes: deque[type] = deque(maxlen=256)  # not to make the classes of arguments anew for each task
_at_import: dict[str, dict[str, int]] = {}  # module -> name -> id of the value that the import left there


class _Links(threading.local):
    """What the message that this thread is loading has brought."""

    stamp = 0  # on the class, for all threads: how often a global or class moved to another version
    spaces: dict[str, _InSpace] | None = None
    log: list[_Record] | None = None


_links = _Links()


def _in_space(key: str) -> _InSpace:
    local = _links.spaces
    if local is not None and key in local:
        return local[key]
    return _in_spaces.get(key) or _anonymous[key]


def _link(records: Sequence[_Record], root: bytes, buffers: Sequence[Any]) -> Any:
    """What a message by value unpickles to: takes the records, then loads the root."""
    outer = _links.spaces
    _links.spaces = dict(outer or ())
    keep: list[Any] = []  # a class that only the tracker knows would be gone before the root is loaded
    try:
        for record in records:
            _take(record, keep)
        if _links.log is not None and outer is None:
            _links.log += records
        return loads(root, buffers)
    finally:
        _links.spaces = outer


def _take(record: _Record, keep: list[Any]) -> None:
    kind, key, *rest = record
    if kind == "G":
        _in_space(key).deliver(*rest)
    elif kind == "N":
        keep.append(_open_space(key, *rest))
    elif kind == "C":
        cls = _cp()._DYNAMIC_CLASS_TRACKER_BY_ID.get(key)
        if cls is None:
            make, args = loads(rest[0])
            cls = make(*args)
            _foreign_classes[cls] = None
            if rest[1]:
                _recent_classes.append(cls)
        keep.append(cls)
    else:
        cls = _cp()._DYNAMIC_CLASS_TRACKER_BY_ID[key]
        if _foreign_classes.get(cls, rest[0]) != rest[0]:  # a class of this process keeps its own contents
            setter, state = loads(rest[1])
            setter(cls, state)
            _Links.stamp += _foreign_classes[cls] is not None
            _foreign_classes[cls] = rest[0]


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


def _relink(records: Sequence[_Record]) -> None:
    """Moves what a function refers to back to the versions it was sent with, where others came since."""
    outer = _links.spaces
    _links.spaces = dict(outer or ())
    keep: list[Any] = []
    try:
        for record in records:
            _take(record, keep)
    finally:
        _links.spaces = outer


def _global_value(key: str, name: str, version: int) -> Any:
    current = _in_space(key).names[name]
    if current.version != version:
        raise LookupError(f"global {name!r} of {key} is at version {current.version}, not {version}")
    return current.given


def _class_by_id(key: str, name: str) -> Any:
    cls = _cp()._DYNAMIC_CLASS_TRACKER_BY_ID.get(key)
    if cls is None:
        raise LookupError(f"class {name} came from this process, which has no such class any more")
    return cls


def _make_cell() -> types.CellType:
    return types.CellType()


def _make_lru(fn: Any, maxsize: int | None, typed: bool) -> Any:
    return functools.lru_cache(maxsize, typed)(fn)


def _make_typing(kind: Any, module: str, *args: Any) -> Any:
    made = kind(*args)
    made.__module__ = module
    return made


def _fill_module(module: types.ModuleType, contents: dict[str, Any]) -> None:
    module.__dict__.update(contents)


def _make_cached_property(kind: Any, fn: Any, name: str | None) -> Any:
    made = kind(fn)
    made.attrname = name
    return made


def _make_function(
    key: str, code: types.CodeType, closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    return types.FunctionType(code, _in_space(key).globals, code.co_name, None, closure)


def _set_function(fn: Any, state: tuple[Any, ...]) -> None:
    name, qualname, module, doc, defaults, kwdefaults, annotations, attributes, contents, _submodules = state
    fn.__name__, fn.__qualname__, fn.__module__, fn.__doc__ = name, qualname, module, doc
    fn.__defaults__, fn.__kwdefaults__, fn.__annotations__ = defaults, kwdefaults, annotations
    fn.__dict__.update(attributes)
    for cell, content in zip(fn.__closure__ or (), contents, strict=True):
        if content is not _Empty:
            cell.cell_contents = content


# ---------------------------------------------------------------------------------------------
# Is it still the same?
# ---------------------------------------------------------------------------------------------
# An *expectation* says how to recognise an unchanged value without keeping it alive: an atom itself
# (identity), a weak reference, or _Parts: the type of a container and an expectation per element. Small
# lists, dicts and sets can be compared that way faster than pickled.

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
_Guard = tuple[Any, ...]


class _Parts:
    """id: of the container, if it is a mutable one; else 0. size: its length, 0 for a wrapper."""

    __slots__ = ("id", "kind", "parts", "size")

    def __init__(self, kind: type, id: int, size: int, parts: list[Any]) -> None:
        self.kind, self.id, self.size, self.parts = kind, id, size, parts


class _UnstableError(Exception):
    """Something mutable is in it."""


def _watch(root: object) -> tuple[_Guard, ...] | None:
    """Guards that hold while `root` and all code by value that it refers to are the same; None if no
    guard can tell, because something mutable is among them.
    """
    try:
        return tuple(_Watch(root).guards)
    except (_UnstableError, RuntimeError, TypeError):  # endless, changed by another thread, no weak reference
        return None


class _Watch:
    def __init__(self, root: object) -> None:
        self.guards: list[_Guard] = []
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
            elif type(obj) is _lru_type:
                self._queue.append(obj.__wrapped__)
            elif not _is_enum(obj):
                self.guards.append(self._class(obj))

    def _function(self, fn: types.FunctionType) -> _Guard:
        names = []
        for name in _global_names(fn.__code__):
            value = fn.__globals__.get(name, _MISSING)
            names.append((name, value if value is _MISSING else self.expect(value)))
        cells = [self.expect(_cell_content(cell)) for cell in fn.__closure__ or ()]
        kwdefaults = [(k, self.expect(v)) for k, v in (fn.__kwdefaults__ or {}).items()]
        attributes = [(k, self.expect(v)) for k, v in fn.__dict__.items()]
        rest = (cells, kwdefaults, attributes) if cells or kwdefaults or attributes else None
        return weakref.ref(fn), _same_function, fn.__code__, self.expect(fn.__defaults__), names, rest

    def _class(self, cls: type) -> _Guard:
        items = []
        for name, value in cls.__dict__.items():
            if name in _CLASS_BOOKKEEPING or type(value) in _DESCRIPTORS or _is_field(value):
                continue
            items.append((name, self.expect(value)))
        bases = _Parts(tuple, 0, len(cls.__bases__), [self.expect(base) for base in cls.__bases__])
        return weakref.ref(cls), _same_class, bases, len(cls.__dict__), items

    def expect(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS or value is _Empty:
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
        elif kind is types.FunctionType or kind is _lru_type or issubclass(kind, type):
            if _locate(value) is None and value is not type(None):
                self._queue.append(value)
            return weakref.ref(value)
        elif issubclass(kind, types.ModuleType):
            if _importable(value.__name__):
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
    enum = _modules.get("enum")
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
        value = values.get(name, _MISSING)
        if value is not expectation and not _meets(value, expectation):
            return False
    return True


def _holds(guards: Iterable[_Guard]) -> bool:
    for guard in guards:
        obj = guard[0]()
        if obj is None or not guard[1](obj, *guard[2:]):
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
    if cells and not all(map(_meets, map(_cell_content, fn.__closure__), cells)):
        return False
    if len(fn.__kwdefaults__ or ()) != len(kwdefaults) or not _all_meet(fn.__kwdefaults__ or {}, kwdefaults):
        return False
    return len(fn.__dict__) == len(attributes) and _all_meet(fn.__dict__, attributes)


def _same_class(cls: Any, bases: _Parts, size: int, items: Any) -> bool:
    return len(cls.__dict__) == size and _meets(cls.__bases__, bases) and _all_meet(cls.__dict__, items)


# ---------------------------------------------------------------------------------------------
# Functions and calls
# ---------------------------------------------------------------------------------------------

_ref_ids = itertools.count(1)
_CODE_TYPES = (types.FunctionType, types.BuiltinFunctionType, type, _lru_type)


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


class _Entry:
    """What the table knows of a live function. guards: None if it is found by name."""

    __slots__ = ("alive", "guards", "ref")

    def __init__(self, alive: weakref.ref[Any], ref: FunctionRef, guards: tuple[_Guard, ...] | None) -> None:
        self.alive, self.ref, self.guards = alive, ref, guards


def _forget(entries: dict[int, Any], plain: dict[int, Any], key: int, _dead: object) -> None:
    entries.pop(key, None)
    plain.pop(key, None)


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
        self._by_digest: OrderedDict[bytes, FunctionRef] = OrderedDict()
        self._size, self._limit, self._held = size, nbytes, 0
        self._lock = threading.RLock()  # a destructor that is run inside may submit

    def ref(self, fn: Callable[..., Any]) -> FunctionRef:
        """The reference for any callable; bound methods, partials and instances are pickled whole.

        Raises what pickling raises.
        """
        entry = self._entries.get(id(fn))
        if entry is not None and entry.alive() is fn:
            if entry.guards is not None:
                if _holds(entry.guards):
                    return entry.ref
            elif _resolve(entry.ref.module, entry.ref.name) is fn:
                return entry.ref
        if issubclass(type(fn), _CODE_TYPES):
            return self._ref_code(fn)
        return self._ref_object(fn)

    def _ref_code(self, fn: Any) -> FunctionRef:
        where = _locate(fn)
        guards = None
        if where is not None:
            data = _c_dumps(fn, 5)
            ref = self._intern(_digest(data), lambda: data, False, *where)
        elif isinstance(fn, types.BuiltinFunctionType):
            return self._ref_object(fn)
        else:
            guards = _watch(fn)  # before it is pickled: what changes meanwhile is noticed the next time
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
        inner = fn.__wrapped__ if type(fn) is _lru_type else fn
        session = _Session(_SHARED)
        scope = session.scope(inner.__globals__) if type(inner) is types.FunctionType else None
        try:
            root = session.collect(fn, None, scope, code=True)
        except Exception as error:
            _raise_if_inherited(error)
            error.add_note(f"So {_name_of(fn)} cannot be sent to a worker.")
            raise
        make = functools.partial(session.assemble, root, None)
        return self._intern(
            session.digest(root), make, True, str(getattr(fn, "__module__", "")), _name_of(fn)
        )

    def _ref_object(self, obj: Any) -> FunctionRef:
        try:
            data = _c_dumps(obj, 5)
            by_value = _names_by_value_module(data)
        except BaseException as error:
            data, by_value = _dumps_by_value(obj, _SHARED, None, error), True
        else:
            if by_value:
                data = _dumps_by_value(obj, _SHARED, None, None)
        return self._intern(_digest(data), lambda: data, by_value, "", _name_of(obj))

    def _intern(
        self, digest: bytes, make: Callable[[], bytes], by_value: bool, module: str, name: str
    ) -> FunctionRef:
        with self._lock:
            ref = self._by_digest.get(digest)
            if ref is not None:
                self._by_digest.move_to_end(digest)
                return ref
        data = make()
        with self._lock:
            ref = self._by_digest.get(digest)
            if ref is None:
                ref = self._by_digest[digest] = FunctionRef(next(_ref_ids), data, by_value, module, name)
                self._held += len(data)
            while len(self._by_digest) > self._size or (
                self._held > self._limit and len(self._by_digest) > 1
            ):
                self._held -= len(self._by_digest.popitem(last=False)[1].data)
        return ref


def _name_of(obj: Any) -> str:
    while type(obj) is functools.partial:
        obj = obj.func
    try:
        name = obj.__qualname__
    except Exception:  # a proxy may raise anything
        name = None
    return name if isinstance(name, str) else type(obj).__qualname__


class _Loaded:
    __slots__ = ("fn", "nbytes", "records", "stamp")

    def __init__(self, fn: Any, records: tuple[_Record, ...], nbytes: int) -> None:
        self.fn, self.records, self.nbytes = fn, records, nbytes
        self.stamp = _Links.stamp


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
            if loaded.records and loaded.stamp != _Links.stamp:
                _relink(loaded.records)
                loaded.stamp = _Links.stamp
            return loaded.fn  # type: ignore[no-any-return]
        if data is None:
            raise LookupError(
                f"function {id} is not loaded in process {os.getpid()}, and came without its pickle"
            )
        return self._load(id, data)

    def _load(self, id: int, data: bytes | memoryview) -> Callable[..., Any]:
        log: list[_Record] = []
        _links.log = log
        try:
            fn = loads(data)
        finally:
            _links.log = None
        _note_import(fn)
        self._loaded[id] = loaded = _Loaded(fn, tuple(log), len(data))
        self._held += loaded.nbytes
        while len(self._loaded) > self._size or (self._held > self._limit and len(self._loaded) > 1):
            self._held -= self._loaded.popitem(last=False)[1].nbytes
        return fn  # type: ignore[no-any-return]

    def drop(self, id: int) -> None:
        loaded = self._loaded.pop(id, None)
        if loaded is not None:
            self._held -= loaded.nbytes

    def clear(self) -> None:
        self._loaded.clear()
        self._held = 0


def _note_import(fn: Any) -> None:
    """Remembers what the import of a function's module left in it, before any of its code is called."""
    name, qualname = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if not isinstance(name, str) or not isinstance(qualname, str) or name in _at_import or name == "__main__":
        return
    if _resolve(name, qualname) is fn:
        _at_import[name] = {k: id(v) for k, v in vars(_modules[name]).copy().items()}


def _carried(*_: object) -> None:
    """Stands for a callable that travels among the arguments of its call."""


_Layer = tuple[Any, ...]


def split_callable(fn: Any) -> tuple[Any, tuple[_Layer, ...]]:
    """(function to be cached, what is bound around it): layers from the outside in, (self,) for a bound
    method and (args, keywords) for a partial. What cannot be split comes back whole, without layers.
    """
    layers: list[_Layer] = []
    while True:
        if type(fn) is types.MethodType and type(fn.__func__) is types.FunctionType:
            layers.append((fn.__self__,))
            fn = fn.__func__
        elif type(fn) is functools.partial and not fn.__dict__:
            layers.append((fn.args, fn.keywords))
            fn = fn.func
        else:
            return fn, tuple(layers)


def pack_call(
    table: FunctionTable,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    freeze: bool = True,
) -> tuple[FunctionRef, Payload]:
    """A call as it travels. Only the function is cached: `self` of a method, bound arguments of a partial
    and callable instances are pickled with each call. freeze=False: buffers are views of the caller's
    memory, for a caller that copies them at once. Raises what pickling raises.
    """
    plain = table.plain.get(id(fn))
    if plain is not None and getattr(_modules.get(plain[1]), plain[2], None) is fn:
        return plain[0], _encode((args, kwargs or None), freeze, _SHARED)
    inner, layers = split_callable(fn)
    if issubclass(type(inner), _CODE_TYPES) and not _is_bound_builtin(inner):
        call: tuple[Any, ...] = (args, kwargs or None, layers) if layers else (args, kwargs or None)
        ref = table.ref(inner)
    else:
        carrier = table.ref(_carried)
        ref = FunctionRef(carrier.id, carrier.data, False, carrier.module, _name_of(fn))
        call = (args, kwargs or None, fn)
    return ref, _encode(call, freeze, _SHARED)


def _is_bound_builtin(fn: Any) -> bool:
    return isinstance(fn, types.BuiltinFunctionType) and _locate(fn) is None


def unpack_call(
    cache: FunctionCache,
    fn_id: int,
    fn_data: bytes | memoryview | None,
    data: bytes | memoryview,
    buffers: Iterable[Any] = (),
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """(callable, args, kwargs). Raises like FunctionCache.load, and what unpickling the arguments raises."""
    fn = cache.load(fn_id, fn_data)
    call = loads(data, buffers)
    if len(call) == 3:
        if fn is _carried:
            fn = call[2]
        else:
            for layer in reversed(call[2]):
                fn = (
                    types.MethodType(fn, *layer)
                    if len(layer) == 1
                    else functools.partial(fn, *layer[0], **layer[1])
                )
    return fn, call[0], call[1] or {}


# ---------------------------------------------------------------------------------------------
# Exceptions
# ---------------------------------------------------------------------------------------------

_TEXT_MAX = 10_000  # characters of the text that goes along in case the host cannot load the exception


def dump_exception(exc: BaseException) -> Payload:
    """An exception with its traceback as text (its causes, contexts and notes included). Never raises for
    what the exception does: one that cannot be pickled, or not be made again from its pickle, becomes a
    RemoteError with type, text and traceback.
    """
    kind = type(exc)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    trace, text = _trace_of(exc, name), _text_of(exc)
    try:
        inner = dumps(exc)
        if not _is_plain(exc):
            again = loads(inner.data, inner.buffers)
            if not isinstance(again, BaseException):
                raise TypeError(f"the pickle of a {name} is a {type(again).__name__}")
        text = text[:_TEXT_MAX]
    except BaseException:
        inner = Payload(b"")
    return Payload(_c_dumps((inner.data, name, text, trace), 5), inner.buffers, inner.readonly)


def load_exception(data: bytes | memoryview, buffers: Iterable[Any] = ()) -> BaseException:
    """The exception of `dump_exception`, its __cause__ the remote traceback. Never raises: what cannot be
    loaded comes back as RemoteError.
    """
    try:
        inner, name, text, trace = _c_loads(data)
    except BaseException as error:
        return RemoteError(
            type(error).__qualname__, f"the record of an exception is damaged: {_text_of(error)}"
        )
    exc: BaseException | None = None
    if inner:
        try:
            found = loads(inner, buffers)
            exc = found if isinstance(found, BaseException) else None
        except BaseException as error:
            why = f"{type(error).__qualname__}: {_text_of(error)}"
            trace += f"\n(it could not be loaded in process {os.getpid()}: {why})\n"
    if exc is None:
        exc = RemoteError(name, text, trace)
    try:
        process: Any = importlib.import_module("concurrent.futures.process")  # pulls in multiprocessing
        cause = process._RemoteTraceback(f'\n"""\n{trace}"""')
        BaseException.__dict__["__cause__"].__set__(exc, cause)  # past a __setattr__ of the class
    except BaseException as error:
        return RemoteError(
            name, f"{text}\n({type(error).__qualname__} while its traceback was attached)", trace
        )
    return exc


def _is_plain(exc: BaseException) -> bool:
    """True if no code but the interpreter's own runs when it is made again."""
    return type(exc).__module__ == "builtins" and not isinstance(exc, BaseExceptionGroup)


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc)
    except BaseException as error:
        return f"<str() of it raised {type(error).__qualname__}>"


def _trace_of(exc: BaseException, name: str) -> str:
    import traceback

    first = exc.__traceback__
    here = (os.path.dirname(__file__) + os.sep, "runtime" + os.sep)  # compiled frames have relative names
    while first is not None and first.tb_frame.f_code.co_filename.startswith(here):
        first = first.tb_next  # the frames of the worker itself say nothing to the user
    try:
        return "".join(traceback.format_exception(type(exc), exc, first or exc.__traceback__))
    except BaseException as error:
        return f"{name}: {_text_of(exc)}\n(its traceback cannot be formatted: {type(error).__qualname__})\n"
