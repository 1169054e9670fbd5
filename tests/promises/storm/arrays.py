"""Orders with arrays that lie in the region: given, returned, put there, born there, and seen for longer.

An array holds the number of its order in every place, so that memory of another one is seen at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque

import numpy

from runtime import RegionFull

from . import tasks

SIZES = (1, 10, 500, 600, 3_000, 9_000, 40_000)  # items of 8 bytes; 16 KiB and more travel by themselves
KEPT = 4  # Refs, and results, that are used again and again
PATIENCE = 30.0  # seconds until nothing is seen any more
WRAPPINGS = (  # tasks.unwrapped finds what is in them
    lambda thing: thing,
    lambda thing: [None, thing],
    lambda thing: {"it": ("text", {"it": thing})},
)


class Stock:
    """What the clients of a wave use more than once: [(Ref or array, its number, items)]."""

    def __init__(self):
        self.refs, self.results = deque(), deque(maxlen=KEPT)
        self.lock = threading.Lock()
        self.counts = Counter()

    def thin_out(self, draw):
        """Now and then nobody has use for a Ref any more; half of them are released."""
        while len(self.refs) == KEPT or (self.refs and draw.random() < 0.1):
            gone, _, _ = self.refs.popleft()
            if draw.random() < 0.5:
                gone.release()
                self.counts["Refs released"] += 1

    def ref(self, wave, draw, order):
        """A Ref of whose object others have use as well."""
        if len(self.refs) < KEPT and draw.random() < 0.5:
            with contextlib.suppress(RegionFull):
                self.refs.append(self.new_ref(wave, draw, order))
                self.counts["Refs"] += 1
        return draw.choice(self.refs) if self.refs else plain(draw, order)

    def new_ref(self, wave, draw, order):
        """Of an array somewhere in an object; or of an object that holds another Ref."""
        wrap = draw.choice(WRAPPINGS)
        if self.refs and draw.random() < 0.3:
            ref, key, n = draw.choice(self.refs)
            self.counts["Refs of Refs"] += 1
        else:
            ref, key, n = plain(draw, order)
        return wave.rt.put(wrap(ref)), key, n


def plain(draw, order):
    n = draw.choice(SIZES)
    return numpy.full(n, order.key), order.key, n


def shared(wave, draw, order):
    """An array in the region, or an ordinary one if there is no room."""
    n = draw.choice(SIZES)
    try:
        array = wave.rt.empty(n, "i8")
    except RegionFull:
        return plain(draw, order)
    array[:] = order.key
    return array, order.key, n


def whole(key, n):
    return lambda array: array.shape == (n,) and bool((array == key).all())


def given(wave, draw, order):
    """An array that tasks may read: new, in the region, put there, or an earlier result. Under the lock."""
    how = draw.randrange(4)
    if how == 0:
        return plain(draw, order)
    if how == 1:
        return shared(wave, draw, order)
    if how == 2 and wave.stock.results:
        return draw.choice(wave.stock.results)
    return wave.stock.ref(wave, draw, order)


def looking(wave, draw, order):
    """Looks at arrays of all kinds at once; the worker may go on seeing one of them."""
    view, keeps, wrap = wave.view(draw, order), draw.random() < 0.3, draw.choice(WRAPPINGS)
    with wave.stock.lock:
        wave.stock.thin_out(draw)
        arrays = [given(wave, draw, order) for _ in range(draw.randrange(1, 4))]
        order.good = [(key, n) for _, key, n in arrays].__eq__
        return view.submit(
            tasks.looking, wave.path, order.key, keeps, *[wrap(array) for array, _, _ in arrays]
        )


def marking(wave, draw, order):
    """Writes into an array that the host sees, too."""
    array, key, n = shared(wave, draw, order)
    order.good = lambda value: value == n and array[0] in (key, -key)
    return wave.view(draw, order).submit(tasks.marking, wave.path, order.key, array)


def returning(wave, draw, order):
    """Gives its argument back."""
    view, keeps = wave.view(draw, order), draw.random() < 0.3
    with wave.stock.lock:
        wave.stock.thin_out(draw)
        array, key, n = given(wave, draw, order)
        right = whole(key, n)
        order.good = lambda value: right(value) and stored(wave, value, key, n)
        return view.submit(tasks.giving_back, wave.path, order.key, keeps, draw.choice(WRAPPINGS)(array))


def born(wave, draw, order):
    """Makes its result in the region."""
    n = draw.choice(SIZES)
    right = whole(order.key, n)
    order.good = lambda value: right(value) and stored(wave, value, order.key, n)
    return wave.view(draw, order).submit(tasks.born, wave.path, order.key, draw.random() < 0.3, n)


def stored(wave, array, key, n):
    """Use a result as an argument from now on."""
    with wave.stock.lock:
        wave.stock.results.append((array, key, n))
    return True


def let_go(rt, workers):
    """No worker sees an array any more."""
    deadline = time.monotonic() + PATIENCE
    while rt.stats().pinned or "private" in rt._core.arena.owners():
        assert time.monotonic() < deadline, f"seen for ever: {rt.stats()}, {rt._core.arena.owners()}"
        for future in [rt.submit(tasks.let_go, 0.002) for _ in range(4 * workers)]:
            future.result(PATIENCE)


CALLS = {looking: 15, marking: 5, returning: 10, born: 10}
