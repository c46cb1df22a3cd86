"""What a rule is told of a step: hyperparameters by group, and the tensors that have one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Channels:
    """The output channels of a model, in the order of their tensors.

    Attributes:
        tensor: ``(num_channels,)`` int64, the tensor that each is of.
        numel: ``(num_channels,)`` float64, elements of each.
    """

    tensor: Tensor
    numel: Tensor


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What every shard knows alike about one step, before any sum is taken.

    Attributes:
        hyper: Live hyperparameters by name, one number for each group.
        group_of_tensor: ``(num_tensors,)`` int64.
        present: ``(num_tensors,)`` bool, whether the tensor has a gradient in this step.
        step_count: ``(num_tensors,)`` float64, the tensor's steps so far, this one included where it is present.
        scalars: The rule's scalars as the last step left them.
        numel: ``(num_tensors,)`` float64, elements of each tensor.
        decays: ``(num_tensors,)`` bool, whether weight decay is for the tensor.
        channels: The output channels, if the rule has any.
        key_state: Each key slot as the last step left it, ``(num_keys,)`` float64.
    """

    hyper: Mapping[str, Sequence[float]]
    group_of_tensor: Tensor
    present: Tensor
    step_count: Tensor
    scalars: Mapping[str, float]
    numel: Tensor
    decays: Tensor
    channels: Channels
    key_state: Mapping[str, Tensor]

    @property
    def groups(self) -> range:
        """The parameter groups."""
        return range(len(next(iter(self.hyper.values()))))

    def hyper_of(self, group: int) -> dict[str, float]:
        """One group's hyperparameters."""
        return {name: values[group] for name, values in self.hyper.items()}

    def per_tensor(self, name: str) -> Tensor:
        """Hyperparameter ``name`` of each tensor's group, ``(num_tensors,)`` float64; no decay where there is none."""
        return self._hyper_of_tensor[name]

    def where_present(self, value: Tensor | float, otherwise: float) -> Tensor:
        """``value`` for tensors with a gradient, ``otherwise`` for absent ones, ``(num_tensors,)`` float64."""
        wanted = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
        return torch.where(self.present, wanted, otherwise)

    def spread(self, by_group: Sequence[Mapping[str, float]], *, absent: Mapping[str, float]) -> dict[str, Tensor]:
        """Give each tensor its group's numbers: name to ``(num_tensors,)`` float64.

        Args:
            by_group: Name to number, for each group.
            absent: By name, what tensors without a gradient have instead; names that are not here make no difference.
        """
        table = [
            [numbers[name] for numbers in by_group] + [absent.get(name, numbers[name]) for numbers in by_group]
            for name in by_group[0]
        ]
        spread = torch.tensor(table, dtype=torch.float64, device="cpu").index_select(1, self._column)
        return dict(zip(by_group[0], spread.unbind(), strict=True))

    @functools.cached_property
    def _column(self) -> Tensor:
        """Where a tensor's numbers stand in a table with a column for each group, and another one for its absent."""
        return torch.where(self.present, self.group_of_tensor, self.group_of_tensor + len(self.groups))

    @functools.cached_property
    def _hyper_of_tensor(self) -> dict[str, Tensor]:
        values = self.spread([self.hyper_of(group) for group in self.groups], absent={})
        return {name: each * self.decays if name == "weight_decay" else each for name, each in values.items()}
