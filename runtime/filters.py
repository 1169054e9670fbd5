"""The host's warning filters in zygotes and workers: each as soon as its category is there.

No module is imported for the sake of a filter. numpy, say, makes one for a category of its own: a zygote that
imported it for that would take 0.1 s longer, have its threads, and whatever is preloaded would be blamed.

Thread-safety: `resolve` from any thread. Fork-safety: what was put in force stays so.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

__all__ = ["adopt", "described", "resolve"]

Described = tuple[Any, ...]  # action, message, (module, name) of the category, module, lineno

_told: list[Described] = []  # of the host, in its order
_made: dict[Described, Any] = {}  # of them, those whose category is there: what stands in warnings.filters


def described() -> list[Described]:
    """This process's filters, for `adopt` of another one."""
    return [
        (action, message, (category.__module__, category.__qualname__), module, lineno)
        for action, message, category, module, lineno in warnings.filters
        if isinstance(category, type)
    ]


def adopt(told: Sequence[Described]) -> None:
    """Have these filters and no others."""
    _told[:] = told
    _made.clear()
    warnings.filters[:] = []  # type: ignore[index]
    resolve()


def resolve() -> bool:
    """Put in force what can be by now. Whether something was."""
    found = False
    for one in _told:
        category = None if one in _made else _category(*one[2])
        if category is not None:
            _made[one] = (one[0], one[1], category, *one[3:])
            _insert(one)
            found = True
    return found


def _insert(one: Described) -> None:
    """Before those that come behind it in the host, and before nothing that this process has added itself."""
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    for other in _told[_told.index(one) + 1 :]:
        made = _made.get(other)
        if made in filters:
            filters.insert(filters.index(made), _made[one])
            return
    filters.append(_made[one])


def _category(module: str, name: str) -> type[Warning] | None:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Warning) else None
