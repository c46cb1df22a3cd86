"""The mean gradient of a step, per element over the ranks that have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from .buffers import MASTER, Buffers, ExtentBuffers
from .push import Push


def average(pushes: Sequence[Push], present: Tensor, buffers: Buffers) -> list[Tensor]:
    """Average the ranks' gradients: a sum in rank order, divided by how many ranks have the tensor.

    Each rank's scale is undone first, in the state dtype.

    Args:
        pushes: All ranks' pushes, in rank order.
        present: ``(world_size, num_tensors)`` bool.
        buffers: The shard's memory, for its tiles and device; not changed.

    Returns:
        Per extent ``(tiles, 256)`` in the state dtype, zero where no rank has the tensor and in padding. With a single
        worker it may share memory with the push and must not be written.
    """
    scales = [push.header.grad_scale for push in pushes]
    return [
        _average_extent([push.gradient[index] for push in pushes], scales, present[:, extent.tensor_of_tile], extent)
        for index, extent in enumerate(buffers.extents)
    ]


def count_nonfinite(grads: Sequence[Tensor]) -> int:
    """Elements that are inf or NaN. A finite sum has finite terms alone, and is the cheaper look."""
    return sum(_count_nonfinite(grad) for grad in grads)


def _count_nonfinite(grad: Tensor) -> int:
    if bool(torch.isfinite(grad.sum())):
        return 0
    return int(grad.numel() - torch.isfinite(grad).sum())


def _average_extent(
    parts: Sequence[Tensor], scales: Sequence[float], present: Tensor, buffers: ExtentBuffers
) -> Tensor:
    device = buffers.slots[MASTER.name].device
    total: Tensor | None = None
    for part, scale, here in zip(parts, scales, present, strict=True):
        grad = part.to(device, buffers.extent.dtype).view(-1, TILE_NUMEL)
        grad = grad if scale == 1.0 else grad * (1.0 / scale)
        if not bool(here.all()):
            grad = torch.where(here[:, None].to(device), grad, 0.0)
        total = grad if total is None else total + grad
    assert total is not None, "a step has at least one rank"
    if len(parts) > 1:
        counts = present.sum(dim=0).clamp_min(1).to(device, buffers.extent.dtype)
        total = total / counts[:, None]
    return total
