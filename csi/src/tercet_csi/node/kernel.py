"""The kernel's own NVMe/TCP host: connect through /dev/nvme-fabrics, find the device in sysfs.

A device is found by its subsystem's NQN, never by a name like nvme0n1. One connect or disconnect
at a time: the kernel's option parser answers a concurrent duplicate with EALREADY, which is fine,
but a disconnect that overlaps a connect is not. `connecting` counts as connected: with
ctrl_loss_tmo=-1 I/O waits, it never errors (docs/replication.md H1).
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tercet_csi.errors import DeadlineExceeded, Unavailable
from tercet_csi.node.discovery import Endpoint
from tercet_csi.node.targets import Paths, Target, endpoint

SYSFS = Path("/sys/class")
DEVICE_TIMEOUT_S = 30.0
GONE_TIMEOUT_S = 30.0
POLL_S = 0.05
KEEP_ALIVE_S = 5
RECONNECT_S = 1


def connect_options(target: Target, address: str, port: int) -> str:
    """What is written to /dev/nvme-fabrics for one path."""
    return (
        f"transport=tcp,traddr={address},trsvcid={port},nqn={target.nqn},"
        f"hostnqn={target.host_nqn},hostid={target.host_id},ctrl_loss_tmo=-1,"
        f"keep_alive_tmo={KEEP_ALIVE_S},reconnect_delay={RECONNECT_S}"
    )


class KernelAttacher:
    """Attach by the kernel. `fabrics` and `sysfs` are given for tests."""

    def __init__(self, fabrics: Path, sysfs: Path = SYSFS) -> None:
        self._fabrics = fabrics
        self._sysfs = sysfs
        self._one_at_a_time = asyncio.Lock()

    async def attach(self, target: Target) -> str:
        """Connect every path and wait for the device.

        Raises Unavailable when no path answers, DeadlineExceeded when no device appears.
        """
        async with self._one_at_a_time:
            failures = await self._connect_all(target, target.endpoints)
            if len(failures) == len(target.endpoints):
                raise Unavailable(f"no path to {target.nqn}: {'; '.join(failures)}")
        return await self._wait_for_device(target.nqn)

    async def _connect_all(self, target: Target, endpoints: Iterable[Endpoint]) -> list[str]:
        """What went wrong, of each that failed."""
        failures = []
        for address, port in endpoints:
            options = connect_options(target, address, port)
            code = await asyncio.to_thread(self._connect, options)
            if code not in (0, errno.EALREADY):
                failures.append(f"{address}:{port} {os.strerror(code)}")
        return failures

    def _connect(self, options: str) -> int:
        try:
            with self._fabrics.open("r+b", buffering=0) as control:
                control.write(options.encode())
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    async def _wait_for_device(self, nqn: str) -> str:
        deadline = asyncio.get_running_loop().time() + DEVICE_TIMEOUT_S
        while True:
            device = await self.device_of(nqn)
            if device is not None:
                return device
            if asyncio.get_running_loop().time() > deadline:
                raise DeadlineExceeded(
                    f"{nqn} is connected but shows no namespace after {DEVICE_TIMEOUT_S:.0f} s: "
                    "has the volume a serving primary?"
                )
            await asyncio.sleep(POLL_S)

    async def device_of(self, nqn: str) -> str | None:
        """The multipath device of the subsystem, or none."""
        subsystem = self._subsystem(nqn)
        if subsystem is None:
            return None
        heads = sorted(
            entry.name
            for entry in subsystem.iterdir()
            if entry.name.startswith("nvme")
            and "c" not in entry.name.removeprefix("nvme")
            and "n" in entry.name.removeprefix("nvme")
        )
        return f"/dev/{heads[0]}" if heads else None

    def _subsystem(self, nqn: str) -> Path | None:
        folder = self._sysfs / "nvme-subsystem"
        if not folder.is_dir():
            return None
        for entry in folder.iterdir():
            name = entry / "subsysnqn"
            if name.exists() and name.read_text().strip() == nqn:
                return entry
        return None

    async def detach(self, nqn: str) -> None:
        """Delete every controller of the subsystem and wait until it is gone."""
        async with self._one_at_a_time:
            for controller in self._controllers(nqn):
                remove = controller / "delete_controller"
                await asyncio.to_thread(remove.write_text, "1")
            deadline = asyncio.get_running_loop().time() + GONE_TIMEOUT_S
            while self._controllers(nqn):
                if asyncio.get_running_loop().time() > deadline:
                    raise DeadlineExceeded(f"{nqn} is still connected after a disconnect")
                await asyncio.sleep(POLL_S)

    def _controllers(self, nqn: str) -> list[Path]:
        return [entry for entry, of in self._all_controllers() if of == nqn]

    def _all_controllers(self) -> list[tuple[Path, str]]:
        """Every controller and the NQN of its subsystem; one that goes meanwhile is not there."""
        folder = self._sysfs / "nvme"
        found = []
        for entry in folder.iterdir() if folder.is_dir() else ():
            with suppress(OSError):
                found.append((entry, (entry / "subsysnqn").read_text().strip()))
        return found

    async def paths(self) -> Mapping[str, Paths]:
        """Out of sysfs: each controller over TCP is a path, one that connects counts."""
        found: dict[str, dict[Endpoint, bool]] = {}
        for controller, nqn in self._all_controllers():
            if (where := _where(controller)) is not None:
                found.setdefault(nqn, {})[where] = _is_optimized(controller)
        return {nqn: Paths.of(of) for nqn, of in found.items()}

    async def set_paths(self, target: Target) -> None:
        """Delete what is not wanted, then connect what is missing. Raises Unavailable.

        In this order: a newcomer has the CNTLIDs of the member whose place it takes, and the kernel
        refuses a second controller of one number. The last path stays until another is there.
        """
        async with self._one_at_a_time:
            controllers = {_where(each): each for each in self._controllers(target.nqn)}
            wanted = set(target.endpoints)
            if not controllers.keys() & wanted:
                raise Unavailable(f"no path of {target.nqn} would stay")
            for where, controller in controllers.items():
                if where is not None and where not in wanted:
                    remove = controller / "delete_controller"
                    with suppress(FileNotFoundError):
                        await asyncio.to_thread(remove.write_text, "1")
            failures = await self._connect_all(target, sorted(wanted - controllers.keys()))
        if failures:
            raise Unavailable(f"new paths of {target.nqn}: {'; '.join(failures)}")

    async def ready(self) -> bool:
        """Whether the kernel's host is there."""
        return self._fabrics.exists()


def _where(controller: Path) -> Endpoint | None:
    """The endpoint of a controller's `address`: traddr=ADDRESS,trsvcid=PORT[,...]."""
    try:
        text = (controller / "address").read_text().strip()
        fields = dict(part.split("=", 1) for part in text.split(","))
        return endpoint(fields["traddr"], int(fields["trsvcid"]))
    except (OSError, KeyError, ValueError):
        return None


def _is_optimized(controller: Path) -> bool:
    """Whether a namespace of the controller is there and its path is optimized."""
    for state in controller.glob("nvme*c*n*/ana_state"):
        with suppress(OSError):
            return state.read_text().strip() == "optimized"
    return False
