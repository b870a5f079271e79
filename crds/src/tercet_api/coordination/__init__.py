"""Recipes of coordination over the API server's objects. Importing this imports a client.

- `swap`: a volume's configuration, changed by compare-and-swap (every agent, and the operator once)
- `membership`: a Lease for each StorageNode, ephemeral in effect (agents renew, operator judges)
- `election`: one of several operators leads (a Lease)
"""

from tercet_api.coordination.election import Election
from tercet_api.coordination.lease import Lease, LeaseSpec, leases
from tercet_api.coordination.membership import Sighting, renew_node_lease, sight
from tercet_api.coordination.swap import Lost, Refusal, Swap, Swapped, Unknown, swap_config

__all__ = [
    "Election",
    "Lease",
    "LeaseSpec",
    "Lost",
    "Refusal",
    "Sighting",
    "Swap",
    "Swapped",
    "Unknown",
    "leases",
    "renew_node_lease",
    "sight",
    "swap_config",
]
