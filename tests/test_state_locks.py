"""Locks of a SharedState: exclusion, fairness, holders that die, are stopped, or fork."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time

import pytest
from marks import FORKS_BESIDE_THREADS
from watching import fork, join, stopped, until

from runtime import LockTimeout, SharedState

pytestmark = FORKS_BESIDE_THREADS


def number(value: bytes | None) -> int:
    return int(value or b"0")


def hold_for_ever(state: SharedState, key: str) -> None:
    with state.lock(key):
        state.set("held", b"")
        signal.pause()


def test_taken_and_given_back(state: SharedState) -> None:
    lock = state.lock("a")
    for _ in range(3):
        with lock as taken:
            assert taken is lock
            assert not lock.inherited
            with pytest.raises(LockTimeout, match="'a'"):
                state.lock("a").acquire(0)
            with pytest.raises(LockTimeout), state.lock("a", 0.01):
                raise AssertionError("held twice")
            with state.lock("b"), pytest.raises(RuntimeError, match="already"):
                lock.acquire()
        with pytest.raises(RuntimeError, match="not held"):
            lock.release()
    with pytest.raises(ValueError, match="timeout"):
        state.lock("a", -1)
    assert (len(state), state.items(), state.get("a")) == (0, [], None)


def test_dropped_while_held(state: SharedState) -> None:
    lock = state.lock("a")
    lock.acquire()
    del lock
    state.lock("a").acquire(0)


def test_an_exception_gives_it_back(state: SharedState) -> None:
    with pytest.raises(ZeroDivisionError), state.lock("a"):
        raise ZeroDivisionError
    state.lock("a").acquire(0)


def test_names_that_are_not_used_make_room(state: SharedState) -> None:
    with state.lock("held"):
        for i in range(20_000):
            with state.lock(f"lock {i}"):
                pass
        with pytest.raises(LockTimeout):
            state.lock("held").acquire(0)
    free = state.bytes_free()
    state.sweep()
    assert state.bytes_free() > free
    assert state.bytes_free() > state.region.size // 2


def test_one_at_a_time(state: SharedState) -> None:
    def count() -> None:
        def run() -> None:
            for _ in range(400):
                with state.lock("n"):
                    state.set("n", str(number(state.get("n")) + 1).encode())

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    join(*[fork(count) for _ in range(3)])
    assert number(state.get("n")) == 2400


def test_who_waits_gets_it(state: SharedState) -> None:
    """One that takes it again and again keeps nobody out."""

    def hog() -> None:
        state.set("hog", b"")
        while "stop" not in state:
            with state.lock("a"):
                time.sleep(0.0005)  # holds it nearly always

    pid = fork(hog)
    until(lambda: "hog" in state)
    for _ in range(20):
        with state.lock("a", 5):
            pass
    state.set("stop", b"")
    join(pid)


def test_who_gave_up_waiting_is_forgotten(state: SharedState) -> None:
    lock = state.lock("a")
    lock.acquire()
    with pytest.raises(LockTimeout):
        state.lock("a").acquire(0.02)  # long enough to be handed over to
    lock.release()
    state.lock("a").acquire(0)


def test_more_waiting_threads_than_pins(state: SharedState) -> None:
    done = []

    def take() -> None:
        with state.lock("a"):
            done.append(1)

    with state.lock("a"):
        threads = [threading.Thread(target=take) for _ in range(20)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 20


@pytest.mark.parametrize("rounds", [30])
def test_a_dead_holders_lock_passes_on(state: SharedState, rounds: int) -> None:
    def wait() -> None:
        with state.lock("a", 30) as lock:
            got.append(time.monotonic())
            inherited.append(lock.inherited)

    times = []
    got: list[float] = []
    inherited: list[bool] = []
    for _ in range(rounds):
        pid = fork(lambda: hold_for_ever(state, "a"))
        until(lambda: "held" in state)
        state.delete("held")
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.003)  # it may wait already, or not: both are right
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        thread.join()
        times.append(got.pop() - killed)
        assert inherited.pop()
    assert sorted(times)[rounds // 2] < 0.1
    with state.lock("a") as lock:
        assert not lock.inherited


def test_a_sweep_passes_it_on(state: SharedState) -> None:
    pid = fork(lambda: hold_for_ever(state, "a"))
    until(lambda: "held" in state)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    state.sweep()
    with state.lock("a", 0) as lock:
        assert lock.inherited
    state.sweep()


def test_a_stopped_holder_keeps_it(state: SharedState) -> None:
    pid = fork(lambda: hold_for_ever(state, "a"))
    until(lambda: "held" in state)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: stopped(pid))
    with pytest.raises(LockTimeout):
        state.lock("a").acquire(0.05)
    state.sweep()
    with pytest.raises(LockTimeout):
        state.lock("a").acquire(0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with state.lock("a", 5) as lock:
        assert lock.inherited


def test_a_fork_holds_nothing(state: SharedState) -> None:
    def child() -> None:
        with pytest.raises(LockTimeout):
            state.lock("a").acquire(0)
        with pytest.raises(RuntimeError, match="not held"):
            lock.release()

    lock = state.lock("a")
    with lock:
        join(fork(child))
        with pytest.raises(LockTimeout):
            state.lock("a").acquire(0)


@pytest.mark.stress
def test_killed_anywhere_on_the_way(state: SharedState) -> None:
    """Never two at once, and never lost, whoever is killed, waiting or holding."""

    def run() -> None:
        mine = str(os.getpid()).encode()
        while True:
            with state.lock("a"):
                state.set("inside", mine)
                assert state.get("inside") == mine
                state.add("turns")

    chance = random.Random(3)
    pids = [fork(run) for _ in range(4)]
    for _ in range(100):
        before = state.add("turns", 0)
        until(lambda before=before: state.add("turns", 0) > before + 5)
        pid = pids.pop(chance.randrange(len(pids)))
        time.sleep(chance.random() * 0.001)  # the kill may hit any instruction: no synchronisation
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL  # it had not failed
        pids.append(fork(run))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with state.lock("a", 5):
        pass


def test_get_or_set_after_its_maker_was_killed(state: SharedState) -> None:
    def make() -> bytes:
        state.set("making", b"")
        signal.pause()
        return b""

    pid = fork(lambda: state.get_or_set("k", make))
    until(lambda: "making" in state)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert state.get_or_set("k", lambda: b"made") == b"made"


def test_async_forms(state: SharedState) -> None:
    async def count() -> None:
        for _ in range(20):
            async with state.alock("n"):
                n = number(await state.aget("n"))
                await asyncio.sleep(0)
                await state.aset("n", str(n + 1).encode())

    async def run() -> None:
        await asyncio.gather(*[count() for _ in range(5)])
        async with state.alock("a"):
            with pytest.raises(LockTimeout):
                async with state.alock("a", 0.01):
                    raise AssertionError("held twice")

    asyncio.run(run())
    assert number(state.get("n")) == 100
