"""What a worker sends for one step, and the box in which a shard keeps it until all workers are in."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence

import msgpack
import numpy as np
import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from .delivery import Sink
from .errors import AttemptError, DTypeMismatchError, HyperparameterError, MessageError, ShapeMismatchError

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

PIECE_NUMEL = 2**22
"""Elements of one piece of a gradient that is sent piece by piece: many to a call, and few to wait for at the end."""


PushKey = tuple[int, int, str, int]
"""Timeline, sequence number, incarnation and attempt."""


@dataclasses.dataclass(frozen=True, slots=True)
class PushHeader:
    """The small part of a push, the same for every shard.

    Attributes:
        timeline: Which history of the service the worker follows; a restore or load begins a new one.
        sequence: Number of the operation that this push is part of.
        rank: The worker's rank.
        incarnation: Names the worker's process.
        attempt: Counts the worker's tries at this sequence number, from 0.
        present: ``(num_tensors,)`` bool, packed eight to a byte, first tensor in the highest bit: which tensors have a
            gradient on this rank.
        hyper: Of a rank that is heard, see :meth:`World.is_heard`: hyperparameter name to one float per group.
        scalars: Of such a rank: scalars that a person wrote into the parameter groups.
        max_grad_norm, max_grad_value: Of such a rank: limits of the averaged gradient; see
            :class:`stepwell.sharding.clipping.ClipLimits`.
        grad_scale: What this rank's gradient was multiplied by; averaging undoes it.
        found_inf: Whether this rank found inf or NaN in its gradient itself; the step is then skipped.
        max_abs: No magnitude in what this rank pushes is above this or above 1, but for a few roundings, as it found
            itself; no tighter than its dtype if that is enough. None: the shards look.
        loss: What the gradient is of, if the trainer has told; for the run's history alone.
    """

    timeline: int
    sequence: int
    rank: int
    incarnation: str
    attempt: int
    present: bytes
    hyper: Mapping[str, Sequence[float]] | None = None
    scalars: Mapping[str, float] | None = None
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    grad_scale: float = 1.0
    found_inf: bool = False
    max_abs: float | None = None
    loss: float | None = None

    @property
    def key(self) -> PushKey:
        """Which of a rank's pushes this is."""
        return self.timeline, self.sequence, self.incarnation, self.attempt

    def digest(self) -> bytes:
        """Digest of the whole header, equal on all shards that hold the same push."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return hashlib.sha256(msgpack.packb(fields)).digest()


@dataclasses.dataclass(frozen=True, slots=True)
class Push:
    """One worker's part of one step, as one shard receives it.

    Attributes:
        header: See there.
        gradient: Per extent, what the rank pushes of the shard's tiles, packed, in the wire's dtype: with ``"local"``
            ``(owned tiles * 256,)``, which may also be several pieces of whole tiles, one after the other. Padding is
            zero; elements of absent tensors may hold anything.
        reloaded: For parameters changed by hand since the last step: parameter index to the whole value from the first
            rank, or of a sharded model to what the rank pushes of it; flattened.
        sink: Where the rank's parameters go if the step is a COMMIT; None if it asks for them.
    """

    header: PushHeader
    gradient: tuple[Tensor, ...]
    reloaded: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)
    sink: Sink | None = None


def pack_present(present: Sequence[bool]) -> bytes:
    """Pack one bool per tensor, eight to a byte."""
    return np.packbits(np.asarray(present, dtype=np.bool_)).tobytes()


def unpack_present(packed: bytes, num_tensors: int) -> Tensor:
    """The reverse of :func:`pack_present`: ``(num_tensors,)`` bool.

    Raises:
        ShapeMismatchError: If the mask is not of ``num_tensors`` bits.
    """
    expected = -(-num_tensors // 8)
    if len(packed) != expected:
        raise ShapeMismatchError(
            f"present: expected a mask of {expected} bytes for {num_tensors} tensors, got {len(packed)} bytes"
        )
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=num_tensors)
    return torch.from_numpy(bits.astype(np.bool_))


def piece_numels(numels: Sequence[int]) -> list[int]:
    """The lengths of all pieces of a gradient with so many elements per extent; of an empty extent one empty piece."""
    return [min(PIECE_NUMEL, numel - start) for numel in numels for start in range(0, max(numel, 1), PIECE_NUMEL)]


def by_extent(gradient: Sequence[Tensor], numels: Sequence[int]) -> list[list[Tensor]]:
    """The pieces of each extent of a gradient that has ``numels`` elements per extent, one piece at least.

    Raises:
        ValueError: If it does not fit, or an extent is not cut between tiles.
    """
    extents, got, pieces = list[list[Tensor]](), list[int](), collections.deque(gradient)
    for numel in numels:
        taken, its_numel = list[Tensor](), 0
        while pieces and (its_numel < numel or not taken):
            taken.append(pieces.popleft())
            its_numel += taken[-1].numel()
        extents.append(taken)
        got.append(its_numel)
    if got != list(numels) or pieces or not all(extents):
        raise ValueError(f"expected {list(numels)} elements per extent")
    if any(piece.numel() % TILE_NUMEL for taken in extents for piece in taken[:-1]):
        raise ValueError("expected pieces of whole tiles")
    return extents


def check_gradient(
    gradient: Sequence[Tensor], expected_numels: Sequence[int], rank: int, *, may_be_cut: bool
) -> list[list[Tensor]]:
    """Refuse a gradient that does not fit a shard's tiles.

    Args:
        gradient: The gradient.
        expected_numels: Per extent, how many elements it has to have.
        rank: Whose it is.
        may_be_cut: Whether an extent's may come in several pieces.

    Returns:
        Its pieces per extent.

    Raises:
        ShapeMismatchError: If the number of extents or a length is off.
        DTypeMismatchError: If a dtype cannot be averaged.
    """
    try:
        extents = by_extent(gradient, expected_numels)
    except ValueError:
        extents = None
    if extents is None or not (may_be_cut or len(gradient) == len(extents)):
        got = [part.numel() for part in gradient]
        raise ShapeMismatchError(
            f"gradient of rank {rank}: expected {list(expected_numels)} elements per extent, got {got}; "
            "the worker's layout is not the shard's"
        )
    for part in gradient:
        if part.dtype not in GRADIENT_DTYPES:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in GRADIENT_DTYPES)
            raise DTypeMismatchError(f"gradient of rank {rank}: expected one of {wanted}, got {part.dtype}")
    return extents


def check_hyper(header: PushHeader, names: Sequence[str], num_groups: int, *, is_heard: bool) -> None:
    """Refuse a header whose hyperparameters are not those of the job.

    Args:
        header: The header.
        names: The rule's hyperparameters.
        num_groups: The job's parameter groups.
        is_heard: Whether its rank is to send any.

    Raises:
        MessageError: If a rank that is to send some sends none, or the other way about, or a name is off.
        ShapeMismatchError: If there is not one value per group.
        HyperparameterError: If a value is NaN.
    """
    if (header.hyper is not None) != is_heard:
        raise MessageError(
            f"hyperparameters: expected from rank 0 alone, in an elastic job from all; rank {header.rank} is off"
        )
    if header.hyper is None:
        return
    if sorted(header.hyper) != sorted(names):
        raise MessageError(f"hyperparameters: expected {sorted(names)}, got {sorted(header.hyper)}")
    for name, values in header.hyper.items():
        if len(values) != num_groups:
            raise ShapeMismatchError(f"{name}: expected {num_groups} values, one per group, got {len(values)}")
        if any(value != value for value in values):
            raise HyperparameterError(f"{name}: expected numbers, got {list(values)}")


class Inbox:
    """The pushes of one sequence number that have come so far. Nothing of the shard's state is in here."""

    def __init__(self) -> None:
        self._pushes: dict[int, Push] = {}

    def put(self, push: Push) -> None:
        """Keep a push. A repeated one is dropped; a newer attempt replaces an older one.

        Raises:
            AttemptError: If a newer attempt of this rank is here already.
        """
        header = push.header
        held = self._pushes.get(header.rank)
        if held is not None and held.header.incarnation == header.incarnation:
            if held.header.attempt > header.attempt:
                raise AttemptError(
                    f"rank {header.rank}, step {header.sequence}: attempt {header.attempt} came after attempt "
                    f"{held.header.attempt}; the newer one counts"
                )
            if held.header.attempt == header.attempt:
                return
        self._pushes[header.rank] = push

    def drop(self, rank: int) -> None:
        """Forget a rank's push."""
        self._pushes.pop(rank, None)

    @property
    def ranks(self) -> Collection[int]:
        """Ranks that have pushed."""
        return self._pushes.keys()

    @property
    def is_empty(self) -> bool:
        """Whether no rank has pushed."""
        return not self._pushes

    def take(self) -> list[Push]:
        """All pushes in rank order; the box is empty afterwards."""
        pushes = [self._pushes[rank] for rank in sorted(self._pushes)]
        self._pushes = {}
        return pushes
