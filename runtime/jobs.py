"""Jobs: a kernel over one buffer, by tasks that share its grains.

    plan       src and dst into the region, if they are not there; grains; JobBlock         (_kernel.pyx)
    launch     one ordinary task per participant: leases, wake-ups and deaths are theirs
    attend     look at those that have ended:
                 its worker died   free its grains, restore what they had changed, launch it again
                 it failed         stop the others
                 it is through     nothing; if no grain is left, take back those that have not begun;
                                   if one is left and nobody is out, launch one more
    outcome    when none is out: dst back to where it came from, the partials combined; or the error

`run_kernel` (native.py) attends in the caller's thread, `submit` in callbacks of the tasks' futures.
"""

from __future__ import annotations

import concurrent.futures
import pickle
import signal
from typing import TYPE_CHECKING, Any, Protocol

from runtime import _core
from runtime.config import TaskOptions
from runtime.errors import KernelFailed, RuntimeFailure, WorkerDied
from runtime.future import Future
from runtime.kernels import FOREIGN, Kernel
from runtime.refs import Ref
from runtime.store import take_shared

if TYPE_CHECKING:
    from runtime.supervisor import Supervisor

__all__ = ["Job", "Plan"]

_CRASHES, _KILLS = 3, 32  # deaths after which a grain is not tried again: of its own doing; by SIGKILL


class Area:
    """src or dst: the user's buffer, which is not empty, and where it lies in the region."""

    __slots__ = ("outside", "part", "place", "placed", "user")

    def __init__(self, arena: _core.Arena, user: memoryview, align: int, copy: bool) -> None:
        self.user = self.placed = user
        part = _core.locate_shared(arena, user)
        self.outside = part is None or (align > 1 and _core.address_of(user) % align > 0)
        if self.outside:
            self.placed = memoryview(take_shared(arena, user.nbytes))
            part = _core.locate_shared(arena, self.placed)
            if copy:
                _core.copy_bytes(self.placed, user)
        assert part is not None
        self.part: _core.BlockSlice | None = part
        self.place = _core.place_of(part)

    def close(self) -> None:
        """The views are not needed any more; see Plan.close, which ends the user's."""
        self.part = None
        if self.outside:
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
    return view if view.format == "B" and view.ndim == 1 else pickle.PickleBuffer(view).raw()


class Plan:
    """What a job is asked for, checked. Raises: TypeError, ValueError."""

    def __init__(self, kernel: Kernel, src: Any, dst: Any, params: Any) -> None:
        if not isinstance(kernel, Kernel):
            raise TypeError(f"run_kernel() needs a Kernel, not {type(kernel).__name__}")
        self.kernel = kernel
        self.params = params if type(params) is bytes else bytes(memoryview(params))
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


class Owner(Protocol):
    """Who runs jobs: a Runtime."""

    _jobs: set[tuple[str, _core.JobBlock]]

    def _usable(self) -> Supervisor: ...

    def _participate(
        self,
        future: Future[None],
        options: TaskOptions,
        arguments: tuple[Any, ...],
        named: tuple[Any, ...],
    ) -> None: ...

    def _measured(self, kernel: Kernel, ns: int, nbytes: int) -> None: ...


class Participant(Future[None]):
    """The future of a participant's task."""

    def __init__(self, core: Supervisor, kernel: Kernel) -> None:
        self._core = core
        self.said = f"kernel {kernel.name}"  # what is said of the task if its worker dies


class Job:
    """One kernel that runs. Its runtime does not end before it is closed: its tasks may follow each other.

    Thread-safety: for one thread at a time.
    """

    def __init__(self, owner: Owner, plan: Plan, options: TaskOptions, grain: int, participants: int) -> None:
        self.core = owner._usable()
        kernel, arena = plan.kernel, self.core.arena
        self.owner, self.plan, self.kernel, self.options = owner, plan, kernel, options
        item = kernel._rules.item
        self.dst = dst = None if plan.dst is None else Area(arena, plan.dst, item, kernel.inout)
        if dst is None or not kernel.inout or _core.address_of(dst.user) != _core.address_of(plan.src):
            self.src = Area(arena, plan.src, item, True)
        else:
            self.src = dst  # src may be read-only
        self.block = _core.JobBlock.create(
            arena, plan.src.nbytes, 0 if plan.dst is None else plan.dst.nbytes, grain, participants,
            kernel.partial, kernel._rules.per_page, kernel.inout,
        )  # fmt: skip
        block = self.block.block
        self.named = (block, self.src.part, None if dst is None else dst.part)  # live as long as a task
        self.arguments = (  # of `participate`, but for the number
            (block.offset, block.nbytes), self.src.place, None if dst is None else dst.place, kernel._key,
            plan.params,
        )  # fmt: skip
        self.hold: _core.JobHold | None = _core.JobHold(self.core.dispatcher)
        owner._jobs.add((kernel.name, self.block))
        self.out: dict[int, Future[None]] = {}  # participant -> its task, that has not been attended to
        self.error: BaseException | None = None
        self.cause: BaseException | None = None  # of a failure: what the kernel has raised besides
        # (grain, or -1 - grains done: without one; whether by SIGKILL) -> how often
        self.deaths: dict[tuple[int, bool], int] = {}
        self.stood = -1  # grains that were left when nobody was out; -1: that has not been yet

    # ---- participants --------------------------------------------------------------------------------

    def launch(self, number: int) -> Future[None] | None:
        """One more task, for a participant. None: the runtime takes none any more, which is the outcome."""
        # Known first: Ctrl-C may come at any moment of this.
        future = self.out[number] = Participant(self.core, self.kernel)
        try:
            self.owner._participate(future, self.options, (*self.arguments, number), self.named)
        except Exception as error:
            del self.out[number]
            self.fail(error)
            return None
        return future

    def attend(self) -> bool:
        """Look at those that have ended. Whether all is over."""
        for number, future in list(self.out.items()):
            if future.done():
                del self.out[number]
                if not future.cancelled():
                    error = future.exception()
                    if error is not None:
                        self.ended(number, error)
                elif self.error is None and self.block.left:  # by somebody else: a shutdown, or its future
                    self.fail(concurrent.futures.CancelledError())
        if self.error is None and (failure := self.block.failure) is not None:
            code, grain = failure
            self.error = KernelFailed(code, grain, grain * self.block.grain)
            self.give_up()
        if self.error is None and not self.block.left:
            for future in list(self.out.values()):
                future.cancel()  # what has not begun finds nothing to do, and what runs nothing more
            return True
        if not self.out and self.error is None:
            self.resume()
        return not self.out

    def resume(self) -> None:
        """Grains are left: they were freed when all the others had been through. One more participant runs
        them, unless the last one was sent for the same and has come back.
        """
        left = self.block.left
        if left == self.stood:
            text = (
                f"{left} of {self.block.grains} grains can be neither run nor finished: the kernel "
                f"{self.kernel.name} has written over what says so. It writes where it should not"
            )
            self.fail(RuntimeFailure(text))
            return
        self.stood = left
        self.launch(0)

    def ended(self, number: int, error: BaseException) -> None:
        """A participant's task has failed."""
        if isinstance(error, WorkerDied):
            grains = self.block.recover(number, self.dst and self.dst.placed)
            if self.error is not None or self.block.failure is not None:
                return
            self.stood = -1
            if self.hopeless(grains, error.signal == signal.SIGKILL):
                self.fail(error)
            else:
                self.launch(number)
        elif self.block.failure is not None:
            self.cause = self.cause or error
        else:
            self.fail(error)

    def hopeless(self, grains: list[int], killed: bool) -> bool:
        """Whether a worker that had begun these grains has died once too often.

        One that had begun none died as it loaded the kernel, or of something else: that counts as long as
        no grain is finished meanwhile.
        """
        keys = [(grain, killed) for grain in grains] or [(-1 - self.block.done, killed)]
        for key in keys:
            self.deaths[key] = self.deaths.get(key, 0) + 1
        return any(self.deaths[key] >= (_KILLS if killed else _CRASHES) for key in keys)

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
        """Nothing of it is needed any more; its tasks keep what they work on. A traceback may keep this."""
        self.owner._jobs.discard((self.kernel.name, self.block))
        self.hold = None
        if self.core.stopping:
            self.core.wake()
        del self.block, self.named
        self.plan.close()
        self.src.close()
        if self.dst is not None:
            self.dst.close()
        self.error = self.cause = None  # their traceback knows frames that know this: no cycle
