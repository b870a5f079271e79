"""build/bench.json: rows {suite, case, value, unit, floor, ratio, goal, holds}.

Each benchmark replaces the rows of its own suites and leaves the others, so that they can be run
one by one and be reported together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def path(root: Path) -> Path:
    """Where the rows are."""
    return root / "build" / "bench.json"


def write(root: Path, rows: Iterable[Row]) -> None:
    """Take these in place of all rows of the same suites."""
    new = list(rows)
    suites = {row["suite"] for row in new}
    file = path(root)
    file.parent.mkdir(exist_ok=True)
    old = json.loads(file.read_text()) if file.exists() else []
    kept = [row for row in old if row["suite"] not in suites]
    file.write_text(json.dumps(kept + new, indent=1) + "\n")
