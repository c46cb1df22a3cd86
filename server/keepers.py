"""The coordinator's line to the keepers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ..sharding.errors import ServiceTimeoutError, ShardLostError
from .arrangement import KeeperPlace, arrange
from .calls import gather, until_ended
from .keeper import Holding
from .shards import FORMING_TIMEOUT_S, POLL_S, Shards

HOLDINGS_TIMEOUT_S = 5.0


class Keepers:
    """All keepers of a service.

    Args:
        handles: Their handles, by index; none without redundancy.
        shards: The shards.
        redundancy: How many keepers each shard has.
    """

    def __init__(self, handles: Sequence[Any], shards: Shards, redundancy: int) -> None:
        self._handles, self._shards, self._redundancy = list(handles), shards, redundancy

    def beside(self, handles: Sequence[Any], shards: Shards) -> Keepers:
        """Those of another set of shards."""
        return Keepers(handles, shards, self._redundancy)

    def become(self, other: Keepers) -> None:
        """Be those of another set, which the shards of this object have become."""
        self._handles = other._handles

    def __len__(self) -> int:
        return len(self._handles)

    async def arrange(self) -> None:
        """Decide who keeps whom, as shards and keepers are placed now, and tell all shards.

        Called whenever a shard or a keeper was started, here or elsewhere; it waits for those that are being started
        again. A shard whose keepers stay the same is not disturbed.
        """
        if not self._handles:
            return
        await self._shards.await_restarts()
        keepers = [place for place in await asyncio.gather(*map(self._place, range(len(self)))) if place is not None]
        calls = [shard.node.remote() for shard in self._shards.handles]
        nodes = await gather(calls, timeout_s=FORMING_TIMEOUT_S, what="the shards' nodes")
        told = (
            self._shards.some([shard], "keep_with", arrangement, what=f"shard {shard} to know its keepers")
            for shard, arrangement in enumerate(arrange(nodes, keepers, self._redundancy))
        )
        await asyncio.gather(*told)

    async def lost(self, index: int) -> None:
        """Return when a keeper's process has ended."""
        await until_ended(self._handles[index].linger.remote())

    async def holdings(self) -> dict[int, dict[int, Holding]]:
        """What each keeper that answers has, by keeper and shard."""
        answers = await asyncio.gather(*map(self._holdings, range(len(self))))
        return {index: answer for index, answer in enumerate(answers) if answer is not None}

    async def node_with(self, shard: int) -> str | None:
        """Id of the node of a keeper that has a shard's copy; None if none that answers has it."""
        for index, held in (await self.holdings()).items():
            if shard in held and held[shard].step is not None:
                place = await self._place(index)
                return None if place is None else place.node
        return None

    async def _place(self, index: int) -> KeeperPlace | None:
        """Where a keeper is; None if it is not started again within ``placement_timeout_s``."""
        limit_s, handle = self._shards.config.placement_timeout_s, self._handles[index]
        deadline = asyncio.get_running_loop().time() + limit_s
        while True:
            try:
                what = f"keeper {index} to tell where it is"
                ((node, incarnation),) = await gather([handle.who.remote()], timeout_s=limit_s, what=what)
            except (ShardLostError, ServiceTimeoutError):
                if asyncio.get_running_loop().time() > deadline:
                    return None
                await asyncio.sleep(POLL_S)
            else:
                return KeeperPlace(index, handle, node, incarnation)

    async def _holdings(self, index: int) -> dict[int, Holding] | None:
        call = self._handles[index].holdings.remote()
        try:
            answers: list[dict[int, Holding]] = await gather(
                [call], timeout_s=HOLDINGS_TIMEOUT_S, what=f"keeper {index}"
            )
        except (ShardLostError, ServiceTimeoutError):
            return None
        return answers[0]
