"""Python stacks of a worker: left in a file that outlives it, read by the host.

    worker crashes     faulthandler, enabled on the file, writes "Fatal Python error: ..." and the stacks
    host asks          a number through the record channel
      a thread         of the worker notes the number in the file, then takes the GIL and writes one piece
                       {number, length, stacks}: exact, and nothing is disturbed
      noted, no piece  the GIL is held in C, so no Python frame moves: a real-time signal, which that same
                       thread alone takes; on it faulthandler writes all stacks at once, and the task's own
                       system calls are not interrupted. The host waits until the handler has returned

The worker and its host share the file's position, so all of them append. Who writes: the worker; the host
only empties the file, when it has grown and nobody waits for an answer. A worker killed at any instruction
leaves a piece too short for its length, or a text without an end: the host takes neither for an answer.
"""

from __future__ import annotations

import _thread
import contextlib
import faulthandler
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType

from runtime import _core
from runtime.channels import HostEnds

__all__ = ["CRASHES", "LIMIT", "SIGNAL", "Asked", "crash_stack", "forked", "leave_stacks", "take"]

SIGNAL = signal.SIGRTMAX - 5
LIMIT = 64 << 10  # bytes of a text, at most
_FULL = 1 << 20  # bytes after which the file is emptied
_FOR_GIL = 0.2  # seconds after which a thread that waits for the GIL is taken to wait for C code
_PATIENCE = 1.0  # seconds until a worker is said not to answer
_FRAMES = 100  # of one thread, as faulthandler shows
CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL})
_CRASH = b"Fatal Python error: "
_NOTE = b"\x1e%d\n"
_NOTES = rb"\x1e\d+\n"  # compiled when it is needed: a worker needs it never
_PIECE = rb"\x1d(\d+) (\d+)\n"


# ---- in the worker -------------------------------------------------------------------------------------


def leave_stacks(channel: socket.socket, fd: int) -> None:
    """Leave stacks in the file at a crash, and whenever the host asks for them."""
    faulthandler.enable(fd, all_threads=True)
    faulthandler.register(SIGNAL, fd, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])  # here, and in all threads but the one that answers
    # Not a threading.Thread: nobody joins it or lists it, and it starts in a quarter of the time.
    _thread.start_new_thread(_answer, (channel.fileno(), fd))


def forked() -> None:
    """In a child that a task forked: its crash is not the worker's."""
    faulthandler.disable()


def _answer(channel: int, fd: int) -> None:
    """The thread: one piece for each question."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])
    with contextlib.suppress(OSError):
        while (question := _core.next_question(channel, fd)) >= 0:
            text = _stacks_now().encode(errors="backslashreplace")[:LIMIT]
            os.write(fd, b"\x1d%d %d\n%s" % (question, len(text), text))


def _stacks_now() -> str:
    """Every thread's stack, as faulthandler writes it, without our own."""
    active = dict(threading._active)  # type: ignore[attr-defined]  # enumerate() waits for a lock
    names = {ident: thread.name for ident, thread in active.items()}
    own = _thread.get_ident()
    found = [
        f"Thread {ident:#018x} [{names.get(ident, '?')}] (most recent call first):\n{_lines(frame)}"
        for ident, frame in sys._current_frames().items()
        if ident != own and names.get(ident) != "runtime-host-watch"
    ]
    return "\n".join(found)


def _lines(frame: FrameType | None) -> str:
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}\n')
        frame = frame.f_back
    return "".join(lines) + ("  ...\n" if frame is not None else "")


# ---- in the host ---------------------------------------------------------------------------------------


def crash_stack(fd: int) -> str:
    """What faulthandler left at a crash; "" if there was none."""
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, 2 * LIMIT, max(0, size - 2 * LIMIT))
    except OSError:
        return ""
    at = data.rfind(_CRASH)
    if at < 0:
        return ""
    text = data[at : at + LIMIT].partition(b"\n\nExtension modules:")[0]
    return text.decode(errors="replace").rstrip("\0\n")


class Asked:
    """One live worker whose stacks are wanted. Has duplicates of its descriptors until `close`.

    Raises: OSError when there is no descriptor left.
    """

    def __init__(self, number: int, pid: int, pidfd: int, ends: HostEnds) -> None:
        self.number = number
        self.pid = pid
        self.ends = ends
        self.begin = 0  # position in the file from which the answer is looked for
        self.noted = 0.0  # monotonic time at which its thread was seen to wait for the GIL; 0: not yet
        self.signalled = False  # and `signalling` is held
        self.blocking: set[str] = set()  # threads that had the signal blocked before
        self.records: socket.socket | None = None
        self.pidfd = os.dup(pidfd)
        try:
            self.stack = os.dup(ends.stack)
            try:
                self._take_records(ends.records)
            except OSError:
                os.close(self.stack)
                raise
        except OSError:
            os.close(self.pidfd)
            raise

    def _take_records(self, records: socket.socket) -> None:
        """A duplicate of the socket to ask through, unless the relay has closed it."""
        fd, copy = records.fileno(), -1
        if fd < 0:
            return
        try:
            copy = os.dup(fd)
            if records.fileno() == fd:  # else it was closed meanwhile, and the copy may be of anything
                self.records, copy = socket.socket(fileno=copy), -1
        except OSError:
            if records.fileno() == fd:
                raise
        finally:
            if copy >= 0:
                os.close(copy)

    def ask(self, question: bytes) -> None:
        """Send a question to the worker, unless it has ended, or does not read."""
        if self.records is not None:
            with contextlib.suppress(OSError):
                self.records.send(question, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """No descriptor is needed any more."""
        os.close(self.pidfd)
        os.close(self.stack)
        if self.records is not None:
            self.records.close()


_questions = iter(range(1, 1 << 62))


def take(workers: list[Asked]) -> dict[int, str]:
    """The stacks of these workers, or why there is none; those that have died meanwhile are left out.

    Blocking: milliseconds; for a worker that holds the GIL in C 0.2 seconds, at most one. Signals only those.
    """
    found: dict[int, str] = {}
    question = next(_questions)
    for one in workers:
        _begin(one)
    try:
        waiting = []
        for one in workers:
            if _is_stopped(one):
                found[one.number] = _excuse(one)
            else:
                one.ask(b"%d" % question)
                waiting.append(one)
        for one in _gather(waiting, found, question):
            found[one.number] = _excuse(one)
    finally:
        for one in workers:
            _end(one)
    return found


def _begin(one: Asked) -> None:
    """Note where the answer will come; start the file anew if it has grown, and nobody else asks.

    Who begins to ask in that very moment notes a position that is behind the file's end: see _written.
    """
    one.ends.asking += 1
    one.begin = os.fstat(one.stack).st_size
    if one.begin > _FULL and one.ends.asking == 1:
        heard = one.ends.heard
        if heard is not None:  # what it has answered since goes away with the rest
            earlier, since, begin = heard
            answered = _answered(one, earlier, begin) is not None
            one.ends.heard = None if answered else (earlier, since, 0)
        # A crash that is being written in this very moment loses its text: no more than that.
        os.ftruncate(one.stack, 0)
        one.begin = os.lseek(one.stack, 0, os.SEEK_SET)


def _end(one: Asked) -> None:
    """Others may signal it, or start its file anew."""
    if one.signalled:
        one.ends.signalling.release()
    one.ends.asking -= 1


def _gather(waiting: list[Asked], found: dict[int, str], question: int) -> list[Asked]:
    """Look at all of them until each has answered or the time is over. Those that have not, and live."""
    deadline = time.monotonic() + _PATIENCE
    pause = 0.0005
    while waiting:
        over = time.monotonic() >= deadline
        left = []
        for one in waiting:
            text = _look(one, question)
            if text is not None:
                found[one.number] = text
            elif _is_alive(one):
                left.append(one)
        waiting = left
        if over:
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return waiting


def _look(one: Asked, question: int) -> str | None:
    """One look for an answer; a signal, if it is time for that."""
    text = _answered(one, question, one.begin)
    if text is None and one.signalled:
        text = _by_signal(one)
    if text is None and not one.noted:
        one.noted = _heard(one, question)
    if text is None and one.noted and not one.signalled and time.monotonic() - one.noted >= _FOR_GIL:
        _send_signal(one)
    return text


def _heard(one: Asked, question: int) -> float:
    """Since when its thread waits for the GIL, for this question or an earlier one; 0: it does not, yet."""
    if _NOTE % question in _written(one, one.begin):
        one.ends.heard = question, time.monotonic(), one.begin
    heard = one.ends.heard
    if heard is None:
        return 0.0
    earlier, since, begin = heard
    if _answered(one, earlier, begin) is not None:
        one.ends.heard = None
        return 0.0
    return since


def _written(one: Asked, begin: int) -> bytes:
    size = os.fstat(one.stack).st_size
    if begin > size:  # the file was started anew
        begin = 0
    return os.pread(one.stack, size - begin, begin)


def _answered(one: Asked, question: int, begin: int) -> str | None:
    """The piece that answers the question, once it is complete."""
    data = _written(one, begin)
    for match in re.finditer(_PIECE, data):
        length = int(match[2])
        if int(match[1]) == question and len(data) >= match.end() + length:
            return data[match.end() : match.end() + length].decode(errors="replace")
    return None


def _send_signal(one: Asked) -> None:
    """Unless another thread of ours has: then when that one has read what it wanted."""
    if _is_stopped(one) or not _catches(one) or not one.ends.signalling.acquire(blocking=False):
        return
    one.signalled = True
    one.begin = os.fstat(one.stack).st_size
    one.blocking = {thread for thread, status in _threads(one) if _has(status, "SigBlk")}
    with contextlib.suppress(OSError):
        _core.pidfd_send_signal(one.pidfd, SIGNAL)


def _by_signal(one: Asked) -> str | None:
    """What the signal handler has written, once it has returned.

    The kernel blocks the signal in the thread that handles it, before the first byte is written and until the
    handler returns: text is there, nothing pending, and no thread blocks it that did not do so before.
    """
    data = _by_handler(one)
    if not data:
        return None
    for thread, status in _threads(one):
        if _has(status, "SigPnd") or _has(status, "ShdPnd"):
            return None
        if thread not in one.blocking and _has(status, "SigBlk"):
            return None
    data = _by_handler(one)
    return f"(it holds the GIL outside of Python code; taken by a signal)\n{data.decode(errors='replace')}"


def _by_handler(one: Asked) -> bytes:
    """What lies before the first piece, without notes."""
    return re.split(_PIECE, re.sub(_NOTES, b"", _written(one, one.begin)))[0][:LIMIT]


def _excuse(one: Asked) -> str:
    """Why there is no stack."""
    state = _state(one)
    if state in ("T", "t"):
        by = "a debugger" if state == "t" else "a signal"
        return (
            f"worker {one.number} (pid {one.pid}) was stopped by {by}; no stack before it goes on (SIGCONT)\n"
        )
    if not one.noted:
        return (
            f"worker {one.number} (pid {one.pid}) has not heard the question yet: it starts, or gets no CPU\n"
        )
    return (
        f"worker {one.number} (pid {one.pid}) did not answer within {_PATIENCE:g} s (state {state or '?'})\n"
    )


def _is_alive(one: Asked) -> bool:
    poller = select.poll()
    poller.register(one.pidfd, select.POLLIN)
    return not poller.poll(0)


def _is_stopped(one: Asked) -> bool:
    return _state(one) in ("T", "t")


def _catches(one: Asked) -> bool:
    return _has(_read(f"/proc/{one.pid}/status"), "SigCgt")


def _threads(one: Asked) -> list[tuple[str, str]]:
    """(number, /proc status) of each of its threads."""
    folder = f"/proc/{one.pid}/task"
    with contextlib.suppress(OSError):
        return [(thread, _read(f"{folder}/{thread}/status")) for thread in os.listdir(folder)]
    return []


def _has(status: str, mask: str) -> bool:
    """Whether SIGNAL is in a mask of a /proc status."""
    _, _, rest = status.partition(f"{mask}:")
    digits = rest.split("\n", 1)[0].strip()
    return bool(digits) and bool(int(digits, 16) >> (SIGNAL - 1) & 1)


def _state(one: Asked) -> str:
    fields = _read(f"/proc/{one.pid}/stat").rpartition(")")[2].split()
    return fields[0] if fields else ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
