"""One cluster for all scenarios here, with the chart installed on it; its times at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio
from kindharness import Installed, install, prepare, running_database

from tercet_e2e.kindcluster import KindSite
from tercet_e2e.localsite import LocalSite
from tercet_e2e.site import ExistingSite, Site, Step

KEEP = "TERCET_KIND_KEEP"  # a folder: the cluster there is used again, and stays
STEPS = pytest.StashKey[list[Step]]()


def say(text: str) -> None:
    print(text, flush=True)


def site_of(config: pytest.Config, folder: Path) -> Site:
    """The cluster that was asked for."""
    option = config.getoption
    match option("provider"):
        case "local":
            return LocalSite(folder, say)
        case "existing":
            given = option("kubeconfig")
            if given is None:
                raise pytest.UsageError("--provider existing: which cluster? give --kubeconfig")
            shared, power = option("shared"), option("node_power")
            return ExistingSite(folder, Path(given), shared=shared, power=power, progress=say)
        case _:
            image, keep = option("kind_image"), KEEP in os.environ
            return KindSite(folder, image=image, keep=keep, progress=say)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(request):
    """The cluster; what was made for it ends with the session."""
    kept = os.environ.get(KEEP)
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="tk-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = site_of(request.config, folder)
    request.config.stash[STEPS] = found.steps
    async with found:
        yield found
    if not kept:
        shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def installed(site, request) -> Installed:
    """Tercet on the cluster, as a user installs it; `local` comes with it."""
    if isinstance(site, LocalSite):
        return Installed(site)
    option = request.config.getoption
    found = await prepare(site, option("workload_image"), option("values"), option("upgrade_tag"))
    await install(found)
    return found


@pytest_asyncio.fixture(loop_scope="session")
async def database(installed: Installed, request):
    """A database that commits, all of whose replicas are in sync."""
    async with running_database(installed.site, request.node.name) as found:
        yield found


@pytest.fixture(autouse=True)
def told(site, request):
    """Says which scenario runs, and what it took."""
    say(f"\n== {request.node.name}")
    with site.step(request.node.name):
        yield


def pytest_terminal_summary(terminalreporter, config):
    """What each step took."""
    steps = config.stash.get(STEPS, [])
    if steps:
        terminalreporter.section("steps")
        for step in steps:
            terminalreporter.write_line(f"{step.seconds:7.1f} s  {step.name}")
