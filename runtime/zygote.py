"""The zygote: a child that has imported the user's modules, has no threads, and forks workers on request.

    host                                   zygote (one thread, one poll loop)
      │  exec, with six descriptors   ──►  sys.path, arguments, warnings, preload
      │  ◄── {"what": "importing"}         for each preloaded module
      │  ◄── {"what": "started"}           or "failed" with the traceback, or "threads" with the module
      │  {"what": "fork", slot …}     ──►  fork; pidfd_open before it may reap
      │  ◄── {"what": "forked", slot, pid} + the pidfd and the ends of channels.py (SCM_RIGHTS)
      │                                    a worker ends: wait4; kill and reap what it left to us
      │  ◄── {"what": "exited", slot, status, rss}
      │  {"what": "quit"}             ──►  kill what is left, exit
      ✗  host's pidfd                 ──►  the same, and remove the socket folder

With start_method="fork" it is forked from the host instead, when that has one thread (inherit.py), and it
keeps an heir (heirs.py).

This is the only file that forks. The host's end of it is in handle.py.
"""

from __future__ import annotations

import array
import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from runtime import _core, filters, forwarding, serializer, worker
from runtime.bytecode import beware_of_old_bytecode
from runtime.channels import Channels, readable
from runtime.children import children_of
from runtime.handle import FIRST_FD, ZYGOTE_FDS, Zygote
from runtime.heirs import Heirs
from runtime.inherit import forget_handlers, forget_host, has_threads, refuse_threads
from runtime.names import remove_dead
from runtime.sockets import Paths
from runtime.state import SharedState, open_state
from runtime.wire import REPORT_BYTES, decode_report, encode_report

__all__ = ["fork_zygote", "main"]

_HOST_END = 1.0  # seconds for a host that has closed its end to be gone
_STACK_AFTER = 9.0  # seconds after which a module that is still being imported leaves its stack


def fork_zygote(
    settings: dict[str, Any], arena: _core.Arena, state: SharedState, environment: dict[str, str]
) -> Zygote:
    """Fork a zygote from this process. Raises: RuntimeError if that has threads; OSError."""
    refuse_threads()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    host = _core.pidfd_open(os.getpid())
    stack_fd = _core.memfd_create(b"runtime-stack")
    forwarding.flush()
    # No handler of the host's may run in the child, and no garbage of the host's be collected there.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    collecting = gc.isenabled()
    gc.disable()
    try:
        pid = os.fork()
        if pid == 0:
            _become_zygote(theirs, arena, state, host, stack_fd, settings, environment, mask, collecting)
        pidfd = _core.pidfd_open(pid)
        return Zygote(ours, pid, pidfd, stack_fd)
    except BaseException:
        ours.close()
        os.close(stack_fd)
        raise
    finally:
        if collecting:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        os.close(host)


# ---- the process -------------------------------------------------------------------------------------


class _Watch:
    """While a module is imported nobody polls: a native thread watches the host. Gone before any fork."""

    def __init__(self, host_pidfd: int, folder: bytes) -> None:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        arguments = (host_pidfd, self._stop, worker.EXIT_HOST_GONE, folder, 0)
        self._thread = threading.Thread(target=_core.watch_host, args=arguments, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)


class _Process(Heirs):
    """The zygote's state: its children by slot, and who asks."""

    def __init__(
        self,
        connection: socket.socket,
        arena: _core.Arena,
        state: SharedState | None,
        host_pidfd: int,
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self.connection = connection
        self.arena = arena
        self.state = state
        self.host_pidfd = host_pidfd
        self.settings = settings
        self.children: dict[int, tuple[int, int, int]] = {}  # pidfd -> (pid, slot, incarnation)
        self.quitting = False  # the host said so
        self.own: set[int] = set()  # children that a preloaded module made
        self.stack_fd = -1  # where slow imports leave their stacks
        self.preloaded = False
        self.poller = select.poll()
        self.poller.register(connection, select.POLLIN)
        self.poller.register(host_pidfd, select.POLLIN)

    def report(self, what: str, fds: Sequence[int] = (), **fields: Any) -> None:
        """Tell the host; if it is gone, its pidfd says so in the next poll."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError):
            self.connection.sendmsg([encode_report(what, **fields)], rights, socket.MSG_NOSIGNAL)

    def preload(self) -> None:
        """Import the user's modules. Never returns if one fails or leaves a thread behind."""
        for name in self.settings["preload"]:
            watch = _Watch(self.host_pidfd, os.fsencode(self.settings["folder"]))
            self.report("importing", module=name)
            faulthandler.dump_traceback_later(_STACK_AFTER, repeat=True, file=self.stack_fd)
            try:
                importlib.import_module(name)
            except BaseException as error:
                faulthandler.cancel_dump_traceback_later()
                text = "".join(traceback.format_exception(error))
                self.report(
                    "failed",
                    module=name,
                    error=f"{type(error).__name__}: {error}"[:2000],
                    traceback=text[-20_000:],
                )
                os._exit(1)
            faulthandler.cancel_dump_traceback_later()
            watch.stop()
            filters.resolve()
            if has_threads():
                self.report("threads", module=name)
                os._exit(1)

    def loop(self) -> None:
        """Fork, reap, report, until the host says quit or is gone."""
        while True:
            for fd, _ in self.poller.poll(self.until_heir()):
                if fd in self.children:
                    self.reap(fd)
                elif self.heir is not None and fd == self.heir[0]:
                    self.bury_heir()
                elif fd == self.host_pidfd or not self.obey():
                    self.leave()

    def obey(self) -> bool:
        """One order. False: quit."""
        try:
            data = self.connection.recv(REPORT_BYTES)
        except OSError:  # the host has ended with reports unread
            data = b""
        if not data:
            return False
        order = decode_report(data)
        if order["what"] == "fork":
            self.fork(order)
        elif order["what"] == "kill":
            self.kill(order["slot"], order["incarnation"])
        self.quitting = bool(order["what"] == "quit")
        return not self.quitting

    def fork(self, order: dict[str, Any]) -> None:
        """Fork a worker, and send its pidfd and the host's ends of its channels."""
        parent = os.getpid()
        channels = None
        try:
            channels = Channels()
            pid = self.fork_child()
        except OSError as error:
            if channels is not None:
                channels.close()
            self.report("refused", slot=order["slot"], incarnation=order["incarnation"], error=str(error))
            return
        if pid == 0:
            self.become_worker(order, parent, channels)
        pidfd = _core.pidfd_open(pid)
        self.children[pidfd] = (pid, order["slot"], order["incarnation"])
        self.poller.register(pidfd, select.POLLIN)
        fds = [pidfd, *channels.host]
        self.report("forked", fds, slot=order["slot"], incarnation=order["incarnation"], pid=pid)
        channels.close()

    def kill(self, slot: int, incarnation: int) -> None:
        """The host could not take the descriptors of a worker: it has nobody who hears it."""
        for pidfd, (_, its_slot, its_incarnation) in self.children.items():
            if (its_slot, its_incarnation) == (slot, incarnation):
                _core.pidfd_send_signal(pidfd, signal.SIGKILL)

    def become_worker(self, order: dict[str, Any], parent: int, channels: Channels) -> None:
        """In the child. Never returns."""
        try:
            self.let_go()
            records, stack = channels.enter()
            orders = worker.Orders(
                slot=order["slot"], number=order["number"], generation=order["generation"],
                paths=Paths(*order["paths"]), host_pidfd=self.host_pidfd, zygote_pid=parent,
                initializer=self.settings["initializer"], max_tasks=self.settings["max_tasks"],
                max_rss=self.settings["max_rss"], folder=os.fsencode(self.settings["folder"]),
                imports=tuple(self.settings["imports"]), records=records, stack=stack, levels=order["levels"],
                threads=self.settings["threads"], known=tuple(self.settings["known"]),
                service=self.settings["service"],
            )  # fmt: skip
            worker.main(self.arena, self.state, orders)
        finally:
            os._exit(1)

    def reap(self, pidfd: int) -> None:
        """A worker has ended: end what it left behind, then say how it ended."""
        pid, slot, incarnation = self.children.pop(pidfd)
        self.poller.unregister(pidfd)
        os.close(pidfd)
        exitcode = rss = None
        with contextlib.suppress(ChildProcessError):
            _, status, usage = os.wait4(pid, 0)
            exitcode, rss = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        self.end_strays()
        self.report("exited", slot=slot, incarnation=incarnation, pid=pid, status=exitcode, rss=rss)

    def end_strays(self) -> None:
        """Children that we did not fork belonged to a dead worker."""
        while True:
            ours = {pid for pid, _, _ in self.children.values()} | self.own
            if self.heir is not None:
                ours.add(self.heir[1])
            strays = [pid for pid in children_of(os.getpid()) if pid not in ours]
            if not strays:
                return
            for pid in strays:  # our children, not waited for yet: their pids cannot be reused
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def fork_child(self) -> int:
        """As os.fork; what streams hold is written once."""
        forwarding.flush()
        return os.fork()

    def lead(self) -> None:
        """Import what is to be imported, then serve. Never returns."""
        if not self.preloaded:
            if self.keeps_heir and self.settings["preload"]:
                self.make_heir()  # one that takes over if an import goes wrong, or leaves a thread
            if self.settings["preload"]:
                self.preload()
                gc.collect()
            os.close(self.stack_fd)
            self.own = set(children_of(os.getpid()))
            self.preloaded = True
            gc.freeze()  # it is shared with every worker: the collector shall not write into it
        self.report("started")
        self.loop()

    def let_go(self) -> None:
        """In a child: what is the zygote's."""
        self.connection.close()
        for pidfd in (*self.children, *(self.heir[:1] if self.heir is not None else ())):
            os.close(pidfd)
        self.children.clear()
        self.heir = None
        self.heir_at = 0.0

    # ---- the end ----

    def leave(self) -> None:
        """End every descendant, then this process; if the host is gone, remove its folder and name, too.

        When the host is killed, its end of the connection is closed a moment before its pidfd says so.
        """
        _core.kill_descendants()
        if readable(self.host_pidfd, 0 if self.quitting else _HOST_END):
            folder = self.settings["folder"]
            with contextlib.suppress(OSError):
                for name in os.listdir(folder):
                    os.unlink(os.path.join(folder, name))
                os.rmdir(folder)
            if self.settings["control"] is not None:
                remove_dead(self.settings["control"])
        os._exit(0)


def main() -> None:
    """The process: `python -c … main()`, with descriptors as exec_zygote hands them over. Never returns."""
    fds = range(FIRST_FD, FIRST_FD + ZYGOTE_FDS)
    connection, region, state, host, config, stack = fds
    for fd in fds:
        os.set_inheritable(fd, False)
    _have_streams()
    settings = pickle.loads(_read(config))
    more = settings["service"].fds if settings["service"] is not None else ()
    for fd in more:
        os.set_inheritable(fd, False)
    _close_from(fds.stop + len(more))
    _stay()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored by the host, it would take what wait4 tells
    _core.become_subreaper()
    gc.freeze()
    gc.enable()
    _like_the_host(settings)
    if settings["generation"] > 1:
        beware_of_old_bytecode()
    arena = _core.Arena.attach_fd(region)
    process = _Process(socket.socket(fileno=connection), arena, open_state(state), host, settings)
    os.close(region)
    os.close(state)
    process.stack_fd = stack
    process.lead()


def _become_zygote(
    connection: socket.socket, arena: _core.Arena, state: SharedState, host: int, stack_fd: int,
    settings: dict[str, Any], environment: dict[str, str], mask: set[signal.Signals | int], collecting: bool,
) -> None:  # fmt: skip
    """The process that was forked from the host. Never returns."""
    try:
        arena.adopt_process()
        forget_host((connection.fileno(), arena.fd, state.region.fd, host, stack_fd))
        if settings["forward_logs"]:
            forget_handlers()
        worker.reset_signals()
        _stay()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as in main()
        if collecting:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ.update({name: text for name, text in environment.items() if name not in os.environ})
        _core.become_subreaper()
        serializer.keep_main()
        process = _Process(connection, arena, state, host, settings)
        process.keeps_heir = True
        process.stack_fd = stack_fd
        process.lead()
    except BaseException:  # a fault of ours: the traceback is all that can be given
        traceback.print_exc()
    finally:
        os._exit(1)


def _stay() -> None:
    """Ctrl-C and a service manager's SIGTERM go to the whole group: the host decides what they mean.

    Workers leave at SIGTERM, when their tasks are done; it takes a zygote to replace them, and one that was
    forked from the host could not be replaced itself, if its heir went with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)


def _read(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def _like_the_host(settings: dict[str, Any]) -> None:
    """What a fresh interpreter does not inherit."""
    sys.path[:] = settings["path"]
    sys.argv[:] = settings["argv"]
    filters.adopt(settings["warnings"])
    if settings.get("authkey") is not None:
        importlib.import_module("multiprocessing.process").current_process().authkey = settings["authkey"]


def _close_from(first: int) -> None:
    """What the host has left open for programs that it starts is not ours: it would hide EOF from others."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= first:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def _have_streams() -> None:
    """If the host has closed its descriptors 1 or 2, nothing of ours may take their place: workers' will."""
    for fd in (1, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
