"""PID 1: in a container the first process also has the duties of an init, which a runtime is none.

The kernel gives it the orphans of the whole container, to be waited for, and drops each signal that it has no
handler for. So the command, started as PID 1, forks at once: the child is the command, and the parent does
nothing but pass signals on, reap whatever ends, and end as the child did. (The duties are those of tini and
dumb-init; the code is not.)
"""

from __future__ import annotations

import contextlib
import os
import signal

__all__ = ["become_init"]

# That are about the init itself: its children, its terminal, its faults.
_OWN = {
    signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP, signal.SIGSEGV, signal.SIGBUS,
    signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGKILL, signal.SIGSTOP,
}  # fmt: skip


def become_init() -> None:
    """Called first of all, while there is one thread. Returns in the child; the parent never returns."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # what a terminal sends to its group is passed on once, not sent twice
        _take_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return
    with contextlib.suppress(OSError):
        os.setpgid(child, child)
    os._exit(_serve(child))


def _take_terminal() -> None:
    """Have Ctrl-C come to this group, if there is a terminal."""
    ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, ignored)


def _serve(child: int) -> int:
    """Pass signals on and reap, until the child has ended. Its exit code, as a shell would have it."""
    while True:
        number = signal.sigwait(signal.valid_signals())
        if number not in _OWN or (number in (signal.SIGTTIN, signal.SIGTTOU) and not os.isatty(0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            continue
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    return code if code >= 0 else 128 - code
