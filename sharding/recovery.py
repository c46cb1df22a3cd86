"""What shards that lost a peer in mid-step tell each other, so that all of them finish the same steps.

Nobody begins a step before all have voted on it, so no shard is behind another by more than one. A step rests on each
shard where a sum did not come. Sums that any shard has had are handed to those that have not; what nobody has had is
summed anew, from the same vectors, and comes out the same. A rebuilt shard takes the steps of its log again, and rests
in the last one as the others do. So a step whose pushes all shards have logged is taken, and one that a shard has lost
is voted down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .push import Push

Sums = Mapping[int, Sequence[Tensor]]
"""Step to what its vectors added up to over all shards, the vote first; as far as they are known."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedStep:
    """A step as it can be taken again, by a shard that has lost it.

    Attributes:
        pushes: All ranks', in rank order.
        sums: What its vectors added up to over all shards, the vote first; as many as are known.
    """

    pushes: tuple[Push, ...]
    sums: Sequence[Tensor] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """Where one shard stands.

    Attributes:
        sequence: Steps that it has done.
        sums: All those of the last step that it has done, and those so far of one that is under way.
    """

    sequence: int
    sums: Sums

    @property
    def is_stepping(self) -> bool:
        """Whether a step is under way."""
        return self.sequence + 1 in self.sums


def known_sums(standings: Iterable[Standing]) -> Sums:
    """For each step the most that any shard knows of its sums."""
    known: dict[int, Sequence[Tensor]] = {}
    for standing in standings:
        for step, sums in standing.sums.items():
            if len(sums) > len(known.get(step, ())):
                known[step] = sums
    return known
