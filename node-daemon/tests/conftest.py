"""Fixtures of this folder's tests: the real control plane is the one of `crds/tests`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "crds" / "tests"))

from crds_control_plane import cluster, free_port
from node_bench import api, bench, proxied

__all__ = ["api", "bench", "cluster", "free_port", "proxied"]
