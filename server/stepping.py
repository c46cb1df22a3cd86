"""One step of a shard after the other: when it begins, what runs it, and who is told what became of it."""

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
)
from ..sharding.push import Push
from ..sharding.reports import Receipt, StepResult
from ..sharding.running import RunningStep
from ..sharding.shard import Shard
from ..sharding.vote import Decision
from .collective import NO_GENERATION, Collective, Generation, drive
from .countdown import Countdown
from .keeper_line import Received
from .meter import Tally
from .outcomes import Outcome, Outcomes
from .redundancy import Moment, Redundancy

logger = logging.getLogger("stepwell")

IDLE_S = 20.0
"""After so long without a step a copy is made, so that no gradients are kept for what may never come."""


class Stepping:
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

    async def read(self, work: Callable[[], Any]) -> Any:
        """Read slots in the thread for arithmetic, after what it is at.

        Raises:
            ShardLostError: If a step rests: they are as of before it, and somebody may know already that it was taken.
        """

        def read() -> Any:
            if self._running is not None:
                raise self._rests()
            return work()

        return await self.compute(read)

    def require_reached(self, sequence: int) -> None:
        """See that this shard is not behind who speaks of step ``sequence``, as it has come back and rests.

        Raises:
            ShardLostError: If it is.
        """
        if self._is_cut_off.is_set() and sequence > self.job().sequence + 1:
            raise self._rests()

    def _rests(self) -> ShardLostError:
        step = self.job().sequence + 1
        return ShardLostError(f"shard {self._index}: step {step} rests until lost shards are back")

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

    # Within

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
