"""Prometheus metrics of tiers and daemons, collected from their counters at each scrape, and their HTTP server.

Names, types and units follow Prometheus's practices (https://prometheus.io/docs/practices/naming/); docs/metrics.md
lists them in a table.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import Info, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import DIGEST_CHARS
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ConfigError
from moetier.tiers.stats import MetricText, TierStats, declared
from moetier.tiers.threads import start_thread

CONNECTIONS = 64  # most connections to the HTTP server at once: each takes a thread and a descriptor

LABELS = ("model", "tier")

# field of ModelStats: its metric
OF_CLIENTS_NOW = {
    "clients": MetricText("clients", "Processes of this host that are connected."),
    "sessions": MetricText("sessions", "Clients that have a session."),
    "leases": MetricText("leases", "Slots held for clients of this host, or on their way to them."),
    "recovered": MetricText("recovered_slots", "Slots that were reclaimed with their records when the daemon started."),
}
FAULTY = "1 if the model is no longer served: its shards are not of one conversion, or a thread has failed; else 0."
OF_CLIENTS = {
    "requests": MetricText("requests", "Requests of clients for the missing experts of a block."),
    "reported_hits": MetricText("reported_hits", "Hits in the directory, as clients report them."),
    "fetches": MetricText("fetches", "Records, or parts of them, sent to other hosts."),
    "fetched_bytes": MetricText("fetched_bytes", "Bytes of records sent to other hosts."),
    "computed": MetricText("computed_rows", "Outputs of experts computed for other hosts."),
    "session_bytes_in": MetricText("received_bytes", "Bytes of messages from clients of this host."),
    "session_bytes_out": MetricText("sent_bytes", "Bytes of messages to clients of this host."),
}

Tiers = Sequence[tuple[str, TierStats | pb.Tier]]  # counters of tiers, each with its model's name


class DaemonCollector(Collector):
    """Metrics of a daemon's models; ``stats`` returns their counters."""

    def __init__(self, stats: Callable[[], Sequence[pb.ModelStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the models' tiers, clients and faults."""
        models = self._stats()
        count = Counter(model.name for model in models)
        # two stores of one model have the same name
        named = [(m.name if count[m.name] == 1 else f"{m.name} ({m.digest[:DIGEST_CHARS]})", m) for m in models]
        yield from tier_metrics([(name, model.host) for name, model in named])
        rows = [([name], model) for name, model in named]
        yield from _families(GaugeMetricFamily, "moetier_daemon", OF_CLIENTS_NOW, LABELS[:1], rows)
        faulty = GaugeMetricFamily("moetier_daemon_faulty", FAULTY, labels=LABELS[:1])
        for name, model in named:
            faulty.add_metric([name], bool(model.fault))
        yield faulty
        yield from _families(CounterMetricFamily, "moetier_daemon", OF_CLIENTS, LABELS[:1], rows)


def tier_metrics(tiers: Tiers) -> Iterator[Metric]:
    """Yield the metrics of tiers, labelled by model and tier."""
    rows = [([model, tier.name], tier) for model, tier in tiers]
    yield from _families(GaugeMetricFamily, "moetier_tier", declared("gauge"), LABELS, rows)
    yield from _families(CounterMetricFamily, "moetier_tier", declared("counter"), LABELS, rows)
    outcomes = CounterMetricFamily(
        "moetier_tier_prefetch_outcomes",
        "Outcomes of prefetch requests, as far as they are known.",
        labels=[*LABELS, "outcome"],
    )
    loads = HistogramMetricFamily("moetier_tier_load_seconds", "How long loads took.", labels=LABELS)
    waits = SummaryMetricFamily("moetier_tier_wait_seconds", "How long callers waited for records.", labels=LABELS)
    for labels, tier in rows:
        for name, outcome in declared("outcome").items():
            outcomes.add_metric([*labels, outcome], getattr(tier, name))
        bounds = [*map(repr, tier.load_bounds), "+Inf"]
        loads.add_metric(labels, list(zip(bounds, accumulate(tier.loads), strict=True)), tier.load_seconds)
        waits.add_metric(labels, tier.waits, tier.wait_seconds)
    yield from (outcomes, loads, waits)


def _families(
    family: type[GaugeMetricFamily | CounterMetricFamily],
    prefix: str,
    fields: Mapping[str, MetricText],
    labels: Sequence[str],
    rows: Sequence[tuple[list[str], object]],
) -> Iterator[Metric]:
    """Yield a metric of type ``family`` for each of ``fields``, with a sample for each of ``rows``.

    A row is a pair: the values of the ``labels``, and an object that has the fields.
    """
    for field, metric in fields.items():
        sampled = family(f"{prefix}_{metric.name}", metric.help, labels=labels)
        for values, counters in rows:
            if (value := getattr(counters, field)) is not None:
                sampled.add_metric(values, value)
        yield sampled


def registry_of(collector: Collector) -> CollectorRegistry:
    """Return a registry with ``collector``, the metrics of this process, and moetier's version."""
    registry = CollectorRegistry()
    registry.register(collector)
    Info("moetier_build", "Version of moetier.", registry=registry).info({"version": version("moetier")})
    ProcessCollector(registry=registry)
    return registry


class MetricsServer(Closeable):
    """HTTP server for metrics and /healthz, which runs until ``close``. ``address`` is its HOST:PORT."""

    def __init__(self, address: str, registry: CollectorRegistry, is_serving: Callable[[], bool]) -> None:
        """Listen on ``address``, a HOST:PORT. Raises ConfigError if that is not possible.

        /healthz answers with status 200 while ``is_serving()`` is true, else with 503. Every other path answers with
        the metrics.
        """
        host, _, port = address.rpartition(":")
        try:
            family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, place)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"Metrics can't be served on {address}: {getattr(error, 'strerror', None) or error}.",
                "Check which process listens there, or choose another address with --metrics.",
            ) from None
        metrics: Any = make_wsgi_app(registry)

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ["PATH_INFO"] != "/healthz":
                return metrics(environ, start_response)
            status, text = ("200 OK", b"SERVING\n") if is_serving() else ("503 Service Unavailable", b"NOT_SERVING\n")
            start_response(status, [("Content-Type", "text/plain"), ("Cache-Control", "no-store")])
            return [text]

        self._server.set_app(answer)
        with contextlib.ExitStack() as undo:
            undo.callback(self._server.server_close)
            self._thread = start_thread("moetier-metrics", self._server.serve_forever)
            undo.pop_all()
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    """HTTP server with a thread for each connection. Beyond CONNECTIONS, a new connection closes the oldest one."""

    daemon_threads = True
    request_queue_size = 128  # with the default of 5, further connections are delayed by a second

    def __init__(self, family: int, place: Any) -> None:
        self.address_family = family
        self._open: dict[socket.socket, None] = {}  # oldest first
        self._state = threading.Lock()  # guards: ``_open``
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        super(WSGIServer, self).server_bind()  # skips HTTPServer's lookup of the host's name
        name, self.server_port, *_ = self.server_address
        self.server_name = str(name)
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._state:
            if len(self._open) >= CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # wakes the connection's thread, which closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._state:
            self._open.pop(request, None)
            super().shutdown_request(request)


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds for a request to come, and for its answer to be taken

    def handle(self) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: scrapes come every few seconds."""
