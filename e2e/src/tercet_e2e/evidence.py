"""Rows of evidence: what a test has counted, appended for build/evidence.json (see `tiers`)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tercet_e2e.tiers import EVIDENCE


def record(evidence: str, count: int, violations: int, seconds: float) -> None:
    """Append a row, where the tiers ask for it; nothing elsewhere."""
    path = os.environ.get(EVIDENCE)
    if path is None:
        return
    row = {
        "evidence": evidence,
        "count": count,
        "violations": violations,
        "seconds": round(seconds, 1),
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(row) + "\n")
