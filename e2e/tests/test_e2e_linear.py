"""What a run of `linear` is made of, each part alone: wires, plan, hosts' files."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import subprocess
import sys
import time

import pytest

from tercet_e2e.linear import judge
from tercet_e2e.linear.hosts import Host, longest_gap_s
from tercet_e2e.linear.nemesis import resolved
from tercet_e2e.linear.network import Network
from tercet_e2e.linear.plan import LEASE_S, Kind, plan
from tercet_e2e.linear.run import Outcome, told
from tercet_e2e.linear.wires import Link, Wires, address, fate, target_number

HOSTS = ["host-1", "host-2", "host-3"]


def packet(target: str) -> bytes:
    """An IPv4 packet's header, as far as the wires look."""
    return struct.pack("!B15x4s", 0x45, socket.inet_aton(target))


def test_a_packet_is_lost_late_or_doubled_as_its_link_says():
    draw = random.Random(1)
    assert fate(Link(), draw) == [0.0]
    assert fate(Link(cut=True), draw) == []
    assert all(0.1 <= at_s < 0.15 for at_s in fate(Link(delay_ms=100, jitter_ms=50), draw))
    lost = sum(not fate(Link(loss=0.3), draw) for _ in range(1000))
    twice = sum(len(fate(Link(twice=0.3), draw)) == 2 for _ in range(1000))
    assert 250 < lost < 350
    assert 250 < twice < 350


def test_a_cut_is_of_one_direction():
    arrived = []
    wires = Wires(["a", "b"], lambda target, _: arrived.append(target), 1)
    wires.set({"a>b": Link(cut=True)})
    wires.take(0, packet(address(1)))
    wires.take(1, packet(address(0)))
    wires.take(1, packet("10.92.0.1"))
    assert arrived == [0]
    assert wires.counts == {"packets": 2, "cut": 1, "twice": 0, "late": 0}
    wires.set({})
    wires.take(0, packet(address(1)))
    assert arrived == [0, 1]


@pytest.mark.parametrize("garbage", [b"", b"\x45", b"\x60" + bytes(39), packet("127.0.0.1")])
def test_what_is_for_no_end_goes_nowhere(garbage):
    assert target_number(garbage) is None


def test_a_seed_gives_the_same_faults_and_all_kinds_come_in_two_minutes():
    for seed in range(50):
        faults = plan(seed, 120, HOSTS)
        assert faults == plan(seed, 120, HOSTS)
        assert {fault.kind for fault in faults} == set(Kind)
        assert all(fault.at_s + fault.lasts_s < 120 for fault in faults)
        stops = [f for f in faults if f.kind in {Kind.ENGINE_STOPPED, Kind.NODE_STOPPED}]
        assert stops
        assert all(fault.lasts_s > LEASE_S for fault in stops)
    assert plan(1, 120, HOSTS) != plan(2, 120, HOSTS)


def test_a_parted_primary_keeps_one_host_that_hears_of_no_other():
    for seed in range(50):
        for fault in plan(seed, 120, HOSTS):
            if fault.kind is not Kind.PRIMARY_PARTED:
                continue
            cut = {name for name, link in fault.links if link.cut}
            friends = [host for host in HOSTS if {f"{host}>second", f"third>{host}"} <= cut]
            assert len(friends) == 1
            assert not cut & {f"{friends[0]}>primary", f"primary>{friends[0]}"}
            assert cut & {"primary>second", "second>primary"}


def test_links_of_members_become_links_of_nodes():
    members = {"primary": "node-2", "second": "node-1", "third": "node-3"}
    links = (("primary>api", Link(cut=True)), ("host-1>third", Link(delay_ms=1)))
    assert resolved(links, members) == {
        "node-2>api": Link(cut=True),
        "host-1>node-3": Link(delay_ms=1),
    }


def test_answers_are_counted_once_and_the_longest_gap_is_found(tmp_path):
    host = Host("h", [], tmp_path, iter([]), 1)
    history = tmp_path / "h.1.jsonl"
    host.histories.append(history)
    history.write_text('{"at":1000000000,"op":1,"is":"done"}\n{"at":1100000000,"op":2,"is":"do')
    assert host.look() == 1
    with history.open("a") as file:
        file.write('ne"}\n{"at":4000000000,"op":2,"is":"failed"}\n')
        file.write('{"at":9000000000,"op":3,"is":"done"}\n')
    assert host.look() == 3
    assert host.look() == 3
    assert longest_gap_s([history]) == pytest.approx(7.9)


# ------------------------------------------------------------------ the judge


def history(path, *lines: str) -> list:
    """A host's only life; times in ms."""
    path.write_text("\n".join(lines) + "\n")
    return [path]


def asked(at: int, op: int, what: str) -> str:
    return f'{{"at":{at}000000,"op":{op},"do":"{what}","block":7,"blocks":1}}'


def done(at: int, op: int, *values: int) -> str:
    told = f',"values":{list(values)}' if values else ""
    return f'{{"at":{at}000000,"op":{op},"is":"done"{told}}}'


async def test_a_stale_read_is_told_with_its_block_and_what_was_around_it(tmp_path):
    program = await asyncio.to_thread(judge.program)
    writes = history(
        tmp_path / "a", asked(1, 1, "write"), done(2, 1), asked(3, 2, "write"), done(4, 2)
    )
    good = {
        "a": writes,
        "b": history(tmp_path / "b", asked(3, 3, "read"), done(5, 3, 1)),
    }
    found = await judge.judge(program, good, tmp_path / "good.html")
    assert (found["verdict"], found["operations"], found["bad"]) == ("linearizable", 3, [])
    stale = {
        "a": writes,
        "b": history(tmp_path / "c", asked(5, 3, "read"), done(6, 3, 1)),
    }
    outcome = Outcome(5, judged=await judge.judge(program, stale, tmp_path / "bad.html"))
    assert (outcome.judged["verdict"], outcome.judged["bad"]) == ("not linearizable", [7])
    said = "\n".join(told(outcome))
    assert "reads 0.1" in said
    assert "writes 0.2" in said
    assert "verdict: not linearizable" in said
    with pytest.raises(judge.JudgeError, match="no such file"):
        await judge.judge(program, {"a": [tmp_path / "none"]}, tmp_path / "no.html")


# ------------------------------------------------------------------ real namespaces

SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 7))
print("ready", flush=True)
peer, _ = server.accept()
while data := peer.recv(100):
    peer.sendall(data)
"""
CLIENT = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 7))
peer.settimeout(30)
for line in sys.stdin:
    began = time.monotonic()
    peer.sendall(b"x")
    peer.recv(1)
    print(time.monotonic() - began, flush=True)
"""


async def program(enter: list[str], text: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *enter, sys.executable, "-c", text, *arguments,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


async def test_tcp_between_namespaces_meets_what_the_links_are():
    async with Network(["a", "b"], 1) as network:
        server = await program(network.enter("b"), SERVER)
        await server.stdout.readline()
        client = await program(network.enter("a"), CLIENT, network.address("b"))

        async def echo(timeout_s: float) -> float:
            client.stdin.write(b"\n")
            return float(await asyncio.wait_for(client.stdout.readline(), timeout_s))

        assert await echo(10) < 1
        await network.set({"b>a": Link(delay_ms=300)})
        assert 0.3 < await echo(10) < 2
        counts = await network.set({"b>a": Link(cut=True)})
        assert counts["late"] > 0
        asking = asyncio.create_task(echo(30))
        await asyncio.sleep(1)
        assert not asking.done()  # it was sent and heard, and the answer is held back
        counts = await network.set({})
        assert counts["cut"] > 0
        assert await asking > 1
        client.kill()
        server.kill()
        await asyncio.gather(client.wait(), server.wait())


async def test_the_api_server_is_reached_through_a_relay_that_can_be_cut():
    async def answer(reader, writer):
        writer.write((await reader.readline()).upper())
        await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    ask = (
        "import socket\n"
        f"peer = socket.create_connection(('127.0.0.1', {port}))\n"
        "peer.sendall(b'hello\\n')\n"
        "print(peer.recv(100).decode())\n"
    )
    async with server, Network(["a"], 1) as network:
        await network.relay(port)
        asking = await program(network.enter("a"), ask)
        assert (await asking.communicate())[0] == b"HELLO\n\n"
        await network.set({"a>api": Link(cut=True)})
        asking = await program(network.enter("a"), ask)
        began_s = time.monotonic()
        told = asyncio.create_task(asking.communicate())
        await asyncio.sleep(1)
        await network.set({})
        assert (await told)[0] == b"HELLO\n\n"
        assert time.monotonic() - began_s > 0.9
