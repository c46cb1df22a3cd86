"""The flat space: where every parameter lies, in tiles, blocks and chunks.

All parameters are flattened in index order into *extents*, one per state dtype and registration: parameters that are
added during training get extents of their own, and nothing that exists moves. Each tensor starts on a tile boundary.
Tiles and blocks fix the bits of every sum and depend on the parameters alone; a chunk is the unit of ownership and
never touches the bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..optim import TILE_NUMEL
from .errors import UnsupportedParameterError

MAX_BLOCK_NUMEL = 2**18
MAX_CHUNK_NUMEL = 2**20
WANTED_BLOCKS = 64
"""A small model is cut into about this many blocks, so that shards find work."""

_MODEL_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
DTYPE_NAMES = tuple(_MODEL_DTYPES)


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype of ``name`` (``"float32"``, ...).

    Raises:
        UnsupportedParameterError: If it is not a real floating-point dtype that the service keeps.
    """
    if name not in _MODEL_DTYPES:
        raise UnsupportedParameterError(f"expected a dtype of {', '.join(_MODEL_DTYPES)}; got {name}")
    return _MODEL_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of ``dtype`` without ``torch.``."""
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter, as the job registers it. Its position among all is its parameter index.

    Attributes:
        name: Its name with wrappers' prefixes stripped, empty where none is known.
        shape: Its shape.
        dtype: The model's dtype for it, by name.
        group: The index of its parameter group.
        decays: Whether its group's weight decay is for it too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    decays: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def state_dtype(self) -> torch.dtype:
        """float64 for float64 parameters, else float32."""
        return torch.float64 if dtype_from_name(self.dtype) == torch.float64 else torch.float32


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A run of one slot of one tensor, inside a run of tiles.

    Attributes:
        param: Parameter index.
        offset: Where it starts in the slot's flattened tensor.
        numel: Its elements.
        first_tile, last_tile: The tiles of the extent that hold it, the last one exclusive.
    """

    param: int
    offset: int
    numel: int
    first_tile: int
    last_tile: int


@dataclasses.dataclass(frozen=True, slots=True)
class TileTable:
    """What lies in some tiles of an extent.

    Attributes:
        tensor_of_tile: ``(tiles,)`` int64, parameter index of each.
        index_in_tensor: ``(tiles,)`` int64, position of each inside its tensor.
        valid_numel: ``(tiles,)`` int64, elements of each that are not padding.
    """

    tensor_of_tile: NDArray[np.int64]
    index_in_tensor: NDArray[np.int64]
    valid_numel: NDArray[np.int64]


class Extent:
    """A contiguous part of the flat space with one state dtype.

    Attributes:
        dtype: The state dtype.
        params: Parameter indices, in order.
        num_tiles: Tiles in all.
        tiles_per_block, tiles_per_chunk: Powers of two.
        first_tile: ``(len(params) + 1,)`` int64, where each parameter starts.
    """

    def __init__(
        self, dtype: torch.dtype, params: Sequence[int], numels: Sequence[int], chunk_numel: int | None
    ) -> None:
        self.dtype = dtype
        self.params = tuple(params)
        self._params, self._numels = np.asarray(params, dtype=np.int64), np.asarray(numels, dtype=np.int64)
        counts = -(-self._numels // TILE_NUMEL)
        self.first_tile: NDArray[np.int64] = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self.num_tiles = int(self.first_tile[-1])
        wanted = _power_of_two_at_most(max(self.padded_numel // WANTED_BLOCKS, TILE_NUMEL))
        self.tiles_per_block = min(wanted, MAX_BLOCK_NUMEL) // TILE_NUMEL
        self.tiles_per_chunk = self._tiles_per_chunk(wanted, chunk_numel)

    @property
    def padded_numel(self) -> int:
        """Elements, padding included."""
        return self.num_tiles * TILE_NUMEL

    @property
    def num_chunks(self) -> int:
        """Chunks; the last may be short."""
        return -(-self.num_tiles // self.tiles_per_chunk)

    def positions(self, tiles: range) -> NDArray[np.int64]:
        """Position in ``params`` of the tensor that each of ``tiles`` is of, ``(len(tiles),)`` int64."""
        return number_runs(self.first_tile, tiles)

    def table(self, tiles: range) -> TileTable:
        """What lies in ``tiles``.

        Asked for those that one has to do with: of all tiles of a large model it takes 24 bytes for every 256 elements.
        """
        positions = self.positions(tiles)
        index_in_tensor = np.arange(tiles.start, tiles.stop, dtype=np.int64) - self.first_tile[positions]
        valid_numel = np.minimum(self._numels[positions] - index_in_tensor * TILE_NUMEL, TILE_NUMEL)
        return TileTable(self._params[positions], index_in_tensor, valid_numel)

    def tile_range(self, shard: int, num_shards: int) -> range:
        """The tiles that ``shard`` owns: an equal run of chunks, possibly empty."""
        first, last = (self.num_chunks * edge // num_shards for edge in (shard, shard + 1))
        return range(
            min(first * self.tiles_per_chunk, self.num_tiles), min(last * self.tiles_per_chunk, self.num_tiles)
        )

    def pieces(self, tiles: range, stride: int = 1) -> Iterator[Piece]:
        """The parts of every tensor that lie in ``tiles``, of a slot that holds every ``stride``-th element."""
        if len(tiles) == 0:
            return
        first = int(np.searchsorted(self.first_tile, tiles.start, side="right")) - 1
        for position in range(first, len(self.params)):
            begin, end = int(self.first_tile[position]), int(self.first_tile[position + 1])
            if begin >= tiles.stop:
                return
            lo, hi = max(begin, tiles.start), min(end, tiles.stop)
            if lo >= hi:
                continue
            param = self.params[position]
            elements = [min((edge - begin) * TILE_NUMEL, int(self._numels[position])) for edge in (lo, hi)]
            offset, stop = (-(-edge // stride) for edge in elements)
            yield Piece(param, offset, stop - offset, lo, hi)

    def _tiles_per_chunk(self, wanted_numel: int, chunk_numel: int | None) -> int:
        chunk = min(wanted_numel, MAX_CHUNK_NUMEL) if chunk_numel is None else chunk_numel
        block = self.tiles_per_block * TILE_NUMEL
        if chunk < TILE_NUMEL or chunk & (chunk - 1):
            raise ValueError(f"chunk_numel: expected a power of two of at least {TILE_NUMEL}, got {chunk}")
        return max(chunk, block) // TILE_NUMEL


@dataclasses.dataclass(frozen=True)
class Layout:
    """The whole flat space.

    Attributes:
        params: Every parameter, by index.
        extents: The extents, in canonical order.
    """

    params: tuple[ParamSpec, ...]
    extents: tuple[Extent, ...]

    @classmethod
    def build(
        cls, params: Sequence[ParamSpec], *, batches: Sequence[int] | None = None, chunk_numel: int | None = None
    ) -> Layout:
        """Lay out ``params`` in index order, an extent per registration and state dtype, float32 first.

        Args:
            params: The parameters.
            batches: How many parameters were registered at once, time after time; None for all at once.
            chunk_numel: Elements in a chunk, a power of two; None chooses by the model's size. Never below a block.
        """
        extents = []
        edges = np.cumsum([0, *([len(params)] if batches is None else batches)]).tolist()
        assert edges[-1] == len(params), "checked where batches come from"
        for batch, dtype in itertools.product(itertools.pairwise(edges), (torch.float32, torch.float64)):
            members = [index for index in range(*batch) if params[index].state_dtype == dtype]
            if members:
                extents.append(Extent(dtype, members, [params[index].numel for index in members], chunk_numel))
        return cls(tuple(params), tuple(extents))

    @property
    def numel(self) -> int:
        """Elements of all parameters, without padding."""
        return sum(param.numel for param in self.params)

    def group_of_tensor(self) -> torch.Tensor:
        """``(num_tensors,)`` int64."""
        return torch.tensor([param.group for param in self.params], dtype=torch.int64, device="cpu")


def wire_dtype(layout: Layout, extent: Extent) -> torch.dtype:
    """What an extent's gradients and parameters travel in: the model's dtype if it is one, else the state's."""
    dtypes = {layout.params[index].dtype for index in extent.params}
    return dtype_from_name(dtypes.pop()) if len(dtypes) == 1 else extent.dtype


def runs_within(edges: NDArray[np.int64], tiles: range) -> tuple[int, NDArray[np.int64]]:
    """The runs that ``tiles`` lie in: the number of the first, and how many of the tiles each of them has.

    Args:
        edges: ``(num_runs + 1,)`` int64, ascending, where each run begins, and where the last one ends.
        tiles: Within the runs.
    """
    first = int(np.searchsorted(edges, tiles.start, side="right")) - 1
    last = int(np.searchsorted(edges, tiles.stop, side="left"))
    within = np.clip(edges[first : last + 1], tiles.start, tiles.stop)
    return first, within[1:] - within[:-1]


def number_runs(edges: NDArray[np.int64], tiles: range) -> NDArray[np.int64]:
    """The run that each of ``tiles`` lies in, ``(len(tiles),)`` int64; an empty run has none."""
    first, lengths = runs_within(edges, tiles)
    return np.repeat(np.arange(first, first + len(lengths), dtype=np.int64), lengths)


def _power_of_two_at_most(value: int) -> int:
    return 1 << (value.bit_length() - 1)
