"""The operator's metrics, one registry for a process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """What is counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leading = Gauge(
            "tercet_operator_leading", "Whether this operator leads.", registry=self.registry
        )
        self.objects = Gauge(
            "tercet_operator_objects", "Objects known.", ["kind"], registry=self.registry
        )
        self.volumes = Gauge(
            "tercet_operator_volumes", "Volumes by phase.", ["phase"], registry=self.registry
        )
        self.passes = Counter(
            "tercet_operator_passes",
            "Objects looked at, by how it ended.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.pass_seconds = Histogram(
            "tercet_operator_pass_seconds",
            "Time that one look at an object took.",
            ["kind"],
            registry=self.registry,
        )
        self.transitions = Counter(
            "tercet_operator_transitions",
            "Events posted, by kind and reason.",
            ["kind", "reason"],
            registry=self.registry,
        )
        self.configured = Counter(
            "tercet_operator_configured", "First configurations.", registry=self.registry
        )
        self.certificates = Counter(
            "tercet_operator_certificates",
            "Certificate requests, by how they ended.",
            ["outcome"],
            registry=self.registry,
        )
