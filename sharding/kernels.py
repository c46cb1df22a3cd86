"""Running a rule's passes over a shard's tiles, eagerly or compiled; the same functions either way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim import Coefficients, ReducingRule, Rule, Scope
from .buffers import Buffers, ExtentBuffers
from .channels import ChannelMap
from .compiled import run_compiled
from .compiling import Kernel, require_compiling
from .gradient import Gradient, Stretch, with_all_terms, written_out
from .keys import Keys
from .partials import Output, SumTable
from .passes import Pass, Rows, apply_pass, local_pass, look_pass

PIECE_TILES = 256
"""Tiles in one eager call: few enough for every operand to stay in cache.

Fewer never touch the bits. More could: torch cuts a call of 257 tiles and three threads at an element that is no
multiple of the vector width, and functions that are not correctly rounded (exp, log) give other bits in the remainder.
"""

COMPILED_PIECE_TILES = 2**16
"""Tiles in one compiled call: enough for its 100 us not to count, and Python's other threads get a turn in between."""

CACHED_PIECE_TILES = 2**12
"""The same where a second pass follows at once, or where calls take and give values per element."""

GPU_PIECE_TILES: Mapping[Kernel, int] = {"compiled": 2**22, "eager": 2**16}
"""Tiles in one call on a GPU: as many as 32 bits number the elements of; eagerly as many as memory has room for beside.

There Python has to be ahead of the GPU, and no pass finds in the cache what the one before has left.
"""

MAX_PARTS = 8
"""More ranks' gradients than that are averaged in a pass of their own; each would be read again by every pass."""


Sinks = Sequence[Sequence[tuple[range, Tensor]]]
"""Per extent: tiles, counted from the shard's first, and ``(tiles, 256)`` memory in the model's dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class Apply:
    """What a second pass is given, beside the gradient.

    Attributes:
        per_tensor: Coefficients, name to ``(num_tensors,)`` float64.
        per_channel: Coefficients, name to ``(num_channels + 1,)`` float64, the last one for elements outside any
            channel.
        keys: The channels.
        sinks: Where new parameters go as well.
    """

    per_tensor: Mapping[str, Tensor]
    per_channel: Mapping[str, Tensor]
    keys: Keys
    sinks: Sinks = ()


class Kernels:
    """The passes of one rule.

    Args:
        rule: The rule.
        kernel: How they run.
    """

    def __init__(self, rule: Rule, kernel: Kernel) -> None:
        self.rule, self.kernel = rule, kernel
        self._has_channels = isinstance(rule, ReducingRule) and rule.scope is Scope.CHANNEL
        self._sums = rule.sums if isinstance(rule, ReducingRule) else ()
        self._num_threads = torch.get_num_threads()

    def prepare(self, gradient: Gradient, buffers: Buffers) -> Gradient:
        """The gradient as this kind of kernel reads it best, with the same bits. Called before anything moves.

        Raises:
            KernelError: If kernels were compiled so far and cannot be now.
        """
        if self.kernel == "compiled":
            require_compiling()
        return tuple(
            tuple(self._prepared(stretch, extent) for stretch in stretches)
            for stretches, extent in zip(gradient, buffers.extents, strict=True)
        )

    def _prepared(self, stretch: Stretch, extent: ExtentBuffers) -> Stretch:
        if self.kernel == "compiled" and len(stretch.parts) <= MAX_PARTS:
            return stretch
        written = written_out(stretch, extent, cut(stretch.tiles, PIECE_TILES))
        if self.kernel == "eager" or stretch.here is None:
            return written
        return dataclasses.replace(written, here=torch.ones_like(stretch.here[:1]))

    def look(self, buffers: Buffers, gradient: Gradient, table: SumTable, *, for_norm: bool) -> tuple[int, Tensor]:
        """See whether a gradient is finite, and take its squares, after its elements were clipped.

        Args:
            buffers: The shard's memory.
            gradient: The step's.
            table: Of the whole model.
            for_norm: Whether the squares are wanted.

        Returns:
            How many tiles hold inf or NaN; ``(num_segments,)`` float64, 0 where the shard owns nothing.
        """
        pieces, totals = list(self._pieces(buffers, gradient)), list[Tensor]()

        def squares() -> Iterator[Output]:
            for piece in pieces:
                sums, *its_squares = self._run(look_pass, piece, {}, for_norm)
                totals.append(sums.sum())
                if its_squares:
                    yield piece.output(its_squares)

        folded = table.folded(1, squares())
        # Asked of all pieces at once: a GPU would have to be waited for each time.
        bad = [piece for piece, is_finite in zip(pieces, _are_finite(totals), strict=True) if not is_finite]
        return sum(map(_count_nonfinite_tiles, bad)), folded[0]

    def local(
        self, buffers: Buffers, gradient: Gradient, c: Mapping[str, Tensor], table: SumTable, then: Apply | None = None
    ) -> Tensor:
        """First pass over everything the shard owns.

        Args:
            buffers: The shard's memory; slots change.
            gradient: The step's.
            c: Coefficients per tensor, ``(num_tensors,)`` float64.
            table: Where partials go.
            then: The second pass, to follow on each piece at once, while it is in cache.

        Returns:
            ``(len(rule.sums), num_segments)`` float64, 0 where the shard owns nothing.
        """
        by_extent = [_rounded(c, extent) for extent in buffers.extents]
        second = None if then is None else _Second(then, buffers)
        sinks = () if then is None else then.sinks

        def sums() -> Iterator[Output]:
            for piece in self._pieces(buffers, gradient, sinks, is_in_cache=then is not None):
                yield piece.output(self._run(local_pass, piece, by_extent[piece.index]))
                if second is not None:
                    self._run(apply_pass, piece, *second.coefficients(piece))

        return table.folded(len(self._sums), sums())

    def apply(self, buffers: Buffers, gradient: Gradient, apply: Apply) -> None:
        """Second pass over everything the shard owns; parameters and slots change."""
        second = _Second(apply, buffers)
        for piece in self._pieces(buffers, gradient, apply.sinks):
            self._run(apply_pass, piece, *second.coefficients(piece))

    def _pieces(
        self, buffers: Buffers, gradient: Gradient, sinks: Sinks = (), *, is_in_cache: bool = False
    ) -> Iterator[_Piece]:
        is_compiled = self.kernel == "compiled"
        for index, (extent, stretches) in enumerate(zip(buffers.extents, gradient, strict=True)):
            its_sinks = sinks[index] if sinks else ()
            edges = {edge for tiles, _ in its_sinks for edge in (tiles.start, tiles.stop)}
            for stretch in stretches:
                whole = with_all_terms(stretch, extent.extent.dtype) if is_compiled else stretch
                piece_tiles = self._piece_tiles(extent.device, is_in_cache=is_in_cache)
                for tiles in cut(stretch.tiles, piece_tiles, edges):
                    yield _Piece(index, extent, tiles, whole.of(tiles), _parts(its_sinks, tiles))

    def _piece_tiles(self, device: torch.device, *, is_in_cache: bool) -> int:
        """How many tiles a call is for, at most."""
        if device.type != "cpu" and not self._has_channels:
            return GPU_PIECE_TILES[self.kernel]
        if self.kernel == "eager":
            return PIECE_TILES
        return CACHED_PIECE_TILES if is_in_cache or self._has_channels else COMPILED_PIECE_TILES

    def _run(self, function: Pass, piece: _Piece, *args: Any) -> list[Tensor]:
        stride, rows = piece.extent.stride, piece.rows()
        if self.kernel == "eager":
            return function(self.rule, stride, rows, *args)
        return run_compiled(function, self.rule, stride, rows, *args, num_threads=self._num_threads)


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """The tiles of one call, counted from the shard's first one of an extent."""

    index: int
    extent: ExtentBuffers
    tiles: range
    gradient: Stretch
    sinks: tuple[Tensor, ...]

    @property
    def first_tile(self) -> int:
        """Counted in the extent."""
        return self.extent.tiles.start + self.tiles.start

    def output(self, parts: Sequence[Tensor]) -> Output:
        """What a pass returned for it."""
        return Output(self.index, self.first_tile, parts)

    def rows(self) -> Rows:
        """What a pass is given."""
        views = self.extent.views(self.tiles)
        return Rows(views.slots, self.gradient, views.tensor_of_tile, views.index_in_tensor, self.sinks)


class _Second:
    """An :class:`Apply`, looked up for pieces."""

    def __init__(self, apply: Apply, buffers: Buffers) -> None:
        self._by_extent = [_rounded(apply.per_tensor, extent) for extent in buffers.extents]
        self._spread = [_ChannelCoefficients(apply.per_channel, extent, apply.keys) for extent in buffers.extents]

    def coefficients(self, piece: _Piece) -> tuple[Coefficients, Coefficients]:
        """Those per tensor, and those per element of a piece."""
        return self._by_extent[piece.index], self._spread[piece.index].of(piece.tiles)


class _ChannelCoefficients:
    """A step's coefficients of output channels, looked up per element."""

    def __init__(self, per_channel: Mapping[str, Tensor], extent: ExtentBuffers, keys: Keys) -> None:
        self._values = _rounded(per_channel, extent)
        self._channels = ChannelMap(extent.extent, keys)
        self._first_tile = extent.tiles.start

    def of(self, tiles: range) -> Coefficients:
        """Name to ``(tiles, 256)`` for some of the shard's tiles."""
        if not self._values:
            return {}
        where = range(self._first_tile + tiles.start, self._first_tile + tiles.stop)
        spread = self._channels.spread(torch.stack(list(self._values.values())), where)
        return dict(zip(self._values, spread, strict=True))


def cut(tiles: range, piece_tiles: int, edges: Iterable[int] = ()) -> list[range]:
    """Pieces of ``tiles``, none of which reaches over an edge."""
    within = {edge for edge in edges if tiles.start < edge < tiles.stop}
    bounds = sorted({*range(tiles.start, tiles.stop, piece_tiles), tiles.stop, *within})
    return [range(*each) for each in itertools.pairwise(bounds)]


def _parts(sinks: Iterable[tuple[range, Tensor]], tiles: range) -> tuple[Tensor, ...]:
    """What sinks have of a piece, which reaches over the edge of none."""
    return tuple(
        sink[tiles.start - its_tiles.start : tiles.stop - its_tiles.start]
        for its_tiles, sink in sinks
        if its_tiles.start <= tiles.start and tiles.stop <= its_tiles.stop
    )


def _rounded(coefficients: Mapping[str, Tensor], extent: ExtentBuffers) -> dict[str, Tensor]:
    """Coefficients in the state dtype: float64 is rounded once, here."""
    if not coefficients:
        return {}
    stacked = torch.stack(list(coefficients.values())).to(extent.device, extent.extent.dtype)
    return dict(zip(coefficients, stacked.unbind(), strict=True))


def _are_finite(values: Sequence[Tensor]) -> list[bool]:
    """Of 0-dim tensors on one device."""
    if not values:
        return []
    are_finite: list[bool] = torch.isfinite(torch.stack([value.double() for value in values])).tolist()
    return are_finite


def _count_nonfinite_tiles(piece: _Piece) -> int:
    """Tiles with inf or NaN; none where finite values merely add up to more than there is."""
    rows = piece.rows()
    mean = rows.gradient.mean(rows.tensor_of_tile, piece.extent.extent.dtype)
    return int((~torch.isfinite(mean)).any(dim=1).sum())
