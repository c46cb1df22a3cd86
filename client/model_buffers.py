"""One rank's buffers, bound to its model: gradients are gathered from it, parameters written to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim import TILE_NUMEL
from ..sharding.coverage import Holdings, Range, coverage_of, share_tiles
from ..sharding.errors import JobMismatchError, ServiceError, StepwellError, UnsupportedParameterError
from ..sharding.job import JobSpec
from ..sharding.layout import Layout, wire_dtype
from .flat import FlatBuffer, Place, copy_all
from .holdings import is_distributed, local_part, version_of

SUM_TOLERANCE = 1e-5
"""Of the sum of magnitudes: how far the sums of gradients may be apart that are one but for rounding."""


class ModelBuffers:
    """See the module.

    Args:
        spec: The job.
        layout: Its flat space.
        params: The model's parameters, in index order.
        rank: This worker's rank.
        holdings: What it holds of a sharded model.
        group: Over which replicas exchange parameters, see :func:`replica_group`.

    Attributes:
        pushed: For gradients.
        held: For parameters, all that this rank holds.
        pulled: What a step brings of them: ``held``, or a replica's share, see :meth:`take`.

    Raises:
        StepwellError: If the parameters are on several devices.
    """

    def __init__(
        self,
        spec: JobSpec,
        layout: Layout,
        params: Sequence[Tensor],
        rank: int,
        *,
        holdings: Holdings | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._spec, self._params, self._rank, self._holdings = spec, list(params), rank, holdings
        pushed, held = coverage_of(layout, spec.gradients, rank, spec.world_size, holdings)
        device = common_device(params)
        self.pushed = FlatBuffer(layout, device, coverage=pushed, part="pushed")
        self._replicas = None if group is None else _Replicas(layout, spec, rank, device, group)
        if self._replicas is None:
            self.held = self.pulled = FlatBuffer(layout, device, coverage=held)
        else:
            self.held = FlatBuffer(layout, device, coverage=held, parts=self._replicas.parts)
            self.pulled = FlatBuffer(layout, device, coverage=pushed, part="pushed", parts=self._replicas.own)
        # Once and not in every step, as each of these takes a microsecond for each parameter.
        self._is_plain = not any(map(is_distributed, self._params))
        shapes = [local.shape for local in self._local_parts()]
        self._sources = [(place.param, self._slice_of(place)) for place in self.pushed.places]
        self._targets = [
            place.view.view(shapes[place.param]) if where is None else place.view
            for place, (_, where) in zip(self.pushed.places, self._sources, strict=True)
        ]
        self._held = [place.view.view(shapes[place.param]) for place in self.held.places]
        self._versions = [-1] * len(self._params)

    def gather_gradients(self) -> list[bool]:
        """Copy this rank's part of every gradient to its place; which parameters have one.

        Raises:
            JobMismatchError: In the first step of replicas, if they have not the same gradients; told to all of them.
        """
        grads = [None if param.grad is None else _local_gradient(param) for param in self._params]
        if self._replicas is not None:
            self._replicas.require_equal(grads)
        targets, sources = [], []
        for target, (param, where) in zip(self._targets, self._sources, strict=True):
            grad = grads[param]
            if grad is not None:
                targets.append(target)
                sources.append(grad if where is None else grad.reshape(-1)[where])
        copy_all(targets, sources)
        return [grad is not None for grad in grads]

    def take(self, step: int) -> None:
        """Take over what a step brought: replicas exchange their shares, then the model gets it all.

        Raises:
            ServiceError: If the replicas could not exchange them.
        """
        if self._replicas is not None:
            self._replicas.all_gather(step)
        self.write_parameters()

    def write_parameters(self) -> None:
        """Copy ``held`` to the model."""
        with torch.no_grad():
            locals_ = self._local_parts()
            copy_all([locals_[place.param] for place in self.held.places], self._held)
        self._versions = self._versions_now()

    def values(self) -> dict[int, tuple[int, Tensor]]:
        """What this rank answers for of the parameters, see :func:`values_of`."""
        return values_of(self._params, self._rank, self._holdings, indices=range(len(self._params)))

    def changed_by_hand(self) -> list[int]:
        """Indices of parameters that something else than this class has written since it last did."""
        versions = enumerate(zip(self._versions_now(), self._versions, strict=True))
        return [index for index, (now, then) in versions if now != then]

    def reloaded(self) -> dict[int, Tensor]:
        """What this rank answers for of the parameters that were changed by hand; flattened."""
        values = values_of(self._params, self._rank, self._holdings, indices=self.changed_by_hand())
        return {index: value for index, (_, value) in values.items()}

    def mark_changed(self, indices: Iterable[int] | None = None) -> None:
        """Count these parameters, or all, as changed by hand."""
        for index in range(len(self._params)) if indices is None else indices:
            self._versions[index] = -1

    def _local_parts(self) -> list[Tensor]:
        return self._params if self._is_plain else [local_part(param) for param in self._params]

    def _versions_now(self) -> list[int]:
        return [param._version if self._is_plain else version_of(param) for param in self._params]

    def _slice_of(self, place: Place) -> slice | None:
        """Where a place lies in the flattened local gradient; None if it is all of it."""
        whole = Range(0, self._spec.params[place.param].numel)
        held = whole if self._holdings is None else self._holdings.held[place.param]
        start = place.offset - held.offset
        return None if place.view.numel() == held.numel else slice(start, start + place.view.numel())


class _Replicas:
    """The parameters of a model that every rank has whole, each rank's share in turn, all of the same size."""

    def __init__(
        self, layout: Layout, spec: JobSpec, rank: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        shares = [share_tiles(extent, spec.world_size) * TILE_NUMEL for extent in layout.extents]
        self.parts = [
            torch.zeros(share * spec.world_size, dtype=wire_dtype(layout, extent), device=device)
            for share, extent in zip(shares, layout.extents, strict=True)
        ]
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


def values_of(
    params: Sequence[Tensor], rank: int, holdings: Holdings | None, *, indices: Iterable[int]
) -> dict[int, tuple[int, Tensor]]:
    """What a rank answers for of some parameters: by index, offset and a copy, flattened.

    Of a sharded model what it pushes, else everything from rank 0 and nothing from others.

    Args:
        params: All parameters.
        rank: The rank.
        holdings: What it holds of a sharded model.
        indices: Which parameters.
    """
    if holdings is None and rank != 0:
        return {}
    values = {}
    with torch.no_grad():
        for index in indices:
            local = local_part(params[index]).detach().reshape(-1)
            pushed, start = Range(0, local.numel()), 0
            if holdings is not None:
                pushed = holdings.pushed[index]
                start = pushed.offset - holdings.held[index].offset
            values[index] = pushed.offset, local[start : start + pushed.numel].clone()
    return values


def common_device(params: Sequence[Tensor]) -> torch.device:
    """The device of all parameters, the CPU if there are none.

    Raises:
        StepwellError: If they are on several.
    """
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise StepwellError(f"expected all parameters on one device, got {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cpu")


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


def _local_gradient(param: Tensor) -> Tensor:
    """This rank's part of a gradient, dense.

    Raises:
        UnsupportedParameterError: If it is sparse, or placed otherwise than its parameter.
    """
    grad = param.grad
    assert grad is not None, "asked for parameters with a gradient alone"
    if grad.layout is not torch.strided:
        raise UnsupportedParameterError(f"expected a dense gradient, got one of layout {grad.layout}; use sparse=False")
    if is_distributed(grad):
        assert is_distributed(param), "torch gives a gradient its parameter's type"
        if grad.placements != param.placements:
            raise UnsupportedParameterError(
                f"expected a gradient placed as its parameter, {param.placements}, got {grad.placements}; "
                "redistribute it before step()"
            )
        with torch.no_grad():
            return grad.to_local().detach()
    return grad.detach()
