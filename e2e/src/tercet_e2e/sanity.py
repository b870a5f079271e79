"""csi-sanity, the independent judge of CSI drivers, run against two endpoints and read out.

The program comes from its pinned Go module (`binaries`); its verdict is Ginkgo's JSON report. Which
verdicts are good enough is left to the test: here is only what was said.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tercet_e2e.errors import ProcessError

Access = Literal["mount", "block"]

VOLUME_BYTES = 64 << 20
EXPANDED_BYTES = 128 << 20
TIMEOUT_S = 900.0
TAIL_CHARS = 4000
SEED = 1
"""Of the order of its groups: the same every time, so that a failure can be met again."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One thing that it asks."""

    name: str
    state: str  # passed, skipped, pending (switched off in csi-sanity itself), failed, ...
    message: str  # why it was skipped or has failed
    seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that one run has asked."""

    specs: Sequence[Spec]

    def of(self, *states: str) -> list[Spec]:
        """Those that ended in one of the states."""
        return [spec for spec in self.specs if spec.state in states]

    @property
    def failed(self) -> list[Spec]:
        """Those that neither passed nor were left out."""
        return [s for s in self.specs if s.state not in {"passed", "skipped", "pending"}]

    @property
    def run(self) -> list[Spec]:
        """Those that were asked."""
        return [s for s in self.specs if s.state not in {"skipped", "pending"}]


def command(program: Path, node: Path, controller: Path, access: Access, folder: Path) -> list[str]:
    """The command line; sockets of the two services, and an empty folder for its mounts."""
    return [
        str(program),
        f"--csi.endpoint=unix://{node}",
        f"--csi.controllerendpoint=unix://{controller}",
        f"--csi.testvolumeaccesstype={access}",
        f"--csi.testvolumesize={VOLUME_BYTES}",
        f"--csi.testvolumeexpandsize={EXPANDED_BYTES}",
        "--csi.testnodevolumeattachlimit=true",
        f"--csi.mountdir={folder / 'mount'}",
        f"--csi.stagingdir={folder / 'staging'}",
        f"--ginkgo.json-report={folder / 'report.json'}",
        f"--ginkgo.seed={SEED}",
        f"--ginkgo.timeout={TIMEOUT_S:.0f}s",
        "--ginkgo.no-color",
    ]


async def judge(
    program: Path, node: Path, controller: Path, access: Access, folder: Path
) -> Verdict:
    """Run it; the folder is made and keeps its report and its words (`log`).

    Raises ProcessError with the end of its words when it ends without a report, or never.
    """
    folder.mkdir()
    argv = command(program, node, controller, access, folder)
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log, cwd=folder)
        try:
            # Ginkgo's own limit comes first, and still writes a report.
            await asyncio.wait_for(process.wait(), TIMEOUT_S + 60.0)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    words = (folder / "log").read_text(errors="replace")
    report = folder / "report.json"
    if not report.exists():
        raise ProcessError(
            f"csi-sanity ended with {process.returncode} and without a report; the end of "
            f"{folder / 'log'}:\n{words[-TAIL_CHARS:]}"
        )
    return read_report(report.read_text())


def read_report(text: str) -> Verdict:
    """Ginkgo's JSON report: its specs, and what failed around them (BeforeSuite and the like)."""
    specs = []
    for suite in json.loads(text):
        for entry in suite["SpecReports"] or []:
            spec = _spec(entry)
            if entry["LeafNodeType"] == "It" or spec.state != "passed":
                specs.append(spec)
    return Verdict(tuple(specs))


def _spec(entry: dict[str, Any]) -> Spec:
    names = [*(entry.get("ContainerHierarchyTexts") or []), entry["LeafNodeText"]]
    return Spec(
        name=" / ".join(names),
        state=entry["State"],
        message=(entry.get("Failure") or {}).get("Message", ""),
        seconds=entry["RunTime"] / 1e9,
    )
