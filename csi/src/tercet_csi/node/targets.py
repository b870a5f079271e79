"""Where a volume is reached, as whom, and over which paths just now."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from tercet_csi.errors import InvalidArgument
from tercet_csi.node.discovery import Endpoint


def endpoint(address: str, port: int) -> Endpoint:
    """An endpoint that is equal to another of the same place. Raises ValueError."""
    return str(ipaddress.ip_address(address)), port


@dataclass(frozen=True)
class Target:
    """Where a volume is reached and as whom; what the publish context says."""

    nqn: str
    host_nqn: str
    host_id: str
    endpoints: tuple[tuple[str, int], ...]

    @classmethod
    def from_context(cls, context: dict[str, str]) -> Target:
        """Read a publish context. Raises InvalidArgument when a key is missing or malformed."""
        try:
            pairs = [end.rsplit(":", 1) for end in context["endpoints"].split(",")]
            endpoints = tuple((address, int(port)) for address, port in pairs)
            return cls(context["nqn"], context["hostNqn"], context["hostId"], endpoints)
        except (KeyError, ValueError) as error:
            raise InvalidArgument(
                f"publish_context lacks or garbles {error}: it must be what "
                "ControllerPublishVolume returned"
            ) from None


@dataclass(frozen=True)
class Paths:
    """The paths of an attached volume."""

    endpoints: frozenset[Endpoint]
    optimized: Endpoint | None
    """Of the member that serves, if this host sees one."""

    @classmethod
    def of(cls, optimized: Mapping[Endpoint, bool]) -> Paths:
        """Of each endpoint whether its path is optimized. Two that claim it: neither counts."""
        best = [found for found, is_best in optimized.items() if is_best]
        return cls(frozenset(optimized), best[0] if len(best) == 1 else None)
