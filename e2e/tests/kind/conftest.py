"""One cluster with real kubelets for all tests here, with the chart installed from local images."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest_asyncio
from kindharness import Installed, build_images, install

from tercet_e2e.kindcluster import KindSite

KEEP = "TERCET_KIND_KEEP"  # a folder: the cluster there is used again, and stays


def say(text: str) -> None:
    print(text, flush=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(request):
    """Four nodes in containers; ends with the session."""
    kept = os.environ.get(KEEP)
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="tercet-kind-"))
    folder.mkdir(parents=True, exist_ok=True)
    image = request.config.getoption("kind_image")
    async with KindSite(folder, image=image, keep=bool(kept), progress=say) as found:
        yield found
    if not kept:
        shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def installed(site) -> Installed:
    """Tercet on the cluster, as a user installs it."""
    names = await build_images(site)
    return await install(site, names)
