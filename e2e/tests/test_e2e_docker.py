"""The Docker Engine of the tests: its parts alone, and that nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tercet_e2e.cleanup import clean, grouped_processes
from tercet_e2e.docker import debian, engine, traces
from tercet_e2e.errors import BinaryError
from tercet_e2e.state import StateFolder

SAVED = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A INPUT -p tcp -m comment --comment "not ours" -j ACCEPT
-A FORWARD -j DOCKER-USER
-A FORWARD -o br-12 -j RETURN
-A FORWARD -o br-0 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
"""


def test_only_dockers_rules_and_chains_are_taken_out():
    assert traces.removals(SAVED, ["br-12"]) == [
        ["-D", "FORWARD", "-j", "DOCKER-USER"],
        ["-D", "FORWARD", "-o", "br-12", "-j", "RETURN"],
        ["-D", "DOCKER-USER", "-j", "RETURN"],
        ["-X", "DOCKER"],
        ["-X", "DOCKER-USER"],
    ]
    assert traces.forward_policy(SAVED) == "DROP"
    assert traces.forward_policy("") == "ACCEPT"


def test_only_loop_devices_over_files_without_a_path_are_dead(tmp_path):
    backings = ("/volume", str(tmp_path / "alive"), "/tmp/x/gone (deleted)", "/etc")
    for number, backing in enumerate(backings):
        folder = tmp_path / f"loop{number}" / "loop"
        folder.mkdir(parents=True)
        (folder / "backing_file").write_text(f"{backing}\n")
    assert [str(device) for device in traces.dead_loops(tmp_path)] == ["/dev/loop0"]


def test_the_version_of_a_package_is_what_apt_would_install():
    said = "x:\n  Installed: (none)\n  Candidate: 20.10.24+dfsg1-1\n  Version table:\n"
    assert debian.candidate(said) == "20.10.24+dfsg1-1"
    assert debian.candidate("x:\n  Installed: (none)\n  Candidate: (none)\n") is None
    assert debian.candidate("") is None


def test_a_suite_of_backports_is_where_what_it_adds_to_is():
    targets = "http://a/security bookworm-security\nhttp://a/debian bookworm\n"
    found = debian.mirror_of("bookworm-backports", targets)
    assert found == ("http://a/debian", "bookworm")
    with pytest.raises(BinaryError, match="trixie, which is not among"):
        debian.mirror_of("trixie-backports", targets)


def test_a_machine_that_withholds_a_capability_is_noticed():
    assert engine.missing_capabilities("Name:\tx\nCapBnd:\t000001ffffffffff\n") == 0
    assert engine.missing_capabilities("Name:\tx\nCapBnd:\t000001fffeffffff\n") == 1


def test_the_wrapper_asks_for_no_more_than_the_machine_has(tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text('{"bounding":["CAP_CHOWN","CAP_SYS_RESOURCE","CAP_BPF"]}')
    text = Path(engine.__file__).with_name("runc-bounded").read_text()
    status = "CapBnd:\t000001fffeffffff"
    (tmp_path / "status").write_text(status)
    text = text.replace("/proc/self/status", str(tmp_path / "status"))
    script = tmp_path / "runc-bounded"
    script.write_text(text.replace("@RUNC@", "echo ran"))
    done = subprocess.run(
        ["sh", script, "create", "--bundle", bundle, "x"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"ran create --bundle {bundle} x\n"
    assert (bundle / "config.json").read_text() == '{"bounding":["CAP_CHOWN","CAP_BPF"]}'


@pytest.mark.local
def test_what_is_in_the_cgroup_of_a_folder_ends_with_it(tmp_path):
    state = StateFolder(tmp_path)
    state.prepare()
    name = f"tercet-test-{os.getpid()}"
    (tmp_path / "cgroup").write_text(name)
    hierarchies = [Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")]
    group = next(entry for entry in hierarchies if (entry / "cgroup.procs").exists()) / name
    (group / "deep").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        (group / "deep" / "cgroup.procs").write_text(str(child.pid))
        assert [found.pid for found in grouped_processes(state)] == [child.pid]
        clean(state)
        assert child.wait(10) == -signal.SIGKILL
    assert not group.exists()


@pytest.mark.kind
def test_an_engine_whose_tool_is_killed_leaves_nothing(tmp_path):
    if os.environ.get("DOCKER_HOST") or engine.running() is not None:
        return  # an engine of somebody else is used as it is, and is none of this test's business
    before = (traces.bridges(), traces.FORWARDING.read_text())
    with subprocess.Popen(
        [sys.executable, "-m", "tercet_e2e", "docker", "hold"], stdout=subprocess.PIPE, text=True
    ) as tool:
        assert tool.stdout is not None
        for line in tool.stdout:
            if "runs until" in line:
                break
        state = engine.folder()
        assert engine.running() is not None
        assert traces.bridges() != before[0]
        tool.kill()
    deadline_s = time.monotonic() + 60
    while (state.root / traces.BEFORE).exists():  # the last thing that the reaper takes away
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert (traces.bridges(), traces.FORWARDING.read_text()) == before
    assert engine.running() is None
