"""What an uninstallation refuses to take. Carrying it out: e2e/tests/test_e2e_chart_install.py."""

from __future__ import annotations

from operator_world import metadata, node, some_id, volume

from tercet_api.objects import Orphan, Snapshot, SnapshotSpec
from tercet_operator.uninstall import NAMES_SHOWN_MAX, refusal


def test_nodes_without_data_may_go():
    assert refusal([], [], [node("n1"), node("n2")]) is None


def test_a_volume_stays_and_is_named_with_the_way_out():
    why = refusal([volume("db")], [], [node("n1")])
    assert why is not None
    assert "db" in why
    assert "uninstall.volumes=keep" in why


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
