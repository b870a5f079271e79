"""What may be said of replicas, given what each says of itself."""

from __future__ import annotations

from tercet_cli.verify import Sums, Verdict, judge


def sums(node: str, chunks: dict[int, int], lsn: int = 7) -> Sums:
    return Sums(node, f"r-{node}", 2, lsn, 4 << 20, chunks)


def test_equal_at_one_place():
    found = judge([sums("a", {0: 1, 9: 2}), sums("b", {9: 2, 0: 1}), sums("c", {0: 1, 9: 2})])
    assert (found.verdict, found.first) == (Verdict.EQUAL, None)


def test_nothing_is_said_of_replicas_at_different_places():
    found = judge([sums("a", {0: 1}), sums("b", {0: 1}, lsn=8)])
    assert found.verdict is Verdict.APART


def test_first_difference_is_the_lowest_chunk():
    found = judge([sums("a", {0: 1, 5: 2, 9: 3}), sums("b", {0: 1, 5: 4, 9: 5})])
    assert found.verdict is Verdict.DIFFER
    assert found.differing == 2
    assert found.first is not None
    assert (found.first.index, found.first.offset_bytes) == (5, 5 * (4 << 20))
    assert found.first.crc32c == {"a": 2, "b": 4}


def test_chunk_that_one_replica_lacks_is_a_difference():
    found = judge([sums("a", {0: 1}), sums("b", {}), sums("c", {0: 1})])
    assert found.verdict is Verdict.DIFFER
    assert found.first is not None
    assert found.first.crc32c == {"a": 1, "b": None, "c": 1}


def test_digest_names_all_sums_together():
    assert sums("a", {0: 1, 1: 2}).digest == sums("b", {1: 2, 0: 1}).digest
    assert sums("a", {0: 1}).digest != sums("a", {1: 1}).digest
