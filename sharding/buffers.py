"""A shard's memory: master parameters and slots of the tiles that it owns."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Set

import torch
from torch import Tensor

from ..optim import MASTER_PARAM, TILE_NUMEL, Rule, Slot, strided
from .coverage import Runs
from .keys import Keys, KeyState
from .layout import Extent, Layout, Piece

MASTER = Slot(MASTER_PARAM, "param")
"""The fp32 (fp64) parameters themselves, kept and written like any slot."""

MAX_VIEWS = 2**12
"""So many runs of tiles are kept as views, which spares each call of a kernel some ten microseconds."""

Reader = Callable[[int, str, int, Tensor], None]
"""Fills a tensor with elements of a slot from ``offset`` on: ``(param, slot, offset, out)``, ``out`` ``(numel,)``."""


@dataclasses.dataclass(frozen=True, slots=True)
class StateSource:
    """A whole state of a job, wherever it comes from: a worker's first parameters, a state dict, a checkpoint.

    Attributes:
        read: Reads elements of a slot, straight into the memory where they belong.
        available: The (param, slot) pairs that it has.
        step_counts: Steps of each tensor so far, by parameter index; 0 where absent.
        scalars: The rule's scalars; empty for their initial values.
        sequence: Operations so far.
        step: Steps so far, skipped ones included.
        skipped_steps: Steps that were skipped.
    """

    read: Reader
    available: Set[tuple[int, str]]
    step_counts: Mapping[int, int] = dataclasses.field(default_factory=dict)
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sequence: int = 0
    step: int = 0
    skipped_steps: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class TileViews:
    """Some tiles of an extent's buffers; see :class:`ExtentBuffers`."""

    slots: Mapping[str, Tensor]
    tensor_of_tile: Tensor
    index_in_tensor: Tensor


class ExtentBuffers:
    """One extent's buffers on one shard.

    Attributes:
        extent: The extent.
        tiles: The tiles that the shard owns.
        device: Where they live.
        slots: Slot name to ``(len(tiles), width)`` in the slot's dtype; ``master_param`` among them.
        stride: Of the rule's strided slots; 1 if it has none.
        tensor_of_tile: ``(len(tiles),)`` int64, on the device; ``tensor_of_tile_on_cpu`` is the same on the CPU.
        index_in_tensor: ``(len(tiles),)`` int64 on the device, the position of each tile in its tensor.
    """

    def __init__(self, extent: Extent, tiles: range, rule: Rule, device: torch.device) -> None:
        self.extent = extent
        self.tiles = tiles
        self.device = device
        self._declared = {slot.name: slot for slot in (MASTER, *rule.slots)}
        self.slots = {
            name: torch.zeros(len(tiles), slot.width, dtype=slot.dtype(extent.dtype), device=device)
            for name, slot in self._declared.items()
        }
        owned = extent.table(tiles)
        self.tensor_of_tile_on_cpu = torch.from_numpy(owned.tensor_of_tile)
        self.tensor_of_tile = self.tensor_of_tile_on_cpu.to(device)
        self._valid_numel = torch.from_numpy(owned.valid_numel)
        self._index_in_tensor = torch.from_numpy(owned.index_in_tensor)
        self.index_in_tensor = self._index_in_tensor.to(device)
        tail_rows = torch.nonzero(self._valid_numel < TILE_NUMEL)
        columns = torch.arange(TILE_NUMEL, device="cpu")
        is_padding = columns >= self._valid_numel[tail_rows]
        self._padding = (tail_rows * TILE_NUMEL + columns)[is_padding]
        strides = {slot.stride for slot in rule.slots if slot.stride > 1}
        assert len(strides) <= 1, "a rule has one stride"
        self.stride = next(iter(strides), 1)
        self._views: dict[tuple[int, int], TileViews] = {}

    def views(self, tiles: range) -> TileViews:
        """What a kernel's call reads and writes of some tiles, counted from the first owned one."""
        key = tiles.start, tiles.stop
        found = self._views.get(key)
        if found is None:
            where = slice(*key)
            slots = {name: values[where] for name, values in self.slots.items()}
            found = TileViews(slots, self.tensor_of_tile[where], self.index_in_tensor[where])
            if len(self._views) < MAX_VIEWS:  # most are the same in every step
                self._views[key] = found
        return found

    @property
    def numel(self) -> int:
        """Elements of the owned tiles, padding included."""
        return len(self.tiles) * TILE_NUMEL

    def padding_in(self, runs: Runs) -> Tensor:
        """Where padding lies among the values of ``runs``, packed one after the other; int64, on the CPU."""
        edges = torch.searchsorted(self._padding, torch.from_numpy(runs))
        lengths = runs[:, 1] - runs[:, 0]
        shifts = (lengths.cumsum() - lengths - runs[:, 0]).tolist()
        parts = [
            self._padding[lo:hi] + shift for (lo, hi), shift in zip(edges.tolist(), shifts, strict=True) if lo < hi
        ]
        return torch.cat([self._padding[:0], *parts])

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.slots.values())

    def pieces(self, slot: str) -> Iterator[Piece]:
        """The owned parts of every tensor's ``slot``."""
        return self.extent.pieces(self.tiles, self._declared[slot].stride)

    def read(self, slot: str, piece: Piece) -> Tensor:
        """Copy a piece out, ``(piece.numel,)``."""
        rows, mask = self._cells(slot, piece)
        return rows.reshape(-1)[: piece.numel].clone() if mask is None else rows[mask]

    def write(self, slot: str, piece: Piece, values: Tensor) -> None:
        """Copy a piece in; ``values`` is ``(piece.numel,)`` of any floating dtype."""
        self.fill(slot, piece, lambda out: out.copy_(values))

    def fill(self, slot: str, piece: Piece, read: Callable[[Tensor], object]) -> None:
        """Have ``read`` fill a piece, ``(piece.numel,)``, in place unless the slot is strided."""
        rows, mask = self._cells(slot, piece)
        if mask is None:
            read(rows.view(-1)[: piece.numel])
        else:
            values = rows.new_empty(piece.numel)
            read(values)
            rows[mask] = values

    def without_padding(self, slot: str, rows: slice, values: Tensor) -> Iterator[Tensor]:
        """The elements that are no padding, flat, in runs one after the other.

        Args:
            slot: The slot.
            rows: Which of its rows (relative to the owned ones).
            values: ``(len(rows), slot.width)`` on the CPU, what they hold.
        """
        if self._declared[slot].stride > 1:
            yield values[self._filled(slot, rows)]
            return
        flat, begin, valid = values.view(-1), 0, self._valid_numel[rows]
        for row in torch.nonzero(valid < TILE_NUMEL).view(-1).tolist():
            yield flat[begin : row * TILE_NUMEL + int(valid[row])]
            begin = (row + 1) * TILE_NUMEL
        yield flat[begin:]

    def _cells(self, slot: str, piece: Piece) -> tuple[Tensor, Tensor | None]:
        """The rows that hold a piece, and which of their elements are it; None if they are simply the first ones."""
        local = slice(piece.first_tile - self.tiles.start, piece.last_tile - self.tiles.start)
        rows = self.slots[slot][local]
        return rows, None if self._declared[slot].stride == 1 else self._filled(slot, local).to(rows.device)

    def _filled(self, slot: str, rows: slice) -> Tensor:
        """Which elements of a strided slot's rows are no padding, ``(len(rows), slot.width)`` bool, on the CPU."""
        declared = self._declared[slot]
        start = self._index_in_tensor[rows] * TILE_NUMEL
        stop = start + self._valid_numel[rows]
        counts = -(-stop // declared.stride) + (-start // declared.stride)
        return torch.arange(declared.width, device="cpu") < counts[:, None]


class Buffers:
    """All of a shard's memory.

    Args:
        layout: The flat space.
        rule: Says which slots there are.
        keys: The tensors and output channels, as the rule sees them.
        shard: The shard's index.
        num_shards: How many shards there are.
        device: Where the buffers live.

    Attributes:
        extents: The owned part of each extent.
        key_state: The rule's state per tensor or channel, all of it.
    """

    def __init__(
        self, layout: Layout, rule: Rule, *, keys: Keys, shard: int, num_shards: int, device: torch.device
    ) -> None:
        self.extents = tuple(
            ExtentBuffers(extent, extent.tile_range(shard, num_shards), rule, device) for extent in layout.extents
        )
        self.key_state = KeyState(rule, keys)
        self._rule = rule
        empty = [index for index, param in enumerate(layout.params) if param.numel == 0]
        begun = (piece.param for buffers in self.extents for piece in buffers.pieces(MASTER.name) if piece.offset == 0)
        self._exports_keys_of = sorted([*begun, *(empty if shard == 0 else [])])

    def extended(self, added: Buffers) -> Buffers:
        """These buffers and those of ``added`` extents, which know all keys; memory is shared, nothing moves."""
        both = copy.copy(self)
        both.extents = (*self.extents, *added.extents)
        both.key_state = added.key_state.continuing(self.key_state)
        both._exports_keys_of = sorted({*self._exports_keys_of, *added._exports_keys_of})
        return both

    def with_key_state_kept(self) -> Buffers:
        """These buffers, memory and all, whose key state no step replaces."""
        kept = copy.copy(self)
        kept.key_state = copy.copy(self.key_state)
        return kept

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffers.size_bytes for buffers in self.extents)

    def export(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """Every owned piece of every slot: slot name, piece, ``(piece.numel,)`` copy.

        Key state, which every shard holds, is exported by the one that has the tensor's first tile, whole; that of a
        tensor without elements by shard 0.
        """
        for slot in (MASTER, *self._rule.slots):
            for buffers in self.extents:
                for piece in buffers.pieces(slot.name):
                    yield slot.name, piece, buffers.read(slot.name, piece)
        yield from self.export_key_state()

    def export_key_state(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """The part of :meth:`export` that is key state."""
        for name, param, values in self.key_state.pieces(self._exports_keys_of):
            yield name, Piece(param, 0, len(values), 0, 0), values

    def load(self, source: StateSource) -> None:
        """Take a whole state: parameters that ``source`` does not have stay, slots that it lacks start afresh."""
        self._fill(MASTER.name, source)
        self.key_state.load(source.read, source.available)
        for slot in self._rule.slots:
            for buffers in self.extents:
                if all((piece.param, slot.name) in source.available for piece in buffers.pieces(slot.name)):
                    continue  # all of it is filled; padding is zero as ever
                if slot.init == "zeros":
                    buffers.slots[slot.name].zero_()
                else:
                    self.copy_param(slot, buffers, range(len(buffers.tiles)))
            self._fill(slot.name, source)

    def _fill(self, slot: str, source: StateSource) -> None:
        for buffers in self.extents:
            for piece in buffers.pieces(slot):
                if (piece.param, slot) in source.available:
                    buffers.fill(slot, piece, functools.partial(source.read, piece.param, slot, piece.offset))

    def copy_param(self, slot: Slot, buffers: ExtentBuffers, rows: range) -> None:
        """Set rows of a slot to the (strided) parameters."""
        where = slice(rows.start, rows.stop)
        param = buffers.slots[MASTER.name][where]
        values = param if slot.stride == 1 else strided(buffers.index_in_tensor[where], slot.stride).of(param)
        buffers.slots[slot.name][rows.start : rows.stop].copy_(values)

    def reload(self, param: int, value: Tensor, never_stepped: bool, *, offset: int = 0) -> None:
        """Take a parameter that was changed by hand; where it equals the master's rounding the master stays.

        Args:
            param: Parameter index.
            value: ``(numel,)`` in the model's dtype, elements from ``offset`` on.
            never_stepped: Whether the parameter had no step yet, so that copies of the initial value follow it.
            offset: Where ``value`` begins in the flattened parameter.
        """
        for buffers in self.extents:
            for piece in (p for p in buffers.pieces(MASTER.name) if p.param == param):
                held = buffers.read(MASTER.name, piece)
                first, last = (
                    min(max(edge - piece.offset, 0), piece.numel) for edge in (offset, offset + value.numel())
                )
                start = piece.offset - offset
                given = value[start + first : start + last].to(held.device) if first < last else value[:0]
                old = held[first:last]
                held[first:last] = torch.where(given == old.to(given.dtype), old, given.to(old.dtype))
                buffers.write(MASTER.name, piece, held)
                if never_stepped:
                    rows = range(piece.first_tile - buffers.tiles.start, piece.last_tile - buffers.tiles.start)
                    for slot in (s for s in self._rule.slots if s.init == "param"):
                        self.copy_param(slot, buffers, rows)
