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
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
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


def version_of(package: str, options: Sequence[str] = ()) -> str:
    """The version of a package that is to be had; asks the mirrors when none is known."""
    ask = ["apt-cache", *options, "policy", package]
    known = candidate(run(ask))
    if known is None:
        run(["apt-get", *options, "update"])
        known = candidate(run(ask))
    if known is None:
        raise BinaryError(f"no Debian package {package} is to be had from apt's sources")
    return known


def mirror_of(suite: str, targets: str) -> tuple[str, str]:
    """Where a suite like `bookworm-backports` is to be had, and the suite that it adds to.

    `targets` is what `apt-get indextargets` says of the sources that this machine has: address and
    suite in each line. Raises BinaryError when none of them is what the suite adds to.
    """
    base = suite.removesuffix("-backports")
    for line in targets.splitlines():
        address, _, found = line.strip().partition(" ")
        if found == base:
            return address, base
    raise BinaryError(f"{suite} adds to {base}, which is not among apt's sources")


def with_suite(suite: str, cache: Path) -> list[str]:
    """Options with which apt prefers a suite that this machine does not have.

    Sources and lists are in the cache: the machine's own stay as they are.
    """
    form = "$(REPO_URI) $(RELEASE)"
    address, base = mirror_of(
        suite, run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"])
    )
    folder = cache / "debian" / f"apt-{suite}"
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "sources").mkdir(exist_ok=True)
    source = f"Types: deb\nURIs: {address}\nSuites: {base} {suite}\nComponents: main\n"
    if KEYRING.exists():
        source += f"Signed-By: {KEYRING}\n"
    (folder / "sources" / "tercet.sources").write_text(source)
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": folder / "sources",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    if not any((folder / "lists").glob("*Release")):
        run(["apt-get", *options, "update"])  # a suite that is not known cannot be preferred
    return [*options, "-o", f"APT::Default-Release={suite}"]


def unpacked(
    package: str, progress: Progress, cache: Path | None = None, *, suite: str | None = None
) -> Path:
    """The folder with a package and what it lacks here, as below `/`; kept by version.

    From `suite`, where it is named.
    """
    options = [] if suite is None else with_suite(suite, cache or cache_dir())
    version = version_of(package, options)
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
            _download(package, partial / "debs", options)
            root = partial / "root"
            for deb in sorted((partial / "debs").glob("*.deb")):
                run(["dpkg-deb", "-x", deb, root])
            # A crash before this line leaves only a hidden folder that nobody takes.
            root.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _download(package: str, folder: Path, options: Sequence[str]) -> None:
    (folder / "partial").mkdir(parents=True)
    command = ["apt-get", *options, "install", "--download-only", "--reinstall"]
    command += ["--no-install-recommends"]
    command += ["-y", "-q", "-o", f"Dir::Cache::archives={folder}", "-o", "APT::Sandbox::User=root"]
    try:
        run([*command, package])
    except BinaryError:
        # The lists name a version that the mirrors have no more.
        run(["apt-get", *options, "update"])
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
