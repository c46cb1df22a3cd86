"""The vote: one small all-reduce after which every shard has the same decision about a step.

Each shard fills its own row of a matrix and leaves the others zero, so the sum over shards holds every row. The partial
sums of the gradient's norm go with it: *Note: Clipping* in docs/design.md.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import MissingRankError, StepAbortedError
from .push import Push
from .world import World


class Vote(NamedTuple):
    """One shard's row of the matrix; all 0 in what other shards send of it.

    Attributes:
        timeline: The history that it follows.
        sequence: The step that it is about to take.
        missing: The first rank that it lacks, counted from 1; 0 if it lacks none.
        digest: Of the pushes that it holds.
        num_nonfinite: Elements of its averaged gradient that are inf or NaN, and ranks that found some.
    """

    timeline: int
    sequence: int
    missing: int
    digest: int
    num_nonfinite: int


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
    own = Vote(
        timeline,
        sequence,
        missing=missing[0] + 1 if missing else 0,
        digest=int.from_bytes(digest[:8], "big", signed=True),
        num_nonfinite=num_nonfinite,
    )
    votes = [own if index == shard else Vote(0, 0, 0, 0, 0) for index in range(num_shards)]
    return torch.cat((torch.tensor(votes, dtype=torch.int64, device="cpu").view(-1), square_sums.view(torch.int64)))


def open_votes(total: Tensor, num_shards: int) -> tuple[list[Vote], Tensor]:
    """All shards' votes, and the sums of squares, ``(num_segments,)`` float64."""
    end = num_shards * len(Vote._fields)
    rows = total[:end].view(num_shards, -1).tolist()
    return list(itertools.starmap(Vote, rows)), total[end:].view(torch.float64)


def missing_ranks(votes: Sequence[Vote]) -> list[int]:
    """Of each shard the first rank that it lacks, ascending."""
    return sorted({vote.missing - 1 for vote in votes if vote.missing})


def count_votes(votes: Sequence[Vote], *, sequence: int, world: World) -> tuple[Decision, StepAbortedError | None]:
    """The decision, and with ABORT the reason.

    Args:
        votes: All shards' votes.
        sequence: The step.
        world: The ranks that it waited for.
    """
    missing = max(vote.missing for vote in votes)
    if missing:
        shard = [vote.missing for vote in votes].index(missing)
        return Decision.ABORT, MissingRankError(
            f"step {sequence}: rank {missing - 1} of {world.size} did not push to shard {shard} within "
            f"{world.timeout_s:g} s; no shard has changed. Call step() again on every rank, or restart that worker."
        )
    if len({(vote.timeline, vote.sequence, vote.digest) for vote in votes}) > 1:
        return Decision.ABORT, StepAbortedError(
            f"step {sequence}: the shards hold different attempts of it; no shard has changed. "
            "Call step() again on every rank."
        )
    return Decision.SKIP if any(vote.num_nonfinite for vote in votes) else Decision.COMMIT, None
