"""One cluster for all tests that need engines: it starts once, each test brings its own volumes."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import pytest_asyncio

from tercet_e2e.kubectl import Kubectl
from tercet_e2e.local import LocalCluster
from tercet_e2e.story.leftovers import leftovers
from tercet_e2e.story.objects import classes


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster():
    """Three storage nodes, Ready, with StorageClass and VolumeSnapshotClass `demo`."""
    root = Path(tempfile.mkdtemp(prefix="tercet-tests-"))
    async with LocalCluster(root, progress=lambda text: print(text, flush=True)) as found:
        await found.wait_ready()
        await Kubectl(found.kubectl).apply(*classes())
        yield found
    assert leftovers(root) == []
    if "TERCET_KEEP" not in os.environ:  # to look at logs after a failure
        shutil.rmtree(root)


@pytest.fixture
def kubectl(cluster: LocalCluster) -> Kubectl:
    """kubectl as the administrator of that cluster."""
    return Kubectl(cluster.kubectl)
