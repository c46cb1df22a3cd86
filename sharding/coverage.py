"""Coverage: which part of the flat space a worker holds, and what of it each shard sees.

A worker of a replicated or sharded model has a share of every gradient and needs only what it holds of the parameters.
It names *ranges* of flattened tensors, which mean the same under any layout; a :class:`Coverage` is where these ranges
lie in one layout. The ranges that workers push must cover every element exactly once, see :func:`require_exact_cover`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..optim import TILE_NUMEL
from .errors import CoverageError, MessageError
from .layout import Extent, Layout, ParamSpec

Gradients = Literal["local", "replicated", "sharded"]
"""What a rank's gradient means: its own, to be averaged over ranks; the same on all ranks, as DDP leaves it; or the
part that this rank holds of a gradient which is reduced already, as FSDP leaves it."""

Part = Literal["pushed", "held"]
"""Which of a rank's two coverages: what it pushes gradients of, or what it holds."""

GRADIENTS: tuple[Gradients, ...] = get_args(Gradients)


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """Elements ``offset`` to ``offset + numel`` of a flattened tensor."""

    offset: int
    numel: int


@dataclasses.dataclass(frozen=True, slots=True)
class Holdings:
    """What one rank of a sharded model holds, a range for each parameter; may be empty.

    Attributes:
        pushed: What it pushes: its share of what it holds, where several ranks hold the same.
        held: What it holds, and gets back after each step.
    """

    pushed: tuple[Range, ...]
    held: tuple[Range, ...]

    def to_lists(self) -> dict[str, list[list[int]]]:
        """Plain values for a message."""
        return {
            name: [[part.offset, part.numel] for part in ranges]
            for name, ranges in (("pushed", self.pushed), ("held", self.held))
        }

    @classmethod
    def from_lists(cls, fields: Any, params: Sequence[ParamSpec]) -> Holdings:
        """The reverse of :meth:`to_lists`, checked against the parameters.

        Raises:
            MessageError: If there is not one range within each parameter, or one is pushed that is not held.
        """
        try:
            pushed, held = (tuple(Range(int(o), int(n)) for o, n in fields[name]) for name in ("pushed", "held"))
        except (KeyError, TypeError, ValueError) as error:
            raise MessageError(f"holdings: expected pushed and held ranges; {type(error).__name__}: {error}") from error
        if not len(pushed) == len(held) == len(params):
            raise MessageError(
                f"holdings: expected a range for each of {len(params)} parameters, got {len(pushed)} and {len(held)}"
            )
        for param, push, hold in zip(params, pushed, held, strict=True):
            is_inside = hold.offset >= 0 and hold.numel >= 0 and hold.offset + hold.numel <= param.numel
            is_held = push.numel >= 0 and hold.offset <= push.offset
            if not is_inside or not is_held or push.offset + push.numel > hold.offset + hold.numel:
                raise MessageError(
                    f"holdings of '{param.name}': expected {push} within {hold} within {param.numel} elements"
                )
        return cls(pushed, held)


Runs = NDArray[np.int64]
"""``(num_runs, 2)``: start and stop of runs of elements of an extent, padding counted; ascending, not empty."""


class Coverage:
    """Where the elements that a rank holds lie in a layout; packed one after the other they travel as one flat array.

    A run either begins and ends on tile boundaries, and then includes padding, or lies within one tensor.

    Args:
        runs: Per extent.

    Attributes:
        runs: Per extent.
    """

    def __init__(self, runs: Sequence[Runs]) -> None:
        self.runs = tuple(runs)
        lengths = (each[:, 1] - each[:, 0] for each in self.runs)
        self._packed = [np.concatenate(([0], np.cumsum(each))) for each in lengths]

    @classmethod
    def whole(cls, layout: Layout) -> Coverage:
        """Everything, padding included."""
        return cls([_as_runs([(0, extent.padded_numel)]) for extent in layout.extents])

    @classmethod
    def share(cls, layout: Layout, rank: int, world_size: int) -> Coverage:
        """A rank's equal share of a model that every rank has: a run of tiles of each extent."""
        return cls([_as_runs([_share(extent, rank, world_size)]) for extent in layout.extents])

    @classmethod
    def of_ranges(cls, layout: Layout, ranges: Sequence[Range]) -> Coverage:
        """Where a range of each parameter lies."""
        runs = []
        for extent in layout.extents:
            starts = extent.first_tile[:-1] * TILE_NUMEL
            edges = [
                (start + ranges[index].offset, start + ranges[index].offset + ranges[index].numel)
                for index, start in zip(extent.params, starts.tolist(), strict=True)
            ]
            runs.append(_as_runs(edges))
        return cls(runs)

    def numel(self, extent: int) -> int:
        """Elements of an extent that the rank holds."""
        return int(self._packed[extent][-1])

    def within(self, extent: int, start: int, stop: int) -> tuple[Runs, slice]:
        """What lies in elements ``start`` to ``stop`` of an extent.

        Returns:
            The runs, counted from ``start``; and where they lie in the packed array.
        """
        runs, packed = self.runs[extent], self._packed[extent]
        first = int(np.searchsorted(runs[:, 1], start, side="right"))
        last = int(np.searchsorted(runs[:, 0], stop, side="left"))
        if first >= last or start >= stop:
            return np.zeros((0, 2), np.int64), slice(0, 0)
        cut = np.clip(runs[first:last], start, stop)
        begin = int(packed[first] + cut[0, 0] - runs[first, 0])
        return cut - start, slice(begin, begin + int((cut[:, 1] - cut[:, 0]).sum()))


def packed(flat: Tensor, runs: Runs) -> Tensor:
    """The elements of ``runs`` one after the other; shares memory where there is one run."""
    parts = [flat[start:stop] for start, stop in runs.tolist()]
    return parts[0] if len(parts) == 1 else torch.cat([flat[:0], *parts])


def share_tiles(extent: Extent, world_size: int) -> int:
    """Tiles of an extent in one rank's share; the last ranks' shares may be smaller."""
    return -(-extent.num_tiles // world_size)


def coverage_of(
    layout: Layout, gradients: Gradients, rank: int, world_size: int, holdings: Holdings | None
) -> tuple[Coverage, Coverage]:
    """What a rank pushes, and what it holds.

    Args:
        layout: The flat space.
        gradients: What its gradients mean.
        rank: The rank.
        world_size: How many there are.
        holdings: With ``"sharded"``, what it holds.
    """
    if gradients == "sharded":
        assert holdings is not None, "checked at registration"
        return Coverage.of_ranges(layout, holdings.pushed), Coverage.of_ranges(layout, holdings.held)
    whole = Coverage.whole(layout)
    return (Coverage.share(layout, rank, world_size) if gradients == "replicated" else whole), whole


def require_exact_cover(params: Sequence[ParamSpec], holdings: Mapping[int, Holdings]) -> None:
    """See that the ranks of a sharded model push every element exactly once.

    Args:
        params: All parameters.
        holdings: Of every rank.

    Raises:
        CoverageError: Naming the first parameter with a gap or an overlap.
    """
    for index, param in enumerate(params):
        by_offset = sorted(
            (held.pushed[index].offset, held.pushed[index].numel, rank) for rank, held in holdings.items()
        )
        reached, before = 0, -1
        for offset, numel, rank in by_offset:
            if numel and offset != reached:
                kind, who = (
                    ("gap", "no rank holds") if offset > reached else ("overlap", f"ranks {before} and {rank} push")
                )
                first, last = sorted((offset, reached))
                raise CoverageError(_describe(param, kind, f"{who} elements {first} to {last}"))
            reached, before = reached + numel, rank if numel else before
        if reached != param.numel:
            raise CoverageError(_describe(param, "gap", f"no rank holds elements {reached} to {param.numel}"))


def _describe(param: ParamSpec, kind: str, what: str) -> str:
    return (
        f"parameter '{param.name}' {list(param.shape)}: there is a {kind} in what the ranks hold of it: {what}. "
        "Every rank must give the optimizer the same parameters, sharded over all of them"
    )


def _share(extent: Extent, rank: int, world_size: int) -> tuple[int, int]:
    each = share_tiles(extent, world_size)
    first, last = (min(each * edge, extent.num_tiles) * TILE_NUMEL for edge in (rank, rank + 1))
    return first, last


def _as_runs(edges: Sequence[tuple[int, int]]) -> Runs:
    runs = np.asarray([edge for edge in edges if edge[0] < edge[1]], dtype=np.int64)
    return runs.reshape(-1, 2)
