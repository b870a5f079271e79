"""List and detector together: what is dead is gone round, and is still a member."""

from __future__ import annotations

from node_membership_net import FAULTS, Net, unsigned

from tercet_node.membership import (
    AddNoProp,
    Introduce,
    Judged,
    Node,
    NodeList,
    OpenSeal,
    State,
    Tick,
    VersionedMachine,
)


class NodeNet(Net):
    """Whole nodes; some are silent."""

    def __init__(self, count):
        known = NodeList.of(unsigned(nid) for nid in range(count))
        nodes = [Node(VersionedMachine(each, OpenSeal(), known, FAULTS)) for each in known]
        self.nodes = dict(enumerate(nodes))
        super().__init__([node.machine for node in nodes])
        self.machines = self.nodes

    def silence(self, *nids):
        for nid in nids:
            del self.machines[nid]

    def run(self, until_s):
        while True:
            wake_s, nid = min((node.wake_s, nid) for nid, node in self.nodes.items())
            if wake_s > until_s:
                break
            self.now_s = max(self.now_s, wake_s)
            self._take(nid, self.nodes[nid].step(Tick(), self.now_s))
            self.settle()
        self.now_s = until_s

    def lists(self):
        return {node.machine.list.digest for node in self.nodes.values()}


def test_news_goes_round_the_dead():
    """0, 1 and 5 are dead: the top of the tree and a parent. All others hear at once."""
    net = NodeNet(16)
    net.silence(0, 1, 5)
    net.run(10.0)
    assert {e.nid for _, e in net.effects if isinstance(e, Judged)} == {0, 1, 5}
    net.tell(9, Introduce(unsigned(16)))
    assert {16 in node.machine.list for node in net.nodes.values()} == {True}


def test_checks_go_round_the_dead():
    """Both neighbours of 8 are dead: what it has wrong is found all the same, within 2 s."""
    net = NodeNet(16)
    net.silence(7, 9)
    net.run(400.0)
    net.tell(8, AddNoProp(unsigned(16)))
    assert len(net.lists()) == 2
    net.run(402.1)
    assert len(net.lists()) == 1


def test_dead_is_a_member_still_and_is_checked_with_when_it_is_back():
    net = NodeNet(8)
    away = net.nodes[3]
    net.silence(3)
    net.run(10.0)
    assert all(3 in node.machine.list for node in net.nodes.values())
    net.tell(0, Introduce(unsigned(5, 2)))
    net.nodes[3] = away
    net.run(320.0)
    assert len(net.lists()) == 1
    assert {node.machine.dead for node in net.nodes.values()} == {0}


def test_newcomer_is_watched_and_a_removed_node_is_not():
    net = NodeNet(5)
    net.run(3.0)
    comer = unsigned(5)
    net.nodes[5] = Node(VersionedMachine(comer, OpenSeal(), net.nodes[0].machine.list), net.now_s)
    net.tell(0, Introduce(comer))
    net.run(6.0)
    assert {node.detector.alive(5) for node in net.nodes.values()} == {True}
    net.silence(5)
    net.run(9.0)
    assert {node.detector.alive(5) for node in net.nodes.values()} == {False}
    net.tell(0, Introduce(unsigned(5, 2, State.GONE)))
    assert {node.detector.dead for node in net.nodes.values()} == {0}
    assert {node.wake_s > net.now_s for node in net.nodes.values()} == {True}
