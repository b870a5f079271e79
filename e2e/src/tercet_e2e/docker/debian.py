"""Programs out of Debian's packages, unpacked into the cache and not installed.

What a package lacks on this machine comes with it, as apt resolves it. Nothing of the machine
changes: no maintainer script runs, no service starts, no other program meets the files. So what a
script would have done (alternatives, users) is left to the caller.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tercet_e2e.binaries import Progress, cache_dir
from tercet_e2e.errors import BinaryError

COMMAND_TIMEOUT_S = 900.0
LIBRARIES = (
    "usr/lib/x86_64-linux-gnu",
    "lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "lib/aarch64-linux-gnu",
    "usr/lib",
)
TAIL_LINES = 10


def run(command: Sequence[str | Path], timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    """Run a program of the system; returns its output. Raises BinaryError with its last words."""
    words = [str(part) for part in command]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except FileNotFoundError as error:
        raise BinaryError(f"`{words[0]}` is not on PATH: this needs a Debian system") from error
    except subprocess.TimeoutExpired as error:
        raise BinaryError(f"`{' '.join(words)}` took longer than {timeout_s:.0f} s") from error
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-TAIL_LINES:])
        raise BinaryError(f"`{' '.join(words)}` failed:\n{tail}")
    return done.stdout


def candidate(policy: str) -> str | None:
    """The version that apt would install, out of what `apt-cache policy` prints."""
    found = re.search(r"^\s+Candidate: (\S+)$", policy, re.MULTILINE)
    return found.group(1) if found and found.group(1) != "(none)" else None


def version_of(package: str) -> str:
    """The version of a package that is to be had; asks the mirrors when none is known."""
    known = candidate(run(["apt-cache", "policy", package]))
    if known is None:
        run(["apt-get", "update"])
        known = candidate(run(["apt-cache", "policy", package]))
    if known is None:
        raise BinaryError(f"no Debian package {package} is to be had from apt's sources")
    return known


def unpacked(package: str, progress: Progress, cache: Path | None = None) -> Path:
    """The folder with a package and what it lacks here, as below `/`; kept by version."""
    version = version_of(package)
    # As dpkg does: a colon would end the folder's name in a list of folders.
    folder = f"{package}-{version.replace(':', '%3a')}"
    target = (cache or cache_dir()) / "debian" / folder
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{package}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        progress(f"unpack Debian's {package} {version}")
        partial = target.with_name(f".{package}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _download(package, partial / "debs")
            root = partial / "root"
            for deb in sorted((partial / "debs").glob("*.deb")):
                run(["dpkg-deb", "-x", deb, root])
            # A crash before this line leaves only a hidden folder that nobody takes.
            root.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _download(package: str, folder: Path) -> None:
    (folder / "partial").mkdir(parents=True)
    command = ["apt-get", "install", "--download-only", "--reinstall", "--no-install-recommends"]
    command += ["-y", "-q", "-o", f"Dir::Cache::archives={folder}", "-o", "APT::Sandbox::User=root"]
    try:
        run([*command, package])
    except BinaryError:
        run(["apt-get", "update"])  # the lists name a version that the mirrors have no more
        run([*command, package])


def environment(root: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment in which programs of an unpacked folder find each other and their parts."""
    programs = [str(root / folder) for folder in ("usr/sbin", "usr/bin", "sbin", "bin")]
    libraries = [str(root / folder) for folder in LIBRARIES if (root / folder).is_dir()]
    found = dict(base)
    found["PATH"] = ":".join([*programs, base.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")])
    if libraries:
        found["LD_LIBRARY_PATH"] = ":".join(libraries)
    for folder in libraries:
        if (Path(folder) / "xtables").is_dir():
            found["XTABLES_LIBDIR"] = str(Path(folder) / "xtables")
    return found
