"""The passes over a run of tiles: what a rule is given, and where what it returns goes. Run eagerly or compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from ..optim import Coefficients, ReducingRule, Rule, Tiles, strided
from ..optim.rule import tile_sum
from .buffers import MASTER
from .gradient import Stretch


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A run of a shard's tiles, as a call reads and writes them.

    Attributes:
        slots: Name to ``(tiles, width)``, the parameters among them; written in place.
        gradient: Read only.
        tensor_of_tile, index_in_tensor: ``(tiles,)`` int64.
        sinks: ``(tiles, 256)`` in the model's dtype, where new parameters go beside the master's.
    """

    slots: Mapping[str, Tensor]
    gradient: Stretch
    tensor_of_tile: Tensor
    index_in_tensor: Tensor
    sinks: tuple[Tensor, ...] = ()

    def tiles(self, stride: int) -> Tiles:
        """What the rule is given of them."""
        param = self.slots[MASTER.name]
        slots = {name: values.to(param.dtype) for name, values in self.slots.items() if name != MASTER.name}
        grad = self.gradient.clipped(self.gradient.mean(self.tensor_of_tile, param.dtype))
        return Tiles(param, grad, slots, None if stride == 1 else strided(self.index_in_tensor, stride))

    def look_up(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """Coefficients per tensor as ``(tiles, 1)``."""
        return {name: values[self.tensor_of_tile].unsqueeze(-1) for name, values in coefficients.items()}

    def written(self) -> list[Tensor]:
        """Everything that a pass may write."""
        return [*self.slots.values(), *self.sinks]

    def store(self, slots: Mapping[str, Tensor]) -> None:
        """Write what a pass returned, rounded to the slots' dtypes."""
        for name, values in slots.items():
            self.slots[name].copy_(values)
        if MASTER.name in slots:
            for sink in self.sinks:
                sink.copy_(slots[MASTER.name])


Pass = Callable[..., list[Tensor]]
"""Takes a rule, the stride of its strided slots, rows and coefficients; returns one tensor per sum."""


def look_pass(rule: Rule, stride: int, rows: Rows, coefficients: Coefficients, with_squares: bool) -> list[Tensor]:
    """Per tile the sum of the gradient, which is finite only if all of it is, and the sum of its squares in float64.

    Squared in float64, where the square of a float32 is exact and cannot overflow; after elements were clipped.
    """
    mean = rows.gradient.mean(rows.tensor_of_tile, rows.slots[MASTER.name].dtype)
    squares = [tile_sum(rows.gradient.clipped(mean).double().square())] if with_squares else []
    return [tile_sum(mean), *squares]


def local_pass(rule: ReducingRule, stride: int, rows: Rows, coefficients: Coefficients) -> list[Tensor]:
    """The rule's first pass: slots change; what its sums are of."""
    slots, sums = rule.local(rows.tiles(stride), rows.look_up(coefficients))
    rows.store(slots)
    return [sums[name] for name in rule.sums]


def apply_pass(
    rule: Rule, stride: int, rows: Rows, coefficients: Coefficients, per_element: Coefficients
) -> list[Tensor]:
    """The rule's second pass: parameters and slots change."""
    param, slots = rule.apply(rows.tiles(stride), {**rows.look_up(coefficients), **per_element})
    rows.store({**slots, MASTER.name: param})
    return []
