"""What the figures are to be, and whether they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from harness import Row

NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """A limit for one field of one row.

    Attributes:
        figure: What is measured, in words.
        label: The same in few words, for the picture.
        key: How the row's key begins; a row without a key is found by its name.
        field: ``ratio``, ``speedup`` (one over it), ``bandwidth`` or ``ours``.
        limit: What it is to be.
        unit: What stands behind the number.
    """

    figure: str
    label: str
    key: str
    field: str
    limit: float
    unit: str = ""

    @property
    def at_least(self) -> bool:
        """Whether the limit is the least that it is to be, not the most."""
        return self.field in ("speedup", "bandwidth")

    def value(self, row: Row) -> float | None:
        """The row's figure."""
        if self.field == "speedup":
            return None if row.ratio is None else 1.0 / row.ratio
        value: float | None = getattr(row, self.field)
        return value


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and what was measured.

    Attributes:
        goal: The goal.
        value: The figure; None if it was not measured.
    """

    goal: Goal
    value: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.goal.limit if self.goal.at_least else self.value <= self.goal.limit

    @property
    def shortfall(self) -> float | None:
        """By what factor a goal is missed: 2 is half as good; None if it is met or was not measured."""
        if self.value is None or self.is_met:
            return None
        return self.goal.limit / self.value if self.goal.at_least else self.value / self.goal.limit


_PRODIGYOPT, _ADAMW = "prodigyopt", "torch AdamW, fused"

GOALS = (
    Goal(
        "bandwidth of Prodigy through the service, 128 M, 2 shards (56 bytes per parameter), against fused AdamW's",
        "bandwidth, 128 M",
        f"step/128 M/given/Prodigy, 2 shards/{_PRODIGYOPT}",
        "bandwidth",
        0.90,
    ),
    Goal(
        'the same with eps_d="old" (44 bytes per parameter)',
        "bandwidth, 128 M, one pass",
        f'step/128 M/given/Prodigy, eps_d="old", 2 shards/{_PRODIGYOPT}',
        "bandwidth",
        0.90,
    ),
    Goal(
        "that step against prodigyopt in one process",
        "prodigyopt, 128 M",
        f"step/128 M/given/Prodigy, 2 shards/{_PRODIGYOPT}",
        "speedup",
        5.5,
        "times faster",
    ),
    Goal(
        'the same with eps_d="old"',
        "prodigyopt, 128 M, one pass",
        f'step/128 M/given/Prodigy, eps_d="old", 2 shards/{_PRODIGYOPT}',
        "speedup",
        7.0,
        "times faster",
    ),
    Goal(
        "LoRA, 600 tensors, 4 M parameters, in process, against prodigyopt",
        "prodigyopt, LoRA",
        f"step/LoRA/given/Prodigy, in process/{_PRODIGYOPT}",
        "speedup",
        8.0,
        "times faster",
    ),
    Goal(
        "AdamW through the service against torch's fused AdamW in one process, 128 M",
        "AdamW, 128 M",
        f"step/128 M/given/AdamW, 2 shards/{_ADAMW}",
        "ratio",
        1.3,
    ),
    Goal(
        "the service against the same kernels in one process, 32 M",
        "in process, 32 M",
        "step/32 M/given/Prodigy, 2 shards/Prodigy, in process",
        "ratio",
        1.05,
    ),
    Goal(
        "the same, 128 M",
        "in process, 128 M",
        "step/128 M/given/Prodigy, 2 shards/Prodigy, in process",
        "ratio",
        1.05,
    ),
    Goal("1 M parameters: the service's step less its kernels", "latency, 1 M", "step/1 M/latency", "ours", 2.0, "ms"),
    Goal(
        "two workers, Prodigy, 32 M, against all_reduce and prodigyopt on each",
        "two workers",
        "workers/given/Prodigy, 2 shards/",
        "speedup",
        5.0,
        "times faster",
    ),
    Goal("the object-store path against its raw transfers", "object store", "transport/object store", "ratio", 1.25),
    Goal("a save against writing the same bytes with dd", "save", "save, 2 Ray shards / dd", "ratio", 1.25),
    Goal("the stall of an asynchronous save against DCP's", "stall", "stall, 2 Ray shards / async_save", "ratio", 1.0),
    Goal(
        "memory of the shards over the sum of their slots, Prodigy", "memory, Prodigy", "memory/Prodigy", "ratio", 1.05
    ),
    Goal("the same, AdamW", "memory, AdamW", "memory/AdamW", "ratio", 1.05),
    Goal("the step with redundancy against the step without, 32 M", "redundancy", "redundancy/32 M", "ratio", 1.25),
    Goal(
        "one H100, 1 B parameters, Prodigy: bandwidth against a copy's",
        "H100, bandwidth",
        "gpu/1 B/Prodigy",
        "bandwidth",
        0.85,
    ),
    Goal(
        "one H100, 600 LoRA tensors, against prodigyopt",
        "H100, LoRA",
        "gpu/LoRA/Prodigy",
        "speedup",
        20.0,
        "times faster",
    ),
)


def judge(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Each goal with what was measured."""
    return [Verdict(goal, _measured(goal, rows)) for goal in goals]


def _measured(goal: Goal, rows: Sequence[Row]) -> float | None:
    for row in rows:
        if (row.key or row.name).startswith(goal.key):
            return goal.value(row)
    return None
