"""Cleans up after a tool that was killed: `python -m tercet_e2e.reaper STATE [--remove]`.

The tool holds the only write end of this process's standard input. When the tool dies, of whatever,
the kernel closes that end, and the cluster is cleaned. A tool that ends in order cleans by itself
and says so with one byte. Lives in a session of its own, so that a Ctrl-C does not reach it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from tercet_e2e.cleanup import clean
from tercet_e2e.state import StateFolder

ORDERLY_END = b"."


def main(arguments: list[str]) -> int:
    """Runs; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    state = StateFolder(Path(arguments[0]))
    if os.read(0, 1) == ORDERLY_END:
        return 0
    clean(state)
    if "--remove" in arguments[1:]:
        shutil.rmtree(state.root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
