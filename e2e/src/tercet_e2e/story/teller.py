"""Tells a story in numbered steps and stops it at the first check that does not hold."""

from __future__ import annotations

import time

from rich.console import Console

from tercet_e2e.errors import E2eError


class StoryError(E2eError):
    """A check of the story does not hold; says which."""


class Teller:
    """Prints steps as they happen."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._started_s = time.monotonic()
        self._step = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the story began."""
        return time.monotonic() - self._started_s

    def step(self, text: str) -> None:
        """A new step."""
        self._step += 1
        at = f"[dim]{self.elapsed_s:.1f} s[/dim]"
        self._console.print(f"[bold]{self._step:2}. {text}[/bold]  {at}")

    def note(self, text: str) -> None:
        """What happened."""
        self._console.print(f"    {text}", markup=False)

    def check(self, holds: bool, text: str) -> None:
        """A claim. Raises StoryError when it does not hold."""
        if not holds:
            self._console.print(f"    [red]does not hold:[/red] {text}")
            raise StoryError(f"step {self._step}: does not hold: {text}")
        self._console.print(f"    [green]ok[/green] {text}")
