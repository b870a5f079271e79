"""The pod network of a node in provider `kind`: point-to-point links, routes to the other nodes.

Every node can reach every other directly, so a network of pods takes three things: a configuration
that gives each pod an address of this node's range, a route to the range of each other node, and
masquerading of what leaves the pods' subnet. All three follow from the Node objects alone, and are
made again each round: a node that was stopped has lost its routes.

Runs by itself on the node's Python: standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONFIGURATION = Path("/etc/cni/net.d/10-podnet.conflist")
REQUEST_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 10.0
ROUND_S = 2.0
MTU_BYTES = 1500


@dataclass(frozen=True)
class Plan:
    """What has to hold on this node."""

    configuration: str
    """The CNI's file; empty while this node has no range yet."""
    routes: tuple[tuple[str, str], ...]
    """(range of pods, address of their node)."""
    packet_rules: str
    """For nft; replaces what stood there."""


def decide(nodes: Iterable[Mapping[str, Any]], me: str, pod_subnet: str) -> Plan:
    """What follows from the Node objects for the node `me`."""
    configuration = ""
    routes: list[tuple[str, str]] = []
    for node in nodes:
        pods = node["spec"].get("podCIDR")
        if not pods:
            continue
        if node["metadata"]["name"] == me:
            configuration = cni(pods)
            continue
        routes += [
            (pods, entry["address"])
            for entry in node.get("status", {}).get("addresses", [])
            if entry["type"] == "InternalIP" and ":" not in entry["address"]
        ]
    rules = (
        "add table ip podnet\nflush table ip podnet\n"
        "table ip podnet {\n chain leaving {\n  type nat hook postrouting priority 100;\n"
        f"  ip saddr {pod_subnet} ip daddr != {pod_subnet} masquerade\n }}\n}}\n"
    )
    return Plan(configuration, tuple(sorted(routes)), rules)


def cni(pods: str) -> str:
    """The CNI's configuration for a range of pods."""
    ranges = {"ranges": [[{"subnet": pods}]], "routes": [{"dst": "0.0.0.0/0"}]}
    ipam = {"type": "host-local", "dataDir": "/run/podnet"} | ranges
    link = {"type": "ptp", "ipMasq": False, "mtu": MTU_BYTES, "ipam": ipam}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "0.4.0", "name": "podnet", "plugins": [link, ports]})


def carry_out(plan: Plan) -> None:
    """Make it so; the configuration last, since the node is ready when it is there."""
    for pods, address in plan.routes:
        run(["ip", "route", "replace", pods, "via", address])
    run(["nft", "-f", "-"], plan.packet_rules)
    known = CONFIGURATION.read_text() if CONFIGURATION.exists() else ""
    if plan.configuration and plan.configuration != known:
        partial = CONFIGURATION.with_name(".podnet.partial")
        partial.write_text(plan.configuration)
        partial.rename(CONFIGURATION)
        print(f"pods of this node: {plan.configuration}", flush=True)


def run(command: list[str], stdin: str = "") -> None:
    """Run a program; its words are in the error."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def list_nodes() -> list[dict[str, Any]]:
    """All Node objects."""
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    port = int(os.environ["KUBERNETES_SERVICE_PORT"])
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    connection = http.client.HTTPSConnection(host, port, timeout=REQUEST_TIMEOUT_S, context=trust)
    try:
        token = (ACCOUNT / "token").read_text()
        connection.request("GET", "/api/v1/nodes", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.client.OK:
            raise OSError(f"the API server answers {answer.status}: {body[:300]!r}")
        items: list[dict[str, Any]] = json.loads(body)["items"]
        return items
    finally:
        connection.close()


def main(arguments: list[str]) -> None:
    """Follow the Node objects for ever."""
    pod_subnet = arguments[0]
    me = os.environ["NODE_NAME"]
    while True:
        try:
            carry_out(decide(list_nodes(), me, pod_subnet))
        except (OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
            print(f"again in {ROUND_S:.0f} s: {error}", flush=True)
        time.sleep(ROUND_S)


if __name__ == "__main__":
    main(sys.argv[1:])
