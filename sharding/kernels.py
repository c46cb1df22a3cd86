"""Running a rule's passes over a shard's tiles, eagerly or compiled; the same functions either way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..optim import Coefficients, ReducingRule, Rule, Scope
from .buffers import Buffers, ExtentBuffers
from .channels import ChannelMap
from .compiled import run_compiled
from .compiling import Kernel
from .gradient import Gradient, with_all_terms, written_out
from .keys import Keys
from .partials import SumTable
from .passes import Pass, Rows, apply_pass, local_pass, look_pass

PIECE_TILES = 256
"""Tiles in one eager call: few enough for every operand to stay in cache.

Fewer never touch the bits. More could: torch cuts a call of 257 tiles and three threads at an element that is no
multiple of the vector width, and functions that are not correctly rounded (exp, log) give other bits in the remainder.
"""

COMPILED_PIECE_TILES = 2**14
"""Tiles in one compiled call: enough for its 50 us not to count, and Python's other threads get a turn in between."""

CHANNEL_PIECE_TILES = 2**11
"""The same for rules with channels, whose calls take and give values per element."""

MAX_PARTS = 8
"""More ranks' gradients than that are averaged in a pass of their own; each would be read again by every pass."""


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
        """The gradient as this kind of kernel reads it best, with the same bits."""
        is_compiled = self.kernel == "compiled"
        if is_compiled and all(len(grad.parts) <= MAX_PARTS for grad in gradient):
            return gradient
        means = [
            written_out(grad, extent, cut(len(extent.tiles), PIECE_TILES))
            for grad, extent in zip(gradient, buffers.extents, strict=True)
        ]
        if is_compiled:
            present = (torch.ones_like(grad.here[:1]) for grad in gradient if grad.here is not None)
            means = [dataclasses.replace(mean, here=here) for mean, here in zip(means, present, strict=True)]
        return tuple(means)

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
        squares, num_bad = table.empty(1), 0
        for index, extent, rows, piece in self._pieces(buffers, gradient):
            sums, *its_squares = self._run(look_pass, extent, piece, {}, for_norm)
            if not bool(torch.isfinite(sums.sum())):
                num_bad += _count_nonfinite_tiles(piece, extent.extent.dtype)
            if its_squares:
                table.fold(squares, index, extent.tiles.start + rows.start, its_squares)
        return num_bad, squares[0]

    def local(self, buffers: Buffers, gradient: Gradient, c: Mapping[str, Tensor], table: SumTable) -> Tensor:
        """First pass over everything the shard owns.

        Args:
            buffers: The shard's memory; slots change, and the parameters with a rule of one pass.
            gradient: The step's.
            c: Coefficients per tensor, ``(num_tensors,)`` float64.
            table: Where partials go.

        Returns:
            ``(len(rule.sums), num_segments)`` float64, 0 where the shard owns nothing.
        """
        partials = table.empty(len(self._sums))
        by_extent = [_rounded(c, extent) for extent in buffers.extents]
        for index, extent, rows, piece in self._pieces(buffers, gradient):
            sums = self._run(local_pass, extent, piece, by_extent[index])
            table.fold(partials, index, extent.tiles.start + rows.start, sums)
        return partials

    def apply(
        self,
        buffers: Buffers,
        gradient: Gradient,
        c: Mapping[str, Tensor],
        per_channel: Mapping[str, Tensor],
        keys: Keys,
    ) -> None:
        """Second pass over everything the shard owns; parameters and slots change.

        Args:
            buffers: The shard's memory.
            gradient: The step's.
            c: Coefficients per tensor.
            per_channel: Coefficients per channel, ``(num_channels + 1,)`` float64, the last one for elements outside
                any channel.
            keys: The channels.
        """
        by_extent = [_rounded(c, extent) for extent in buffers.extents]
        spread = [_ChannelCoefficients(per_channel, extent, keys) for extent in buffers.extents]
        for index, extent, rows, piece in self._pieces(buffers, gradient):
            self._run(apply_pass, extent, piece, by_extent[index], spread[index].of(rows))

    def _pieces(self, buffers: Buffers, gradient: Gradient) -> Iterator[tuple[int, ExtentBuffers, slice, Rows]]:
        is_compiled = self.kernel == "compiled"
        piece_tiles = (
            (CHANNEL_PIECE_TILES if self._has_channels else COMPILED_PIECE_TILES) if is_compiled else PIECE_TILES
        )
        for index, (extent, grad) in enumerate(zip(buffers.extents, gradient, strict=True)):
            whole = with_all_terms(grad, extent.extent.dtype) if is_compiled else grad
            for rows in cut(len(extent.tiles), piece_tiles):
                yield (
                    index,
                    extent,
                    rows,
                    Rows(
                        {name: values[rows] for name, values in extent.slots.items()},
                        whole.of(rows),
                        extent.tensor_of_tile[rows],
                        extent.index_in_tensor[rows],
                        tuple(sink[rows] for sink in extent.sinks),
                    ),
                )

    def _run(self, function: Pass, extent: ExtentBuffers, rows: Rows, *args: Any) -> list[Tensor]:
        if self.kernel == "eager":
            return function(self.rule, extent.stride, rows, *args)
        return run_compiled(function, self.rule, extent.stride, rows, *args, num_threads=self._num_threads)


class _ChannelCoefficients:
    """A step's coefficients of output channels, looked up per element."""

    def __init__(self, per_channel: Mapping[str, Tensor], extent: ExtentBuffers, keys: Keys) -> None:
        self._values = _rounded(per_channel, extent)
        self._channels = ChannelMap(extent.extent, keys)
        self._first_tile = extent.tiles.start

    def of(self, rows: slice) -> Coefficients:
        """Name to ``(tiles, 256)`` for the tiles of ``rows``."""
        if not self._values:
            return {}
        tiles = slice(self._first_tile + rows.start, self._first_tile + rows.stop)
        spread = self._channels.spread(torch.stack(list(self._values.values())), tiles)
        return dict(zip(self._values, spread, strict=True))


def cut(num_tiles: int, piece_tiles: int) -> list[slice]:
    """Pieces of ``num_tiles``."""
    edges = [*range(0, num_tiles, piece_tiles), num_tiles]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _rounded(coefficients: Mapping[str, Tensor], extent: ExtentBuffers) -> dict[str, Tensor]:
    """Coefficients in the state dtype: float64 is rounded once, here."""
    if not coefficients:
        return {}
    stacked = torch.stack(list(coefficients.values())).to(extent.device, extent.extent.dtype)
    return dict(zip(coefficients, stacked.unbind(), strict=True))


def _count_nonfinite_tiles(rows: Rows, dtype: torch.dtype) -> int:
    """Tiles with inf or NaN; none where finite values merely add up to more than there is."""
    mean = rows.gradient.mean(rows.tensor_of_tile, dtype)
    return int((~torch.isfinite(mean)).any(dim=1).sum())
