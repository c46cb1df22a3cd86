"""What a shard tells: of a push, of a step, of itself."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from .errors import StepAbortedError
from .vote import Decision
from .world import World


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
        grad_norm: The gradient's norm before it was clipped to it, if a limit was set. After a SKIP it may be infinite
            or NaN.
        ranks: With COMMIT or SKIP: those whose gradients it was taken with, ascending.
    """

    sequence: int
    decision: Decision
    scalars: Mapping[str, float]
    error: StepAbortedError | None = None
    grad_norm: float | None = None
    ranks: tuple[int, ...] = ()


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
    world: World
