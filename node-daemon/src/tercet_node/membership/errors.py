"""What can go wrong in the membership, as one tree.

    MembershipError
    |- WireError      bytes from outside that are no message of ours: close the connection
    `- CommandError   a person's or the agent's command cannot be carried out in this state

What peers do wrong with well-formed messages (a bad signature, an old entry) is no exception: the
machine refuses it, says so in an effect (`Refused`), and goes on.
"""

from __future__ import annotations


class MembershipError(Exception):
    """The membership cannot do what was asked."""


class WireError(MembershipError):
    """These bytes are no message: says at which field."""


class CommandError(MembershipError):
    """The command cannot be carried out: says which node, and what to do."""
