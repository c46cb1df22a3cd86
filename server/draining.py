"""The coordinator's eye on nodes that are about to go: shards, and then it itself, move away while they can."""

from __future__ import annotations

import asyncio
import logging
import uuid

from ray.exceptions import RayError

from ..sharding.errors import StepwellError
from .resizing import Resizing, ShardSets

logger = logging.getLogger("stepwell")

LOOK_AGAIN_S = 5.0
TRY_AGAIN_S = 30.0


class Draining:
    """Moves everything from nodes that Ray is draining: by ``ray drain-node``, an autoscaler, or a spot notice.

    Args:
        resizing: Moves them.
        sets: Knows which nodes are drained.
    """

    def __init__(self, resizing: Resizing, sets: ShardSets) -> None:
        self._resizing, self._sets = resizing, sets
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except (StepwellError, RayError) as error:
                logger.error("shards cannot leave a node that is drained; trying again: %s", error)
                await asyncio.sleep(TRY_AGAIN_S)
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _look(self) -> None:
        drained = await self._sets.drained()
        if drained:
            await self._resizing.leave(drained, uuid.uuid4().hex)
        if self._sets.here() in drained:
            # Ray ends a drained node once it is idle, which an actor without resources keeps it from, too.
            logger.warning("the coordinator leaves a node that is drained")
            await self._resizing.go()
