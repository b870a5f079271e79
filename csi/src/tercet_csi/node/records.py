"""What is staged on this node, one small file for each volume, so that a restart knows.

A record is written before anything is attached and removed after everything is detached: a crash
in between leaves a record whose volume is unstaged again by the caller, which is idempotent.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tercet_api.names import is_uuid
from tercet_csi.errors import InvalidArgument


@dataclass(frozen=True)
class Staged:
    """A staged volume."""

    volume: str
    nqn: str
    staging_path: str
    block: bool
    read_only: bool
    targets: tuple[str, ...] = ()
    """Where it is or was about to be published; whether it still is, the kernel says."""

    def with_target(self, target: str) -> Staged:
        """The same with this target among the others."""
        return replace(self, targets=(*(t for t in self.targets if t != target), target))

    def without_target(self, target: str) -> Staged:
        """The same without it."""
        return replace(self, targets=tuple(t for t in self.targets if t != target))


class Records:
    """The records in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, volume: str) -> Path:
        if not is_uuid(volume):
            raise InvalidArgument(f"volume_id {volume!r} is no id of a Tercet volume (a UUID)")
        return self._folder / f"{volume}.json"

    def get(self, volume: str) -> Staged | None:
        """The record, or none."""
        path = self._path(volume)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return Staged(**found | {"targets": tuple(found.get("targets", ()))})

    def all(self) -> list[Staged]:
        """Every record."""
        found = (self.get(path.stem) for path in sorted(self._folder.glob("*.json")))
        return [record for record in found if record is not None]

    def put(self, record: Staged) -> None:
        """Write durably: to a temporary file, then renamed."""
        path = self._path(record.volume)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(asdict(record), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def remove(self, volume: str) -> None:
        """Forget; nothing when there is none."""
        self._path(volume).unlink(missing_ok=True)
