"""`python -m tercet_e2e images`: every image that the chart names, made without a registry.

Ours come out of the Dockerfile, on a base of Debian's packages and with build/wheels (`make
wheels`), so that the build fetches nothing: it runs without a network. The CSI sidecars are the
programs that a local cluster runs as well, each in an image with nothing else, under the name that
the chart's values have for it. A base is kept in the cache by the packages that are in it; the rest
is the engine's own cache of layers.

What each image's program needs to start is measured in processor time, which a busy machine changes
least, and has a bound: a node's pieces have to be back at once.

One more is for scenarios alone: the database that runs in their pods.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tercet_e2e import workload
from tercet_e2e.binaries import Binaries, Progress, cache_dir
from tercet_e2e.docker import debian, engine
from tercet_e2e.docker.engine import Engine
from tercet_e2e.errors import BinaryError
from tercet_e2e.kindimage import root as roots
from tercet_e2e.kindimage.archive import Config, Tree, write_archive, write_whole
from tercet_e2e.site import Site

Json = dict[str, Any]
CONTROLLER = "import tercet_csi.main, tercet_csi.controller.service, tercet_api.clients"
TARGETS: Mapping[str, Sequence[Sequence[str]]] = {
    "operator": (("tercet-operator", "--help"), ("tercet-uninstall", "--help")),
    "csi": (("tercet-csi", "node", "--help"), ("python3", "-c", CONTROLLER)),
    "node": (("tercet-agent", "--help"), ("tercet-engine", "--help"), ("tercet-attach", "--help")),
}
"""The Dockerfile's targets, and what shows that each of their programs starts."""
BASE = "localhost/tercet/base"
BUILD_TIMEOUT_S = 1800.0
LOAD_TIMEOUT_S = 300.0
PUSH_TIMEOUT_S = 900.0
START_S_MAX = 1.0
"""Of processor time."""
START_TRIES_MAX = 8
CHART = Path("charts/tercet")


def own_names(root: Path) -> dict[str, str]:
    """The names of our images by target, as the chart has them by default."""
    version = yaml.safe_load((root / CHART / "Chart.yaml").read_text())["appVersion"]
    return {target: f"tercet-{target}:{version}" for target in TARGETS}


def sidecar_names(root: Path) -> dict[str, str]:
    """The names of the upstream images by program, as the chart has them by default."""
    values: Json = yaml.safe_load((root / CHART / "values.yaml").read_text())
    sidecars = dict(values["sidecars"])
    registry = sidecars.pop("registry")
    wanted = [*sidecars.values(), values["snapshotController"]]
    return {each["image"]: f"{registry}/{each['image']}:{each['tag']}" for each in wanted}


def base_packages(listing: str) -> list[str]:
    """The packages of a base that lacks none for any image, out of `images/packages`."""
    return [line.split()[1] for line in roots.packages(listing)]


async def build(root: Path, docker: Engine, progress: Progress = print) -> list[str]:
    """Make all images in an engine; returns their names. Raises BinaryError, ProcessError."""
    if not any((root / "build/wheels").glob("tercet_engine-*.whl")):
        raise BinaryError("build/wheels lacks our programs: run `make wheels` first")
    kit = dataclasses.replace(docker, environment={**docker.environment, "DOCKER_BUILDKIT": "1"})
    base = await _base(root, kit, progress)
    names = own_names(root)
    for target, name in names.items():
        started_s = time.monotonic()
        arguments = ["build", "-q", "--network", "none", "--target", target, "--tag", name]
        arguments += ["--build-arg", f"BASE={base}", "--build-arg", "WHEELS=given", str(root)]
        await kit.run(*arguments, timeout_s=BUILD_TIMEOUT_S)
        size = int(await kit.run("image", "inspect", "-f", "{{.Size}}", name))
        built_s = time.monotonic() - started_s
        starts = await start_seconds(kit, name, target)
        progress(
            f"image {name}: {size / 1e6:.0f} MB, built in {built_s:.0f} s, "
            f"starts in {max(starts.values()):.2f} s of processor time"
        )
        check_starts(name, starts)
    return [*names.values(), *await _sidecars(root, kit, progress)]


MEASURE = """
import json, resource, subprocess, sys
def used_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
best = {}
for command in json.loads(sys.argv[1]):
    shown = " ".join(command)
    for attempt in range(int(sys.argv[2])):
        before_s = used_s()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "usage:" not in done.stderr:
            sys.exit(done.stderr)
        best[shown] = min(best.get(shown, 1e9), used_s() - before_s)
        if best[shown] < float(sys.argv[3]):
            break
print(json.dumps(best))
"""


def measuring(commands: Sequence[Sequence[str]]) -> list[str]:
    """Arguments for Python inside an image: it prints what each command takes, as JSON.

    Processor time that a program takes to say how it is used; what an engine or a kubelet needs to
    make a container is not the image's doing. Neighbours on the same core lengthen it, so one that
    takes too long is tried again.
    """
    words = json.dumps([list(command) for command in commands])
    return ["-c", MEASURE, words, str(START_TRIES_MAX), str(START_S_MAX)]


def check_starts(name: str, seconds: Mapping[str, float]) -> None:
    """Raises BinaryError when a program of an image takes too long to start."""
    for command, taken_s in seconds.items():
        if taken_s >= START_S_MAX:
            raise BinaryError(
                f"{name}: `{command[:60]}` takes {taken_s:.2f} s of processor time to start, "
                f"{START_S_MAX} s at most: `python3 -X importtime` says which import it is"
            )


async def start_seconds(docker: Engine, name: str, target: str) -> dict[str, float]:
    """What each program of an image of ours takes to start. Raises ProcessError: it does not."""
    arguments = ["run", "--rm", "--network", "none", "--read-only", "--user", "65532:65532"]
    arguments += ["--entrypoint", "python3", name, *measuring(TARGETS[target])]
    found: dict[str, float] = json.loads(await docker.run(*arguments))
    return found


async def _base(root: Path, docker: Engine, progress: Progress) -> str:
    """The base image; made when the engine does not have it."""
    packages = base_packages((root / "images/packages").read_text())
    not_needed = roots.packages((root / "images/not-needed").read_text())
    words = [roots.suite(), *sorted(packages), *not_needed]
    name = f"{BASE}:{hashlib.sha256(' '.join(words).encode()).hexdigest()[:12]}"
    if await docker.run("images", "-q", name):
        return name
    archive = await asyncio.to_thread(_base_archive, packages, not_needed, name, progress)
    await docker.run("import", str(archive), name, timeout_s=LOAD_TIMEOUT_S)
    return name


def _base_archive(
    packages: Sequence[str], not_needed: Sequence[str], name: str, progress: Progress
) -> Path:
    """The base's file system in the cache."""
    folder = cache_dir() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"base-{name.rpartition(':')[2]}.tar"
    if target.exists():
        return target
    progress("Debian's packages for the images")
    with tempfile.TemporaryDirectory(prefix=".base-", dir=folder) as made:
        work = Path(made)
        system = work / "root"
        system.mkdir()
        roots.bootstrap(packages, work / "debian.tar", progress)
        debian.run(["tar", "-C", system, "--numeric-owner", "-xpf", work / "debian.tar"])
        roots.trim(system)
        for pattern in not_needed:
            for path in system.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_whole(system, work / "base.tar")
        for old in folder.glob("base-*.tar"):
            old.unlink()
        (work / "base.tar").rename(target)
    return target


async def _sidecars(root: Path, docker: Engine, progress: Progress) -> list[str]:
    names = sidecar_names(root)
    tools = await asyncio.to_thread(Binaries.default(progress).ensure, names)
    with tempfile.TemporaryDirectory(prefix="tercet-images-") as name:
        for program, image in names.items():
            layer, archive = Path(name, "layer"), Path(name, "image")
            Tree(files={f"/{program}": tools[program]}, folders={"/tmp"}).write(layer)
            config = Config(entrypoint=(f"/{program}",), user="65532:65532")
            measured = [sys.executable, *measuring([[str(tools[program]), "--version"]])]
            check_starts(image, json.loads(await asyncio.to_thread(debian.run, measured)))
            await asyncio.to_thread(write_archive, archive, image, layer, config)
            await docker.run("load", "-q", "-i", str(archive), timeout_s=LOAD_TIMEOUT_S)
    progress(f"images of {len(names)} CSI programs")
    return list(names.values())


async def build_workload(root: Path, docker: Engine) -> str:
    """Make the image of the database (`workload`), on what the operator's stands on."""
    with tempfile.TemporaryDirectory(prefix="tercet-images-") as name:
        folder = Path(name)
        (folder / "workload.py").write_text(Path(workload.__file__).read_text())
        (folder / "Dockerfile").write_text(
            f"FROM {own_names(root)['operator']}\nUSER 0\nCOPY workload.py /workload.py\n"
            'ENTRYPOINT ["python3", "/workload.py"]\n'
        )
        await docker.run("build", "-q", "--network", "none", "-t", Site.workload_image, str(folder))
    return Site.workload_image


async def rebuild(root: Path, docker: Engine, tag: str) -> list[str]:
    """Make our images anew under another tag, for an upgrade: they differ in a label alone."""
    names = []
    with tempfile.TemporaryDirectory(prefix="tercet-images-") as folder:
        for name in own_names(root).values():
            Path(folder, "Dockerfile").write_text(f"FROM {name}\nLABEL tercet.io/rebuilt={tag}\n")
            names.append(f"{name.rpartition(':')[0]}:{tag}")
            await docker.run("build", "-q", "--network", "none", "-t", names[-1], folder)
    return names


async def push(root: Path, docker: Engine, registry: str) -> list[str]:
    """Push our images below a registry; returns the names that they have there.

    The CSI programs are published where the chart's values have them from, so they stay.
    """
    pushed = []
    for name in own_names(root).values():
        there = f"{registry.rstrip('/')}/{name}"
        await docker.run("tag", name, there)
        await docker.run("push", "--quiet", there, timeout_s=PUSH_TIMEOUT_S)
        pushed.append(there)
    return pushed


async def make(root: Path, *, with_workload: bool = False, registry: str = "") -> None:
    """The command: with the engine that answers, or one of our own for just that long."""
    async with engine.engine() as docker:
        names = await build(root, docker)
        if with_workload:
            names.append(await build_workload(root, docker))
        if registry:
            names += await push(root, docker, registry)
        print(*names, sep="\n")
