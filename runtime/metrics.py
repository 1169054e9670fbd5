"""What Prometheus asks: /metrics, /health and /ready of a Runtime, by prometheus-client.

Everything is read when it is asked for, from what stats() and workers() read; nothing is counted for it on
the way of a task but two histograms, which workers keep in the region where the clock is read anyway (BUCKETS
in _layout.pxd). No counter goes backwards: what dead workers have counted is kept.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from runtime.config import host_and_port
from runtime.lifecycle import WorkerStatus
from runtime.listening import Listener, listen_tcp

__all__ = ["MetricsServer", "serve"]

MAX_CLIENTS = 16
MAX_REQUEST = 8192  # bytes
PATIENCE = 5.0  # seconds for a request, and for its answer to be read

_BOUNDS = [1024e-9 * 4**k for k in range(15)]  # seconds: BUCKETS in _layout.pxd
_TEXT = "text/plain; charset=utf-8"


def serve(rt: Any, address: str | tuple[str, int]) -> MetricsServer:
    """Serve the metrics of a Runtime at "HOST:PORT", or ("HOST", PORT), until it is closed.

    Raises: ImportError that names the extra, if prometheus-client is not installed; OSError, ValueError.
    """
    if isinstance(address, str):
        address = host_and_port(address)
    server = MetricsServer(rt, address)
    server.start()
    return server


class MetricsServer:
    """The HTTP server. Thread-safety: every method, any thread. Fork-safety: a fork has nothing of it."""

    def __init__(self, rt: Any, address: tuple[str, int], state: Callable[[], str] | None = None) -> None:
        """state: running, draining, stopping or broken; by default that of the Runtime."""
        try:
            import prometheus_client
        except ImportError:
            raise ImportError(
                "metrics need prometheus-client: pip install 'runtime-workers[metrics]'"
            ) from None
        self._rt = weakref.ref(rt)
        self._state = state
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_Collector(self._rt))
        self._render = prometheus_client.generate_latest
        self._kind = prometheus_client.CONTENT_TYPE_LATEST
        listener = listen_tcp(*address, MAX_CLIENTS)
        name = listener.getsockname()
        self.address: tuple[str, int] = (name[0], name[1])
        self._listener = Listener(
            listener, self._serve, self._refuse, most=MAX_CLIENTS, name="runtime-metrics"
        )

    def start(self) -> None:
        """Answer from now on."""
        self._listener.start()

    def close(self) -> None:
        """Answer no more."""
        self._listener.close()

    # ---- requests ------------------------------------------------------------------------------------

    def _refuse(self, client: socket.socket) -> None:
        client.setblocking(False)
        with contextlib.suppress(OSError):
            client.sendall(_response(503, _TEXT, b"too many clients\n"))

    def _serve(self, client: socket.socket) -> None:
        deadline = time.monotonic() + PATIENCE
        data = b""
        while b"\r\n\r\n" not in data and b"\n\n" not in data:
            client.settimeout(max(0.001, deadline - time.monotonic()))
            piece = client.recv(4096)
            data += piece
            if not piece or len(data) > MAX_REQUEST:
                client.sendall(_response(400, _TEXT, b"this is no request\n"))
                return
        client.settimeout(PATIENCE)
        client.sendall(self._answer(data.split(b"\n", 1)[0].split()))

    def _answer(self, words: list[bytes]) -> bytes:
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(400, _TEXT, b"this is no request\n")
        method, path = words[0], words[1].partition(b"?")[0]
        page = self._page(path) if method in (b"GET", b"HEAD") else _response(405, _TEXT, b"GET it\n")
        return page.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else page

    def _page(self, path: bytes) -> bytes:
        rt = self._rt()
        if rt is not None and rt._core.ended.is_set():
            rt = None
        if path == b"/metrics":
            if rt is None:
                return _response(503, _TEXT, b"the runtime has ended\n")
            return _response(200, self._kind, self._render(self._registry))
        if path not in (b"/health", b"/ready"):
            return _response(404, _TEXT, b"/metrics, /health, /ready\n")
        state, ready, generation = "ended", 0, None
        if rt is not None:
            state = self._state() if self._state is not None else rt._core.condition
            ready, generation = rt.stats().workers, rt._core.generation
        good = state not in ("broken", "ended") if path == b"/health" else state == "running" and ready > 0
        body = json.dumps({"state": state, "ready": ready, "generation": generation}).encode()
        return _response(200 if good else 503, "application/json", body + b"\n")


_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
            503: "Service Unavailable"}  # fmt: skip


def _response(status: int, kind: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


# ---- what is said ----------------------------------------------------------------------------------------


class _Collector:
    """Reads a Runtime whenever it is asked."""

    def __init__(self, rt: weakref.ref[Any]) -> None:
        self._rt = rt
        self._rescued = 0

    def describe(self) -> list[Any]:
        """Nothing: it is not asked while it is registered."""
        return []

    def collect(self) -> Iterator[Any]:
        """Every family of metrics."""
        rt = self._rt()
        if rt is None:
            return
        stats = rt.stats()
        self._rescued = max(self._rescued, stats.rescued)  # there, one that was just late is taken back
        yield from _tasks(rt._core, stats)
        yield _family(
            "counter", "leases", "Leases by how the worker was told of them",
            ("lane", stats.lane), ("message", stats.message), ("rescued", self._rescued), labels=("way",),
        )  # fmt: skip
        yield from _workers(rt)
        yield from _region(stats)
        yield _family(
            "gauge", "generation", "Generation of the code that new workers get", rt._core.generation
        )


def _family(kind: str, name: str, about: str, *values: Any, labels: tuple[str, ...] = ()) -> Any:
    """One family; values: numbers, or (label values..., number) with labels."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    types = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    family = types[kind](f"runtime_{name}", about, labels=labels)
    for value in values:
        *names, number = value if isinstance(value, tuple) else (value,)
        family.add_metric(list(names), number)
    return family


def _histogram(name: str, about: str, buckets: list[int], total: float) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    found, count = [], 0
    for bound, items in zip([*(f"{it:.6g}" for it in _BOUNDS), "+Inf"], buckets, strict=True):
        count += items
        found.append((bound, count))
    return HistogramMetricFamily(f"runtime_{name}", about, buckets=found, sum_value=total)


def _tasks(core: Any, stats: Any) -> Iterator[Any]:
    yield _family(
        "gauge", "open_tasks", "Tasks and items that have no outcome yet, by what they wait for",
        ("queued", stats.queued), ("leased", stats.leased), ("running", stats.running), labels=("state",),
    )  # fmt: skip
    yield _family(
        "counter", "tasks", "Tasks and items that have ended",
        ("done", stats.done), ("failed", stats.failed), ("cancelled", stats.cancelled), labels=("outcome",),
    )  # fmt: skip
    ran, waited, waited_ns = core.dispatcher.histograms()
    busy = sum(core.busy().values())
    yield _histogram("task_seconds", "Time in the code of a task or an item", ran, busy)
    yield _histogram(
        "queue_wait_seconds", "Time from submit to the start, of one call in 64", waited, waited_ns * 1e-9
    )


def _workers(rt: Any) -> Iterator[Any]:
    core, workers = rt._core, rt.workers()
    busy = core.busy()  # of every number that there was, so that sums do not go backwards
    now = Counter(worker.status for worker in workers)
    yield _family(
        "gauge", "workers", "Workers by status",
        *((status.value, now[status]) for status in WorkerStatus), labels=("status",),
    )  # fmt: skip
    yield _family("gauge", "workers_wanted", "Workers that there shall be", rt._max_workers)
    yield _family(
        "counter", "worker_tasks", "Tasks and items that workers of this number have run",
        *((str(n), core.dispatcher.tasks_of(n)) for n in busy), labels=("worker",),
    )  # fmt: skip
    yield _family(
        "counter", "worker_busy_seconds", "Time that workers of this number have spent in user code",
        *((str(n), seconds) for n, seconds in busy.items()), labels=("worker",),
    )  # fmt: skip
    yield _family(
        "gauge", "worker_resident_bytes", "Resident memory, shared memory included",
        *((str(worker.number), worker.rss) for worker in workers if worker.rss is not None),
        labels=("worker",),
    )  # fmt: skip
    yield _family(
        "counter", "worker_ends", "Worker processes that have ended: asked to, by a signal, or by themselves",
        *((how, core.ends[how]) for how in ("left", "signal", "exit")), labels=("how",),
    )  # fmt: skip
    yield _family(
        "counter", "reloads", "Reloads of the code",
        *((outcome, core.outcomes[outcome]) for outcome in ("done", "refused")), labels=("outcome",),
    )  # fmt: skip


def _region(stats: Any) -> Iterator[Any]:
    yield _family(
        "gauge", "region_bytes", "Shared memory: reserved, in blocks, kept by views, largest free run",
        ("reserved", stats.reserved), ("used", stats.used), ("pinned", stats.pinned),
        ("largest_free", stats.largest_free), labels=("kind",),
    )  # fmt: skip
    yield _family("counter", "region_growths", "Times that the region got memory", stats.growths)
