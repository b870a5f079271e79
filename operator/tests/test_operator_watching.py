"""What events do to the world that the operator has already changed by itself."""

from __future__ import annotations

from kopf._core.reactor import running
from operator_world import entry, new, nodes, volume, world

from tercet_api.objects import ReplicaPhase, Volume
from tercet_operator.watching import Watching, run_kopf


def test_a_late_event_takes_no_promised_room_back() -> None:
    """It tells of the version on which a placement was decided that is just being written."""
    placed = [entry("n1", ReplicaPhase.PLACED)]
    decided_on = new("v")
    assumed = volume("v", status={"replicas": placed})
    there = world(*nodes(), assumed)
    watching = Watching(there, lambda _key, _after_s: None, lambda _item: None)
    watching.take(Volume, "MODIFIED", decided_on.manifest() | {"metadata": _metadata(decided_on)})
    assert there.volumes["v"].status.replicas == placed
    written = decided_on.model_copy(deep=True)
    written.metadata.resource_version = "8"
    watching.take(Volume, "MODIFIED", written.manifest() | {"metadata": _metadata(written)})
    assert there.volumes["v"].status.replicas == [], "a newer version is the truth"


def _metadata(of: Volume) -> dict[str, object]:
    return of.metadata.to_json()


async def test_a_user_without_a_name_may_watch(monkeypatch):
    """A pod's user has no entry in passwd: kopf must not ask for its name."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 65532")

    async def start_only(**how):
        for task in await running.spawn_tasks(**how):
            task.cancel()

    monkeypatch.delenv("POD_ID", raising=False)
    monkeypatch.setattr("getpass.getuser", nameless)
    monkeypatch.setattr("kopf.operator", start_only)
    watching = Watching(world(), lambda _key, _after_s: None, lambda _item: None)
    await run_kopf(watching, None)
