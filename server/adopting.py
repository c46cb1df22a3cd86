"""Lost shards for which the cluster has no place: they come back beside who holds their copy."""

from __future__ import annotations

import asyncio
import logging

from .keepers import Keepers
from .resizing import ShardSets
from .shards import POLL_S, Shards
from .standby import ActorState, take_seats

logger = logging.getLogger("stepwell")


class Adoption:
    """Lives on the coordinator's event loop. See *Note: What survives a shard* in docs/design.md.

    Args:
        shards: The shards.
        keepers: Their keepers.
        sets: Knows which shards have no place, and starts others.
    """

    def __init__(self, shards: Shards, keepers: Keepers, sets: ShardSets) -> None:
        self._shards, self._keepers, self._sets = shards, keepers, sets

    async def place_lost(self) -> None:
        """Wait for lost shards, whose places spares take, or to be started.

        Those that are not in time are started on the node of a keeper of theirs.

        They reserve nothing there. Where nobody has their copy, and where they need a GPU, they go on waiting.
        """
        config = self._shards.config
        deadline = asyncio.get_running_loop().time() + config.placement_timeout_s
        while unplaced := await take_seats(self._shards, self._sets.states):
            if asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(POLL_S)
        if not unplaced or not config.detached or config.num_gpus_per_shard:
            return
        states = await self._sets.states(self._shards.handles)
        for index in (index for index in unplaced if states[index] is not ActorState.RUNS):
            node = await self._keepers.node_with(index)
            if node is not None:
                lost = self._shards.handles[index]
                self._shards.handles[index] = await self._sets.replace(config, index, lost, node)
                logger.warning(
                    "service %r: no place for shard %d within %g s; it goes on beside its keeper on node %s, with "
                    "nothing reserved. Add nodes, then `stepwell resize %s %d` gives all shards places of their own",
                    *(config.name, index, config.placement_timeout_s, node, config.name, config.num_shards),
                )
        await self._shards.await_restarts()  # or those that are just starting would be replaced the next time
