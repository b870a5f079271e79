"""What the membership counts: `tercet_membership_*`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class Figures:
    """The membership's metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tercet_membership_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tercet_membership_{name}", text, labels, registry=registry)

        self.nodes = gauge("nodes", "Nodes in the list, by what this node holds of them", "state")
        self.locked = gauge("locked", "Whether a person has locked this node's list")
        self.connections = gauge("connections", "Connections that are up")
        self.messages = counter("messages_total", "Messages", "direction", "kind")
        self.bytes = counter("bytes_total", "Bytes of messages, without TLS", "direction")
        self.dropped = counter("dropped_total", "Messages not sent: no connection, or a full one")
        self.refused = counter("refused_total", "Messages and connections refused", "reason")
        self.changes = counter("changes_total", "Entries of the list that changed", "cause")
        self.suspicions = counter("suspicions_total", "Neighbours that did not answer in time")
        self.verdicts = counter("verdicts_total", "Judgements taken up", "verdict")
        self.calls_failed = counter("calls_failed_total", "Connections that could not be opened")
