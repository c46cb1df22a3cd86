"""The coordinator's eye on the shards: who is lost is brought back."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping

from ray.exceptions import RayTaskError

from ..sharding.errors import StepwellError
from .config import ServiceConfig
from .shards import Shards

logger = logging.getLogger("stepwell")


PAUSE_S = 0.2
"""Before another try, where one has failed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recovery:
    """How shards were brought back.

    Attributes:
        shards: Which.
        seconds: What it took, by part: ``restart`` until their processes had been started again and had imported torch,
            ``rebuild`` until they were what they had been, ``rest`` until all had left their group, ``form`` until the
            next one stood, ``resume`` until all had gone on with the step under way.
    """

    shards: tuple[int, ...]
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in self.seconds.items())
        return f"shards {list(self.shards)} are back after {sum(self.seconds.values()):.2f} s: {parts}"


class _Parts:
    """Seconds by part, one after the other."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._began, self.seconds = self._clock(), dict[str, float]()

    def end(self, part: str) -> None:
        """The part that is named has ended, and the next one begins."""
        now = self._clock()
        self.seconds[part], self._began = now - self._began, now


class Watch:
    """See *Note: What survives a shard* in docs/design.md.

    Args:
        config: The service's settings.
        shards: The shards.
        changing: Held by what changes the job or its state.
        has_job: Whether a job was registered.

    Attributes:
        num_recoveries: How often shards were brought back, by this coordinator.
        last_recovery: The last time; None before the first one.
    """

    def __init__(
        self, config: ServiceConfig, shards: Shards, changing: asyncio.Lock, has_job: Callable[[], bool]
    ) -> None:
        self._config, self._shards, self._changing, self._has_job = config, shards, changing, has_job
        self._tasks: list[asyncio.Task[None]] = []
        self.num_recoveries = 0
        self.last_recovery: Recovery | None = None

    def begin(self) -> None:
        """Watch from now on, where anything could be brought back."""
        if self._config.redundancy:
            self._tasks = [asyncio.create_task(self._watch(index)) for index in range(self._config.num_shards)]

    async def bring_back(self) -> None:
        """Have shards that were started again become what they were, and go on with the step that was under way."""
        name, parts = self._config.name, _Parts()
        await self._shards.await_restarts()
        parts.end("restart")
        empty, rebuilt = await self._shards.rebuild()
        parts.end("rebuild")
        if not empty and await self._shards.are_together():
            return  # it was brought back with another one
        if not rebuilt and not self._has_job():
            await self._shards.form_group()
            return
        if gone := sorted(set(empty) - set(rebuilt)):
            logger.error("service %r: shards %s are empty; restore the service from its last checkpoint", name, gone)
            await self._shards.all("give_up", what="the shards to give up what a lost one had")
            return
        standings = await self._shards.rest()
        parts.end("rest")
        await self._shards.form_group()
        parts.end("form")
        await self._shards.resume(standings)
        parts.end("resume")
        if empty:
            self.num_recoveries, self.last_recovery = self.num_recoveries + 1, Recovery(tuple(empty), parts.seconds)
            logger.warning("service %r: %s", name, self.last_recovery)

    async def _watch(self, index: int) -> None:
        name = self._config.name
        while True:
            await self._shards.lost(index)
            logger.warning("service %r: shard %d is lost, or its step was cut off; going on with it", name, index)
            try:
                async with self._changing:
                    await self.bring_back()
            except (StepwellError, RayTaskError) as error:
                logger.error("service %r: shard %d is not back: %s", name, index, error)
                await asyncio.sleep(PAUSE_S)
