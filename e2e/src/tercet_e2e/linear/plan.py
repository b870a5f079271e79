"""What goes wrong in a run, and when: drawn from a seed before it begins (pure).

Two tracks run beside each other, so that a link may be cut while an engine stands still: the wires'
(a weather, a pause, the next) and that of processes; and now and then the devices have no space.
Members are named by what they are when the fault begins, because a fault of the primary is worth
more than one of anybody: "primary", "second", "third". Each kind of a track comes once before one
comes twice, so that a short run has all of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tercet_e2e.linear.wires import API, Link, LinkName, link_name

MEMBERS = ("primary", "second", "third")
LEASE_S = 1.0
"""D of rule L2: what stands still for longer has lost its lease."""
QUIET_S = 3.0
"""Without faults at the start."""
FULL_AT = 0.35
"""Of a run: when the devices have no space for the first time; then every FULL_EVERY_S."""
FULL_EVERY_S = 120.0
FULL_RUN_MIN_S = 60.0


class Kind(StrEnum):
    """What goes wrong."""

    ENGINE_KILLED = "engine killed"
    """kill -9; its supervisor starts another at once."""
    ENGINE_STOPPED = "engine stands still"
    """SIGSTOP for longer than a lease, then SIGCONT."""
    NODE_STOPPED = "node stands still"
    """Engine and agent."""
    ENGINE_ENDED = "engine ended"
    """SIGTERM: it hands over."""
    AGENT_KILLED = "agent killed"
    API_STOPPED = "API server stands still"
    HOST_KILLED = "host killed"
    """After a moment without answers, so that nobody knows what became of its commands; it comes
    again with its name, in a second life (H3)."""
    CUT = "one-way cuts"
    PRIMARY_PARTED = "primary parted"
    """One way or both, with one host on its side; in three of four draws deaf to the API, too."""
    HOST_PARTED = "host parted"
    """From all members but one."""
    DELAY = "delays"
    LOSS = "loss"
    """And packets that come twice or overtake each other, everywhere."""
    DISK_FULL = "disk full"


Links = tuple[tuple[LinkName, Link], ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. What concerns no member or host has an empty `who`."""

    at_s: float
    lasts_s: float
    kind: Kind
    who: str = ""
    links: Links = ()
    """Between MEMBERS, hosts and API."""


def plan(seed: int, seconds: float, hosts: Sequence[str]) -> list[Fault]:
    """All faults of a run, by when they begin; each is over before the run is."""
    draw = random.Random(seed)
    weather: dict[Kind, Callable[[], Links]] = {
        Kind.CUT: lambda: _cuts(draw, hosts),
        Kind.PRIMARY_PARTED: lambda: _parted(draw, hosts),
        Kind.HOST_PARTED: lambda: _host_parted(draw, hosts),
        Kind.DELAY: lambda: _delays(draw, hosts),
        Kind.LOSS: lambda: _losses(draw, hosts),
    }
    found = [
        Fault(at_s, draw.uniform(*_WEATHER_S.get(kind, (1.0, 4.0))), kind, links=weather[kind]())
        for at_s, kind in _times(draw, seconds, tuple(weather), (3.0, 7.0))
    ]
    for at_s, kind in _times(draw, seconds, tuple(_LASTS_S), (2.0, 6.0)):
        least_s, most_s = _LASTS_S[kind]
        who = _who(draw, kind, hosts)
        links = _unanswered(who) if kind is Kind.HOST_KILLED else ()
        found.append(Fault(at_s, draw.uniform(least_s, most_s), kind, who, links))
    if seconds >= FULL_RUN_MIN_S:
        at_s = FULL_AT * min(seconds, FULL_EVERY_S)
        while at_s < seconds * 0.8:
            found.append(Fault(at_s, draw.uniform(1.0, 3.0), Kind.DISK_FULL))
            at_s += FULL_EVERY_S
    return sorted((fault for fault in found if fault.at_s + fault.lasts_s < seconds), key=_at_s)


_LASTS_S: dict[Kind, tuple[float, float]] = {
    Kind.ENGINE_KILLED: (0, 0),
    Kind.ENGINE_STOPPED: (LEASE_S * 1.5, LEASE_S * 4),
    Kind.NODE_STOPPED: (LEASE_S * 1.5, LEASE_S * 4),
    Kind.ENGINE_ENDED: (0, 0),
    Kind.AGENT_KILLED: (0, 0),
    Kind.API_STOPPED: (2, 7),
    Kind.HOST_KILLED: (0.1, 1.5),
}


_WEATHER_S: dict[Kind, tuple[float, float]] = {
    # A takeover and a while in which both think that they lead.
    Kind.PRIMARY_PARTED: (2.5, 5.0),
}


def _at_s(fault: Fault) -> float:
    return fault.at_s


def _times(
    draw: random.Random, seconds: float, kinds: Sequence[Kind], pause_s: tuple[float, float]
) -> Iterator[tuple[float, Kind]]:
    at_s = QUIET_S
    deck: list[Kind] = []
    while at_s < seconds:
        if not deck:
            deck = draw.sample(kinds, len(kinds))
        yield at_s, deck.pop()
        at_s += draw.uniform(*pause_s)


def _who(draw: random.Random, kind: Kind, hosts: Sequence[str]) -> str:
    if kind is Kind.API_STOPPED:
        return ""
    if kind is Kind.HOST_KILLED:
        return draw.choice(hosts)
    return draw.choices(MEMBERS, weights=(4, 1, 1))[0]


def _unanswered(host: str) -> Links:
    return tuple((link_name(member, host), Link(cut=True)) for member in MEMBERS)


def _both(one: str, other: str, link: Link) -> Links:
    return ((link_name(one, other), link), (link_name(other, one), link))


def _pairs(hosts: Sequence[str]) -> list[LinkName]:
    """Every direction that something goes in: between members, to and from hosts and the API."""
    between = [(a, b) for a in MEMBERS for b in MEMBERS if a != b]
    others = [(a, b) for a in MEMBERS for b in (*hosts, API)]
    return [link_name(a, b) for a, b in between + others + [(b, a) for a, b in others]]


def _cuts(draw: random.Random, hosts: Sequence[str]) -> Links:
    chosen = draw.sample(_pairs(hosts), draw.randint(1, 4))
    return tuple((name, Link(cut=True)) for name in chosen)


def _parted(draw: random.Random, hosts: Sequence[str]) -> Links:
    primary, *others = MEMBERS
    friend = draw.choice(hosts)
    rest = [*others, *(host for host in hosts if host != friend)]
    cut = Link(cut=True)
    way = draw.choice(("both", "out", "in"))
    links: list[tuple[LinkName, Link]] = []
    for far in rest:
        links += [(link_name(primary, far), cut)] if way != "in" else []
        links += [(link_name(far, primary), cut)] if way != "out" else []
    if draw.random() < 0.75:  # nor does it hear of the next one by its agent
        links.append((link_name(API, primary), cut))
    # Whom the primary serves does not hear of the next one.
    for other in others:
        links += _both(friend, other, cut)
    return tuple(links)


def _host_parted(draw: random.Random, hosts: Sequence[str]) -> Links:
    host = draw.choice(hosts)
    cut = Link(cut=True)
    return tuple(link for member in draw.sample(MEMBERS, 2) for link in _both(host, member, cut))


def _delays(draw: random.Random, hosts: Sequence[str]) -> Links:
    chosen = draw.sample(_pairs(hosts), draw.randint(3, 10))
    return tuple(
        (name, Link(delay_ms=draw.uniform(5, 500), jitter_ms=draw.uniform(0, 50)))
        for name in chosen
    )


def _losses(draw: random.Random, hosts: Sequence[str]) -> Links:
    link = Link(
        loss=draw.uniform(0.01, 0.1), twice=draw.uniform(0, 0.1), jitter_ms=draw.uniform(1, 10)
    )
    return tuple((name, link) for name in _pairs(hosts))
