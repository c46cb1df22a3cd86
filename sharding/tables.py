"""What follows from a job's parameters alone, worked out once: the tables that every step reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..optim import Channels, Scope, StepInputs
from .job import JobSpec
from .keys import Keys
from .layout import Layout
from .partials import SumTable, TileSumTable, sum_table


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """See the module.

    Attributes:
        keys: Tensors and output channels as the rule sees them.
        channels: The channels, as a rule reads them.
        group_of_tensor: ``(num_tensors,)`` int64.
        numel: ``(num_tensors,)`` float64.
        decays: ``(num_tensors,)`` bool, whether weight decay is for the tensor.
        sums: Where the rule's partials go.
        squares: Where the gradient's squares go, for its norm.
    """

    keys: Keys
    channels: Channels
    group_of_tensor: Tensor
    numel: Tensor
    decays: Tensor
    sums: SumTable
    squares: TileSumTable

    @classmethod
    def build(cls, spec: JobSpec, layout: Layout) -> Tables:
        """The tables of ``spec``, laid out as ``layout``."""
        keys = spec.keys()
        return cls(
            keys=keys,
            channels=keys.channels,
            group_of_tensor=layout.group_of_tensor(),
            numel=torch.tensor([param.numel for param in spec.params], dtype=torch.float64, device="cpu"),
            decays=torch.tensor([param.decays for param in spec.params], dtype=torch.bool, device="cpu"),
            sums=sum_table(layout, spec.rule, keys=keys, num_groups=spec.num_groups),
            squares=TileSumTable(layout, Scope.MODEL, spec.num_groups),
        )

    def inputs(
        self,
        hyper: Mapping[str, Sequence[float]],
        *,
        present: Tensor,
        step_count: Tensor,
        scalars: Mapping[str, float],
        key_state: Mapping[str, Tensor],
    ) -> StepInputs:
        """What the rule is told of one step; see :class:`stepwell.optim.StepInputs` for the arguments.

        Args:
            hyper: Hyperparameter name to one value per group.
            present: ``(num_tensors,)`` bool.
            step_count: ``(num_tensors,)`` float64, this step included.
            scalars: Before the step.
            key_state: Before the step.
        """
        return StepInputs(
            hyper=hyper,
            group_of_tensor=self.group_of_tensor,
            present=present,
            step_count=step_count,
            scalars=scalars,
            numel=self.numel,
            decays=self.decays,
            channels=self.channels,
            key_state=key_state,
        )
