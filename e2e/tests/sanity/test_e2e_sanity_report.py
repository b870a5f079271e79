"""What csi-sanity says is read as it is meant: nothing that went wrong may pass for well."""

import json
from pathlib import Path

import pytest

from tercet_e2e.errors import ProcessError
from tercet_e2e.sanity import judge, read_report


def spec(state: str, kind: str = "It", message: str = "") -> dict:
    return {
        "ContainerHierarchyTexts": ["Controller Service", "CreateVolume"] if kind == "It" else None,
        "LeafNodeType": kind,
        "LeafNodeText": "should work",
        "State": state,
        "RunTime": 1_500_000_000,
    } | ({"Failure": {"Message": message}} if message else {})


def report(*specs: dict) -> str:
    return json.dumps([{"SuiteDescription": "CSI Driver Test Suite", "SpecReports": list(specs)}])


def test_specs_are_counted_by_how_they_ended():
    verdict = read_report(
        report(spec("passed"), spec("skipped", message="not supported"), spec("pending"))
    )
    assert [s.name for s in verdict.run] == ["Controller Service / CreateVolume / should work"]
    assert verdict.run[0].seconds == 1.5
    assert [s.message for s in verdict.of("skipped")] == ["not supported"]
    assert verdict.failed == []


@pytest.mark.parametrize("state", ["failed", "panicked", "timedout", "interrupted", "aborted"])
def test_whatever_did_not_pass_has_failed(state: str):
    assert len(read_report(report(spec("passed"), spec(state))).failed) == 1


def test_what_fails_around_the_specs_has_failed_as_well():
    verdict = read_report(report(spec("passed", "BeforeSuite"), spec("failed", "AfterSuite")))
    assert [s.state for s in verdict.failed] == ["failed"]
    assert len(verdict.specs) == 1


async def test_a_judge_that_says_nothing_is_no_acquittal(tmp_path: Path):
    program = tmp_path / "csi-sanity"
    program.write_text("#!/bin/sh\necho cannot reach the driver\nexit 0\n")
    program.chmod(0o755)
    socket = tmp_path / "csi.sock"
    with pytest.raises(ProcessError, match="cannot reach the driver"):
        await judge(program, socket, socket, "mount", tmp_path / "run")
