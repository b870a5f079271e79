"""What is made of what a machine's kernel says; no machine needed."""

from __future__ import annotations

import subprocess

from tercet_e2e.linux import nvme
from tercet_e2e.linux.network import Network, node_address

NQN = "nqn.2026-11.io.tercet:volume:11111111-1111-4111-8111-111111111111"


def test_paths_are_read_with_their_states():
    said = f"nvme1 {NQN} 10.0.0.1 live optimized\nnvme2 {NQN} 10.0.0.2 connecting -\n"
    first, second = nvme.parse_paths(said)
    assert (first.controller, first.address, first.ana) == ("nvme1", "10.0.0.1", "optimized")
    assert (second.state, second.ana) == ("connecting", "-")


def test_a_subsystem_has_one_head():
    assert nvme.parse_head(f"other nvme0n1\n{NQN} nvme1n1\n", NQN) == "nvme1n1"
    assert nvme.parse_head("other nvme0n1\n", NQN) is None


def test_harm_is_told_from_what_a_lost_path_makes_a_kernel_say():
    harm = [
        "[  9.0] nvme1n1: I/O Cmd(0x1) @ LBA 1, 1 blocks, I/O Error (sct 0x3 / sc 0x2)",
        "[  9.1] Buffer I/O error on dev nvme1n1, logical block 1, async page read",
        "[  9.2] INFO: task fio:77 blocked for more than 120 seconds.",
    ]
    usual = [
        "[  8.1] nvme nvme1: failed to connect socket: -111",
        "[  8.2] nvme nvme1: Reconnecting in 1 seconds...",
    ]
    assert nvme.complaints(usual + harm) == harm


def test_a_network_of_its_own_has_the_nodes_and_nothing_else():
    with Network(2) as network:
        shown = subprocess.run(
            [*network.enter, "ip", "-brief", "address"], capture_output=True, text=True, check=True
        ).stdout
        assert {line.split()[0] for line in shown.splitlines()} == {"lo", "br0"}
        assert node_address(2) in shown
        assert network.tap() != network.tap()
