"""Ranks that have the whole model each: a share of the parameters comes to each of them, and they exchange the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim import TILE_NUMEL
from ..sharding.coverage import share_tiles
from ..sharding.errors import JobMismatchError, ServiceError
from ..sharding.job import JobSpec
from ..sharding.layout import Layout, wire_dtype
from .flat import Allocate

SUM_TOLERANCE = 1e-5
"""Of the sum of magnitudes: how far the sums of gradients may be apart that are one but for rounding."""


class Replicas:
    """The parameters of a model that every rank has whole, each rank's share in turn, all of the same size."""

    def __init__(
        self,
        layout: Layout,
        spec: JobSpec,
        rank: int,
        device: torch.device,
        group: dist.ProcessGroup,
        allocate: Allocate,
    ) -> None:
        shares = [share_tiles(extent, spec.world_size) * TILE_NUMEL for extent in layout.extents]
        dtypes = (wire_dtype(layout, extent) for extent in layout.extents)
        numels = (share * spec.world_size for share in shares)
        self.parts = allocate(list(zip(numels, dtypes, strict=True)), device)
        self._shares = [
            list(torch.split(part, share)) if share else [] for part, share in zip(self.parts, shares, strict=True)
        ]
        self.own = [each[rank] if each else part for each, part in zip(self._shares, self.parts, strict=True)]
        self._group, self._device, self._are_equal = group, device, False

    def require_equal(self, grads: Sequence[Tensor | None]) -> None:
        """See once, as soon as they are finite, that the ranks have the same gradients as they say.

        Raises:
            JobMismatchError: If they have not; told to every rank.
        """
        if self._are_equal:
            return
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for grad in (each for each in grads if each is not None):
            sums += torch.stack((grad.sum(dtype=torch.float64), grad.abs().sum(dtype=torch.float64)))
        gathered = [torch.empty_like(sums) for _ in range(self._group.size())]
        dist.all_gather(gathered, sums, group=self._group)
        by_rank = torch.stack(gathered)
        if bool(torch.isfinite(by_rank).all()):
            if bool(((by_rank - by_rank[0]).abs() > SUM_TOLERANCE * by_rank[0, 1]).any()):
                raise JobMismatchError(
                    "gradients='replicated': expected the same gradients on every rank, got sums "
                    f"{by_rank[:, 0].tolist()}; train the model that DistributedDataParallel wraps, or pass "
                    "gradients='local'"
                )
            self._are_equal = True

    def all_gather(self, step: int) -> None:
        for own, shares in zip(self.own, self._shares, strict=True):
            if shares:
                try:
                    dist.all_gather(shares, own.clone(), group=self._group)
                except RuntimeError as error:
                    raise ServiceError(
                        f"step {step} was taken, but the ranks could not exchange its parameters ({error}): expected "
                        "all of them in one all-gather; a rank whose step() failed joins it when it calls step() "
                        "again. The next step() takes them from the service; if it fails too, start the job again"
                    ) from error


def replica_group(spec: JobSpec, rank: int) -> dist.ProcessGroup | None:
    """A group of their own for the ranks of a replicated model, so that each takes but its share from the service.

    Called on every rank, once: it makes the group. None if torch.distributed does not have these ranks.

    Raises:
        ValueError: If it counts them in another order, which would mix the shares up.
    """
    if spec.gradients != "replicated" or not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size() != spec.world_size:
        return None
    if dist.get_rank() != rank:
        raise ValueError(f"rank: expected {dist.get_rank()}, as torch.distributed has it, got {rank}; leave it out")
    group: dist.ProcessGroup = dist.new_group()
    return group
