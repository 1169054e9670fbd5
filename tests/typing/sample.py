"""What a user's type checker sees; `make types` runs mypy --strict over it. Never executed."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Iterator
from typing import assert_type

import runtime


def double(x: int) -> int:
    return 2 * x


def executor() -> None:
    with runtime.Runtime(2, retries=1, timeout=5.0, region_size="64MiB") as rt:
        future = rt.submit(double, 4)
        assert_type(future, runtime.Future[int])
        assert_type(future.result(), int)
        assert_type(rt.map(double, range(3)), Iterator[int])
        assert_type(rt.map_unordered(double, range(3), chunksize=2, progress=True), Iterator[int])
        assert_type(future.progress(), tuple[float, float | None, str] | None)
        assert_type(rt.workers()[0].busy, float)
        assert_type(rt.options(priority=2).submit(double, 1), runtime.Future[int])
        assert_type(rt.cancel(future, running=True), bool)
        assert_type(rt.stats().done, int)
        assert_type(rt.scale(2), None)
        ref = rt.put([1, 2])
        assert_type(ref, runtime.Ref[list[int]])
        assert_type(ref.get(), list[int])
        assert_type(ref.nbytes, int)
        ref.release()
        assert_type(rt.alloc(100), memoryview)
        assert_type(runtime.Kernel("runtime:crc32"), runtime.Kernel)
        rt.run_kernel(runtime.Kernel("runtime:crc32"), b"abc", params=b"", grain=4096, timeout=1.0)
        assert_type(rt.stats().kernels, tuple[tuple[str, int, int], ...])
        rt.empty((3, 4), "i4")[0] = 1
        assert_type(rt.workers()[0].status, runtime.WorkerStatus)
        assert_type(rt.dump_stacks(0), dict[int, str])
        concurrent.futures.wait([future])
        rt.shutdown(cancel_futures=True)


async def loop(rt: runtime.Runtime) -> int:
    assert_type(await rt.asubmit(double, 1), int)
    assert_type(await rt.options(timeout=1.0).asubmit(double, x=1), int)
    async for value in rt.amap(double, range(3), return_exceptions=True):
        assert_type(value, int)
    await rt.amap(double, range(3)).aclose()
    return await asyncio.wrap_future(rt.submit(double, 1))


def in_a_worker() -> None:
    runtime.current().report(1, total=3.5, note="one")
    runtime.current().empty(5)[:] = 1


def memory() -> None:
    region = runtime.SharedRegion.create(1 << 20, name="sample")
    assert_type(region.fetch_add_u64(0, 1), int)
    assert_type(region.compare_exchange_u64(0, 1, 2), bool)
    assert_type(region.read_at(0, 8), bytes)
    pool = runtime.MemoryPool(4, 4096, region=region)
    block = pool.acquire(timeout=None)
    if block is not None:
        with block:
            assert_type(memoryview(block), memoryview[int])
            block.write(0, b"x")


def failures() -> None:
    try:
        raise runtime.WorkerDied(1, 0, None, 9, history=("pid 1",))
    except runtime.WorkerDied as died:
        assert_type(died.history, tuple[str, ...])
    except runtime.RuntimeFailure as error:
        assert_type(error, runtime.RuntimeFailure)
