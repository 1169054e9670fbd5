"""What the storm asks for: calls and items of all kinds, each with the outcomes that it may have.

    submitting   calls, some of them cancelled before they start or while they run
    mapping      map and map_unordered, of sized inputs and generators, some dropped in the middle
    awaiting     asubmit and amap, some of them cancelled

Each is a client in a thread of its own. It hands in orders as long as the wave rises, with a bounded number
of them out, and then waits until each of its orders has an outcome.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import re
import threading
import time
import zlib
from collections import deque
from contextlib import aclosing

from runtime import RemoteError, TaskTimeout

from . import arrays, tasks

PATIENCE = 60.0  # seconds without an outcome after which an order is lost
ENDLESS = 1_000_000  # retries that nobody uses up
OUT = 150  # orders that a client has out at once
SIZES = (0, 10, 300, 1_000, 5_000, 16_000, 20_000, 70_000, 300_000, 1_500_000)  # bytes
WEIGHTS = (6, 6, 6, 6, 6, 6, 8, 8, 6, 3)
SPINS = (0.0, 0.0, 0.0, 0.0002, 0.001, 0.004)  # seconds

DROPPED = "dropped"  # the outcome of an item whose map nobody wanted to the end
GOOD = "good"  # the outcome of an order whose result was right


class Order:
    """A call or an item, and all that may become of it."""

    __slots__ = (
        "again", "asked", "calls", "chunk", "errors", "fatal", "good", "key", "kind", "outcome", "runs",
        "said", "timed", "watched",
    )  # fmt: skip

    def __init__(self, kind, key):
        self.kind, self.key = kind, key
        self.good = None  # says whether a result is right; None: there can be none
        self.errors = ()  # what the task itself may raise
        self.runs = 1  # attempts, at most
        self.chunk = False  # it may run again because a neighbour's process was killed
        self.again = False  # it may run again after it has ended (retry_on)
        self.timed = False  # it may be ended by its timeout
        self.fatal = False  # it may be the reason for its process's death
        self.asked = self.said = False  # cancelling it was asked for; the runtime said that it did
        self.watched = False  # its callback is counted
        self.calls = 0
        self.outcome = None

    def called(self, _):
        self.calls += 1

    def end(self, value):
        """Its result has come. What it looks like if it is wrong is kept."""
        if self.outcome is not None:
            self.outcome = f"a second outcome, {value!r:.100}, after {self.outcome!r:.100}"
        elif self.good is not None and self.good(value):
            self.outcome = GOOD
        else:
            self.outcome = f"a wrong result: {value!r:.100}"

    def fail(self, error):
        """An exception is its outcome."""
        if self.outcome is not None:
            error = f"a second outcome, {error!r:.100}, after {self.outcome!r:.100}"
        elif error.__traceback__ is not None:
            error = error.with_traceback(None)  # its frames would keep results
        self.outcome = error

    def __repr__(self):
        told = {name: getattr(self, name) for name in self.__slots__ if name != "good"}
        return f"<Order {told}>"


class Wave:
    """What its clients share: where they hand in, where the ledger is, how long the wave rises."""

    def __init__(self, rt, path, keys, seconds, more, slow=None):
        self.rt, self.path, self.keys, self.more = rt, path, keys, more
        self.slow = slow  # a kernel that takes its time, if there is a compiler
        self.until = time.monotonic() + seconds
        self.orders = []
        self.stock = arrays.Stock()
        self.broken = threading.Event()  # a client has failed

    def rises(self):
        return time.monotonic() < self.until and self.more() and not self.broken.is_set()

    def order(self, kind):
        order = Order(kind, next(self.keys))
        self.orders.append(order)
        return order

    def view(self, draw, order, **options):
        """The runtime with options, as the order has them."""
        retries = options.setdefault("retries", draw.choice([0, 0, 0, 1, 2, ENDLESS]))
        order.runs = retries + 1
        if draw.random() < 0.3:
            options["priority"] = draw.randrange(-2, 3)
        if draw.random() < 0.3:
            options.setdefault("timeout", 60)  # it is armed, and never reached
        return self.rt.options(**options)


# ---- calls -----------------------------------------------------------------------------------------------


def plain(wave, draw, order):
    order.good = order.key.__eq__
    if draw.random() < 0.5:
        return wave.rt.submit(tasks.plain, wave.path, order.key, draw.choice(SPINS))
    return wave.view(draw, order).submit(tasks.plain, wave.path, order.key, draw.choice(SPINS))


def by_value(wave, draw, order):
    by = draw.randrange(2, 30)
    order.good = (order.key * by).__eq__
    return wave.view(draw, order).submit(tasks.multiplied(by), wave.path, order.key, draw.choice(SPINS))


def large(wave, draw, order):
    there, back = draw.choices(SIZES, WEIGHTS, k=2)
    data = tasks.filled(order.key, there)
    right = zlib.crc32(data), back, zlib.crc32(tasks.filled(order.key, back))
    order.good = lambda value: (value[0], len(value[1]), zlib.crc32(value[1])) == right
    if draw.random() < 0.5:
        data = bytearray(data)
    return wave.view(draw, order).submit(tasks.large, wave.path, order.key, data, back)


def raising(wave, draw, order):
    how = draw.choice(["exception", "exception", "base", "exit", "interrupt", "locked"])
    order.errors = {
        "exception": tasks.Refused,
        "base": tasks.Abandoned,
        "exit": SystemExit,
        "interrupt": KeyboardInterrupt,
        "locked": RemoteError,
    }[how]
    return wave.view(draw, order).submit(tasks.raising, wave.path, order.key, how)


def returning(wave, draw, order):
    how = draw.choice(["lock", "hollow"])
    order.errors = TypeError if how == "lock" else tasks.Refused
    return wave.view(draw, order).submit(tasks.returning, wave.path, order.key, how)


def generating(wave, draw, order):
    order.errors = TypeError
    return wave.view(draw, order).submit(tasks.generating, wave.path, order.key)


def argument(wave, draw, order):
    """One whose argument cannot be pickled never comes to a worker."""
    order.errors = TypeError
    order.runs = 0
    return wave.rt.submit(tasks.plain, wave.path, order.key, threading.Lock())


def retried(wave, draw, order):
    """It raises, or ends its process, until some attempt."""
    order.good = order.key.__eq__
    order.again = draw.random() < 0.5
    function = tasks.refusing_until if order.again else tasks.dying_until
    order.fatal = not order.again
    view = wave.view(draw, order, retries=ENDLESS, retry_on=tasks.Refused if order.again else ())
    return view.submit(function, wave.path, order.key, draw.randrange(2, 4))


def dying(wave, draw, order):
    order.fatal = True
    view = wave.view(draw, order, retries=draw.choice([0, 0, 1]))
    return view.submit(tasks.dying, wave.path, order.key, draw.choice(["exit", "kill", "abort"]))


def near(wave, draw, order):
    """It ends just when its time is up."""
    order.good = order.key.__eq__
    order.timed = order.fatal = True
    view = wave.view(draw, order, retries=0, timeout=0.02)
    return view.submit(tasks.plain, wave.path, order.key, draw.uniform(0.015, 0.025))


def late(wave, draw, order):
    """It hangs until its time is up, once or twice."""
    order.timed = order.fatal = True
    how = draw.choice(["python", "python", "gil", "child"])
    retry_on = draw.choice([(), TaskTimeout])
    view = wave.view(
        draw, order, retries=draw.choice([0, 1]), retry_on=retry_on, timeout=draw.uniform(0.02, 0.2)
    )
    return view.submit(tasks.hanging, wave.path, order.key, how)


def hanging(wave, draw, order):
    """It hangs until it is cancelled."""
    order.asked = order.fatal = True
    return wave.view(draw, order).submit(
        tasks.hanging, wave.path, order.key, draw.choice(["python", "gil", "child"])
    )


def reporting(wave, draw, order):
    order.good = order.key.__eq__
    return wave.view(draw, order).submit(tasks.reporting, wave.path, order.key, draw.randrange(1, 20))


def chatting(wave, draw, order):
    order.good = order.key.__eq__
    return wave.view(draw, order).submit(tasks.chatting, wave.path, order.key, draw.randrange(1, 6))


def growing(wave, draw, order):
    order.good = order.key.__eq__
    return wave.view(draw, order).submit(tasks.growing, wave.path, order.key, draw.randrange(1, 300_000))


def forking(wave, draw, order):
    order.good = order.key.__eq__
    return wave.view(draw, order).submit(
        tasks.forking, wave.path, order.key, draw.choice(["wait", "leave", "daemon"])
    )


CALLS = {
    plain: 40, by_value: 8, large: 25, raising: 5, returning: 2, generating: 1, argument: 1, retried: 2,
    dying: 1, near: 2, late: 1, hanging: 2, reporting: 3, chatting: 3, growing: 2, forking: 2,
    **arrays.CALLS,
}  # fmt: skip


def submitting(wave, draw):
    """A client: calls of all kinds."""
    out = deque()
    hung = []  # (when it is cancelled, order, future)
    kinds, weights = list(CALLS), list(CALLS.values())
    while wave.rises():
        (kind,) = draw.choices(kinds, weights)
        order = wave.order(kind.__name__)
        future = kind(wave, draw, order)
        out.append((order, future))
        if draw.random() < 0.5:
            order.watched = True
            future.add_done_callback(order.called)
        if kind is hanging:
            hung.append((time.monotonic() + draw.uniform(0, 0.1), order, future))
        elif draw.random() < 0.05:
            take_back(wave, draw, order, future)
        cancel_hung(wave, hung)
        while len(out) > OUT:
            collect(wave, *out.popleft(), hung)
    while out:
        collect(wave, *out.popleft(), hung)


def take_back(wave, draw, order, future):
    """Cancel it, if it has not started; or in any case."""
    tasks.spin_for(draw.choice([0.0, 0.0, 0.0002, 0.002]))
    order.asked = True
    if draw.random() < 0.7:
        order.said = future.cancel()
    else:
        order.fatal = True
        order.said = wave.rt.cancel(future, running=True)


def cancel_hung(wave, hung):
    now = time.monotonic()
    for entry in [entry for entry in hung if entry[0] <= now]:
        _, order, future = entry
        if future.done():
            hung.remove(entry)
        elif wave.rt.cancel(future, running=True):
            order.said = True
            hung.remove(entry)


def collect(wave, order, future, hung):
    """Wait for its outcome; look at what it reports meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while True:
        cancel_hung(wave, hung)
        if order.kind == "reporting":
            check_report(order, future.progress())
        try:
            error = future.exception(0.002 if hung or order.kind == "reporting" else 1.0)
            break
        except concurrent.futures.CancelledError as cancelled:
            order.fail(cancelled)
            return
        except TimeoutError:
            assert not wave.broken.is_set(), "another client has failed"
            assert time.monotonic() < deadline, f"lost: {order}"
    if error is None:
        order.end(future.result(0))
    else:
        order.fail(error)


def check_report(order, report):
    if report is not None:
        done, total, note = report
        assert 0 <= done < total < 20 and note == f"{order.key} {done}", f"a mixed report: {report}, {order}"


# ---- maps ------------------------------------------------------------------------------------------------


def items_of(wave, draw, count, chunksize, **options):
    """(orders, view, iterables) of a map. Some of its items raise, end their process, or hang."""
    orders = [wave.order("item") for _ in range(count)]
    evil = draw.random() < 0.3
    born = 0.3 if count <= 100 and draw.random() < 0.5 else 0.0
    timed = evil and draw.random() < 0.3
    retries = draw.choice([0, 0, 1, ENDLESS])
    hows = [""] * count
    sizes = [draw.choices(SIZES, WEIGHTS)[0] if count <= 100 else 0] * count
    for i, order in enumerate(orders):
        if evil and draw.random() < 0.02:
            hows[i] = draw.choice(["raise", "hang"] if timed else ["raise", "exit", "kill"])
            if retries == ENDLESS:
                hows[i] = "raise"
        elif draw.random() < born:
            hows[i] = "born"
        how, nbytes = hows[i], sizes[i]
        order.runs = retries + 1
        order.chunk = chunksize != 1
        order.timed = timed
        order.fatal = timed or how in ("exit", "kill")
        if how == "raise":
            order.errors = tasks.Refused
        elif how == "born":
            order.good = arrays.whole(order.key, nbytes // 8 + 1)
        elif not how:
            order.good = (
                (lambda v, key=order.key, n=nbytes: v == tasks.filled(key, n)) if nbytes else order.key.__eq__
            )
    if timed:
        options["timeout"] = 0.1
    view = wave.rt.options(retries=retries, **options)
    spins = [draw.choice(SPINS)] * count
    lists = [[wave.path] * count, [order.key for order in orders], spins, hows, sizes]
    if draw.random() < 0.3:
        lists = [(value for value in values) for values in lists]  # a generator has no length
    return orders, view, lists


def mapping(wave, draw):
    """A client: maps, in order and in any, some of them dropped in the middle."""
    while wave.rises():
        count = draw.choice([1, 10, 100, 400])
        chunksize = draw.choice([None, None, 1, 7, 50])
        orders, view, iterables = items_of(wave, draw, count, chunksize)
        ordered = draw.random() < 0.6
        call = view.map if ordered else view.map_unordered
        results = call(tasks.item, *iterables, chunksize=chunksize, return_exceptions=True, timeout=PATIENCE)
        left = draw.randrange(count) if draw.random() < 0.2 else count
        take(orders, itertools.islice(results, left), ordered)
        if left < count:
            results.close()
            drop(orders)
        else:
            assert next(results, None) is None, "a result too many"


def take(orders, results, ordered):
    """Give each result to its order."""
    index = {order.key: order for order in orders}
    for order, value in zip(orders, results, strict=False):
        if not ordered:
            order = order_of(orders, index, value)
        if isinstance(value, BaseException):
            order.fail(value)
        else:
            order.end(value)


def order_of(orders, index, value):
    """Whose result this is, that came in no order."""
    if isinstance(value, BaseException):
        return orders[int(re.search(r"outcome of item (\d+) of the map", value.__notes__[-1])[1])]
    return index[value if isinstance(value, int) else int.from_bytes(bytes(value[:8])[:8], "little")]


def drop(orders):
    """Nobody wants the rest. What runs may go on, or be killed."""
    for order in orders:
        if order.outcome is None:
            order.outcome = DROPPED


# ---- asyncio -----------------------------------------------------------------------------------------------


def awaiting(wave, draw):
    """A client: an event loop."""
    asyncio.run(lap_after_lap(wave, draw))


async def lap_after_lap(wave, draw):
    while wave.rises():
        if draw.random() < 0.3:
            await amap(wave, draw)
            continue
        async with asyncio.TaskGroup() as group:
            for _ in range(draw.randrange(1, 30)):
                order = wave.order("asubmit")
                order.asked = order.fatal = draw.random() < 0.1
                task = group.create_task(asubmit(wave, draw, order))
                if order.asked:
                    asyncio.get_running_loop().call_later(draw.uniform(0, 0.05), task.cancel)


async def asubmit(wave, draw, order):
    kind = draw.random()
    view = wave.view(draw, order)
    if order.asked and kind < 0.5:
        call = view.asubmit(tasks.hanging, wave.path, order.key, "python")
    elif kind < 0.8:
        order.good = order.key.__eq__
        call = view.asubmit(tasks.plain, wave.path, order.key, draw.choice(SPINS))
    else:
        order.errors = tasks.Refused
        call = view.asubmit(tasks.raising, wave.path, order.key, "exception")
    try:
        async with asyncio.timeout(PATIENCE):
            value = await call
    except asyncio.CancelledError as error:
        order.fail(error)  # it ends here: what was asked for has happened
    except TimeoutError as error:
        assert isinstance(error, TaskTimeout), f"lost: {order}"
        order.fail(error)
    except Exception as error:
        order.fail(error)
    else:
        order.end(value)


async def amap(wave, draw):
    """Some of them left in the middle: what runs is killed then."""
    count = draw.choice([1, 10, 100])
    chunksize = draw.choice([None, 1, 7])
    orders, view, iterables = items_of(wave, draw, count, chunksize)
    left = draw.randrange(count) if draw.random() < 0.3 else count
    if left < count:
        for order in orders:
            order.fatal = True
    taken = []
    results = view.amap(tasks.item, *iterables, chunksize=chunksize, return_exceptions=True, timeout=PATIENCE)
    async with aclosing(results):
        if left:
            async for value in results:
                taken.append(value)
                if len(taken) == left < count:
                    break
    take(orders, taken, True)
    if left < count:
        drop(orders)


CLIENTS = (submitting, submitting, mapping, awaiting)
