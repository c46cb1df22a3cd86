"""A shard's steps, and what has to wait for one to end: who comes in between, and how a lost shard comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..sharding.errors import (
    CheckpointRestoreNeededError,
    IncarnationError,
    ServiceError,
    ServiceTimeoutError,
    TimelineError,
    UnknownRankError,
)
from ..sharding.recovery import Sums
from ..sharding.reports import ShardStatus
from ..sharding.running import RunningStep
from ..sharding.vote import Decision
from ..sharding.world import World
from .stepping import Stepping


class Steps(Stepping):
    """Steps that can be held, stopped and taken up again; see :class:`Stepping` for its arguments."""

    # Between two steps

    def hold(self) -> int:
        """Begin no step any more, nor again the one under way; returns the step to wait for, see :meth:`settle`."""
        self._held_after = 0 if self.shard is None else self.shard.sequence
        # Not one more than that: the other thread may have counted the step before its task has ended here.
        return self._sequence_of_step if self.is_stepping else self._held_after

    async def settle(self, sequence: int, timeout_s: float) -> ShardStatus:
        """Run steps up to ``sequence``, no further, and wait for them; returns where the shard stands then.

        A step that is given up counts as done.

        Raises:
            ServiceError: If the shard was released meanwhile.
        """
        self._held_after = sequence
        deadline = asyncio.get_running_loop().time() + timeout_s
        self._start_if_complete()
        while self.whole_job().sequence < sequence or self.is_stepping:
            left = deadline - asyncio.get_running_loop().time()
            outcome = await self._wait(self._outcomes.first, sequence, max(left, 0.001))
            if self._held_after != sequence:
                raise ServiceError(f"shard {self._index} was released before it had come to rest; try it again")
            if outcome.decision is Decision.ABORT:
                self._held_after = self.whole_job().sequence
                break
        return self.whole_job().status()

    async def end_step(self, timeout_s: float) -> None:
        """Wait until no step is under way, whatever comes of the one that is.

        Raises:
            ServiceTimeoutError: If it does not end in time.
        """
        await self._await_step(timeout_s)
        self._give_up_resting()

    def set_world(self, world: World) -> None:
        """Have the next step wait for other ranks: as long as ever, for those that are new in it."""
        shard = self.job()
        for rank in set(shard.world.ranks) - set(world.ranks):
            self.withdraw(rank, UnknownRankError(f"rank {rank} has left the job, and its push was dropped"))
        shard.set_world(world)
        self._patience.stop()
        if shard.is_waiting:
            self._patience.begin()

    def release(self) -> None:
        """Go on with steps after a :meth:`hold`."""
        self._held_after = None
        self._start_if_complete()

    async def await_load(self, timeout_s: float) -> None:
        """Wait for a load that is under way: what the shard answered meanwhile would be of neither state.

        Raises:
            ServiceTimeoutError: If it does not end in time.
        """
        try:
            await asyncio.wait_for(self._is_loaded.wait(), timeout_s)
        except TimeoutError:
            raise ServiceTimeoutError(
                f"shard {self._index}: a load or restore did not end within {timeout_s:g} s"
            ) from None

    async def load(self, load: Callable[[], None]) -> None:
        """Take a state; no step begins before it is there, and one that rests is given up for it."""
        self._is_loaded.clear()
        self._lost_for_good = None
        self._give_up_resting()
        try:
            await self.compute(load)
            self._lost_for_good = None
        finally:
            self._is_loaded.set()
            if self.shard is None or not self.shard.is_waiting:
                self.dismiss_pushes()
            self._start_if_complete()

    # Coming back after a shard was lost

    def rest_in(self, step: RunningStep) -> None:
        """Have a step under way, which a shard that was rebuilt has taken up to where it does not know the sums."""
        self._running = step
        self._is_cut_off.set()

    async def rest(self) -> None:
        """Leave the group, in which nothing is summed up any more; a step that is under way ends or rests."""
        if self.collective is not None:
            self.collective.close()
        self.collective = None  # for a step that begins now
        if self._step is not None:
            await asyncio.wait([self._step])

    def resume(self, known: Sums) -> None:
        """Go on with the step that rests, in the group that was formed anew.

        Args:
            known: What shards have had of its sums.
        """
        shard, running = self.job(), self._running
        if running is None:
            return
        sequence = shard.sequence + 1
        had = len(shard.standing().sums.get(sequence, ()))
        sums = known.get(sequence, ())[had:]
        self._num_votes += had == 0 and not sums
        self._begin_step(shard, sums)

    def give_up(self, why: CheckpointRestoreNeededError) -> None:
        """Give up a step that rests, as a shard is lost for good, and tell those who wait for it, or will."""
        self._lost_for_good = why
        self._give_up_resting()
        self._outcomes.dismiss(why)

    def _give_up_resting(self) -> None:
        self._is_cut_off.clear()
        if self._running is not None:
            self._running.close()
            self._running = None

    def dismiss_pushes(self) -> None:
        """Tell the senders of pushes that a new timeline has swept away."""
        self._patience.stop()
        self._outcomes.dismiss(
            TimelineError(
                "the service was restored or loaded before this step began. "
                "Call refresh() on every rank to take over its parameters and step number."
            )
        )

    # A process that takes a worker's place

    def dismiss_workers(self) -> list[int]:
        """Have the next step wait for others than those that were admitted so far; their ranks."""
        shard = self.job()
        ranks = list(shard.members.by_rank)
        for rank in ranks:
            self.withdraw(rank, IncarnationError(f"rank {rank}: the job's workers were dismissed; end this process"))
        shard.dismiss_workers()
        self._patience.stop()
        return ranks

    async def end_for_successor(self, timeout_s: float) -> None:
        """Wait for the step under way, which was begun with a process that another has replaced since.

        So what the successor is told of the state comes after that step. All shards vote now, as the process may have
        died before it had reached them all.

        Raises:
            ServiceTimeoutError: If it does not end in time.
            ShardLostError: If it rests until a lost shard is back.
        """
        if self._step is not None and not self._step.done():
            self._call_peers(self.generation, self._num_votes)
            await self._await_step(timeout_s)
        self.require_no_rest()

    def require_no_rest(self) -> None:
        """See that no step rests.

        Raises:
            ShardLostError: If one does, until a lost shard is back.
        """
        if self._is_cut_off.is_set():
            raise self._rests()

    # Within

    async def _await_step(self, timeout_s: float) -> None:
        if self._step is not None and not (await asyncio.wait([self._step], timeout=timeout_s))[0]:
            raise ServiceTimeoutError(f"shard {self._index}: a step did not end within {timeout_s:g} s")
