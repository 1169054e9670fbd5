"""The table: every shared-memory primitive, the ways through it, and what has to be covered.

A new primitive is one entry: its name, its scenarios (a World each: set-up, operation, the survivor's sweep,
audit), and its functions. A function of Python code around a primitive (which raises, allocates, counts
references) has only its atomic operations in the share: the instructions that come from include/atomics.h.
"""

from __future__ import annotations

from functools import partial

from tools.stepkill.engine import Scenario, at_call, at_entry, at_lock
from tools.stepkill.extents import HOST, HeapWorld
from tools.stepkill.grains import GrainWorld
from tools.stepkill.growth import GrowthWorld
from tools.stepkill.leases import PARKED, PARKED_HERE, HostDies, WorkerDies
from tools.stepkill.maps import MAPS
from tools.stepkill.pools import PoolWorld
from tools.stepkill.primitive import Primitive, Unreached


def pool(name: str, *args: object, **kwargs: object) -> Scenario:
    return Scenario(name, partial(PoolWorld, *args, **kwargs))  # type: ignore[arg-type]


def worker(name: str, *args: object, **kwargs: object) -> Scenario:
    return Scenario(name, partial(WorkerDies, *args, **kwargs))  # type: ignore[arg-type]


def host(name: str, *args: object, **kwargs: object) -> Scenario:
    return Scenario(name, partial(HostDies, *args, **kwargs))  # type: ignore[arg-type]


def heap(name: str, *args: object, **kwargs: object) -> Scenario:
    return Scenario(name, partial(HeapWorld, *args, **kwargs))  # type: ignore[arg-type]


def growth(name: str, *args: object, **kwargs: object) -> Scenario:
    return Scenario(name, partial(GrowthWorld, *args, **kwargs))  # type: ignore[arg-type]


OFFERS: dict[str, object] = {"claimed": 1, "result": 5000, "full": 5}  # a result for which there is no room
ASKS: dict[str, object] = {"claimed": 1, "args": 5000, "full": 5}  # arguments for which there was none


def grains(name: str, *args: object, **kwargs: object) -> Scenario:
    return Scenario(name, partial(GrainWorld, *args, **kwargs))  # type: ignore[arg-type]


SLOW = ("pool enroll", "piece by piece")  # these are begun first
PRIMITIVES = (
    Primitive(
        "pool format",
        (pool("", "format"), pool("of the dead", "format_of_the_dead")),
        whole=("_slab.pool_format",),
        atomic=("_pool.MemoryPool.find_or_format",),
    ),
    Primitive(
        "pool enroll",
        (
            pool("", "first_enroll"),
            pool("again", "second_enroll"),
            pool("another takes the row", "first_enroll").amid(at_lock("pool_enroll")),
            pool("full of the dead", "first_enroll", fill=True)._replace(over=("_identity",)),
        ),
        whole=("_slab.pool_enroll", "_slab.clear_dead_rows"),
    ),
    Primitive(
        "block take",
        (
            pool("the one given back last", "take_block", recent=(2, 1)),
            pool("the hint is stale", "take_block", "-m-", recent=(1,), cursor=2),
            pool("searched, around the end", "take_block", "-mm", cursor=1),
            pool("of the dead", "take_block", "mab"),
            pool("none", "take_block", "mcm"),
            pool("another takes the hint", "take_block", recent=(0,)).amid(at_lock("pool_take_or_sweep")),
            pool("another takes what was found", "take_block", "m--").amid(at_lock("pool_search")),
            pool("another takes it and gives it back", "take_block_again", "m--").amid(
                at_lock("pool_search")
            ),
            pool("acquire()", "acquire", "mcm-"),
            pool("acquire(), of the dead", "acquire", "maa"),
            pool("acquire(), the one given back last", "acquire", recent=(1,)),
        ),
        whole=("_slab.pool_take_or_sweep", "_slab.pool_search", "_slab.pool_recover"),
        atomic=("_pool.MemoryPool.acquire",),
    ),
    Primitive(
        "extent claim",
        (
            heap("one", "take"),
            heap("two from the hint on", "take", pages=2, hint=3),
            heap("three, around the end", "take", "---m--", pages=3, hint=4),
            heap("none", "take", "-m-m-m", pages=2, hint=1),
            heap("more than there is", "take", pages=7),
            heap("no bytes", "take", pages=0),
            heap("the host's", "take", "-m----", pages=2, owner=HOST),
            heap("another takes the head", "take", pages=2, other=0).amid(at_lock("heap_take")),
            heap("another takes a tail", "take", pages=3, other=2).amid(at_lock("heap_take", 3)),
            heap("another takes the first tail", "take", pages=2, other=1).amid(at_lock("heap_take", 2)),
        ),
        whole=("_extent.heap_take",),
    ),
    Primitive(
        "extent free",
        (
            heap("one", "free", "p-----"),
            heap("three", "free", "-pttm-"),
            heap("up to the end", "free", "m--ptt"),
            heap("the last one", "free", "-----p"),
            heap("the host's", "free", "-htm--", owner=HOST),
            heap("of somebody else", "free", "-mp---", at=1),
            heap("none there", "free", at=6),
        ),
        whole=("_extent.heap_free", "_extent.finish_free", "_extent.heap_run"),
    ),
    Primitive(
        "extent hand over",
        (
            heap("published", "publish", "-pt-m-"),
            heap("of somebody else", "publish", "-m----", at=1),
            heap("adopted", "adopt", "-ut-m-"),
            heap("not published", "adopt", "-pt-m-"),
            heap("none there", "adopt", at=6),
        ),
        whole=("_extent.heap_publish", "_extent.heap_adopt"),
    ),
    Primitive(
        "extent sweep",
        (
            heap("all that can be left", "sweep", "pctutfmt-pht"),
            heap("of a host", "sweep", "CtFt-m", owner=HOST),
            heap("nothing", "sweep", "-m-ht-"),
        ),
        whole=("_extent.heap_sweep", "_extent.finish_free"),
    ),
    Primitive(
        "region growth",
        (
            growth("at the end", "grow", need=3),
            growth("with a page of words", "grow", begin=510, need=515),
            growth("a hole is taken", "grow", grown=257, trimmed=True, need=2),
            growth("holes, and at the end", "grow", grown=257, trimmed=True, need=260),
            growth("memory for what is needed only", "grow", begin=4, need=6, allowed=2),
            growth(
                "a hole, and memory for what is needed only",
                "grow",
                begin=4,
                grown=260,
                trimmed=True,
                need=1,
                allowed=1,
            ),
            growth("a hole before a block is taken", "grow", grown=257, trimmed=True, taken=256, need=1),
            growth("no memory", "grow", begin=4, need=6, allowed=1),
            growth("more than there may be", "grow", most=20, need=21),
            growth("another is quicker", "grow", need=3, other=0).amid(at_entry("GrowingArena.find")),
        ),
        whole=("_growth.GrowingArena.find",),
        atomic=("_growth.GrowingArena.fill", "_growth.GrowingArena.extend"),
    ),
    Primitive(
        "region trim",
        (
            growth("", "trim", grown=257),
            growth("nothing can be spared", "trim", grown=200),
            growth("another takes the head", "trim", grown=257, other=0).amid(at_lock("heap_take")),
            growth("another takes a tail", "trim", grown=257, other=2).amid(at_lock("heap_take")),
        ),
        whole=(),
        atomic=("_growth.GrowingArena.unused", "_growth.GrowingArena.punch"),
    ),
    Primitive(
        "block wait",
        (
            pool("one is free", "wait_for_block"),
            pool("none", "wait_for_block", "mmm"),
        ),
        whole=("_slab.pool_wait",),
    ),
    Primitive(
        "block sweep",
        (
            pool("two dead", "sweep_dead", "abam-c"),
            pool("two dead, sleepers", "sweep_dead", "ababm", sleepers=True),
            pool("nobody is dead", "sweep_dead", "mc-"),
            pool("more dead than one pass handles", "sweep_dead", "x" * 66),
            pool("another is faster", "sweep_dead", "aam").amid(at_lock("sweep_batch")),
        ),
        whole=("_slab.pool_sweep", "_slab.sweep_batch", "_slab.pool_wake"),
    ),
    Primitive(
        "block free",
        (
            pool("", "drop_block"),
            pool("sleepers", "drop_block", sleepers=True),
            pool("many", "drop_many", "-" * 70),
            pool("stale", "drop_stale", "mmmm-"),
            pool("the last of its pool", "drop_last"),
            pool("release()", "release", sleepers=True),
        ),
        whole=("_pool.__pyx_tp_dealloc_7runtime_5_pool_Block",),
        atomic=("_pool.give_back",),
    ),
    Primitive(
        "lease claim",
        (
            worker("", "take_lease"),
            worker("all of them", "answer_all", calls=3),
            worker("none", "take_lease", calls=0),
            worker("cancelled", "take_lease", how="cancel").amid(at_lock("WorkerPort.claim")),
        ),
        whole=("_lease.WorkerPort.claim",),
    ),
    Primitive(
        "lease answer",
        (
            worker("in the lease", "answer", calls=2, claimed=1),
            worker("a message wakes the host", "answer", claimed=1, parked=PARKED),
            worker("the message fails", "answer", claimed=1, parked=PARKED, notify="raises"),
            worker("a futex wakes the host", "answer", claimed=1, parked=PARKED_HERE),
            worker("without lanes", "answer", claimed=1, lanes=False, notify="plain"),
            worker("in a block", "answer", claimed=1, result=5000),
            worker("killed meanwhile", "answer", claimed=1, how="cancel").amid(
                at_lock("WorkerPort.complete")
            ),
            worker("killed before", "answer", claimed=1, how="cancel").amid(at_entry("WorkerPort.stop")),
        ),
        whole=("_lease.WorkerPort.complete", "_lease.WorkerPort.stop"),
        unreached=(
            Unreached("_lease.WorkerPort.complete", 10, "another thread of the worker forks at this moment"),
        ),
    ),
    Primitive(
        "outbox put",
        (
            worker("", "answer", claimed=1),
            worker("full", "answer_all", calls=3, outbox=2).amid(at_call("WorkerPort.put")),
            worker("full, a function", "answer_all", calls=3, outbox=2, notify="plain").amid(
                at_call("WorkerPort.put")
            ),
            worker("full, interrupted", "answer_all", calls=3, outbox=2, notify="interrupts"),
            worker("full, the message fails", "answer_all", calls=3, outbox=2, notify="raises"),
            worker("the message fails", "answer", claimed=1, parked=PARKED, notify="raises"),
            worker("the last view of an argument goes", "unkeep", claimed=1, args=5000),
        ),
        whole=("_lease.WorkerPort.put",),
        atomic=("_lease.WorkerPort.flush",),
        unreached=(
            Unreached(
                "_lease.WorkerPort.put",
                11,
                "frees the callable that tells the host: the port itself holds it",
            ),
        ),
    ),
    Primitive(
        "block kept",
        (
            worker("", "answer", claimed=1, args=5000, how="seen"),
            worker("the host has heard of it", "answer", claimed=1, args=5000, how="seen").amid(
                at_entry("WorkerPort.complete")
            ),
            worker("of its own", "answer_own", claimed=1, result=5000, how="seen"),
            worker(
                "of its own, the host has heard of it", "answer_own", claimed=1, result=5000, how="seen"
            ).amid(at_entry("WorkerPort.complete")),
            worker("nothing is seen", "answer", claimed=1, args=5000),
            worker(
                "the message fails",
                "answer",
                claimed=1,
                args=5000,
                how="seen",
                parked=PARKED,
                notify="raises",
            ),
        ),
        whole=("_lease.WorkerPort.keep",),
    ),
    Primitive(
        "block of its own",
        (
            worker("returned", "answer_own", claimed=1, result=5000),
            worker("dropped", "waste", claimed=1, result=5000),
            worker("there is no room", "waste", claimed=1, result=5000, full=5),
        ),
        whole=("_extent.heap_publish", "_extent.finish_free"),
    ),
    Primitive(
        "lease commit",
        (
            worker("item by item", "commit", calls=0, items=3, claimed=1, result=3000),
            worker("the map is dropped", "commit", calls=0, items=3, claimed=1, how="drop").amid(
                at_lock("WorkerPort.advance")
            ),
        ),
        whole=("_lease.WorkerPort.advance",),
    ),
    Primitive(
        "piece by piece",
        (
            worker("arguments", "fetch", claimed=1, args=5000, full=5).amid(
                at_entry("WorkerPort.wait_turn", 1), at_entry("WorkerPort.wait_turn", 2)
            ),
            worker(
                "the message fails", "fetch", claimed=1, args=5000, full=5, parked=PARKED, notify="raises"
            ),
            worker("interrupted", "fetch", claimed=1, args=5000, full=5, parked=PARKED, notify="interrupts"),
            worker("results, and there is room", "answer", claimed=1, result=5000),
            worker("results of a chunk", "commit", calls=0, items=3, claimed=1, result=5000, full=5).amid(
                at_entry("WorkerPort.wait_turn", 1), at_entry("WorkerPort.wait_turn", 2)
            ),
            worker("results", "answer", claimed=1, result=5000, full=5).amid(
                at_entry("WorkerPort.wait_turn", 1), at_entry("WorkerPort.wait_turn", 2)
            ),
            worker(
                "results, the region does not grow",
                "answer",
                **OFFERS,
                parked=PARKED,
                notify="refuses",
                grows=True,
            ).amid(at_entry("WorkerPort.wait_turn", 1), at_entry("WorkerPort.wait_turn", 2)),
            worker("results, room is made", "answer", **OFFERS, how="room").amid(
                at_entry("WorkerPort.await_room", 1)
            ),
            worker("results, the message fails", "answer", **OFFERS, parked=PARKED, notify="raises"),
            worker("results, interrupted", "answer", **OFFERS, parked=PARKED, notify="interrupts"),
        ),
        whole=(
            "_lease.WorkerPort.receive",
            "_lease.WorkerPort.offer",
            "_lease.WorkerPort.wait_turn",
            "_lease.WorkerPort.take_room",
        ),
        unreached=(Unreached("_lease.WorkerPort.receive", 6, "no memory is left for a bytearray"),),
    ),
    Primitive(
        "report",
        (worker("", "report", claimed=1),),
        whole=(),
        atomic=("_report.write_report",),
    ),
    Primitive(
        "lease",
        (
            host("in the entry", "lease", calls=1),
            host("in a block", "lease", calls=0, args=5000),
            host("by value", "lease", calls=0, args=5000, full=5),
            host("a chunk with a deadline", "lease_chunk", calls=0),
            host("the worker sleeps", "lease", calls=0, asleep=True),
        ),
        whole=(),
        atomic=("_leasing.Leasing.publish",),
    ),
    Primitive(
        "lease taken back",
        (
            host("", "take_back", calls=3, claimed=1),
            host("cancelled", "cancel", calls=2),
            host("it runs", "cancel", calls=2, claimed=1),
            host("killed", "kill", calls=2, claimed=1),
            host("there is nobody to kill", "kill", calls=2, claimed=1, guarded=False),
            host("claimed just now", "cancel", calls=2).amid(at_lock("Dispatcher.cancel", 2)),
        ),
        whole=("_threads.kill_lease",),
        atomic=("_leasing.Leasing.take_back", "_dispatch.Dispatcher.cancel"),
        unreached=(
            Unreached(
                "_dispatch.Dispatcher.cancel", 4, "waits for a guard that the host's deadline thread holds"
            ),
        ),
    ),
    Primitive(
        "harvest",
        (
            host("", "harvest", calls=2, answered=1),
            host("in a block", "harvest", calls=2, answered=1, result=5000),
            host("malformed", "harvest", calls=2, answered=1, how="malformed"),
            host("plain", "harvest", calls=2, answered=1, how="plain"),
            host("in a block of the worker's", "harvest", calls=2, answered=1, result=5000, how="own"),
            host(
                "a block that the worker goes on seeing",
                "harvest",
                calls=2,
                answered=1,
                args=5000,
                how="seen",
            ),
            host(
                "a block of the worker's that it goes on seeing",
                "harvest",
                calls=2,
                answered=1,
                result=5000,
                how="own, seen",
            ),
            host("the last view of a block is gone", "harvest", calls=2, answered=1, args=5000, how="unseen"),
            host("a piece is asked for", "harvest", **ASKS, asks=True, parked=PARKED, notify="interrupts"),
            host("a piece is offered", "harvest", **OFFERS, asks=True, parked=PARKED, notify="interrupts"),
        ),
        whole=(),
        atomic=(
            "_harvest.Harvest.harvest",
            "_harvest.Harvest.drain_now",
            "_harvest.Harvest.serve",
            "_harvest.Harvest.accept",
        ),
    ),
    Primitive(
        "ref release",
        (
            host("nothing needs it", "let_go", calls=0, how="ref"),
            host("the last task has ended", "let_go_and_harvest", calls=1, answered=1, how="ref"),
            host("a worker goes on seeing it", "let_go_and_harvest", calls=1, answered=1, how="ref, seen"),
            host("and no more", "let_go_and_harvest", calls=1, answered=1, how="ref, unseen"),
        ),
        whole=("_extent.finish_free",),
        atomic=("_arena.tp_dealloc_7runtime_6_arena_HostBlock",),
    ),
    Primitive(
        "sweep of a slot",
        (
            host("", "settle", calls=3, answered=1, claimed=1, result=5000),
            host("with a chunk", "settle", calls=0, items=3, claimed=1, result=3000),
            host("of one that ran wild", "settle", calls=1, how="wild"),
            host("the next process moves in", "open_slot"),
        ),
        whole=(),
        atomic=(
            "_harvest.Harvest.settle_now",
            "_harvest.Harvest.settle_task",
            "_slots.Slots.open_slot",
        ),
    ),
    Primitive(
        "grains of a kernel",
        (
            grains("claimed, saved, finished", "participate"),
            grains("with partials", "participate", partial="each"),
            grains("with partials for pages", "participate", partial="per page"),
            grains("stopped", "participate", stopped=True),
            grains("stopped when all is taken", "participate", saved=True, stopped=True),
            grains("the kernel fails", "participate", fails=True),
            grains("another takes the first", "participate").amid(at_lock("run_grain")),
            grains("after half a grain", "participate", saved=True),
        ),
        whole=("_kernel.work", "_kernel.run_grain"),
    ),
    Primitive(
        "grains of the dead",
        (
            grains("restored", "restore", saved=True),
            grains("none begun", "restore"),
        ),
        whole=("_kernel.recover_grain",),
    ),
    *MAPS,
)
