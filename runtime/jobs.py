"""Jobs: a kernel over one buffer, by tasks that share its grains; `run_kernel`, and `submit` of a Kernel.

    plan       src and dst into the region, if they are not there; grains; JobBlock         (_kernel.pyx)
    launch     one ordinary task per participant: leases, wake-ups and deaths are theirs
    attend     look at those that have ended:
                 its worker died   free its grains, restore what they had changed, launch it again
                 it failed         stop the others
                 it is through     nothing; if no grain is left, take back those that have not begun
    outcome    when none is out: dst back to where it came from, the partials combined; or the error

`run_kernel` attends in the caller's thread, `submit` in callbacks of the tasks' futures.
"""

from __future__ import annotations

import abc
import concurrent.futures
import functools
import pickle
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from runtime import _core, config, serializer
from runtime.config import TaskOptions
from runtime.errors import KernelFailed, TaskTimeout, WorkerDied
from runtime.future import Future
from runtime.kernels import FOREIGN, Kernel, participate
from runtime.refs import Ref

if TYPE_CHECKING:
    from runtime.supervisor import Supervisor

__all__ = ["KernelFuture", "Kernels"]

_FIRST_GRAIN = 256 << 10  # bytes, of a kernel that has not been measured
_GRAIN_NS = 500_000  # that a grain shall take
_GRAINS_EACH = 4  # per participant, at least, where src has so many pages
_GRACE = 0.1  # seconds that participants have to end their grains when the job is given up
_LOOKS = (0.0005, 0.05)  # seconds between two looks at the participants: at first, and at most
_CRASHES, _KILLS = 3, 32  # deaths after which a grain is not tried again: of its own doing; by SIGKILL
_URGENT = 2**31 - 1  # the priority of participants: grains are short, and others wait for them


class Area:
    """src or dst: the user's buffer, and where it lies in the region."""

    __slots__ = ("outside", "placed", "user")

    def __init__(self, arena: _core.Arena, user: memoryview, align: int, copy: bool) -> None:
        self.user = user
        located = user.nbytes == 0 or _core.locate_shared(arena, user) is not None
        self.outside = not located or bool(user.nbytes and _core.address_of(user) % align)
        self.placed = user
        if self.outside:
            block = arena.take(user.nbytes)
            block.share()
            self.placed = memoryview(block)
            if copy:
                _core.copy_bytes(self.placed, user)

    def close(self) -> None:
        """The views are not needed any more; see Plan.close."""
        self.user.release()
        self.placed.release()

    def write_back(self) -> None:
        """What lies outside gets what the kernel has written."""
        if self.outside:
            _core.copy_bytes(self.user, self.placed)


def _flat(what: str, value: Any, writable: bool) -> memoryview:
    """The bytes of a buffer. Raises: TypeError for what has none, or is read-only; ValueError with gaps."""
    if isinstance(value, Ref):
        value = value.get()
    try:
        view = memoryview(value)
    except TypeError:
        raise TypeError(
            f"{what} must be a buffer, as bytes or an array, not {type(value).__name__}"
        ) from None
    if not view.c_contiguous:
        raise ValueError(f"{what} must be C-contiguous; pass a copy, as numpy.ascontiguousarray makes one")
    if writable and view.readonly:
        raise TypeError(f"{what} is read-only, and the kernel writes into it")
    return pickle.PickleBuffer(view).raw()


class Plan:
    """What a job is asked for, checked. Raises: TypeError, ValueError."""

    def __init__(self, kernel: Kernel, src: Any, dst: Any, params: Any) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"run_kernel() needs a Kernel, not {type(kernel).__name__}")
        self.kernel = kernel
        self.params = bytes(memoryview(params))
        self.src = _flat("src", src, False)
        self.dst = None if dst is None else _flat("dst", dst, True)
        self.unit = _core.PAGE_BYTES  # grains are whole ones
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        kernel, rules, size = self.kernel, self.kernel._rules, self.src.nbytes
        if size % rules.item:
            raise ValueError(f"{kernel.name} needs whole items of {rules.item} bytes, not {size} bytes")
        if len(self.params) != rules.params and rules is not FOREIGN:
            raise ValueError(f"{kernel.name} needs {rules.params} bytes of params, not {len(self.params)}")
        if self.dst is None:
            if rules.same:
                raise ValueError(f"{kernel.name} needs a dst")
            return
        if kernel.partial:
            raise ValueError(f"{kernel.name} writes partials, so it takes no dst")
        self._fit(size, self.dst.nbytes, rules.same)
        self._apart(self.src, self.dst)

    def close(self) -> None:
        """The views are not needed any more: CPython crashes when it collects views of views in a cycle, as
        the frames of a traceback may be part of one.
        """
        self.src.release()
        if self.dst is not None:
            self.dst.release()

    def _fit(self, size: int, room: int, same: bool) -> None:
        """dst is cut like src."""
        if room and size and room % size == 0 and (room == size or not same):
            return
        if room and size and size % room == 0 and not same:
            self.unit *= size // room
            return
        if not (room or size):
            return
        ratio = "as long as src" if same else "a whole multiple or a whole fraction of src"
        raise ValueError(f"dst has {room} bytes and src {size}: it must be {ratio}")

    def _apart(self, src: memoryview, dst: memoryview) -> None:
        """In place is for those that say so: another one could not run a grain again."""
        a, b = _core.address_of(src), _core.address_of(dst)
        if not (a < b + dst.nbytes and b < a + src.nbytes):
            return
        if not self.kernel.inout:
            raise ValueError("dst overlaps src: a kernel that works in place is made with inout=True")
        if a != b or src.nbytes != dst.nbytes:
            raise ValueError("dst overlaps src in part: it must be src itself, or lie elsewhere")

    def nothing(self) -> Any:
        """What comes of no bytes."""
        if not self.kernel.partial:
            return None
        return [] if self.kernel.combine is None else self.kernel.combine([], [])


class Job:
    """One kernel that runs.

    Thread-safety: for one thread at a time; `progress`, `give_up` from any.
    """

    def __init__(
        self, owner: Kernels, plan: Plan, options: TaskOptions, grain: int, participants: int
    ) -> None:
        self.core = owner._usable()
        kernel, arena = plan.kernel, self.core.arena
        self.owner, self.plan, self.kernel, self.options = owner, plan, kernel, options
        self.src = Area(arena, plan.src, kernel._rules.item, True)
        self.dst: Area | None = None
        if plan.dst is not None:
            same = kernel.inout and _core.address_of(plan.dst) == _core.address_of(plan.src)
            self.dst = self.src if same else Area(arena, plan.dst, kernel._rules.item, kernel.inout)
        self.block = _core.JobBlock.create(
            arena, plan.src.nbytes, 0 if plan.dst is None else plan.dst.nbytes, grain, participants,
            kernel.partial, kernel._rules.per_page, kernel.inout,
        )  # fmt: skip
        self.out: dict[int, Future[None]] = {}  # participant -> its task, that has not been attended to
        self.error: BaseException | None = None
        self.cause: BaseException | None = None  # of a failure: what the kernel has raised besides
        self.deaths: dict[tuple[int, bool], int] = {}  # (grain, whether by SIGKILL) -> how often

    # ---- participants --------------------------------------------------------------------------------

    def launch(self, number: int) -> Future[None] | None:
        """One more task, for a participant. None: the runtime takes none any more, which is the outcome."""
        dst = None if self.dst is None else pickle.PickleBuffer(self.dst.placed)
        arguments = (
            pickle.PickleBuffer(self.block.block), pickle.PickleBuffer(self.src.placed), dst,
            self.kernel._spec, self.plan.params, number,
        )  # fmt: skip
        try:
            future = self.owner._participate(self.options, arguments)
        except Exception as error:
            self.fail(error)
            return None
        finally:
            for part in arguments[:3]:
                if part is not None:
                    part.release()
        self.out[number] = future
        return future

    def attend(self) -> bool:
        """Look at those that have ended. Whether all is over."""
        for number, future in list(self.out.items()):
            if future.done():
                del self.out[number]
                if not future.cancelled():
                    self.ended(number, future.exception())
                elif self.error is None and self.block.left:  # by somebody else: a shutdown, or its future
                    self.fail(concurrent.futures.CancelledError())
        if self.error is None and (failure := self.block.failure) is not None:
            code, grain = failure
            self.error = KernelFailed(code, grain, grain * self.block.grain)
            self.give_up()
        if self.error is None and not self.block.left:
            for future in list(self.out.values()):
                future.cancel()  # what has not begun finds nothing to do
            return all(future.done() for future in self.out.values())
        if not self.out and self.error is None:
            self.launch(0)  # grains were freed when all the others had been through
        return not self.out

    def ended(self, number: int, error: BaseException | None) -> None:
        """A participant's task is over."""
        if isinstance(error, WorkerDied):
            grains = self.block.recover(number, self.dst and self.dst.placed)
            if self.error is not None or self.block.failure is not None:
                return
            if self.hopeless(grains or [-1], error.signal == signal.SIGKILL):
                self.fail(error)
            else:
                self.launch(number)
        elif error is not None and self.block.failure is not None:
            self.cause = self.cause or error
        elif error is not None:
            self.fail(error)

    def hopeless(self, grains: list[int], killed: bool) -> bool:
        """Whether a worker that had begun these grains (-1: none) has died once too often."""
        for grain in grains:
            self.deaths[grain, killed] = self.deaths.get((grain, killed), 0) + 1
        return any(self.deaths[grain, killed] >= (_KILLS if killed else _CRASHES) for grain in grains)

    def fail(self, error: BaseException) -> None:
        """This is the outcome, unless there is one."""
        self.error = self.error or error
        self.give_up()

    def give_up(self) -> None:
        """Nobody claims a grain any more."""
        self.block.stop()
        for future in list(self.out.values()):
            future.cancel()

    # ---- the end -------------------------------------------------------------------------------------

    def outcome(self) -> Any:
        """What the kernel returns, when all is over. Raises: why it does not."""
        if self.error is not None:
            raise self.error from self.cause
        self.owner._measured(self.kernel, self.block.ns, self.plan.src.nbytes)
        if self.dst is not None:
            self.dst.write_back()
        if not self.kernel.partial:
            return None
        parts = self.block.parts()
        return parts if self.kernel.combine is None else self.kernel.combine(parts, self.block.lengths())

    def close(self) -> None:
        """Nothing of it is needed any more; its tasks keep what they work on."""
        self.plan.close()
        for area in (self.src, self.dst):
            if area is not None:
                area.close()
        self.error = self.cause = None  # their traceback knows frames that know this: no cycle

    def progress(self) -> tuple[str, int, int]:
        """For stats()."""
        return self.kernel.name, self.block.grains, self.block.done


class KernelFuture(Future[Any]):
    """The future of a kernel that was submitted: its outcome is that of one participant's job."""

    def __init__(self, job: Job | None) -> None:
        self._job = job

    def start(self, participant: Future[None] | None) -> None:
        """Wait for the participant, and for those that follow it; without one there is an outcome already."""
        if participant is None:
            self._attend(None)
        else:
            participant.add_done_callback(self._attend)

    def _attend(self, _: object) -> None:
        job = self._job
        if job is None:
            return
        if not job.attend():
            self.start(job.out[0])
            return
        self._job = None
        ok: bool | None = True
        try:
            value = job.outcome()
        except BaseException as error:
            ok, value = (None if type(error) is concurrent.futures.CancelledError else False), error
        job.owner._conclude(job, self, ok, value)

    def participants(self) -> list[Future[None]]:
        """Tasks of it that are not over."""
        return [] if self._job is None else list(self._job.out.values())

    def cancel(self) -> bool:
        """Cancel it if no worker has started it. True: it never runs."""
        if not all([participant.cancel() for participant in self.participants()]):
            return False
        return self.withdraw()

    def running(self) -> bool:
        """Whether a worker runs it now."""
        return any(participant.running() for participant in self.participants())


class Kernels(abc.ABC):
    """The part of a Runtime that runs kernels."""

    _settings: config.Settings
    _table: serializer.FunctionTable

    def __init__(self) -> None:
        self._jobs: set[Job] = set()  # that run
        self._rates: dict[Any, float] = {}  # what a kernel was found by -> ns that it takes per byte

    @abc.abstractmethod
    def _usable(self) -> Supervisor:
        """Raises: RuntimeError after shutdown, and in a fork; BrokenRuntime."""

    @abc.abstractmethod
    def _enter(self, task: _core.Task, future: Future[Any]) -> None:
        """Queue a task. Raises: RuntimeError, BrokenRuntime when the runtime has ended."""

    @abc.abstractmethod
    def cancel(self, future: concurrent.futures.Future[Any], *, running: bool = False) -> bool:
        """As Runtime.cancel."""

    def run_kernel(
        self,
        kernel: Kernel,
        src: Any,
        dst: Any = None,
        *,
        params: Any = b"",
        grain: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Run a kernel over all of src, in all workers at once; see docs/kernels.md.

        src, dst: C-contiguous buffers; in the region (`empty`, `alloc`, `put`, results) they are worked on in
        place, others are copied, src once, and dst back at the end. dst is cut in proportion to src. params:
        bytes for the kernel. grain: bytes of src that are claimed at a time, rounded up to whole pages; by
        default what takes about half a millisecond. timeout: seconds for all of it. Returns what `combine`
        makes of the partials, without it the list of them, without partials None.

        Blocking: until all is done. If it raises, what dst holds is undefined. Raises: KernelFailed when the
        kernel returns a code; TaskTimeout; WorkerDied when workers die of one grain again and again;
        TypeError, ValueError for arguments that do not fit; RegionFull; as `submit` and `Future.result`.
        """
        core = self._usable()
        core.dispatcher.must_not_wait()
        plan = Plan(kernel, src, dst, params)
        limit = config.override(self._settings, timeout=timeout).timeout
        if grain is not None and type(grain) is not int:
            raise TypeError(f"grain must be a number of bytes, not {type(grain).__name__}")
        if grain is not None and grain <= 0:
            raise ValueError(f"grain must be greater than 0, not {grain}")
        if not plan.src.nbytes:
            return plan.nothing()
        participants = max(1, core.scaled * self._settings.threads)
        options = TaskOptions(None, 0, (), _URGENT)
        job = Job(self, plan, options, self._grain(plan, grain, participants), participants)
        return self._run(job, min(participants, job.block.grains), limit)

    def _run(self, job: Job, participants: int, limit: float | None) -> Any:
        began = time.monotonic()
        self._jobs.add(job)
        try:
            for number in range(participants):
                if job.launch(number) is None:
                    break
            while not job.attend():
                spent = time.monotonic() - began
                if limit is not None and spent >= limit:
                    done, grains = job.block.done, job.block.grains
                    raise TaskTimeout(
                        f"the kernel ran longer than {limit:g} s: {done} of {grains} grains are done"
                    )
                nap = min(max(spent / 8, _LOOKS[0]), _LOOKS[1])
                self._await(job, nap if limit is None else min(nap, limit - spent))
            return job.outcome()
        except BaseException as error:
            self._abort(job, error)
            raise
        finally:
            self._jobs.discard(job)
            job.close()

    def _abort(self, job: Job, error: BaseException) -> None:
        """Nobody wants the outcome: let participants end their grains, but not for long."""
        job.fail(error)
        end = time.monotonic() + _GRACE
        try:
            while not job.attend() and time.monotonic() < end:
                self._await(job, _LOOKS[0])
        finally:  # also when Ctrl-C comes again
            for participant in list(job.out.values()):
                self.cancel(participant, running=True)

    def _await(self, job: Job, seconds: float) -> None:
        """Until one participant has ended, or so long."""
        participant = next(iter(job.out.values()), None)
        if participant is None:
            return
        end = time.monotonic() + seconds
        job.core.expect(participant, seconds)
        if participant.done():
            return
        if threading.current_thread() is job.core.collecting:  # in a callback: nobody else does it
            job.core.collector.complete()
        left = end - time.monotonic()
        if left > 0:
            concurrent.futures.wait((participant,), left)

    def _submit_kernel(self, options: TaskOptions, kernel: Kernel, args: Any, kwargs: Any) -> Future[Any]:
        """`submit` of a kernel: one grain, one task. What is wrong with the arguments is the outcome."""
        core = self._usable()
        job = None
        try:
            plan = _arguments(kernel, *args, **kwargs)
            value = None
            if plan.src.nbytes:
                job = Job(self, plan, options, self._grain(plan, plan.src.nbytes, 1), 1)
            else:
                value = plan.nothing()
        except KeyboardInterrupt:
            raise  # Ctrl-C, in all likelihood, not the argument's doing
        except BaseException as error:
            core.dispatcher.refuse()
            future = KernelFuture(None)
            future._core = core
            future.set_exception(error)
            return future
        future = KernelFuture(job)
        future._core = core
        if job is None:
            future.set_result(value)
            return future
        self._jobs.add(job)
        participant = job.launch(0)
        if job.error is not None:
            self._jobs.discard(job)
            try:
                raise job.error
            finally:
                job.close()
        future.start(participant)
        return future

    def _participate(self, options: TaskOptions, arguments: tuple[Any, ...]) -> Future[None]:
        """The task of one participant. Raises: RuntimeError, BrokenRuntime when the runtime has ended."""
        core = self._usable()
        locate = functools.partial(_core.locate_shared, core.arena)
        ref, payload = serializer.pack_call(self._table, participate, arguments, freeze=False, locate=locate)
        future: Future[None] = Future()
        future._core = core
        task = _core.Task(ref, future, options.timeout_ns, options.priority, 0, False)
        task.hold(payload.data, payload.buffers, payload.readonly)
        self._enter(task, future)
        return future

    def _conclude(self, job: Job, future: KernelFuture, ok: bool | None, value: Any) -> None:
        """The end of a kernel that was submitted."""
        self._jobs.discard(job)
        job.close()
        job.core.collector.conclude(future, ok, value)

    def _grain(self, plan: Plan, asked: int | None, participants: int) -> int:
        """Bytes of src that are claimed at a time."""
        unit, size = plan.unit, plan.src.nbytes
        if asked is not None:
            return (min(asked, size) + unit - 1) // unit * unit
        rate = self._rates.get(plan.kernel._spec)
        wanted = _FIRST_GRAIN if rate is None else int(_GRAIN_NS / rate)
        return max(1, min(wanted, size // (_GRAINS_EACH * participants)) // unit) * unit

    def _measured(self, kernel: Kernel, ns: int, nbytes: int) -> None:
        """A kernel has taken so long for so many bytes."""
        if ns:
            self._rates[kernel._spec] = ns / nbytes


def _arguments(kernel: Kernel, src: Any, dst: Any = None, params: Any = b"") -> Plan:
    """What `submit(kernel, ...)` takes."""
    return Plan(kernel, src, dst, params)
