"""What scenarios need of a cluster, where it is not there: who is told what to give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tercet_e2e import images
from tercet_e2e.errors import BinaryError, ProcessError
from tercet_e2e.localsite import LocalSite
from tercet_e2e.site import ExistingSite, SiteError

ROOT = Path(__file__).parents[2]


def existing(folder, **more) -> ExistingSite:
    given = {"shared": f"{folder}:/var/shared"} | more
    return ExistingSite(folder, folder / "kubeconfig", **given)


@pytest.mark.parametrize("shared", ["", "/nowhere/at/all:/there", "{here}", "{here}:there"])
def test_an_existing_cluster_needs_a_folder_that_all_see(tmp_path, shared):
    with pytest.raises(SiteError, match="give HERE:THERE"):
        existing(tmp_path, shared=shared.format(here=tmp_path))


def test_the_shared_folder_has_a_path_here_and_one_there(tmp_path):
    site = existing(tmp_path)
    assert site.shared == tmp_path
    assert str(site.shared_on_nodes) == "/var/shared"


async def test_power_is_switched_by_the_command_that_was_given(tmp_path):
    script = tmp_path / "power"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n[ "$2" = stop ] && exit 3 || :\n')
    script.chmod(0o755)
    site = existing(tmp_path, power=f"{script} --now")
    await site.power("n1", "off")
    assert (tmp_path / "said").read_text() == "--now off n1\n"
    with pytest.raises(ProcessError, match="stop n1"):
        await site.power("n1", "stop")


async def test_without_power_a_scenario_says_what_it_lacks(tmp_path):
    with pytest.raises(SiteError, match="--node-power"):
        await existing(tmp_path).power("n1", "off")
    with pytest.raises(SiteError, match="cannot be switched off"):
        await LocalSite(tmp_path).power("node-1", "off")


def test_a_step_that_fails_has_a_time_as_well(tmp_path):
    said: list[str] = []
    site = existing(tmp_path, progress=said.append)
    with pytest.raises(ValueError, match="no"), site.step("in vain"):
        raise ValueError("no")
    assert [step.name for step in site.steps] == ["in vain"]
    assert said[0].endswith("s  in vain")


def test_what_a_start_takes_is_measured_and_has_a_bound():
    slow = "sum(range(5_000_000))"
    commands = [["python3", "-c", ""], ["python3", "-c", slow]]
    command = [sys.executable, *images.measuring(commands)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    quick_s, slow_s = json.loads(done.stdout).values()
    assert quick_s < slow_s
    images.check_starts("a", {"x": images.START_S_MAX / 2})
    with pytest.raises(BinaryError, match="a: `x` takes 1"):
        images.check_starts("a", {"y": 0.1, "x": images.START_S_MAX})


def test_a_program_that_does_not_start_is_no_quick_one():
    command = [sys.executable, *images.measuring([["python3", "-c", "import nothing_like_it"]])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nothing_like_it" in done.stderr


class Recorded:
    """An engine that does nothing, and what it was told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, ...]] = []

    async def run(self, *arguments: str, timeout_s: float = 0) -> str:
        del timeout_s
        self.said.append(arguments)
        return ""


async def test_our_images_are_pushed_under_the_names_that_the_chart_gives_them():
    engine = Recorded()
    pushed = await images.push(ROOT, engine, "registry.example.org/storage/")
    assert len(pushed) == len(images.TARGETS)
    for name, there in zip(images.own_names(ROOT).values(), pushed, strict=True):
        assert there == f"registry.example.org/storage/{name}"
        assert ("tag", name, there) in engine.said
        assert engine.said.index(("push", "--quiet", there)) > engine.said.index(
            ("tag", name, there)
        )
