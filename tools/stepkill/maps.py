"""The part of the table that is about a SharedState: its operations, its sweep, its watches, its locks."""

from __future__ import annotations

from functools import partial

from tools.stepkill.engine import Scenario, at_lock
from tools.stepkill.primitive import Primitive, Unreached
from tools.stepkill.states import LONG, NUMBER, StateWorld


def state(name: str, *args: object, **kwargs: object) -> Scenario:
    return Scenario(name, partial(StateWorld, *args, **kwargs), over=("_identity",))  # type: ignore[arg-type]


MAPS = (
    Primitive(
        "state write",
        (
            state("set: new", "set_short"),
            state("set: anew", "set_short", b"old"),
            state("set: large", "set_long", b"old"),
            state("set: large, anew", "set_long", LONG),
            state("set: small for large", "set_short", LONG),
            state("set: over", "set_short", b"old", over=True),
            state("set: another sets it", "set_short", b"old").amid(at_lock("map_put")),
            state("set: another inserts it", "set_short").amid(at_lock("insert")),
            state("chain: grows", "set_short", others=5),
            state("chain: grows, of units freed before", "set_short", others=5, reuse=True),
            state("chain: grows again", "set_short", others=16),
            state("another makes the chain", "set_short", others=5).amid(at_lock("insert")),
            state("with a limit", "set_short", limit=3, others=2),
            state("with a limit, another inserts it", "set_short", limit=3).amid(at_lock("insert")),
            state("at the limit", "set_short", limit=2, others=2),
            state("with a limit, deleted", "delete", b"old", limit=2),
            state("chain: there is one", "set_short", b"old", others=5),
            state("chain: deleted from it", "delete", b"old", others=5),
            state("add: new", "add"),
            state("add: a number", "add", NUMBER),
            state("add: in a unit freed before", "add", NUMBER, reuse=True),
            state("add: over", "add", NUMBER, over=True),
            state("add: another sets it", "add", NUMBER).amid(at_lock("map_add")),
            state("compare and set: absent", "swap"),
            state("compare and set: equal", "swap", b"old"),
            state("compare and set: other", "swap_other", b"old"),
            state("compare and set: other, absent", "swap_other"),
            state("delete", "delete", b"old"),
            state("delete: large", "delete", LONG),
            state("delete: absent", "delete"),
            state("delete: gone", "delete", b"old", watched=True, gone=True),
            state("delete: over", "delete", b"old", over=True),
        ),
        whole=("_map.map_erase", "_units.unit_free_published"),
        atomic=(
            "_map.map_put",
            "_map.map_add",
            "_map.insert",
            "_map.map_help",
            "_map.map_empty",
        ),
    ),
    Primitive(
        "state read",
        (
            state("", "look", b"old"),
            state("absent", "look"),
            state("a view", "view", LONG),
        ),
        whole=(),
        atomic=("_units.unit_pin",),
        unreached=(Unreached("_units.unit_pin", 2, "another process sets its bit at this moment"),),
    ),
    Primitive(
        "state sweep",
        (
            state("nothing", "sweep", b"old"),
            state("over", "sweep", LONG, over=True, others=2),
            state("what a dead process leaves", "sweep", LONG, dead=True),
            state("what two leave", "sweep", b"old", dead=True, over=True),
        ),
        whole=(),
        atomic=("_mapsweep.map_sweep", "_mapsweep.sweep_lock", "_map.map_settle"),
    ),
    Primitive(
        "state watch",
        (
            state("begins", "begin_watch", b"old"),
            state("begins beside another", "begin_watch", b"old", watched=True),
            state("begins, by a second mapping", "begin_another_watch", b"old"),
            state("ends", "end_watch", b"old"),
            state("ends beside another", "end_watch", b"old", watched=True),
            state("looks, and empties", "watch_on", b"old"),
            state("watched: delete", "delete", b"old", watched=True),
            state("watched: delete, anew", "delete", LONG, watched=True, reuse=True),
            state("watched: delete, another sets it", "delete", b"old", watched=True).amid(
                at_lock("map_remove")
            ),
            state("watched: delete, with a limit", "delete", b"old", watched=True, limit=2),
            state("watched: set anew", "set_short", b"old", watched=True),
            state("watched: set where it was", "set_short", b"old", watched=True, limit=2, gone=True),
            state(
                "watched: another sets it where it was", "set_short", b"old", watched=True, limit=2, gone=True
            ).amid(at_lock("swap_counted")),
            state("watched: over", "sweep", LONG, over=True, watched=True, others=2),
            state("of the dead", "sweep", b"old", dead=True),
            state("of the dead beside another", "sweep", b"old", dead=True, watched=True),
        ),
        whole=("_mapwatch.watch_ended", "_mapwatch.watch_dead"),
        atomic=("_mapwatch.watch_begin", "_mapwatch.watch_since", "_map.map_remove", "_map.swap_counted"),
    ),
    Primitive(
        "state lock",
        (
            state("taken", "take_lock"),
            state("taken, by a key that is there", "take_lock", b"old"),
            state("of the dead", "take_lock", b"old", dead=True),
            state("held by another", "wait_for_lock"),
            state("given back", "unlock"),
        ),
        whole=(),
        atomic=("_maplock.lock_take", "_maplock.lock_give"),
        unreached=(
            Unreached(
                "_maplock.lock_take", 4, "the name is reclaimed at this moment, or all pins are in use"
            ),
        ),
    ),
)
