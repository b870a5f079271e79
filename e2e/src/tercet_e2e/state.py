"""The state folder of a cluster: everything that a cluster leaves on disk lies below it.

    cluster.json      the cluster's id
    lock              held (flock) by the tool that runs the cluster, so it ends with that tool
    pki/ etcd/        certificates and the truth
    kubeconfigs/      one for each identity
    processes/        what was started: pid and start time, for a later clean-up
    logs/             one file for each process
    nodes/<name>/     what belongs to one node: the kubelet's folder, devices, sockets

Unix socket addresses hold 107 bytes, and CSI puts a socket deep below: so the path must be short.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NewType

from tercet_e2e.errors import StateError

ClusterId = NewType("ClusterId", str)

STATE_PATH_BYTES_MAX = 48
MARKER = "TERCET_CLUSTER"  # in the environment of every process of a cluster: its id
ROLE = "TERCET_ROLE"  # what a process is; kubelets and containers are ended first


@dataclass(frozen=True, slots=True)
class StateFolder:
    """Paths below one folder. Holds no handle: see `claim`."""

    root: Path

    @classmethod
    def at(cls, root: Path) -> StateFolder:
        """The folder at a path, if sockets fit below it."""
        resolved = root.resolve()
        if len(os.fsencode(resolved)) > STATE_PATH_BYTES_MAX:
            raise StateError(
                f"state folder {resolved} has a path of more than {STATE_PATH_BYTES_MAX} bytes: "
                "sockets below it would not fit into a Unix address; take a shorter one"
            )
        return cls(resolved)

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.root / "pki"

    @property
    def etcd(self) -> Path:
        """Etcd's data."""
        return self.root / "etcd"

    @property
    def kubeconfigs(self) -> Path:
        """Kubeconfigs."""
        return self.root / "kubeconfigs"

    @property
    def processes(self) -> Path:
        """Records of what was started."""
        return self.root / "processes"

    @property
    def logs(self) -> Path:
        """Logs."""
        return self.root / "logs"

    @property
    def cluster_file(self) -> Path:
        """The file with the cluster's id."""
        return self.root / "cluster.json"

    def node(self, name: str) -> Path:
        """The folder of a node."""
        return self.root / "nodes" / name

    def kubeconfig(self, identity: str) -> Path:
        """The kubeconfig of an identity."""
        return self.kubeconfigs / f"{identity}.yaml"

    def cluster_id(self) -> ClusterId | None:
        """The id of the cluster that was started here last, if any."""
        try:
            return ClusterId(json.loads(self.cluster_file.read_text())["id"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError) as error:
            raise StateError(f"{self.cluster_file} is damaged: remove the folder") from error

    def prepare(self) -> ClusterId:
        """Makes the folders; a folder keeps its cluster's id for life."""
        for folder in (self.pki, self.etcd, self.kubeconfigs, self.processes, self.logs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = self.cluster_id()
        if known is not None:
            return known
        fresh = ClusterId(uuid.uuid4().hex)
        write_atomically(self.cluster_file, json.dumps({"id": fresh}))
        return fresh

    def claim(self) -> IO[str]:
        """Takes the folder for this process until the returned file is closed."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = (self.root / "lock").open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise StateError(
                f"a cluster runs in {self.root} (held by process {holder}): "
                f"end it first with `down --state {self.root}`"
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        return handle

    def holder(self) -> int | None:
        """The process that runs this cluster, or None when nobody does."""
        path = self.root / "lock"
        if not path.exists():
            return None
        with path.open("r+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(handle.read().strip() or 0) or None
        return None


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Readers see the old file or the new one, also after a crash of this process."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text)
    partial.rename(path)
