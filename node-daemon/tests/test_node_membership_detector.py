"""Who is dead is known to all in time; who is not is not, whatever is lost."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from node_membership_net import entry, gone

from tercet_node.membership import (
    Ack,
    Detector,
    Heard,
    Judged,
    Nid,
    NodeList,
    Probe,
    Received,
    Relay,
    Send,
    Suspected,
    Tick,
    Verdict,
    decode_message,
    encode_message,
)
from tercet_node.membership.detector import HEARD_GRACE_S, PROBE_EVERY_S, TRIES_MAX, TRY_S
from tercet_node.membership.messages import SEQUENCE_MAX

KNOWN_S_MAX = 2.0


class Watched:
    """Detectors on a network with a delay of a millisecond; silent nodes and broken links."""

    def __init__(self, count, drop=0.0, seed=0, starts_s=None):
        self.list = NodeList.of(entry(nid) for nid in range(count))
        self.nodes = {
            each.nid: Detector(each, self.list, starts_s[each.nid] if starts_s else 0.0)
            for each in self.list
        }
        self.woken = Counter()
        self.woken_s = {}
        self.drop, self.rng = drop, random.Random(seed)
        self.silent, self.deaf, self.broken = set(), set(), set()
        self.flight, self.effects = [], []
        self.now_s = 0.0

    def take(self, nid, effects):
        for effect in effects:
            if not isinstance(effect, Send):
                self.effects.append((self.now_s, nid, effect))
            elif self.rng.random() >= self.drop and frozenset((nid, effect.to)) not in self.broken:
                raw = encode_message(effect.message)
                self.flight.append((self.now_s + 0.001, effect.to, nid, raw))

    def run(self, seconds):
        until_s = self.now_s + seconds
        while True:
            tick_s, nid = min((d.wake_s, n) for n, d in self.nodes.items() if n not in self.silent)
            arrive_s = self.flight[0][0] if self.flight else float("inf")
            if min(tick_s, arrive_s) > until_s:
                break
            self.now_s = max(self.now_s, min(tick_s, arrive_s))
            if arrive_s <= tick_s:
                _, to, sender, raw = self.flight.pop(0)
                if to not in self.silent | self.deaf:
                    self.wake(to)
                    event = Received(sender, decode_message(raw))
                    self.take(to, self.nodes[to].step(event, self.now_s))
            else:
                self.wake(nid)
                self.take(nid, self.nodes[nid].step(Tick(), self.now_s))
        self.now_s = until_s

    def wake(self, nid):
        """A step; of those at one time only the first has woken the node up."""
        self.woken[nid] += self.woken_s.get(nid) != self.now_s
        self.woken_s[nid] = self.now_s

    def alive(self, nid):
        """What the others think."""
        return {d.alive(Nid(nid)) for n, d in self.nodes.items() if n not in (nid, *self.silent)}

    def judged(self):
        return [effect for _, _, effect in self.effects if isinstance(effect, Judged)]


@pytest.mark.parametrize("dead", [{0}, {7}, {39}, {7, 8}, {0, 1, 2}])
def test_dead_is_known_to_all_within_two_seconds_for_each_that_hid_another(dead):
    net = Watched(40)
    net.run(3.0)
    net.silent = dead
    net.run(KNOWN_S_MAX * len(dead))
    assert all(net.alive(nid) == {False} for nid in dead)
    assert net.judged().count(Judged(min(dead), alive=False)) == 40 - len(dead)
    assert {e.nid for e in net.judged()} == dead


def test_dead_is_known_within_two_seconds_though_every_tenth_message_is_lost():
    for seed in range(3):
        net = Watched(40, drop=0.1, seed=seed)
        net.run(3.0)
        net.silent = {11}
        net.run(KNOWN_S_MAX)
        assert net.alive(11) == {False}


def test_nobody_is_dead_because_messages_are_lost():
    net = Watched(12, drop=0.1)
    net.run(40.0)
    assert net.judged() == []
    suspected = [e for _, _, e in net.effects if isinstance(e, Suspected)]
    assert any(not e.cleared for e in suspected), "or nothing was tried"
    assert sum(not e.cleared for e in suspected) - sum(e.cleared for e in suspected) in range(3)


def test_bad_link_between_two_nodes_is_no_death():
    net = Watched(10)
    net.broken = {frozenset((4, 5))}
    net.run(20.0)
    assert net.judged() == []


def test_stopped_node_that_goes_on_contradicts_and_all_believe_it():
    net = Watched(20)
    net.run(1.0)
    net.silent = {6}
    net.run(5.0)
    assert net.alive(6) == {False}
    net.silent = set()
    net.run(3.0)
    assert net.alive(6) == {True}
    assert {d.alive(Nid(0)) for d in net.nodes.values()} == {True}


def test_halves_that_held_each_other_dead_find_each_other_again():
    net = Watched(12)
    net.broken = {frozenset((a, b)) for a in range(0, 12, 2) for b in range(1, 12, 2)}
    net.run(30.0)
    assert not net.nodes[0].alive(Nid(1))
    assert not net.nodes[1].alive(Nid(0))
    net.broken = set()
    net.run(60.0)
    assert all(net.alive(nid) == {True} for nid in range(12))


def test_new_instance_starts_afresh():
    me, other = entry(0), entry(1)
    detector = Detector(me, NodeList.of([me, other, entry(2)]))
    death = Verdict(Nid(1), other.instance, 0, alive=False)
    detector.step(Received(2, death), 0.0)
    assert not detector.alive(1)
    again = replace(other, instance=bytes(15) + b"\x09")
    detector.members(NodeList.of([me, again, entry(2)]), 1.0)
    assert detector.alive(1)
    assert detector.step(Received(2, death), 1.0) == [Send(2, Heard(1, 0))], "it was another"


def test_judgement_is_sent_again_until_it_is_acknowledged_and_no_longer():
    known = NodeList.of(entry(nid) for nid in range(3))
    detector = Detector(known.get(0), known)
    first = detector.step(Received(1, Verdict(Nid(2), entry(2).instance, 0, alive=False)), 0.0)
    assert [e.to for e in first if isinstance(e, Send)] == [1], "told who told it: acknowledged"
    net = Watched(7)
    net.silent = {5}
    net.broken = {frozenset((0, 1)), frozenset((0, 2))}
    net.run(4.0)
    assert not net.nodes[0]._unheard, "given up"


def test_time_to_a_judgement_is_bounded():
    judged_s = PROBE_EVERY_S + HEARD_GRACE_S + TRIES_MAX * TRY_S
    assert round(judged_s, 6) <= KNOWN_S_MAX - 0.4, "the rest is the tree's"


def test_each_asks_one_and_is_asked_by_one_whoever_has_started_first():
    """Five wake-ups a second: to ask, an answer, a question, each 0.6 s.

    Who of two asks was the first one's word: 4 to 8 a second, drawn by when the nodes had started.
    """
    for seed in range(3):
        rng = random.Random(seed)
        net = Watched(20, starts_s=[rng.random() for _ in range(20)])
        net.run(5.0)
        net.woken.clear()
        net.run(10.0)
        assert max(net.woken.values()) <= 51, net.woken
        assert min(net.woken.values()) >= 32, "two may come at one time"
    net = Watched(2, starts_s=[0.3, 0.0])
    net.run(5.0)
    net.woken.clear()
    net.run(10.0)
    assert 15 <= net.woken[1] <= 17, "the higher one only answers"
    assert 30 <= net.woken[0] <= 34


def test_node_that_speaks_and_hears_nothing_is_dead():
    """Its questions are no answers; it holds its neighbours dead, and they contradict."""
    net = Watched(20)
    net.run(3.0)
    net.deaf = {7}
    net.run(KNOWN_S_MAX)
    assert net.alive(7) == {False}
    net.run(KNOWN_S_MAX)
    hearing = [node for nid, node in net.nodes.items() if nid != 7]
    assert {node.dead for node in hearing} == {1 << 7}


def test_judgement_of_a_removed_node_is_forgotten():
    """A node that starts later takes none: the two would tell each other with every probe."""
    known = NodeList.of(entry(nid) for nid in range(4))
    old = Detector(known.get(0), known)
    old.step(Received(1, Verdict(Nid(3), entry(3).instance, 0, alive=False)), 0.0)
    removed = known.put(replace(gone(3, 2), instance=entry(3).instance))
    old.members(removed, 1.0)
    fresh = Detector(removed.get(1), removed)
    asked = next(e for e in fresh.step(Tick(), 5.0) if isinstance(e, Send)).message
    assert [type(e.message) for e in old.step(Received(1, asked), 5.0)] == [Ack]


def test_death_that_cannot_be_contradicted_is_nobodys_word():
    """One more than that had no place in a message, and no judgement could be made any more."""
    net = Watched(3)
    forged = Verdict(Nid(0), entry(0).instance, SEQUENCE_MAX, alive=False)
    assert net.nodes[0].step(Received(1, forged), 0.0) == [Send(1, Heard(0, SEQUENCE_MAX))]
    told = net.nodes[1].step(Received(2, forged), 0.0)
    assert told == [Send(2, Heard(0, SEQUENCE_MAX))], "nor of another: it could never come back"
    last = replace(forged, sequence=SEQUENCE_MAX - 1)
    said = net.nodes[0].step(Received(1, last), 0.0)
    contradictions = {e.message for e in said if isinstance(e, Send)} - {Heard(0, last.sequence)}
    assert contradictions == {replace(forged, alive=True)}
    net.take(0, said)
    net.run(5.0)
    assert net.alive(0) == {True}


def test_answer_of_who_was_not_asked_is_none():
    """Numbers can be guessed: an answer for another comes from who was asked to ask it."""
    net = Watched(6)
    detector = net.nodes[0]
    [probe] = [e for e in detector.step(Tick(), 1.0) if isinstance(e, Send) and e.to == 1]
    ack = Ack(probe.message.nonce, entry(1))
    detector.step(Received(4, ack), 1.0)
    assert detector._watches[1].tries == 1
    again = [e for e in detector.step(Tick(), 1.0 + TRY_S) if isinstance(e, Send)]
    through = next(e.to for e in again if e.message == Relay(e.message.nonce, Nid(1)))
    detector.step(Received(through, ack), 1.2)
    assert detector._watches[1].tries == 0


def test_answer_is_passed_on_to_who_asked():
    known = NodeList.of(entry(nid) for nid in range(4))
    relay = Detector(known.get(0), known)
    probe = relay.step(Received(1, Relay(77, Nid(3))), 0.0)[0]
    assert (probe.to, type(probe.message)) == (3, Probe)
    ack = Ack(probe.message.nonce, entry(3))
    assert relay.step(Received(2, ack), 0.0) == [], "of who was not asked"
    assert relay.step(Received(3, ack), 0.0) == [Send(1, Ack(77, entry(3)))]
    assert relay.step(Received(3, ack), 0.0) == [], "once"


def test_answer_of_another_node_is_none():
    net = Watched(4)
    detector = net.nodes[0]
    sent = [e for e in detector.step(Tick(), 1.0) if isinstance(e, Send)]
    to, nonce = sent[0].to, sent[0].message.nonce
    other = next(nid for nid in range(1, 4) if nid != to)
    detector.step(Received(other, Ack(nonce, entry(other))), 1.0)
    assert detector._watches[to].tries == 1
    detector.step(Received(to, Ack(nonce, entry(to))), 1.0)
    assert detector._watches[to].tries == 0


def test_node_of_whom_a_lie_has_used_up_the_numbers_is_suspected_and_asked_at_leisure():
    """Its death has no number any more: it is not judged, and nobody spins because of that."""
    net = Watched(6)
    lie = Verdict(Nid(3), entry(3).instance, SEQUENCE_MAX, alive=True)
    for nid in range(6):
        net.take(nid, net.nodes[nid].step(Received(1, lie), 0.0))
    net.run(3.0)
    net.silent = {3}
    net.run(3.0)
    net.woken.clear()
    net.run(30.0)
    assert net.alive(3) == {True}
    assert Nid(3) in net.nodes[2].suspected
    assert net.woken[2] < 30 * 15, "as often as it is asked, and no oftener"
    assert len(net.nodes[2]._watches[3].nonces) < 2 * TRIES_MAX


def test_time_that_jumps_is_nobodys_death():
    """The machine was suspended: one node alone, which the others have judged; or all of them."""
    net = Watched(12)
    net.run(2.0)
    net.silent = {5}
    net.run(60.0)
    assert net.alive(5) == {False}
    net.silent = set()
    net.effects.clear()
    net.run(3.0)
    assert {net.nodes[5].alive(Nid(nid)) for nid in range(12)} == {True}
    assert net.alive(5) == {True}
    assert {judged.nid for judged in net.judged()} == {5}
    net.effects.clear()
    net.now_s += 3600.0
    net.run(5.0)
    assert net.judged() == []


def test_all_that_start_again_at_one_time_hold_nobody_dead():
    """A hundred, some of whom were held dead before; none remembers anything."""
    net = Watched(100)
    net.run(1.0)
    net.silent = {4, 50}
    net.run(3.0)
    assert net.alive(50) == {False}
    net.silent, now_s = set(), net.now_s
    net.flight.clear()
    net.effects.clear()
    net.nodes = {
        each.nid: Detector(each, net.list, now_s + net.rng.random() * 0.3) for each in net.list
    }
    net.run(5.0)
    assert net.judged() == []
