"""A free list that is deliberately wrong, to see that it is caught: with a tag, and an owner array beside it.

The tag makes the head safe against reuse, and the owners say whose a block is; but taking one is two stores,
and so is giving it back. Who is killed in between has a block that is neither free nor his, or both.

It is compiled as the modules are (the flags of setup.py, include/atomics.h), into a temporary folder.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import mmap
import shlex
import subprocess
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

from tools.stepkill.engine import Scenario, Verdict
from tools.stepkill.primitive import Primitive
from tools.stepkill.shipped import Shipped, Unreadable

ROOT = Path(__file__).resolve().parents[2]
NAME = "wrong free list"
BLOCKS = 4
DYING, OTHER = 7, 8  # owners

SOURCE = """
#define _GNU_SOURCE  /* as Python.h does */
#include "include/atomics.h"

/* {tag 32 | block + 1 32}; 0 in the low half: none is free */
typedef struct { a64_t head; a64_t next[BLOCKS]; a64_t owner[BLOCKS]; } list_t;

static inline uint64_t raised(uint64_t head, uint64_t first) {
    return ((head >> 32) + 1) << 32 | first;
}

int64_t wrong_take(list_t *list, uint64_t me) {
    for (;;) {
        uint64_t head = a64_load_acquire(&list->head);
        uint32_t first = (uint32_t)head;
        if (first == 0)
            return -1;
        uint64_t next = a64_load_relaxed(&list->next[first - 1]);
        if (a64_cas_acq_rel(&list->head, head, raised(head, next))) {
            a64_store_release(&list->owner[first - 1], me);  /* lost if killed before */
            return first - 1;
        }
    }
}

void wrong_give(list_t *list, uint64_t block) {
    for (;;) {
        uint64_t head = a64_load_acquire(&list->head);
        a64_store_relaxed(&list->next[block], (uint32_t)head);
        if (a64_cas_acq_rel(&list->head, head, raised(head, block + 1)))
            break;
    }
    a64_store_release(&list->owner[block], 0);  /* twice in the list if killed before, and then swept */
}

void wrong_sweep(list_t *list, uint64_t dead) {
    for (uint64_t i = 0; i < BLOCKS; i++)
        if (a64_load_acquire(&list->owner[i]) == dead)
            wrong_give(list, i);
}
"""


@functools.cache
def built() -> tuple[Shipped, ctypes.CDLL]:
    """The list, compiled and loaded."""
    from setup import flags

    folder = tempfile.TemporaryDirectory(prefix="stepkill-")
    atexit.register(folder.cleanup)
    source, target = Path(folder.name, "wrong.c"), Path(folder.name, "wrong.so")
    source.write_text(SOURCE)
    compile_args, link_args, _ = flags()
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    general = shlex.split(sysconfig.get_config_var("CFLAGS") or "")
    done = subprocess.run(
        [*compiler, *general, *compile_args, "-fPIC", "-shared", f"-DBLOCKS={BLOCKS}",
         f"-I{ROOT / 'runtime'}", str(source), "-o", str(target), *link_args],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise Unreadable(f"the wrong list could not be compiled: {done.stderr}")
    library = ctypes.CDLL(str(target))
    library.wrong_take.restype = ctypes.c_int64
    library.wrong_take.argtypes = library.wrong_give.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    library.wrong_sweep.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    return Shipped(target.resolve()), library


class WrongWorld:
    """A list of a few blocks, of which the dying process has some."""

    def __init__(self, act: str, held: int) -> None:
        self.act = getattr(self, act)
        _, self.library = built()
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.pin = ctypes.c_char.from_buffer(self.memory)
        self.at = ctypes.addressof(self.pin)
        for block in range(BLOCKS):
            self.library.wrong_give(self.at, block)
        for _ in range(held):
            self.block = self.library.wrong_take(self.at, DYING)

    def prepare(self) -> None:
        """Nothing: it is held already."""

    def take(self) -> None:
        self.library.wrong_take(self.at, DYING)

    def give(self) -> None:
        self.library.wrong_give(self.at, self.block)

    def sweep(self) -> None:
        self.library.wrong_sweep(self.at, DYING)

    def meddle(self) -> None:
        """Nobody does."""

    def recover(self) -> None:
        self.library.wrong_sweep(self.at, DYING)

    def audit(self) -> Verdict:
        """Every block can be taken once."""
        taken: list[int] = []
        while (block := self.library.wrong_take(self.at, OTHER)) >= 0 and len(taken) < 2 * BLOCKS:
            taken.append(block)
        return Verdict(BLOCKS - len(set(taken)), len(taken) - len(set(taken)))

    def close(self) -> None:
        del self.pin
        self.memory.close()


def primitive() -> Primitive:
    """As an entry of the table."""
    shipped, _ = built()
    held = {"take": 0, "give": 2, "sweep": 2}
    scenarios = tuple([Scenario(name, partial(WrongWorld, name, n)) for name, n in held.items()])
    functions = [f"{shipped.name}.wrong_{name}" for name in held]
    return Primitive(NAME, scenarios, tuple(functions), objects=(shipped,))
