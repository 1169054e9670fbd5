"""Imported by a host of arrays.py and preloaded by its workers: from how many bytes on a buffer stays outside
of the pickle, as the environment says."""

from __future__ import annotations

import os
from pickle import PickleBuffer
from typing import Any

from runtime import payload

VARIABLE = "RUNTIME_BENCH_OUT_OF_BAND_MIN"


class Pieces(payload.Pieces):
    """Takes a buffer of 64 KiB and more inside the pickle, too, which never is there otherwise."""

    __slots__ = ()

    def write(self, piece: Any) -> None:  # type: ignore[override]
        self.append(piece.raw() if type(piece) is PickleBuffer else piece)


payload.OUT_OF_BAND_MIN = int(os.environ[VARIABLE])
payload.Pieces = Pieces  # type: ignore[misc]
payload._idle.clear()  # picklers that write to the other kind


def in_force() -> int:
    return payload.OUT_OF_BAND_MIN
