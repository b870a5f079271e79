"""`python -m tercet_e2e`: clusters, tiers of tests, reports."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tercet_e2e import chart as charts
from tercet_e2e import commands, report, tiers
from tercet_e2e import images as container_images
from tercet_e2e.bench import failover
from tercet_e2e.bench import run as benchmark
from tercet_e2e.docker import commands as docker
from tercet_e2e.errors import E2eError
from tercet_e2e.linear import run as linearity
from tercet_e2e.story import demo as story

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
commands.register(app)
app.add_typer(docker.app, name="docker")


@app.command(name="test")
def run_tiers(
    tier: Annotated[str | None, typer.Option(help="Only this one.")] = None,
) -> None:
    """Run the tiers of tests; the last lines are a table of their times."""
    raise typer.Exit(tiers.run(tier, Path.cwd(), tiers.tiers()))


@app.command()
def soak(
    part: Annotated[str | None, typer.Option(help="Only this one.")] = None,
) -> None:
    """Run what takes long: linear, simulation, model check, each for many minutes."""
    raise typer.Exit(tiers.run(part, Path.cwd(), tiers.soak()))


@app.command()
def tidy() -> None:
    """Check what no other tool checks: the sizes of files."""
    raise typer.Exit(tiers.tidy(Path.cwd()))


@app.command()
def chart() -> None:
    """Check the Helm chart: lint, schemas, its suites, rules about privileges."""
    raise typer.Exit(charts.check(Path.cwd()))


@app.command()
def images(
    workload: Annotated[
        bool, typer.Option("--workload", help="Also the one that scenarios run in their pods.")
    ] = False,
    push: Annotated[str, typer.Option(help="Push ours below this registry.")] = "",
) -> None:
    """Make the images that the chart names, without a registry; prints their names."""
    asyncio.run(container_images.make(Path.cwd(), with_workload=workload, registry=push))


@app.command()
def demo(
    lose_commit: Annotated[
        bool, typer.Option("--lose-commit", help="Lose an acknowledged commit on purpose.")
    ] = False,
) -> None:
    """Tell and check the story of a volume that survives its primary three times over."""
    raise typer.Exit(asyncio.run(story.run(lose=lose_commit)))


@app.command()
def bench(
    suite: Annotated[benchmark.Suite | None, typer.Argument(help="Only this one.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="failover: of each fault.")] = failover.TRIALS,
) -> None:
    """Measure what speed depends on, beside its floor; writes rows into build/bench.json."""
    raise typer.Exit(asyncio.run(benchmark.run(Path.cwd(), suite, trials)))


@app.command()
def linear(
    seconds: Annotated[int, typer.Option(min=10, help="Of faults.")] = linearity.SECONDS,
    seed: Annotated[int | None, typer.Option(help="Of the faults; else a fresh one.")] = None,
    engine: Annotated[
        Path | None, typer.Option(help="Another build of tercet-engine: a canary's.")
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="json: the last line.")] = "text",
) -> None:
    """Judge whether what hosts are told by real processes under faults is linearizable."""
    outcome = asyncio.run(linearity.run(Path.cwd(), seconds, seed, engine))
    if output == "json":
        print(json.dumps(outcome.as_json()))
    else:
        print("\n".join(linearity.told(outcome)))
    raise typer.Exit(0 if outcome.holds else 1)


@app.command(name="report")
def print_report() -> None:
    """Print build/bench.json and build/evidence.json as tables."""
    raise typer.Exit(report.report(Path.cwd()))


def main() -> None:
    """The entry point: an error of ours is one line, not a traceback."""
    try:
        app()
    except E2eError as error:
        print(f"tercet-e2e: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
