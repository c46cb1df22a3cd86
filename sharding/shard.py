"""The shard: the part of a job that one actor owns, as a plain object.

A shard knows nothing of Ray, sockets or threads. Whoever holds it hands in pushes and drives :meth:`Shard.step`, a
generator that yields each vector to be all-reduced and is sent the sum: one copy of the step's loop serves several
shards in one process and shards on many machines alike.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from ..optim import Combined, ReducingRule, StepInputs
from .averaging import average, count_nonfinite
from .buffers import MASTER, Buffers, StateSource
from .errors import (
    AttemptError,
    FutureRequestError,
    HyperparameterError,
    IncarnationError,
    MessageError,
    NotRegisteredError,
    StaleRequestError,
    StepAbortedError,
    TimelineError,
    UnknownRankError,
)
from .job import JobSpec, kernel_identity
from .kernels import run_apply, run_local
from .partials import sum_table
from .push import Inbox, Push, PushHeader, check_gradient, check_hyper, unpack_present
from .vote import Decision, cast_vote, count_votes


class Receipt(enum.Enum):
    """What became of a push."""

    WAITING = "waiting"
    """Kept; other ranks are missing, or the step is being decided."""
    COMPLETE = "complete"
    """Kept, and every rank is in: the step can run."""
    DECIDED = "decided"
    """A repeat: this step was decided before. Nothing has changed."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a worker is told of a step.

    Attributes:
        sequence: The step's sequence number.
        decision: COMMIT, SKIP or ABORT.
        scalars: The rule's scalars after it.
        error: With ABORT: what happened.
    """

    sequence: int
    decision: Decision
    scalars: Mapping[str, float]
    error: StepAbortedError | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ShardStatus:
    """A shard's state in numbers. ``size_bytes`` counts buffers alone."""

    shard: int
    timeline: int
    sequence: int
    step: int
    skipped_steps: int
    size_bytes: int
    kernel_identity: str
    scalars: Mapping[str, float]
    step_counts: tuple[int, ...]
    in_flight: bool


Reduction = Generator[Tensor, Tensor, StepResult]
"""Yields a vector, is sent its sum over all shards, returns the result."""


class Shard:
    """One shard of one job.

    Args:
        spec: The job.
        shard: This shard's index.
        num_shards: How many shards there are.
        device: Where its buffers live and its kernels run.
        timeline: The history that begins with this object.
    """

    def __init__(
        self,
        spec: JobSpec,
        *,
        shard: int = 0,
        num_shards: int = 1,
        device: torch.device | None = None,
        timeline: int = 0,
    ) -> None:
        self.spec = spec
        self.layout = spec.layout()
        self.device = device or torch.device("cpu")
        self._keys = spec.keys()
        self.buffers = Buffers(
            self.layout, spec.rule, keys=self._keys, shard=shard, num_shards=num_shards, device=self.device
        )
        self.scalars: Mapping[str, float] = spec.rule.initial_scalars(spec.num_groups)
        self.step_count = torch.zeros(len(spec.params), dtype=torch.float64)
        self.timeline, self.sequence, self.num_steps, self.num_skipped = timeline, 0, 0, 0
        self._shard, self._num_shards = shard, num_shards
        self._group_of_tensor = self.layout.group_of_tensor()
        self._numel = torch.tensor([param.numel for param in spec.params], dtype=torch.float64)
        self._decays = torch.tensor([param.decays for param in spec.params], dtype=torch.bool)
        self._table = sum_table(self.layout, spec.rule, keys=self._keys, num_groups=spec.num_groups)
        self._hyper_names = sorted(spec.rule.hyper(spec.rule.defaults()))
        self._incarnations: dict[int, str] = {}
        self._inbox = Inbox(spec.world_size)
        self._deciding: list[Push] | None = None
        self._last_result: StepResult | None = None
        self._taken: dict[int, PushHeader] = {}
        self._lost: str | None = f"shard {shard} has no parameters yet"

    # What others may ask at any time

    @property
    def missing_ranks(self) -> list[int]:
        """Ranks whose push for the next step has not come."""
        return self._inbox.missing

    @property
    def is_waiting(self) -> bool:
        """Whether some rank has pushed and the step has not begun."""
        return self._deciding is None and not self._inbox.is_empty

    def status(self) -> ShardStatus:
        """The shard's state in numbers."""
        return ShardStatus(
            shard=self._shard,
            timeline=self.timeline,
            sequence=self.sequence,
            step=self.num_steps,
            skipped_steps=self.num_skipped,
            size_bytes=self.buffers.size_bytes,
            kernel_identity=kernel_identity(self.device),
            scalars=self.scalars,
            step_counts=tuple(int(count) for count in self.step_count.tolist()),
            in_flight=self._deciding is not None,
        )

    def parameters(self, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """The owned parameters, flat, per extent, in the wanted dtype; a float32 one may be the master itself."""
        masters = (extent.slots[MASTER.name].view(-1) for extent in self.buffers.extents)
        return [master.to(dtype) for master, dtype in zip(masters, dtypes, strict=True)]

    # What changes it between steps

    def admit(self, rank: int, incarnation: str) -> None:
        """Let a worker's process push as ``rank``; an earlier one no longer may, and what it pushed is dropped."""
        self._require_rank(rank)
        if self._incarnations.get(rank) != incarnation:
            self._inbox.drop(rank)
        self._incarnations[rank] = incarnation

    def load(self, source: StateSource, *, timeline: int) -> None:
        """Take a whole state and begin a new timeline. Called between steps, on all shards with the same source.

        Raises:
            TimelineError: If ``timeline`` is not newer than the present one.
            StepAbortedError: If a step is being decided.
        """
        if self._lost is None and timeline <= self.timeline:
            raise TimelineError(f"expected a timeline after {self.timeline}, got {timeline}")
        if self._deciding is not None:
            raise StepAbortedError(f"step {self.sequence + 1} is being decided; load when it is done")
        self._lost = f"shard {self._shard} was interrupted while it loaded a state"
        self.buffers.load(source)
        counts = [source.step_counts.get(index, 0) for index in range(len(self.spec.params))]
        self.step_count = torch.tensor(counts, dtype=torch.float64)
        self.scalars = {**self.spec.rule.initial_scalars(self.spec.num_groups), **source.scalars}
        self.timeline, self.sequence = timeline, source.sequence
        self.num_steps, self.num_skipped = source.step, source.skipped_steps
        self._inbox, self._last_result, self._lost = Inbox(self.spec.world_size), None, None
        self._taken = {}

    def set_world_size(self, world_size: int) -> None:
        """Change the number of workers, between two jobs' workers; those admitted so far are forgotten."""
        self.spec = dataclasses.replace(self.spec, world_size=world_size)
        self._incarnations, self._inbox = {}, Inbox(world_size)

    # One step

    def receive(self, push: Push) -> Receipt:
        """Check a push and keep it. Nothing but the inbox changes.

        Raises:
            RequestError: One of its subclasses, by what is off.
        """
        header = push.header
        self._require_sender(header)
        if header.sequence == self.sequence:
            self._require_taken(header)
            return Receipt.DECIDED
        if self._deciding is not None:
            held = {(push.header.rank, push.header.incarnation, push.header.attempt) for push in self._deciding}
            if (header.rank, header.incarnation, header.attempt) not in held:
                raise AttemptError(
                    f"step {header.sequence} is being decided without attempt {header.attempt}; ask for its result"
                )
            return Receipt.WAITING
        self._require_content(push)
        self._inbox.put(push)
        return Receipt.WAITING if self._inbox.missing else Receipt.COMPLETE

    def result(self, timeline: int, sequence: int) -> StepResult | None:
        """The result of step ``sequence``, or None while it is not decided; a step that was given up is not.

        Raises:
            SequenceError: If it is not the last step or the next one.
        """
        self._require_sequence(timeline, sequence)
        if self._last_result is not None and self._last_result.sequence == sequence:
            return self._last_result
        return None

    def step(self) -> Reduction:
        """Run the next step: vote, local pass, reduction, apply pass.

        Call it when every rank is in, or to give the step up for want of a rank. Until the vote is a COMMIT no slot
        has moved; an exception thrown in before leaves the shard as it was.
        """
        missing, pushes = self._inbox.missing, self._inbox.take()
        self._deciding = pushes
        moving = False
        try:
            grads = [] if missing else average(pushes, self._present(pushes), self.buffers)
            votes = yield cast_vote(
                self._shard,
                self._num_shards,
                timeline=self.timeline,
                sequence=self.sequence + 1,
                pushes=pushes,
                missing=missing,
                num_nonfinite=count_nonfinite(grads),
            )
            result = self._decide(votes)
            if result.decision is Decision.COMMIT:
                moving = True
                result = yield from self._commit(pushes, grads)
            self._finish(result)
            moving = False
            return result
        finally:
            if moving:
                self._lost = f"shard {self._shard} was interrupted within step {self.sequence + 1}"
            self._deciding = None

    def _decide(self, votes: Tensor) -> StepResult:
        sequence = self.sequence + 1
        decision, error = count_votes(votes, sequence=sequence, world_size=self.spec.world_size)
        return StepResult(sequence, decision, self.scalars, error)

    def _commit(self, pushes: Sequence[Push], grads: Sequence[Tensor]) -> Reduction:
        header, present = pushes[0].header, self._present(pushes).any(dim=0)
        for index, value in pushes[0].reloaded.items():
            self.buffers.reload(index, value, never_stepped=bool(self.step_count[index] == 0))
        assert header.hyper is not None, "checked on receipt"
        step = StepInputs(
            hyper={name: torch.tensor(values, dtype=torch.float64) for name, values in header.hyper.items()},
            group_of_tensor=self._group_of_tensor,
            present=present,
            step_count=self.step_count + present,
            scalars=self.spec.rule.write_scalars(self.scalars, header.scalars or {}),
            numel=self._numel,
            decays=self._decays,
            channels=self._keys.channels,
            key_state=self.buffers.key_state.values,
        )
        combined, totals = yield from self._reduce(step, grads)
        rule = self.spec.rule
        if combined.moves:
            if not (isinstance(rule, ReducingRule) and rule.is_one_pass):
                per_tensor = rule.apply_coefficients(step, combined, totals)
                per_channel = rule.channel_coefficients(step, combined, totals)
                run_apply(rule, self.buffers, grads, per_tensor, per_channel, self._keys)
            self.step_count = step.step_count
        self.scalars, self.buffers.key_state.values = combined.scalars, combined.key_state
        return StepResult(self.sequence + 1, Decision.COMMIT, self.scalars)

    def _reduce(
        self, step: StepInputs, grads: Sequence[Tensor]
    ) -> Generator[Tensor, Tensor, tuple[Combined, Mapping[str, Tensor]]]:
        """The local pass and its reduction, if the rule has any; scalars and key state after the step."""
        rule, totals = self.spec.rule, dict[str, Tensor]()
        if isinstance(rule, ReducingRule):
            partials = yield run_local(rule, self.buffers, grads, rule.local_coefficients(step), self._table)
            totals = self._table.totals(rule.sums, partials)
        combined = rule.combine(step, totals)
        return dataclasses.replace(combined, key_state={**step.key_state, **combined.key_state}), totals

    def _present(self, pushes: Sequence[Push]) -> Tensor:
        """Which tensors each rank has a gradient of, ``(world_size, num_tensors)`` bool."""
        return torch.stack([unpack_present(push.header.present, len(self.spec.params)) for push in pushes])

    def _finish(self, result: StepResult) -> None:
        if result.decision is not Decision.ABORT:
            self._last_result = result
            self._taken = {push.header.rank: push.header for push in self._deciding or []}
            self.sequence += 1
            self.num_steps += 1
            self.num_skipped += result.decision is Decision.SKIP

    # Checks

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self.spec.world_size:
            raise UnknownRankError(f"expected a rank from 0 to {self.spec.world_size - 1}, got {rank}")

    def require_whole(self) -> None:
        """See that the shard holds a state that can be trusted, before it is read or saved.

        Raises:
            NotRegisteredError: If it has none yet, or was interrupted within a step or a load.
        """
        if self._lost is not None:
            raise NotRegisteredError(f"{self._lost}; register the job, or restore its last checkpoint")

    def _require_sequence(self, timeline: int, sequence: int) -> None:
        self.require_whole()
        if timeline != self.timeline:
            raise TimelineError(
                f"the service is on timeline {self.timeline} since it was restored or loaded, the request on "
                f"{timeline}. "
                "Call refresh() on every rank to take over its parameters and step number."
            )
        if sequence < self.sequence:
            raise StaleRequestError(f"expected step {self.sequence + 1}, got {sequence}, which is long decided")
        if sequence > self.sequence + 1:
            raise FutureRequestError(f"expected step {self.sequence + 1}, got {sequence}: a step before it is missing")

    def _require_sender(self, header: PushHeader) -> None:
        self._require_rank(header.rank)
        self._require_sequence(header.timeline, header.sequence)
        known = self._incarnations.get(header.rank)
        if known != header.incarnation:
            raise IncarnationError(
                f"rank {header.rank}: expected a push of process {known}, got one of {header.incarnation}; "
                "another process has registered as this rank since"
            )

    def _require_taken(self, header: PushHeader) -> None:
        """Refuse a new push for a step that was taken with another one; a repeat of that one is fine."""
        if self._last_result is None:
            raise StaleRequestError(
                f"expected step {self.sequence + 1}, got {header.sequence}, "
                "which was decided before this timeline began"
            )
        taken = self._taken.get(header.rank)
        if taken is not None and (taken.incarnation, taken.attempt) != (header.incarnation, header.attempt):
            raise AttemptError(
                f"step {header.sequence} was taken with an earlier push of rank {header.rank} (attempt {taken.attempt} "
                f"of process {taken.incarnation}); call step() again, which takes its result over and goes on after it"
            )

    def _require_content(self, push: Push) -> None:
        header = push.header
        check_hyper(header, self._hyper_names, self.spec.num_groups)
        unpack_present(header.present, len(self.spec.params))
        check_gradient(push.gradient, [extent.numel for extent in self.buffers.extents], header.rank)
        for extent, part in zip(self.buffers.extents, push.gradient, strict=True):
            if not extent.padding_is_zero(part):
                raise MessageError(
                    f"gradient of rank {header.rank}: expected zeros between tensors; the layout is not the shard's"
                )
        if header.rank != 0 and (header.scalars or push.reloaded):
            raise MessageError(
                f"scalars and reloaded parameters: expected from rank 0 alone, got some from rank {header.rank}"
            )
        try:
            self.spec.rule.check_scalars(header.scalars or {}, self.spec.num_groups)
        except ValueError as error:
            raise HyperparameterError(str(error)) from error
        for index, value in push.reloaded.items():
            if not 0 <= index < len(self.spec.params) or value.shape != (self.spec.params[index].numel,):
                raise MessageError(f"reloaded: parameter {index} of shape {list(value.shape)} is not one of the job's")
            if not bool(torch.isfinite(value).all()):
                raise MessageError(
                    f"reloaded: parameter {index} was changed by hand and holds inf or NaN; mend it first"
                )
