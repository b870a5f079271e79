"""Fixtures of this folder's tests."""

from crds_control_plane import cluster

__all__ = ["cluster"]
