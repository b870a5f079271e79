"""The command line of `tercet sim`; what it needs is imported when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from tercet_cli.errors import EXIT_ERROR
from tercet_cli.output import errors

app = typer.Typer(help="Simulations.", no_args_is_help=True)
membership = typer.Typer(
    help="The membership's protocol: the experiment it comes from, and how far it carries.",
    no_args_is_help=True,
)
app.add_typer(membership, name="membership")

Out = Annotated[Path, typer.Option("--out", help="Folder for CSV and figures.", metavar="FOLDER")]
Trials = Annotated[int, typer.Option("--trials", min=2, help="Trials of each case.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Processes.")]

OUT = Path("build/membership")


def _simulations() -> ModuleType:
    try:
        from tercet_cli.sim import membership as simulations
    except ImportError as error:
        message = f"simulations need more packages: {error}"
        raise _refuse(message, "pip install 'tercet-cli[sim]'") from error
    return simulations


def _refuse(message: str, next_step: str) -> typer.Exit:
    errors.print(f"error: {message}", markup=False)
    errors.print(f"next:  {next_step}", markup=False)
    return typer.Exit(EXIT_ERROR)


def _numbers(option: str, text: str, low: float, high: float) -> list[float]:
    """Numbers between commas."""
    try:
        numbers = [float(each) for each in text.split(",")]
    except ValueError as error:
        raise _refuse(f"{option} {text}: {error}", "give numbers between commas") from error
    if not all(low <= number <= high for number in numbers):
        raise _refuse(f"{option} {text}: not all within {low:g} to {high:g}", "give others")
    return numbers


def _tell(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)


@membership.command()
def figures(
    out: Out = OUT,
    trials: Trials = 5,
    every: Annotated[int, typer.Option(min=1, help="Simulate each so manieth step.")] = 1,
    policy: Annotated[str, typer.Option(help="Whose rules the checks keep.")] = "popcorn-active",
    jobs: Jobs = 1,
) -> None:
    """Figures 2 to 7 of the source: three algorithms, five drop rates, up to 100 nodes."""
    simulations = _simulations()
    if policy not in list(simulations.Policy):
        known = ", ".join(simulations.Policy)
        raise _refuse(f"--policy {policy}: there is none", f"take one of {known}")
    _tell(simulations.figures(out, trials, every, jobs, simulations.Policy(policy)))


@membership.command()
def table(out: Out = OUT, trials: Trials = 100, jobs: Jobs = 1) -> None:
    """Table 1 of the source (85 nodes, drop rate 0.05) beside ours, with intervals."""
    _tell(_simulations().table(out, trials, jobs))


@membership.command()
def wrong(out: Out = OUT, trials: Trials = 20, jobs: Jobs = 1) -> None:
    """How often a check makes a correct list wrong, by policy."""
    _tell(_simulations().wrong(out, trials, jobs))


@membership.command()
def scale(
    out: Out = OUT,
    nodes: Annotated[str, typer.Option(help="Numbers of nodes.")] = "100,300,1000,3000,10000",
    drop: Annotated[str, typer.Option(help="Drop rates.")] = "0.05,0.01,0.2",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 5,
    jobs: Jobs = 1,
) -> None:
    """Up to 10,000 nodes with our rules, asynchronous, with delays and losses."""
    sizes = [int(each) for each in _numbers("--nodes", nodes, 3, 16_000)]
    rates = _numbers("--drop", drop, 0.0, 1.0)
    _tell(_simulations().scale(out, sizes, rates, seeds, jobs))


@membership.command()
def failures(
    out: Out = OUT,
    nodes: Annotated[int, typer.Option(min=3, help="Number of nodes.")] = 100,
    drop: Annotated[str, typer.Option(help="Drop rates; hours without a death at the last.")] = (
        "0.0,0.05,0.1"
    ),
    deaths: Annotated[int, typer.Option(min=2, help="Deaths at each rate.")] = 200,
    hours: Annotated[float, typer.Option(min=0.01, help="Hours without a death.")] = 2.0,
    jobs: Jobs = 1,
) -> None:
    """How soon a death is known to all, and how often one is imagined."""
    rates = _numbers("--drop", drop, 0.0, 1.0)
    _tell(_simulations().failures(out, nodes, rates, deaths, hours, jobs))
