"""The gradient of a step, from what the ranks push: their mean, or their parts side by side.

The mean is not written down: the passes compute it from the ranks' own memory as they read it, see :meth:`mean` and
:meth:`clipped`. Where a pass runs in many small calls, or ranks are many, it is computed once (:func:`written_out`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from .buffers import Buffers, ExtentBuffers
from .coverage import Gradients, Runs
from .push import Push, PushHeader, by_extent

LARGEST = torch.finfo(torch.float32).max


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """A step's gradient in a run of one extent's tiles. Where a term is None it would change nothing.

    Attributes:
        tiles: The run, counted from the shard's first tile.
        parts: ``(tiles, 256)`` in the wire's dtype, one from each rank that is averaged over; never written.
        here: ``(ranks, num_tensors)`` bool, which tensors each rank has; what lies in the place of others counts as 0.
        gains: ``(ranks,)`` state dtype, what undoes each rank's scale.
        counts: ``(num_tensors,)`` state dtype, by how many ranks a tensor's sum is divided.
        max_value: ``()`` state dtype, the limit of each element.
        coefficient: ``()`` state dtype, what scales the norm down.
    """

    tiles: range
    parts: tuple[Tensor, ...]
    here: Tensor | None = None
    gains: Tensor | None = None
    counts: Tensor | None = None
    max_value: Tensor | None = None
    coefficient: Tensor | None = None

    def of(self, tiles: range) -> Stretch:
        """The same in some of these tiles."""
        if tiles == self.tiles:
            return self
        rows = slice(tiles.start - self.tiles.start, tiles.stop - self.tiles.start)
        return dataclasses.replace(self, tiles=tiles, parts=tuple(part[rows] for part in self.parts))

    def mean(self, tensor_of_tile: Tensor, dtype: torch.dtype) -> Tensor:
        """The mean over the ranks that have a tensor, added in rank order, ``(tiles, 256)`` in the state dtype."""
        total: Tensor | None = None
        for rank, part in enumerate(self.parts):
            grad = part.to(dtype)
            if self.gains is not None:
                grad = grad * self.gains[rank]
            if self.here is not None:
                grad = torch.where(self.here[rank][tensor_of_tile].unsqueeze(-1), grad, 0.0)
            total = grad if total is None else total + grad
        assert total is not None, "a step has at least one rank"
        return total if self.counts is None else total / self.counts[tensor_of_tile].unsqueeze(-1)

    def clipped(self, mean: Tensor) -> Tensor:
        """The mean within the limits, as the rule sees it."""
        if self.max_value is not None:
            mean = torch.clamp(mean, -self.max_value, self.max_value)
        return mean if self.coefficient is None else mean * self.coefficient


Gradient = tuple[tuple[Stretch, ...], ...]
"""A step's gradient, extent by extent: the stretches of each are all its tiles, in order."""


def average(pushes: Sequence[Push], present: Tensor, buffers: Buffers) -> Gradient:
    """The mean of the ranks' gradients, over the ranks that have a tensor; in the memory that they were pushed in.

    Args:
        pushes: All ranks' pushes, in rank order.
        present: ``(world_size, num_tensors)`` bool.
        buffers: The shard's memory, for its tiles and device; not changed.
    """
    numels = [extent.numel for extent in buffers.extents]
    by_rank = [by_extent(push.gradient, numels) for push in pushes]
    scales = [push.header.grad_scale for push in pushes]
    gradient = []
    for index, extent in enumerate(buffers.extents):
        ranks = [_by_start(pieces[index]) for pieces in by_rank]
        starts, terms = sorted({start for pieces in ranks for start in pieces}), _Terms.of(scales, present, extent)
        stretches = [
            terms.mean([_between(pieces, *edges) for pieces in ranks], _tiles(*edges))
            for edges in itertools.pairwise([*starts, extent.numel])
        ]
        gradient.append(tuple(stretches))
    return tuple(gradient)


def _by_start(pieces: Sequence[Tensor]) -> dict[int, Tensor]:
    """Pieces that follow each other, by where they begin."""
    return dict(zip(itertools.accumulate([0, *map(len, pieces[:-1])]), pieces, strict=True))


def _between(pieces: dict[int, Tensor], start: int, stop: int) -> Tensor:
    """What lies between two elements that no edge of a piece lies between."""
    begin = start if start in pieces else max(each for each in pieces if each <= start)
    return pieces[begin][start - begin : stop - begin]


def _tiles(start: int, stop: int) -> range:
    return range(start // TILE_NUMEL, stop // TILE_NUMEL)


def assemble(pushes: Sequence[Push], present: Tensor, buffers: Buffers, runs: Sequence[Sequence[Runs]]) -> Gradient:
    """Put the ranks' parts of a gradient that is reduced already side by side; no two ranks push the same element.

    What is of whole tiles stays in the memory that it was pushed in; else it is copied, each rank's scale undone.

    Args:
        pushes: All ranks' pushes, in rank order.
        present: ``(world_size, num_tensors)`` bool.
        buffers: The shard's memory, for its tiles and device; not changed.
        runs: Per rank and extent, where what it pushes lies, counted from the shard's first tile.

    """
    gradient = []
    for index, extent in enumerate(buffers.extents):
        its_runs = [each[index] for each in runs]
        if _are_whole_tiles(its_runs, extent):
            gradient.append(_side_by_side(pushes, index, present, its_runs, extent))
        else:
            gradient.append((_put_together(pushes, index, present, its_runs, extent),))
    return tuple(gradient)


def _are_whole_tiles(runs: Sequence[Runs], extent: ExtentBuffers) -> bool:
    """Whether the ranks' runs are of whole tiles, one for each rank at most, and follow each other in rank order."""
    edges = [edge for each in runs for edge in each.reshape(-1).tolist()]
    follow = edges[::2] == [0, *edges[1:-1:2]] and edges[-1:] == [extent.numel]
    return follow and all(len(each) <= 1 for each in runs) and not any(edge % TILE_NUMEL for edge in edges)


def _side_by_side(
    pushes: Sequence[Push], index: int, present: Tensor, runs: Sequence[Runs], extent: ExtentBuffers
) -> tuple[Stretch, ...]:
    stretches = []
    for rank, (push, its_runs) in enumerate(zip(pushes, runs, strict=True)):
        for start, stop in its_runs.tolist():
            terms = _Terms.of([push.header.grad_scale], present[rank : rank + 1], extent)
            stretches.append(terms.mean([push.gradient[index]], _tiles(start, stop)))
    return tuple(stretches)


def _put_together(
    pushes: Sequence[Push], index: int, present: Tensor, runs: Sequence[Runs], extent: ExtentBuffers
) -> Stretch:
    whole = torch.zeros(extent.numel, dtype=extent.extent.dtype, device=extent.device)
    for push, its_runs, here in zip(pushes, runs, present, strict=True):
        values, scale = push.gradient[index].to(extent.device), push.header.grad_scale
        if scale != 1.0:
            values = values.to(extent.extent.dtype) * (1.0 / scale)
        _place(whole, values, its_runs, here[extent.tensor_of_tile_on_cpu])
    here = present.any(dim=0, keepdim=True).to(extent.device)
    return Stretch(range(len(extent.tiles)), (whole.view(-1, TILE_NUMEL),), here)


def is_surely_finite(headers: Sequence[PushHeader], gradients: Gradients) -> bool:
    """Whether what the ranks say of their gradients shows that no element of the step's gradient is inf or NaN.

    No rank has inf or NaN, of which its ``max_abs`` a would be one; so it is about overflows. A rank's elements, of
    magnitude max(a, 1) at most, are multiplied by 1/s if it has a scale s: that is at most b = max(a, 1)/s, but for
    roundings, of which in 24 bits or more each changes a value by a factor of 1 + 2^-24 at most. Without a scale there
    is none, and b need only be a float32; else it is to be below half of the largest one, L, and then 1/s does not
    overflow either (inf times 0 would be NaN). Where ranks are added up, the sum of all b is to be below L/2: the
    roundings of fewer than ten million additions do not double it, and a mean is no larger than the sum. What lies in
    the places of absent tensors enters neither a nor the gradient.

    Args:
        headers: Those of all ranks.
        gradients: What ranks' gradients mean.
    """
    bounds = [math.inf if each.max_abs is None else max(each.max_abs, 1.0) / each.grad_scale for each in headers]
    if gradients == "local" and len(headers) > 1:
        return sum(bounds) < LARGEST / 2
    return all(
        bound <= LARGEST if each.grad_scale == 1.0 else bound < LARGEST / 2
        for bound, each in zip(bounds, headers, strict=True)
    )


def limited(gradient: Gradient, max_value: float | None, coefficient: float, buffers: Buffers) -> Gradient:
    """The gradient with limits for its passes to observe."""

    def term(value: float | None, trivial: float, extent: ExtentBuffers) -> Tensor | None:
        is_needed = value is not None and value != trivial
        return torch.tensor(value, dtype=extent.extent.dtype, device=extent.device) if is_needed else None

    def observed(stretches: tuple[Stretch, ...], extent: ExtentBuffers) -> tuple[Stretch, ...]:
        value, scale = term(max_value, torch.inf, extent), term(coefficient, 1.0, extent)
        return tuple(dataclasses.replace(each, max_value=value, coefficient=scale) for each in stretches)

    return tuple(observed(*each) for each in zip(gradient, buffers.extents, strict=True))


def with_all_terms(stretch: Stretch, dtype: torch.dtype) -> Stretch:
    """The same gradient with no term left out, so that what is compiled for one step fits every other."""
    device, ranks = stretch.parts[0].device, len(stretch.parts)
    return dataclasses.replace(
        stretch,
        gains=_constant(1.0, (ranks,), dtype, device) if stretch.gains is None else stretch.gains,
        max_value=_constant(torch.inf, (), dtype, device) if stretch.max_value is None else stretch.max_value,
        coefficient=_constant(1.0, (), dtype, device) if stretch.coefficient is None else stretch.coefficient,
    )


@functools.cache
def _constant(value: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once, as every step has the same; nobody writes it."""
    return torch.full(shape, value, dtype=dtype, device=device)


def written_out(stretch: Stretch, extent: ExtentBuffers, pieces: Iterable[range]) -> Stretch:
    """The same gradient with its mean computed, in pieces that stay in cache; limits stay to be observed."""
    assert stretch.here is not None, "computed once"
    parts = stretch.parts
    # Rather of all tensors at once than of those of an extent, which are found one by one.
    is_whole = len(parts) == 1 and bool(stretch.here.all() or stretch.here[0, list(extent.extent.params)].all())
    if not is_whole or stretch.gains is not None:
        written = torch.empty(len(stretch.tiles), TILE_NUMEL, dtype=extent.extent.dtype, device=extent.device)
        for tiles in pieces:
            rows = slice(tiles.start - stretch.tiles.start, tiles.stop - stretch.tiles.start)
            tensors = extent.tensor_of_tile[tiles.start : tiles.stop]
            written[rows] = stretch.of(tiles).mean(tensors, extent.extent.dtype)
        parts = (written,)
    return Stretch(stretch.tiles, parts, max_value=stretch.max_value, coefficient=stretch.coefficient)


@dataclasses.dataclass(frozen=True, slots=True)
class _Terms:
    """What all stretches of an extent have alike, see :class:`Stretch`; ``device`` is the shard's."""

    device: torch.device
    here: Tensor
    gains: Tensor | None
    counts: Tensor | None

    @classmethod
    def of(cls, scales: Sequence[float], present: Tensor, extent: ExtentBuffers) -> _Terms:
        """Those of ranks with these scales, of which ``present`` says what each has."""
        dtype, device = extent.extent.dtype, extent.device
        inverse = torch.tensor([1.0 / scale for scale in scales], dtype=torch.float64, device="cpu")
        return cls(
            device,
            here=present.to(device),
            gains=None if all(scale == 1.0 for scale in scales) else inverse.to(device, dtype),
            counts=present.sum(dim=0).clamp_min(1).to(device, dtype) if len(scales) > 1 else None,
        )

    def mean(self, parts: Sequence[Tensor], tiles: range) -> Stretch:
        """One of the stretches, of which ``parts`` are the ranks'."""
        rows = tuple(part.to(self.device).view(-1, TILE_NUMEL) for part in parts)
        return Stretch(tiles, rows, here=self.here, gains=self.gains, counts=self.counts)


def _place(whole: Tensor, values: Tensor, runs: Runs, present: Tensor) -> None:
    """Copy one rank's packed values to their runs; ``present`` is ``(tiles,)`` bool.

    A run that is not of whole tiles lies within one tensor, so that its tiles are all present or all absent.
    """
    all_present, taken = bool(present.all()), 0
    for start, stop in runs.tolist():
        target, part = whole[start:stop], values[taken : taken + stop - start]
        taken += stop - start
        here = present[start // TILE_NUMEL : -(-stop // TILE_NUMEL)]
        if all_present or bool(here.all()):
            target.copy_(part)
        elif bool(here.any()):
            kept = here[:, None].to(whole.device)
            target.copy_(torch.where(kept, part.view(-1, TILE_NUMEL), 0.0).view(-1))
