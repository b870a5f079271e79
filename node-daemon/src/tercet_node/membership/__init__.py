"""Who is in the cluster: every node keeps the whole list, and neighbours repair it.

News goes down a binary tree; what the tree missed, a check between neighbours on a ring finds and
repairs. docs/membership.md has the protocol, where it comes from and what was measured.

    errors -> entries -> nodelist, messages, seals -> events, pace -> machine -> popcorn, versioned
                                                                  -> detector    -> node

Pure: `step(event, now) -> effects`. The agent, the simulations of `tercet sim membership` and the
tests drive the same machines. The list never decides who may write to a volume.
"""

from tercet_node.membership.detector import Detector
from tercet_node.membership.entries import Entry, Incarnation, Nid, State, newer
from tercet_node.membership.errors import CommandError, MembershipError, WireError
from tercet_node.membership.events import (
    AddNoProp,
    Busy,
    Cause,
    Changed,
    CheckNow,
    Dead,
    Effect,
    Event,
    Introduce,
    Judged,
    Lock,
    Reason,
    Received,
    Refused,
    Send,
    Suspected,
    Tick,
    Unlock,
)
from tercet_node.membership.machine import Machine, Settings
from tercet_node.membership.messages import (
    Ack,
    Change,
    Heard,
    Hello,
    Message,
    Part,
    Prelim,
    Probe,
    Relay,
    Verdict,
    decode_message,
    encode_message,
    size_bytes,
)
from tercet_node.membership.node import Node
from tercet_node.membership.nodelist import NodeList
from tercet_node.membership.popcorn import PopcornMachine, Reading
from tercet_node.membership.seals import Ed25519Seal, OpenSeal, Seal, sign
from tercet_node.membership.versioned import VersionedMachine

__all__ = [
    "Ack",
    "AddNoProp",
    "Busy",
    "Cause",
    "Change",
    "Changed",
    "CheckNow",
    "CommandError",
    "Dead",
    "Detector",
    "Ed25519Seal",
    "Effect",
    "Entry",
    "Event",
    "Heard",
    "Hello",
    "Incarnation",
    "Introduce",
    "Judged",
    "Lock",
    "Machine",
    "MembershipError",
    "Message",
    "Nid",
    "Node",
    "NodeList",
    "OpenSeal",
    "Part",
    "PopcornMachine",
    "Prelim",
    "Probe",
    "Reading",
    "Reason",
    "Received",
    "Refused",
    "Relay",
    "Seal",
    "Send",
    "Settings",
    "State",
    "Suspected",
    "Tick",
    "Unlock",
    "Verdict",
    "VersionedMachine",
    "WireError",
    "decode_message",
    "encode_message",
    "newer",
    "sign",
    "size_bytes",
]
