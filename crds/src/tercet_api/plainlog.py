"""structlog without rich: what a daemon imports first (its package's `__init__`).

structlog takes rich, pygments and markdown-it in wherever they are installed, for tracebacks that a
person reads on a terminal: sixty modules, 4 to 5 MiB of each daemon's memory, and a daemon writes
JSON. There is no switch; for structlog rich is absent while it is imported, which it provides for.
Who wants rich itself (the command line) has it as before.
"""

from __future__ import annotations

import importlib
import sys

RICH = "rich"


def prefer() -> None:
    """Import structlog without rich; nothing, if either is there already."""
    if RICH in sys.modules or "structlog" in sys.modules:
        return
    # None is Python's own way to say that a module cannot be imported.
    sys.modules[RICH] = None  # type: ignore[assignment]
    try:
        importlib.import_module("structlog")
    finally:
        del sys.modules[RICH]


prefer()
