"""All models, and all faults that are put back in to see that the checker finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tools.model import blocks, growth, leases, pool

__all__ = ["FAULTS", "MODELS", "Fault"]


class Fault(NamedTuple):
    """A model with one line of the protocol broken."""

    model: str  # where it shows
    words: str
    thaw: Callable[..., Any]


MODELS: dict[str, Callable[..., Any]] = {
    **{name: leases.model(name) for name in leases.SCENARIOS},
    "blocks": blocks.model(),
    "growth": growth.model(),
    "pool": pool.model(),
}

_SHOWS = {  # the scenario in which a fault of the leases shows, if that is not the first one
    "retry-before-death": "leases: retry",
    "clock-before-word": "leases: chunk",
    "answer-after-killed": "leases: chunk",
    "put-back-delivered": "leases: chunk",
    "kept-once": "leases: views",
    "keep-after-done": "leases: views",
    "own-after-done": "leases: own",
    "collect-without-drain": "leases: views",
    "sweep-skips-keeps": "leases: references",
    "blame-the-neighbour": "leases: lanes",
    "unkeep-before-record": "leases: references",
}

FAULTS: dict[str, Fault] = {
    **{
        name: Fault(shows := _SHOWS.get(name, "leases: deadline"), words, leases.model(shows, name))
        for name, words in leases.FAULTS.items()
    },
    **{name: Fault("blocks", words, blocks.model(name)) for name, words in blocks.FAULTS.items()},
    **{name: Fault("growth", words, growth.model(name)) for name, words in growth.FAULTS.items()},
    **{name: Fault("pool", words, pool.model(name)) for name, words in pool.FAULTS.items()},
}
