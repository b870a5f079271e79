"""What a person or a script sees: tables or JSON on stdout, everything else on stderr."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.table import Table

PROGRESS_AFTER_S = 2.0

errors = Console(stderr=True, soft_wrap=True)


class Form(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSON = "json"


def print_json(document: Any) -> None:
    """One JSON document."""
    print(json.dumps(document, indent=2, sort_keys=True))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table, never cut: what does not fit is wrapped by the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    width = max(console.width, 20 + sum(_widest(columns, rows)))
    Console(highlight=False, width=width).print(table)


def _widest(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        3 + max(len(cell) for cell in (column, *(row[index] for row in rows)))
        for index, column in enumerate(columns)
    ]


def size(value_bytes: int) -> str:
    """A size as people write it; exact where it is a whole number of a unit."""
    for unit, bytes_each in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1024)):
        if value_bytes >= bytes_each:
            whole, rest = divmod(value_bytes, bytes_each)
            return f"{whole} {unit}" if rest == 0 else f"{value_bytes / bytes_each:.1f} {unit}"
    return f"{value_bytes} B"


@asynccontextmanager
async def progress(what: str) -> AsyncGenerator[None, None]:
    """Say what is waited for, once it takes longer than two seconds."""

    async def tell() -> None:
        await asyncio.sleep(PROGRESS_AFTER_S)
        if not errors.is_terminal:
            errors.print(f"{what} ...")
            return
        with errors.status(what):
            await asyncio.get_running_loop().create_future()

    # No TaskGroup: it would wrap the caller's errors.
    task = asyncio.create_task(tell())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
