"""The coordinator's part of a standby: spares take the places of lost shards.

See *Note: A standby* in docs/design.md.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from ..sharding.errors import ServiceTimeoutError, ShardLostError, StepwellError
from ..sharding.job import JobSpec
from .calls import gather
from .seat import Claim
from .shards import POLL_S, STATE_TIMEOUT_S, Shards

logger = logging.getLogger("stepwell")

CLAIM_TIMEOUT_S = 5.0
LOOK_AGAIN_S, TRY_AGAIN_S = 1.0, 5.0


class ActorState(enum.Enum):
    """An actor as Ray sees it: it runs, is started for the first time, or has lost its process."""

    RUNS = enum.auto()
    STARTS = enum.auto()
    LOST = enum.auto()


States = Callable[[Sequence[Any]], Awaitable[list[ActorState]]]


async def take_seats(shards: Shards, states: States) -> list[int]:
    """Have spares be the shards that are lost, as far as there are spares.

    Only what Ray itself does not take for alive is replaced, or what says that it is no shard any more.

    Args:
        shards: The shards, which have other handles then.
        states: Tells how actors are.

    Returns:
        The shards that do not run even so; or that have not said yet that they do.
    """
    num_shards, seats = len(shards.handles), [*shards.handles, *shards.spares]
    found = await states(seats)
    not_running = [index for index, state in enumerate(found[:num_shards]) if state is not ActorState.RUNS]
    if not shards.config.standby or ActorState.STARTS in found[:num_shards]:
        return not_running
    running = [seat for seat, state in zip(seats, found, strict=True) if state is ActorState.RUNS]
    claims = dict(zip(running, await asyncio.gather(*map(_claim, running)), strict=True))
    holders = _holders(claims)
    missing = [index for index in range(num_shards) if index not in holders]
    if None not in claims.values():  # else who has not answered may be one that is taken for missing
        holders |= await _fill(shards, missing, claims)
    left = [seat for seat in seats if seat not in holders.values()]
    empty = [index for index in missing if index not in holders]
    for index in empty:
        own = shards.handles[index]
        holders[index] = left.pop(left.index(own) if own in left else 0)
    shards.handles, shards.spares = [holders[index] for index in range(num_shards)], left
    return empty


async def _claim(seat: Any) -> Claim | None:
    """What a seat says of itself; None if it does not answer."""
    try:
        claims: list[Claim] = await gather([seat.claim.remote()], timeout_s=CLAIM_TIMEOUT_S, what="a seat")
    except (ShardLostError, ServiceTimeoutError):
        return None
    return claims[0]


def _holders(claims: Mapping[Any, Claim | None]) -> dict[int, Any]:
    """Who is which shard. Of two that an old coordinator and a new one have told the same, the new one's."""
    seated = [(seat, claim) for seat, claim in claims.items() if claim is not None and claim.shard is not None]
    return {claim.shard: seat for seat, claim in sorted(seated, key=lambda of: of[1].epoch) if claim.shard is not None}


async def _fill(shards: Shards, missing: Sequence[int], claims: Mapping[Any, Claim | None]) -> dict[int, Any]:
    """Have free seats be the shards that are missing; which are now which. Those with kernels come first."""
    free = {seat: claim for seat, claim in claims.items() if claim is not None and claim.shard is None}
    filled = dict[int, Any]()
    for index in missing[: len(free)]:
        own = shards.handles[index]
        seat = min(free, key=lambda seat: (not free[seat].is_warm, seat != own))
        del free[seat]
        try:
            await gather([seat.become.remote(index)], timeout_s=CLAIM_TIMEOUT_S, what=f"a spare to be shard {index}")
        except (ShardLostError, ServiceTimeoutError) as error:
            logger.warning("service %r: a spare is not shard %d: %s", shards.config.name, index, error)
        else:
            filled[index] = seat
    return filled


class Standby:
    """Keeps the spares ready. Lives on the coordinator's event loop.

    Args:
        shards: The shards, and their spares.
        states: Tells how actors are.
        spec: The job, if there is one.
    """

    def __init__(self, shards: Shards, states: States, spec: Callable[[], JobSpec | None]) -> None:
        self._shards, self._states, self._spec = shards, states, spec
        self._warmed: dict[str, JobSpec] = {}
        self._task: asyncio.Task[None] | None = None
        self._seated: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Have spares load the job's kernels from now on, and those that are started later."""
        if self._shards.config.standby and self._task is None:
            self._task = asyncio.create_task(self._watch())

    async def num_ready(self) -> int:
        """How many spares could be a shard at once."""
        claims, spec = await self._spares(), self._spec()
        return sum(spec is None or self._warmed.get(claim.incarnation) == spec for claim in claims.values())

    async def until_seated(self) -> None:
        """Wait until Ray knows of no shard that is lost, or no spare comes in time.

        Who has just lost a shard, and asks where it is now, would else be told of the lost one.
        """
        if self._shards.config.standby:
            if self._seated is None or self._seated.done():
                self._seated = asyncio.create_task(self._until_seated())
            await asyncio.shield(self._seated)

    async def _until_seated(self) -> None:
        deadline = asyncio.get_running_loop().time() + self._shards.config.placement_timeout_s
        while ActorState.LOST in await self._states(self._shards.handles):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(POLL_S)

    async def _watch(self) -> None:
        while True:
            try:
                await self._warm()
            except (StepwellError, RayError) as error:
                logger.warning("service %r: a spare is not ready yet: %s", self._shards.config.name, error)
                await asyncio.sleep(TRY_AGAIN_S)
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _warm(self) -> None:
        """Have spares load the kernels of the job as it is now, where they have not."""
        claims, spec = await self._spares(), self._spec()
        here = {claim.incarnation for claim in claims.values()}
        self._warmed = {incarnation: of for incarnation, of in self._warmed.items() if incarnation in here}
        cold = {seat: claim for seat, claim in claims.items() if self._warmed.get(claim.incarnation) != spec}
        if spec is None or not cold:
            return
        kernels = await self._shards.first("kernels", what="shard 0 to tell its kernels")
        for seat, claim in cold.items():
            await gather([seat.warm.remote(*kernels)], timeout_s=STATE_TIMEOUT_S, what="a spare to load kernels")
            self._warmed[claim.incarnation] = spec

    async def _spares(self) -> dict[Any, Claim]:
        """Those that run and are no shard."""
        spares = list(self._shards.spares)
        running = [
            seat for seat, state in zip(spares, await self._states(spares), strict=True) if state is ActorState.RUNS
        ]
        claims = zip(running, await asyncio.gather(*map(_claim, running)), strict=True)
        return {seat: claim for seat, claim in claims if claim is not None and claim.shard is None}
