"""Are the replicas of a volume equal? Checksums of every chunk, compared at one applied place.

Replicas apply the same log at their own pace, so sums mean something only when all are of the same
(epoch, lsn). Under load they rarely are at the same moment: they are asked again until they are, or
until the time is up; then nothing is said about equality.

`judge` is pure. Checksums are what each node's engine computes from its own disk; a replica that
cannot be asked makes the comparison impossible, it is never left out silently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Sums:
    """What one replica said of itself."""

    node: str
    replica: str
    epoch: int
    lsn: int
    chunk_bytes: int
    chunks: Mapping[int, int]
    """CRC32C by chunk number; a chunk that was never written is absent and reads as zeroes."""

    @property
    def place(self) -> tuple[int, int]:
        """The applied place that the sums are of."""
        return self.epoch, self.lsn

    @property
    def digest(self) -> str:
        """Short name for all sums together, for people to compare at a glance."""
        rows = "".join(f"{index}:{self.chunks[index]:08x}\n" for index in sorted(self.chunks))
        return hashlib.sha256(rows.encode()).hexdigest()[:12]


class Verdict(Enum):
    """Outcome of a comparison."""

    EQUAL = "equal"
    DIFFER = "differ"
    APART = "apart"
    """The replicas were not at the same applied place: ask again."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first chunk in which replicas differ."""

    index: int
    offset_bytes: int
    length_bytes: int
    crc32c: Mapping[str, int | None]
    """By node; None: never written there."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What can be said of a set of replicas."""

    verdict: Verdict
    first: Difference | None = None
    differing: int = 0


def judge(replicas: Sequence[Sums]) -> Judgement:
    """Compare replicas; a single one is equal to itself."""
    assert replicas, "nothing to compare"
    if len({sums.place for sums in replicas}) > 1:
        return Judgement(Verdict.APART)
    sizes = {sums.chunk_bytes for sums in replicas}
    assert len(sizes) == 1, f"engines with different chunk sizes: {sizes}"
    chunk_bytes = sizes.pop()
    everywhere = sorted(set().union(*(sums.chunks for sums in replicas)))
    differing = [
        index for index in everywhere if len({sums.chunks.get(index) for sums in replicas}) > 1
    ]
    if not differing:
        return Judgement(Verdict.EQUAL)
    index = differing[0]
    first = Difference(
        index=index,
        offset_bytes=index * chunk_bytes,
        length_bytes=chunk_bytes,
        crc32c={sums.node: sums.chunks.get(index) for sums in replicas},
    )
    return Judgement(Verdict.DIFFER, first, len(differing))
