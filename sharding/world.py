"""The ranks that a job's steps wait for, and what becomes of a step that one of them stays away from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping

from .errors import RankExcludedError, UnknownRankError


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """A value that steps and the coordinator replace, the same on every shard. See *Note: Elastic jobs*.

    Attributes:
        ranks: Whom a step waits for, ascending. They are averaged in this order; the first one's hyperparameters count.
        is_elastic: Whether ranks may come and go; else they are 0 to world size - 1 for good.
        excluded: Ranks that the job goes on without, since they did not push in time; and the first such step.
        timeout_s: How long a step waits for the last rank after the first.
    """

    ranks: tuple[int, ...]
    is_elastic: bool = False
    excluded: Mapping[int, int] = dataclasses.field(default_factory=dict)
    timeout_s: float = math.inf

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)

    def of_size(self, size: int) -> World:
        """A world of ranks 0 to ``size`` - 1, under the same policy."""
        return dataclasses.replace(self, ranks=tuple(range(size)), excluded={})

    def joined(self, rank: int) -> World:
        """The world with one more rank."""
        excluded = {other: step for other, step in self.excluded.items() if other != rank}
        return dataclasses.replace(self, ranks=tuple(sorted({*self.ranks, rank})), excluded=excluded)

    def left(self, rank: int) -> World:
        """The world without a rank that has said goodbye; the last one stays, as nobody would be there to step."""
        ranks = tuple(other for other in self.ranks if other != rank)
        return dataclasses.replace(self, ranks=ranks or self.ranks)

    def without(self, missing: Collection[int], *, step: int) -> World:
        """The world that takes a step which ``missing`` ranks stay away from; the same if it is not to be taken."""
        ranks = tuple(rank for rank in self.ranks if rank not in missing)
        if not self.is_elastic or not ranks or len(ranks) == self.size:
            return self
        excluded = {**self.excluded, **{rank: step for rank in self.ranks if rank in missing}}
        return dataclasses.replace(self, ranks=ranks, excluded=excluded)

    def missing_from(self, here: Iterable[int]) -> list[int]:
        """Which ranks are not among those that are here."""
        present = set(here)
        return [rank for rank in self.ranks if rank not in present]

    def is_heard(self, rank: int) -> bool:
        """Whether a rank says hyperparameters and limits: in an elastic job any may turn out to be the first."""
        return self.is_elastic or rank == self.ranks[0]

    def require(self, rank: int) -> None:
        """Refuse a rank that no step waits for.

        Raises:
            RankExcludedError: If the job goes on without it.
            UnknownRankError: If it is none of the job's.
        """
        if rank in self.ranks:
            return
        if rank in self.excluded:
            raise RankExcludedError(
                f"rank {rank}: from step {self.excluded[rank]} on the job goes on with ranks {self}, as this one did "
                f"not push within {self.timeout_s:g} s. Call refresh() to join it again, or end"
            )
        raise UnknownRankError(f"expected one of ranks {self}, got {rank}")

    def __str__(self) -> str:
        """The ranks, in short where none is left out."""
        is_whole = self.ranks == tuple(range(self.size))
        return f"0 to {self.size - 1}" if is_whole else ", ".join(map(str, self.ranks))
