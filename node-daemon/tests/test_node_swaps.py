"""Swaps through the whole agent: won, lost, forbidden, and with an answer that never came (T3)."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from node_bench import TIMEOUT_S, until, value_of

from tercet_api.clients import volumes
from tercet_node import convert
from tercet_node.protos import engine_pb2 as pb

pytestmark = pytest.mark.local


def successor(volume, bench):
    old = convert.config_to_proto(volume.status.config)
    new = pb.Config()
    new.CopyFrom(old)
    new.epoch += 1
    new.primary.instance = bench.engine.instance
    return old, new


async def test_swap_goes_through_and_loses_when_another_was_first(bench):
    volume = await bench.first_config(await bench.created((await bench.make_volume()).name))
    old = convert.config_to_proto(volume.status.config)
    new = pb.Config()
    new.CopyFrom(old)
    new.epoch = 2
    new.primary.instance = bench.engine.instance
    token = bench.engine.ask_swap(volume.spec.uuid, old, new)
    report = await asyncio.wait_for(bench.engine.reports.get(), TIMEOUT_S)
    assert (report.token, report.outcome) == (token, pb.ReportSwapRequest.SWAPPED)
    assert report.view.consistent
    assert report.view.config == new
    assert (await bench.volume(volume.name)).status.config.epoch == 2
    # The same old value once more: another configuration is there by now.
    third = pb.Config()
    third.CopyFrom(new)
    third.epoch = 3
    token = bench.engine.ask_swap(volume.spec.uuid, old, third)
    report = await asyncio.wait_for(bench.engine.reports.get(), TIMEOUT_S)
    assert (report.token, report.outcome) == (token, pb.ReportSwapRequest.LOST)
    assert report.view.config == new


async def test_swap_whose_answer_is_lost_is_unknown_until_a_consistent_read(proxied):
    """T3: the request went through, nobody here knows it; then a read says so."""
    bench = proxied
    volume = await bench.first_config(await bench.created((await bench.make_volume()).name))
    old, new = successor(volume, bench)
    bench.proxy.swallow = True
    token = bench.engine.ask_swap(volume.spec.uuid, old, new)

    async def carried_out():
        return (await volumes(bench.near).get(volume.name)).status.config.epoch == 2

    await until(carried_out, "carried out")
    bench.engine.observed.clear()
    bench.proxy.cut = True
    bench.proxy.hang_up()
    report = await asyncio.wait_for(bench.engine.reports.get(), TIMEOUT_S)
    assert (report.token, report.outcome) == (token, pb.ReportSwapRequest.UNKNOWN)
    assert not report.HasField("view")
    assert not any(seen.view.consistent for seen in bench.engine.observed)
    bench.proxy.swallow = bench.proxy.cut = False

    async def read():
        views = [seen.view for seen in bench.engine.observed if seen.view.consistent]
        return views[-1] if views else None

    view = await until(read, "consistent read after the API server came back")
    assert view.config == new


async def test_engine_goes_on_while_the_api_server_is_away(proxied):
    bench = proxied
    volume = await bench.served()
    bench.proxy.cut = True
    bench.proxy.hang_up()
    await bench.kill_engine()
    second = await bench.start_engine()
    # The engine is configured and shown its volume out of what the agent remembers.
    await until(lambda: value_of(second.last_view(volume.spec.uuid)), "shown without API server")
    old, new = successor(volume, bench)
    second.ask_swap(volume.spec.uuid, old, new)
    report = await asyncio.wait_for(second.reports.get(), TIMEOUT_S)
    assert report.outcome == pb.ReportSwapRequest.UNKNOWN
    bench.proxy.cut = False

    async def read():
        return any(seen.view.consistent for seen in second.observed)

    await until(read, "consistent read once it is back")
    token = second.ask_swap(volume.spec.uuid, old, new)
    report = await asyncio.wait_for(second.reports.get(), TIMEOUT_S)
    assert (report.token, report.outcome) == (token, pb.ReportSwapRequest.SWAPPED)


async def test_step_that_the_rules_forbid_is_lost_and_said(bench):
    volume = await bench.first_config(await bench.created((await bench.make_volume()).name))
    old, new = successor(volume, bench)
    new.members[0].replica = str(uuid.uuid4())
    new.members.add(node="elsewhere", replica=str(uuid.uuid4()))
    bench.engine.ask_swap(volume.spec.uuid, old, new)
    report = await asyncio.wait_for(bench.engine.reports.get(), TIMEOUT_S)
    assert report.outcome == pb.ReportSwapRequest.LOST
    assert report.view.config == old

    async def look():
        found = await bench.api.request(
            "GET",
            "/api/v1/namespaces/default/events",
            query={"fieldSelector": f"involvedObject.uid={volume.uid}"},
        )
        return [e for e in found["items"] if e["reason"] == "ConfigRefused"]

    assert await until(look, "event")
