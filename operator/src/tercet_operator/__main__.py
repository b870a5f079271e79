"""`tercet-operator`: the command line (docs/processes.md)."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from tercet_api.clients import Api
from tercet_api.names import NAMESPACE
from tercet_operator.leading import LeadershipLost, Operator
from tercet_operator.logs import configure_logs
from tercet_operator.world import World

log = structlog.get_logger(__name__)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tercet-operator", description="Tercet's operator.")
    parser.add_argument("--kubeconfig", type=Path, help="absent: the pod's service account")
    parser.add_argument("--namespace", default=NAMESPACE, help="where its Lease stands")
    parser.add_argument("--http", default="127.0.0.1:9811", help="health and metrics: HOST:PORT")
    parser.add_argument(
        "--replace-after",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a node may be away before its replicas are rebuilt elsewhere",
    )
    parser.add_argument(
        "--rebuilds-max",
        type=int,
        default=4,
        help="volumes that are rebuilt at the same time, at most",
    )
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    return parser.parse_args(given)


async def _run(arguments: argparse.Namespace) -> int:
    async with Api(arguments.kubeconfig) as api:
        world = World(replace_after_s=arguments.replace_after, rebuilds_max=arguments.rebuilds_max)
        operator = Operator(api, arguments.kubeconfig, arguments.namespace, world)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, operator.stop)
        try:
            await operator.run(arguments.http)
        except LeadershipLost as error:
            log.error("ends", why=str(error))  # noqa: TRY400 - no trace needed
            return 1
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """The entry point."""
    arguments = _arguments(given)
    configure_logs(arguments.log_format)
    return asyncio.run(_run(arguments))


if __name__ == "__main__":
    sys.exit(main())
