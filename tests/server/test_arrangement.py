"""Who keeps whom: what each shard survives, and that nobody keeps more than need be."""

from __future__ import annotations

import itertools

import pytest

from stepwell.server.arrangement import KeeperPlace, arrange


def places(nodes: str) -> list[KeeperPlace]:
    """A keeper on each node, which is a letter."""
    return [KeeperPlace(index, None, node, "only") for index, node in enumerate(nodes)]


def chosen(shards: str, keepers: str, redundancy: int) -> list[str]:
    """The nodes of each shard's keepers."""
    arranged = arrange(list(shards), places(keepers), redundancy)
    return ["".join(sorted(keepers[index] for index in each.chosen)) for each in arranged]


@pytest.mark.parametrize(
    ("shards", "keepers", "redundancy", "expected"),
    [
        ("AA", "A", 1, ["A", "A"]),
        ("AA", "AA", 2, ["AA", "AA"]),
        ("AB", "AB", 1, ["B", "A"]),
        ("AB", "AB", 2, ["AB", "AB"]),
        ("ABC", "ABC", 1, ["B", "C", "A"]),
        ("ABC", "ABC", 2, ["BC", "AC", "AB"]),
        ("AAB", "ABB", 2, ["AB", "AB", "AB"]),
        ("A", "A", 2, ["A"]),
    ],
)
def test_keepers_are_on_as_many_other_nodes_as_there_are(
    shards: str, keepers: str, redundancy: int, expected: list[str]
) -> None:
    assert chosen(shards, keepers, redundancy) == expected


@pytest.mark.parametrize("redundancy", [1, 2])
@pytest.mark.parametrize("num_nodes", [2, 3, 4])
def test_as_many_nodes_may_be_lost_as_there_are_keepers_elsewhere(num_nodes: int, redundancy: int) -> None:
    nodes = "ABCD"[:num_nodes]
    arranged = chosen(nodes * 2, nodes, redundancy)
    for shard, keepers in zip(nodes * 2, arranged, strict=True):
        elsewhere = min(redundancy, num_nodes - 1)
        for lost in itertools.combinations(nodes, elsewhere):
            assert shard not in lost or set(keepers) - set(lost)


def test_load_is_spread() -> None:
    for redundancy in (1, 2):
        kept = "".join(chosen("ABCDABCD", "ABCD", redundancy))
        assert {node: kept.count(node) for node in "ABCD"} == dict.fromkeys("ABCD", 2 * redundancy)
