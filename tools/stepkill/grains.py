"""Worlds of a kernel's job: a participant, or the host that recovers one, dies; another one ends the job.

The grains are of 16 bytes, so that the kernel's own instructions are few: run_kernel makes pages of them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from runtime import _core
from tools.stepkill.engine import Verdict
from tools.stepkill.shipped import native

PAGE = 4096
DYING, OTHER = 0, 1  # participants
FREE, DONE, FAILED = 0, 3, 4  # G_* of _kernel.pxd
GRAIN = 16
POINTER, U64 = ctypes.c_void_p, ctypes.c_uint64


class GrainWorld:
    """Three grains, of dst += 2 * src. fails: the kernel returns a code instead. partial: it sums into those.
    saved: the grain that the dying participant has saved, and half changed, before. stopped: the job was.
    """

    def __init__(self, act: str, *, fails: bool = False, partial: str = "", saved: bool = False,
                 stopped: bool = False) -> None:  # fmt: skip
        self.act = getattr(self, act)
        self.fails, self.partial = fails, partial
        self.arena = _core.Arena.create(4 * PAGE, 2, 4, 4, PAGE)
        self.memory = mmap.mmap(self.arena.fd, os.fstat(self.arena.fd).st_size)
        self.src, self.dst = self.arena.take(5 * 8), self.arena.take(5 * 8)
        struct.pack_into("5d", memoryview(self.src), 0, *range(1, 6))
        struct.pack_into("5d", memoryview(self.dst), 0, *range(10, 60, 10))
        if partial:
            grain = PAGE if partial == "per page" else GRAIN
            self.job = _core.JobBlock.create(self.arena, 5 * 8, 0, grain, 2, 16, partial == "per page")
        else:
            self.job = _core.JobBlock.create(self.arena, 5 * 8, 5 * 8, GRAIN, 2, inout=True)
        self.params = ctypes.create_string_buffer(struct.pack("d", 2.0))
        name = "minmax_f64" if partial else "axpy_f64"
        self.kernel = _core.read_capsule(_core.BUILTINS[name])[1]
        if fails:
            self.kernel = ctypes.cast(ctypes.CDLL(None).getpid, POINTER).value or 0
        types = (POINTER, POINTER, POINTER, POINTER, POINTER, U64)
        self.work = native("_kernel", "work", None, *types)
        self.run_grain = native("_kernel", "run_grain", ctypes.c_int, POINTER, U64, *types[1:])
        self.recover_grain = native(
            "_kernel", "recover_grain", ctypes.c_int, POINTER, POINTER, U64, POINTER, U64
        )
        self.at = [_core.address_of(memoryview(block)) for block in (self.job.block, self.src, self.dst)]
        if saved:
            self.half_way()
        self.stopped = stopped
        if stopped:
            self.job.stop()

    def half_way(self) -> None:
        """As a participant leaves it that is killed in the middle of its first grain."""
        self.participate()
        base = self.job.block
        words = memoryview(base).cast("Q")
        scratch, first = words[13], words[12] // 8
        words[first] = 2 | DYING << 3  # G_SAVED
        memoryview(base)[scratch : scratch + GRAIN] = struct.pack("2d", 10, 20)

    def prepare(self) -> None:
        """Nothing."""

    def participate(self, number: int = DYING) -> None:
        job, src, dst = self.at
        self.work(job, src, None if self.partial else dst, self.kernel, self.params, number)

    def restore(self) -> None:
        """What the host does after a death."""
        for grain in range(self.job.grains):
            self.recover_grain(self.at[0], self.at[0], grain, self.at[2], DYING)

    def meddle(self) -> None:
        """Another participant is faster."""
        job, src, dst = self.at
        self.run_grain(job, 0, src, None if self.partial else dst, self.kernel, self.params, OTHER)

    def recover(self) -> None:
        self.restore()
        self.participate(OTHER)

    def audit(self) -> Verdict:
        states = [state for state, _ in self.job.word_states()]
        if self.stopped:  # whatever was begun is finished, or as it was
            return Verdict(lost=sum(state not in (FREE, DONE) for state in states))
        if self.fails:
            failed = self.job.failure is not None and FAILED in (*states, FAILED if 0 in states else 0)
            return Verdict(lost=int(not failed))
        lost = sum(state != DONE for state in states)
        if self.partial:
            found = [struct.unpack("2d", part) for part in self.job.parts()]
            wanted = [(1, 5)] if self.partial == "per page" else [(1, 2), (3, 4), (5, 5)]
            return Verdict(lost, int(found != wanted))
        values = struct.unpack_from("5d", memoryview(self.dst))
        return Verdict(lost, sum(x != 12 * (i + 1) for i, x in enumerate(values)))

    def close(self) -> None:
        del self.job, self.src, self.dst
        self.memory.close()
        self.arena.release()
