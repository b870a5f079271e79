"""A daemon's structlog takes no rich in, and whoever wants rich itself still has it."""

from __future__ import annotations

import subprocess
import sys

import pytest


def said(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["tercet_node", "tercet_csi", "tercet_operator"])
def test_daemon_has_structlog_without_rich(package):
    """It was 4 to 5 MiB of each daemon, for tracebacks on a terminal that it does not have."""
    code = f"import {package}, structlog.dev, sys; print('rich' in sys.modules, structlog.dev.rich)"
    assert said(code) == "False None"


def test_command_line_has_its_rich():
    code = "import tercet_node, rich.progress; print(rich.progress.track.__name__)"
    assert said(code) == "track"
    code = "import rich, tercet_node, structlog.dev; print(structlog.dev.rich is rich)"
    assert said(code) == "True", "who had it already keeps it"
