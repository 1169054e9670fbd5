"""Signal handlers that wait for the runtime, whatever they interrupt; destructors that do.

The handler runs at each place of a call where one may run, once (handlers.py). It needs threads of ours:
the collector for an exception, the supervisor for the replacement of a worker that has died.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evil
import pytest
from handlers import Place, strike, strike_everywhere
from watching import all_ready, until

from runtime import Future, Runtime, WorkerDied, _core, collector, locks

Factory = Callable[..., Runtime]
PATIENCE = 10.0  # seconds for what takes milliseconds, unless it would take for ever
RUNTIME = ("/runtime/",)
ALSO_THEIRS = ("/runtime/", "concurrent/futures/_base.py", "/threading.py")


def waits(rt: Runtime) -> None:
    """Map in two ways, and a call."""
    assert list(rt.map(abs, range(3))) == [0, 1, 2]
    assert sorted(rt.map_unordered(abs, range(3))) == [0, 1, 2]


def by_value(rt: Runtime) -> None:
    assert rt.submit(lambda n: n + 1, 2).result(PATIENCE) == 3


def scale(rt: Runtime) -> None:
    rt.scale(2 if rt._max_workers == 3 else 3)


def exceptions(rt: Runtime) -> None:
    futures = [rt.submit(evil.misbehave, "raise") for _ in range(2)]
    concurrent.futures.wait(futures, PATIENCE)
    assert type(futures[0].exception()) is evil.Refused


CALLS: dict[str, tuple[Callable[[Runtime], object], tuple[str, ...]]] = {
    "submit": (lambda rt: rt.submit(abs, -1).result(PATIENCE), ALSO_THEIRS),
    "exceptions": (exceptions, ALSO_THEIRS),
    "maps": (waits, ("/mapping.py", "/sockets.py", "/collector.py", "/outcomes.py", "/locks.py")),
    "by value": (by_value, ("/functions.py", "/versions.py", "/sockets.py")),
    "cancel": (lambda rt: rt.cancel(rt.submit(abs, -1), running=True), RUNTIME),
    "scale": (scale, RUNTIME),
    "reload": (lambda rt: rt.reload(), RUNTIME),
    "workers": (lambda rt: rt.workers(), RUNTIME),
    "stats": (lambda rt: rt.stats(), RUNTIME),
    "stacks": (lambda rt: rt.dump_stacks(), ("/lives.py", "/stacks.py", "/channels.py")),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", list(CALLS))
def test_a_handler_that_waits(factory: Factory, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # A hint that the handler holds up is lost for it: the workers are told after that time.
    monkeypatch.setattr(collector, "_RESCAN", 0.02)
    rt = factory(2, preload="evil")
    all_ready(rt)
    call, files = CALLS[name]
    count = 0

    def handler() -> None:
        nonlocal count
        count += 1
        deadly = count % 5 == 0
        error = rt.submit(evil.misbehave, "os._exit" if deadly else "raise").exception(PATIENCE)
        assert type(error) is (WorkerDied if deadly else evil.Refused)

    most = 10 if name == "reload" else 1  # one takes a while
    assert strike_everywhere(lambda: call(rt), handler, files, most) == count > 20


def test_a_handler_in_the_middle_of_a_send(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """zmq runs handlers inside of its send, when the message is on its way."""
    sent = []

    def send(socket: Any, message: bytes, flags: int) -> None:
        socket.send(message, flags)
        if threading.current_thread() is threading.main_thread() and len(sent) % 2 == 0:
            sent.append(message)
            error = rt.submit(evil.misbehave, "os._exit").exception(PATIENCE)
            assert type(error) is WorkerDied
            sent.append(message)

    monkeypatch.setattr("runtime.sockets._send", send)
    rt = factory(1)
    all_ready(rt)
    until(lambda: rt.submit(evil.square, 3).result(PATIENCE) == 9 and len(sent) >= 6, "it was sent to")


def test_a_handler_that_shuts_down_in_the_middle_of_a_send(
    factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The send that goes on has its socket: pyzmq runs handlers also before it calls zmq with that."""
    found: list[bool] = []

    def send(socket: Any, message: bytes, flags: int) -> None:
        if threading.current_thread() is threading.main_thread() and not found:
            found.append(rt.shutdown() or socket.closed)  # type: ignore[func-returns-value]
            found.append(rt._core.link._context.closed)
        socket.send(message, flags)

    monkeypatch.setattr("runtime.sockets._send", send)
    rt = factory(1)
    all_ready(rt)

    def sent() -> bool:
        with contextlib.suppress(RuntimeError):  # it has ended
            rt.submit(evil.square, 3)
        return bool(found)

    until(sent, "it was sent to")
    assert found == [False, False]
    assert rt._core.link._context.closed


@pytest.mark.timeout(120)
def test_a_handler_that_shuts_down_in_scale(factory: Factory) -> None:
    seen: set[Place] = set()
    while True:
        rt = factory(1)
        try:
            if not strike(lambda rt=rt: rt.scale(3), rt.shutdown, seen, 1, RUNTIME, lines=True):  # type: ignore[misc]
                break
        except RuntimeError as error:
            assert str(error).endswith("after shutdown")
        assert rt._core.ended.is_set()
    assert len(seen) > 20


def test_a_handler_that_shuts_down_in_shutdown(factory: Factory) -> None:
    seen: set[Place] = set()
    files = ("/supervisor.py", "/executor.py", "/locks.py", "/threading.py")
    while True:
        rt = factory(1)
        if not strike(rt.shutdown, rt.shutdown, seen, 1, files, lines=True):
            break
    assert len(seen) > 10


def test_a_shutdown_while_a_future_is_locked(factory: Factory) -> None:
    """In `concurrent.futures.wait`, say. The future gets its outcome as soon as that goes on."""
    rt = factory(1)
    ok, failed, cancelled = rt.submit(abs, -1), rt.submit(evil.misbehave, "raise"), rt.submit(abs, -2)
    locked, go = threading.Event(), threading.Event()

    def hold() -> None:
        with ok._condition, failed._condition:
            locked.set()
            go.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(PATIENCE)
    cancelled.cancel()
    rt.shutdown()
    go.set()
    thread.join()
    assert ok.result(PATIENCE) == 1
    assert type(failed.exception(PATIENCE)) is evil.Refused
    until(lambda: "runtime-late" not in {it.name for it in threading.enumerate()}, "its thread has ended")


@pytest.mark.parametrize("how", ["ALL_COMPLETED", "FIRST_COMPLETED", "_AS_COMPLETED"])
def test_the_locks_of_a_waiter_are_held_while_it_is_told(how: str) -> None:
    """A thread that took one in between would stop the collector, and may be in a handler that needs it."""
    futures: list[Future[int]] = [Future(), Future()]
    with futures[0]._condition, futures[1]._condition:
        waiter = concurrent.futures._base._create_and_install_waiters(futures, how)  # type: ignore[attr-defined]
    locks = [waiter.event._cond, *([waiter.lock] if hasattr(waiter, "lock") else [])]
    found: list[bool] = []

    def come_in() -> None:
        for lock in locks:
            found.append(lock.acquire(blocking=False))
            if found[-1]:
                lock.release()

    class Told(threading.Condition):
        def notify_all(self) -> None:
            thread = threading.Thread(target=come_in)
            thread.start()
            thread.join()
            super().notify_all()

    futures[0]._condition = Told()
    assert futures[0].conclude(True, 1) and futures[1].conclude(False, ValueError())
    assert found == [False] * len(locks)
    come_in()
    assert found[len(locks) :] == [True] * len(locks)
    assert waiter.finished_futures == futures and waiter.event.is_set()


@pytest.mark.parametrize("which", ["event", "lock"])
def test_a_waiter_whose_lock_is_taken_is_told_later(which: str) -> None:
    future: Future[int] = Future()
    with future._condition:
        waiter = concurrent.futures._base._create_and_install_waiters(  # type: ignore[attr-defined]
            [future], "_AS_COMPLETED"
        )
    taken, go = threading.Event(), threading.Event()

    def hold() -> None:
        with waiter.lock if which == "lock" else waiter.event._cond:
            taken.set()
            go.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(PATIENCE)
    assert not future.conclude(False, ValueError()) and not future.done()
    go.set()
    thread.join()
    assert future.conclude(False, ValueError()) and waiter.finished_futures == [future]


def test_many_futures_are_locked_at_the_end(factory: Factory) -> None:
    """One thread stays for all of them."""
    rt = factory(1)
    outcomes = rt._core.collector.outcomes
    rt.shutdown()
    futures: list[Future[int]] = [Future() for _ in range(100)]
    locked, go = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for future in futures:
                stack.enter_context(future._condition)
            locked.set()
            go.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(PATIENCE)
    for future in futures:
        outcomes.conclude(future, True, 1)
    assert [it.name for it in threading.enumerate()].count("runtime-late") == 1
    go.set()
    thread.join()
    assert [future.result(PATIENCE) for future in futures] == [1] * 100
    until(lambda: "runtime-late" not in {it.name for it in threading.enumerate()}, "its thread has ended")


def test_no_thread_for_a_locked_future_at_the_end(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rt = factory(1)
    outcomes = rt._core.collector.outcomes
    rt.shutdown()
    future: Future[int] = Future()

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    locked, go = threading.Event(), threading.Event()

    def hold() -> None:
        with future._condition:
            locked.set()
            go.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        outcomes.conclude(future, True, 1)
        outcomes.finish_late()
    assert "no thread can be made for the 1 futures" in caplog.text
    go.set()
    thread.join()
    outcomes.finish_late()
    assert future.result(PATIENCE) == 1


def test_a_destructor_in_the_middle_of_the_bookkeeping(factory: Factory) -> None:
    """It cannot wait for what goes on when it returns, and is told so."""
    rt = factory(1)
    told: list[BaseException] = []
    running = rt.submit(abs, -1)

    def forgotten() -> None:
        try:
            rt.submit(abs, -2).result(PATIENCE)
        except BaseException as error:
            told.append(error)

    weakref.finalize(rt.submit(abs, -3), forgotten)
    assert running.result(PATIENCE) == 1
    until(lambda: told, "the future was dropped where its result came in")
    assert [type(error) for error in told] == [RuntimeError]
    assert "waiting here would never end" in str(told[0])
    assert rt.submit(abs, -4).result(PATIENCE) == 4


def test_what_a_destructor_in_there_may_ask(factory: Factory) -> None:
    """Whatever need not be waited for; a wait is refused at once, also one with a timeout."""
    rt = factory(1)
    called, go = threading.Event(), threading.Event()

    def call_back(_: object) -> None:
        called.set()
        go.wait(PATIENCE)

    done, failed = rt.submit(abs, -1), rt.submit(evil.misbehave, "raise")
    assert done.result(PATIENCE) == 1
    failed.add_done_callback(call_back)  # the collector stays in there: this thread takes results in
    assert called.wait(PATIENCE)
    told: list[object] = []

    def forgotten() -> None:
        never = rt.submit(abs, -2)
        for future, timeout in ((done, 5), (failed, 5), (failed, None), (never, 0), (never, 5)):
            try:
                told.append(future.result(timeout))
            except BaseException as error:
                told.append(type(error))

    weakref.finalize(rt.submit(abs, -3), forgotten)
    until(
        lambda: rt.submit(abs, -4).result(PATIENCE) == 4 and told, "it was dropped where its result came in"
    )
    go.set()
    assert told == [1, evil.Refused, evil.Refused, TimeoutError, RuntimeError]


# ---- what goes without a lock ------------------------------------------------------------------------


class Socket:
    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def close(self, linger: int) -> None:
        self.closed = True


def test_an_outlet_has_one_thread_inside_and_nobody_waits() -> None:
    socket, entered, go = Socket(), threading.Event(), threading.Event()

    def push(it: Socket, message: bytes, flags: int) -> None:
        assert not it.closed and flags == 7
        it.sent.append(message)
        if message == b"first":
            outlet.send(b"by the same thread")
            entered.set()
            assert go.wait(PATIENCE)

    outlet = _core.Outlet(push, socket, 7)
    thread = threading.Thread(target=outlet.send, args=(b"first",))
    thread.start()
    assert entered.wait(PATIENCE)
    assert outlet.send(b"by another thread") and socket.sent == [b"first", b"by the same thread"]
    go.set()
    thread.join()
    assert socket.sent == [b"first", b"by the same thread", b"by another thread"]
    outlet.close()
    assert socket.closed and not outlet.send(b"late")


@pytest.mark.parametrize(
    ("fails", "error", "raised"),
    [
        (b"mine", BlockingIOError, True),
        (b"left first", BlockingIOError, False),  # a hint: its sender has gone on
        (b"left first", KeyboardInterrupt, True),  # this thread's, whatever it was about
    ],
)
def test_a_message_that_fails_holds_up_no_other(
    fails: bytes, error: type[BaseException], raised: bool
) -> None:
    sent: list[bytes] = []

    def push(it: Socket, message: bytes, flags: int) -> None:
        if message == b"mine":
            for other in (b"left first", b"left next"):
                thread = threading.Thread(target=outlet.send, args=(other,))
                thread.start()
                thread.join()
        if message == fails:
            raise error
        sent.append(message)

    outlet = _core.Outlet(push, Socket(), 0)
    with pytest.raises(error) if raised else contextlib.nullcontext():
        assert outlet.send(b"mine")
    assert sent == [it for it in (b"mine", b"left first", b"left next") if it != fails]
    assert not outlet.held


def test_an_outlet_that_is_closed_while_somebody_is_inside() -> None:
    socket = Socket()

    def push(it: Socket, message: bytes, flags: int) -> None:
        threading.Thread(target=outlet.close).start()
        until(lambda: outlet.closed, "it is closed")
        assert not it.closed, "under the one who is inside"
        raise BlockingIOError

    outlet = _core.Outlet(push, socket, 0)
    with pytest.raises(BlockingIOError):
        outlet.send(b"")
    assert socket.closed


def test_a_bell_may_be_rung_when_it_is_closed() -> None:
    bell = _core.Bell()
    fd = bell.fd
    for _ in range(3):
        bell.ring()
    assert os.eventfd_read(fd) == 3
    bell.silence()
    bell.close()
    reading, writing = os.pipe()  # one of them has its number
    bell.ring()
    os.close(writing)
    assert fd in (reading, writing) and os.read(reading, 9) == b""
    os.close(reading)
    bell.close()


def test_a_latch() -> None:
    latch = locks.Latch()
    assert not latch.wait(0) and not latch.is_set()
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(latch.wait(PATIENCE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    latch.set()
    latch.set()
    for thread in threads:
        thread.join()
    assert found == [True] * 3 and latch.wait(0)


# Locks that there are, and why no thread of ours waits for one that a thread of the user's holds.
ARGUED = {
    "locks": "the latch: who gets it hands it on at once",
    "sockets": "between supervisor and collector",
    "linking": "between the lanes of one worker, while one loads; there is none in the host",
    "channels": "`signalling` is tried, never waited for",
    "relay": "a fork of the host holds it, for as long as that takes; the thread of the relay waits then",
    "progress": "between users and the thread that draws, which nobody waits for longer than a second",
    "terminal": "the same",
    "cli.progress": "the command's own thread",
    "cli.program": "between threads of the command's own; handlers only tell one of them",
    "cli.watching": "the same",
    "listening": "taken once, without waiting, by the one that closes",
    "service": "ctx.stopping, an Event by contract: the watcher sets it, and handlers of ours only ring",
}


def test_there_is_no_other_lock() -> None:
    package = Path(locks.__file__).parent
    makers = {"Lock", "RLock", "Condition", "Event", "Semaphore", "BoundedSemaphore", "Barrier", "Queue"}
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in makers:
                    found.add(".".join(path.relative_to(package).with_suffix("").parts))
    assert found == set(ARGUED)
