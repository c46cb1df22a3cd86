"""Shards that have no place go on beside their keepers; others are left alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any, cast
from unittest import mock

import pytest

from stepwell.server.adopting import Adoption
from stepwell.server.config import ServiceConfig
from stepwell.server.keepers import Keepers
from stepwell.server.resizing import OneSet
from stepwell.server.shards import Shards
from stepwell.server.standby import ActorState

CONFIG = ServiceConfig("test", num_shards=3, placement_timeout_s=0.02)
KEPT_ON = {0: "node-a", 1: "node-b", 2: None}


@dataclasses.dataclass(frozen=True)
class Handle:
    """Of a shard that answers."""

    what: str

    @property
    def status(self) -> Any:
        return mock.Mock(remote=mock.AsyncMock(return_value=None))


class Sets(OneSet):
    """Shards that do not run, for so many questions."""

    def __init__(self, unplaced: Sequence[int], num_questions: float) -> None:
        self._unplaced, self._num_left = list(unplaced), num_questions

    async def states(self, actors: Sequence[Any]) -> list[ActorState]:
        self._num_left -= 1
        lost = self._unplaced if self._num_left >= 0 else []
        return [ActorState.LOST if index in lost else ActorState.RUNS for index in range(len(actors))]

    async def replace(self, config: ServiceConfig, index: int, lost: Any, node: str) -> Any:
        return Handle(f"shard {index} on {node}")


class KeepersOf:
    """Who has copies of whom."""

    async def node_with(self, shard: int) -> str | None:
        return KEPT_ON[shard]


@pytest.mark.parametrize(
    ("changes", "num_questions", "expected"),
    [
        ({}, float("inf"), ["shard 0 on node-a", "as it was", "as it was"]),
        ({"placement_timeout_s": 60.0}, 3, ["as it was"] * 3),
        ({"num_gpus_per_shard": 1}, float("inf"), ["as it was"] * 3),
        ({"detached": False}, float("inf"), ["as it was"] * 3),
    ],
    ids=["no place", "back in time", "needs a GPU", "without a name"],
)
def test_shard_goes_on_beside_its_keeper_if_there_is_no_place_in_time(
    changes: dict[str, Any], num_questions: float, expected: list[str]
) -> None:
    """Shard 1 runs, and nobody has a copy of shard 2."""
    config = dataclasses.replace(CONFIG, **changes)
    shards = Shards(config, [Handle("as it was")] * 3, resign=lambda: None)
    adoption = Adoption(shards, cast(Keepers, KeepersOf()), Sets([0, 2], num_questions))
    asyncio.run(asyncio.wait_for(adoption.place_lost(), 10.0))
    assert [shard.what for shard in shards.handles] == expected
