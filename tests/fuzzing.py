"""Garbage for each decoder: targets, mutations, and campaigns that outlive a crash.

    campaign ──► child: input n = mutated(seed, n) ─► written down ─► target(input)
        ◄── it ended: by itself, by a signal (SIGSEGV, SIGBUS, SIGALRM: a hang), by an exception ──
        └──► the input that was written down last, made smaller, kept in a file

An input is bytes. A target may raise what it is documented to raise; all else, and each death, is a finding.
Pickles are no target: they are code, and who may write them into the region runs as we do.
What reads a mapped region gets a region of its own for each input. The same seed gives the same inputs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import garbage_worker

from runtime import MemoryPool, SharedRegion, _core, errors, logrecords, serializer, wire

HANG = 5.0  # seconds that an input may take
SMALLER = 20.0  # seconds for making a finding smaller
ROOM = 1 << 16  # bytes of an input, at most
NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 256, 4095, 4096, 65535, 65536)
B_REF = 2  # frame_buffer_t.flags, _frame.pxd
EDGES = (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 4096, 2**64 - 1)

Target = tuple[Callable[[bytes], object], tuple[type[BaseException], ...], Callable[[], list[bytes]]]


# ---- targets: what reads bytes that another process wrote ---------------------------------------------


def touch(items: list[Any]) -> None:
    """Whatever a decoder names lies where it may be read."""
    for _, data, views, _, _ in items:
        bytes(data)
        for view in views:
            bytes(view)


def frames() -> list[bytes]:
    buffers = (b"a" * 100, b"", bytes(700))
    return [
        _core.Frame([(0, b"pickle", (), ())]).tobytes(),
        _core.Frame([(0, b"pickle", buffers, (True, False, True)), (1, b"", (), ())]).tobytes(),
        _core.Frame([(3, b"list", (), (), 17, 4000)] * 5).tobytes(),
        struct.pack("<IIQIIII", 1, 2, 4, 2, 0, 0, 0)
        + struct.pack("<QIIQQQQ", 50, B_REF, 0, 4096, 100, 7, 20)
        + struct.pack("<QIIQQQQ", 0, B_REF | 13, 0, 8192, 10, 3, 10)
        + b"data",
    ]


def resolve(block: int, tag: int, nbytes: int, flags: int) -> bytes:
    """The blocks that there are: of 100 and of 10 bytes."""
    found = {(4096, 7): bytes(100), (8192, 3): bytes(10)}.get((block, tag))
    if found is None:
        raise ValueError("there is no such block")
    return found


def series(data: bytes) -> None:
    data = data.ljust(9, b"\0")
    status, start, count = struct.unpack_from("<BII", data)
    if status % 8 in (3, 6):  # a pickle is code: who may write one needs no garbage
        data = data[:9] + serializer.dumps(list(range(data[-1]))).data
    if count < 1 << 24:  # that many numbers fit into no message
        _core.read_series(status % 8, data[9:], start, count)


def all_series() -> list[bytes]:
    return [struct.pack("<BII", kind, 1, 3) + struct.pack("<5q", *range(5)) for kind in (3, 4, 5, 6)]


def plain_values() -> list[bytes]:
    import marshal

    values = [None, 7, -(2**70), 1.5, "text", b"bytes", (1, [2, {"a": (None, True)}]), {1: {2: {3: [4]}}}]
    return [marshal.dumps(value, 2) for value in values]


def header(make: Callable[[], SharedRegion], where: int, data: bytes, look: Callable[[int], object]) -> None:
    """A region whose bytes from `where` on (of the file) are these."""
    region = make()
    try:
        os.pwrite(region.fd, data, where)
        look(region.fd)
    finally:
        region.close()


def look_at_region(fd: int) -> None:
    region = SharedRegion.from_fd(fd)
    try:
        region.read_at(0, min(region.size, 4096))
        region.load_u64(max(0, (region.size - 8) // 8 * 8))
    finally:
        region.close()


def look_at_pool(fd: int) -> None:
    region = SharedRegion.from_fd(fd)
    pool, blocks = None, []
    try:
        pool = MemoryPool(16, 64, region=region)
        blocks = [pool.acquire() for _ in range(17)]
        for block in blocks:
            if block is not None:
                block.write(0, b"x" * 64)
                block.release()
        assert 0 <= pool.available <= 16
    finally:
        block = None
        del blocks, pool
        region.close()


def plain_region() -> SharedRegion:
    return SharedRegion.create(8192, max_size=1 << 20)


def with_pool() -> SharedRegion:
    region = SharedRegion.create(1 << 17)
    MemoryPool(16, 64, region=region)
    return region


def pool_at(region: SharedRegion) -> int:
    """File offset of its pool."""
    return int(struct.unpack("<Q", os.pread(region.fd, 8, 72))[0])


def pool_headers() -> list[bytes]:
    region = with_pool()
    at = pool_at(region)
    found = os.pread(region.fd, 256, at)
    region.close()
    return [found]


def garbage_in_pool(data: bytes) -> None:
    """Its header, the first rows of its owner table, and all its words."""
    region = with_pool()
    at = pool_at(region)
    words = at + 128 + 8 * 4096
    try:
        os.pwrite(region.fd, data[:256], at)
        os.pwrite(region.fd, data[256 : 256 + 128], words)
        look_at_pool(region.fd)
    finally:
        region.close()


def first_bytes(make: Callable[[], SharedRegion]) -> list[bytes]:
    region = make()
    found = os.pread(region.fd, 128, 0)
    region.close()
    return [found]


TARGETS: dict[str, Target] = {
    "hint": (
        wire.decode_hint,
        (wire.WireError,),
        lambda: [wire.encode_hint(kind, 3, 9) for kind in wire.HintKind],
    ),
    "report": (
        wire.decode_report,
        (wire.WireError,),
        lambda: [wire.encode_report("died", slot=3, status=-9, rss=10), b'{"what":"x","a":[1,{"b":null}]}'],
    ),
    "log": (
        logrecords.decode,
        (wire.WireError,),
        lambda: [logrecords.encode_warning("text", UserWarning, "file", 3)],
    ),
    "frame": (lambda data: touch(_core.read_frame(data, resolve)), (ValueError,), frames),
    "series": (series, (ValueError,), all_series),
    "plain": (_core.unpack_plain, (ValueError, EOFError, TypeError), plain_values),
    "region": (
        lambda data: header(plain_region, 0, data[:4096], look_at_region),
        (ValueError, MemoryError, OSError),
        lambda: first_bytes(plain_region),
    ),
    "pool": (garbage_in_pool, (ValueError, errors.RuntimeFailure), pool_headers),
    "worker": (garbage_worker.run, (), garbage_worker.programs),
}


def planted(how: str, data: bytes) -> None:
    """A decoder that cannot bear a 7 in its third place."""
    if data[2:3] == b"\x07":
        if how == "segfault":
            ctypes.string_at(0)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while how == "hang":
            pass
        raise ZeroDivisionError


PLANTS: dict[str, Target] = {
    f"planted-{how}": (functools.partial(planted, how), (), lambda: [bytes(40)])
    for how in ("raise", "segfault", "hang")
}


# ---- mutations ----------------------------------------------------------------------------------------


def mutated(corpus: list[bytes], draw: random.Random) -> bytes:
    data = bytearray(draw.choice(corpus))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5, 8))):
        how = draw.randrange(9)
        at = draw.randrange(len(data) + 1)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif how == 1 and data:
            data[at % len(data)] = draw.randrange(256)
        elif how in (2, 3, 4):  # a number that somebody may have forgotten to check, where numbers lie
            width = draw.choice((1, 2, 4, 4, 8, 8))
            at -= at % draw.choice((1, width))
            value = draw.choice((*NUMBERS, *EDGES, len(data), draw.getrandbits(64)))
            data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif how == 5:
            del data[at:]
        elif how == 6:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 8, 24, 100)))
        elif how == 7:
            other = draw.choice(corpus)
            data[at:] = other[draw.randrange(len(other) + 1) :]
        else:
            begin = draw.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + draw.choice((8, 16, 48))]
    return bytes(data[:ROOM])


# ---- the child ----------------------------------------------------------------------------------------


def child(argv: list[str]) -> int:
    """NAME SEED SECONDS NOTES [FILE]: run inputs, each written down first; or the one in FILE."""
    name, seed, seconds, notes, *kept = argv
    target, allowed, corpus_of = {**TARGETS, **PLANTS}[name]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with open(notes, "r+b") as file:
        page = mmap.mmap(file.fileno(), 0)
    if kept:
        one(target, allowed, Path(kept[0]).read_bytes())
        return 0
    corpus = corpus_of()
    for data in corpus:
        one(target, allowed, data)
    end = time.monotonic() + float(seconds)
    count = 0
    while time.monotonic() < end:
        data = mutated(corpus, random.Random(f"{seed} {name} {count}"))
        page[16 : 16 + len(data)] = data
        page[:16] = struct.pack("<QQ", len(data), count + 1)
        one(target, allowed, data)
        count += 1
    return 0


def one(target: Callable[[bytes], object], allowed: tuple[type[BaseException], ...], data: bytes) -> None:
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        target(data)
    except allowed as error:
        assert str(error) or isinstance(error, EOFError | MemoryError), "an error without words"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---- campaigns ----------------------------------------------------------------------------------------


class Finding(NamedTuple):
    target: str
    seed: str
    inputs: int  # how many had been run when it was found
    how: str  # it ended
    words: str  # the last of what it said
    data: bytes  # made smaller

    def keep(self, folder: Path) -> Path:
        path = folder / f"{self.target}-{hashlib.sha256(self.data).hexdigest()[:12]}.bin"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.data)
        return path


def run_child(name: str, seed: str, seconds: float, notes: Path, *kept: str) -> tuple[int, str]:
    """(exit code, what it said)"""
    argv = [sys.executable, __file__, name, seed, str(seconds), str(notes), *kept]
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        return -signal.SIGALRM, "it did not end"
    return done.returncode, done.stderr


def told(code: int) -> str:
    if code >= 0:
        return "an exception" if code == 1 else f"exit code {code}"
    return "a hang" if code == -signal.SIGALRM else signal.Signals(-code).name


def campaign(name: str, seed: str, seconds: float, scratch: Path) -> tuple[int, Finding | None]:
    """Run a target for so long. (Inputs that were run, what was found first.)"""
    notes = scratch / f"{name}.notes"
    notes.write_bytes(bytes(16 + ROOM))
    code, said = run_child(name, seed, seconds, notes)
    size, count = struct.unpack_from("<QQ", notes.read_bytes())
    if code == 0:
        return count, None
    data = notes.read_bytes()[16 : 16 + size]
    data = smaller(name, data, code, scratch)
    return count, Finding(name, seed, count, told(code), said[-2000:], data)


def run_again(name: str, path: Path, scratch: Path) -> tuple[int, str]:
    """The input in a file, by itself: (exit code, what was said)."""
    notes = scratch / "again.notes"
    notes.write_bytes(bytes(16 + ROOM))
    return run_child(name, "0", 0, notes, str(path))


def fails(name: str, data: bytes, scratch: Path) -> int:
    path = scratch / "input"
    path.write_bytes(data)
    return run_again(name, path, scratch)[0]


def smaller(name: str, data: bytes, code: int, scratch: Path) -> bytes:
    """Pieces left out, bytes made 0, as long as it ends in the same way and the time is not up."""
    end = time.monotonic() + SMALLER
    step = max(1, len(data) // 2)
    while step and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            for shorter in (data[:at] + data[at + step :], data[:at] + bytes(step) + data[at + step :]):
                if shorter != data and len(shorter) <= len(data) and fails(name, shorter, scratch) == code:
                    data = shorter
                    break
            else:
                at += step
                continue
            at += step if len(shorter) == len(data) else 0
        step //= 2
    return data


if __name__ == "__main__":
    try:
        sys.exit(child(sys.argv[1:]))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
