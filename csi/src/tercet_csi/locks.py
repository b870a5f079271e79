"""One call at a time for each volume, as the specification asks: a second one is ABORTED at once.

Waiting instead would pile up the callers' retries behind a slow call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tercet_csi.errors import Aborted


class ObjectLocks:
    """Names of objects that a call is working on. For one event loop."""

    def __init__(self) -> None:
        self._held: set[str] = set()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold `name` for the block. Raises Aborted when another call does."""
        if name in self._held:
            raise Aborted(f"another call on {name} is under way: try again when it has ended")
        self._held.add(name)
        try:
            yield
        finally:
            self._held.remove(name)
