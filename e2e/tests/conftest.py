"""Fixtures of the end-to-end tests: short state folders, and one shared cluster with nodes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio
from clusterharness import Kubectl, add_driver

from tercet_e2e.cluster import Cluster


@pytest.fixture
def root():
    """A state folder with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="te-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster():
    """Two nodes with the image driver and all sidecars, for the whole session."""
    folder = Path(tempfile.mkdtemp(prefix="te-"))
    keep = "TERCET_KEEP" in os.environ  # to look at logs after a failure
    async with Cluster(folder, remove=not keep) as running:
        await add_driver(running, ("n1", "n2"))
        yield running


@pytest.fixture
def kubectl(cluster):
    """kubectl for the shared cluster."""
    return Kubectl(cluster)
