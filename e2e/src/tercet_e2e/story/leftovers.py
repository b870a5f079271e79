"""What a cluster may have left behind: mounts, loop devices, processes."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path


def leftovers(root: Path) -> list[str]:
    """Everything below `root` that is still mounted, looped or running; empty when all is gone."""
    found = [
        f"mounted {line.split(' ')[4]}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split(" ")[4].startswith(str(root))
    ]
    looped = subprocess.run(["losetup", "--all"], capture_output=True, text=True, check=True)
    found += [f"loop {line}" for line in looped.stdout.splitlines() if str(root) in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(root) in command:
                    found.append(f"running {entry.name}: {command[:200]}")
    return found
