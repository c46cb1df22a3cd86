"""Sums of runs of values in an order that no device leaves open: by halving, with elementwise additions alone."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@final
class RunSums:
    """Sums runs that follow each other. A run's bits depend on its values alone, not on where it lies among others.

    A run is continued with zeros to a power of two and folded, half onto half. Runs of one power of two are folded
    together; nothing here waits for a GPU.

    Args:
        lengths: ``(num_runs,)`` int64, the values of each.
        device: Where the values will be.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device) -> None:
        self._num_runs, num_values = len(lengths), int(lengths.sum())
        starts = np.cumsum(lengths) - lengths
        widths = 1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
        self._folds: list[tuple[Tensor, Tensor, Tensor]] = []
        for width in np.unique(widths[lengths > 0]).tolist():
            which = np.flatnonzero((widths == width) & (lengths > 0))
            runs, start, length = (
                torch.from_numpy(each).to(device, non_blocking=True) for each in (which, starts[which], lengths[which])
            )
            columns = torch.arange(width, device=device)
            where = (start[:, None] + columns).clamp_max(num_values - 1)
            self._folds.append((runs, where, columns < length[:, None]))

    def of(self, values: Tensor) -> Tensor:
        """The sums of ``(n, num_values)`` values, ``(n, num_runs)`` in float64; 0 for a run without any."""
        sums = torch.zeros(len(values), self._num_runs, dtype=torch.float64, device=values.device)
        for runs, where, is_within in self._folds:
            rows = torch.where(is_within, values[:, where].double(), 0.0)
            while rows.shape[-1] > 1:
                half = rows.shape[-1] // 2
                rows = rows[..., :half] + rows[..., half:]
            sums[:, runs] = rows[..., 0]
        return sums
