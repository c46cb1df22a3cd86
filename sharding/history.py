"""Which steps a shard has taken: its timeline and numbers, and what the last step was taken with."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from .chronicle import Chronicle
from .errors import AttemptError, FutureRequestError, StaleRequestError, TimelineError
from .push import Push, PushHeader
from .reports import StepResult
from .vote import Decision


class History:
    """See *Note: Timeline, sequence, attempt, incarnation* in docs/design.md.

    Args:
        timeline: The history that begins with this object.

    Attributes:
        timeline: The present one.
        sequence: Operations so far.
        num_steps: Steps so far, skipped ones included.
        num_skipped: Steps of these that were skipped.
        last_result: Of the last step; None if this timeline had none yet.
        last_sums: What its vectors added up to over all shards.
        chronicle: What each step brought, from the first on that led here.
    """

    def __init__(self, timeline: int) -> None:
        self.sequence, self.num_steps, self.num_skipped = 0, 0, 0
        self.chronicle = Chronicle()
        self.begin(timeline)

    def begin(self, timeline: int) -> None:
        """Begin a new timeline."""
        self.timeline = timeline
        self.last_result: StepResult | None = None
        self.last_sums: Sequence[Tensor] = ()
        self._taken: dict[int, PushHeader] = {}

    def copied(self) -> History:
        """As it is now, while steps go on."""
        other = copy.copy(self)
        other.chronicle = self.chronicle.copied()
        return other

    def go_on_from(self, sequence: int, num_steps: int, num_skipped: int) -> None:
        """Take over the numbers of a state that is loaded; steps after it led nowhere."""
        self.sequence, self.num_steps, self.num_skipped = sequence, num_steps, num_skipped
        self.chronicle.cut(num_steps)

    def note(
        self, result: StepResult, pushes: Sequence[Push], sums: Sequence[Tensor], seconds: Mapping[str, float]
    ) -> None:
        """Count a step that was taken or skipped, with these pushes and sums; ``seconds`` by phase."""
        self.last_result, self.last_sums = result, tuple(sums)
        self._taken = {push.header.rank: push.header for push in pushes}
        self.sequence += 1
        self.num_steps += 1
        self.num_skipped += result.decision is Decision.SKIP
        self.chronicle.note(self._row(result, [push.header for push in pushes], seconds))

    def result(self, timeline: int, sequence: int) -> StepResult | None:
        """See :meth:`stepwell.sharding.Shard.result`."""
        self.require_sequence(timeline, sequence)
        if self.last_result is not None and self.last_result.sequence == sequence:
            return self.last_result
        return None

    def taken_with(self, rank: int) -> PushHeader | None:
        """With which push of a rank the last step was taken; None if it was taken without this rank.

        Raises:
            StaleRequestError: If this timeline had no step yet.
        """
        if self.last_result is None:
            raise StaleRequestError(f"step {self.sequence} was decided before this timeline began; call refresh()")
        return self._taken.get(rank)

    def taken_otherwise(self, rank: int) -> AttemptError:
        """What to tell whom the last step was taken without."""
        taken = self._taken.get(rank)
        how = (
            f"without rank {rank}"
            if taken is None
            else f"with another push of rank {rank} (attempt {taken.attempt} of process {taken.incarnation})"
        )
        return AttemptError(
            f"step {self.sequence} was taken {how}; call step() again, which takes its result over and goes on after it"
        )

    def require_sequence(self, timeline: int, sequence: int) -> None:
        """Refuse a request that is neither of the last step nor of the next one.

        Raises:
            SequenceError: One of its subclasses, by what is off.
        """
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

    def _row(self, result: StepResult, headers: Sequence[PushHeader], seconds: Mapping[str, float]) -> dict[str, float]:
        """What the last step brought, by column; see *Note: A run's history* in docs/design.md."""
        losses = [header.loss for header in headers if header.loss is not None]
        lrs = (headers[0].hyper or {}).get("lr", ())
        row: dict[str, float] = {
            "step": self.num_steps,
            "time_s": time.time(),
            "timeline": self.timeline,
            "sequence": self.sequence,
            "skipped_steps": self.num_skipped,
            "workers": len(headers),
        }
        if losses:
            row["loss"] = sum(losses) / len(losses)
        if result.grad_norm is not None:
            row["grad_norm"] = result.grad_norm
        row.update({"lr" if len(lrs) == 1 else f"lr[{group}]": lr for group, lr in enumerate(lrs)})
        row.update(result.scalars)
        row.update({f"{phase}_s": duration for phase, duration in seconds.items()})
        return row
