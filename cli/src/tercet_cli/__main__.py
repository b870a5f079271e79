"""`tercet`, also `kubectl tercet`: the command line.

Options stand where kubectl has them: after the command. Exit status: 0 done, 1 the answer is no,
2 it could not be done (the message says why and what to do next).
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import structlog
import typer

from tercet_api.clients import Api
from tercet_cli import chunks, commands, members
from tercet_cli.access import cluster
from tercet_cli.errors import EXIT_ERROR, CliError
from tercet_cli.output import Form, errors
from tercet_cli.sim.command import app as sim

VERIFY_TIMEOUT_S = 60.0

Kubeconfig = Annotated[
    Path | None,
    typer.Option("--kubeconfig", help="Default: KUBECONFIG, then ~/.kube/config.", metavar="FILE"),
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.")]
Output = Annotated[Form, typer.Option("--output", "-o", help="Form of the output.")]
Name = Annotated[str, typer.Argument(help="Name of the object.", metavar="NAME")]
Timeout = Annotated[
    float,
    typer.Option("--timeout", min=0.0, help="Seconds to wait for replicas at the same place."),
]

ShowChunks = Annotated[
    bool, typer.Option("--show-chunks", help="Also what of it lies where on one node's device.")
]
OfNode = Annotated[
    str | None,
    typer.Option("--node", help="Whose chunks. Default: the primary's.", metavar="NAME"),
]
OneNode = Annotated[
    str | None,
    typer.Argument(help="Whose list. Default: the first node that answers.", metavar="[NAME]"),
]
Nodes = Annotated[
    list[str] | None, typer.Argument(help="Names of StorageNodes.", metavar="[NAME]...")
]
Everywhere = Annotated[bool, typer.Option("--all", help="Every node.")]

app = typer.Typer(
    help="Looks at Tercet's volumes, nodes and snapshots; simulates its protocols.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
volume = typer.Typer(help="Volumes.", no_args_is_help=True)
node = typer.Typer(help="Storage nodes.", no_args_is_help=True)
snapshot = typer.Typer(help="Snapshots.", no_args_is_help=True)
app.add_typer(volume, name="volume")
app.add_typer(node, name="node")
app.add_typer(snapshot, name="snapshot")
app.add_typer(sim, name="sim")


def _run(
    kubeconfig: Path | None, context: str | None, command: Callable[[Api], Awaitable[int]]
) -> None:
    async def work() -> int:
        async with cluster(kubeconfig, context) as api:
            return await command(api)

    try:
        status = asyncio.run(work())
    except CliError as error:
        errors.print(f"error: {error}", markup=False, highlight=False)
        errors.print(f"next:  {error.next_step}", markup=False, highlight=False)
        status = EXIT_ERROR
    raise typer.Exit(status)


@volume.command("list")
def volume_list(
    kubeconfig: Kubeconfig = None, context: Context = None, output: Output = Form.TABLE
) -> None:
    """All volumes: are they well, where are they, how full."""
    _run(kubeconfig, context, lambda api: commands.volume_list(api, output))


@volume.command("get")
def volume_get(
    name: Name,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Output = Form.TABLE,
    show_chunks: ShowChunks = False,
    of_node: OfNode = None,
) -> None:
    """One volume with its replicas."""
    if of_node is not None and not show_chunks:
        raise typer.BadParameter("goes with --show-chunks", param_hint="--node")
    wanted = chunks.Wanted(of_node) if show_chunks else None
    _run(kubeconfig, context, lambda api: commands.volume_get(api, name, output, wanted))


@volume.command("verify")
def volume_verify(
    name: Name,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Output = Form.TABLE,
    timeout: Timeout = VERIFY_TIMEOUT_S,
) -> None:
    """Compare the replicas' chunks. Exit status: 0 equal, 1 they differ, 2 could not compare."""
    _run(kubeconfig, context, lambda api: commands.volume_verify(api, name, output, timeout))


@node.command("list")
def node_list(
    kubeconfig: Kubeconfig = None, context: Context = None, output: Output = Form.TABLE
) -> None:
    """All storage nodes."""
    _run(kubeconfig, context, lambda api: commands.node_list(api, output))


@node.command("get")
def node_get(
    name: Name,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Output = Form.TABLE,
) -> None:
    """One storage node with its devices and orphans."""
    _run(kubeconfig, context, lambda api: commands.node_get(api, name, output))


@node.command("members")
def node_members(
    name: OneNode = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Output = Form.TABLE,
) -> None:
    """The list of nodes as one node's agent has it, and whom of them it holds alive."""
    _run(kubeconfig, context, lambda api: members.show(api, name, output))


@node.command("lock")
def node_lock(
    names: Nodes = None,
    everywhere: Everywhere = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Output = Form.TABLE,
) -> None:
    """Stop checks and changes of the list of nodes, while you work."""
    chosen = members.Chosen(tuple(names or ()), everywhere)
    _run(kubeconfig, context, lambda api: members.lock(api, chosen, output, locked=True))


@node.command("unlock")
def node_unlock(
    names: Nodes = None,
    everywhere: Everywhere = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Output = Form.TABLE,
) -> None:
    """Go on with checks and changes, with a check at once."""
    chosen = members.Chosen(tuple(names or ()), everywhere)
    _run(kubeconfig, context, lambda api: members.lock(api, chosen, output, locked=False))


@node.command("check")
def node_check(
    names: Nodes = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    output: Output = Form.TABLE,
) -> None:
    """Have the nodes compare their lists now. Exit status: 0 all agree, 1 they differ."""
    chosen = members.Chosen(tuple(names or ()), not names)
    _run(kubeconfig, context, lambda api: members.check(api, chosen, output))


@snapshot.command("list")
def snapshot_list(
    kubeconfig: Kubeconfig = None, context: Context = None, output: Output = Form.TABLE
) -> None:
    """All snapshots."""
    _run(kubeconfig, context, lambda api: commands.snapshot_list(api, output))


def main() -> None:
    """Entry point of the console scripts."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    app()


if __name__ == "__main__":
    main()
