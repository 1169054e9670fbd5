"""`Kernel`: a C function, by a name that every process finds again.

    Kernel("package.module:name")    a Cython module's __pyx_capi__
    Kernel("runtime:NAME")           what comes with the package
    Kernel.from_library              a shared library and its symbol
    Kernel.from_ctypes, from_scipy   the same, found out by the address
    Kernel.from_numba                the Python function and its signature; each worker compiles it once

What is found is kept, by what it was found by, so a worker looks for each kernel once. dlopen and its kin are
called through ctypes, never from our own C: that would bind a version of glibc's.
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from runtime import _core
from runtime.contexts import Here

__all__ = ["FOREIGN", "Builtin", "Kernel", "participate"]

SIGNATURE = "int (const void *, size_t, void *, size_t, const void *)"
Combine = Callable[[list[bytes], list[int]], Any]
_Spec = tuple[Any, ...]  # how to find it, then what that needs
_Place = tuple[int, int]  # offset in the region, bytes


class Builtin(NamedTuple):
    """What is special about a kernel of ours."""

    partial: int = 0
    combine: Combine | None = None
    inout: bool = False
    per_page: bool = False  # the partial is for each page of a grain
    item: int = 1  # bytes: src is whole items, and aligned to them
    params: int = 0  # bytes
    same: bool = False  # dst is as long as src


_BUILTINS = {
    "crc32": Builtin(4, _core.combine_crc32),
    "count_byte": Builtin(8, _core.combine_count, params=1),
    "histogram_u8": Builtin(2048, _core.combine_histogram),
    "sum_f64": Builtin(8, _core.combine_sum, per_page=True, item=8),
    "minmax_f64": Builtin(16, _core.combine_minmax, item=8),
    "copy": Builtin(same=True),
    "axpy_f64": Builtin(inout=True, item=8, params=8, same=True),
}
FOREIGN = Builtin()


class _Found(NamedTuple):
    address: int
    keep: Any  # what the code lives in


_found: dict[_Spec, _Found] = {}  # of this process; libraries are never unloaded
_addresses: dict[bytes, int] = {}  # the same, by the pickle of a _Spec: one value of a task's, not four


class Kernel:
    """A native function that `Runtime.run_kernel` and `submit` run without the GIL.

    name: "package.module:name" of a Cython module, or "runtime:NAME" of one that comes with the package. The
    function is `int kernel(const void *src, size_t src_len, void *dst, size_t dst_len, const void *params)`,
    and returns 0 or an error code. partial: bytes that each grain writes instead of dst, zeroed before.
    combine: called with the partials and the bytes of src that each is of, in order; its result is what the
    kernel returns. inout: it reads dst, so dst is saved, grain by grain, and restored if a worker dies.

    Thread-safety: immutable. Fork-safety: yes. It is pickled as what it was found by. Raises, at once:
    ModuleNotFoundError; LookupError for a name that is not there; TypeError for another signature.
    """

    __slots__ = ("_key", "_rules", "_spec", "combine", "inout", "name", "partial")

    def __init__(
        self, name: str, *, partial: int = 0, combine: Combine | None = None, inout: bool = False
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a kernel's name must be text, not {type(name).__name__}")
        module, colon, symbol = name.partition(":")
        if not (module and colon and symbol):
            raise ValueError(f'a kernel is named as "package.module:name", not {name!r}')
        if module == "runtime" and (partial or combine or inout):
            raise ValueError(f"{name} has its own partial, combine and inout")
        self._set(name, ("module", module, symbol), partial, combine, inout)

    @classmethod
    def from_library(
        cls,
        path: str | os.PathLike[str],
        symbol: str,
        *,
        partial: int = 0,
        combine: Combine | None = None,
        inout: bool = False,
    ) -> Kernel:
        """A function of a shared library, which has no signature to check. path: as dlopen's. Raises: OSError
        for a library that cannot be loaded; LookupError.
        """
        library = os.fsdecode(path)
        if not isinstance(symbol, str):
            raise TypeError(f"symbol must be text, not {type(symbol).__name__}")
        if os.sep in library:
            library = os.path.abspath(library)
        return cls._made(f"{library}:{symbol}", ("library", library, symbol), partial, combine, inout)

    @classmethod
    def from_ctypes(
        cls, function: Any, *, partial: int = 0, combine: Combine | None = None, inout: bool = False
    ) -> Kernel:
        """A function of a ctypes library. Raises: LookupError for one that no library names, as a callback
        into Python; TypeError for argtypes of another signature.
        """
        import ctypes

        if not isinstance(function, ctypes._CFuncPtr):  # type: ignore[attr-defined]
            raise TypeError(f"from_ctypes() needs a function of ctypes, not {type(function).__name__}")
        _check_ctypes(function)
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        return cls._at(address, function, partial, combine, inout)

    @classmethod
    def from_scipy(
        cls, low_level_callable: Any, *, partial: int = 0, combine: Combine | None = None, inout: bool = False
    ) -> Kernel:
        """A scipy.LowLevelCallable without user_data. Raises: as from_ctypes; ValueError with user_data."""
        if not (isinstance(low_level_callable, tuple) and low_level_callable):
            kind = type(low_level_callable).__name__
            raise TypeError(f"from_scipy() needs a scipy.LowLevelCallable, not {kind}")
        signature, address = _core.read_capsule(tuple.__getitem__(low_level_callable, 0))
        _check_signature(signature, repr(low_level_callable))
        if getattr(low_level_callable, "user_data", None) is not None:
            raise ValueError("user_data does not reach other processes: pass params to run_kernel")
        return cls._at(address, low_level_callable, partial, combine, inout)

    @classmethod
    def from_numba(
        cls, cfunc: Any, *, partial: int = 0, combine: Combine | None = None, inout: bool = False
    ) -> Kernel:
        """A function that numba.cfunc has compiled, of (voidptr, size_t, voidptr, size_t, voidptr) -> intc.
        Typed pointers will do. Raises: TypeError for another signature; what pickling it raises.
        """
        import cloudpickle

        signature = getattr(cfunc, "_sig", None)
        if signature is None or not hasattr(cfunc, "address"):
            raise TypeError(f"from_numba() needs what numba.cfunc returns, not {type(cfunc).__name__}")
        _check_numba(signature)
        compiler = cfunc._compiler
        data = cloudpickle.dumps((cfunc._pyfunc, signature, compiler.locals, dict(compiler.targetoptions)))
        spec = ("numba", data)
        _found.setdefault(spec, _Found(cfunc.address, cfunc))
        return cls._made(f"numba:{cfunc._pyfunc.__qualname__}", spec, partial, combine, inout)

    @classmethod
    def _at(cls, address: int, keep: Any, partial: int, combine: Combine | None, inout: bool) -> Kernel:
        """What lies at an address, by the library and symbol that it belongs to."""
        library, symbol = _symbol_at(address)
        _found.setdefault(("library", library, symbol), _Found(address, keep))
        return cls._made(f"{library}:{symbol}", ("library", library, symbol), partial, combine, inout)

    @classmethod
    def _made(cls, name: str, spec: _Spec, partial: int, combine: Combine | None, inout: bool) -> Kernel:
        self = cls.__new__(cls)
        self._set(name, spec, partial, combine, inout)
        return self

    def _set(self, name: str, spec: _Spec, partial: int, combine: Combine | None, inout: bool) -> None:
        if type(partial) is not int:
            raise TypeError(f"partial must be a number of bytes, not {type(partial).__name__}")
        if not 0 <= partial < 1 << 32:
            raise ValueError(f"partial must be 0 to 2**32 - 1 bytes, not {partial}")
        if combine is not None and not callable(combine):
            raise TypeError(f"combine must be callable, not {type(combine).__name__}")
        if combine is not None and not partial:
            raise ValueError("combine is for kernels with a partial")
        if inout and partial:
            raise ValueError("inout is for kernels that write dst; one with a partial has none")
        _find(spec)
        rules = _BUILTINS[spec[2]] if spec[:2] == ("module", "runtime") else FOREIGN
        self.name, self._spec, self._key, self._rules = name, spec, pickle.dumps(spec), rules
        self.partial = partial or rules.partial
        self.combine = combine or rules.combine
        self.inout = bool(inout or rules.inout)

    def __reduce__(self) -> Any:
        if self._rules is not FOREIGN:
            return Kernel, (self.name,)
        return Kernel._made, (self.name, self._spec, self.partial, self.combine, self.inout)

    def __repr__(self) -> str:
        return f"<Kernel {self.name}>"


def participate(job: _Place, src: _Place, dst: _Place | None, key: bytes, params: bytes, number: int) -> None:
    """In a worker: the task that works on a job until no grain is left. key: the pickle of a _Spec."""
    assert Here.arena is not None
    address = _addresses.get(key)
    if address is None:
        address = _addresses[key] = _find(pickle.loads(key)).address
    _core.run_grains(Here.arena, job, src, dst, address, params, number)


# ---- finding -------------------------------------------------------------------------------------------


def _find(spec: _Spec) -> _Found:
    found = _found.get(spec)
    if found is None:
        found = _found[spec] = _FINDERS[spec[0]](*spec[1:])
    return found


def _in_module(name: str, symbol: str) -> _Found:
    if name == "runtime":
        functions, module = _core.BUILTINS, None
    else:
        module = importlib.import_module(name)
        functions = getattr(module, "__pyx_capi__", None) or {}
    if symbol not in functions:
        there = f"it has {', '.join(sorted(functions))}" if functions else (
            "it has none: a Cython module exports what its .pxd declares, and what is `cdef api`"
        )  # fmt: skip
        raise LookupError(f"module {name} has no C function {symbol!r}; {there}")
    signature, address = _core.read_capsule(functions[symbol])
    _check_signature(signature, f"{name}:{symbol}")
    return _Found(address, module)


def _in_library(path: str, symbol: str) -> _Found:
    import ctypes

    library = ctypes.CDLL(path)
    try:
        function = getattr(library, symbol)
    except AttributeError:
        raise LookupError(
            f"library {path} has no symbol {symbol!r}; `nm -D {path}` lists those that it has. In C++ a "
            'kernel is `extern "C"`; a static function has none'
        ) from None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    if not _is_code(address):
        raise LookupError(f"{symbol!r} of library {path} is no function, but data")
    return _Found(address, library)


def _is_code(address: int) -> bool:
    with open("/proc/self/maps") as lines:
        for line in lines:
            bounds, rights, *_ = line.split(maxsplit=2)
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            if start <= address < end:
                return "x" in rights
    return False


def _by_numba(data: bytes) -> _Found:
    function, signature, variables, options = pickle.loads(data)
    compiled = importlib.import_module("numba").cfunc(signature, locals=variables, **options)(function)
    return _Found(compiled.address, compiled)


_FINDERS: dict[str, Callable[..., _Found]] = {
    "module": _in_module,
    "library": _in_library,
    "numba": _by_numba,
}


def _symbol_at(address: int) -> tuple[str, str]:
    """The library and the symbol of a function. Raises: LookupError when no library exports it."""
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = [
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("symbol", ctypes.c_char_p),
            ("start", ctypes.c_void_p),
        ]

    info = Info()
    known = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info))
    if not known or not info.symbol or info.start != address:
        raise LookupError(
            "no library exports this function, so no other process can find it: pass one of a shared library "
            'that is not static; one of a Cython module as Kernel("package.module:name")'
        )
    path = os.path.realpath(os.fsdecode(info.file))
    symbol = info.symbol.decode()
    if not os.path.isfile(path) or _in_library(path, symbol).address != address:
        raise LookupError(f"the library {path} does not give this function as {symbol!r}")
    return path, symbol


# ---- signatures ----------------------------------------------------------------------------------------

_SIZES = ("ulong", "unsignedlong", "unsignedlongint", "longunsignedint", "uintptr_t", "uint64_t")


def _check_signature(signature: str, what: str) -> None:
    found = "".join(word for word in signature.replace("*", " * ").split() if word != "const")
    for size in _SIZES:
        found = found.replace(f",{size}", ",size_t")
    plain = found.replace("(const", "(").replace(",const", ",")
    if plain != "int(void*,size_t,void*,size_t,void*)":
        raise TypeError(f"a kernel is {SIGNATURE}; {what} is {signature or 'without a signature'}")


def _check_ctypes(function: Any) -> None:
    """What it was told of its types. Nothing was: then nobody can check it."""
    import ctypes

    def pointer(kind: Any) -> bool:
        code = getattr(kind, "_type_", None)  # of a number it is one character
        return not isinstance(code, str) or code in "PzZ"

    arguments, result = function.argtypes, function.restype
    fits = result is ctypes.c_int
    if fits and arguments is not None:
        sizes = tuple(arguments[1::2])
        fits = len(arguments) == 5 and all(map(pointer, arguments[::2])) and sizes == (ctypes.c_size_t,) * 2
    if not fits:
        found = ", ".join(getattr(kind, "__name__", str(kind)) for kind in arguments or ())
        name = getattr(result, "__name__", str(result))
        raise TypeError(f"a kernel is {SIGNATURE}; this function is {name} ({found})")


def _check_numba(signature: Any) -> None:
    types: Any = importlib.import_module("numba").types

    def pointer(kind: Any) -> bool:
        return kind == types.voidptr or isinstance(kind, types.CPointer)

    def size(kind: Any) -> bool:
        return isinstance(kind, types.Integer) and kind.bitwidth == 64

    args, result = signature.args, signature.return_type
    fits = len(args) == 5 and all(pointer(kind) for kind in args[::2]) and all(map(size, args[1::2]))
    if not (fits and isinstance(result, types.Integer) and result.bitwidth == 32):
        raise TypeError(
            f"a kernel is {SIGNATURE}, for numba intc(voidptr, size_t, voidptr, size_t, voidptr); "
            f"this is {signature}"
        )
