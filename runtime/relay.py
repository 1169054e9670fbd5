"""The relay: what workers print, log and warn of comes out in the host. One thread, asleep until it does.

    out, err    whole lines ──► sys.stdout, sys.stderr of that moment: a notebook's, a redirected one
    records     log record  ──► the host's loggers, if they are enabled for it
                warning     ──► warnings.warn_explicit: the host's filters decide

A pipe gets whole lines, PIPE_BUF bytes at a time: what others write to it cuts none in two.

Nothing is stored but the unfinished line of each stream, at most 64 KiB: while the host does not take it, the
worker's write waits. A stream ends when nobody can write to it any more; after its worker's death, when what
the worker had written is read: a child of a task may hold the other end for ever.
"""

from __future__ import annotations

import array
import codecs
import contextlib
import fcntl
import logging
import os
import select
import socket
import stat
import sys
import termios
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

from runtime import _core, logrecords
from runtime.channels import HostEnds
from runtime.wire import WireError

__all__ = ["Relay", "host_levels"]

_CHUNK = 64 << 10  # bytes of one read, and of a piece of a line that is longer
_QUEUED = 1024  # messages that a socket holds, at most: 200 KB, with what the kernel needs for each
_BATCH = 64  # messages of one worker before it is the next one's turn
_STUCK = 1.0  # seconds without progress after which the end does not wait for the host's streams any more
_SAYING = 0.1  # seconds for the log line that says so: its handler may write to the same stream
_FORK = 1.0  # seconds that a fork of the host waits for a write that is under way
_PLACES = 1000  # files whose warnings are remembered, so that each is shown once
_LOGGERS = 200  # levels of the host's loggers that a worker is told

log = logging.getLogger("runtime")

_writing = threading.RLock()  # held while the host's streams and handlers are in use
_held: list[int] = []  # threads that fork, once for each time they hold it: a handler may fork, too
_relays: weakref.WeakSet[Relay] = weakref.WeakSet()


class _Text:
    """One stream of text: a pipe, and the line that has no end yet."""

    def __init__(self, fd: int, target: str) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.target = target  # "stdout" or "stderr"
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest = ""

    def read(self) -> bytes | None:
        """What is there; b"" at the end, None: nothing now."""
        try:
            return os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return None

    def take(self, data: bytes) -> str:
        """Whole lines, and a piece of a line that has grown too long; all that is left for b""."""
        text = self._rest + self._decoder.decode(data, not data)
        end = len(text) if not data else text.rfind("\n") + 1
        if len(text) - end >= _CHUNK:
            end = len(text)
        self._rest = text[end:]
        return text[:end]


class Relay:
    """Reads what workers print and log.

    Thread-safety: `run` belongs to its thread; all else may be called from any. Fork-safety: `forked` makes
    it inert; a fork waits a moment for a write that is under way, so that the child finds no lock held.
    Blocking: `finish`, and `run` in what the host's own streams and handlers do.
    """

    def __init__(self) -> None:
        self.malformed = 0  # messages that are no record
        self.refused = 0  # texts and records that the host's streams or handlers did not take
        self._taking = 0  # bytes that a stream of the host's is taking now
        self.progress = 0  # moves with each piece: who waits for the end sees that it is not stuck
        self._bell = _core.Bell()
        self._orders: deque[tuple[bool, HostEnds]] = deque()  # (whether it begins, whose)
        self._stopping = False
        self._open: dict[int, _Text | HostEnds] = {}  # by descriptor; HostEnds: of their records
        self._workers: dict[HostEnds, tuple[_Text, _Text]] = {}
        self._seen: dict[str, dict[Any, Any]] = {}  # file -> the warnings it has given
        self._poller = select.poll()
        self._poller.register(self._bell.fd, select.POLLIN)
        _relays.add(self)

    # ---- for the supervisor --------------------------------------------------------------------------

    def begin(self, ends: HostEnds) -> None:
        """A worker has been forked."""
        self._orders.append((True, ends))
        self._bell.ring()

    def end(self, ends: HostEnds) -> None:
        """It is dead, and so are its descendants, as far as known: take what it has left, and no more."""
        self._orders.append((False, ends))
        self._bell.ring()

    def stop(self) -> None:
        """Every worker is dead: end when all is written."""
        self._stopping = True
        self._bell.ring()

    def finish(self, thread: threading.Thread) -> None:
        """Until all is written. A host that takes nothing of its own output for a second is not waited for.

        What is left goes on being written, as far as the host takes it, until the interpreter ends; the log
        says how much it is.
        """
        if thread.ident is None:  # it could not be started
            self._bell.close()
            return
        self.stop()
        seen = -1
        while thread.is_alive() and seen != self.progress:
            seen = self.progress
            thread.join(_STUCK)
        if thread.is_alive():
            text = "the host takes none of its output: %d bytes that workers have printed are not written yet"
            saying = threading.Thread(target=log.warning, args=(text, self._unwritten()), daemon=True)
            with contextlib.suppress(RuntimeError):  # no more threads
                saying.start()
                saying.join(_SAYING)

    def _unwritten(self) -> int:
        """Bytes that workers have printed and the host's streams have not taken, when the thread is
        stuck.
        """
        count = self._taking
        for source in list(self._open.values()):
            if isinstance(source, _Text):
                waiting = array.array("i", [0])
                with contextlib.suppress(OSError):  # closed: it goes on after all
                    fcntl.ioctl(source.fd, termios.FIONREAD, waiting)
                count += waiting[0]
        return count

    # ---- the thread ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Until it is stopped and everything is read."""
        try:
            while not (self._stopping and not self._orders):
                ready = self._poller.poll()
                self._bell.silence()
                with _writing:
                    self._look([self._open[fd] for fd, _ in ready if fd in self._open])
                    self._obey()
        finally:
            with _writing:
                for ends in list(self._workers):
                    self._drain(ends)
            self._bell.close()

    def _look(self, ready: list[_Text | HostEnds]) -> None:
        """One read from each that has something: nobody keeps the others waiting."""
        targets = {source.target for source in ready if isinstance(source, _Text)}
        for source in ready:
            if isinstance(source, _Text):
                self._read_text(source)
            else:
                self._read_records(source, _BATCH)
        for target in targets:
            _flush(target)

    def _obey(self) -> None:
        """New workers, and dead ones."""
        while self._orders:
            begins, ends = self._orders.popleft()
            if begins:
                texts = self._workers[ends] = _Text(ends.out, "stdout"), _Text(ends.err, "stderr")
                self._open.update({ends.out: texts[0], ends.err: texts[1], ends.records.fileno(): ends})
                for fd in (ends.out, ends.err, ends.records.fileno()):
                    self._poller.register(fd, select.POLLIN)
            elif ends in self._workers:
                self._drain(ends)

    def _drain(self, ends: HostEnds) -> None:
        """Read what a dead worker had written, not what others may go on writing; then close."""
        for text in self._workers.pop(ends):
            if text.fd >= 0:
                left = fcntl.fcntl(text.fd, fcntl.F_GETPIPE_SZ)
                while left > 0 and (count := self._read_text(text)):
                    left -= count
                self._end_text(text)
                _flush(text.target)
        if ends.records.fileno() >= 0:
            self._read_records(ends, _QUEUED)
            self._end_records(ends)

    # ---- text ----------------------------------------------------------------------------------------

    def _read_text(self, text: _Text) -> int:
        """One read; how many bytes it brought."""
        data = text.read()
        if data:
            self._write(text.target, text.take(data))
        elif data is not None:
            self._end_text(text)
        return len(data or b"")

    def _end_text(self, text: _Text) -> None:
        """Write the last line, if it has no end, and close. Idempotent."""
        if text.fd >= 0:
            self._write(text.target, text.take(b""))
            self._close(text.fd)
            os.close(text.fd)
            text.fd = -1

    def _write(self, target: str, text: str) -> None:
        """To the stream that the host has now. One that is missing or raises stops nobody."""
        self.progress += 1
        stream = getattr(sys, target, None)
        if not text or stream is None:
            return
        try:
            self._taking = len(text.encode(errors="replace"))
            for piece in _pieces(text) if _is_pipe(stream) else (text,):
                try:
                    stream.write(piece)
                except UnicodeEncodeError as error:
                    stream.write(piece.encode(error.encoding, "backslashreplace").decode(error.encoding))
                if piece is not text:
                    stream.flush()
        except BaseException:
            self.refused += 1
        self._taking = 0

    def _close(self, fd: int) -> None:
        del self._open[fd]
        self._poller.unregister(fd)

    # ---- records -------------------------------------------------------------------------------------

    def _read_records(self, ends: HostEnds, count: int) -> None:
        """At most so many messages."""
        for _ in range(count):
            try:
                data = ends.records.recv(logrecords.LIMIT + 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:  # it died with a question unread; what it had sent came before this
                continue
            if not data:
                self._end_records(ends)
                return
            self._replay(data)

    def _end_records(self, ends: HostEnds) -> None:
        if ends.records.fileno() >= 0:
            self._close(ends.records.fileno())
            ends.records.close()

    def _replay(self, data: bytes) -> None:
        """One record or warning."""
        self.progress += 1
        try:
            message = logrecords.decode(data)
        except WireError:
            self.malformed += 1
            return
        try:
            if isinstance(message, logrecords.RemoteWarning):
                self._warn(message)
            else:
                _log(message)
        except BaseException:  # a handler of the host's
            self.refused += 1

    def _warn(self, message: logrecords.RemoteWarning) -> None:
        """As if it had been given here."""
        if message.filename not in self._seen and len(self._seen) >= _PLACES:
            self._seen.clear()
        seen = self._seen.setdefault(message.filename, {})
        category = _category(message)
        try:
            warnings.warn_explicit(message.text, category, message.filename, message.lineno, registry=seen)
        except Warning as error:  # an "error" filter of the host's: there is no call here that it could fail
            warnings.showwarning(error, category, message.filename, message.lineno)


def _is_pipe(stream: Any) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # no file at all: a notebook's, a test's
        return False


def _pieces(text: str) -> Iterator[str]:
    """Whole lines, as many as a pipe takes in one piece: others that write to it cut no line in two."""
    room = select.PIPE_BUF // (1 if text.isascii() else 4)  # UTF-8: at most 4 bytes a character
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + room) + 1 or text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _flush(target: str) -> None:
    with contextlib.suppress(BaseException):
        getattr(sys, target).flush()


def _log(record: logging.LogRecord) -> None:
    """To the host's logger of that name, or the nearest above it: names from outside make no new loggers."""
    loggers = logging.Logger.manager.loggerDict
    name = record.name
    while name and not isinstance(loggers.get(name), logging.Logger):
        name = name.rpartition(".")[0]
    logger = logging.getLogger(name or None)
    if logger.isEnabledFor(record.levelno):
        if logger.name == record.name:
            logger.handle(record)
        elif not logger.disabled:  # its filters are for its own records
            logger.callHandlers(record)


def _category(message: logrecords.RemoteWarning) -> type[Warning]:
    """The class of that name, if it is a warning and its module is loaded here; nothing is imported."""
    found: Any = sys.modules.get(message.home)
    for name in message.category.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return found if isinstance(found, type) and issubclass(found, Warning) else UserWarning


def host_levels() -> dict[str, int]:
    """Levels that the host's loggers were given, so that workers send nothing in vain; "" is the root's."""
    levels = {"": logging.root.level}
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level and len(name) <= 100 and name.isascii():
            levels[name] = logger.level
            if len(levels) > _LOGGERS:
                break
    return levels


# ---- a fork of the host --------------------------------------------------------------------------------


def _before() -> None:
    """A child that inherits the lock of sys.stdout, held by a thread that it does not have, never prints."""
    if _relays and _writing.acquire(timeout=_FORK):
        _held.append(threading.get_ident())


def _in_parent() -> None:
    if threading.get_ident() in _held:
        _held.remove(threading.get_ident())
        _writing.release()


def _in_child() -> None:
    global _writing
    _writing = threading.RLock()
    _held.clear()
    for relay in list(_relays):
        relay._bell.inert = True


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
