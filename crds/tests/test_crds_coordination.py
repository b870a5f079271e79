"""Membership and election on a Lease, and swaps of a configuration, against a small API server.

`FakeObjects` is the seam below `Objects`: it keeps JSON, gives each write a new resourceVersion and
refuses what an API server refuses. Whether a real one does the same is what the local tests show.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tercet_api.clients import (
    Api,
    ApiError,
    Conflict,
    Json,
    NotFound,
    Objects,
    Refused,
    Unreachable,
)
from tercet_api.coordination import (
    Election,
    Lease,
    LeaseSpec,
    Lost,
    Refusal,
    Sighting,
    Swapped,
    Unknown,
    election,
    renew_node_lease,
    sight,
    swap_config,
)
from tercet_api.coordination.lease import micro_time
from tercet_api.objects import (
    Config,
    ConfigState,
    Member,
    Metadata,
    Primary,
    Volume,
)

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
ID = "00000000-0000-4000-8000-00000000000{}"


class FakeApi(Api):
    """An API server of a dictionary; `fail` makes the next requests fail, before or after."""

    def __init__(self) -> None:
        super().__init__(None)
        self.items: dict[str, Json] = {}
        self.version = 0
        self.fail: list[tuple[ApiError, bool]] = []
        """(error, whether the request is carried out all the same)"""

    async def request(self, method: str, path: str, body: Any = None, **_: object) -> Json:
        await asyncio.sleep(0)
        error, done = self.fail.pop(0) if self.fail else (None, True)
        answer = self._carry_out(method, path, body) if done else {}
        if error is not None:
            raise error
        return answer

    def _carry_out(self, method: str, path: str, body: Any) -> Json:
        path = path.removesuffix("/status")
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.items:
                raise Conflict("it exists")
            self.items[path] = {}
            return self._store(
                path, {**body, "metadata": {**body["metadata"], "uid": ID.format(9)}}
            )
        if path not in self.items:
            raise NotFound(path)
        if method == "GET":
            return copy.deepcopy(self.items[path])
        assert method == "PATCH"
        if isinstance(body, dict):
            return self._merge(path, body)
        return self._json_patch(path, body)

    def _store(self, path: str, item: Json) -> Json:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.items[path] = copy.deepcopy(item)
        return copy.deepcopy(item)

    def _merge(self, path: str, patch: Json) -> Json:
        there = copy.deepcopy(self.items[path])
        wanted = patch.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != there["metadata"]["resourceVersion"]:
            raise Conflict("the object has been modified")
        for part, members in patch.items():
            there[part] = {**there.get(part, {}), **members}
        return self._store(path, there)

    def _json_patch(self, path: str, patch: Sequence[Json]) -> Json:
        there = copy.deepcopy(self.items[path])
        for operation in patch:
            *parents, last = operation["path"].strip("/").split("/")
            node = there
            for parent in parents:
                node = node[parent]
            if operation["op"] == "test" and node.get(last) != operation["value"]:
                raise Refused(f"test of {operation['path']} failed")
            if operation["op"] == "add":
                node[last] = operation["value"]
        if there["status"]["config"]["epoch"] == 666:
            raise Refused("an epoch never falls")
        return self._store(path, there)


def a_config(epoch: int = 1, node: str = "n1") -> Config:
    """A configuration of three members."""
    return Config(
        epoch=epoch,
        state=ConfigState.RECOVERING,
        primary=Primary(node=node, instance=ID.format(1)),
        members=[Member(node=f"n{n}", replica=ID.format(n)) for n in (1, 2, 3)],
    )


@pytest.fixture
def api() -> FakeApi:
    """An API server with one volume, not configured yet."""
    made = FakeApi()
    made.items["/apis/tercet.io/v1alpha1/volumes/v"] = {
        "metadata": {"name": "v", "uid": ID.format(9), "resourceVersion": "1"},
        "spec": {"sizeBytes": 1 << 30},
        "status": {},
    }
    return made


@pytest.fixture
def volumes(api: FakeApi) -> Objects[Volume]:
    """The volumes."""
    return Objects(api, Volume, "volumes")


@pytest.fixture
def leases(api: FakeApi) -> Objects[Lease]:
    """The Leases."""
    return Objects(api, Lease, "leases", namespace="tercet-system")


# ------------------------------------------------------------------ swaps


async def test_swap(volumes: Objects[Volume]) -> None:
    """The first one from nothing, the next ones from the whole old value."""
    first = await swap_config(volumes, "v", ID.format(9), None, a_config())
    assert isinstance(first, Swapped)
    second = await swap_config(volumes, "v", ID.format(9), a_config(), a_config(2, "n2"))
    assert isinstance(second, Swapped)
    assert second.volume.status.config == a_config(2, "n2")


async def test_of_several_swaps_one_wins(volumes: Objects[Volume]) -> None:
    """Racing from the same old value; the others see the winner's."""
    await swap_config(volumes, "v", ID.format(9), None, a_config())
    answers = await asyncio.gather(
        *(
            swap_config(volumes, "v", ID.format(9), a_config(), a_config(2, f"n{n}"))
            for n in (1, 2, 3)
        )
    )
    won = [answer for answer in answers if isinstance(answer, Swapped)]
    lost = [answer for answer in answers if isinstance(answer, Lost)]
    assert (len(won), len(lost)) == (1, 2)
    for answer in lost:
        assert answer.volume is not None
        assert answer.volume.status.config == won[0].volume.status.config


async def test_an_edit_within_the_epoch_is_noticed(volumes: Objects[Volume]) -> None:
    """The whole value is tested, not the epoch alone."""
    await swap_config(volumes, "v", ID.format(9), None, a_config())
    active = a_config().model_copy(update={"state": ConfigState.ACTIVE})
    await swap_config(volumes, "v", ID.format(9), a_config(), active)
    answer = await swap_config(volumes, "v", ID.format(9), a_config(), a_config(2, "n2"))
    assert isinstance(answer, Lost)
    assert answer.volume is not None
    assert answer.volume.status.config == active


async def test_a_rule_that_refuses_is_no_lost_race(volumes: Objects[Volume]) -> None:
    """Both are 422; a read tells them apart."""
    await swap_config(volumes, "v", ID.format(9), None, a_config())
    answer = await swap_config(volumes, "v", ID.format(9), a_config(), a_config(666))
    assert isinstance(answer, Refusal)
    assert "never falls" in answer.message


async def test_another_object_of_the_name(volumes: Objects[Volume], api: FakeApi) -> None:
    """Gone and made again: lost, with nothing to follow. Gone: the same."""
    answer = await swap_config(volumes, "v", ID.format(8), None, a_config())
    assert answer == Lost(None)
    api.items.clear()
    assert await swap_config(volumes, "v", ID.format(9), None, a_config()) == Lost(None)


@pytest.mark.parametrize("carried_out", [True, False])
async def test_a_lost_answer_leaves_it_open(
    volumes: Objects[Volume], api: FakeApi, *, carried_out: bool
) -> None:
    """Until a read says more, both outcomes count; asked again, it is found to be done."""
    api.fail = [(Unreachable("no answer"), carried_out)]
    answer = await swap_config(volumes, "v", ID.format(9), None, a_config())
    assert isinstance(answer, Unknown)
    again = await swap_config(volumes, "v", ID.format(9), None, a_config())
    assert isinstance(again, Swapped)
    assert again.volume.status.config == a_config()


async def test_no_read_no_verdict(volumes: Objects[Volume], api: FakeApi) -> None:
    """Refused, and the read that would tell why fails: unknown."""
    api.fail = [(Refused("422"), False), (Unreachable("away"), False)]
    assert isinstance(await swap_config(volumes, "v", ID.format(9), None, a_config()), Unknown)


# ------------------------------------------------------------------ membership


def a_lease(renewed: datetime, duration_s: int = 10) -> Lease:
    """A node's Lease."""
    spec = LeaseSpec(renew_time=micro_time(renewed), lease_duration_seconds=duration_s)
    return Lease(metadata=Metadata(name="storagenode-n1"), spec=spec)


def test_expiry_counts_from_when_the_renewal_was_seen() -> None:
    """On the observer's clock: a node whose clock is an hour behind stays alive by renewing."""
    behind = NOW - timedelta(hours=1)
    first = sight(None, a_lease(behind), 100.0, NOW)
    assert first.expired(100.0), "at first sight nothing but the written age is known"
    second = sight(first, a_lease(behind + timedelta(seconds=2)), 102.0, NOW)
    assert not second.expired(111.9)
    assert second.expired(112.0)


def test_first_sight_goes_by_the_written_age() -> None:
    """A fresh observer does not call a node alive that has been dead for long, nor the reverse."""
    assert sight(None, a_lease(NOW - timedelta(seconds=60)), 5.0, NOW).expired(5.0)
    fresh = sight(None, a_lease(NOW - timedelta(seconds=4)), 5.0, NOW)
    assert fresh == Sighting(micro_time(NOW - timedelta(seconds=4)), 11.0)
    ahead = sight(None, a_lease(NOW + timedelta(hours=1)), 5.0, NOW)
    assert ahead.expires_at_s == 15.0, "a clock that is ahead gains nothing"


def test_seeing_the_same_renewal_again_prolongs_nothing() -> None:
    """Watches list again; that is no sign of life."""
    first = sight(None, a_lease(NOW), 100.0, NOW)
    assert sight(first, a_lease(NOW), 109.0, NOW + timedelta(seconds=9)) == first


async def test_renewal_makes_the_lease(leases: Objects[Lease]) -> None:
    """Made where there is none, then only renewed."""
    await renew_node_lease(leases, "n1", "me", NOW)
    later = await renew_node_lease(leases, "n1", "me", NOW + timedelta(seconds=2))
    assert later.name == "storagenode-n1"
    assert later.spec.renew_time == micro_time(NOW + timedelta(seconds=2))


# ------------------------------------------------------------------ election


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elections that do not take long; a process that got no time for a second loses nothing."""
    monkeypatch.setattr(election, "RENEW_DEADLINE_S", 3.0)
    monkeypatch.setattr(election, "RETRY_S", 0.02)
    monkeypatch.setattr(election, "DURATION_S", 6)


async def hold(candidate: Election, leading: list[str], name: str, until: asyncio.Event) -> str:
    """Lead until told or until it is lost."""
    async with candidate.lead() as lost:
        assert not leading, "at most one at a time"
        leading.append(name)
        waits = [asyncio.create_task(lost.wait()), asyncio.create_task(until.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        leading.remove(name)
        return "lost" if lost.is_set() else "left"


async def eventually(check: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(within_s):
        while not check():
            await asyncio.sleep(0.005)


def lease_of(api: FakeApi) -> tuple[str, Json]:
    """Path and content of the only Lease, as the server has it."""
    ((path, lease),) = ((p, item) for p, item in api.items.items() if p.endswith("/l"))
    return path, lease


@pytest.mark.usefixtures("quick")
async def test_one_leads_and_hands_over(leases: Objects[Lease]) -> None:
    """At most one at a time; who leaves in order is followed at once."""
    leading: list[str] = []
    stops = [asyncio.Event(), asyncio.Event()]
    runs = [
        asyncio.create_task(hold(Election(leases, "l", f"c{n}"), leading, f"c{n}", stops[n]))
        for n in (0, 1)
    ]
    await eventually(lambda: len(leading) == 1)
    first = int(leading[0][1])
    stops[first].set()
    assert await runs[first] == "left"
    await eventually(lambda: leading == [f"c{1 - first}"], within_s=5.0)  # not by expiry
    stops[1 - first].set()
    assert await runs[1 - first] == "left"


@pytest.mark.usefixtures("quick")
async def test_a_leader_that_cannot_renew_stops_first(leases: Objects[Lease], api: FakeApi) -> None:
    """Its own deadline ends before the Lease does."""
    leading: list[str] = []
    run = asyncio.create_task(hold(Election(leases, "l", "c0"), leading, "c0", asyncio.Event()))
    await eventually(lambda: leading == ["c0"])
    api.fail = [(Unreachable("away"), False)] * 100_000
    async with asyncio.timeout(5.8):  # the Lease itself lasts for six seconds
        assert await run == "lost"


async def test_a_leader_that_is_succeeded_stops(
    leases: Objects[Lease], api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody took the Lease by force: seen at the next renewal."""
    monkeypatch.setattr(election, "RETRY_S", 0.02)
    leading: list[str] = []
    run = asyncio.create_task(hold(Election(leases, "l", "c0"), leading, "c0", asyncio.Event()))
    await eventually(lambda: leading == ["c0"])
    path, _ = lease_of(api)
    api._merge(path, {"spec": {"holderIdentity": "usurper"}})
    async with asyncio.timeout(election.RENEW_DEADLINE_S - 1):  # not by the deadline
        assert await run == "lost"
    assert api.items[path]["spec"]["holderIdentity"] == "usurper", "nothing to give back"


@pytest.mark.usefixtures("quick")
async def test_a_renewal_whose_answer_was_lost(leases: Objects[Lease], api: FakeApi) -> None:
    """It took place: the next one finds its own name and goes on."""
    stop, leading = asyncio.Event(), list[str]()
    run = asyncio.create_task(hold(Election(leases, "l", "c0"), leading, "c0", stop))
    await eventually(lambda: leading == ["c0"])
    api.fail = [(Unreachable("no answer"), True)]
    await eventually(lambda: not api.fail)
    lost_at = lease_of(api)[1]["spec"]["renewTime"]
    await eventually(lambda: lease_of(api)[1]["spec"]["renewTime"] != lost_at)
    assert leading == ["c0"]
    stop.set()
    assert await run == "left"


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.usefixtures("quick")
async def test_who_stops_during_a_renewal_gives_the_lease_back(
    leases: Objects[Lease], api: FakeApi, answered: bool
) -> None:
    """The renewal took place and its answer is nobody's any more; or the giving back's is lost."""
    stop, leading = asyncio.Event(), list[str]()
    run = asyncio.create_task(hold(Election(leases, "l", "c0"), leading, "c0", stop))
    await eventually(lambda: leading == ["c0"])
    path, _ = lease_of(api)
    if answered:
        api._merge(path, {"spec": {"renewTime": micro_time(NOW)}})
    else:
        api.fail = [(Unreachable("no answer"), False)]
    stop.set()
    assert await run == "left"
    assert not lease_of(api)[1]["spec"]["holderIdentity"]
