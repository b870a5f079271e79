"""The tools' cache: found, built once, never half."""

from __future__ import annotations

import threading

import pytest

from tercet_e2e.binaries import TOOLS, Binaries, module_file
from tercet_e2e.errors import BinaryError

TOOL = TOOLS["kubectl"]

# Stands in for the Go toolchain at the seam of its command line: counts, takes its time, and puts
# a program where it is told to.
GO = """#!/bin/sh
echo built >> {log}
sleep 0.3
while [ "$1" != -o ]; do shift; done
printf '#!/bin/sh\\necho {version}\\n' > "$2"
chmod +x "$2"
"""


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def said():
    return []


@pytest.fixture
def binaries(tmp_path, said):
    log = tmp_path / "log"
    go = program(tmp_path / "bin" / "go", GO.format(log=log, version=TOOL.version))
    env = {"PATH": f"{tmp_path}/path:/usr/bin:/bin"}
    return Binaries(tmp_path / "cache", env, go=str(go), progress=said.append)


def test_concurrent_callers_build_once(binaries, tmp_path, said):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(binaries.build(TOOL))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [binaries.cached(TOOL)] * 4
    assert (tmp_path / "log").read_text().count("built") == 1
    assert [entry.name for entry in binaries.cached(TOOL).parent.iterdir() if entry.name[0] != "."]


def test_a_build_that_fails_leaves_nothing_and_says_what_to_do(binaries, tmp_path):
    program(tmp_path / "bin" / "go", "#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    with pytest.raises(BinaryError, match=r"no space left[\s\S]*KUBEBUILDER_ASSETS"):
        binaries.build(TOOL)
    assert binaries.find(TOOL) is None
    assert [entry.name for entry in binaries.cached(TOOL).parent.iterdir()] == [".lock"]


def test_a_tool_of_another_series_is_not_taken(binaries, tmp_path):
    program(tmp_path / "path" / TOOL.name, "#!/bin/sh\necho Client Version: v1.32.4\n")
    assert binaries.find(TOOL) is None


def test_a_tool_on_path_or_in_assets_is_taken_when_its_series_agrees(binaries, tmp_path):
    assets = program(tmp_path / "assets" / TOOL.name, "#!/bin/sh\necho Version: v1.34.9\n")
    binaries.env["KUBEBUILDER_ASSETS"] = str(assets.parent)
    assert binaries.find(TOOL) == assets
    ours = program(tmp_path / "path" / TOOL.name, "#!/bin/sh\necho Version: v1.34.1\n")
    assert binaries.find(TOOL) == ours


def test_a_tool_that_hangs_or_crashes_when_asked_is_not_taken(binaries, tmp_path):
    program(tmp_path / "path" / TOOL.name, "#!/nonexistent/interpreter\n")
    assert binaries.find(TOOL) is None


def test_progress_tells_the_tool_and_its_number(binaries, said):
    binaries.ensure(["kubectl", "kube-scheduler"])
    assert said[0].startswith("build kubectl v1.34.4 (1 of 2,")
    assert said[1].startswith("build kube-scheduler v1.34.4 (2 of 2,")
    said.clear()
    binaries.ensure(["kubectl", "kube-scheduler"])
    assert said == []


def test_a_missing_toolchain_is_named(tmp_path):
    binaries = Binaries(tmp_path, {"PATH": ""}, go="/nonexistent/go")
    with pytest.raises(BinaryError, match=r"kubectl 1\.34 is not here.*install the Go"):
        binaries.build(TOOL)


def test_a_module_that_is_not_to_be_had(tmp_path):
    go = program(tmp_path / "go", '#!/bin/sh\necho \'{"Error": "unknown revision"}\'; exit 1\n')
    with pytest.raises(BinaryError, match=r"example\.test/m@v1\.0\.0.*unknown revision"):
        module_file("example.test/m", "v1.0.0", "x", go=str(go))
