"""The vote: one small all-reduce after which every shard has the same decision about a step.

Each shard fills its own row of a matrix and leaves the others zero, so the sum over shards holds every row. The partial
sums of the gradient's norm go with it: *Note: Clipping* in docs/design.md.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import MissingRankError, StepAbortedError
from .push import Push
from .world import World

_NUM_COLUMNS = 5
_TIMELINE, _SEQUENCE, _MISSING, _DIGEST, _NONFINITE = range(_NUM_COLUMNS)


class Decision(enum.Enum):
    """What the vote says, the same on every shard."""

    COMMIT = "commit"
    SKIP = "skip"
    ABORT = "abort"


def cast_vote(
    shard: int,
    num_shards: int,
    *,
    timeline: int,
    sequence: int,
    pushes: Sequence[Push],
    missing: Sequence[int],
    num_nonfinite: int,
    square_sums: Tensor,
) -> Tensor:
    """One shard's vote on a step, and its sums for the gradient's norm.

    Args:
        shard: The shard.
        num_shards: How many there are.
        timeline: The history that it follows.
        sequence: The step.
        pushes: What it holds, in rank order.
        missing: Ranks that it lacks.
        num_nonfinite: Elements of its averaged gradient that are inf or NaN.
        square_sums: ``(num_segments,)`` float64, zero in the other shards' segments.

    Returns:
        ``(num_shards * 5 + num_segments,)`` int64: a row for each shard, zero in the others', and the sums' bits.
    """
    digest = hashlib.sha256(b"".join(push.header.digest() for push in pushes)).digest()
    votes = torch.zeros(num_shards, _NUM_COLUMNS, dtype=torch.int64)
    votes[shard, _TIMELINE] = timeline
    votes[shard, _SEQUENCE] = sequence
    votes[shard, _MISSING] = missing[0] + 1 if missing else 0
    votes[shard, _DIGEST] = int.from_bytes(digest[:8], "big", signed=True)
    votes[shard, _NONFINITE] = num_nonfinite
    return torch.cat((votes.view(-1), square_sums.view(torch.int64)))


def open_votes(total: Tensor, num_shards: int) -> tuple[Tensor, Tensor]:
    """All shards' votes, ``(num_shards, 5)`` int64, and the sums of squares, ``(num_segments,)`` float64."""
    end = num_shards * _NUM_COLUMNS
    return total[:end].view(num_shards, _NUM_COLUMNS), total[end:].view(torch.float64)


def missing_ranks(votes: Tensor) -> list[int]:
    """Of each shard the first rank that it lacks, ascending."""
    return sorted({missing - 1 for missing in votes[:, _MISSING].tolist() if missing})


def count_votes(votes: Tensor, *, sequence: int, world: World) -> tuple[Decision, StepAbortedError | None]:
    """The decision, and with ABORT the reason.

    Args:
        votes: All shards' votes, ``(num_shards, 5)`` int64.
        sequence: The step.
        world: The ranks that it waited for.
    """
    missing = int(votes[:, _MISSING].max())
    if missing:
        shard = int(votes[:, _MISSING].argmax())
        return Decision.ABORT, MissingRankError(
            f"step {sequence}: rank {missing - 1} of {world.size} did not push to shard {shard} within "
            f"{world.timeout_s:g} s; no shard has changed. Call step() again on every rank, or restart that worker."
        )
    compared = votes[:, [_TIMELINE, _SEQUENCE, _DIGEST]]
    if not bool((compared == compared[0]).all()):
        return Decision.ABORT, StepAbortedError(
            f"step {sequence}: the shards hold different attempts of it; no shard has changed. "
            "Call step() again on every rank."
        )
    return Decision.SKIP if bool(votes[:, _NONFINITE].any()) else Decision.COMMIT, None
