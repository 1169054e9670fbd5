"""How a thread of a worker serves the leases of its slot, and what is not ordinary about a task: a function
that is new here, arguments or results that are large or pickled. What is ordinary stays in `_runner`.

It is the worker's main thread (loop.py), or each of its lanes (lanes.py).
"""

from __future__ import annotations

import abc
import os
from typing import Any

from runtime import _core, serializer
from runtime.contexts import Here

__all__ = ["EXIT_KILLED", "Calls", "Leave", "item_of"]

EXIT_KILLED = 71  # the host killed the lease that this worker was finishing


class Leave(BaseException):
    """Raised by the SIGTERM handler in a worker that waits for work."""


class Calls(abc.ABC):
    """Claims, loads, runs and answers calls. Thread-safety: for the thread that claims from the port."""

    port: _core.Runner
    functions: serializer.FunctionCache

    def loop(self) -> None:
        """Look, run, answer; until told to leave."""
        port = self.port
        while not (port.leaving or port.stopping):
            entry = port.serve()
            if entry >= 0:
                self.execute(entry)
            elif entry == _core.LEASE_LOST:
                os._exit(EXIT_KILLED)
            elif not port.watch():
                self.check()
                port.tell_untold()
                self.rest()

    @abc.abstractmethod
    def check(self) -> None:
        """Now and then, and before a rest: see to what may wait."""

    @abc.abstractmethod
    def rest(self) -> None:
        """Wait until there is something to look at."""

    def execute(self, entry: int) -> None:
        """Run a call that is not ordinary: its function is new here, or its arguments are large."""
        try:
            exporter: Any = self.port.frame(entry)
        except MemoryError as error:  # no memory for arguments that travel by value
            exporter, item = b"", self.failed(error)
        else:
            self.port.begin_item(entry)
            item = self.run_call(entry, exporter)
            self.port.end_item(entry)
        del exporter  # what still holds it now is the task's
        if not self.deliver(entry, [item], 1, 1):
            os._exit(EXIT_KILLED)
        self.port.ended()

    def run_call(self, entry: int, exporter: Any) -> tuple[Any, ...]:
        """Load and run one call; its outcome as an item of a frame."""
        try:
            items = _core.read_frame(exporter, self.port.resolve)
            fn_data = self.function_data(entry, items)
            status, data, views, _, _ = items.pop()
            fn = self.functions.load(self.port.describe(entry)[0], fn_data)
            call = _core.unpack_plain(data) if status == _core.S_PLAIN else serializer.loads(data, views)
            fn = serializer.bound(fn, call)
            args, kwargs = call[0], call[1] or {}
            del items, data, views, call
            result = fn(*args, **kwargs)
        except BaseException as error:
            return self.failed(error)
        return self.port.plain_outcome(result) or self.succeeded(result)

    def function_data(self, entry: int, items: list[Any]) -> bytes | None:
        """The function's pickle: from its block, or the item that leads the frame; None: it is loaded."""
        fn_id, leads = self.port.describe(entry)
        data = bytes(items.pop(0)[1]) if leads else None
        if not self.functions.needs(fn_id):
            return None
        return data if data is not None else bytes(self.port.function(entry))

    def run_item(self, fn_id: int, fn_data: bytes | None, data: Any, views: list[Any]) -> tuple[Any, ...]:
        """Load and run one item of a map that came with a pickle of its own."""
        try:
            fn, args, kwargs = serializer.unpack_call(self.functions, fn_id, fn_data, data, views)
            del data, views
            result = fn(*args, **kwargs)
        except BaseException as error:
            return self.failed(error)
        return self.succeeded(result)

    def bound(self, fn: Any, call: tuple[Any, ...]) -> Any:
        """The function of a call that brings what it is bound to along."""
        return serializer.bound(fn, call)

    def succeeded(self, result: Any) -> tuple[Any, ...]:
        """A result as an item; if it cannot be pickled, the reason is the outcome."""
        if Here.forked:
            os._exit(0)  # a task forked and its child came back here: it has nothing to deliver
        try:
            return item_of(_core.S_VALUE, serializer.dumps(result, self.port.locate))
        except BaseException as error:
            error.add_note(f"The result of the task, a {type(result).__qualname__}, could not be pickled.")
            return self.failed(error)

    def frozen(self, item: tuple[Any, ...]) -> tuple[Any, ...]:
        """An outcome that no longer changes when the objects change that it was made of."""
        status, data, buffers, readonly = item
        mine = [memoryview(b) if isinstance(b, _core.BlockSlice) and not b.shared else b for b in buffers]
        payload = serializer.Payload(data, tuple(mine), readonly)
        payload.freeze()
        return item_of(status, payload)

    def failed(self, error: BaseException) -> tuple[Any, ...]:
        """An exception as an item."""
        if Here.forked:
            os._exit(1)
        if isinstance(error, Leave):
            error = KeyboardInterrupt()
        item = item_of(_core.S_ERROR, serializer.dump_exception(error))
        # Its frames know the error and the arguments: a cycle that would keep both.
        error.__traceback__ = None
        return item

    def deliver(self, entry: int, items: list[Any], ran: int, count: int) -> bool:
        """End the lease with its last `count` outcomes. False: the host has killed it."""
        try:
            return bool(self.port.finish(entry, items, ran))
        except (BufferError, MemoryError) as error:  # a result that cannot be laid out
            return bool(self.port.finish(entry, [self.failed(error)] * count, ran))


def item_of(status: int, payload: serializer.Payload) -> tuple[Any, ...]:
    """An outcome as a frame takes it."""
    return (status, payload.data, payload.buffers, payload.readonly)
