"""Bytes from outside: one form for each message, everything else is refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_membership_net import entry, gone, signed

from tercet_node.membership import (
    Ack,
    Change,
    Heard,
    Hello,
    Part,
    Prelim,
    Probe,
    Relay,
    Verdict,
    WireError,
    decode_message,
    encode_message,
    size_bytes,
)
from tercet_node.membership.messages import MESSAGE_BYTES_MAX, SEQUENCE_MAX

numbers = st.integers(0, (1 << 64) - 1)
digests = st.integers(0, (1 << 128) - 1)
entries = st.builds(
    lambda nid, inc, kind: kind(nid, inc),
    st.integers(0, 300),
    st.integers(1, 9),
    st.sampled_from([entry, gone, signed]),
)
parts = st.builds(
    lambda digest, index, some, answer: Part(
        digest, index, index * 10 + len(some), tuple(some), answer
    ),
    digests,
    st.integers(0, 1000),
    st.lists(entries, max_size=10),
    st.booleans(),
)
messages = st.one_of(
    st.builds(Change, entries),
    st.builds(Prelim, digests),
    parts,
    st.builds(Probe, numbers, digests),
    st.builds(Ack, numbers, entries),
    st.builds(Relay, numbers, st.integers(0, 300)),
    st.builds(
        Verdict,
        st.integers(0, 300),
        st.binary(min_size=16, max_size=16),
        st.integers(0, SEQUENCE_MAX),
        st.booleans(),
    ),
    st.builds(Heard, st.integers(0, 300), numbers),
    st.builds(Hello, entries),
)


@given(messages)
def test_what_was_said_is_what_is_heard(message):
    raw = encode_message(message)
    assert decode_message(raw) == message
    assert len(raw) == size_bytes(message) <= MESSAGE_BYTES_MAX


@settings(max_examples=300)
@given(messages, st.integers(0, 4000), st.integers(1, 255))
def test_changed_byte_is_refused_or_is_another_message(message, place, flip):
    raw = bytearray(encode_message(message))
    raw[place % len(raw)] ^= flip
    try:
        heard = decode_message(bytes(raw))
    except WireError:
        return
    assert heard != message
    assert encode_message(heard) == bytes(raw), "each message has one form"


@given(messages, st.integers(0, 4000))
def test_truncated_or_longer_is_refused(message, length):
    raw = encode_message(message)
    with pytest.raises(WireError):
        decode_message(raw[: length % len(raw)])
    with pytest.raises(WireError):
        decode_message(raw + b"\0")


@settings(max_examples=300)
@given(st.binary(max_size=64), st.sampled_from([b"", b"TM\x01\x02\x00\x10", b"TM\x01\x08\x00\x0c"]))
def test_noise_is_refused_or_is_a_message(noise, head):
    try:
        heard = decode_message(head + noise)
    except WireError:
        return
    assert encode_message(heard) == head + noise


PART = Part(5, 0, 2, (entry(1), entry(2)), answer=True)


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        (0, 0, "header"),
        (2, 2, "header"),
        (3, 9, "kind"),
        (5, 1, "kind"),
        (28, 2, "flags"),
        (29, 11, "entries"),
        (29, 3, "entries"),
        (6 + 24, 255, "nid"),
        (6 + 24 + 44, 3, "state"),
        (6 + 24 + 45, 65, "address"),
        (6 + 24 + 46, 0xFF, "UTF-8"),
        (6 + 24 + 109, 1, "address"),
        (6 + 24 + 110, 17, "token"),
        (6 + 24 + 174, 1, "token"),
        (6 + 24 + 2 * 175, 0, "padding"),
        (-1, 0, "padding"),
    ],
)
def test_each_field_of_a_part_has_its_values(place, value, field):
    raw = bytearray(encode_message(PART))
    raw[place] = value
    with pytest.raises(WireError, match=field):
        decode_message(bytes(raw))


def test_judgement_is_one_of_two():
    raw = encode_message(Verdict(1, bytes(16), 3, alive=True))
    with pytest.raises(WireError, match="alive"):
        decode_message(raw[:-1] + b"\2")


def test_judgement_has_a_next_one():
    """Who contradicts takes the next sequence: it has to have a place in the bytes."""
    raw = encode_message(Verdict(1, bytes(16), SEQUENCE_MAX, alive=False))
    assert decode_message(raw).sequence == SEQUENCE_MAX
    for sequence in (SEQUENCE_MAX + 1, (1 << 64) - 1):
        at = len(raw) - 1 - 8
        with pytest.raises(WireError, match="sequence"):
            decode_message(raw[:at] + sequence.to_bytes(8, "big") + raw[-1:])


def test_bytes_stay_what_they_are():
    """Golden: a change of these bytes is a change of the protocol's version."""
    assert encode_message(Prelim(1)).hex() == "544d01020010" + "00" * 15 + "01"
    assert encode_message(Probe(258, 3)).hex() == "544d01040018" + "0" * 13 + "102" + "0" * 31 + "3"
    part = encode_message(Part(5, 0, 2, (entry(1), gone(2)), answer=True))
    assert len(part) == 1780
    assert hashlib.sha256(part).hexdigest()[:16] == "2fd4daa6fd3e9e88"
