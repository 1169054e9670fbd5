"""The front of kernels: `run_kernel`, `submit` of a Kernel, what both share. A job's course is in jobs.py."""

from __future__ import annotations

import abc
import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runtime import _core, config, serializer
from runtime.config import TaskOptions
from runtime.errors import RegionFull, TaskTimeout
from runtime.future import Future
from runtime.jobs import Job, Plan
from runtime.kernels import Kernel, participate
from runtime.pressure import Pressure

if TYPE_CHECKING:
    from runtime.supervisor import Supervisor

__all__ = ["KernelFuture", "Kernels"]

_FIRST_GRAIN = 256 << 10  # bytes, of a kernel that has not been measured
_GRAIN_NS = (100_000, 1_000_000)  # that a grain shall take: at least, and at most
_GRAINS_EACH = (16, 64)  # per participant: at least, where src has so many pages; and enough for a fair share
_SHARE_NS = 50_000  # of work for a participant, below which waking it costs more than it does
_GRACE = 0.1  # seconds that participants have to end their grains when the job is given up
_SOON = 0.0005  # seconds, after which a job that was expected to be short is not
_LOOKS = (0.005, 0.05)  # seconds between two looks at the participants: at first, and at most
_MOST = 2**31 - 1
_URGENT = TaskOptions(None, 0, (), _MOST)  # of participants: grains are short, and others wait for them


class KernelFuture(Future[Any]):
    """The future of a kernel that was submitted: its outcome is that of one participant's job."""

    def __init__(self, job: Job | None, core: Supervisor) -> None:
        self._job, self._core = job, core

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
        try:
            over = job.attend()
        except BaseException as error:  # what has ended is attended to, or lost
            job.fail(error)
            over = not job.out
        if not over:
            self.start(job.out[0])
            return
        self._job = None
        ok: bool | None = True
        try:
            value = job.outcome()
        except BaseException as error:
            ok, value = (None if type(error) is concurrent.futures.CancelledError else False), error
        job.close()
        job.core.collector.outcomes.conclude(self, ok, value)
        value = None  # a traceback knows this frame: no cycle

    def participants(self) -> list[Future[None]]:
        """Tasks of it that are not over; none: it is between two attempts, or its outcome is being made."""
        job = self._job
        return [] if job is None else list(job.out.values())

    def cancel(self) -> bool:
        """Cancel it if no worker has started it. True: it never runs."""
        if self.done():
            return super().cancel()
        found = self.participants()
        if not found or not all([participant.cancel() for participant in found]):
            return False
        return self.withdraw() or self.cancelled()

    def running(self) -> bool:
        """Whether a worker runs it now."""
        found = self.participants()
        return not self.done() and (not found or any(participant.running() for participant in found))


class Kernels(abc.ABC):
    """The part of a Runtime that runs kernels."""

    _settings: config.Settings
    _table: serializer.FunctionTable
    _pressure: Pressure
    _submitter: _core.Submitter

    def __init__(self) -> None:
        self._jobs: set[tuple[str, _core.JobBlock]] = set()  # that run
        self._joining: serializer.FunctionRef | None = None  # to `participate`
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
        default what takes 0.1 to 1 ms. timeout: seconds for all of it. Returns what `combine`
        makes of the partials, without it the list of them, without partials None.

        Blocking: until tasks that end have made room, and all is done. If it raises, what dst holds is
        undefined. Raises: KernelFailed when the kernel returns a code; TaskTimeout; WorkerDied when workers
        die of one grain again and again; TypeError, ValueError for arguments that do not fit; RegionFull; as
        `submit` and `Future.result`.
        """
        core = self._usable()
        core.dispatcher.must_not_wait()
        plan = Plan(kernel, src, dst, params)
        limit = None if timeout is None else config.override(self._settings, timeout=timeout).timeout
        if grain is not None and type(grain) is not int:
            raise TypeError(f"grain must be a number of bytes, not {type(grain).__name__}")
        if grain is not None and grain <= 0:
            raise ValueError(f"grain must be greater than 0, not {grain}")
        if not plan.src.nbytes:
            return plan.nothing()
        participants = max(1, core.scaled * self._settings.threads)
        job = self._job(plan, _URGENT, self._grain(plan, grain, participants), participants)
        return self._run(job, min(participants, job.block.grains), self._needed(plan), limit)

    def _job(self, plan: Plan, options: TaskOptions, grain: int, participants: int) -> Job:
        """Raises: RegionFull when there is no room, and nobody who makes some or this thread may not wait."""
        make = functools.partial(Job, self, plan, options, grain, participants)
        try:
            return _unless_full(make) or self._later(make)
        except BaseException:
            plan.close()
            raise

    def _later(self, make: Callable[[], Job]) -> Job:
        """The job, when there is room for it. Raises: RegionFull."""
        made: list[Job] = []

        def attempt() -> bool:
            job = _unless_full(make)
            if job is not None:
                made.append(job)
            return job is not None

        return made[0] if self._pressure.wait(attempt) else make()

    def _run(self, job: Job, participants: int, needed: int, limit: float | None) -> Any:
        """needed: participants that are enough if it takes as long as the last time; the others follow if it
        does not, since that may depend on anything.
        """
        began = time.monotonic()
        try:
            launched = self._launch(job, 0, min(participants, needed))
            while not job.attend():
                spent = time.monotonic() - began
                if spent >= _SOON:
                    needed = participants
                launched = self._launch(job, launched, min(participants, needed))
                if limit is not None and spent >= limit:
                    done, grains = job.block.done, job.block.grains
                    raise TaskTimeout(
                        f"the kernel ran longer than {limit:g} s: {done} of {grains} grains are done"
                    )
                nap = min(max(spent / 8, _LOOKS[0]), _LOOKS[1]) if launched == participants else _SOON
                self._await(job, nap if limit is None else min(nap, limit - spent))
            return job.outcome()
        except BaseException as error:
            self._abort(job, error)
            raise
        finally:
            job.close()

    @staticmethod
    def _launch(job: Job, first: int, end: int) -> int:
        """Participants from `first` on, as long as the job goes on. The number of the next one."""
        for number in range(first, end):
            if job.error is not None or job.launch(number) is None:
                return number
        return end

    def _abort(self, job: Job, error: BaseException) -> None:
        """Nobody wants the outcome: let participants end their grains, but not for long."""
        job.fail(error)
        end = time.monotonic() + _GRACE
        try:
            while not job.attend() and time.monotonic() < end:
                self._await(job, _SOON)
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
                job = self._job(plan, options, self._grain(plan, plan.src.nbytes, 1), 1)
            else:
                value = plan.nothing()
        except KeyboardInterrupt:
            raise  # Ctrl-C, in all likelihood, not the argument's doing
        except BaseException as error:
            core.dispatcher.refuse()
            future = KernelFuture(None, core)
            future.set_exception(error)
            return future
        future = KernelFuture(job, core)
        if job is None:
            future.set_result(value)
            return future
        participant = job.launch(0)
        if job.error is not None:
            try:
                raise job.error
            finally:
                job.close()
        future.start(participant)
        return future

    def _participate(
        self,
        future: Future[None],
        options: TaskOptions,
        arguments: tuple[Any, ...],
        named: tuple[Any, ...],
    ) -> None:
        """Submit the task of one participant; the arguments name blocks by their offsets. After shutdown,
        too: its job was accepted before. Raises: BrokenRuntime, RuntimeError when the runtime has ended.
        """
        if self._joining is None:
            self._joining = self._table.ref(participate)
        if self._submitter.join(future, options, self._joining, arguments, named):
            return
        ref, payload = serializer.pack_call(self._table, participate, arguments)
        task = _core.Task(ref, future, options.timeout_ns, options.priority, 0, False)
        task.hold(payload.data, payload.buffers, payload.readonly, named)
        self._enter(task, future)

    def _progress(self) -> tuple[tuple[str, int, int], ...]:
        """For stats()."""
        return tuple([(name, block.grains, block.done) for name, block in list(self._jobs)])

    def _grain(self, plan: Plan, asked: int | None, participants: int) -> int:
        """Bytes of src that are claimed at a time."""
        unit, size = plan.unit, plan.src.nbytes
        if asked is not None:
            return (min(asked, size) + unit - 1) // unit * unit
        rate = self._rates.get(plan.kernel._spec)
        wanted = _FIRST_GRAIN
        if rate is not None:
            fair = rate * size / (_GRAINS_EACH[1] * participants)
            wanted = int(min(max(fair, _GRAIN_NS[0]), _GRAIN_NS[1]) / rate)
        return max(1, min(wanted, size // (_GRAINS_EACH[0] * participants)) // unit) * unit

    def _needed(self, plan: Plan) -> int:
        """Participants for whom there is enough to do, by how long the kernel took the last time."""
        rate = self._rates.get(plan.kernel._spec)
        return _MOST if rate is None else 1 + int(rate * plan.src.nbytes / _SHARE_NS)

    def _measured(self, kernel: Kernel, ns: int, nbytes: int) -> None:
        """A kernel has taken so long for so many bytes."""
        if ns:
            self._rates[kernel._spec] = ns / nbytes


def _unless_full(make: Callable[[], Job]) -> Job | None:
    """None: there is no room; nothing of the attempt is left."""
    try:
        return make()
    except RegionFull:
        return None


def _arguments(kernel: Kernel, src: Any, dst: Any = None, params: Any = b"") -> Plan:
    """What `submit(kernel, ...)` takes."""
    return Plan(kernel, src, dst, params)
