"""Gradients on their way into the flat buffer: each is copied once, and looked at while it is in the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..sharding.errors import UnsupportedParameterError
from .flat import FlatBuffer, Place, copy_all

CPU_BATCH_NUMEL = 2**20
"""Copied and looked at in one go on a CPU: less to a call, and starting its threads takes longer than memory does."""

OTHER_BATCH_NUMEL = 2**27
"""The same elsewhere, where each call costs a launch and the cache is of no account."""

Extremes = list[Tensor]
"""0-dim: a least and a largest element each, NaN if there is one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Places of a buffer that lie one after the other.

    Attributes:
        places: Their positions among the buffer's.
        memory: All of them, with the padding in between, which is zero.
    """

    places: range
    memory: Tensor


class Gatherer:
    """Copies one rank's gradients to their places in a flat buffer.

    Args:
        buffer: The buffer.
        shapes: Per parameter, of this rank's part of its gradient.
        slices: Per place of the buffer, where it lies in that part, flattened; None for all of it.
    """

    def __init__(self, buffer: FlatBuffer, shapes: Sequence[torch.Size], slices: Sequence[slice | None]) -> None:
        # Once and not in every step, as each of these takes a microsecond for each parameter.
        self._params = [place.param for place in buffer.places]
        self._slices = None if all(where is None for where in slices) else list(slices)
        self._targets = [
            place.view.view(shapes[place.param]) if where is None else place.view
            for place, where in zip(buffer.places, slices, strict=True)
        ]
        on_cpu = not buffer.parts or buffer.parts[0].device.type == "cpu"
        self._batch_numel = CPU_BATCH_NUMEL if on_cpu else OTHER_BATCH_NUMEL
        self._batches = tuple(_batches(buffer, self._batch_numel))

    def gather(self, grads: Sequence[Tensor | None], copied: Mapping[int, Extremes]) -> float:
        """Copy gradients to their places. What parameters without one have there stays.

        Args:
            grads: Per parameter its gradient, if it has one.
            copied: Places that hold their gradient already, and its extremes.

        Returns:
            The largest magnitude in what is at the places of gradients now; inf or NaN if there is one.

        Raises:
            UnsupportedParameterError: If a gradient is sparse.
        """
        extremes = [extreme for each in copied.values() for extreme in each]
        try:
            with torch.no_grad():
                sources = self._sources(grads)
                is_whole = not copied and all(source is not None for source in sources)
                for batch in self._batches:
                    wanted: Sequence[int] = batch.places
                    if not is_whole:
                        wanted = [each for each in wanted if sources[each] is not None and each not in copied]
                    extremes += self._copy_batch(batch, wanted, sources)
        except RuntimeError:
            _require_dense(grads)
            raise
        return largest_magnitude(extremes)

    def copy(self, place: int, source: Tensor) -> Extremes:
        """Copy one gradient, and look at it piece by piece: before it is copied, for then it is read from the cache."""
        target, extremes = self._targets[place], Extremes()
        if not source.is_contiguous():
            target.copy_(source)
            return list(torch.aminmax(target))
        pieces = torch.split(target.view(-1), self._batch_numel), torch.split(source.view(-1), self._batch_numel)
        for to, piece in zip(*pieces, strict=True):
            # Rounding is monotonic, so that the rounded extremes are those of what is sent.
            extremes += [extreme.to(to.dtype) for extreme in torch.aminmax(piece)]
            to.copy_(piece)
        return extremes

    def _sources(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Per place, what goes there."""
        sources = [grads[param] for param in self._params]
        if self._slices is None:
            return sources
        return [
            source if source is None or where is None else source.reshape(-1)[where]
            for source, where in zip(sources, self._slices, strict=True)
        ]

    def _copy_batch(self, batch: Batch, wanted: Sequence[int], sources: Sequence[Tensor | None]) -> Extremes:
        if not wanted:
            return []
        chosen = [source for source in (sources[each] for each in wanted) if source is not None]
        if len(batch.places) == 1:
            return self.copy(batch.places.start, chosen[0])
        targets = [self._targets[each] for each in wanted]
        copy_all(targets, chosen)
        # Around a place that was left out lies what it had in another step.
        seen = [batch.memory] if len(wanted) == len(batch.places) else targets
        return [extreme for each in seen for extreme in torch.aminmax(each)]


def largest_magnitude(extremes: Extremes) -> float:
    """The largest magnitude among extremes; NaN if one is, 0.0 if there are none."""
    by_dtype: dict[torch.dtype, Extremes] = {}
    for extreme in extremes:
        by_dtype.setdefault(extreme.dtype, []).append(extreme)
    largest = [float(torch.stack(each).abs().max()) for each in by_dtype.values()]
    return max(largest, key=lambda value: (value != value, value), default=0.0)


def _batches(buffer: FlatBuffer, batch_numel: int) -> Iterator[Batch]:
    """The places in batches of at most ``batch_numel`` elements, or of one place that has more."""
    places, first = buffer.places, 0
    for position in range(1, len(places) + 1):
        is_full = position == len(places) or (
            places[position].part != places[first].part or _stop(places[position]) - places[first].start > batch_numel
        )
        if is_full:
            begin, end = places[first], places[position - 1]
            yield Batch(range(first, position), buffer.parts[begin.part][begin.start : _stop(end)])
            first = position


def _stop(place: Place) -> int:
    return place.start + place.view.numel()


def _require_dense(grads: Sequence[Tensor | None]) -> None:
    for grad in grads:
        if grad is not None and grad.layout is not torch.strided:
            raise UnsupportedParameterError(
                f"expected a dense gradient, got one of layout {grad.layout}; use sparse=False"
            )
