"""Who may find a socket of ours, and what he may send: for tests of what has no effect."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path

import evil
from watching import all_ready, settled, until

from runtime import wire


def folders():
    return {
        path for path in Path(os.environ["XDG_RUNTIME_DIR"]).iterdir() if path.name.startswith("runtime-")
    }


class Waiting:
    """A runtime whose workers are not forked yet: the zygote imports a module that waits for a file."""

    def __init__(self, rt, folder, go):
        self.rt, self.folder, self.go = rt, folder, go

    def paths(self, ending=""):
        """The sockets of both workers."""

        def found():
            paths = sorted(self.folder.iterdir())
            return len(paths) == 6 and [path for path in paths if path.name.endswith(ending)]

        return until(found, "both workers' sockets are bound")

    def works(self):
        """The workers may start now; all is as it should be. The count of strange messages."""
        rt = self.rt
        self.go.touch()
        futures = [rt.submit(evil.square, i) for i in range(300)]
        assert [f.result(15) for f in futures] == [i * i for i in range(300)]
        assert list(rt.map(evil.square, range(300))) == [i * i for i in range(300)]
        all_ready(rt)
        settled(rt)
        return rt._core.link.strangers


@contextlib.contextmanager
def waiting_runtime(factory, folder):
    """A Waiting whose preload module lies in `folder`, which is on sys.path."""
    go = folder / "go"
    (folder / "waiting_preload.py").write_text(f"import evil\nevil.wait_for({str(go)!r})\n")
    before = folders()
    rt = factory(2, preload="waiting_preload")
    try:
        yield Waiting(rt, (folders() - before).pop(), go)
    finally:
        go.touch()


def garbage(draw):
    """Messages that are none of ours: (count that have to be counted, messages)."""
    good = wire.encode_hint(wire.HintKind.LOOK, 0, 1)
    return [
        b"",
        b"\0",
        good[:-1],
        good + b"\0",
        good[:12],
        b"X" + good[1:],
        b"\xff" * len(good),
        wire.encode_hint(wire.HintKind.WELCOME, 0, 1),  # in the wrong direction
        wire.encode_hint(wire.HintKind.LOOK, 2**32 - 1, 1),
        wire.encode_hint(wire.HintKind.LOOK, 0, 2**64 - 1),
        wire.encode_hint(wire.HintKind.HELLO, 5, 77),
        good[:4] + b"\x09\x00" + good[6:],  # an unknown kind
        *(draw.randbytes(draw.choice([1, 5, 24, 24, 24, 31, 56])) for _ in range(100)),
    ]


class Peer:
    """A stranger at a socket of ours. He speaks ZMTP 3.0 by himself, so that he can break its rules."""

    def __init__(self, path, kind):
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.settimeout(5)
        self.connection.connect(str(path))
        self.connection.sendall(GREETING)
        self.read(64)
        ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
        self.connection.sendall(frame(ready, COMMAND))
        flags, size = self.read(2)
        assert flags == COMMAND and self.read(size).startswith(b"\x05READY")

    def read(self, count):
        data = b""
        while len(data) < count:
            piece = self.connection.recv(count - len(data))
            assert piece, "the host has hung up on a good greeting"
            data += piece
        return data

    def send(self, data):
        """Raw bytes. False: the host has hung up, or reads no more."""
        try:
            self.connection.sendall(data)
        except OSError:
            return False
        return True

    def close(self):
        self.connection.close()


MORE, LONG, COMMAND = 1, 2, 4  # flags of a ZMTP frame
GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def frame(body, flags=0):
    """A ZMTP frame."""
    if len(body) > 255:
        return struct.pack(">BQ", flags | LONG, len(body)) + body
    return struct.pack(">BB", flags, len(body)) + body
