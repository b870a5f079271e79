"""Histories of hosts, judged by Porcupine (tools/linearizable): built here, run on the files."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tercet_e2e.binaries import Binaries, Tool, modules_dir
from tercet_e2e.errors import E2eError

MODULE = "linearizable"
LIMIT_S = 120
COUNTS = ("operations", "reads", "writes", "zeroes", "unknown", "failed", "sent_again")
DIGEST_CHARACTERS = 12
DECIDED = (0, 1)
"""Exit codes: linearizable, or not."""


class JudgeError(E2eError):
    """A history cannot be judged."""


def program() -> Path:
    """The judge, built when its sources are new: it is ours, so a version does not name it."""
    sources = sorted(path for path in (modules_dir() / MODULE).iterdir() if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    tool = Tool(MODULE, f"v1.3.1-{digest[:DIGEST_CHARACTERS]}", MODULE, ".", ("-version",), ())
    return Binaries.default().build(tool)


async def judge(
    judging: Path, histories: Mapping[str, Sequence[Path]], picture: Path
) -> dict[str, Any]:
    """Counts, verdict and, of a bad history, its story; the files of a host are its lives in order.

    Raises JudgeError when there is no verdict.
    """
    files = [f"{host}={path}" for host, paths in histories.items() for path in paths]
    process = await asyncio.create_subprocess_exec(
        *(str(judging), "-limit", f"{LIMIT_S}s", "-picture", str(picture), *files),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, complaint = await process.communicate()
    if process.returncode not in DECIDED:
        said = (told + complaint).decode(errors="replace")[-2000:]
        raise JudgeError(f"no verdict on {len(files)} histories: {said}")
    found: dict[str, Any] = json.loads(told)
    return found
