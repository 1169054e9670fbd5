"""Metrics: what Prometheus reads, what never goes backwards, and who may ask."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Command, Served
from tasks import Gate, own_pid, pass_through
from watching import ROOT, until

from runtime import Runtime, metrics

Factory = Callable[..., Runtime]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@contextlib.contextmanager
def served(rt: Runtime) -> Iterator[metrics.MetricsServer]:
    with contextlib.closing(metrics.serve(rt, "127.0.0.1:0")) as server:
        yield server


def get(address: tuple[str, int], path: str) -> tuple[int, str]:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    try:
        with urllib.request.urlopen(f"http://{host}:{address[1]}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(address: tuple[str, int]) -> tuple[Samples, dict[str, str]]:
    """{(name, labels): value} and {family: type}."""
    status, text = get(address, "/metrics")
    assert status == 200
    families = list(text_string_to_metric_families(text))
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    return samples, {family.name: family.type for family in families}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"runtime_{name}", tuple(sorted(labels.items()))]


def histogram(samples: Samples, name: str) -> list[float]:
    found = [
        (float(dict(labels)["le"]), number)
        for (sample, labels), number in samples.items()
        if sample == f"runtime_{name}_bucket"
    ]
    return [number for _, number in sorted(found)]


def test_what_is_said(factory: Factory, tmp_path: Path) -> None:
    rt = factory(2)
    with served(rt) as server:
        gate = Gate(tmp_path)
        assert [future.result() for future in [rt.submit(abs, -n) for n in range(100)]] == list(range(100))
        assert sum(rt.map(abs, range(50))) == 1225
        assert rt.submit(int, "x").exception() is not None
        waiting = [rt.submit(pass_through, gate.path) for _ in range(3)]
        gate.arrived(2)
        samples, types = scrape(server.address)
        assert value(samples, "tasks_total", outcome="done") == 150
        assert value(samples, "tasks_total", outcome="failed") == 1
        assert value(samples, "open_tasks", state="running") == 2
        assert value(samples, "workers", status="ready") == value(samples, "workers_wanted") == 2
        assert sum(value(samples, "worker_tasks_total", worker=n) for n in "01") == 151
        ran = histogram(samples, "task_seconds")
        assert ran == sorted(ran) and ran[-1] == value(samples, "task_seconds_count") == 151
        waited = histogram(samples, "queue_wait_seconds")
        assert waited[-1] == value(samples, "queue_wait_seconds_count") == 2 + (151 + 3 - 50 > 128)
        assert value(samples, "queue_wait_seconds_sum") > 0
        assert {types[f"runtime_{name}"] for name in ("task_seconds", "queue_wait_seconds")} == {"histogram"}
        gate.open(3)
        for future in waiting:
            future.result()
        gate.close()


def test_times_are_in_their_buckets(factory: Factory) -> None:
    """A task that is held for a while is in a later bucket than one that does nothing."""
    rt = factory(1)
    with served(rt) as server:
        rt.submit(spin, 0.0).result()  # its module is imported
        before = histogram(scrape(server.address)[0], "task_seconds")
        rt.submit(spin, 0.1).result()  # at least: the machine may be busy
        after = histogram(scrape(server.address)[0], "task_seconds")
    changed = [now - then for now, then in zip(after, before, strict=True)]
    bounds = [1024e-9 * 4**k for k in range(15)]
    assert changed in [[float(bound >= least) for bound in bounds] + [1.0] for least in (0.1, 0.3, 1.2)]


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_no_counter_goes_backwards(factory: Factory) -> None:
    """Over deaths, a reload, and fewer workers."""
    rt = factory(3)
    with served(rt) as server:
        last, _ = scrape(server.address)

        def look() -> None:
            nonlocal last
            now, types = scrape(server.address)
            counts = {family for family, kind in types.items() if kind in ("counter", "histogram")}
            for (name, labels), number in last.items():
                family = name.removesuffix("_total").removesuffix("_bucket")
                if family.removesuffix("_count").removesuffix("_sum") in counts:
                    assert now[name, labels] >= number, (name, labels)
            last = now

        for step in range(3):
            for future in [rt.submit(own_pid) for _ in range(200)]:
                future.result()
            look()
            os.kill(rt.submit(own_pid).result(), signal.SIGKILL)
            until(lambda n=step: value(scrape(server.address)[0], "worker_ends_total", how="signal") == n + 1)
            look()
        rt.reload()
        look()
        rt.scale(1)
        until(lambda: len(rt.workers()) == 1)
        look()
        assert value(last, "reloads_total", outcome="done") == 1
        assert value(last, "generation") == 2
        done = sum(number for (name, _), number in last.items() if name == "runtime_worker_tasks_total")
        assert done == value(last, "tasks_total", outcome="done") == 603
        assert value(last, "task_seconds_count") == 603


def test_a_late_hint_takes_nothing_back(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rescue that turns out to be none is no longer one in stats(); a counter keeps it."""
    rt = factory(1)
    stats = rt.stats()
    with served(rt) as server:
        for rescued, shown in ((0, 0), (2, 2), (1, 2), (3, 3)):
            monkeypatch.setattr(rt, "stats", lambda n=rescued: dataclasses.replace(stats, rescued=n))
            assert value(scrape(server.address)[0], "leases_total", way="rescued") == shown


def test_health_and_readiness(factory: Factory, tmp_path: Path) -> None:
    rt = factory(1)
    with served(rt) as server:
        rt.submit(abs, 1).result()
        status, text = get(server.address, "/ready")
        assert (status, json.loads(text)) == (200, {"state": "running", "ready": 1, "generation": 1})
        assert get(server.address, "/health")[0] == 200
        gate = Gate(tmp_path)
        future = rt.submit(pass_through, gate.path)
        gate.arrived()
        rt.shutdown(wait=False)
        assert get(server.address, "/ready")[0] == 503
        status, text = get(server.address, "/health")
        assert (status, json.loads(text)["state"]) == (200, "draining")
        gate.open()
        future.result()
        rt.shutdown()
        assert get(server.address, "/metrics")[0] == 503
        for path in ("/health", "/ready"):
            status, text = get(server.address, path)
            assert (status, json.loads(text)["state"]) == (503, "ended")
        gate.close()


def test_a_broken_runtime(factory: Factory) -> None:
    rt = factory(1, preload="no_such_module_anywhere")
    with served(rt) as server:
        assert rt.submit(abs, 1).exception() is not None
        assert get(server.address, "/health")[0] == 503


def test_strange_requests(factory: Factory) -> None:
    with served(factory(1)) as server:
        assert get(server.address, "/")[0] == 404
        assert get(server.address, "/health?verbose=1")[0] == 200
        for request, status in (
            (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
            (b"HEAD /health HTTP/1.1\r\n\r\n", b"200"),
            (b"\x16\x03\x01garbage\r\n\r\n", b"400"),
            (b"GET /metrics\r\n\r\n", b"400"),
            (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 2000, b"400"),
            (b"GET / HT", b"400"),
        ):
            with socket.create_connection(server.address, 30) as client:
                with contextlib.suppress(OSError):
                    client.sendall(request)
                    client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(100).startswith(b"HTTP/1.1 " + status), request


def test_clients_that_say_nothing(factory: Factory) -> None:
    with served(factory(1)) as server, contextlib.ExitStack() as stack:
        for _ in range(metrics.MAX_CLIENTS - 1):
            stack.enter_context(socket.create_connection(server.address, 30)).sendall(b"GET /")
        assert get(server.address, "/health")[0] == 200
        stack.enter_context(socket.create_connection(server.address, 30))
        until(lambda: get(server.address, "/health")[0] == 503)
        stack.close()
        until(lambda: get(server.address, "/health")[0] == 200)


def test_a_fork_of_the_host_does_not_answer(factory: Factory) -> None:
    rt = factory(1)
    with served(rt) as server:
        rt.submit(abs, 1).result()  # no zygote is just being started: until its exec it has what we have
        held, release = os.pipe()
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(release)
            os.write(tell, b".")  # the handlers of the fork have run
            os.read(held, 1)
            os._exit(0)
        os.read(told, 1)
        for fd in (held, told, tell):
            os.close(fd)
        address = server.address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    os.close(release)
    os.waitpid(pid, 0)


def test_ipv6_and_addresses_that_are_none(factory: Factory) -> None:
    rt = factory(1)
    with contextlib.closing(metrics.serve(rt, "[::1]:0")) as server:
        assert get(server.address, "/health")[0] == 200
    with contextlib.closing(metrics.serve(rt, ":0")) as server:
        for host in ("::1", "127.0.0.1"):
            assert get((host, server.address[1]), "/health")[0] == 200
    for address in ("here", "127.0.0.1:99999", "::1:0", "127.0.0.1:٣"):
        with pytest.raises(ValueError, match="not HOST:PORT"):
            metrics.serve(rt, address)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        metrics.serve(rt, taken.getsockname())


def test_without_the_package(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"pip install 'runtime-workers\[metrics\]'"):
        metrics.serve(factory(1), "127.0.0.1:0")


def test_the_dashboard(factory: Factory) -> None:
    """Every metric that it shows exists."""
    dashboard = json.loads((Path(ROOT) / "docs" / "grafana.json").read_text())
    shown = {
        word
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for word in names_in(target["expr"])
    }
    rt = factory(1)
    with served(rt) as server:
        rt.submit(abs, 1).result()
        said = {name for name, _ in scrape(server.address)[0]}
    assert shown <= said and len(shown) > 10
    docs = (Path(ROOT) / "docs" / "operations.md").read_text()
    families = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in said}
    assert not {name for name in families if f"`{name}`" not in docs}


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"runtime_[a-z_]+", expression))


def test_main_programs(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("def main(ctx): ctx.stopping.wait()\n")
    program = Served(tmp_path, "app:main", "--workers", "1", "--metrics", ":0")
    try:
        port = int(program.says("metrics on http://[::]:").split("/metrics")[0].rpartition(":")[2])
        assert get(("127.0.0.1", port), "/ready")[0] == 200
        samples, _ = scrape(("127.0.0.1", port))
        assert value(samples, "workers", status="ready") == 1
        other = Command(tmp_path, "serve", "--name", "other", "--metrics", f"127.0.0.1:{port}", "app:main")
        assert other.end() == 2
        assert f"cannot serve metrics on 127.0.0.1:{port}: Address already in use" in other.log
        program.signal(signal.SIGTERM)
        assert program.end() == 0
    finally:
        program.close()


def test_nobody_pays_who_does_not_ask(factory: Factory) -> None:
    code = "import sys, runtime; runtime.Runtime; print('prometheus_client' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
