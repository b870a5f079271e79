"""`coordination.k8s.io/v1` Lease as a typed model: what membership and election stand on."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import ClassVar

from pydantic import Field

from tercet_api.clients import Api, Objects
from tercet_api.names import NAMESPACE
from tercet_api.objects import Model, Object


class LeaseSpec(Model):
    """Who holds it, since when, and for how long a renewal counts."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class Lease(Object):
    """A Lease."""

    API_VERSION: ClassVar[str] = "coordination.k8s.io/v1"
    KIND: ClassVar[str] = "Lease"
    spec: LeaseSpec = Field(default_factory=LeaseSpec)


def leases(api: Api, namespace: str = NAMESPACE) -> Objects[Lease]:
    """The Leases of Tercet's namespace."""
    return Objects(api, Lease, "leases", namespace=namespace)


def micro_time(now: datetime) -> str:
    """A metav1.MicroTime."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """A metav1.Time or MicroTime. Raises ValueError."""
    return datetime.fromisoformat(text)
