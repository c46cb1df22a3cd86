"""The state that one shard owns, and what changes it between steps: loads, added parameters, other workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .buffers import MASTER, Buffers, StateSource
from .compiling import kernel_identity
from .coverage import Gradients, Holdings, Part, packed
from .delivery import Sink
from .errors import (
    NotRegisteredError,
    StepAbortedError,
    TimelineError,
)
from .history import History
from .job import JobSpec
from .kernels import Kernels
from .layout import Layout
from .members import Member, Members
from .push import Inbox, Push, PushHeader
from .recovery import Standing
from .reports import ShardStatus
from .snapshot import Snapshot
from .stopwatch import Stopwatch
from .tables import Tables
from .world import World


@dataclasses.dataclass(frozen=True, slots=True)
class Replicated:
    """What is not a shard's part of the state, nor in numbers in its :class:`ShardStatus`.

    Attributes:
        history: Its history.
        key_state: The whole model's; steps replace it and never write it.
        world: The ranks that the next step waits for.
    """

    history: History
    key_state: Mapping[str, Tensor]
    world: World


@dataclasses.dataclass(frozen=True, slots=True)
class Extension:
    """Parameters that are ready to be taken into the job: its new form, and the added extents' memory."""

    spec: JobSpec
    layout: Layout
    buffers: Buffers


class OwnedState:
    """What one shard owns of one job, and what it has in common with the others.

    Args:
        spec: The job.
        shard: This shard's index.
        num_shards: How many shards there are.
        device: Where its buffers live and its kernels run.
        timeline: The history that begins with this object.
        world: The ranks that steps wait for; None for those of the job, all of which every step needs.

    Attributes:
        world: As above; what replaces it is the same on all shards.
    """

    def __init__(
        self,
        spec: JobSpec,
        *,
        shard: int = 0,
        num_shards: int = 1,
        device: torch.device | None = None,
        timeline: int = 0,
        world: World | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self._shard, self._num_shards = shard, num_shards
        self.world = world or World(tuple(range(spec.world_size)))
        layout = spec.layout()
        self._lay_out(spec, layout, self._allocate(spec, layout))
        self.scalars: Mapping[str, float] = spec.rule.initial_scalars(spec.num_groups)
        self.step_count = torch.zeros(len(spec.params), dtype=torch.float64, device="cpu")
        self.history = History(timeline)
        self._extension: Extension | None = None
        self._snapshots: list[Snapshot] = []
        self._inbox = Inbox()
        self._deciding: list[Push] | None = None
        self._senders: list[Member] = []
        self._sums: list[Tensor] = []
        self.stopwatch = Stopwatch()
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
        return self.world.missing_from(self._inbox.ranks)

    @property
    def is_complete(self) -> bool:
        """Whether every rank has pushed for the next step. Asked at each push, so their number is looked at first."""
        return len(self._inbox.ranks) >= self.world.size and not self.missing_ranks

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
            world=self.world,
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
        return Replicated(self.history.copied(), self.buffers.key_state.values, self.world)

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

        Raises:
            UnknownRankError: If the rank is none of the job's.
        """
        if not self.world.is_elastic:
            self.world.require(rank)
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
        self.step_count = torch.cat((self.step_count, torch.zeros(num_added, dtype=torch.float64, device="cpu")))
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
        self._inbox = Inbox()
        self.buffers.load(source)
        counts = [source.step_counts.get(index, 0) for index in range(len(self.spec.params))]
        self.step_count = torch.tensor(counts, dtype=torch.float64, device="cpu")
        self.scalars = {**self.spec.rule.initial_scalars(self.spec.num_groups), **source.scalars}
        self.history.go_on_from(source.sequence, source.step, source.skipped_steps)
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
        self.history = replicated.history.copied()
        self.buffers.key_state.values, self.world = replicated.key_state, replicated.world
        for rank, member in workers.items():
            self.admit(rank, member.incarnation, member.holdings)

    def succeed(self, status: ShardStatus, replicated: Replicated) -> None:
        """Stand where the shards of another cut stood between two steps, whose slots are in the buffers already.

        Args:
            status: Where they stood.
            replicated: What they had in common.
        """
        self.step_count = torch.tensor(status.step_counts, dtype=torch.float64, device="cpu")
        self.scalars = status.scalars
        self.history = replicated.history.copied()
        self.history.last_sums = ()  # of another group, whose votes were of another length
        self.buffers.key_state.values, self.world = replicated.key_state, replicated.world
        self._inbox = Inbox()
        self._lost = None

    def set_workers(self, world_size: int, gradients: Gradients) -> None:
        """Change what the workers are, between two jobs' workers; those admitted so far are forgotten."""
        self.spec = dataclasses.replace(self.spec, world_size=world_size, gradients=gradients)
        self.world = self.world.of_size(world_size)
        self.members, self._inbox = Members(self.spec, self.layout, self.buffers), Inbox()

    def dismiss_workers(self) -> None:
        """Let none of those admitted so far push any more, as if all had said goodbye; what they pushed is dropped."""
        for rank in self.members.by_rank:
            self.members.leave(rank)
        self._inbox = Inbox()

    def set_world(self, world: World) -> None:
        """Have the next step wait for other ranks; what those that it does not wait for have pushed is dropped."""
        for rank in set(self._inbox.ranks) - set(world.ranks):
            self._inbox.drop(rank)
        self.world = world

    def _begin(self, timeline: int) -> None:
        self.history.begin(timeline)
        self._inbox = Inbox()

    # Checks

    @property
    def is_whole(self) -> bool:
        """Whether it holds a state that can be trusted, see :meth:`require_whole`."""
        return self._lost is None

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
        self.world.require(header.rank)
        self.require_whole()
        self.history.require_sequence(header.timeline, header.sequence)
        self.members.require_incarnation(header.rank, header.incarnation)
