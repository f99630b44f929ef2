"""Prometheus metrics of the gateway, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from testbed.gateway.upstreams import Fleet

FINE_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4  # the text format that `generate_latest` writes
COARSE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms by expert; gauges are read from the fleet when asked for."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ersim_requests_total",
            "Requests ended, by expert (none: refused before one was chosen) and HTTP status (0: the client "
            "left before an answer began)",
            ["expert", "status"], registry=self.registry,
        )  # fmt: skip
        self.errors = Counter(
            "ersim_errors_total",
            "Failures by expert and kind: connect, timeout, upstream_status, mid_stream, client_gone, "
            "queue_full, no_replica, policy, internal",
            ["expert", "kind"],
            registry=self.registry,
        )
        self.retries = Counter(
            "ersim_retries_total", "Attempts after the first", ["expert"], registry=self.registry
        )
        self.failovers = Counter(
            "ersim_failovers_total", "Requests handed on to another expert after a failure", ["expert", "to"],
            registry=self.registry,
        )  # fmt: skip
        self.routing_s = Histogram(
            "ersim_routing_seconds", "Time the policy took, by the expert it chose", ["expert"],
            buckets=FINE_S, registry=self.registry,
        )  # fmt: skip
        self.overhead_s = Histogram(
            "ersim_overhead_seconds", "From the request's arrival to its sending upstream, queue excluded",
            buckets=FINE_S, registry=self.registry,
        )  # fmt: skip
        self.ttft_s = Histogram(
            "ersim_ttft_seconds", "From the request's arrival to the first byte upstream", ["expert"],
            buckets=COARSE_S, registry=self.registry,
        )  # fmt: skip
        self._in_flight = Gauge("ersim_in_flight", "Requests under way", ["expert"], registry=self.registry)
        self._queued = Gauge(
            "ersim_queued", "Requests waiting for a slot", ["expert"], registry=self.registry
        )
        self._healthy = Gauge(
            "ersim_replica_healthy", "1 if the replica answers", ["expert", "replica"], registry=self.registry
        )
        self._fleet = fleet

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        for expert in self._fleet.experts:
            self._in_flight.labels(expert.name).set(sum(replica.in_flight for replica in expert.replicas))
            self._queued.labels(expert.name).set(expert.queued)
            for replica in expert.replicas:
                self._healthy.labels(expert.name, str(replica.index)).set(float(replica.healthy))
        return generate_latest(self.registry)
