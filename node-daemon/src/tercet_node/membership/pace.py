"""How often a node checks its neighbours.

The source's rule: 2^(seconds since the last change) seconds, at least 2 s and at most 5 min. After
a change checks come quickly, when an error is likely; in the steady state they cost nothing.

Ours, within the same bounds: a busy node stretches its interval. Each pair of neighbours is checked
from both sides, so the idle side goes on finding what there is to find.
"""

from __future__ import annotations

import math

INTERVAL_S_MIN = 2.0
INTERVAL_S_MAX = 300.0
BUSY_STRETCH_MAX = 8.0
"""By how much a node that is wholly busy stretches its interval."""


def interval_s(since_change_s: float, busy: float = 0.0) -> float:
    """Seconds until the next check; `busy` is within 0..1."""
    assert since_change_s >= 0.0, since_change_s
    assert 0.0 <= busy <= 1.0, busy
    grown = math.exp2(min(since_change_s, math.log2(INTERVAL_S_MAX)))
    stretched = max(grown, INTERVAL_S_MIN) * (1.0 + busy * (BUSY_STRETCH_MAX - 1.0))
    return min(stretched, INTERVAL_S_MAX)
