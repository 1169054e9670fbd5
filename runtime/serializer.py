"""Bytes for everything that crosses between processes: arguments, results, exceptions, functions.

    sender                                                receiver
    dumps(obj)            ── C pickle, protocol 5 ──►     loads
         │ fails, or names __main__ (which the receiver does not have)
         └► Session       ── records + root ───────►      link ─► spaces, classes, root
    FunctionTable.ref(fn) ── FunctionRef.data ─────►      FunctionCache.load
    pack_call(fn, a, kw)  ── FunctionRef, Payload ─►      unpack_call
    dump_exception        ── Payload ──────────────►      load_exception

This is the door: the rest of the package imports nothing else of these files.

    arrays      how arrays and their kin travel
    payload     the pickle and its buffers outside; making and reading it
    lookup      what another process finds by import; what code refers to
    linking     receiver by value: records into spaces and classes, then the root
    guards      is a function or class still the same as when it was pickled?
    versions    sender by value: which version of each global and class went out
    reducers    how functions, classes, modules … travel inside a pickle by value
    byvalue     sender by value: the message
    functions   FunctionTable in the sender, FunctionCache in the receiver

`dumps` tries C pickle; buffers of OUT_OF_BAND_MIN and more stay outside the stream. What cannot be found by
import in another process goes by value. Arguments and functions are *shared* messages (spaces live on in the
receiver). Results are not: a function in a result brings its globals along as a snapshot.

Nothing here keeps a function, its closure or a bound object alive in the sender. Everything may
be used from many threads at once. cloudpickle is imported when something goes by value first.
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from runtime.arrays import Locate, asked, register
from runtime.byvalue import PORTABLE, RESULT, SHARED, dumps_by_value
from runtime.errors import RemoteError, full_name
from runtime.functions import CODE_TYPES, FunctionCache, FunctionRef, FunctionTable, SharedCache, name_of
from runtime.linking import adopt_main, keep_main
from runtime.lookup import locate as find_name
from runtime.lookup import names_by_value_module
from runtime.payload import OUT_OF_BAND_MIN, Payload, Stream, Taken, dump, loads, pickled_by_us

__all__ = [
    "OUT_OF_BAND_MIN",
    "FunctionCache",
    "FunctionRef",
    "FunctionTable",
    "Payload",
    "SharedCache",
    "adopt_main",
    "bound",
    "dump_exception",
    "dumps",
    "dumps_frozen",
    "dumps_portable",
    "keep_main",
    "load_exception",
    "loads",
    "pack_call",
    "pack_function",
    "register",
    "split_callable",
    "unpack_call",
]

_c_dumps = pickle.dumps
_modules = sys.modules  # not imported: the compiler calls methods of an imported name the slower way


def dumps(obj: object, locate: Locate | None = None) -> Payload:
    """Pickle a result. A class that came by value from the process that asked goes back as its id. locate:
    gives the slice of a block that goes in place of a buffer, or None.
    Raises whatever makes pickling impossible, BaseExceptions of the object included.
    """
    return _encode(obj, False, RESULT, locate)


def dumps_portable(obj: object, locate: Locate | None = None) -> Payload:
    """Like `dumps`, for any process, not only the one that asked: classes by value are complete."""
    return _encode(obj, False, PORTABLE, locate)


def dumps_frozen(obj: object, locate: Locate | None = None) -> Payload:
    """Pickle arguments: buffers are copied (once), so later changes to the caller's arrays do not show."""
    return _encode(obj, True, SHARED, locate)


def _encode(obj: object, freeze: bool, mode: str, locate: Locate | None) -> Payload:
    before, asked.locate = asked.locate, locate  # what is being pickled may pickle something itself
    try:
        payload = _pickled(obj, mode, locate)
    finally:
        asked.locate = before
    if freeze and (payload.buffers or type(payload.data) is tuple):
        payload.freeze()
    return payload


def _pickled(obj: object, mode: str, locate: Locate | None) -> Payload:
    try:
        payload = dump(obj, locate)
    except BaseException as error:
        return dumps_by_value(obj, mode, Taken(locate), error)
    data = payload.data
    # The shortest stream that can name a class or function of __main__ is longer than 24 bytes.
    if len(data) > 24 and names_by_value_module(data) if type(data) is bytes else _names_any(data):
        return dumps_by_value(obj, mode, Taken(locate), None)
    return payload


def _names_any(data: Stream) -> bool:
    return any(names_by_value_module(part) for part in pickled_by_us(data))


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
    locate: Locate | None = None,
) -> tuple[FunctionRef, Payload]:
    """A call as it travels. Only the function is cached: `self` of a method, bound arguments of a partial
    and callable instances are pickled with each call. freeze=False: buffers are views of the caller's
    memory, for a caller that copies them at once. locate: see `dumps`. Raises what pickling raises.
    """
    plain = table.plain.get(id(fn))
    if plain is not None and getattr(_modules.get(plain[1]), plain[2], None) is fn:
        return plain[0], _encode((args, kwargs or None), freeze, SHARED, locate)
    inner, layers = split_callable(fn)
    if issubclass(type(inner), CODE_TYPES) and not _is_bound_builtin(inner):
        call: tuple[Any, ...] = (args, kwargs or None, layers) if layers else (args, kwargs or None)
        ref = table.ref(inner)
    else:
        carrier = table.ref(_carried)
        ref = FunctionRef(carrier.id, carrier.data, False, carrier.module, name_of(fn))
        call = (args, kwargs or None, fn)
    return ref, _encode(call, freeze, SHARED, locate)


def pack_function(table: FunctionTable, fn: Callable[..., Any]) -> FunctionRef | None:
    """The function of many calls that share its pickle; None for one that is bound to something, and goes
    with each call anew. Raises what pickling raises.
    """
    if issubclass(type(fn), CODE_TYPES) and not _is_bound_builtin(fn):
        return table.ref(fn)
    return None


def _is_bound_builtin(fn: Any) -> bool:
    return isinstance(fn, types.BuiltinFunctionType) and find_name(fn) is None


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
    return bound(fn, call), call[0], call[1] or {}


def bound(fn: Any, call: tuple[Any, ...]) -> Any:
    """The callable of a call: `fn` with what travels along with it, see `split_callable`."""
    if len(call) < 3:
        return fn
    if fn is _carried:
        return call[2]
    for layer in reversed(call[2]):
        if len(layer) == 1:
            fn = types.MethodType(fn, *layer)
        else:
            fn = functools.partial(fn, *layer[0], **layer[1])
    return fn


_TEXT_MAX = 10_000  # characters of the text that goes along in case the host cannot load the exception


def dump_exception(exc: BaseException) -> Payload:
    """An exception with its traceback as text (its causes, contexts and notes included). Never raises for
    what the exception does: one that cannot be pickled, or not be made again from its pickle, becomes a
    RemoteError with type, text and traceback.
    """
    kind = type(exc)
    lineage = tuple(full_name(base) for base in kind.__mro__)
    name = lineage[0]
    trace, text = _trace_of(exc, name), _text_of(exc)
    try:
        inner = dumps(exc)
        if not _is_plain(exc):
            again = loads(inner.joined(), inner.buffers)
            if not isinstance(again, BaseException):
                raise TypeError(f"the pickle of a {name} is a {type(again).__name__}")
        text = text[:_TEXT_MAX]
    except BaseException:
        inner = Payload(b"")
    return Payload(_c_dumps((inner.joined(), lineage, text, trace), 5), inner.buffers, inner.readonly)


def load_exception(data: bytes | memoryview, buffers: Iterable[Any] = ()) -> BaseException:
    """The exception of `dump_exception`, its __cause__ the remote traceback. Never raises: what cannot be
    loaded comes back as RemoteError.
    """
    try:
        inner, lineage, text, trace = pickle.loads(data)
        name = lineage[0]
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
        exc.lineage = lineage
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
