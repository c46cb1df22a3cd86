"""Gradients on their way into the flat buffer: each is copied once, and looked at while it is in the cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor

from ..optim import TILE_NUMEL
from ..sharding.errors import UnsupportedParameterError
from .flat import FlatBuffer, Place, copy_all
from .staging import Staging

CPU_BATCH_NUMEL = 2**20
"""Copied and looked at in one go on a CPU: less to a call, and starting its threads takes longer than memory does."""

OTHER_BATCH_NUMEL = 2**27
"""The same elsewhere, where each call costs a launch and the cache is of no account."""

CPU_LARGE_NUMEL = 2**24
"""A gradient of so many elements is worth calls of the kernels for itself, and no copy: 0.85 to 0.9 of the step's time.

With those of 2^20 to 2^22 elements the step took 1.03 to 1.1 of what it takes with copies.
"""

OTHER_LARGE_NUMEL = 2**26
"""The same elsewhere, where a call takes longer than such a gradient's memory."""

Seen = list[Tensor]
"""What looks at values leave, 0-dim each: see :func:`bounds_of`, :func:`sums_of`. Not finite if one of them is not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Places of a buffer that lie one after the other.

    Attributes:
        places: Where they stand among the buffer's.
        memory: All of them, with the padding in between, which is zero.
    """

    places: slice
    memory: Tensor


class Gatherer:
    """Copies one rank's gradients to their places in a flat buffer.

    Args:
        buffer: The buffer.
        shapes: Per parameter, of this rank's part of its gradient.
        slices: Per place of the buffer, where it lies in that part, flattened; None for all of it.
        is_added: Whether gradients of several ranks will be added up, so that it matters how large they are.
        staging: What copies to the buffer from a GPU; None if gradients are where it is.
        are_read_in_place: Whether the shards read gradients here: large ones that they can read are not copied.

    Attributes:
        buffer: As above.
    """

    def __init__(
        self,
        buffer: FlatBuffer,
        shapes: Sequence[torch.Size],
        slices: Sequence[slice | None],
        *,
        is_added: bool = False,
        staging: Staging | None = None,
        are_read_in_place: bool = False,
    ) -> None:
        self.buffer, self._staging = buffer, staging
        # Once and not in every step, as each of these takes a microsecond for each parameter.
        self._params = [place.param for place in buffer.places]
        self._slices = None if all(where is None for where in slices) else list(slices)
        self._targets = [
            place.view.view(shapes[place.param]) if where is None else place.view
            for place, where in zip(buffer.places, slices, strict=True)
        ]
        on_cpu = not buffer.parts or buffer.parts[0].device.type == "cpu"
        self._batch_numel = CPU_BATCH_NUMEL if on_cpu else OTHER_BATCH_NUMEL
        large_numel = CPU_LARGE_NUMEL if on_cpu else OTHER_LARGE_NUMEL
        sizes = (place.view.numel() for place in buffer.places)
        self._large = frozenset(
            at
            for at, numel in enumerate(sizes)
            if are_read_in_place and numel >= large_numel and numel % TILE_NUMEL == 0
        )
        self._look = bounds_of if is_added else sums_of
        self._limit = None if is_added else max((torch.finfo(part.dtype).max for part in buffer.parts), default=0.0)
        self._batches = tuple(_batches(buffer, self._batch_numel, self._large))

    def gather(self, grads: Sequence[Tensor | None], copied: Mapping[int, Seen]) -> float:
        """Copy gradients to their places, or note where they are. What parameters without one have there stays.

        Args:
            grads: Per parameter its gradient, if it has one.
            copied: Places whose gradient went through :meth:`copy`, and what that returned.

        Returns:
            A bound on the magnitudes that are at the places of gradients now, see :attr:`PushHeader.max_abs`; no better
            than what the dtype allows if they are not added up. inf or NaN if there is one.

        Raises:
            UnsupportedParameterError: If a gradient is sparse.
        """
        seen = [look for each in copied.values() for look in each]
        with torch.no_grad():
            try:
                sources = self._sources(grads)
                seen += self._leave(sources, copied)
                for place in copied:
                    sources[place] = None
                for batch in self._batches:
                    seen += self._copy_batch(batch, sources[batch.places])
            except RuntimeError:
                _require_dense(grads)
                raise
            if self._staging is not None:
                self._staging.mark()()
            bound = largest(seen)
            if not math.isfinite(bound):
                # A sum may have overflowed.
                return self._largest_magnitude(grads)
            return bound if self._limit is None else self._limit

    def copy(self, place: int, source: Tensor) -> Seen:
        """Copy one gradient piece by piece, and look at each piece while it is in the cache.

        One that stays where it is is only looked at.
        """
        target = self._targets[place]
        if self._staging is not None:
            return self._staging.copy(target, source, self._look)
        if self._stays(place, source):
            return [look for piece in torch.split(source.view(-1), self._batch_numel) for look in self._look(piece)]
        if not source.is_contiguous():
            target.copy_(source)
            return self._look(target)
        seen = Seen()
        pieces = torch.split(target.view(-1), self._batch_numel), torch.split(source.view(-1), self._batch_numel)
        for to, piece in zip(*pieces, strict=True):
            to.copy_(piece)
            seen += self._look(to)
        return seen

    def _sources(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Per place, what goes there."""
        sources = [grads[param] for param in self._params]
        if self._slices is None:
            return sources
        return [
            source if source is None or where is None else source.reshape(-1)[where]
            for source, where in zip(sources, self._slices, strict=True)
        ]

    def _leave(self, sources: list[Tensor | None], seen: Container[int]) -> Seen:
        """Take out of ``sources`` what stays where it is, and look at what was not ``seen``."""
        elsewhere = {}
        for at in self._large:
            source = sources[at]
            if source is not None and self._stays(at, source):
                elsewhere[at] = source.view(-1)
                sources[at] = None
        self.buffer.elsewhere = elsewhere
        return [look for at, values in elsewhere.items() if at not in seen for look in self._look(values)]

    def _stays(self, place: int, source: Tensor) -> bool:
        """Whether shards read a gradient where it is."""
        return place in self._large and _is_as(source, self._targets[place])

    def _copy_batch(self, batch: Batch, sources: Sequence[Tensor | None]) -> Seen:
        chosen, targets = [source for source in sources if source is not None], self._targets[batch.places]
        if chosen and len(sources) == 1:
            return self.copy(batch.places.start, chosen[0])
        if len(chosen) == len(sources) and self._staging is not None:
            return self._staging.copy_packed(batch.memory, targets, chosen, self._look)
        if len(chosen) == len(sources):
            copy_all(targets, chosen)
            return self._look(batch.memory)
        if self._staging is not None:
            present = (at for at, source in enumerate(sources, batch.places.start) if source is not None)
            return [look for at, source in zip(present, chosen, strict=True) for look in self.copy(at, source)]
        # Around a place that is left out lies what it had in another step.
        targets = [target for target, source in zip(targets, sources, strict=True) if source is not None]
        copy_all(targets, chosen)
        return [look for target in targets for look in self._look(target)]

    def _largest_magnitude(self, grads: Sequence[Tensor | None]) -> float:
        given = (at for at, param in enumerate(self._params) if grads[param] is not None)
        values = (self.buffer.elsewhere.get(at, self._targets[at]) for at in given)
        return largest([extreme for each in values for extreme in torch.aminmax(each)])


def bounds_of(values: Tensor) -> Seen:
    """Bounds on a contiguous tensor: its magnitudes are at most the largest magnitude of these, or 1, but for rounding.

    In 32 and 64 bits that is the 2-norm, which takes half as long as the extremes. A sum of squares is at least each of
    them, whatever its order, as rounding a sum of numbers that are not negative never takes it below one of them. It
    overflows, from magnitudes of about 1e19 on in float32.
    """
    if values.dtype in (torch.float32, torch.float64):
        flat = values.view(-1)
        return [torch.dot(flat, flat).sqrt()]
    return list(torch.aminmax(values))


def sums_of(values: Tensor) -> Seen:
    """The sum, which no other look is as fast as. In float16 it would often overflow."""
    return list(torch.aminmax(values)) if values.dtype is torch.float16 else [values.sum()]


def largest(values: Sequence[Tensor]) -> float:
    """The largest magnitude among 0-dim tensors; NaN if one is, 0.0 if there are none."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for value in values:
        by_dtype.setdefault(value.dtype, []).append(value)
    found = [float(torch.stack(each).abs().max()) for each in by_dtype.values()]
    return max(found, key=lambda value: (value != value, value), default=0.0)


def _batches(buffer: FlatBuffer, batch_numel: int, alone: Set[int]) -> Iterator[Batch]:
    """The places in batches of at most ``batch_numel`` elements, or of one place that has more or stands ``alone``."""
    places, first = buffer.places, 0
    for position in range(1, len(places) + 1):
        is_full = position == len(places) or (
            places[position].part != places[first].part
            or _stop(places[position]) - places[first].start > batch_numel
            or not alone.isdisjoint((first, position))
        )
        if is_full:
            begin, end = places[first], places[position - 1]
            yield Batch(slice(first, position), buffer.parts[begin.part][begin.start : _stop(end)])
            first = position


def _is_as(source: Tensor, target: Tensor) -> bool:
    """Whether a gradient can be read as its place in the buffer would be."""
    is_dense = source.layout is torch.strided and source.is_contiguous()
    return is_dense and (source.dtype, source.device) == (target.dtype, target.device)


def _stop(place: Place) -> int:
    return place.start + place.view.numel()


def _require_dense(grads: Sequence[Tensor | None]) -> None:
    for grad in grads:
        if grad is not None and grad.layout is not torch.strided:
            raise UnsupportedParameterError(
                f"expected a dense gradient, got one of layout {grad.layout}; use sparse=False"
            )
