"""How Linux finds a volume, what it makes of its paths, and what it reads of the controllers."""

from __future__ import annotations

import re

import pytest

from tercet_api.names import host_id, host_nqn
from tercet_e2e.linux.nvme import until
from tercet_node.protos import engine_pb2 as pb

pytestmark = [pytest.mark.linux, pytest.mark.asyncio(loop_scope="session")]

# What a kernel that is content says of nvme.
CONTENT = (
    r"new ctrl: NQN",
    r"Removing ctrl: NQN",
    r"creating \d+ I/O queues",
    r"mapped \d+/\d+/\d+ default/read/poll queues",
    r"ctrl_loss_tmo < 0 will reconnect forever",
)
CNTLIDS_OF_A_MEMBER = 4096


def strange(lines: list[str]) -> list[str]:
    """What the kernel says of nvme besides that."""
    of_nvme = [line for line in lines if "nvme" in line.lower()]
    return [line for line in of_nvme if not any(re.search(each, line) for each in CONTENT)]


async def test_each_nodes_discovery_log_names_all_paths(host, engines):
    wanted = {(node.address, "4420", host.nqn) for node in engines.nodes}
    for node in engines.nodes:
        records = await host.discover(node.address)
        found = {(one["traddr"], one["trsvcid"], one["subnqn"]) for one in records}
        assert found == wanted, node.name
        assert {one["subtype"] for one in records} == {"nvme subsystem"}
    assert not strange(await host.kernel_said())


async def test_three_paths_are_one_head_and_only_the_primarys_is_optimized(host, engines):
    """H1: the same NQN, NSID and NGUID everywhere, CNTLIDs of each member's own."""
    primary = await engines.wait_serving(host.volume)
    await host.connect_all(engines.nodes[-1].address)
    paths = await host.wait_live(len(engines.nodes))
    wanted = {n.address: "optimized" if n is primary else "inaccessible" for n in engines.nodes}
    assert {address: path.ana for address, path in paths.items()} == wanted
    device = await host.device()
    (listed,) = await host.json(f"list-subsys {device}")
    (subsystem,) = listed["Subsystems"]
    assert subsystem["NQN"] == host.nqn
    told = {
        re.search(r"traddr=([^,]*)", path["Address"])[1]: (path["State"], path["ANAState"])
        for path in subsystem["Paths"]
    }
    assert told == {address: ("live", ana) for address, ana in wanted.items()}
    block = f"/sys/block/{device.removeprefix('/dev/')}"
    facts = await host.guest.run(
        f"cd {block}; cat nguid uuid queue/write_cache queue/logical_block_size size"
    )
    nguid, uuid, cache, block_bytes, sectors = facts.splitlines()
    assert nguid.replace("-", "") == host.volume.id.replace("-", "")
    assert uuid == host.volume.id
    assert (cache, block_bytes) == ("write through", "4096")
    assert int(sectors) * 512 == host.volume.size_bytes
    for number, node in enumerate(engines.nodes):
        cntlid = int(
            await host.guest.run(f"cat /sys/class/nvme/{paths[node.address].controller}/cntlid")
        )
        assert cntlid in range(number * CNTLIDS_OF_A_MEMBER + 1, (number + 1) * CNTLIDS_OF_A_MEMBER)
    assert not strange(await host.kernel_said())


async def test_linux_reads_every_structure_and_log_without_a_complaint(host, engines):
    await host.connect_all(engines.nodes[0].address)
    paths = await host.wait_live(len(engines.nodes))
    device = await host.device()
    for address, path in paths.items():
        one = f"/dev/{path.controller}"
        controller = await host.json(f"id-ctrl {one}")
        assert controller["subnqn"] == host.nqn
        assert (controller["kas"], controller["anagrpmax"], controller["vwc"] & 1) == (1, 1, 0)
        health = await host.json(f"smart-log {one}")
        assert (health["critical_warning"], health["temperature"]) == (0, 298)
        assert await host.json(f"fw-log {one}")
        errors = (await host.json(f"error-log {one}"))["errors"]
        assert len(errors) == 16
        assert all(entry["error_count"] == 0 for entry in errors), errors
        effects = await host.guest.run(f"nvme effects-log {one} -c 0 -b | wc -c")
        assert int(effects) == 4096
        assert (await host.guest.run(f"nvme changed-ns-list-log {one}")) is not None
        ana = await host.json(f"ana-log {one}")
        (group,) = ana["ANA DESC LIST "]
        wanted = "optimized" if path.ana == "optimized" else "inaccessible"
        assert (group["grpid"], group["state"]) == (1, wanted), address
        assert "[   0]:0x1" in await host.guest.run(f"nvme list-ns {one}")
        assert "num of ctrls present: 1" in await host.guest.run(f"nvme list-ctrl {one}")
    namespace = await host.json(f"id-ns {device}")
    blocks = host.volume.size_bytes // 4096
    assert (namespace["nsze"], namespace["anagrpid"], namespace["nmic"]) == (blocks, 1, 1)
    assert namespace["nguid"] == host.volume.id.replace("-", "")
    descriptors = await host.guest.run(f"nvme ns-descs {device}")
    assert host.volume.id in descriptors
    assert "csi     : 0" in descriptors
    assert not strange(await host.kernel_said())


async def test_features_are_read_and_set(host, engines):
    await host.connect_all(engines.nodes[0].address)
    paths = await host.wait_live(len(engines.nodes))
    one = f"/dev/{next(iter(paths.values())).controller}"
    for feature in (1, 2, 4, 5, 7, 0x0A, 0x0B, 0x0F):
        for select in range(4):
            await host.guest.run(f"nvme get-feature {one} -f {feature} -s {select}")

    async def value(feature: int) -> int:
        said = await host.guest.run(f"nvme get-feature {one} -f {feature}")
        return int(re.search(r"value:\s*0x([0-9a-f]+)", said)[1], 16)

    assert await value(0x0F) == 5000, "KATO in ms"
    assert await value(0x0B) == 1 << 8 | 1 << 11, "notices of the namespace and of ANA"
    await host.guest.run(f"nvme set-feature {one} -f 4 -v 300")
    assert await value(4) == 300
    own = await host.guest.run(f"nvme get-feature {one} -f 0x81 -c 1 -l 16 -b | od -An -v -tx1")
    assert own.replace(" ", "").strip() == host.guest.host_id.replace("-", "")


async def test_properties_are_read_one_by_one(host, engines):
    await host.connect_all(engines.nodes[0].address)
    paths = await host.wait_live(len(engines.nodes))
    one = f"/dev/{next(iter(paths.values())).controller}"
    found = [await host.guest.run(f"nvme get-property {one} -o {at}") for at in (0, 8, 0x14, 0x1C)]
    cap, version, configuration, status = (int(said.split("value:")[-1], 16) for said in found)
    assert (cap >> 37 & 1, cap & 0xFFFF) == (1, 127), "the NVM command set, queues of 128"
    assert (version, configuration, status) == (0x10400, 0x460001, 1)


async def test_who_is_not_attached_sees_nothing_and_is_not_let_in(host, engines):
    other = "stranger"
    identity = f"--hostnqn={host_nqn(other)} --hostid={host_id(other)}"
    address = engines.nodes[0].address
    log = await host.guest.attempt(f"nvme discover -t tcp -a {address} -s 8009 {identity}")
    assert host.nqn not in log.text
    done = await host.guest.attempt(host.connect_words(address, identity))
    assert done.code != 0, done.text
    said = "\n".join(await host.kernel_said())
    assert "Connect for subsystem" in said, said
    assert not await host.paths()
    await host.connect(address)  # who is attached still is
    await host.wait_live(1)


async def test_who_is_not_attached_any_more_loses_its_paths_and_comes_back(host, engines):
    """Refused without DNR: Linux tries again, and is let in when it is attached again."""
    await host.connect_all(engines.nodes[0].address)
    await host.wait_live(len(engines.nodes))
    attachments = list(host.volume.attachments)
    engines.objects.attach(host.volume.id, [])

    turned_away: set[str] = set()

    async def all_turned_away() -> bool:
        for line in await host.kernel_said():
            if (told := re.search(r"(nvme\d+): Connect for subsystem", line)) is not None:
                turned_away.add(told[1])
        return len(turned_away) == len(engines.nodes)

    await until(all_turned_away, "each path was tried again and turned away")
    assert {path.state for path in (await host.paths()).values()} == {"connecting"}
    engines.objects.attach(host.volume.id, attachments)
    await host.wait_live(len(engines.nodes))


async def test_a_read_only_host_reads_and_does_not_write(host, engines):
    await host.connect_all(engines.nodes[0].address)
    await host.wait_live(len(engines.nodes))
    device = await host.device()
    await host.guest.run(f"dd if=/dev/urandom of={device} bs=4k count=4 oflag=direct")
    only = pb.Attachment(node="linux", host_nqn=host.guest.host_nqn, read_only=True)
    engines.objects.attach(host.volume.id, [only])

    async def refused() -> bool:
        write = f"dd if=/dev/zero of={device} bs=4k count=1 oflag=direct"
        return (await host.guest.attempt(write)).code != 0

    await until(refused, "writes are refused")
    await host.guest.run(f"dd if={device} of=/dev/null bs=4k count=4 iflag=direct")
    await host.kernel_said()  # a refused write is an error, and it says so


async def test_disconnected_paths_leave_nothing_at_the_engines(host, engines):
    await host.connect_all(engines.nodes[0].address)
    await host.wait_live(len(engines.nodes))

    async def hosts() -> list[str]:
        found = [await engines.replica(node, host.volume) for node in engines.nodes]
        return [nqn for replica in found if replica is not None for nqn in replica.hosts]

    assert await hosts() == [host.guest.host_nqn] * len(engines.nodes)
    await host.disconnect()

    async def gone() -> bool:
        return not await hosts()

    await until(gone, "the engines have no association left")
    assert not strange(await host.kernel_said())
