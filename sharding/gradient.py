"""The gradient of a step, from what the ranks push: their mean, or their parts side by side.

The mean is not written down: the passes compute it from the ranks' own memory as they read it, see :meth:`mean` and
:meth:`clipped`. Where a pass runs in many small calls, or ranks are many, it is computed once (:func:`written_out`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from .buffers import Buffers, ExtentBuffers
from .coverage import Runs
from .push import Push


@dataclasses.dataclass(frozen=True, slots=True)
class ExtentGradient:
    """One extent's part of a step's gradient. Where a term is None it would change nothing.

    Attributes:
        parts: ``(tiles, 256)`` in the wire's dtype, one from each rank that is averaged over; never written.
        here: ``(ranks, num_tensors)`` bool, which tensors each rank has; what lies in the place of others counts as 0.
        gains: ``(ranks,)`` state dtype, what undoes each rank's scale.
        counts: ``(num_tensors,)`` state dtype, by how many ranks a tensor's sum is divided.
        max_value: ``()`` state dtype, the limit of each element.
        coefficient: ``()`` state dtype, what scales the norm down.
    """

    parts: tuple[Tensor, ...]
    here: Tensor | None = None
    gains: Tensor | None = None
    counts: Tensor | None = None
    max_value: Tensor | None = None
    coefficient: Tensor | None = None

    def of(self, rows: slice) -> ExtentGradient:
        """The tiles of ``rows``."""
        return dataclasses.replace(self, parts=tuple(part[rows] for part in self.parts))

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


Gradient = tuple[ExtentGradient, ...]
"""A step's gradient, extent by extent."""


def average(pushes: Sequence[Push], present: Tensor, buffers: Buffers) -> Gradient:
    """The mean of the ranks' gradients, over the ranks that have a tensor; in the memory that they were pushed in.

    Args:
        pushes: All ranks' pushes, in rank order.
        present: ``(world_size, num_tensors)`` bool.
        buffers: The shard's memory, for its tiles and device; not changed.
    """
    scales = [push.header.grad_scale for push in pushes]
    return tuple(
        _average_extent([push.gradient[index] for push in pushes], scales, present, extent)
        for index, extent in enumerate(buffers.extents)
    )


def assemble(pushes: Sequence[Push], present: Tensor, buffers: Buffers, runs: Sequence[Sequence[Runs]]) -> Gradient:
    """Put the ranks' parts of a gradient that is reduced already side by side; no two ranks push the same element.

    Each rank's scale is undone, in the state dtype.

    Args:
        pushes: All ranks' pushes, in rank order.
        present: ``(world_size, num_tensors)`` bool.
        buffers: The shard's memory, for its tiles and device; not changed.
        runs: Per rank and extent, where what it pushes lies, counted from the shard's first tile.

    Returns:
        One part per extent in the state dtype, zero where a tensor is absent and in padding.
    """
    grads = []
    for index, extent in enumerate(buffers.extents):
        whole = torch.zeros(extent.numel, dtype=extent.extent.dtype, device=extent.device)
        for push, its_runs, here in zip(pushes, runs, present, strict=True):
            values, scale = push.gradient[index].to(extent.device), push.header.grad_scale
            if scale != 1.0:
                values = values.to(extent.extent.dtype) * (1.0 / scale)
            _place(whole, values, its_runs[index], here[extent.tensor_of_tile_on_cpu])
        here = present.any(dim=0, keepdim=True).to(extent.device)
        grads.append(ExtentGradient((whole.view(-1, TILE_NUMEL),), here))
    return tuple(grads)


def limited(gradient: Gradient, max_value: float | None, coefficient: float, buffers: Buffers) -> Gradient:
    """The gradient with limits for its passes to observe."""

    def term(value: float | None, trivial: float, extent: ExtentBuffers) -> Tensor | None:
        is_needed = value is not None and value != trivial
        return torch.tensor(value, dtype=extent.extent.dtype, device=extent.device) if is_needed else None

    return tuple(
        dataclasses.replace(
            grad, max_value=term(max_value, torch.inf, extent), coefficient=term(coefficient, 1.0, extent)
        )
        for grad, extent in zip(gradient, buffers.extents, strict=True)
    )


def with_all_terms(grad: ExtentGradient, dtype: torch.dtype) -> ExtentGradient:
    """The same gradient with no term left out, so that what is compiled for one step fits every other."""
    device, ranks = grad.parts[0].device, len(grad.parts)

    def one(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    return dataclasses.replace(
        grad,
        gains=torch.ones(ranks, dtype=dtype, device=device) if grad.gains is None else grad.gains,
        max_value=one(torch.inf) if grad.max_value is None else grad.max_value,
        coefficient=one(1.0) if grad.coefficient is None else grad.coefficient,
    )


def written_out(grad: ExtentGradient, extent: ExtentBuffers, pieces: Sequence[slice]) -> ExtentGradient:
    """The same gradient with its mean computed, in pieces that stay in cache; limits stay to be observed."""
    assert grad.here is not None, "computed once"
    parts = grad.parts
    is_read_as_it_is = len(parts) == 1 and grad.gains is None and bool(grad.here[0, list(extent.extent.params)].all())
    if not is_read_as_it_is:
        whole = torch.empty(len(extent.tiles), TILE_NUMEL, dtype=extent.extent.dtype, device=extent.device)
        for rows in pieces:
            whole[rows] = grad.of(rows).mean(extent.tensor_of_tile[rows], extent.extent.dtype)
        parts = (whole,)
    return ExtentGradient(parts, max_value=grad.max_value, coefficient=grad.coefficient)


def _average_extent(
    parts: Sequence[Tensor], scales: Sequence[float], present: Tensor, extent: ExtentBuffers
) -> ExtentGradient:
    dtype, device = extent.extent.dtype, extent.device
    inverse = torch.tensor([1.0 / scale for scale in scales], dtype=torch.float64)
    gains = None if all(scale == 1.0 for scale in scales) else inverse.to(device, dtype)
    counts = present.sum(dim=0).clamp_min(1).to(device, dtype) if len(parts) > 1 else None
    return ExtentGradient(
        tuple(part.to(device).view(-1, TILE_NUMEL) for part in parts),
        here=present.to(device),
        gains=gains,
        counts=counts,
    )


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
