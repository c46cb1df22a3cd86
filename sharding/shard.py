"""The shard: the part of a job that one actor owns, as a plain object.

A shard knows nothing of Ray, sockets or threads. Whoever holds it hands in pushes and drives :meth:`Shard.step`, a
generator that yields each vector to be all-reduced and is sent the sum: one copy of the step's loop serves several
shards in one process and shards on many machines alike.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from ..optim import Combined, ReducingRule, StepInputs
from .buffers import MASTER, Buffers, StateSource
from .clipping import ClipLimits, limits_of, norm_of
from .compiling import kernel_identity
from .coverage import Gradients, Holdings, Part, packed
from .delivery import Delivery, Sink
from .errors import (
    AttemptError,
    NotRegisteredError,
    StepAbortedError,
    TimelineError,
)
from .gradient import Gradient, assemble, average, is_surely_finite, limited
from .history import History
from .job import JobSpec
from .kernels import Apply, Kernels
from .layout import Layout
from .members import Member, Members
from .push import Inbox, Push, PushHeader, unpack_present
from .recovery import LoggedStep, Standing
from .reports import Receipt, ShardStatus, StepResult
from .running import Reduction, RunningStep
from .snapshot import Snapshot
from .tables import Tables
from .vote import Decision, cast_vote, count_votes, open_votes


@dataclasses.dataclass(frozen=True, slots=True)
class Replicated:
    """What is not a shard's part of the state, nor in numbers in its :class:`ShardStatus`.

    Attributes:
        history: Its history.
        key_state: The whole model's; steps replace it and never write it.
    """

    history: History
    key_state: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Extension:
    """Parameters that are ready to be taken into the job: its new form, and the added extents' memory."""

    spec: JobSpec
    layout: Layout
    buffers: Buffers


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
        self.device = device or torch.device("cpu")
        self._shard, self._num_shards = shard, num_shards
        layout = spec.layout()
        self._lay_out(spec, layout, self._allocate(spec, layout))
        self.scalars: Mapping[str, float] = spec.rule.initial_scalars(spec.num_groups)
        self.step_count = torch.zeros(len(spec.params), dtype=torch.float64)
        self.history = History(timeline)
        self._extension: Extension | None = None
        self._snapshots: list[Snapshot] = []
        self._inbox = Inbox(spec.world_size)
        self._deciding: list[Push] | None = None
        self._senders: list[Member] = []
        self._sums: list[Tensor] = []
        self._lost: str | None = f"shard {shard} has no parameters yet"

    def _allocate(self, spec: JobSpec, layout: Layout) -> Buffers:
        """Memory for the owned tiles of ``layout``, all of the job's or what is added to it."""
        return Buffers(
            layout, spec.rule, keys=spec.keys(), shard=self._shard, num_shards=self._num_shards, device=self.device
        )

    def _lay_out(self, spec: JobSpec, layout: Layout, buffers: Buffers) -> None:
        """Take the parameters of ``spec`` for this shard's, with all that follows from them."""
        self.spec, self.layout, self.buffers = spec, layout, buffers
        self._tables = Tables.build(spec, layout)
        self._kernels = Kernels(spec.rule, spec.kernel)
        self.members = Members(spec, layout, buffers)

    # What others may ask at any time

    @property
    def timeline(self) -> int:
        """Which history of the service the shard follows."""
        return self.history.timeline

    @property
    def sequence(self) -> int:
        """Operations so far."""
        return self.history.sequence

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
            step=self.history.num_steps,
            skipped_steps=self.history.num_skipped,
            size_bytes=self.buffers.size_bytes,
            kernel_identity=kernel_identity(self.device, self._kernels.kernel),
            scalars=self.scalars,
            step_counts=tuple(int(count) for count in self.step_count.tolist()),
            in_flight=self._deciding is not None,
        )

    def parameters(self, dtypes: Sequence[torch.dtype], rank: int, wanted: Part) -> list[Tensor]:
        """What is owned here of the parameters that a rank pushes gradients of, or holds.

        Returns:
            Per extent flat, the rank's runs one after the other, in the wanted dtype; may be the master itself.

        Raises:
            IncarnationError: If no worker has registered as this rank.
        """
        masters = [extent.slots[MASTER.name].view(-1) for extent in self.buffers.extents]
        parts = zip(masters, self.members[rank].runs(wanted), dtypes, strict=True)
        return [packed(master, runs).to(dtype) for master, runs, dtype in parts]

    def snapshot(self) -> Snapshot:
        """The state as it is between two steps, to be read while the steps after it are taken.

        Raises:
            NotRegisteredError: See :meth:`require_whole`.
            StepAbortedError: If a step is being decided.
        """
        self.require_whole()
        self._require_rest("save")
        snapshot = Snapshot(self.buffers, self.spec.rule, self.status())
        self._snapshots = [*filter(lambda each: each.is_open, self._snapshots), snapshot]
        return snapshot

    def _detach_snapshots(self, *, for_step: bool) -> None:
        for snapshot in self._snapshots:
            if snapshot.is_open:
                snapshot.detach(for_step=for_step)

    def replicated(self) -> Replicated:
        """What the shard has in common with all others, as it is between two steps."""
        return Replicated(copy.copy(self.history), self.buffers.key_state.values)

    def standing(self) -> Standing:
        """Where the shard stands, for the others, when some were lost."""
        under_way = {} if self._deciding is None else {self.sequence + 1: tuple(self._sums)}
        return Standing(self.sequence, {self.sequence: self.history.last_sums, **under_way})

    def deliver(self, rank: int, sink: Sink) -> None:
        """Fill a rank's memory with the parameters as they are; raises as :meth:`receive`."""
        runs = self.members[rank].runs(sink.part)
        sink.require_fits(runs, rank)
        sink.fill(runs, self.buffers)

    # What changes it between steps

    def admit(self, rank: int, incarnation: str, holdings: Holdings | None = None) -> bool:
        """Let a worker's process push as ``rank``; an earlier one no longer may, and what it pushed is dropped.

        Args:
            rank: The rank.
            incarnation: Names its process.
            holdings: What it holds of a sharded model.

        Returns:
            Whether it is another process than before.
        """
        is_other = self.members.admit(rank, incarnation, holdings)
        if is_other:
            self._inbox.drop(rank)
        return is_other

    def prepare_extension(self, spec: JobSpec, source: StateSource) -> None:
        """Make room for parameters that are added to the job; nothing of the present state changes.

        Args:
            spec: The job with one more batch, see :meth:`JobSpec.extended`.
            source: The added parameters' values.
        """
        layout = spec.layout()
        added = Layout(layout.params, layout.extents[len(self.layout.extents) :])
        buffers = self._allocate(spec, added)
        buffers.load(source)
        self._extension = Extension(spec, layout, buffers)

    def adopt_extension(self, *, timeline: int) -> None:
        """Take the prepared parameters into the job and begin a new timeline; every rank is to be admitted again."""
        assert self._extension is not None, "prepared on every shard before"
        added, self._extension = self._extension, None
        self._lay_out(added.spec, added.layout, self.buffers.extended(added.buffers))
        num_added = len(added.spec.params) - len(self.step_count)
        self.step_count = torch.cat((self.step_count, torch.zeros(num_added, dtype=torch.float64)))
        self.scalars = {**added.spec.rule.initial_scalars(added.spec.num_groups), **self.scalars}
        self._begin(timeline)

    def load(self, source: StateSource, *, timeline: int) -> None:
        """Take a whole state and begin a new timeline. Called between steps, on all shards with the same source.

        Raises:
            TimelineError: If ``timeline`` is not newer than the present one.
            StepAbortedError: If a step is being decided.
        """
        if self._lost is None and timeline <= self.timeline:
            raise TimelineError(f"expected a timeline after {self.timeline}, got {timeline}")
        self._require_rest("load")
        self._detach_snapshots(for_step=False)
        self._lost = f"shard {self._shard} was interrupted while it loaded a state"
        self._inbox = Inbox(self.spec.world_size)
        self.buffers.load(source)
        counts = [source.step_counts.get(index, 0) for index in range(len(self.spec.params))]
        self.step_count = torch.tensor(counts, dtype=torch.float64)
        self.scalars = {**self.spec.rule.initial_scalars(self.spec.num_groups), **source.scalars}
        self.history.sequence, self.history.num_steps = source.sequence, source.step
        self.history.num_skipped = source.skipped_steps
        self._lost = None
        self._begin(timeline)

    def rebuild(self, source: StateSource, replicated: Replicated, workers: Mapping[int, Member]) -> None:
        """Become what another shard object was between two steps, on the same timeline.

        Args:
            source: Its part of the state.
            replicated: What it had in common with all shards.
            workers: Whom it had admitted, by rank.
        """
        self.load(source, timeline=replicated.history.timeline)
        self.history = copy.copy(replicated.history)
        self.buffers.key_state.values = replicated.key_state
        for rank, member in workers.items():
            self.admit(rank, member.incarnation, member.holdings)

    def replay(self, logged: LoggedStep) -> RunningStep:
        """Take a step again, up to the first sum that the log does not know.

        The log has it from a shard that had checked its pushes; their senders may have been replaced since.
        """
        self._begin_with([dataclasses.replace(push, sink=None) for push in logged.pushes])
        running = RunningStep(self.step())
        for total in logged.sums:
            running.take(total)
        return running

    def set_workers(self, world_size: int, gradients: Gradients) -> None:
        """Change what the workers are, between two jobs' workers; those admitted so far are forgotten."""
        self.spec = dataclasses.replace(self.spec, world_size=world_size, gradients=gradients)
        self.members, self._inbox = Members(self.spec, self.layout, self.buffers), Inbox(world_size)

    def _begin(self, timeline: int) -> None:
        self.history.begin(timeline)
        self._inbox = Inbox(self.spec.world_size)

    # One step

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
        self.members.check_content(push)
        self._inbox.put(push)
        return Receipt.WAITING if self._inbox.missing else Receipt.COMPLETE

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
            AttemptError: If it was taken with another attempt.
        """
        taken = self.history.taken_with(rank)
        if taken is not None and (taken.incarnation, taken.attempt) != (incarnation, attempt):
            self.members.require_incarnation(rank, incarnation)
            raise self.history.taken_otherwise(taken)

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
        # A successor with other holdings may be admitted meanwhile.
        self._senders = [self.members[push.header.rank] for push in pushes]

    def step(self) -> Reduction:
        """Run the next step: vote, local pass, reduction, apply pass.

        Call it when every rank is in, or to give the step up for want of a rank. Until the vote is a COMMIT no slot
        has moved; an exception thrown in before leaves the shard as it was.
        """
        if self._deciding is None:
            self.begin()
        pushes, moving = self._deciding or [], False
        here = {push.header.rank for push in pushes}
        missing = [rank for rank in range(self.spec.world_size) if rank not in here]
        try:
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
            result = self._decide(total, limits)
            if result.decision is Decision.COMMIT:
                self._detach_snapshots(for_step=not any(push.reloaded for push in pushes))
                moving = True
                grad_norm = result.grad_norm
                gradient = limited(gradient, limits.max_value, limits.coefficient(grad_norm), self.buffers)
                result = dataclasses.replace((yield from self._commit(pushes, gradient)), grad_norm=grad_norm)
            if result.decision is not Decision.ABORT:
                self.history.note(result, pushes, self._sums)
            moving = False
            return result
        finally:
            if moving:
                self._lost = f"shard {self._shard} was interrupted within step {self.sequence + 1}"
            self._deciding = None

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

    def _decide(self, total: Tensor, limits: ClipLimits) -> StepResult:
        sequence = self.sequence + 1
        votes, sums = open_votes(total, self._num_shards)
        decision, error = count_votes(votes, sequence=sequence, world_size=self.spec.world_size)
        grad_norm = norm_of(sums, self._tables.squares) if limits.is_set and error is None else None
        if decision is Decision.COMMIT and grad_norm is not None and not math.isfinite(grad_norm):
            decision = Decision.SKIP
        return StepResult(sequence, decision, self.scalars, error, grad_norm)

    def _commit(self, pushes: Sequence[Push], gradient: Gradient) -> Reduction:
        header, present = pushes[0].header, self._present(pushes).any(dim=0)
        for push, sender in zip(pushes, self._senders, strict=True):
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
        return StepResult(self.sequence + 1, Decision.COMMIT, self.scalars)

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
        """Which tensors each rank has a gradient of, ``(world_size, num_tensors)`` bool."""
        return torch.stack([unpack_present(push.header.present, len(self.spec.params)) for push in pushes])

    # Checks

    def require_whole(self) -> None:
        """See that the shard holds a state that can be trusted, before it is read or saved.

        Raises:
            NotRegisteredError: If it has none yet, or was interrupted within a step or a load.
        """
        if self._lost is not None:
            raise NotRegisteredError(f"{self._lost}; register the job, or restore its last checkpoint")

    def _require_rest(self, wanted: str) -> None:
        if self._deciding is not None:
            raise StepAbortedError(f"step {self.sequence + 1} is being decided; {wanted} when it is done")

    def require_sender(self, header: PushHeader) -> None:
        """Refuse a push by its header: of another rank, timeline, step or process than may push now.

        Raises:
            RequestError: One of its subclasses, by what is off.
        """
        self.members.require_rank(header.rank)
        self.require_whole()
        self.history.require_sequence(header.timeline, header.sequence)
        self.members.require_incarnation(header.rank, header.incarnation)
