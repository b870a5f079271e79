"""The small parts of a local cluster, each alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet_e2e import faults
from tercet_e2e.cleanup import mounts_below, start_time_ticks
from tercet_e2e.errors import ProcessError, StateError
from tercet_e2e.kubelet.containers import BACKOFF_MAX_S, BACKOFF_MIN_S, Report, backoff_s
from tercet_e2e.kubelet.model import Container, Phase, Pod, PodUid, Run, VolumeHandle
from tercet_e2e.kubelet.records import (
    PodRecord,
    Published,
    Records,
    StagedVolume,
    VolumeSpec,
)
from tercet_e2e.kubelet.status import phase_of, problem_of, status_of
from tercet_e2e.kubelet.volumes import (
    VolumeError,
    attachment_name,
    quantity_bytes,
    quantity_text,
)
from tercet_e2e.pki import Authority
from tercet_e2e.ports import Ports
from tercet_e2e.processes import RESTART_PAUSE_MAX_S, RESTART_PAUSE_MIN_S, restart_pause_s
from tercet_e2e.state import StateFolder, write_atomically

VOLUME = VolumeSpec(
    handle=VolumeHandle("vol-1"),
    driver="d.example.test",
    pv="pv-1",
    claim="default/c",
    block=False,
    fs_type="ext4",
    access_mode="ReadWriteOnce",
    mount_options=("noatime",),
    attributes={"a": "b"},
    capacity_bytes=1,
    claim_bytes=1,
)
UID = PodUid("uid-1")


def test_after_a_start_what_was_mounted_is_uncertain_and_done_again(tmp_path):
    records = Records(tmp_path)
    records.set_staged(StagedVolume(VOLUME, Phase.DONE.value, {"k": "v"}))
    records.set_pod(PodRecord(UID, "default", "p"))
    records.set_published(UID, "data", Published(VOLUME, Phase.DONE.value, read_only=True))

    again = Records(tmp_path)
    assert again.staged[VOLUME.handle] == StagedVolume(VOLUME, Phase.UNCERTAIN.value, {"k": "v"})
    published = again.pods[UID].published["data"]
    assert published == Published(VOLUME, Phase.UNCERTAIN.value, read_only=True)

    again.set_published(UID, "data", None)
    again.drop_pod(UID)
    again.drop_staged(VOLUME.handle)
    empty = Records(tmp_path)
    assert (empty.staged, empty.pods) == ({}, {})
    assert list((tmp_path / "staged").iterdir()) == []


def test_a_pod_with_a_volume_is_not_forgotten(tmp_path):
    records = Records(tmp_path)
    records.set_pod(PodRecord(UID, "default", "p"))
    records.set_published(UID, "data", Published(VOLUME, Phase.UNCERTAIN.value, read_only=False))
    with pytest.raises(AssertionError, match="still has volumes"):
        records.drop_pod(UID)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1Gi", 1 << 30), ("500M", 500_000_000), ("64Ki", 1 << 16), ("7", 7), ("1.5Gi", 3 << 29)],
)
def test_quantities(text, size):
    assert quantity_bytes(text) == size


def test_what_is_no_quantity_is_refused():
    with pytest.raises(VolumeError, match="1Zi"):
        quantity_bytes("1Zi")


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_quantity_is_written_exactly(size):
    assert quantity_bytes(quantity_text(size)) == size


def test_an_attachment_has_the_name_that_the_controller_gives_it():
    # By sha256sum over the three names; that the controller agrees is shown by the cluster tests.
    digest = "4af94228ee9d441e02225497584706bfc975bdb4d2db3571d8c5db2668c1e969"
    assert attachment_name(VolumeHandle("vol"), "driver", "node") == f"csi-{digest}"


@given(st.integers(min_value=1, max_value=10_000), st.floats(min_value=0, max_value=59))
def test_the_pause_before_a_restart_grows_and_is_bounded(attempt, lived_s):
    assert BACKOFF_MIN_S <= backoff_s(attempt, lived_s) <= BACKOFF_MAX_S
    assert backoff_s(attempt, lived_s) <= backoff_s(attempt + 1, lived_s)
    assert backoff_s(attempt, 61.0) == BACKOFF_MIN_S


def test_the_pause_of_a_process_starts_anew_when_it_lived():
    assert restart_pause_s(0.0, 0.0) == RESTART_PAUSE_MIN_S
    assert restart_pause_s(4.0, 0.0) == RESTART_PAUSE_MAX_S
    assert restart_pause_s(4.0, 11.0) == RESTART_PAUSE_MIN_S


def test_two_processes_are_given_different_addresses_and_ports(tmp_path):
    program = (
        "import pathlib, sys; from tercet_e2e.ports import Ports\n"
        "with Ports(pathlib.Path(sys.argv[1])) as ports:\n"
        "    print(ports.take_address(), flush=True); sys.stdin.read()"
    )
    with Ports(tmp_path) as ports:
        mine = {ports.take_address(), ports.take_address()}
        assert len({ports.take() for _ in range(20)}) == 20
        other = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        theirs = other.stdout.readline().strip()
        other.communicate()
        assert theirs.startswith("127.0.1.")
        assert theirs not in mine
        assert ports.take_address() == theirs, "given back when its holder ended"


def pod(*main, **more):
    return Pod(UID, "default/p", main=main, **more)


def test_phases_of_a_pod():
    running = Container("c", Run.RUNNING)
    good, bad = Container("c", Run.EXITED, 0), Container("c", Run.EXITED, 1)
    assert phase_of(pod(Container("c"))) == "Pending"
    assert phase_of(pod(running)) == "Running"
    assert phase_of(pod(bad)) == "Running", "it is started again"
    assert phase_of(pod(good, policy="Never")) == "Succeeded"
    assert phase_of(pod(bad, policy="OnFailure")) == "Running"
    assert phase_of(pod(bad, policy="Never")) == "Failed"
    assert phase_of(pod(Container("c"), problem="no command")) == "Failed"
    assert phase_of(pod(good, deleting=True)) == "Succeeded"


def test_a_status_tells_the_exit_code_and_why():
    container = Container("c", Run.EXITED, 128)
    reports = {"c": Report(container, 1.0, 2.0, "cannot start 'x'")}
    spec = {"containers": [{"name": "c"}]}
    done = pod(container, policy="Never")
    status = status_of(done, spec, reports, "127.0.1.1", "1970-01-01T00:00:00Z")
    ended = status["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert ended["finishedAt"] == "1970-01-01T00:00:02Z"
    ready = next(c for c in status["conditions"] if c["type"] == "Ready")
    assert ready["status"] == "False"


def test_what_this_node_cannot_run_is_told():
    command = [{"name": "c", "command": ["true"]}]
    assert problem_of({"containers": command}) == ""
    assert "no command" in problem_of({"containers": [{"name": "c", "image": "nginx"}]})
    volume = {"name": "v", "nfs": {"server": "x"}}
    assert "volume v" in problem_of({"containers": command, "volumes": [volume]})


def test_certificates_are_kept_and_verify(tmp_path):
    authority = Authority.open(tmp_path, "ca")
    first = authority.issue("server", "server", addresses=["127.0.0.1"])
    text = first.cert.read_bytes()
    again = Authority.open(tmp_path, "ca").issue("server", "server", addresses=["127.0.0.1"])
    assert again.cert.read_bytes() == text
    assert first.key.stat().st_mode & 0o077 == 0
    check = ["openssl", "verify", "-x509_strict", "-CAfile", authority.files.cert, first.cert]
    assert subprocess.run(check, check=False, capture_output=True).returncode == 0


@pytest.mark.local
def test_mount_points_with_odd_names_are_found(tmp_path):
    folder = tmp_path / "a b\tc"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        assert [mount.path for mount in mounts_below(tmp_path)] == [folder]
        assert mounts_below(tmp_path / "a") == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_fault_reaches_the_engine_and_not_its_supervisor(tmp_path):
    state = StateFolder.at(tmp_path) if len(str(tmp_path)) < 48 else StateFolder(tmp_path)
    state.prepare()
    script = "sh -c 'sleep 60; : run' run & wait"
    supervisor = subprocess.Popen(["bash", "-c", script])
    try:
        ticks = start_time_ticks(supervisor.pid)
        record = f'{{"pid": {supervisor.pid}, "start_ticks": {ticks}}}'
        write_atomically(state.processes / "engine-supervisor-n1.json", record)
        engine = None
        while engine is None:
            engine = faults.pid(state, "engine", "n1")
        assert engine not in (supervisor.pid, os.getpid())
        assert faults.kill(state, "engine", "n1") == engine
        assert supervisor.wait(timeout=10) is not None
        with pytest.raises(ProcessError, match="does not run"):
            faults.kill(state, "engine", "n1")
        with pytest.raises(ProcessError, match="there are: engine-supervisor-n1"):
            faults.kill(state, "agent", "n9")
    finally:
        supervisor.kill()


def test_a_damaged_state_folder_is_told(tmp_path):
    state = StateFolder(tmp_path)
    state.cluster_file.write_text("{")
    with pytest.raises(StateError, match="damaged"):
        state.cluster_id()
