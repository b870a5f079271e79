"""Pages of a list, by tokens that stay right while things come and go between the pages.

A token says after what to go on, not at which position: what was there before a page and is there
after it is listed once. Order and token are made of digests of the ids, so a token is short (the
specification's 128 bytes) whatever the ids are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from tercet_csi.errors import Aborted, InvalidArgument

T = TypeVar("T")
_TOKEN = re.compile(r"after-[0-9a-f]{32}")


def page(
    items: Iterable[T], identify: Callable[[T], str], starting_token: str, max_entries: int
) -> tuple[list[T], str]:
    """The entries of one page and the token of the next; an empty token when there is none.

    max_entries: 0 for all. Raises Aborted for a token that is not one of ours, InvalidArgument for
    a negative number of entries.
    """
    if max_entries < 0:
        raise InvalidArgument(f"max_entries is {max_entries}: it must not be negative")
    if starting_token and _TOKEN.fullmatch(starting_token) is None:
        raise Aborted(f"starting_token {starting_token!r} is not one of ours: start without it")
    marked = [(_token(identify(item)), item) for item in items]
    rest = sorted(
        ((token, item) for token, item in marked if token > starting_token),
        key=lambda pair: pair[0],
    )
    taken = rest[:max_entries] if max_entries else rest
    more = len(taken) < len(rest)
    return [item for _, item in taken], taken[-1][0] if more else ""


def _token(identity: str) -> str:
    return "after-" + hashlib.sha256(identity.encode()).hexdigest()[:32]
