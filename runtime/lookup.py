"""Names: what they stand for, whether another process finds the same by import, which ones code uses.

What another process finds travels by reference (`locate` gives its name), everything else by value.
"""

from __future__ import annotations

import functools
import os
import sys
import types
import weakref
from typing import Any

modules = sys.modules
MISSING: Any = object()  # no such name
# Of these, the same object is the same value.
ATOMS = frozenset([int, float, complex, str, bytes, bool, type(None), type(...), type(NotImplemented), range])
LRU_TYPE: Any = type(functools.lru_cache(lambda: None))
OUT_MARK = "__runtime_out__"  # in a globals dict that is no module's: what it has sent
IN_MARK = "__runtime_in__"  # in a receiver's globals dict: its _InSpace, so that both live equally long
NOT_GLOBALS = frozenset(["__builtins__", OUT_MARK, IN_MARK])
_GLOBAL_OPS = frozenset(
    ["LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"]
)
_importable_cache: dict[str, tuple[int, bool]] = {}  # module name -> (id of the module, answer)
_code_names: weakref.WeakKeyDictionary[types.CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _pattern(module: str) -> bytes:
    """How a protocol-5 stream spells the module of a global; later uses of it are memo references."""
    raw = module.encode("utf-8", "surrogatepass")
    return (
        b"\x8c" + bytes([len(raw)]) + raw if len(raw) < 256 else b"X" + len(raw).to_bytes(4, "little") + raw
    )


_MAIN = _pattern("__main__")
_other_patterns: tuple[bytes, ...] = (_pattern("__mp_main__"),) if "__mp_main__" in sys.modules else ()


def names_by_value_module(data: bytes) -> bool:
    """True if the stream names a module that other processes lack (or has its name as a string: no harm)."""
    if data.find(_MAIN) >= 0:  # `in` takes 0.3 µs longer: it first tries whether the pattern is an int
        return True
    return bool(_other_patterns) and any(data.find(pattern) >= 0 for pattern in _other_patterns)


def importable(name: str) -> bool:
    """True if another process that imports `name` gets the same code: the file is found by import."""
    global _other_patterns
    module = modules.get(name)
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
        return importable(own.name)
    if name in sys.builtin_module_names:
        return True
    path = None
    parent = name.rpartition(".")[0]
    if parent:
        if not importable(parent):
            return False
        path = getattr(modules[parent], "__path__", None)
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


def resolve(module: str, qualname: str) -> Any:
    """The object that this name stands for, or MISSING."""
    found: Any = modules.get(module, MISSING)
    try:
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception:  # a module's own __getattr__ may raise anything
        return MISSING
    return found


def locate(obj: Any) -> tuple[str, str] | None:
    """(module, qualname) if `obj` can be found by that name in another process, else None."""
    module = getattr(obj, "__module__", None)
    name = getattr(obj, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or "<" in name:
        return None
    if resolve(module, name) is not obj or not importable(module):
        return None
    loaded = modules.get("cloudpickle")  # the user may have asked for by value there
    asked: set[str] = getattr(loaded, "list_registry_pickle_by_value", set)()
    if asked and cloudpickle()._is_registered_pickle_by_value(modules[module]):
        return None
    return module, name


@functools.cache
def cloudpickle() -> Any:
    """The module, imported when something goes by value first."""
    import cloudpickle.cloudpickle as module

    return module


def global_names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that the code, and the code within it, reads or writes."""
    names = _code_names.get(code)
    if names is None:
        import dis

        found = {i.argval: None for i in dis.get_instructions(code) if i.opname in _GLOBAL_OPS}
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                found.update(dict.fromkeys(global_names(const)))
        names = _code_names[code] = tuple([name for name in found if name not in NOT_GLOBALS])
    return names


class EmptyCell:
    """In place of the content of an empty cell (the class itself is the marker)."""


def cell_content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return EmptyCell
