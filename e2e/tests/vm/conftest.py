"""Parts of a virtual machine and the engine's own test programs, once for all tests here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tercet_e2e.vm.parts import Parts
from tercet_e2e.vm.parts import parts as find_parts

ROOT = Path(__file__).resolve().parents[3]
SUITES = ("devices", "store")
BUILD_S = 3600.0


@pytest.fixture(scope="session")
def parts() -> Parts:
    """QEMU, a kernel and a shell."""
    return find_parts(lambda text: print(text, flush=True))


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """The test programs of the reactor, by name; built when they are not."""
    given = os.environ.get("TERCET_VM_PROGRAMS")
    if given is not None:
        return {name: Path(given) / name for name in SUITES}
    words = ["cargo", "test", "--no-run", "--locked", "--message-format=json"]
    words += ["--manifest-path", str(ROOT / "node-daemon/Cargo.toml"), "-p", "tercet-reactor"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=BUILD_S)
    built = (json.loads(line) for line in done.stdout.splitlines())
    found = {
        message["target"]["name"]: Path(message["executable"])
        for message in built
        if message.get("executable") and message["target"]["name"] in SUITES
    }
    assert set(found) == set(SUITES), found
    return found
