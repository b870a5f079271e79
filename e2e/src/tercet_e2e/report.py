"""Prints what `make test` and `make bench` have measured, as tables.

build/evidence.json: rows {evidence, count, violations, seconds}.
build/bench.json: rows {suite, case, value, unit, floor, ratio, goal, holds}.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

EVIDENCE_COLUMNS = ("evidence", "count", "violations", "seconds")
BENCH_COLUMNS = ("suite", "case", "value", "unit", "floor", "ratio", "goal", "holds")


def report(root: Path) -> int:
    """Print both tables; returns 1 when neither file is there."""
    console = Console()
    found = False
    for name, columns in (("evidence", EVIDENCE_COLUMNS), ("bench", BENCH_COLUMNS)):
        path = root / "build" / f"{name}.json"
        if not path.exists():
            target = "bench" if name == "bench" else "test"
            console.print(f"no {path.relative_to(root)} yet: run `make {target}`")
            continue
        found = True
        table = Table(title=str(path.relative_to(root)))
        for column in columns:
            table.add_column(column)
        for row in json.loads(path.read_text()):
            table.add_row(*(_cell(row.get(column)) for column in columns))
        console.print(table)
    return 0 if found else 1


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
