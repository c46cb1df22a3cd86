"""The coordinator's eye on shards and keepers: who is lost is brought back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ray.exceptions import RayTaskError

from ..sharding.errors import CheckpointRestoreNeededError, KernelError, ShardLostError, StepwellError
from ..sharding.saved import SavedCheckpoint
from .config import ServiceConfig
from .keepers import Keepers
from .metrics import Instruments
from .recoveries import Parts, Recoveries, Recovery
from .shards import Shards

logger = logging.getLogger("stepwell")

RETRY_S = 0.2


class Watch:
    """See *Note: What survives a shard* in docs/design.md.

    Args:
        config: The service's settings.
        shards: The shards.
        keepers: The keepers.
        changing: Held by what changes the job or its state.
        what_is_there: Whether a job was registered, and the last checkpoint that was saved of it.
        place_lost: See :meth:`Adoption.place_lost`.

    Attributes:
        recoveries: Of shards, by this coordinator.
    """

    def __init__(
        self,
        config: ServiceConfig,
        shards: Shards,
        keepers: Keepers,
        changing: asyncio.Lock,
        what_is_there: Callable[[], tuple[bool, SavedCheckpoint | None]],
        place_lost: Callable[[], Awaitable[None]],
    ) -> None:
        self._config, self._shards, self._keepers, self._changing = config, shards, keepers, changing
        self._what_is_there, self._place_lost = what_is_there, place_lost
        self._tasks: list[asyncio.Task[None]] = []
        self.recoveries = Recoveries()
        self._instruments = Instruments(service=config.name)

    def begin(self) -> None:
        """Watch from now on, where anything could be brought back."""
        if self._config.redundancy:
            shards, keepers = range(len(self._shards.handles)), range(len(self._keepers))
            self._tasks = [
                *(self._watch(f"shard {index}", self._shards.lost, index, self.bring_back) for index in shards),
                *(self._watch(f"keeper {index}", self._keepers.lost, index, self._arrange) for index in keepers),
            ]

    def end(self) -> None:
        """Watch no more: the shards are to end."""
        for task in self._tasks:
            task.cancel()

    async def bring_back(self) -> None:
        """Have shards that were started again become what they were, and go on with the step that was under way."""
        name, parts = self._config.name, Parts()
        await self._arrange()
        await self._shards.await_restarts()
        parts.end("restart")
        gone: list[int] = []
        try:
            empty, rebuilt = await self._shards.rebuild()
            parts.end("rebuild")
            if not empty and await self._shards.are_together():
                return  # it was brought back with another one
            gone = sorted(set(empty) - set(rebuilt))
            if gone:
                raise CheckpointRestoreNeededError(f"what shards {gone} held is lost, and no keeper has it")
            standings = await self._shards.rest()
        except (CheckpointRestoreNeededError, KernelError) as error:
            await self._give_up(f"service {name!r}: {error}", is_empty=len(gone) == len(self._shards.handles))
            return
        parts.end("rest")
        await self._shards.form_group()
        parts.end("form")
        await self._shards.resume(standings)
        parts.end("resume")
        if empty:
            last = Recovery(tuple(empty), parts.seconds)
            self.recoveries = Recoveries(self.recoveries.count + 1, last)
            logger.warning("service %r: %s", name, last)
            self._instruments.count({"stepwell_recoveries_total": self.recoveries.count})
            self._instruments.observe("stepwell_recovery_seconds", sum(parts.seconds.values()))

    async def _arrange(self) -> None:
        """Decide who keeps whom, once all shards are started again."""
        await self._place_lost()
        await self._keepers.arrange()

    async def _give_up(self, why: str, *, is_empty: bool) -> None:
        """Have all who ask be told that a checkpoint is to be restored, if there was ever a job."""
        has_job, saved = self._what_is_there()
        if has_job:
            needed = CheckpointRestoreNeededError(f"{why}. {_advice(saved)}")
            logger.error("%s", needed)
            await self._shards.all("give_up", needed, what="the shards to give up what a lost one had")
        if is_empty:
            await self._shards.form_group()

    def _watch(
        self, who: str, lost: Callable[[int], Awaitable[None]], index: int, bring_back: Callable[[], Awaitable[None]]
    ) -> asyncio.Task[None]:
        async def watch() -> None:
            while True:
                await lost(index)
                logger.warning("service %r: %s is lost or cut off; bringing it back", self._config.name, who)
                while not await self._is_done(bring_back, f"{who} is not back"):
                    await asyncio.sleep(RETRY_S)

        return asyncio.create_task(watch())

    async def _is_done(self, bring_back: Callable[[], Awaitable[None]], failure: str) -> bool:
        """Whether it was done, or is not to be tried again, as no other process was lost in it."""
        try:
            async with self._changing:
                await bring_back()
        except (StepwellError, RayTaskError) as error:
            logger.error("service %r: %s: %s", self._config.name, failure, error)
            return not isinstance(error, ShardLostError)
        return True


def _advice(saved: SavedCheckpoint | None) -> str:
    if saved is None:
        return (
            "This service has saved no checkpoint, as far as it knows: restore one of another run with "
            "service.restore(URI), or launch it anew"
        )
    return (
        f"Its last checkpoint is {saved.uri}, of step {saved.step}: service.restore({saved.uri!r}), then "
        "optimizer.refresh() on every rank"
    )
