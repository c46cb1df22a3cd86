"""One training process's part in a job: its numbers, its buffers, and how it recovers from a step that failed."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..server.messages import LoadHeader, Registration, unpack_job
from ..sharding.buffers import MASTER
from ..sharding.clipping import ClipLimits
from ..sharding.coverage import Holdings
from ..sharding.errors import (
    AttemptError,
    CheckpointError,
    JobMismatchError,
    ShardLostError,
    ShardsMovedError,
    StepAbortedError,
    TimelineError,
)
from ..sharding.job import JobSpec
from ..sharding.pieces import PieceValues
from ..sharding.push import PushHeader
from ..sharding.reports import ShardStatus, StepResult
from ..sharding.saved import manifest_digest
from ..sharding.vote import Decision
from .model_buffers import DEFAULT_OPTIONS, GatherOptions, ModelBuffers, common_device, values_of
from .patience import Patience, patiently
from .replicas import replica_group
from .transport import Transport, Values, as_pieces

logger = logging.getLogger("stepwell")


class Worker:
    """A registered worker. Making one registers it, on every rank, and takes the service's parameters over.

    Args:
        transport: The line to the shards.
        spec: The job.
        params: The model's parameters, in index order.
        rank: This worker's rank.
        holdings: What it holds of a sharded model.
        options: How gradients are gathered.

    Attributes:
        scalars: The rule's scalars after the last step.
        num_steps: Steps that the service has taken, skipped ones included.
        num_skipped_steps: Steps of these that were skipped.
        last_result: Of the last step that this worker has heard of since it registered or refreshed; None before it.
        ranks: Whose gradients that step was taken with; before it, whom the next one waits for.
    """

    spec: JobSpec
    timeline: int

    def __init__(
        self,
        transport: Transport,
        spec: JobSpec,
        params: Sequence[Tensor],
        rank: int,
        holdings: Holdings | None = None,
        *,
        options: GatherOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.transport, self.rank = transport, rank
        self._params, self._holdings, self._options = list(params), holdings, options
        self._incarnation = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._attempt = 0
        self._is_open, self._is_taking = False, False
        common_device(params)
        self._replica_group = replica_group(spec, rank)
        registration = self._register(spec)
        self._attach(unpack_job(registration.spec))
        self._adopt(registration)
        if registration.needs_parameters:
            self._adopt(self._hand_out_parameters())
        elif registration.step:
            logger.info("rank %d joined service %r at step %d", rank, transport.service.name, registration.step)
        self.take_parameters()

    def _register(self, spec: JobSpec) -> Registration:
        register = functools.partial(self.transport.register, spec, self.rank, self._incarnation, self._holdings)
        return patiently(register, self.transport.recovery_timeout_s, f"rank {self.rank}, registration")

    def extend(self, spec: JobSpec, params: Sequence[Tensor], holdings: Holdings | None) -> None:
        """Take more parameters into the job; called on every rank.

        Args:
            spec: The job with the added group.
            params: All parameters, the added ones last.
            holdings: What this rank holds of all of them, if the model is sharded.

        Raises:
            JobMismatchError: If the ranks add different groups. Nothing has changed.
        """
        self.settle()
        common_device(params)
        first = len(self._params)
        added = values_of(params, holdings, leads=self.leads, indices=range(first, len(params)))
        registration = self.transport.extend(spec, holdings, _as_pieces(added))
        before, spec, timeline = (self._params, self._holdings), self.spec, self.timeline
        self._params, self._holdings = list(params), holdings
        try:
            self._adopt(registration)
            self.take_parameters()
        except BaseException:
            # As if this rank had not heard of it: all else is refused until it has added the group.
            (self._params, self._holdings), self.spec, self.timeline = before, spec, timeline
            raise

    def _attach(self, spec: JobSpec) -> None:
        """Lay the buffers out as the service has laid out the job.

        Raises:
            JobMismatchError: If the service's job has not this worker's parameters.
        """
        if len(spec.params) != len(self._params):
            raise JobMismatchError(
                f"the service's job has {len(spec.params)} parameters, rank {self.rank} has {len(self._params)}: a "
                "parameter group was added or is missing here; call add_param_group on every rank"
            )
        self.spec, self.layout = spec, spec.layout()
        self.transport.attach(self.layout, self.rank)
        self._buffers = ModelBuffers(
            spec,
            self.layout,
            self._params,
            self.rank,
            holdings=self._holdings,
            group=self._replica_group,
            options=self._options,
            allocate=self.transport.allocate,
            open_stream=self.transport.stream,
            are_read_in_place=self.transport.reads_in_place,
        )

    @property
    def leads(self) -> bool:
        """Whether this is the first of the ranks, whose parameters, hyperparameters and limits count."""
        return self.rank == self.ranks[0]

    @property
    def is_heard(self) -> bool:
        """Whether hyperparameters and limits go with this rank's steps: in an elastic job any may come to lead."""
        return self.leads or self.transport.is_elastic

    def step(
        self,
        hyper: Mapping[str, Sequence[float]] | None,
        scalars: Mapping[str, float] | None,
        *,
        limits: ClipLimits | None = None,
        grad_scale: float = 1.0,
        found_inf: bool = False,
        loss: float | None = None,
    ) -> StepResult:
        """Push the gradients, wait for the step and take the parameters over.

        If a shard is lost meanwhile, and can be brought back, this waits for it and goes on; if others take its place,
        this goes on with them. After another failure the next call first asks whether the failed step was taken after
        all: if so it takes its result over and goes on with the step after it; else it pushes under a new attempt.

        Args:
            hyper: Of a rank that :attr:`is_heard`: hyperparameter name to one value per group. Else None.
            scalars: Of such a rank: scalars that a person wrote. Else None.
            limits: Of such a rank: of the averaged gradient. Else None.
            grad_scale: What this rank's gradients are multiplied by.
            found_inf: Whether this rank wants the step skipped, as its gradients are not finite.
            loss: What the gradients are of, if the trainer has told.

        Returns:
            The result, COMMIT or SKIP.
        """
        patience = Patience(self.transport.recovery_timeout_s, f"rank {self.rank}, step {self.sequence + 1}")
        patience.go_on_with(self.settle)
        sequence, was_lost = self.sequence, False
        while self.sequence == sequence:
            try:
                self._try_step(hyper, scalars, limits, grad_scale, found_inf, loss)
            except ShardsMovedError:
                was_lost = True
                patience.go_on_with(self.settle)
            except ShardLostError as error:
                was_lost = True
                patience.wait(error)
                patience.go_on_with(self.settle)
            except (AttemptError, StepAbortedError) as error:
                patience.go_on_with(self.settle)
                if was_lost:
                    patience.wait(error)
                elif self.sequence == sequence:
                    raise
                else:
                    # Taken with a push of ours that had seemed to fail. This gradient is the next step's.
                    sequence = self.sequence
        patience.done()
        assert self.last_result is not None, "a step was taken"
        return self.last_result

    def _try_step(
        self,
        hyper: Mapping[str, Sequence[float]] | None,
        scalars: Mapping[str, float] | None,
        limits: ClipLimits | None,
        grad_scale: float,
        found_inf: bool,
        loss: float | None,
    ) -> None:
        gathered = self._buffers.gather_gradients()
        is_finite = math.isfinite(gathered.max_abs)
        header = PushHeader(
            timeline=self.timeline,
            sequence=self.sequence + 1,
            rank=self.rank,
            incarnation=self._incarnation,
            attempt=self._attempt,
            present=gathered.present,
            hyper=hyper,
            scalars=scalars,
            max_grad_norm=None if limits is None else limits.max_norm,
            max_grad_value=None if limits is None else limits.max_value,
            grad_scale=grad_scale,
            found_inf=found_inf or not is_finite,
            max_abs=gathered.max_abs if is_finite else None,
            loss=loss,
        )
        reloaded = self._buffers.reloaded(leads=self.leads)
        self._is_open, self._is_taking = True, False
        self._attempt += 1
        try:
            result = self.transport.step(header, self._buffers.lend_gradients(), reloaded, self._buffers.pulled)
        except (StepAbortedError, TimelineError):
            # On another timeline there is nothing to find out any more.
            self._is_open = False
            raise
        if result.decision is Decision.COMMIT:
            self._take(result)
        self._close_step(result)

    def settle(self) -> bool:
        """Find out what became of a step that failed under way, if the last one did.

        Returns:
            Whether it had been committed; this worker has then taken its result over, parameters included.
        """
        if not self._is_open:
            return False
        result = self.transport.decided(self.timeline, self.sequence + 1)
        if result is None or result.decision is Decision.ABORT:
            self._is_open = False
            return False
        logger.warning("step %d had been decided although it failed here; going on after it", result.sequence)
        if result.decision is Decision.COMMIT and not self._is_taking:
            # Replicas wait for this rank's share.
            self.transport.read_parameters(self._buffers.pulled)
            self._take(result)
        elif result.decision is Decision.COMMIT:
            self.take_parameters()
        self._close_step(result)
        return result.decision is Decision.COMMIT

    def _take(self, result: StepResult) -> None:
        """Take over what a step brought; replicas exchange it once for each step, whatever comes of that."""
        self._is_taking = True
        self._buffers.take(result.sequence)

    def load(self, values: Values, header: LoadHeader) -> None:
        """Load a state into the service; called on every rank, the values of the first one count."""
        if self.leads:
            self._adopt(self.transport.load(as_pieces(values), header))
        else:
            self._adopt(self._next_timeline())

    def refresh(self) -> None:
        """Take over the service's parameters, scalars and step number, and this rank's place if it was excluded."""
        self._adopt(self._refreshed())
        self.take_parameters()

    def _refreshed(self) -> Registration:
        return self.transport.refresh(self.rank, self._incarnation)

    def take_parameters(self) -> None:
        """Take over the service's parameters."""
        read = functools.partial(self.transport.read_parameters, self._buffers.held)
        patiently(read, self.transport.recovery_timeout_s, f"rank {self.rank}, parameters")
        self._buffers.write_parameters()

    def read_state(self) -> tuple[dict[tuple[int, str], Tensor], ShardStatus]:
        """All of the state, see :meth:`Transport.read_state`."""
        return patiently(self.transport.read_state, self.transport.recovery_timeout_s, f"rank {self.rank}, the state")

    def restore(self, uri: str, digest: str) -> None:
        """Restore the service from a checkpoint; called on every rank, rank 0 does it.

        Raises:
            CheckpointError: If the checkpoint is not the one with this digest, or damaged.
        """
        found = manifest_digest(uri)
        if found != digest:
            raise CheckpointError(
                f"{uri}: expected the checkpoint whose manifest has SHA-256 {digest}, got {found}; it was replaced "
                "since the state dict was made. Use a state dict and a checkpoint of the same save"
            )
        if self.leads:
            self.transport.service.restore(uri)
            self._adopt(self._refreshed())
        else:
            self._adopt(self._next_timeline())
        self.take_parameters()

    def distrust_gradients(self) -> None:
        """Copy all gradients in the next step: something may have changed them in a way that does not show."""
        self._buffers.distrust_gradients()

    def close(self) -> None:
        """Part from the service, and leave the model as any other."""
        self._buffers.close()
        self.transport.close(self.rank, self.spec.world_size)

    def changed_by_hand(self) -> list[int]:
        """Indices of parameters that something else than this class has written since it last did."""
        return self._buffers.changed_by_hand()

    def mark_changed(self, indices: Iterable[int] | None = None) -> None:
        """Send these parameters, or all, with the next step, as changed by hand."""
        self._buffers.mark_changed(indices)

    def _adopt(self, registration: Registration) -> None:
        spec = unpack_job(registration.spec)
        if spec != self.spec:
            before = self._buffers
            self._attach(spec)
            before.close()
        self.timeline, self.sequence = registration.timeline, registration.sequence
        self.scalars, self.num_steps = registration.scalars, registration.step
        self.num_skipped_steps, self.ranks = registration.skipped_steps, registration.ranks
        self.last_result: StepResult | None = None
        # Attempts go on counting: an inbox may still hold a push of this step, and takes the next try for its repeat.
        self._is_open = False

    def _hand_out_parameters(self) -> Registration:
        if self.spec.gradients == "sharded":
            return self.transport.hand_in(_as_pieces(self._buffers.values(leads=self.leads)))
        if not self.leads:
            return self._next_timeline()
        return self.transport.load(_as_pieces(self._buffers.values(leads=self.leads)), LoadHeader())

    def _next_timeline(self) -> Registration:
        """Wait for the load of rank 0 that belongs to this rank's; rank 0 may have loaded again by now."""
        registration = self.transport.wait_until_loaded(self.timeline)
        return dataclasses.replace(registration, timeline=self.timeline + 1)

    def _note_ranks(self, result: StepResult) -> None:
        """Say it once if a step was taken with other ranks than the one before; loud from the first rank alone."""
        gone, come = set(self.ranks) - set(result.ranks), set(result.ranks) - set(self.ranks)
        self.ranks = result.ranks
        if gone or come:
            changes = [f"without rank {_list(gone)}"] * bool(gone) + [f"with rank {_list(come)}"] * bool(come)
            level, size = logging.WARNING if self.leads else logging.INFO, len(self.ranks)
            logger.log(
                level,
                "step %d was taken %s: gradients are averaged over %d ranks from now on",
                result.sequence,
                " and ".join(changes),
                size,
            )

    def _close_step(self, result: StepResult) -> None:
        # Comes after the parameters were written: interrupted in between, those changed by hand would be sent again.
        self.sequence, self.scalars = result.sequence, result.scalars
        self.num_steps += 1
        self.num_skipped_steps += result.decision is Decision.SKIP
        self.last_result = result
        self._note_ranks(result)
        self._attempt, self._is_open = 0, False
        self._buffers.take_back_gradients(result.sequence, self.transport.kept_from)


def _list(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _as_pieces(values: Mapping[int, tuple[int, Tensor]]) -> PieceValues:
    """Parameters as pieces of the state; empty ones are none."""
    return {(index, MASTER.name, offset): value for index, (offset, value) in values.items() if value.numel() > 0}
