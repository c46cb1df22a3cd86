"""The coordinator's eye on the shards: who is lost is brought back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ray.exceptions import RayTaskError

from ..sharding.errors import StepwellError
from .config import ServiceConfig
from .metrics import Instruments
from .shards import Shards

logger = logging.getLogger("stepwell")


class Watch:
    """See *Note: What survives a shard* in docs/design.md.

    Args:
        config: The service's settings.
        shards: The shards.
        changing: Held by what changes the job or its state.
        has_job: Whether a job was registered.
    """

    def __init__(
        self, config: ServiceConfig, shards: Shards, changing: asyncio.Lock, has_job: Callable[[], bool]
    ) -> None:
        self._config, self._shards, self._changing, self._has_job = config, shards, changing, has_job
        self._tasks: list[asyncio.Task[None]] = []
        self._num_recoveries, self._instruments = 0, Instruments(service=config.name)

    def begin(self) -> None:
        """Watch from now on, where anything could be brought back."""
        if self._config.redundancy:
            self._tasks = [asyncio.create_task(self._watch(index)) for index in range(self._config.num_shards)]

    async def bring_back(self) -> None:
        """Have shards that were started again become what they were, and go on with the step that was under way."""
        began, name = asyncio.get_running_loop().time(), self._config.name
        empty, rebuilt = await self._shards.rebuild()
        if not rebuilt and not self._has_job():
            await self._shards.form_group()
            return
        if gone := sorted(set(empty) - set(rebuilt)):
            logger.error("service %r: shards %s are empty; restore the service from its last checkpoint", name, gone)
            await self._shards.all("give_up", what="the shards to give up what a lost one had")
            return
        await self._shards.resume()
        if empty:
            took_s = asyncio.get_running_loop().time() - began
            logger.warning("service %r: shards %s are back after %.1f s", name, empty, took_s)
            self._num_recoveries += 1
            self._instruments.count({"stepwell_recoveries_total": self._num_recoveries})
            self._instruments.observe("stepwell_recovery_seconds", took_s)

    async def _watch(self, index: int) -> None:
        while True:
            await self._shards.lost(index)
            logger.warning("service %r: shard %d was lost; bringing it back", self._config.name, index)
            try:
                async with self._changing:
                    await self.bring_back()
            except (StepwellError, RayTaskError) as error:
                logger.error("service %r: shard %d is not back: %s", self._config.name, index, error)
