"""A single-stepper: one forked process, stopped at every instruction of some mapped files.

    parent                                  child (a fork of this process)
    Stepper(run, text)  ── fork ─────────►  PTRACE_TRACEME, stops itself, then calls run()
    .enter(entries)                         breakpoints at the functions' entries
    for address in .steps()                 inside the text: one instruction at a time
                                            outside (libc, the interpreter): runs on, until it returns or
                                            calls into the text again
    .reach(address, hits)                   full speed, to the n-th time that an address is executed
    .kill()                                 SIGKILL, and reaped

Breakpoints are written through /proc/PID/mem, so only the child's private copy of the text has them. Those at
return addresses stay where they were put: an address that was returned to once is in the text, and stepping
over a breakpoint puts the instruction back for that one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

TRACEME, PEEKUSER, POKEUSER, CONT, SINGLESTEP, SETOPTIONS = 0, 3, 6, 7, 9, 0x4200
EXITKILL = 0x100000
ORIG_RAX, RIP, RSP = 15 * 8, 16 * 8, 19 * 8  # struct user_regs_struct of x86-64
BREAK = b"\xcc"
RETURNS = (b"\xc3", b"\xc2", b"\xf3\xc3", b"\xf2\xc3")  # ret, with the prefixes that compilers put before it

PATIENCE = 300  # seconds after which a child that hangs is given up

Range = tuple[int, int]


class Refused(Exception):
    """This machine does not let us trace."""


class Strayed(Exception):
    """The child did what no child should: it ended or got a signal where that was not expected."""


_libc = ctypes.CDLL(None, use_errno=True)
_ptrace = _libc.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    result: int = _ptrace(request, pid, address, data)
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"ptrace({request})")
    return result


def why_not() -> str:
    """Why nothing can be stepped here; "": it can."""
    if platform.machine() != "x86_64":
        return f"the stepper knows the registers of x86-64, not those of {platform.machine()}"
    try:
        stepper = Stepper(lambda: None, ())
    except Refused as refusal:
        return str(refusal)
    stepper.kill()
    return ""


class Stepper:
    """A stopped fork of this process that will call `run`, and whose instructions in `text` can be stepped.

    `prepare` is called in the child, too, but before it is stopped. The child leaves by os._exit: 0, or 1
    after an exception, whose traceback it prints.
    """

    def __init__(
        self, run: Callable[[], object], text: Sequence[Range], prepare: Callable[[], object] = bool
    ) -> None:
        self.text = tuple(text)
        self.original: dict[int, bytes] = {}  # breakpoints that are in place: what was there
        self.status: int | None = None  # the exit status, once the child has ended
        self.last = 0  # the instruction of the text that was stepped last; 0: none
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(run, prepare)
        self._wait()
        if self.status == -signal.SIGALRM:
            raise Strayed(f"not prepared after {PATIENCE} s")
        if self.status is not None:
            raise Refused("ptrace is not allowed here (seccomp, or a container's profile)")
        try:
            ptrace(SETOPTIONS, self.pid, 0, EXITKILL)
            self.memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)
        except OSError as error:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise Refused(f"ptrace is not allowed here: {error}") from None

    @staticmethod
    def _child(run: Callable[[], object], prepare: Callable[[], object]) -> None:
        code = 1
        try:
            gc.disable()  # or it would come in at another moment each time
            # The watchdog: its parent sees it come, whatever the child sleeps in, and however that waits.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            signal.alarm(PATIENCE)
            prepare()
            ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            run()
            code = 0
        except OSError as error:
            code = 2 if error.filename == f"ptrace({TRACEME})" else 1
            if code == 1:
                traceback.print_exc()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _wait(self) -> int:
        """The signal that has stopped the child; 0: it has ended."""
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        self.status = os.waitstatus_to_exitcode(status)
        return 0

    def _resume(self, request: int) -> bool:
        """Run on to the next trap. False: it has ended."""
        ptrace(request, self.pid)
        stopped = self._wait()
        if stopped not in (0, signal.SIGTRAP):
            what = f"{signal.Signals(stopped).name} at {self.address():#x}"
            if stopped == signal.SIGALRM:
                what = f"no end after {PATIENCE} s: {self._whereabouts()}"
            self.kill()
            raise Strayed(what)
        return stopped != 0

    def _whereabouts(self) -> str:
        """What a child that hangs is doing."""
        call = ptrace(PEEKUSER, self.pid, ORIG_RAX)
        doing = f"asleep in system call {call}" if call >= 0 else "running"
        return f"{doing} at {self.address():#x}, after the instruction at {self.last:#x}"

    def address(self) -> int:
        """The instruction that comes next."""
        return ptrace(PEEKUSER, self.pid, RIP)

    def inside(self, address: int) -> bool:
        return any(low <= address < high for low, high in self.text)

    # ---- breakpoints ----

    def enter(self, entries: Iterable[int]) -> None:
        """Stop at these addresses from now on."""
        for address in entries:
            self.put(address)

    def put(self, address: int) -> None:
        if address not in self.original:
            self.original[address] = os.pread(self.memory, 1, address)
            os.pwrite(self.memory, BREAK, address)

    def remove(self, address: int) -> None:
        os.pwrite(self.memory, self.original.pop(address), address)

    def step(self) -> bool:
        """Execute one instruction, also one under a breakpoint. False: the child has ended."""
        here = self.address()
        covered = self.original.get(here)
        if covered is None:
            return self._resume(SINGLESTEP)
        os.pwrite(self.memory, covered, here)
        lives = self._resume(SINGLESTEP)
        if lives:
            os.pwrite(self.memory, BREAK, here)
        return lives

    def run_on(self) -> bool:
        """At full speed to the next breakpoint, which is not executed yet. False: the child has ended."""
        if self.address() in self.original and not self.step():
            return False
        if self.address() in self.original:
            return True  # the step has led to the next one
        if not self._resume(CONT):
            return False
        ptrace(POKEUSER, self.pid, RIP, self.address() - 1)
        return True

    # ---- what the tool is made of ----

    def steps(self) -> Iterator[int]:
        """Each instruction of the text, before it is executed. The child may be killed in between."""
        while self.run_on():
            here = self.address()
            while self.inside(here):
                yield here
                self.last = here
                if not self.step():
                    return
                here = self.address()
            self._expect_back(self.last)

    def _expect_back(self, last: int) -> None:
        """The text was left, at its instruction `last`: by a call, which comes back, or by a return."""
        if ctypes.string_at(last, 2).startswith(RETURNS):
            return
        top = os.pread(self.memory, 8, ptrace(PEEKUSER, self.pid, RSP))
        back = int.from_bytes(top, "little")
        if self.inside(back):
            self.put(back)

    def reach(self, address: int, hits: int) -> bool:
        """At full speed to the n-th execution of an address, where it stands now being one of them.

        False: the child has ended before.
        """
        mine = address not in self.original
        self.put(address)
        if self.address() == address:
            hits -= 1
        while hits:
            if not self.run_on():
                return False
            if self.address() == address:
                hits -= 1
        if mine:
            self.remove(address)
        return True

    def finish(self) -> int:
        """Let it run to its end; its exit code."""
        while self.status is None and self.run_on():
            pass
        self._close()
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        """SIGKILL, and reaped."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.status is None:
                self._wait()
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.memory)
        self.memory = -1
