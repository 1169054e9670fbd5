"""The settings of a Runtime, checked once, in one place, before anything starts.

`settings()` takes what the user wrote and returns a frozen `Settings` in which every value has one
type and one meaning (bytes, seconds, tuples), or raises TypeError or ValueError with a message that
says what is allowed. `override()` does the same for the few values that a task may set for itself.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final

from runtime import limits
from runtime.errors import TaskTimeout
from runtime.limits import available_cpus, cpu_quota, memory_limit, memory_total

__all__ = [
    "INHERIT",
    "MAX_LANES",
    "MAX_REGION",
    "MAX_THREADS",
    "MAX_WORKERS",
    "Inherit",
    "Settings",
    "TaskOptions",
    "available_cpus",
    "cpu_quota",
    "default_region_max",
    "default_workers",
    "host_and_port",
    "lanes",
    "memory_limit",
    "memory_total",
    "override",
    "parse_size",
    "scaled",
    "settings",
    "thread_caps",
]

MAX_WORKERS: Final = 2000
MAX_THREADS: Final = 64
MAX_LANES: Final = 2000  # threads of all workers together: each has a slot of the table
_MAX_COUNT: Final = 2**31 - 1
_MAX_SECONDS: Final = 1e9  # 31 years: a deadline in nanoseconds stays far from 2^63
_RELOAD_TIMEOUT: Final = 60.0
_MIN_STATE: Final = 1 << 10  # bytes
MAX_REGION: Final = (2**28 - 2) << 12  # bytes that extent words can tell apart, see _layout.pxd
_MAX_BYTES: Final = 2**46  # half of the address space of a process


_mp_context_warned = False


class Inherit:
    """The type of INHERIT."""

    def __repr__(self) -> str:
        return "INHERIT"

    def __reduce__(self) -> str:
        return "INHERIT"


INHERIT: Final = Inherit()
"""Says "as the Runtime has it", where None already means "none"."""


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """What each worker runs instead of tasks; plain values, so that a zygote can be told."""

    module: str
    path: str  # of the function, in the module
    sockets: tuple[int, ...]  # descriptors of listening sockets
    region: int  # descriptor of the memory that the workers share
    pool: tuple[int, int]  # blocks in it, and the bytes of one
    settle: float  # seconds that it must have run to be ready

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors that every process of the runtime has."""
        return (*self.sockets, self.region)

    def at(self, first: int) -> Service:
        """The same where these descriptors have the numbers from `first` on: in zygotes and workers."""
        region = first + len(self.sockets)
        return dataclasses.replace(self, sockets=tuple(range(first, region)), region=region)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What a Runtime was asked for. Immutable, so any thread may read it."""

    max_workers: int  # workers to start
    threads: int  # tasks that a worker runs at a time, each in a thread of its own
    initializer: Callable[..., object] | None  # called once in each worker before its first task
    initargs: tuple[Any, ...]
    max_tasks_per_child: int | None  # items after which a worker is replaced
    preload: tuple[str, ...]  # modules to import before the workers are forked
    start_method: str  # of the zygote: "exec" or "fork"
    region_size: int  # bytes at the start
    region_max: int | None  # bytes to which the region may grow; None: default_region_max()
    retries: int  # further attempts for a task whose attempt did not count
    retry_on: tuple[type[BaseException], ...]  # exceptions that are retried besides WorkerDied
    timeout: float | None  # seconds for one attempt of one task
    drain_timeout: float  # seconds that old workers have to finish
    max_worker_rss: int | None  # bytes of unshared memory after which a worker is replaced
    state_max_items: int | None
    state_max_bytes: int | None
    forward_logs: bool  # replay workers' log records in the host
    name: str | None  # under which `runtime ctl` finds it
    service: Service | None = None  # what the workers run instead of tasks


@dataclasses.dataclass(frozen=True, slots=True)
class TaskOptions:
    """What a task may set for itself; the rest it has from its Runtime."""

    timeout: float | None
    retries: int
    retry_on: tuple[type[BaseException], ...]
    priority: int  # larger first

    @property
    def timeout_ns(self) -> int:
        """Nanoseconds that an attempt may take; 0: any time."""
        return int((self.timeout or 0) * 1e9)

    @property
    def plain(self) -> bool:
        """Whether it says nothing."""
        return self.timeout is None and not self.retries and not self.retry_on and not self.priority

    @property
    def retries_timeouts(self) -> bool:
        """Whether an attempt that was ended by its timeout may be followed by another."""
        return self.retries > 0 and issubclass(TaskTimeout, self.retry_on)


def settings(
    max_workers: int | None = None,
    threads: int = 1,
    initializer: Callable[..., object] | None = None,
    initargs: Iterable[Any] = (),
    max_tasks_per_child: int | None = None,
    mp_context: object = None,
    preload: str | Iterable[str] = (),
    start_method: str = "exec",
    region_size: int | str = "4MiB",
    region_max: int | str | None = None,
    retries: int = 0,
    retry_on: type[BaseException] | tuple[type[BaseException], ...] = (),
    timeout: float | None = None,
    drain_timeout: float = 30.0,
    max_worker_rss: int | str | None = None,
    state_max_items: int | None = None,
    state_max_bytes: int | str | None = None,
    forward_logs: bool = True,
    name: str | None = None,
) -> Settings:
    """Checks the arguments of `Runtime` and brings them into one form.

    Sizes are bytes or a text with a unit ("4MiB", "1.5 GiB"), times are seconds.

    Raises: TypeError, ValueError; the message names the argument and what is allowed.
    """
    if initializer is not None and not callable(initializer):
        raise TypeError("initializer must be a callable")
    if start_method not in ("exec", "fork"):
        raise ValueError(f'start_method must be "exec" or "fork", not {start_method!r}')
    if mp_context is not None:
        _warn_mp_context()
    first = _size("region_size", region_size)
    most = None if region_max is None else _size("region_max", region_max)
    if most is not None and most < first:
        raise ValueError(f"region_max ({most:,} bytes) must not be less than region_size ({first:,} bytes)")
    if (most or first) > MAX_REGION:
        what, size = ("region_size", first) if most is None else ("region_max", most)
        raise ValueError(f"{what} must be at most {MAX_REGION:,} bytes, not {size:,}")
    lanes = _count("threads", threads, 1, MAX_THREADS)
    return Settings(
        max_workers=_workers(max_workers, lanes),
        threads=lanes,
        initializer=initializer,
        initargs=_initargs(initargs),
        max_tasks_per_child=_count_or_none("max_tasks_per_child", max_tasks_per_child),
        preload=_modules(preload),
        start_method=start_method,
        region_size=first,
        region_max=most,
        retries=_count("retries", retries, 0),
        retry_on=_exceptions(retry_on),
        timeout=None if timeout is None else _seconds("timeout", timeout),
        drain_timeout=_seconds("drain_timeout", drain_timeout, zero=True),
        max_worker_rss=None if max_worker_rss is None else _size("max_worker_rss", max_worker_rss),
        state_max_items=_count_or_none("state_max_items", state_max_items),
        state_max_bytes=None if state_max_bytes is None else _state_size(state_max_bytes),
        forward_logs=bool(forward_logs),
        name=None if name is None else _name(name),
    )


def override(
    settings: Settings | TaskOptions,
    *,
    timeout: float | Inherit | None = INHERIT,
    retries: int | Inherit = INHERIT,
    retry_on: type[BaseException] | tuple[type[BaseException], ...] | Inherit = INHERIT,
    priority: int = 0,
) -> TaskOptions:
    """Options of one task, or of an `options()` view: INHERIT takes the value of `settings`.

    Raises: TypeError, ValueError, as `settings()` does.
    """
    if isinstance(timeout, Inherit):
        timeout = settings.timeout
    elif timeout is not None:
        timeout = _seconds("timeout", timeout)
    return TaskOptions(
        timeout=timeout,
        retries=settings.retries if isinstance(retries, Inherit) else _count("retries", retries, 0),
        retry_on=settings.retry_on if isinstance(retry_on, Inherit) else _exceptions(retry_on),
        priority=_count("priority", priority, -_MAX_COUNT),
    )


_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?\s*([A-Za-z]*)")
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter + "b"] = 1000**_power


def parse_size(size: int | str) -> int:
    """Bytes: an int as it is, or a text with a unit: 4MiB, 512KB, "1.5 GiB", 2G.

    KiB, MiB, GiB, TiB and the bare K, M, G, T are powers of 1024; KB, MB, GB, TB are powers of 1000.
    Upper and lower case are the same; a fraction of a byte is dropped.

    Raises: ValueError for a text that is none of these or a negative number, TypeError for other types.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        unit = _UNITS.get(match[3].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(
                f"{_described(size)} is not a size: write a number of bytes or, for example, "
                '"4MiB", "512KB", "1.5 GiB"'
            )
        fraction = match[2] or ""
        scale: int = 10 ** len(fraction)
        return int(match[1] + fraction) * unit // scale
    whole = _whole("a size", size, "an int (bytes) or a str such as '4MiB'")
    if whole < 0:
        raise ValueError(f"a size must not be negative: {whole}")
    return whole


def default_workers() -> int:
    """Workers of a Runtime that names no number: the CPUs it can keep busy; 1 inside a worker."""
    return 1 if limits.in_worker else min(available_cpus(), MAX_WORKERS)


def lanes() -> tuple[bool, int]:
    """(whether lanes are used, nanoseconds that a waiter watches the memory before it sleeps).

    From $RUNTIME_LANES and $RUNTIME_SPIN. With one CPU nobody watches: it would keep the other side from
    running. Raises: ValueError for a text that is none of theirs.
    """
    text = os.environ.get("RUNTIME_LANES", "").strip().lower()
    if text not in ("", "on", "1", "yes", "off", "0", "no"):
        raise ValueError(f"RUNTIME_LANES is {text!r} in the environment: it must be on or off")
    micros = os.environ.get("RUNTIME_SPIN", "").strip() or "50"
    if not micros.isdecimal() or int(micros) > 1_000_000:
        raise ValueError(
            f"RUNTIME_SPIN is {micros!r} in the environment: it must be microseconds, at most 1000000"
        )
    on = text in ("", "on", "1", "yes")
    return on, int(micros) * 1000 if on and available_cpus() > 1 else 0


def default_region_max(root: str = "/") -> int:
    """Bytes to which a region may grow when the user set no limit: half of what this process may use."""
    known = [size for size in (memory_limit(root), memory_total(root)) if size is not None]
    return min(known, default=_MAX_BYTES) // 2


_OMP = "OMP_NUM_THREADS"
_FALLS_BACK_TO_OMP = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_ON_ITS_OWN = ("VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS")


def thread_caps(workers: int, threads: int = 1) -> dict[str, str]:
    """Environment for the workers, so that their numeric libraries share the CPUs among them; each of so many
    threads of a worker may call one.

    Without it each of n workers starts a BLAS pool of all CPUs: n times too many threads. What the
    user has set stays. A user's OMP_NUM_THREADS also stands for the libraries that fall back to it:
    their own variables would win over it, so they are then left unset.
    """
    share = str(max(1, available_cpus() // max(1, workers * threads)))
    names = [_OMP, *_FALLS_BACK_TO_OMP] if not os.environ.get(_OMP) else []
    return {name: share for name in (*names, *_ON_ITS_OWN) if not os.environ.get(name)}


def _state_size(value: int | str) -> int:
    size = _size("state_max_bytes", value)
    if not _MIN_STATE <= size <= MAX_REGION:
        raise ValueError(f"state_max_bytes must be {_MIN_STATE:,} to {MAX_REGION:,} bytes, not {size:,}")
    return size


def _workers(value: int | None, threads: int) -> int:
    if value is None:
        return min(default_workers(), MAX_LANES // threads)
    number = _whole("max_workers", value)
    if number <= 0:
        raise ValueError("max_workers must be greater than 0")
    if number > MAX_WORKERS:
        raise ValueError(f"max_workers must be at most {MAX_WORKERS:,}, not {number:,}")
    if number * threads > MAX_LANES:
        raise ValueError(
            f"max_workers times threads must be at most {MAX_LANES:,}, not {number:,} x {threads}"
        )
    return number


def scaled(value: object) -> int:
    """What Runtime.scale() may be told: from 0 to MAX_WORKERS. Raises: TypeError, ValueError."""
    return _count("the number of workers", value, 0, MAX_WORKERS)


def reload_timeout(value: object) -> float:
    """What Runtime.reload() may be told, in seconds. Raises: TypeError, ValueError."""
    return _RELOAD_TIMEOUT if value is None else _seconds("timeout", value)


def _whole(what: str, value: object, kind: str = "an int") -> int:
    """An int, or what converts to one without loss (numpy's integers); bool is a mistake, not a number."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{what} must be {kind}, not {_described(value)}")


def _count(what: str, value: object, least: int, most: int = _MAX_COUNT) -> int:
    number = _whole(what, value)
    if number < least:
        raise ValueError(f"{what} must be >= {least}")
    if number > most:
        raise ValueError(f"{what} must be at most {most:,}, not {number:,}")
    return number


def _count_or_none(what: str, value: object) -> int | None:
    return None if value is None else _count(what, value, 1)


def _size(what: str, value: int | str) -> int:
    try:
        size = parse_size(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None
    if size == 0:
        raise ValueError(f"{what} must be greater than 0")
    if size > _MAX_BYTES:
        raise ValueError(f"{what} must be at most 64 TiB ({_MAX_BYTES:,} bytes), not {size:,}")
    return size


def _seconds(what: str, value: Any, *, zero: bool = False) -> float:
    number = hasattr(value, "__float__") or hasattr(value, "__index__")
    if isinstance(value, bool) or not number:
        raise TypeError(f"{what} must be a number of seconds, not {_described(value)}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = float("inf")
    # NaN fails every comparison, so the question is whether the value is inside, not outside.
    inside = 0 <= seconds <= _MAX_SECONDS if zero else 0 < seconds <= _MAX_SECONDS
    if not inside:
        least = ">= 0" if zero else "greater than 0"
        none = "" if zero else "; None means no limit"
        raise ValueError(f"{what} must be {least} and at most {_MAX_SECONDS:,.0f} s, not {seconds}{none}")
    return seconds


def _initargs(value: Iterable[Any]) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise TypeError(f"initargs must be a tuple of arguments, not {_described(value)}") from None


def _modules(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_module(value),)
    if isinstance(value, (bytes, bytearray)) or not isinstance(value, Iterable):
        raise TypeError(f"preload must be a module name or several, not {_described(value)}")
    return tuple(dict.fromkeys(_module(name) for name in value))


def _module(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"preload must hold module names as str, not {_described(name)}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f'preload: {name!r} is not a module name, like "numpy" or "package.module"')
    return name


def _exceptions(value: object) -> tuple[type[BaseException], ...]:
    types = value if isinstance(value, tuple) else (value,)
    for item in types:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise TypeError(f"retry_on must be an exception type or a tuple of them, not {_described(item)}")
    return types


def host_and_port(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[::1]:PORT`; an empty HOST is every address of this machine. Raises: ValueError."""
    host, separator, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is not HOST:PORT: write an IPv6 address in brackets, like [::1]:8000")
    if not separator or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(
            f"{text!r} is not HOST:PORT: write, for example, 127.0.0.1:8000, or [::1]:8000, or :8000 for "
            "every address of this machine; port 0 is any free one"
        )
    return host, int(port)


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def is_name(text: str) -> bool:
    """Whether a runtime may be named so."""
    return _NAME.fullmatch(text) is not None and bool(text.strip("."))


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"name must be a str, not {_described(value)}")
    if not is_name(value):
        raise ValueError(f"name must be 1 to 64 of A-Z a-z 0-9 _ . - and not only dots, not {value!r}")
    return value


def _described(value: object) -> str:
    """`int 3`, or only the type where the value would be long."""
    text = repr(value) if isinstance(value, (bool, int, float, str, bytes)) else ""
    return f"{type(value).__name__} {text}".rstrip() if len(text) <= 60 else type(value).__name__


def _warn_mp_context() -> None:
    global _mp_context_warned
    if not _mp_context_warned:
        _mp_context_warned = True
        warnings.warn(
            "mp_context is ignored: a Runtime starts its workers itself; choose with start_method",
            UserWarning,
            stacklevel=4,  # this function, settings(), Runtime.__init__, its caller
        )
