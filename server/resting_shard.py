"""A shard between two steps, or within one that rests: how it is held, and how it comes back after it was lost."""

from __future__ import annotations

import functools

import ray

from ..sharding.compiling import (
    require_same_kernels,
)
from ..sharding.errors import CheckpointRestoreNeededError
from ..sharding.recovery import Standing, Sums
from ..sharding.reports import ShardStatus
from ..sharding.shard import Shard
from .arrangement import Arrangement
from .config import COLLECTIVE_MARGIN_S
from .coordinated_shard import CoordinatedShard
from .epochs import change_of_coordinator, of_coordinator
from .messages import unpack_job
from .redundancy import rebuild


class RestingShard(CoordinatedShard):
    """A coordinated shard that comes to rest when it is told to; see :class:`CoordinatedShard` for its arguments."""

    # Coming back; called by the coordinator. See Note: What survives a shard

    async def linger(self) -> None:
        """Answer when this shard is cut off from the others; who waits is also told when the shard's process ends."""
        await self._steps.until_cut_off()

    async def node(self) -> str:
        """Ray's id of the node that this shard is on."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @change_of_coordinator
    async def keep_with(self, arrangement: Arrangement) -> None:
        """Be told which keepers are to keep this shard; those that have no copy of it get one."""
        self._redundancy.arrange(arrangement)
        await self._steps.copy_at_rest()

    @change_of_coordinator
    async def rebuild(self) -> bool:
        """Become what the process before this one was; whether any keeper knows.

        Raises:
            KernelError: If it would go on with other bits, on a machine of another kind.
        """
        found = await self._redundancy.fetch()
        if not found:
            return False
        line, most = found[0]
        kept, segment = most.copy, await line.segment(most.copy.memory)

        def rebuild_from() -> Shard:
            shard = self._laid_out(unpack_job(kept.job), kept.code, timeline=kept.status.timeline - 1)
            whose = f"shard {self._index}, started again,"
            require_same_kernels(kept.status.kernel_identity, shard.status().kernel_identity, whose=whose)
            rebuild(shard, kept, segment)
            return shard

        shard, running = await self._steps.compute(rebuild_from), None
        async for logged in self._redundancy.steps(line, most):
            running = await self._steps.compute(functools.partial(shard.replay, logged))
        self._steps.shard = shard
        self._changes.recall(kept.requests)
        if running is not None and running.result is None:
            self._steps.rest_in(running)
        self._redundancy.come_back(found)
        return True

    @of_coordinator
    async def rest(self) -> Standing | None:
        """See :meth:`Steps.rest`; where the shard stands then, if it has a job."""
        await self._steps.rest()
        return None if self._steps.shard is None else self._steps.shard.standing()

    @of_coordinator
    async def give_up(self, why: CheckpointRestoreNeededError) -> None:
        """See :meth:`Steps.give_up`."""
        self._steps.give_up(why)

    @of_coordinator
    async def resume(self, known: Sums) -> None:
        """See :meth:`Steps.resume`."""
        self._steps.resume(known)

    # Workers that are gone; called by the coordinator. See Note: Elastic jobs

    @of_coordinator
    async def require_whole(self) -> None:
        """See that there is a state to go on with.

        Raises:
            ShardLostError: If this shard is being brought back, or a step rests until another one is.
            NotRegisteredError, CheckpointRestoreNeededError: If there is none.
        """
        self._steps.require_no_rest()
        self._steps.whole_job()

    @change_of_coordinator
    async def dismiss(self) -> None:
        """Note that all workers are gone, without a goodbye. A step that they had begun ends first.

        Raises:
            ShardLostError: As :meth:`require_whole`.
        """
        self._steps.require_no_rest()
        for rank in self._steps.dismiss_workers():
            self._mappings.forget(rank)
            self._ahead.forget(rank)
        await self._steps.end_for_successor(self._config.worker_timeout_s + COLLECTIVE_MARGIN_S)
        await self._redundancy.admit(self._steps.job())
        await self._steps.copy_at_rest()

    # Between two steps; called by the coordinator

    @of_coordinator
    async def hold(self) -> int:
        """See :meth:`Steps.hold`."""
        return self._steps.hold()

    @of_coordinator
    async def settle(self, sequence: int, timeout_s: float) -> ShardStatus:
        """See :meth:`Steps.settle`."""
        return await self._steps.settle(sequence, timeout_s)

    @of_coordinator
    async def end_step(self, timeout_s: float) -> None:
        """See :meth:`Steps.end_step`."""
        await self._steps.end_step(timeout_s)

    @of_coordinator
    async def release(self) -> None:
        """Go on with steps, see :meth:`Steps.release`; what was prepared and not taken is dropped."""
        self._changes.drop()
        self._steps.release()
