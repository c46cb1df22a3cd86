"""Copies and pickles of an optimizer: the whole state of an in-process one, which lives nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..server.messages import LoadHeader
from ..sharding.job import JobSpec
from .inprocess import InProcessService, InProcessTransport
from .model_buffers import GatherOptions
from .transport import Values
from .worker import Worker


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of an in-process optimizer, as a copy or a pickle carries it.

    Attributes:
        spec: The job.
        num_shards: Shards of its service.
        values: Every whole slot, flattened, on the CPU.
        header: The small part of the state.
        changed: Parameters that were changed by hand since the last step, which the copy must not undo.
    """

    spec: JobSpec
    num_shards: int
    values: Values
    header: LoadHeader
    changed: tuple[int, ...]


def take_snapshot(worker: Worker, service: InProcessService) -> Snapshot:
    """The state behind ``worker``, between two steps."""
    values, status = worker.read_state()
    header = LoadHeader(
        step_counts=dict(enumerate(status.step_counts)),
        scalars=dict(status.scalars),
        sequence=status.sequence,
        step=status.step,
        skipped_steps=status.skipped_steps,
    )
    num_shards = len(service.group.shards)
    return Snapshot(worker.spec, num_shards, values, header, tuple(worker.changed_by_hand()))


def revive(snapshot: Snapshot, params: Sequence[Tensor], options: GatherOptions) -> Worker:
    """A worker with an in-process service of its own, that stands where the snapshot was taken."""
    device = params[0].device if params else torch.device("cpu")
    service = InProcessService(num_shards=snapshot.num_shards, device=device, kernel=snapshot.spec.kernel)
    worker = Worker(InProcessTransport(service), snapshot.spec, params, rank=0, options=options)
    worker.load(snapshot.values, snapshot.header)
    worker.mark_changed(snapshot.changed)
    return worker
