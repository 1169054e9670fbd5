"""Finds what a TARGET names: `module:function` or `file.py:function`.

A file is imported under its own name with its folder on sys.path, as `python file.py` would have it,
so that workers import it by that name too. The current folder comes on sys.path in either case.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from runtime.cli.exits import Usage

__all__ = ["load", "locate"]


def load(target: str) -> Callable[[Any, list[str]], object]:
    """The function that `target` names.

    Raises: Usage where the target is wrong; what the module itself raises passes through.
    """
    place, path = _split(target)
    _search_first(os.getcwd())
    module = _from_file(place) if _is_file(place) else _from_name(place, path)
    return _function(module, place, path)


def locate(target: str) -> tuple[str, str]:
    """(module, function) that `target` names, importable by others with our sys.path; nothing is imported.

    Raises: Usage where the target is wrong, as far as that can be known so.
    """
    place, path = _split(target)
    _search_first(os.getcwd())
    if not _is_file(place):
        _check_name(place, path)
        return place, path
    name = _check_file(place)
    if not name.isidentifier():
        raise Usage(f"{place!r} cannot be imported by workers: rename it to one word and .py")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin or not _same(spec.origin, place):
        raise Usage(f"{place!r} has the same name as another module, {name!r}: rename the file")
    return name, path


def _split(target: str) -> tuple[str, str]:
    place, separator, path = target.rpartition(":")
    if not (separator and place and path):
        raise Usage(
            f"{target!r} is not a TARGET: write module:function or file.py:function, "
            "for example examples/census.py:main"
        )
    return place, path


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _check_name(name: str, path: str) -> None:
    if os.path.isfile(name + ".py") and not name.isidentifier():
        raise Usage(f"{name!r} is not a module name; for the file write {name}.py:{path}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise Usage(f"{name!r} is not a module name: write it with dots, for example package.module:{path}")


def _from_name(name: str, path: str) -> ModuleType:
    _check_name(name, path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the target itself, or a package above it: a missing import inside it is an error of its own.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise Usage(
            f"there is no module {error.name!r}: it is neither installed nor in the current folder "
            f"({os.getcwd()}); for a file write path/to/file.py:{path}"
        ) from None


def _check_file(file: str) -> str:
    """The name that it is imported by; its folder is searched first."""
    if not os.path.isfile(file):
        what = "is a folder, not a file" if os.path.isdir(file) else "does not exist"
        raise Usage(f"the file {file!r} {what} (the current folder is {os.getcwd()})")
    folder, base = os.path.split(os.path.abspath(file))
    name, extension = os.path.splitext(base)
    if extension != ".py" or "." in name:
        raise Usage(
            f"{file!r} cannot be imported: rename it to one word and .py, like {name.split('.')[0]}.py"
        )
    _search_first(folder)
    importlib.invalidate_caches()
    return name


def _from_file(file: str) -> ModuleType:
    name = _check_file(file)
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and _same(spec.origin, file):
            return importlib.import_module(name)
    elif _same(getattr(module, "__file__", None), file):
        return module
    raise Usage(f"{file!r} has the same name as another module, {name!r}: rename the file")


def _function(module: ModuleType, place: str, path: str) -> Callable[[Any, list[str]], object]:
    found: Any = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [name for name in dir(found) if callable(getattr(found, name, None))]
            near = " or ".join(difflib.get_close_matches(part, names, 3))
            hint = f": did you mean {near}?" if near else "; define it at the top level of the module"
            raise Usage(f"{place} has no {part!r}{hint}") from None
    if not callable(found):
        raise Usage(f"{place}:{path} is {type(found).__name__}, not a function")
    _check_arguments(found, place, path)
    function: Callable[[Any, list[str]], object] = found
    return function


def _check_arguments(function: Callable[..., object], place: str, path: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin that does not tell
        return
    try:
        signature.bind(None, [])
    except TypeError as error:
        raise Usage(
            f"{place}:{path}{signature} cannot be called as function(rt, argv): {error}; "
            f"define it as def {path.rpartition('.')[2]}(rt, argv)"
        ) from None


def _search_first(folder: str) -> None:
    """Puts `folder` at the front of sys.path, once. "" means the current folder and may be there already."""
    sys.path[:] = [folder, *(entry for entry in sys.path if entry not in (folder, ""))]


def _same(one: str | None, other: str) -> bool:
    try:
        return one is not None and os.path.samefile(one, other)
    except OSError:
        return False
