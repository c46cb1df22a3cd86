"""How a worker reaches its shards: one interface, one class for each way."""

from __future__ import annotations

import abc
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor

from ..server.messages import LoadHeader, Registration
from ..sharding.chronicle import Columns
from ..sharding.coverage import Holdings
from ..sharding.folder import Checkpoint
from ..sharding.job import JobSpec
from ..sharding.layout import Layout
from ..sharding.pending_save import PendingSave
from ..sharding.pieces import PieceValues
from ..sharding.push import PushHeader
from ..sharding.reports import ShardStatus, StepResult
from .flat import FlatBuffer, allocate_zeros
from .streaming import PieceStream

Values = Mapping[tuple[int, str], Tensor]
"""Whole slots, flattened: (parameter index, slot name) to ``(numel,)``."""


def as_pieces(values: Values) -> PieceValues:
    """Whole slots as pieces that begin at 0."""
    return {(param, slot, 0): tensor for (param, slot), tensor in values.items()}


class ServiceHandle(Protocol):
    """What ``optimizer.service`` offers, wherever the shards live."""

    @property
    def name(self) -> str:
        """The service's name."""

    def status(self) -> dict[str, Any]:
        """Where the service stands, as plain values."""

    def history(self, last: int | None = None) -> Columns:
        """What each step brought."""

    @overload
    def save(self, uri: str, *, keep_last: int | None = None, wait: Literal[True] = True) -> int: ...

    @overload
    def save(self, uri: str, *, keep_last: int | None = None, wait: Literal[False]) -> PendingSave: ...

    def save(self, uri: str, *, keep_last: int | None = None, wait: bool = True) -> int | PendingSave:
        """Write a checkpoint; the number of steps in it, or without ``wait`` what it will be."""

    def restore(self, uri: str) -> int:
        """Take over a checkpoint; the number of steps in it."""

    def checkpoints(self, uri: str) -> list[Checkpoint]:
        """The complete checkpoints in a run's folder."""

    def shutdown(self) -> None:
        """End the service."""


class Transport(abc.ABC):
    """One worker's line to the shards of one service. Methods raise the errors of ``stepwell.sharding.errors``."""

    service: ServiceHandle
    kept_from: int = sys.maxsize
    """The first step whose gradient must stay where it is, as a shard that is lost would need it."""
    is_elastic: bool = False
    """Whether ranks come and go; each of them then says what else the first one alone does."""
    reads_in_place: bool = False
    """Whether the shards, in this process, read a gradient wherever it lies: :attr:`FlatBuffer.elsewhere` counts."""
    recovery_timeout_s: float = 0.0
    """How long a worker tries a step again that failed with a lost shard; 0 where nothing brings a shard back."""

    @abc.abstractmethod
    def register(self, spec: JobSpec, rank: int, incarnation: str, holdings: Holdings | None) -> Registration:
        """Register this worker, and what it holds of a sharded model. Called once by every rank."""

    @abc.abstractmethod
    def attach(self, layout: Layout, rank: int) -> None:
        """Take note of the layout that the service named last."""

    def allocate(self, sizes: Sequence[tuple[int, torch.dtype]], device: torch.device) -> list[Tensor]:
        """Memory for this worker's buffers, see :data:`stepwell.client.flat.Allocate`. Called after :meth:`attach`."""
        return allocate_zeros(sizes, device)

    def stream(self, gradient: FlatBuffer) -> PieceStream | None:
        """What sends ahead the pieces of a gradient which is to be pushed whole; None if none has far to go."""
        return None

    @abc.abstractmethod
    def load(self, values: PieceValues, header: LoadHeader) -> Registration:
        """Load a state, beginning a new timeline. Called by rank 0."""

    @abc.abstractmethod
    def hand_in(self, values: PieceValues) -> Registration:
        """Hand in this rank's part of a sharded model's first parameters; returns when all ranks have."""

    @abc.abstractmethod
    def extend(self, spec: JobSpec, holdings: Holdings | None, values: PieceValues) -> Registration:
        """Add the parameters that ``spec`` has beyond the job; returns when all ranks have asked for it.

        Args:
            spec: The job with the added group.
            holdings: What this rank holds of all its parameters, if the model is sharded.
            values: The added parameters: rank 0's, or this rank's part of them.
        """

    @abc.abstractmethod
    def wait_until_loaded(self, after_timeline: int) -> Registration:
        """Wait for rank 0's :meth:`load`. Called by the other ranks."""

    @abc.abstractmethod
    def refresh(self, rank: int, incarnation: str) -> Registration:
        """Where the service stands now; an elastic job that goes on without this worker waits for it again."""

    @abc.abstractmethod
    def step(
        self, header: PushHeader, gradient: FlatBuffer, reloaded: Mapping[int, Tensor], params: FlatBuffer
    ) -> StepResult:
        """Push to every shard and wait for the decision; after a COMMIT ``params`` holds the new parameters.

        Both buffers belong to the shards until this returns. If it raises, ``gradient`` does for good, as a shard may
        hold this push still.

        Raises:
            RequestError: If a shard refused the push.
            StepAbortedError: If the step was given up.
            ShardsMovedError: If other shards have taken the place of those that were asked, and with it the step, if
                that was taken. This line leads to them now.
            ServiceError: If the service did not answer; whether the step was taken is then open, see :meth:`decided`.
        """

    @abc.abstractmethod
    def decided(self, timeline: int, sequence: int) -> StepResult | None:
        """The result of a step if it was taken; waits for one that is under way, never for one that is not."""

    @abc.abstractmethod
    def read_parameters(self, params: FlatBuffer) -> None:
        """Fill ``params`` with the service's parameters; which part of them, it says itself."""

    @abc.abstractmethod
    def read_state(self) -> tuple[dict[tuple[int, str], Tensor], ShardStatus]:
        """Every whole slot, flattened, in its state dtype on the CPU, and where the shards stand."""

    @abc.abstractmethod
    def close(self, rank: int, world_size: int) -> None:
        """Say goodbye; ends what this worker started."""


def join_pieces(pieces: Sequence[tuple[int, str, int, Tensor]]) -> dict[tuple[int, str], Tensor]:
    """Put (param, slot, offset, values) from all shards together into whole slots."""
    by_slot: dict[tuple[int, str], list[tuple[int, Tensor]]] = {}
    for param, slot, offset, values in pieces:
        by_slot.setdefault((param, slot), []).append((offset, values))
    return {
        key: torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
        for key, parts in by_slot.items()
    }
