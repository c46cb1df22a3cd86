"""The gradient of a step, from what the ranks push: their mean, or their parts side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from .buffers import MASTER, Buffers, ExtentBuffers
from .coverage import Gradients, Runs
from .push import Push, PushHeader

LARGEST = torch.finfo(torch.float32).max


def average(pushes: Sequence[Push], present: Tensor, buffers: Buffers) -> list[Tensor]:
    """Average the ranks' gradients: a sum in rank order, divided by how many ranks have the tensor.

    Args:
        pushes: All ranks' pushes, in rank order.
        present: ``(world_size, num_tensors)`` bool.
        buffers: The shard's memory, for its tiles and device; not changed.

    Returns:
        Per extent ``(tiles, 256)`` in the state dtype, zero where no rank has the tensor and in padding. With a single
        worker it may share memory with the push and must not be written.
    """
    return [
        _average_extent(pushes, index, present[:, extent.tensor_of_tile], extent)
        for index, extent in enumerate(buffers.extents)
    ]


def assemble(pushes: Sequence[Push], present: Tensor, buffers: Buffers, runs: Sequence[Sequence[Runs]]) -> list[Tensor]:
    """Put the ranks' parts of a gradient that is reduced already side by side; no two ranks push the same element.

    Each rank's scale is undone, in the state dtype.

    Args:
        pushes: All ranks' pushes, in rank order.
        present: ``(world_size, num_tensors)`` bool.
        buffers: The shard's memory, for its tiles and device; not changed.
        runs: Per rank and extent, where what it pushes lies, counted from the shard's first tile.

    Returns:
        Per extent ``(tiles, 256)`` in the state dtype, zero where a tensor is absent and in padding.
    """
    grads = []
    for index, extent in enumerate(buffers.extents):
        device = extent.slots[MASTER.name].device
        whole = torch.zeros(extent.numel, dtype=extent.extent.dtype, device=device)
        for push, its_runs, here in zip(pushes, runs, present, strict=True):
            _place(whole, _unscaled(push, index, extent), its_runs[index], here[extent.tensor_of_tile])
        grads.append(whole.view(-1, TILE_NUMEL))
    return grads


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


def count_nonfinite(grads: Sequence[Tensor]) -> int:
    """Elements that are inf or NaN. A finite sum has finite terms alone, and is the cheaper look."""
    return sum(_count_nonfinite(grad) for grad in grads)


def _count_nonfinite(grad: Tensor) -> int:
    if bool(torch.isfinite(grad.sum())):
        return 0
    return int(grad.numel() - torch.isfinite(grad).sum())


def _unscaled(push: Push, index: int, buffers: ExtentBuffers) -> Tensor:
    """A rank's part of an extent on the shard's device; without a scale that it has, and then in the state dtype."""
    part, scale = push.gradient[index].to(buffers.slots[MASTER.name].device), push.header.grad_scale
    return part if scale == 1.0 else part.to(buffers.extent.dtype) * (1.0 / scale)


def _average_extent(pushes: Sequence[Push], index: int, present: Tensor, buffers: ExtentBuffers) -> Tensor:
    device = buffers.slots[MASTER.name].device
    total: Tensor | None = None
    for push, here in zip(pushes, present, strict=True):
        grad = _unscaled(push, index, buffers).to(buffers.extent.dtype).view(-1, TILE_NUMEL)
        if not bool(here.all()):
            grad = torch.where(here[:, None].to(device), grad, 0.0)
        total = grad if total is None else total + grad
    assert total is not None, "a step has at least one rank"
    if len(pushes) > 1:
        counts = present.sum(dim=0).clamp_min(1).to(device, buffers.extent.dtype)
        total = total / counts[:, None]
    return total
