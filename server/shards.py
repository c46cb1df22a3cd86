"""The coordinator's line to the shards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from ..sharding.errors import CheckpointRestoreNeededError, EpochError, ServiceError
from ..sharding.recovery import Standing, known_sums
from ..sharding.reports import ShardStatus
from .calls import gather, until_ended, until_started
from .collective import NO_GENERATION, Generation
from .config import COLLECTIVE_MARGIN_S, ServiceConfig
from .knowledge import ShardReport, common_generation

FORMING_TIMEOUT_S = 60.0
STATE_TIMEOUT_S = 1800.0
"""Limit for operations that move the whole state."""
RESTART_TIMEOUT_S = 120.0
HOLD_TRIES = 3
POLL_S = 0.05


class Shards:
    """All shards, as the coordinator of one epoch asks them. See *Note: Epochs* in docs/design.md.

    Args:
        config: The service's settings.
        handles: The shards' handles, by index.
        resign: Called when shards refuse this coordinator, as another one has taken the service over.
        spares: Handles of processes that can take a lost shard's place.

    Attributes:
        config, handles, spares: As above.
        epoch: This coordinator's; 0 before :meth:`claim`.
        generation: Of the group that was formed last, as far as this coordinator knows.
    """

    def __init__(
        self, config: ServiceConfig, handles: Sequence[Any], *, resign: Callable[[], None], spares: Sequence[Any] = ()
    ) -> None:
        self.handles, self.spares, self.config, self._resign = list(handles), list(spares), config, resign
        self.epoch, self.generation = 0, NO_GENERATION
        self._num_formed = 0

    def beside(self, config: ServiceConfig, handles: Sequence[Any], spares: Sequence[Any] = ()) -> Shards:
        """Another set of shards of the service, as the same coordinator asks them."""
        other = Shards(config, handles, resign=self._resign, spares=spares)
        other.epoch, other._num_formed = self.epoch, self._num_formed
        return other

    def become(self, other: Shards) -> None:
        """Ask the shards of another set from now on."""
        self.config, self.handles, self.spares = other.config, other.handles, other.spares
        self.epoch, self.generation, self._num_formed = other.epoch, other.generation, other._num_formed

    async def all(self, method: str, *args: Any, what: str, timeout_s: float = STATE_TIMEOUT_S) -> list[Any]:
        """Call a method of every shard at once.

        Args:
            method: One that takes the coordinator's epoch.
            args: What it takes behind that.
            what: Names the wait in messages.
            timeout_s: Limit for all of them together.

        Raises:
            EpochError: If another coordinator has taken over; this one resigns.
        """
        return await self._call(self.handles, method, *args, what=what, timeout_s=timeout_s)

    async def first(self, method: str, *args: Any, what: str, timeout_s: float = STATE_TIMEOUT_S) -> Any:
        """Call a method of the first shard."""
        return (await self._call(self.handles[:1], method, *args, what=what, timeout_s=timeout_s))[0]

    async def in_turn(self, method: str, *args: Any, what: str) -> None:
        """Tell the first shard, then all others, so that the first one knows whatever any of them does."""
        await self._call(self.handles[:1], method, *args, what=what)
        await self._call(self.handles[1:], method, *args, what=what)

    async def some(self, indices: Sequence[int], method: str, *args: Any, what: str) -> list[Any]:
        """Call a method of some shards at once."""
        return await self._call([self.handles[index] for index in indices], method, *args, what=what)

    async def _call(
        self, handles: Sequence[Any], method: str, *args: Any, what: str, timeout_s: float = STATE_TIMEOUT_S
    ) -> list[Any]:
        calls = [getattr(shard, method).remote(self.epoch, *args) for shard in handles]
        try:
            return await gather(calls, timeout_s=timeout_s, what=what)
        except EpochError:
            self._resign()
            raise

    async def claim(self) -> list[ShardReport]:
        """Begin an epoch that is newer than any that a shard has heard of; what each of them tells.

        Raises:
            EpochError: If another coordinator claims one at the same time; this one resigns.
        """
        await self.await_restarts()
        calls = [shard.epoch.remote() for shard in self.handles]
        newest = max(await gather(calls, timeout_s=FORMING_TIMEOUT_S, what="the shards to tell their epoch"))
        self.epoch, self._num_formed = max(newest, self.epoch) + 1, 0
        reports = await self.begin_epoch()
        self.generation = common_generation(reports)
        return reports

    async def begin_epoch(self) -> list[ShardReport]:
        """Have the shards obey this coordinator, whose epoch is newer than any that they have heard of.

        Raises:
            EpochError: If it is not; this coordinator resigns.
        """
        calls = [shard.begin_epoch.remote(self.epoch) for shard in self.handles]
        try:
            return await gather(calls, timeout_s=STATE_TIMEOUT_S, what=f"the shards to begin epoch {self.epoch}")
        except EpochError:
            self._resign()
            raise

    async def statuses(self) -> list[ShardStatus]:
        """Every shard's status, after the same step; they end one at different moments.

        Raises:
            CheckpointRestoreNeededError: If one was restarted, or they have parted.
        """
        deadline = asyncio.get_running_loop().time() + FORMING_TIMEOUT_S
        while True:
            statuses = await self.statuses_now()
            whole = [status for status in statuses if status is not None]
            if len(whole) < len(statuses):
                raise CheckpointRestoreNeededError(
                    f"shard {statuses.index(None)} of {len(statuses)} was restarted and its state is gone; "
                    "restore the service from its last checkpoint with service.restore(URI)"
                )
            if len({(status.timeline, status.sequence) for status in whole}) == 1:
                return whole
            is_moving = any(status.in_flight for status in whole)
            if not is_moving or asyncio.get_running_loop().time() > deadline:
                raise CheckpointRestoreNeededError(
                    f"the shards are at different steps: {[status.sequence for status in whole]}; "
                    "restore the service from its last checkpoint with service.restore(URI)"
                )
            await asyncio.sleep(POLL_S)

    async def statuses_now(self) -> list[ShardStatus | None]:
        """Every shard's status as it is; None of one without a job."""
        calls = [shard.status.remote() for shard in self.handles]
        return await gather(calls, timeout_s=FORMING_TIMEOUT_S, what="the shards' status")

    async def form_group(self) -> None:
        """Form the next generation of the shards' group; steps that are under way fail."""
        self._num_formed += 1
        generation = Generation(self.epoch, self._num_formed)
        await self.all("join", generation, FORMING_TIMEOUT_S, self.handles, what="the shards to form their group")
        self.generation = generation

    async def lost(self, index: int) -> None:
        """Return when a shard's process has ended, or it is cut off from the others in a step."""
        await until_ended(self.handles[index].linger.remote())

    async def rebuild(self) -> tuple[list[int], list[int]]:
        """Have shards that were started again become what they were before.

        Returns:
            Those that were empty, and which of them are not any more: some keeper had what they had held.
        """
        empty = [index for index, status in enumerate(await self.statuses_now()) if status is None]
        answers = await self.some(empty, "rebuild", what="lost shards to be rebuilt")
        return empty, [index for index, is_back in zip(empty, answers, strict=True) if is_back]

    async def rest(self) -> list[Standing]:
        """Have all leave the group, in which nothing can be summed up any more; where each of them stands then.

        Raises:
            CheckpointRestoreNeededError: If they have parted.
        """
        standings: list[Standing] = await self.all("rest", what="the shards to come to rest")
        sequences = [standing.sequence for standing in standings]
        if max(sequences) - min(sequences) > 1:
            raise CheckpointRestoreNeededError(
                f"the shards are at steps {sequences}: what one has lost cannot be brought back"
            )
        return standings

    async def resume(self, standings: Sequence[Standing]) -> None:
        """Have all finish the step that was under way, in the group that was formed since."""
        known = known_sums(standings)
        await self.all("resume", known, what="the shards to go on")
        if any(standing.is_stepping and not known.get(standing.sequence + 1) for standing in standings):
            # One that a shard has lost before it was logged is voted down by all. If it was voted on there is no vote
            # to come, and who attended one would begin the next step with nobody.
            for shard in self.handles:
                shard.attend.remote(self.generation, 1)

    async def settle(self) -> ShardStatus:
        """Bring all shards to rest after the same step; they stay held."""
        for _ in range(HOLD_TRIES):
            target = max(await self._hold())
            timeout_s = self.config.worker_timeout_s
            statuses: list[ShardStatus] = await self.all(
                "settle", target, timeout_s, what="the shards to come to rest", timeout_s=timeout_s + FORMING_TIMEOUT_S
            )
            if len({status.sequence for status in statuses}) == 1:
                return statuses[0]
        raise ServiceError("the shards did not come to rest after the same step; try it again")

    async def stop(self) -> None:
        """Bring all shards to rest, whatever becomes of a step under way, but for a COMMIT; they stay held.

        A step that some have begun and others will not begin any more waits for them in its vote: it ends with the
        group. One that all have begun may be a COMMIT, and ends by itself.
        """
        sequences = await self._hold()
        if len(set(sequences)) == 1:
            timeout_s = self.config.worker_timeout_s + COLLECTIVE_MARGIN_S
            await self.all("end_step", timeout_s, what="the shards to end a step")
        if len(set(sequences)) > 1 or not await self.are_together():
            await self.all("rest", what="the shards to come to rest")
            await self.form_group()

    async def are_together(self) -> bool:
        """Whether all are in one group, and can use it."""
        generations = set(await self.all("generation", what="the shards' generation"))
        return len(generations) == 1 and NO_GENERATION not in generations

    async def release(self) -> None:
        """Let all go on with steps, and drop what they have prepared and not taken."""
        await self.all("release", what="the shards to go on")

    async def _hold(self) -> list[int]:
        return await self.all("hold", what="the shards to come to rest")

    async def await_restarts(self) -> None:
        """Wait for shards that are being started again."""
        what = "the shards to be started again"
        calls = (until_started(each, timeout_s=RESTART_TIMEOUT_S, what=what) for each in self.handles)
        await asyncio.gather(*calls)
