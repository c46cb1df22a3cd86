"""Who keeps whom: which keepers hold each shard's copy and log."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class KeeperPlace:
    """A keeper and where it is.

    Attributes:
        index: Its number.
        handle: Of its actor.
        node: Ray's id of its node.
        incarnation: Names its process; another one has nothing of what the one before had.
    """

    index: int
    handle: Any
    node: str
    incarnation: str


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """What a shard is told.

    Attributes:
        node: Ray's id of its own node.
        keepers: All that there are; any of them may have what the shard's process before this one had.
        chosen: The numbers of those that are to keep this shard.
    """

    node: str
    keepers: tuple[KeeperPlace, ...]
    chosen: frozenset[int]


def arrange(nodes: Sequence[str], keepers: Sequence[KeeperPlace], redundancy: int) -> list[Arrangement]:
    """Choose each shard's keepers so that it survives the loss of as many nodes as may be.

    Nodes that none of its keepers is on yet come first, its own node last of them; shards of one node go to different
    keepers where there is a choice. See *Note: What survives a shard* in docs/design.md.

    Args:
        nodes: Each shard's node.
        keepers: The keepers.
        redundancy: How many of them each shard wants; if there are fewer it gets all.
    """
    return [
        Arrangement(node, tuple(keepers), _choose(shard, node, keepers, redundancy)) for shard, node in enumerate(nodes)
    ]


def _choose(shard: int, node: str, keepers: Sequence[KeeperPlace], redundancy: int) -> frozenset[int]:
    chosen: list[KeeperPlace] = []

    def order(keeper: KeeperPlace) -> tuple[bool, bool, int]:
        is_taken = any(keeper.node == other.node for other in chosen)
        return is_taken, keeper.node == node, (keeper.index - shard) % (max(each.index for each in keepers) + 1)

    while len(chosen) < min(redundancy, len(keepers)):
        chosen.append(min((keeper for keeper in keepers if keeper not in chosen), key=order))
    return frozenset(keeper.index for keeper in chosen)
