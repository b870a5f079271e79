"""Who is alive: probe, probe through others, suspect, judge; and everybody hears of a judgement.

Apart from the list on purpose: who belongs to the cluster is the authority's word and lasts; who
answers is each moment's observation. A judgement never removes an entry.

- A node watches its two neighbours on the ring of the living, so each node has two that watch it.
  It probes the next higher one; the next lower one probes it, and lives as long as it does so: it
  is asked only when it has been silent for longer. No answer in time: who was asked is suspected,
  and asked again and again, each time also through two others, so that neither a lost message nor
  a bad link between two nodes makes a judgement. All of TRIES_MAX in vain: judged dead.
- Who of two asks is the ring's word and not the first one's. Where it was the first one's, a node
  woke up 4 to 8 times a second for its two neighbours, drawn by when they had started: both of a
  pair asked if they had once asked together, and two of its own times to ask were two wake-ups.
- A judgement goes to all down the tree of the living, each hop acknowledged and sent again. What is
  lost all the same is found by the probes: they carry a digest of the judgements, and who has
  others answers with its own.
- A judgement names instance and sequence. Who hears of its own death contradicts with the next
  sequence; the higher sequence holds, of one sequence the death. A new instance starts afresh.
- One of the dead is probed every DEAD_EVERY_S, another each time: so two halves of a cut network
  find each other again, although nobody on either side watches anybody on the other.

Who answers is believed only if it was asked: the node itself, or one through which it was asked.

Time from death to judgement: at most PROBE_EVERY_S + HEARD_GRACE_S + TRIES_MAX * TRY_S; then the
tree's hops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from tercet_node.membership.entries import Entry, Nid
from tercet_node.membership.events import Judged, Received, Send, Suspected, Tick
from tercet_node.membership.messages import (
    SEQUENCE_MAX,
    Ack,
    Heard,
    Message,
    Probe,
    Relay,
    Verdict,
)
from tercet_node.membership.nodelist import NodeList

PROBE_EVERY_S = 0.6
"""A node's processor time is its wake-ups, five a second by this; with half a second it was six,
and a busy machine came near what is promised. A death is known to all that much later."""
TRY_S = 0.15
TRIES_MAX = 6
HEARD_GRACE_S = 0.1
"""How long after its next probe is due a neighbour that probes us may be silent."""
RELAYS = 2
DEAD_EVERY_S = 5.0
RESEND_S = 0.1
RESENDS_MAX = 5
RELAYED_MAX = 256
"""Probes for others that are under way."""
UNHEARD_MAX = 256
"""Judgements on their way that nobody has acknowledged yet."""
VERDICTS_PER_ANSWER = 32
"""Of those that a probe's digest shows to be others; the next answer goes on with the rest."""

Outcome = Send | Judged | Suspected


@dataclass(slots=True)
class _Watch:
    """A neighbour that is probed."""

    every_s: float
    """From one sign of life to our next probe: longer where the neighbour is to probe us."""
    next_s: float
    tries: int = 0
    """Probes in vain since the last answer."""
    nonces: set[int] = field(default_factory=set)
    through: set[Nid] = field(default_factory=set)
    """Others that were asked to probe it for us."""

    def answered(self, now_s: float) -> None:
        """It lives, and hears us."""
        self.tries = 0
        self.nonces.clear()
        self.through.clear()
        self.next_s = now_s + self.every_s


@dataclass(slots=True)
class _Unheard:
    """A judgement that is sent again until it is acknowledged."""

    verdict: Verdict
    next_s: float
    left: int = RESENDS_MAX


class Detector:
    """One node's view of who is alive."""

    def __init__(
        self, me: Entry, members: NodeList, now_s: float = 0.0, first_nonce: int = 0
    ) -> None:
        self.me = me
        self._members = members
        self._verdicts: dict[Nid, Verdict] = {}
        self._watches: dict[Nid, _Watch] = {}
        self._relayed: dict[int, tuple[Nid, int, Nid]] = {}
        """Nonce of ours: who asked, with which nonce, about whom."""
        self._unheard: dict[tuple[Nid, Nid], _Unheard] = {}
        """By (to whom, about whom)."""
        self._nonce = first_nonce
        """Counted up from one nobody guesses: an answer to an earlier start answers nothing."""
        self._digest = 0
        self._living = members
        self._dead_s = now_s + DEAD_EVERY_S
        self._dead_turn = int(me.nid)
        self._watch(now_s)

    # ------------------------------------------------------------------ seen from outside

    def alive(self, nid: Nid) -> bool:
        """Whether the node is a member and not judged dead."""
        return nid in self._living

    @property
    def dead(self) -> int:
        """Members judged dead, as bits by nid."""
        return self._members.present & ~self._living.present

    @property
    def living(self) -> NodeList:
        """The list without those judged dead."""
        return self._living

    @property
    def suspected(self) -> list[Nid]:
        """Neighbours that have not answered twice or more, and are not judged yet."""
        return [nid for nid, watch in self._watches.items() if watch.tries > 1]

    @property
    def wake_s(self) -> float:
        """When it wants a Tick."""
        soonest_s = float("inf") if self._living is self._members else self._dead_s
        for watch in self._watches.values():
            soonest_s = min(soonest_s, watch.next_s)
        for unheard in self._unheard.values():
            soonest_s = min(soonest_s, unheard.next_s)
        return soonest_s

    def step(self, event: Received | Tick, now_s: float) -> list[Outcome]:
        """Take a message or the time."""
        match event:
            case Received(peer, message):
                return list(self._received(peer, message, now_s))
            case Tick():
                return [*self._probes(now_s), *self._resends(now_s), *self._dead(now_s)]

    def members(self, members: NodeList, now_s: float) -> None:
        """The list has changed."""
        self._members = members
        own = members.get(self.me.nid)
        self.me = self.me if own is None else own
        for nid, verdict in tuple(self._verdicts.items()):
            entry = members.get(nid)
            # Of a removed node too: a node that starts now takes no judgement of it, and the two
            # would tell each other of the difference with each probe for ever.
            if entry is None or not entry.present or entry.instance != verdict.instance:
                self._forget(nid)
        self._live(now_s)

    # ------------------------------------------------------------------ probes

    def _watch(self, now_s: float) -> None:
        """Probe who is now next on the ring of the living."""
        neighbours = self._living.neighbours(self.me.nid)
        for nid in tuple(self._watches):
            if nid not in neighbours:
                del self._watches[nid]
        for nid in neighbours:
            every_s = PROBE_EVERY_S + (0.0 if self._asks(nid) else HEARD_GRACE_S)
            watch = self._watches.get(nid)
            if watch is not None:
                watch.every_s = every_s
                continue
            # Spread over the period by nid, so that not all nodes probe at one time.
            share = self.me.nid * 3 % 16 / 16
            self._watches[nid] = _Watch(every_s, now_s + every_s * share)

    def _asks(self, nid: Nid) -> bool:
        """Whether this node probes that neighbour, and not the other way round."""
        if len(self._living) <= 2:
            return self.me.nid < nid
        return self._living.next_from(self.me.nid + 1) == nid

    def _probes(self, now_s: float) -> Iterator[Outcome]:
        due = [(nid, watch) for nid, watch in self._watches.items() if watch.next_s <= now_s]
        for nid, watch in due:
            if watch.tries == TRIES_MAX:
                yield from self._judge(self._death(nid), now_s)
                if self._watches.get(nid) is watch:
                    # Its sequence is at its end (somebody lied): suspected, and asked on.
                    watch.nonces.clear()
                    watch.tries -= 1
                    watch.next_s = now_s + TRY_S
                continue
            self._nonce += 1
            watch.nonces.add(self._nonce)
            yield Send(nid, Probe(self._nonce, self._digest))
            if watch.tries == 1:
                yield Suspected(nid, watch.tries)
            if watch.tries >= 1:
                others = self._others(nid, watch.tries)
                watch.through.update(others)
                for through in others:
                    yield Send(through, Relay(self._nonce, nid))
            watch.tries += 1
            watch.next_s = now_s + TRY_S

    def _dead(self, now_s: float) -> Iterator[Outcome]:
        if now_s < self._dead_s:
            return
        self._dead_s = now_s + DEAD_EVERY_S
        if self._living is not self._members:
            dead = [nid for nid in self._members.nids() if nid not in self._living]
            self._dead_turn += 1
            self._nonce += 1
            nid = dead[self._dead_turn % len(dead)]
            yield Send(nid, Probe(self._nonce, self._digest))

    def _others(self, nid: Nid, turn: int) -> list[Nid]:
        """Other living nodes to ask, other ones at each turn."""
        found: list[Nid] = []
        at = self.me.nid + 1 + turn * RELAYS
        for _ in range(RELAYS + 2):
            other = self._living.next_from(at)
            at = other + 1
            if other not in (nid, self.me.nid, *found) and len(found) < RELAYS:
                found.append(other)
        return found

    def _received(self, peer: Nid, message: Message, now_s: float) -> Iterator[Outcome]:
        past = self._verdicts.get(peer)
        if past is not None and not past.alive and isinstance(message, Probe | Ack):
            yield Send(peer, past)  # it lives, and will contradict
        match message:
            case Probe(nonce, digest):
                yield Send(peer, Ack(nonce, self.me))
                if digest != self._digest:
                    yield from self._tell(peer, nonce)
                else:
                    # Where they differ both go on asking: each is told what the other knows.
                    self._heard(peer, now_s)
            case Ack(nonce, entry):
                yield from self._answered(peer, nonce, entry, now_s)
            case Relay(nonce, nid):
                yield from self._relay(peer, nonce, nid)
            case Verdict():
                yield Send(peer, Heard(message.nid, message.sequence))
                yield from self._judge(message, now_s, peer)
            case Heard(nid, sequence):
                unheard = self._unheard.get((peer, nid))
                if unheard is not None and unheard.verdict.sequence <= sequence:
                    del self._unheard[peer, nid]
            case _:
                raise AssertionError(f"not the detector's: {message!r}")

    def _tell(self, peer: Nid, turn: int) -> Iterator[Outcome]:
        """Judgements, as many as an answer may have, other ones at each turn."""
        found = list(self._verdicts.values())
        at = turn * VERDICTS_PER_ANSWER % len(found) if found else 0
        for verdict in (found[at:] + found[:at])[:VERDICTS_PER_ANSWER]:
            yield Send(peer, verdict)

    def _answered(self, peer: Nid, nonce: int, entry: Entry, now_s: float) -> Iterator[Outcome]:
        asked = self._relayed.get(nonce)
        if asked is not None:
            if asked[2] == peer == entry.nid:
                del self._relayed[nonce]
                yield Send(asked[0], Ack(asked[1], entry))
            return
        watch = self._watches.get(entry.nid)
        if watch is None or nonce not in watch.nonces:
            return
        if peer == entry.nid or peer in watch.through:
            if watch.tries > 1:
                yield Suspected(entry.nid, watch.tries, cleared=True)
            watch.answered(now_s)

    def _heard(self, peer: Nid, now_s: float) -> None:
        """A neighbour's own probe: a sign of life, but no answer.

        Once it has been asked only an answer counts: who speaks and hears nothing is as good as
        dead, and holds all others dead.
        """
        watch = self._watches.get(peer)
        if watch is not None and watch.tries == 0:
            watch.next_s = now_s + watch.every_s

    def _relay(self, peer: Nid, nonce: int, nid: Nid) -> Iterator[Outcome]:
        if nid not in self._members:
            return
        self._nonce += 1
        self._relayed[self._nonce] = (peer, nonce, nid)
        if len(self._relayed) > RELAYED_MAX:
            del self._relayed[next(iter(self._relayed))]
        yield Send(nid, Probe(self._nonce, self._digest))

    # ------------------------------------------------------------------ judgements

    def _death(self, nid: Nid) -> Verdict:
        entry = self._members.get(nid)
        assert entry is not None, f"node {nid} is watched and no member"
        past = self._verdicts.get(nid)
        return Verdict(nid, entry.instance, past.sequence if past else 0, alive=False)

    def _judge(
        self, verdict: Verdict, now_s: float, source: Nid | None = None
    ) -> Iterator[Outcome]:
        nid = verdict.nid
        entry = self._members.get(nid)
        past = self._verdicts.get(nid)
        if entry is None or not entry.present or entry.instance != verdict.instance:
            return
        if past is not None and _rank(past) >= _rank(verdict):
            return
        if not verdict.alive and verdict.sequence >= SEQUENCE_MAX:
            return  # nobody counts that far: who said it lies, and nobody could contradict it
        accuser = None
        if nid == self.me.nid and not verdict.alive:
            verdict = Verdict(nid, verdict.instance, verdict.sequence + 1, alive=True)
            accuser, source = source, None
        self._forget(nid)
        self._verdicts[nid] = verdict
        self._digest ^= _fingerprint(verdict)
        self._live(now_s)
        yield Judged(nid, verdict.alive)
        targets = self._living.targets(self.me.nid, nid)
        top = self._living.drop(nid)
        if source is None and top.present and top.instigator() not in (self.me.nid, *targets):
            targets.append(top.instigator())
        if verdict.alive and nid != self.me.nid:
            targets.append(nid)
        if accuser is not None and accuser not in targets:
            targets.append(accuser)
        for to in targets:
            if to != source and len(self._unheard) < UNHEARD_MAX:
                self._unheard[to, nid] = _Unheard(verdict, now_s + RESEND_S)
                yield Send(to, verdict)

    def _forget(self, nid: Nid) -> None:
        past = self._verdicts.pop(nid, None)
        if past is not None:
            self._digest ^= _fingerprint(past)

    def _live(self, now_s: float) -> None:
        living = self._members  # this very one while nobody is dead
        for nid, verdict in self._verdicts.items():
            if not verdict.alive:
                living = living.drop(nid)
        self._living = living
        self._watch(now_s)
        for to, nid in tuple(self._unheard):
            if to not in living:
                del self._unheard[to, nid]

    def _resends(self, now_s: float) -> Iterator[Outcome]:
        due = [(key, each) for key, each in self._unheard.items() if each.next_s <= now_s]
        for key, unheard in due:
            if unheard.left == 0:
                del self._unheard[key]
                continue
            unheard.left -= 1
            unheard.next_s = now_s + RESEND_S
            yield Send(key[0], unheard.verdict)


def _rank(verdict: Verdict) -> tuple[int, bool]:
    return (verdict.sequence, not verdict.alive)


def _fingerprint(verdict: Verdict) -> int:
    nid, sequence = verdict.nid.to_bytes(4, "big"), verdict.sequence.to_bytes(8, "big")
    whole = hashlib.sha256(nid + verdict.instance + sequence + bytes((verdict.alive,)))
    return int.from_bytes(whole.digest()[:16], "big")
