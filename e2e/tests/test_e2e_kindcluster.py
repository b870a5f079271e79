"""What provider `kind` is made of, without a cluster."""

from __future__ import annotations

import pytest

from tercet_e2e.errors import ProcessError
from tercet_e2e.kindcluster import configuration, loops_of, public_image
from tercet_e2e.site import SHARED


def test_every_worker_is_in_a_zone_of_its_own_and_sees_the_shared_folder(tmp_path):
    first, *workers = configuration(tmp_path)["nodes"]
    assert first == {"role": "control-plane"}
    assert len({tuple(worker["labels"].values()) for worker in workers}) == 3
    for worker in workers:
        assert worker["extraMounts"] == [
            {"hostPath": str(tmp_path), "containerPath": str(SHARED)},
        ]


def test_the_public_image_is_the_one_that_kind_itself_takes():
    assert public_image('x\nconst Image = "a/b:v1@sha256:12"\n') == "a/b:v1@sha256:12"
    with pytest.raises(ProcessError, match="no default image"):
        public_image("")


def test_only_the_loop_devices_of_one_node_are_its(tmp_path):
    for number, backing in enumerate(
        ["/var/lib/tercet/attach/n-worker/1/data", "/var/lib/tercet/attach/n-worker2/1/data"]
    ):
        folder = tmp_path / f"loop{number}" / "loop"
        folder.mkdir(parents=True)
        (folder / "backing_file").write_text(f"{backing}\n")
    (tmp_path / "loop7").mkdir()
    assert [str(device) for device in loops_of("n-worker", tmp_path)] == ["/dev/loop0"]
