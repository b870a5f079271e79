"""What an uninstallation refuses to take. Carrying it out: e2e/tests/test_e2e_chart_install.py."""

from __future__ import annotations

from operator_world import metadata, node, some_id, volume

from tercet_api.objects import Orphan, Snapshot, SnapshotSpec
from tercet_operator.uninstall import NAMES_SHOWN_MAX, Release, refusal


def test_nodes_without_data_may_go():
    assert refusal([], [], [node("n1"), node("n2")]) is None


def test_a_volume_stays_and_is_named_with_what_to_do():
    why = refusal([volume("db")], [], [node("n1")])
    assert why is not None
    assert "db" in why
    assert "delete their PersistentVolumeClaims" in why


def test_a_refusal_names_every_way_on_as_a_command_that_helm_takes_in_that_state():
    # After a hook has failed Helm refuses to upgrade a release; to roll back to it is taken.
    said = Release("stone", 7).ways_on("storage")
    assert "helm rollback stone 7 -n storage" in said
    assert "helm uninstall stone -n storage\n" in said
    assert "helm uninstall stone -n storage --no-hooks" in said
    assert "upgrade stone" not in said


def test_what_is_refused_when_the_release_is_gone_is_met_by_installing_it_again():
    said = Release("stone", 7).way_back("storage")
    assert "Install it again as stone into storage" in said
    assert "rollback" not in said


def test_a_snapshot_stays():
    kept = Snapshot(metadata=metadata("monday"), spec=SnapshotSpec(volume="db"))
    why = refusal([], [kept], [node("n1")])
    assert why is not None
    assert "monday" in why


def test_a_replica_without_a_volume_stays():
    orphan = Orphan(volume=some_id("v"), name="lost", replica=some_id("r"))
    why = refusal([], [], [node("n1"), node("n2", status={"orphans": [orphan]})])
    assert why is not None
    assert "n2/lost" in why


def test_a_long_list_is_cut_and_counted():
    many = [volume(f"v{number:02}") for number in range(NAMES_SHOWN_MAX + 5)]
    why = refusal(many, [], [])
    assert why is not None
    assert f"v{NAMES_SHOWN_MAX - 1:02} and 5 more" in why
    assert f"v{NAMES_SHOWN_MAX:02}" not in why
