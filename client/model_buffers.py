"""One rank's buffers, bound to its model: gradients are gathered from it, parameters written to it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding.coverage import Holdings, Range, coverage_of
from ..sharding.errors import StepwellError, UnsupportedParameterError
from ..sharding.job import JobSpec
from ..sharding.layout import Layout
from ..sharding.push import GRADIENT_DTYPES, pack_present
from .flat import Allocate, FlatBuffer, Place, allocate_zeros, copy_all
from .gathering import Gatherer, Seen
from .holdings import is_distributed, local_part, version_of
from .in_place import ParameterViews
from .overlap import EarlyCopies
from .replicas import Replicas
from .staging import Staging, staging_of
from .streaming import PieceStream

logger = logging.getLogger("stepwell")


@dataclasses.dataclass(frozen=True, slots=True)
class GatherOptions:
    """How a rank's gradients are gathered; see :class:`stepwell.ServiceOptimizer`.

    Attributes:
        overlap: Within backward.
        dtype: What they are sent in; None takes the model's.

    Raises:
        ValueError: If shards do not take gradients in this dtype.
    """

    overlap: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in GRADIENT_DTYPES:
            raise ValueError(
                f"gradient_dtype: expected one of {', '.join(map(str, GRADIENT_DTYPES))} or None, got {self.dtype!r}"
            )


DEFAULT_OPTIONS = GatherOptions()


@dataclasses.dataclass(frozen=True, slots=True)
class Gathered:
    """What a rank is about to push.

    Attributes:
        present: Which parameters have a gradient, as :func:`pack_present` packs them.
        max_abs: A bound on the magnitudes, see :attr:`PushHeader.max_abs`; inf or NaN if the rank pushes one.
    """

    present: bytes
    max_abs: float


class ModelBuffers:
    """See the module.

    Args:
        spec: The job.
        layout: Its flat space.
        params: The model's parameters, in index order.
        rank: This worker's rank.
        holdings: What it holds of a sharded model.
        group: Over which replicas exchange parameters, see :func:`replica_group`.
        options: How gradients are gathered.
        allocate: Where their memory comes from.
        open_stream: Gives what sends gradients ahead of their push; see :meth:`Transport.stream`.
        are_read_in_place: Whether shards read gradients where they are, see :attr:`Transport.reads_in_place`.

    Attributes:
        pushed: For gradients.
        held: For parameters, all that this rank holds; the model's are views of it, see :class:`ParameterViews`.
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
        options: GatherOptions = DEFAULT_OPTIONS,
        allocate: Allocate = allocate_zeros,
        open_stream: Callable[[FlatBuffer], PieceStream | None] = lambda gradient: None,
        are_read_in_place: bool = False,
    ) -> None:
        self._spec, self._params, self._holdings = spec, list(params), holdings
        pushed, held = coverage_of(layout, spec.gradients, rank, spec.world_size, holdings)
        device = self._device = common_device(params)
        self._staging: Staging | None = None
        self._are_read_in_place = are_read_in_place and holdings is None
        self._is_plain = not any(map(is_distributed, self._params))
        self._shapes = [local.shape for local in self._local_parts()]
        self._make_pushed = functools.partial(
            FlatBuffer, layout, device, coverage=pushed, part="pushed", dtype=options.dtype, allocate=allocate
        )
        # What ranks exchange lies where the model is: NCCL knows no other memory.
        exchanged = allocate if device.type == "cpu" else allocate_zeros
        self._replicas = None if group is None else Replicas(layout, spec, rank, device, group, exchanged)
        if self._replicas is None:
            self.held = self.pulled = FlatBuffer(layout, device, coverage=held, allocate=allocate)
        else:
            self.held = FlatBuffer(layout, device, coverage=held, parts=self._replicas.parts)
            self.pulled = FlatBuffer(layout, device, coverage=pushed, part="pushed", parts=self._replicas.own)
        self._early: EarlyCopies | None = None
        self._stream: PieceStream | None = None
        self._used: list[tuple[int, Gatherer]] = []
        self._renew_pushed()
        if options.overlap:
            self._early = self._copy_early(open_stream)
        self._present: tuple[list[bool], bytes] = [], b""
        self._views = ParameterViews(self.held, self._params)
        self._copied = self._to_copy()
        self._versions = [-1] * len(self._params)

    def lend_gradients(self) -> FlatBuffer:
        """What was gathered, for the shards, whose it is until :meth:`take_back_gradients`."""
        self._is_lent = True
        return self.pushed

    def take_back_gradients(self, sequence: int, kept_from: int) -> None:
        """Go on with memory that no shard needs: what was lent was taken in step ``sequence``.

        Args:
            sequence: The step.
            kept_from: The first step whose gradients a shard that is lost would need.
        """
        self.pushed.elsewhere = {}  # else gradients that nobody else needs would stay
        self._used.append((sequence, self._gatherer))
        if self._used[0][0] < kept_from:
            self._use(self._used.pop(0)[1])
        else:
            self._renew_pushed()
        if self._early is not None:
            self._early.may_copy = True

    def _renew_pushed(self) -> None:
        """Take memory for gradients that no shard has seen; what had it before goes when no shard needs it."""
        pushed = self._make_pushed()
        if self._staging is None:
            self._staging = staging_of(self._device, pushed.parts)
        self._use(
            Gatherer(
                pushed,
                self._shapes,
                [self._slice_of(place) for place in pushed.places],
                is_added=self._spec.gradients == "local" and self._spec.world_size > 1,
                staging=self._staging,
                are_read_in_place=self._are_read_in_place,
            )
        )

    def _use(self, gatherer: Gatherer) -> None:
        self._gatherer, self.pushed, self._is_lent = gatherer, gatherer.buffer, False
        if self._early is not None:
            self._early.copy = gatherer.copy
        if self._stream is not None:
            self._stream.use(gatherer.buffer)

    def gather_gradients(self) -> Gathered:
        """Copy this rank's part of every gradient to its place. It stays there until :meth:`take_back_gradients`.

        A push that failed may lie in some shard's inbox still, so its memory is left alone.

        Raises:
            JobMismatchError: In the first step of replicas, if they have not the same gradients; told to all of them.
            UnsupportedParameterError: If a gradient is sparse, or placed otherwise than its parameter.
        """
        if self._is_lent:
            self._renew_pushed()
        grads = self._gradients()
        if self._replicas is not None:
            self._replicas.require_equal(grads)
        copied: Mapping[int, Seen] = {}
        if self._early is not None:
            copied = self._early.take()
            self._early.may_copy = False
        if self._stream is not None:
            places = enumerate(self.pushed.places)
            self._stream.spoil(at for at, place in places if grads[place.param] is not None and at not in copied)
        max_abs = self._gatherer.gather(grads, copied)
        present = [grad is not None for grad in grads]
        if present != self._present[0]:
            self._present = present, pack_present(present)
        return Gathered(self._present[1], max_abs)

    def distrust_gradients(self) -> None:
        """Something may have changed gradients in a way that does not show: copy all of them in the next step."""
        if self._early is not None:
            self._early.forget()

    def take(self, step: int) -> None:
        """Take over what a step brought: replicas exchange their shares, then the model gets it all.

        Raises:
            ServiceError: If the replicas could not exchange them.
        """
        if self._replicas is not None:
            self._replicas.all_gather(step)
        self.write_parameters()

    def write_parameters(self) -> None:
        """Give the model what is in ``held``."""
        if self._views.let_go():
            self._copied = self._to_copy()
        targets, sources = self._copied
        with torch.no_grad():
            targets = targets if self._is_plain else [local_part(target) for target in targets]
            if self._staging is None:
                copy_all(targets, sources)
            else:
                self._staging.copy_back(targets, sources)
        self._views.mark_written()
        self._versions = self._versions_now()

    def close(self) -> None:
        """Leave the model as any other: without hooks, its parameters in memory of their own."""
        if self._early is not None:
            self._early.close()
        if self._stream is not None:
            self._stream.close()
        self._views.release()

    def values(self, *, leads: bool) -> dict[int, tuple[int, Tensor]]:
        """What this rank answers for of the parameters, see :func:`values_of`."""
        return values_of(self._params, self._holdings, leads=leads, indices=range(len(self._params)))

    def changed_by_hand(self) -> list[int]:
        """Indices of parameters that something else than this class has written since it last did."""
        versions = self._versions_now()
        if versions == self._versions:
            return []
        return [index for index, (now, then) in enumerate(zip(versions, self._versions, strict=True)) if now != then]

    def reloaded(self, *, leads: bool) -> dict[int, Tensor]:
        """What this rank answers for of the parameters that were changed by hand; flattened."""
        values = values_of(self._params, self._holdings, leads=leads, indices=self.changed_by_hand())
        return {index: value for index, (_, value) in values.items()}

    def mark_changed(self, indices: Iterable[int] | None = None) -> None:
        """Count these parameters, or all, as changed by hand."""
        for index in range(len(self._params)) if indices is None else indices:
            self._versions[index] = -1

    def _local_parts(self) -> list[Tensor]:
        return self._params if self._is_plain else [local_part(param) for param in self._params]

    def _versions_now(self) -> list[int]:
        if self._is_plain:
            return [param._version for param in self._params]
        return [version_of(param) for param in self._params]

    def _gradients(self) -> list[Tensor | None]:
        """This rank's part of every gradient."""
        if self._is_plain:
            return [param.grad for param in self._params]
        return [None if param.grad is None else _local_gradient(param) for param in self._params]

    def _to_copy(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters that are not in place, and what is held of them."""
        in_place = self._views.indices
        places = [place for place in self.held.places if place.param not in in_place]
        held = [place.view.view(self._shapes[place.param]) for place in places]
        return [self._params[place.param] for place in places], held

    def _copy_early(self, open_stream: Callable[[FlatBuffer], PieceStream | None]) -> EarlyCopies | None:
        """Hooks, where what backward leaves in a gradient is what is pushed of it."""
        if self._spec.gradients != "local" or not self._is_plain:
            logger.info("overlap: gradients are reduced among ranks after backward's hooks; step() copies them")
            return None
        params = {at: self._params[place.param] for at, place in enumerate(self.pushed.places)}
        self._stream = open_stream(self.pushed)
        if self._stream is not None and self._staging is not None:
            self._stream.mark = self._staging.mark
        return EarlyCopies(params, self._gatherer.copy, self._stream)

    def _slice_of(self, place: Place) -> slice | None:
        """Where a place lies in the flattened local gradient; None if it is all of it."""
        whole = Range(0, self._spec.params[place.param].numel)
        held = whole if self._holdings is None else self._holdings.held[place.param]
        start = place.offset - held.offset
        return None if place.view.numel() == held.numel else slice(start, start + place.view.numel())


def values_of(
    params: Sequence[Tensor], holdings: Holdings | None, *, leads: bool, indices: Iterable[int]
) -> dict[int, tuple[int, Tensor]]:
    """What a rank answers for of some parameters: by index, offset and a copy, flattened.

    Of a sharded model what it pushes, else everything from the first rank and nothing from others.

    Args:
        params: All parameters.
        holdings: What it holds of a sharded model.
        leads: Whether it is the first rank.
        indices: Which parameters.
    """
    if holdings is None and not leads:
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


def _local_gradient(param: Tensor) -> Tensor:
    """This rank's part of a gradient.

    Raises:
        UnsupportedParameterError: If it is placed otherwise than its parameter.
    """
    grad = param.grad
    assert grad is not None, "asked for parameters with a gradient alone"
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
