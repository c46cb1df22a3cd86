"""The shard: the part of a job that one actor owns, as a plain object.

A shard knows nothing of Ray, sockets or threads. Whoever holds it hands in pushes and drives :meth:`Shard.step`, a
generator that yields each vector to be all-reduced and is sent the sum: one copy of the step's loop serves several
shards in one process and shards on many machines alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from ..optim import Combined, ReducingRule, StepInputs
from .clipping import ClipLimits, limits_of, norm_of
from .delivery import Delivery
from .errors import AttemptError
from .gradient import Gradient, assemble, average, is_surely_finite, limited
from .kernels import Apply
from .owned_state import OwnedState
from .push import Push, unpack_present
from .recovery import LoggedStep
from .reports import Receipt, StepResult
from .running import Reduction, RunningStep
from .vote import Decision, Vote, cast_vote, count_votes, missing_ranks, open_votes
from .world import World


class Shard(OwnedState):
    """One shard of one job, as it takes steps; see :class:`OwnedState` for its arguments."""

    def receive(self, push: Push) -> Receipt:
        """Check a push and keep it. Nothing but the inbox changes.

        Raises:
            RequestError: One of its subclasses, by what is off.
        """
        header = push.header
        self.require_sender(header)
        if header.sequence == self.sequence:
            self.require_taken(header.rank, header.incarnation, header.attempt)
            return Receipt.DECIDED
        if self._deciding is not None:
            held = {(push.header.rank, push.header.incarnation, push.header.attempt) for push in self._deciding}
            if (header.rank, header.incarnation, header.attempt) not in held:
                raise AttemptError(
                    f"step {header.sequence} is being decided without attempt {header.attempt}; ask for its result"
                )
            return Receipt.WAITING
        self.members.check_content(push, is_heard=self.world.is_heard(header.rank))
        if self._inbox.is_empty:
            self.stopwatch.restart()
        self._inbox.put(push)
        return Receipt.COMPLETE if self.is_complete else Receipt.WAITING

    def result(self, timeline: int, sequence: int) -> StepResult | None:
        """The result of step ``sequence``, or None while it is not decided; a step that was given up is not.

        Raises:
            SequenceError: If it is not the last step or the next one.
        """
        self.require_whole()
        return self.history.result(timeline, sequence)

    def require_taken(self, rank: int, incarnation: str, attempt: int) -> None:
        """Refuse whom the last step was taken without, as it was taken with another push of this rank.

        Raises:
            StaleRequestError: If this timeline had no step yet.
            IncarnationError: If another process has taken the rank's place.
            RankExcludedError: If the job goes on without this rank.
            AttemptError: If it was taken with another attempt.
        """
        taken = self.history.taken_with(rank)
        if taken is None or (taken.incarnation, taken.attempt) != (incarnation, attempt):
            self.members.require_incarnation(rank, incarnation)
            self.world.require(rank)
            raise self.history.taken_otherwise(rank)

    def begin(self) -> Sequence[Push]:
        """Take the pushes that the next step is decided on; what comes now is too late for it.

        For who receives pushes while :meth:`step` waits for its turn, which else does this itself. Must be followed by
        a step that is run until its first vector at least.

        Returns:
            The pushes.
        """
        pushes = self._inbox.take()
        self._begin_with(pushes)
        return pushes

    def _begin_with(self, pushes: list[Push]) -> None:
        self._deciding, self._sums = pushes, []
        self.stopwatch.lap("gather")
        # A successor with other holdings may be admitted meanwhile.
        self._senders = [self.members[push.header.rank] for push in pushes]

    def step(self) -> Reduction:
        """Run the next step: vote, local pass, reduction, apply pass.

        Call it when every rank is in, or to give the step up for want of a rank. Until the vote is a COMMIT no slot
        has moved; an exception thrown in before leaves the shard as it was.
        """
        if self._deciding is None:
            self.begin()
        self.stopwatch.lap("log")
        moving = False
        try:
            result, world, gradient, limits = yield from self._decide()
            pushes = self._deciding or []
            if result.decision is Decision.COMMIT:
                self._detach_snapshots(for_step=not any(push.reloaded for push in pushes))
                moving = True
                gradient = limited(gradient, limits.max_value, limits.coefficient(result.grad_norm), self.buffers)
                scalars = yield from self._commit(pushes, gradient)
                result = dataclasses.replace(result, scalars=scalars)
            if result.decision is not Decision.ABORT:
                self.world = world
                self.stopwatch.lap("apply")
                self.history.note(result, pushes, self._sums, self.stopwatch.seconds)
            moving = False
            return result
        finally:
            if moving:
                self._lost = f"shard {self._shard} was interrupted within step {self.sequence + 1}"
            self._deciding = None

    def _decide(self) -> Generator[Tensor, Tensor, tuple[StepResult, World, Gradient, ClipLimits]]:
        """Vote on the step; in an elastic job anew without the ranks that a shard lacks, until no shard lacks any.

        Returns:
            The decision, the ranks that the step is taken with, its gradient before limits, and the limits.
        """
        world = self.world
        while True:
            pushes = self._deciding or []
            missing = world.missing_from(push.header.rank for push in pushes)
            limits = ClipLimits() if missing else limits_of(pushes[0].header)
            gradient = () if missing else self._gradient(pushes)
            num_nonfinite, square_sums = self._look(pushes, gradient, limits)
            vote = cast_vote(
                self._shard,
                self._num_shards,
                timeline=self.timeline,
                sequence=self.sequence + 1,
                pushes=pushes,
                missing=missing,
                num_nonfinite=num_nonfinite + sum(push.header.found_inf for push in pushes),
                square_sums=square_sums,
            )
            total = yield from self._summed(vote)
            self.stopwatch.lap("vote")
            votes, sums = open_votes(total, self._num_shards)
            rest = world.without(missing_ranks(votes), step=self.sequence + 1)
            if rest == world:
                return self._result(votes, sums, limits, world), world, gradient, limits
            world = rest
            self._keep(world.ranks)

    def _keep(self, ranks: Sequence[int]) -> None:
        """Go on with the pushes of these ranks alone."""
        kept = [
            (push, sender)
            for push, sender in zip(self._deciding or [], self._senders, strict=True)
            if push.header.rank in ranks
        ]
        self._deciding, self._senders = [push for push, _ in kept], [sender for _, sender in kept]

    def _summed(self, vector: Tensor) -> Generator[Tensor, Tensor, Tensor]:
        """A vector's sum over all shards, which is kept for a shard that may not get it."""
        total = yield vector
        self._sums.append(total)
        return total

    def _look(self, pushes: Sequence[Push], gradient: Gradient, limits: ClipLimits) -> tuple[int, Tensor]:
        """How many tiles of the gradient hold inf or NaN, and with a limit its sums of squares; none of none."""
        table = self._tables.squares
        is_known = is_surely_finite([push.header for push in pushes], self.spec.gradients)
        if not gradient or (is_known and not limits.is_set):
            return 0, table.empty(1)[0]
        gradient = limited(gradient, limits.max_value, 1.0, self.buffers)
        return self._kernels.look(self.buffers, gradient, table, for_norm=limits.is_set)

    def _result(self, votes: Sequence[Vote], sums: Tensor, limits: ClipLimits, world: World) -> StepResult:
        """What the votes of all shards come to."""
        sequence = self.sequence + 1
        decision, error = count_votes(votes, sequence=sequence, world=world)
        if error is not None:
            return StepResult(sequence, decision, self.scalars, error)
        grad_norm = norm_of(sums, self._tables.squares) if limits.is_set else None
        if decision is Decision.COMMIT and grad_norm is not None and not math.isfinite(grad_norm):
            decision = Decision.SKIP
        return StepResult(sequence, decision, self.scalars, grad_norm=grad_norm, ranks=world.ranks)

    def _commit(self, pushes: Sequence[Push], gradient: Gradient) -> Generator[Tensor, Tensor, Mapping[str, float]]:
        """Move parameters and slots; the scalars after the step."""
        header, present = pushes[0].header, self._present(pushes).any(dim=0)
        heard = len(pushes) if self.spec.gradients == "sharded" else 1
        for push, sender in zip(pushes[:heard], self._senders, strict=False):
            for index, value in push.reloaded.items():
                offset = sender.reloaded_range(index, self.spec.params[index]).offset
                self.buffers.reload(index, value, never_stepped=bool(self.step_count[index] == 0), offset=offset)
        assert header.hyper is not None, "checked on receipt"
        step = self._tables.inputs(
            header.hyper,
            present=present,
            step_count=self.step_count + present,
            scalars=self.spec.rule.write_scalars(self.scalars, header.scalars or {}),
            key_state=self.buffers.key_state.values,
        )
        asked = [
            (push.sink, each.runs(push.sink.part))
            for push, each in zip(pushes, self._senders, strict=True)
            if push.sink
        ]
        delivery = Delivery(asked, self.buffers)
        combined, totals = yield from self._reduce(step, gradient, delivery)
        if combined.moves:
            if not self._is_one_pass:
                self._kernels.apply(self.buffers, gradient, self._second_pass(step, combined, totals, delivery))
            self.step_count = step.step_count
        self.scalars, self.buffers.key_state.values = combined.scalars, combined.key_state
        delivery.finish(is_begun=combined.moves)
        return self.scalars

    def _reduce(
        self, step: StepInputs, gradient: Gradient, delivery: Delivery
    ) -> Generator[Tensor, Tensor, tuple[Combined, Mapping[str, Tensor]]]:
        """The local pass and its reduction, if the rule has any; scalars and key state after the step."""
        rule, totals = self.spec.rule, dict[str, Tensor]()
        if isinstance(rule, ReducingRule):
            table, c = self._tables.sums, rule.local_coefficients(step)
            unmoved = Combined(step.scalars, key_state=step.key_state)
            then = self._second_pass(step, unmoved, totals, delivery) if self._is_one_pass else None
            partials = yield from self._summed(self._kernels.local(self.buffers, gradient, c, table, then))
            totals = table.totals(rule.sums, partials)
            self.stopwatch.lap("reduce")
        combined = rule.combine(step, totals)
        return dataclasses.replace(combined, key_state={**step.key_state, **combined.key_state}), totals

    @property
    def _is_one_pass(self) -> bool:
        return isinstance(self.spec.rule, ReducingRule) and self.spec.rule.is_one_pass

    def _second_pass(
        self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor], delivery: Delivery
    ) -> Apply:
        rule = self.spec.rule
        return Apply(
            rule.apply_coefficients(step, after, totals),
            rule.channel_coefficients(step, after, totals),
            self._tables.keys,
            delivery.direct,
        )

    def _gradient(self, pushes: Sequence[Push]) -> Gradient:
        """The step's gradient, before limits."""
        present = self._present(pushes)
        if self.spec.gradients == "local":
            gradient = average(pushes, present, self.buffers)
        else:
            gradient = assemble(pushes, present, self.buffers, [sender.pushed for sender in self._senders])
        return self._kernels.prepare(gradient, self.buffers)

    def _present(self, pushes: Sequence[Push]) -> Tensor:
        """Which tensors each rank has a gradient of, ``(ranks, num_tensors)`` bool."""
        return torch.stack([unpack_present(push.header.present, len(self.spec.params)) for push in pushes])

    def replay(self, logged: LoggedStep) -> RunningStep:
        """Take a step again, up to the first sum that the log does not know.

        The log has it from a shard that had checked its pushes; their senders may have been replaced since.
        """
        self.stopwatch.restart()
        self._begin_with([dataclasses.replace(push, sink=None) for push in logged.pushes])
        running = RunningStep(self.step())
        for total in logged.sums:
            running.take(total)
        return running
