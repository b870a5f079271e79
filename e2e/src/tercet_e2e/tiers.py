"""The tiers of `make test`: which there are, run in order, with a table of what each took.

A tier is a list of commands; it fails when one does, and the next tiers run all the same, so that
one run tells everything. Quick ones come first. What a tier counts (seeds, states, canaries) it
appends as JSON lines to the file named by TERCET_EVIDENCE; `write_evidence` makes
`build/evidence.json` of them. docs/testing.md describes the tiers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

EVIDENCE = "TERCET_EVIDENCE"
FILE_LINES_MAX = 800
CARGO = ("cargo", "--color=never")
MANIFEST = ("--manifest-path", "node-daemon/Cargo.toml")
PACKAGES = ("crds", "operator", "csi", "node-daemon", "cli", "e2e")


@dataclass(frozen=True)
class Tier:
    """One tier."""

    name: str
    what: str
    commands: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """How a tier went."""

    tier: Tier
    seconds: float
    failed: tuple[str, ...]


def cargo(command: str, *arguments: str) -> tuple[str, ...]:
    """A cargo command on the workspace, with the locked versions."""
    return (*CARGO, command, *MANIFEST, "--locked", *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    """The test runner of this environment."""
    return (sys.executable, "-m", "pytest", "-q", *arguments)


def tool(name: str, *arguments: str) -> tuple[str, ...]:
    """A tool installed beside this Python."""
    return (str(Path(sys.executable).parent / name), *arguments)


def tiers() -> tuple[Tier, ...]:
    """All tiers, in the order in which they run."""
    sim = cargo("run", "-q", "--profile", "sim", "-p", "tercet-sim")
    canary = (*sim, "--features", "canary", "--")
    model = cargo("run", "-q", "--profile", "sim", "-p", "tercet-model")
    model_canary = (*model, "--features", "canary", "--")
    noderep = cargo("test", "-q", "-p", "tercet-noderep")
    return (
        Tier(
            "lint",
            "formats, types, import arrows, generated files, the chart, clippy, size limits",
            (
                tool("ruff", "format", "--check", "."),
                tool("ruff", "check", "."),
                *(tool("mypy", f"{package}/src") for package in PACKAGES),
                tool("lint-imports"),
                (sys.executable, "-m", "tercet_api.generate", "--check"),
                (sys.executable, "-m", "tercet_e2e", "tidy"),
                (sys.executable, "-m", "tercet_e2e", "chart"),
                (*CARGO, "fmt", *MANIFEST, "--all", "--check"),
                cargo("clippy", "-q", "--workspace", "--all-targets", "--", "-D", "warnings"),
            ),
        ),
        Tier(
            "python",
            "unit and property tests",
            (pytest("-m", "not local and not cluster and not kind and not vm and not linux"),),
        ),
        Tier(
            "rust",
            "unit, property, crash enumeration, protocols over real sockets",
            (
                cargo("test", "-q", "--workspace"),
                (*noderep, "--features", "loom", "--test", "loom"),
                (*noderep, "--features", "shuttle", "--test", "shuttle"),
            ),
        ),
        Tier(
            "simulation",
            "1,000 seeds of whole nodes under faults",
            ((*sim, "--", "run", "--seeds", "1000", "--start", "1", "--jobs", "2"),),
        ),
        Tier("model", "every state within the bounds of short spaces", ((*model, "--", "run"),)),
        Tier(
            "canaries",
            "rules broken on purpose, each caught",
            (
                (*canary, "canaries"),
                (*model_canary, "canaries"),
                cargo("test", "-q", "-p", "tercet-store", "--features", "canary", "--test", "copy"),
                cargo("test", "-q", "-p", "tercet-store", "--features", "canary", "canary"),
                (*noderep, "--features", "loom,canary", "--test", "loom", "canaries"),
                (*noderep, "--features", "shuttle,canary", "--test", "shuttle", "canaries"),
            ),
        ),
        Tier("control-plane", "a real API server: CRDs, operator, agent", (pytest("-m", "local"),)),
        Tier(
            "cluster",
            "whole clusters: csi-sanity, bad input, kills, scenarios without kubelets",
            (
                pytest("-m", "cluster"),
                pytest("-m", "kind and not kubelet", "--provider", "local", "e2e/tests/kind"),
            ),
        ),
        Tier(
            "linear",
            "real processes parted by wires, two minutes of faults, judged by Porcupine",
            (
                ("go", "-C", "e2e/tools/linearizable", "test", "-mod=readonly", "./..."),
                (sys.executable, "-m", "tercet_e2e", "linear", "--seconds", "120"),
            ),
        ),
        Tier("demo", "the story, checked", ((sys.executable, "-m", "tercet_e2e", "demo"),)),
    )


def soak() -> tuple[Tier, ...]:
    """What `make soak` runs: the same things, for long."""
    sim = cargo("run", "-q", "--profile", "sim", "-p", "tercet-sim", "--", "run")
    model = cargo("run", "-q", "--profile", "sim", "-p", "tercet-model", "--", "run", "--long")
    return (
        Tier(
            "linear",
            "ten minutes of faults on real processes",
            ((sys.executable, "-m", "tercet_e2e", "linear", "--seconds", "600"),),
        ),
        Tier("simulation", "10,000 fresh seeds", ((*sim, "--seeds", "10000", "--jobs", "2"),)),
        Tier("model", "every state within the bounds of all spaces", (model,)),
    )


def run(chosen: str | None, root: Path, known: tuple[Tier, ...]) -> int:
    """Run one tier or all; prints the table and `N passed, N failed`. Returns the exit code."""
    console = Console()
    wanted = [tier for tier in known if chosen in (None, tier.name)]
    if not wanted:
        console.print(f"no tier {chosen!r}; there are {', '.join(t.name for t in known)}")
        return 2
    build = root / "build"
    build.mkdir(exist_ok=True)
    lines = build / "evidence.jsonl"
    if chosen is None:
        lines.unlink(missing_ok=True)
    environment = {**os.environ, EVIDENCE: str(lines)}
    outcomes = [_run_tier(tier, root, environment, console) for tier in wanted]
    write_evidence(lines, build / "evidence.json")
    _print_table(outcomes, console)
    failed = sum(1 for outcome in outcomes if outcome.failed)
    print(f"{len(outcomes) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


def _run_tier(tier: Tier, root: Path, environment: dict[str, str], console: Console) -> Outcome:
    started = time.monotonic()
    failed = []
    for command in tier.commands:
        shown = " ".join(Path(part).name if "/" in part else part for part in command)
        console.print(f"== {tier.name}: {shown}", style="bold", highlight=False)
        if subprocess.run(command, cwd=root, env=environment, check=False).returncode != 0:
            failed.append(shown)
    return Outcome(tier, time.monotonic() - started, tuple(failed))


def _print_table(outcomes: list[Outcome], console: Console) -> None:
    table = Table(title="tiers")
    for column in ("tier", "what", "minutes", "outcome"):
        table.add_column(column, justify="right" if column == "minutes" else "left")
    for outcome in outcomes:
        text = "; ".join(f"failed: {command}" for command in outcome.failed) or "passed"
        table.add_row(outcome.tier.name, outcome.tier.what, f"{outcome.seconds / 60:.1f}", text)
    total = sum(outcome.seconds for outcome in outcomes)
    table.add_row("all", "", f"{total / 60:.1f}", "")
    console.print(table)


def write_evidence(lines: Path, out: Path) -> None:
    """Make one JSON array of what the tiers have appended."""
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    out.write_text(json.dumps(rows, indent=1) + "\n")


def tidy(root: Path) -> int:
    """Refuse files that have outgrown one reading; returns the exit code."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.rs"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.split()
    too_long = [
        (name, count)
        for name in listed
        if (root / name).exists()
        and (count := len((root / name).read_text().splitlines())) > FILE_LINES_MAX
    ]
    for name, count in too_long:
        print(f"{name}: {count} lines, at most {FILE_LINES_MAX}: split it")
    return 1 if too_long else 0
