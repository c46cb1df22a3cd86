"""A shard's steps: when one begins, what runs it, and who is told what became of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from ..sharding.errors import (
    CheckpointRestoreNeededError,
    NotRegisteredError,
    ServiceError,
    ServiceTimeoutError,
    ShardLostError,
    StepwellError,
    TimelineError,
    UnknownRankError,
)
from ..sharding.push import Push
from ..sharding.recovery import Sums
from ..sharding.reports import Receipt, ShardStatus, StepResult
from ..sharding.running import RunningStep
from ..sharding.shard import Shard
from ..sharding.vote import Decision
from ..sharding.world import World
from .collective import NO_GENERATION, Collective, Generation, drive
from .countdown import Countdown
from .keeper_line import Received
from .meter import Tally
from .outcomes import Outcome, Outcomes
from .redundancy import Moment, Redundancy

logger = logging.getLogger("stepwell")

IDLE_S = 20.0
"""After so long without a step a copy is made, so that no gradients are kept for what may never come."""


class Steps:
    """Lives on a shard actor's event loop, which it never blocks; one thread of its own does the arithmetic.

    Args:
        index: The shard's index.
        timeout_s: How long a step waits for the last rank after the first.
        redundancy: What outlives the shard.

    Attributes:
        shard: The shard; None without a job.
        collective: The group that it reduces in; None before the first one was formed.
        newest_generation: The last one that it was asked to join.
        tally: What it has done.
    """

    def __init__(self, index: int, timeout_s: float, redundancy: Redundancy) -> None:
        self._index, self._timeout_s, self._redundancy = index, timeout_s, redundancy
        self.shard: Shard | None = None
        self.collective: Collective | None = None
        self.tally = Tally()
        self._peers: Sequence[Any] = ()
        self._data = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._step: asyncio.Task[None] | None = None
        self._running: RunningStep | None = None
        self._sequence_of_step = 0
        self._is_noting, self._is_loaded = False, asyncio.Event()
        self._is_loaded.set()
        self._idle: asyncio.TimerHandle | None = None
        self._resting: asyncio.Task[None] | None = None
        self._outcomes = Outcomes()
        self._patience = Countdown(timeout_s, self._give_up)
        self._held_after: int | None = None
        self._num_votes = 0
        self._attended: tuple[Generation, int] | None = None
        self.newest_generation = NO_GENERATION
        self._is_cut_off = asyncio.Event()
        self._lost_for_good: CheckpointRestoreNeededError | None = None

    @property
    def generation(self) -> Generation:
        """Of the group; :data:`NO_GENERATION` if there is none."""
        return NO_GENERATION if self.collective is None else self.collective.generation

    @property
    def usable_generation(self) -> Generation:
        """As :attr:`generation`, but :data:`NO_GENERATION` too if it was closed, or a step rests until the next one."""
        is_usable = self.collective is not None and self.collective.is_open and not self._is_cut_off.is_set()
        return self.generation if is_usable else NO_GENERATION

    @property
    def is_stepping(self) -> bool:
        """Whether a step is under way, or rests until the group is formed anew."""
        return self._running is not None or (self._step is not None and not self._step.done())

    def job(self) -> Shard:
        """The shard.

        Raises:
            NotRegisteredError: If it holds no job.
            ShardLostError: If it does not hold it yet, as its process was started again; or never will.
        """
        if self._lost_for_good is not None and (self.shard is None or not self.shard.is_whole):
            raise self._lost_for_good
        if self.shard is None and self._redundancy.may_come_back:
            raise ShardLostError(f"shard {self._index} was lost, and is being brought back")
        if self.shard is None:
            raise NotRegisteredError(
                f"shard {self._index} holds no job; it may have been restarted. "
                "Register the job, or restore its last checkpoint."
            )
        return self.shard

    def whole_job(self) -> Shard:
        """As :meth:`job`, for who reads slots: refuses if a step or a load was cut off in the middle of them."""
        shard = self.job()
        shard.require_whole()
        return shard

    def leave_group(self, generation: Generation, peers: Sequence[Any]) -> None:
        """Leave the group, if there is one; the next one is formed with ``peers``, handles of the other shards.

        Raises:
            ServiceError: If ``generation``, of the next one, is not newer than any that was asked for.
        """
        if generation <= self.newest_generation:
            raise ServiceError(f"expected a generation after {self.newest_generation}, got {generation}")
        self.newest_generation = generation
        if self.collective is not None:
            self.collective.close()
        self._num_votes, self._attended, self._peers = 0, None, peers

    def enter_group(self, collective: Collective) -> None:
        """Reduce in a group that was formed.

        Raises:
            ServiceError: If a newer one was asked for meanwhile.
        """
        if collective.generation != self.newest_generation:
            collective.close()
            raise ServiceError(f"generation {collective.generation} was given up for {self.newest_generation}")
        self.collective = collective

    async def until_cut_off(self) -> None:
        """Wait until a step rests, as the group has broken, whether or not a shard has died: until it goes on."""
        await self._is_cut_off.wait()

    async def compute(self, work: Callable[[], Any]) -> Any:
        """Do something in the thread for arithmetic, after what it is at."""
        return await asyncio.get_running_loop().run_in_executor(self._data, work)

    # One step

    async def take(self, push: Push, received: Received, timeout_s: float) -> StepResult:
        """Keep a push, start the step if it is complete, and wait for what comes of it.

        A repeat is told what the first one is; of a step that was taken before, at once.

        Args:
            push: The push.
            received: The same, as it came.
            timeout_s: How long to wait.

        Raises:
            RequestError: If the push is refused; nothing has changed.
            AttemptError, IncarnationError: Also if the step was taken with another push of this rank.
            ServiceTimeoutError: If the step was not decided in time.
            ShardLostError: If another shard was lost.
        """
        header, shard = push.header, self.job()
        receipt = shard.receive(push)
        self.tally.take(push)
        if receipt is Receipt.DECIDED:
            return await self._taken(push)
        self._redundancy.receive(header, received)
        outcome = self._outcomes.promise(header.rank, header.key)
        if receipt is Receipt.COMPLETE:
            self._start_if_complete()
        else:
            self._patience.begin()
        result = await self._wait(outcome, header.sequence, timeout_s)
        if result.decision is not Decision.ABORT:
            self.job().require_taken(header.rank, header.incarnation, header.attempt)
        return result

    async def _taken(self, push: Push) -> StepResult:
        """The result of the last step, for who repeats a push that it was taken with."""
        header, shard, sink = push.header, self.job(), push.sink
        result = shard.result(header.timeline, header.sequence)
        assert result is not None, "it was received as decided"
        if result.decision is Decision.COMMIT and sink is not None:
            await self.compute(lambda: shard.deliver(header.rank, sink))
        return result

    async def decided(self, timeline: int, sequence: int, timeout_s: float) -> StepResult | None:
        """The result of step ``sequence`` if it was taken; waits for one that is under way, for no other."""
        if self.is_stepping:
            await self._wait(self._outcomes.first, sequence, timeout_s)
        return self.job().result(timeline, sequence)

    def withdraw(self, rank: int, error: StepwellError) -> None:
        """Tell who waits with a rank's push that it is not held any more."""
        self._outcomes.withdraw(rank, error)

    def attend(self, generation: Generation, vote: int) -> None:
        """Vote on a step that another shard waits in, now or when this one is free; see :meth:`ShardActor.attend`."""
        self._attended = generation, vote
        self._start_if_complete()

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
            raise ShardLostError(f"shard {self._index}: step {self._sequence_of_step} rests until lost shards are back")

    # Rest

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

    async def copy_at_rest(self) -> None:
        """Have the keepers know the state as it is, unless they do or a step is under way; none begins meanwhile.

        A load that begins meanwhile waits for the thread, and finds the copy begun.
        """
        shard = self.shard
        if shard is None or not self._is_free(shard, though_held=True):
            return

        def note() -> Moment | None:
            return self._redundancy.moment_if_due(shard, at_rest=True) if shard.is_whole else None

        self._is_noting = True
        try:
            moment = await self.compute(note)
            if moment is not None:
                self._redundancy.begin_copy(shard, moment)
        finally:
            self._is_noting = False
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

    # Within

    async def _await_step(self, timeout_s: float) -> None:
        if self._step is not None and not (await asyncio.wait([self._step], timeout=timeout_s))[0]:
            raise ServiceTimeoutError(f"shard {self._index}: a step did not end within {timeout_s:g} s")

    async def _wait(self, outcome: asyncio.Future[Outcome], sequence: int, timeout_s: float) -> StepResult:
        try:
            result = await asyncio.wait_for(asyncio.shield(outcome), timeout_s)
        except TimeoutError as error:
            missing = self.job().missing_ranks
            raise ServiceTimeoutError(
                f"shard {self._index}: step {sequence} was not decided within {timeout_s:g} s; "
                f"missing ranks: {missing or 'none, the shards are still at it'}"
            ) from error
        if isinstance(result, StepwellError):
            raise result
        return result

    def _give_up(self) -> None:
        """Vote the step down if it still lacks a rank when its time is over."""
        shard = self.shard
        if shard is not None and shard.is_waiting:
            if self._is_free(shard):
                self._start(shard)
            else:
                self._patience.begin()

    def _start_if_complete(self) -> None:
        shard = self.shard
        if shard is not None and self._is_free(shard):
            is_complete = shard.is_waiting and shard.is_complete
            if is_complete or self._attended == (self.generation, self._num_votes + 1):
                self._start(shard)

    def _is_free(self, shard: Shard, *, though_held: bool = False) -> bool:
        is_held = self._held_after is not None and shard.sequence >= self._held_after
        is_busy = self.is_stepping or self._is_noting or not self._is_loaded.is_set()
        return not is_busy and (though_held or not is_held)

    def _start(self, shard: Shard) -> None:
        self._patience.stop()
        self._num_votes += 1
        pushes = shard.begin()
        self._begin_step(shard, before=lambda: self._redundancy.log(shard, pushes))

    def _begin_step(
        self, shard: Shard, sums: Sequence[Tensor] = (), *, before: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        told = self._outcomes.begin()
        self._is_cut_off.clear()
        self._sequence_of_step = shard.sequence + 1
        self._step = asyncio.get_running_loop().create_task(self._run_step(shard, told, sums, before))

    async def _run_step(
        self,
        shard: Shard,
        told: asyncio.Future[Outcome],
        sums: Sequence[Tensor],
        before: Callable[[], Awaitable[None]] | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        calling = loop.call_later(self._timeout_s, self._call_peers, self.generation, self._num_votes)
        outcome: Outcome = ServiceError(f"shard {self._index} failed in a step; its log has the traceback")
        try:
            if before is not None:
                await before()
            outcome, moment = await self.compute(lambda: self._advance(shard, sums))
            if moment is not None:
                self._redundancy.begin_copy(shard, moment)
        except ServiceError as error:
            logger.warning("shard %d: step %d was cut off: %s", self._index, self._sequence_of_step, error)
            outcome = error if self._redundancy.is_on else _with_advice(error)
            if self._running is not None:
                self._is_cut_off.set()
        finally:
            calling.cancel()
            told.set_result(outcome)
            self.tally.end(outcome, shard.stopwatch.seconds)
            self._await_rest()
            # The next step's pushes may have come in already.
            loop.call_soon(self._start_if_complete)

    def _await_rest(self) -> None:
        """Let the keepers have no gradients to hold when no step has come for a while."""
        if self._idle is not None:
            self._idle.cancel()
        if self._redundancy.is_on:
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._begin_rest)

    def _begin_rest(self) -> None:
        self._resting = asyncio.create_task(self.copy_at_rest())

    def _advance(self, shard: Shard, sums: Sequence[Tensor]) -> tuple[StepResult, Moment | None]:
        """Take the step under way to its end, with the sums that are known; in the thread for arithmetic.

        Where one does not come the step rests, if there is anything that could bring the lost shard back.
        """
        running = self._running or RunningStep(shard.step())
        self._running = running if self._redundancy.is_on else None
        try:
            for total in sums:
                running.take(total)
            result = drive(running, self.collective)
        except ShardLostError:
            if self._running is None:
                running.close()
            raise
        except BaseException:
            running.close()
            self._running = None
            raise
        self._running = None
        return result, self._redundancy.moment_if_due(shard)

    def _call_peers(self, generation: Generation, vote: int) -> None:
        for peer in self._peers:
            peer.attend.remote(generation, vote)


def _with_advice(error: ServiceError) -> ServiceError:
    """An error of shards that do not come back, with what to do."""
    if isinstance(error, ShardLostError):
        return CheckpointRestoreNeededError(
            f"{error}. Restore the service from its last checkpoint with service.restore(URI)"
        )
    return error
