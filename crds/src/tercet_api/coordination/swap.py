"""Compare-and-swap of a volume's configuration (T3, M1, M3, W6).

One JSON Patch that tests metadata.uid and the whole old value: not resourceVersion, which changes
with every progress report and repeats after a restored API server (M3), and not the epoch alone,
which edits within an epoch leave as it is. The API server applies it in one transaction of etcd and
checks the CEL rules on the result, so at most one of several racing swaps takes place.

A failed `test` and a refused rule both come back as 422: the object is read again to tell them
apart. Nothing is tried again here: who lost has to look at the winner first, and who does not know
must count both outcomes until a read says more (T3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tercet_api.clients import ApiError, Json, NotFound, Objects, Refused, Unreachable, expect, put
from tercet_api.objects import Config, Volume


@dataclass(frozen=True, slots=True)
class Swapped:
    """Done: `volume` has the new configuration (a consistent view, T7 may read attachments)."""

    volume: Volume


@dataclass(frozen=True, slots=True)
class Lost:
    """Another configuration is there, in `volume`; None: this object (this uid) is gone."""

    volume: Volume | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The API server refuses the step itself; `volume` still has the old configuration."""

    volume: Volume
    message: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """No answer that settles it: until a read does, both outcomes count (T3)."""

    message: str


Swap = Swapped | Lost | Refusal | Unknown


async def swap_config(
    volumes: Objects[Volume],
    name: str,
    uid: str,
    old: Config | None,
    new: Config,
    *,
    also: Sequence[Json] = (),
) -> Swap:
    """Replace status.config `old` (None: there is none yet) by `new`, or say why not.

    `also` are further operations of the same JSON Patch. Raises ApiError only for what has nothing
    to do with the race (Forbidden).
    """
    before = None if old is None else old.to_json()
    patch = [
        expect("/metadata/uid", uid),
        expect("/status/config", before),
        put("/status/config", new.to_json()),
        *also,
    ]
    try:
        return Swapped(await volumes.patch_status(name, patch))
    except NotFound:
        return Lost(None)
    except Unreachable as error:
        return Unknown(str(error))
    except Refused as error:
        message = str(error)
    # A failed test or a refused step: tell them apart by a consistent read.
    try:
        now = await volumes.get(name)
    except NotFound:
        return Lost(None)
    except ApiError as error:
        return Unknown(f"{message}; and the read after it: {error}")
    return _judge(now, uid, old, new, message)


def _judge(now: Volume, uid: str, old: Config | None, new: Config, message: str) -> Swap:
    if now.uid != uid:
        return Lost(None)
    if now.status.config == new:
        return Swapped(now)  # an earlier try of ours whose answer was lost
    if now.status.config == old:
        return Refusal(now, message)
    return Lost(now)
