"""Metrics of the agent, and the engine's counters passed on under their own names.

The engine knows what it counts; the agent adds only the prefix `tercet_` and scrapes nothing
itself: the last Status (never older than a few seconds) is what a scrape shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tercet_node.members.figures import Figures
from tercet_node.protos import engine_pb2 as pb

SERIES_MAX = 20_000
SWAP_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 30.0)
_NAME = re.compile(r"^[a-z][a-z0-9_]{0,127}$")

StatusSource = Callable[[], pb.StatusResponse | None]


class Metrics:
    """The agent's registry."""

    def __init__(self, status: StatusSource) -> None:
        self.registry = CollectorRegistry()
        self.swap_seconds = Histogram(
            "tercet_agent_swap_seconds",
            "Time from the engine's request to the API server's answer",
            registry=self.registry,
            buckets=SWAP_BUCKETS_S,
        )
        self.swaps = Counter(
            "tercet_agent_swaps_total",
            "Compare-and-swaps by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self.notices_dropped = Counter(
            "tercet_agent_notices_dropped_total",
            "Notices that became no event: the queue was full or they came too often",
            registry=self.registry,
        )
        self.certificate_expires = Gauge(
            "tercet_agent_certificate_expires_timestamp_seconds",
            "When the node certificate ends",
            registry=self.registry,
        )
        self.membership = Figures(self.registry)
        self.registry.register(_EngineCollector(status))


class _EngineCollector(Collector):
    """The engine's counters, devices and replicas as of the last Status."""

    def __init__(self, status: StatusSource) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """All series; none but `up` while the engine is away."""
        status = self._status()
        up = GaugeMetricFamily("tercet_engine_up", "Whether this node's engine answers")
        up.add_metric([], 0.0 if status is None else 1.0)
        yield up
        if status is None:
            return
        yield from _devices(status)
        yield from _replicas(status)
        yield from _counters(status)


def _devices(status: pb.StatusResponse) -> Iterable[Metric]:
    for name, text, field in (
        ("tercet_device_capacity_bytes", "Size of a device's data area", "capacity_bytes"),
        ("tercet_device_allocated_bytes", "Bytes in chunks", "allocated_bytes"),
    ):
        family = GaugeMetricFamily(name, text, labels=["device"])
        for device in status.devices:
            family.add_metric([device.id], float(getattr(device, field)))
        yield family


def _replicas(status: pb.StatusResponse) -> Iterable[Metric]:
    serving = GaugeMetricFamily(
        "tercet_replica_serving", "Whether the replica here serves as primary", labels=["volume"]
    )
    epoch = GaugeMetricFamily("tercet_replica_epoch", "The promised epoch", labels=["volume"])
    for replica in status.replicas[:SERIES_MAX]:
        serving.add_metric([replica.name], float(replica.serving))
        epoch.add_metric([replica.name], float(replica.epoch))
    yield serving
    yield epoch
    yield from _copies(status)


def _copies(status: pb.StatusResponse) -> Iterable[Metric]:
    """What is rebuilt from here (C3); the rate is that of the counter."""
    labels = ["volume", "node"]
    for name, text, field in (
        ("tercet_rebuild_total_bytes", "Size of the volume and its snapshots", "total_bytes"),
        ("tercet_rebuild_done_bytes", "What is equal already", "done_bytes"),
        ("tercet_rebuild_sent_bytes", "What was sent in this epoch", "sent_bytes"),
    ):
        family = GaugeMetricFamily(name, text, labels=labels)
        for replica in status.replicas[:SERIES_MAX]:
            for member in replica.members:
                if member.HasField("copy"):
                    family.add_metric([replica.name, member.node], getattr(member.copy, field))
        yield family


def _counters(status: pb.StatusResponse) -> Iterable[Metric]:
    """Counters by name; the labels of a family are those of its first series."""
    families: dict[str, tuple[tuple[str, ...], Metric]] = {}
    for counter in status.counters[:SERIES_MAX]:
        if _NAME.match(counter.name) is None:
            continue
        labels = tuple(sorted(counter.labels))
        if counter.name not in families:
            families[counter.name] = (labels, _family(counter.name, labels))
        known, family = families[counter.name]
        if known == labels:
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric([counter.labels[label] for label in labels], counter.value)
    for _, family in families.values():
        yield family


def _family(name: str, labels: tuple[str, ...]) -> Metric:
    text = "Counted by the engine"
    if name.endswith("_total"):
        return CounterMetricFamily(f"tercet_{name}", text, labels=labels)
    return GaugeMetricFamily(f"tercet_{name}", text, labels=labels)
