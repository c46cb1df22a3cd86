"""PreLAMB, UM. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import PreLAMBRule, UMRule
from ..keywords import ServiceOptions, make_rule
from ..optimizer import ServiceOptimizer


class PreLAMB(ServiceOptimizer):
    """PreLAMB: the gradient is scaled to the parameter's norm before it is averaged.

    The equations are those of :class:`stepwell.optim.PreLAMBRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        beta: Decay of the running average.
        weight_decay: Weight decay; the rule's equations say where it enters.
        weight_decay_by_lr: Scale weight decay by the learning rate.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            PreLAMBRule, lr=lr, beta=beta, weight_decay=weight_decay, weight_decay_by_lr=weight_decay_by_lr
        )
        super().__init__(params, rule, **options)


class UM(ServiceOptimizer):
    """Unit momentum: a step of the same length for every tensor.

    The equations are those of :class:`stepwell.optim.UMRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        beta: Decay of the running average.
        weight_decay: Weight decay; the rule's equations say where it enters.
        weight_decay_by_lr: Scale weight decay by the learning rate.
        norm: The norm that the step is divided by, "rms" or "l2".
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        beta: float = 0.9,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        norm: str = "rms",
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            UMRule, lr=lr, beta=beta, weight_decay=weight_decay, weight_decay_by_lr=weight_decay_by_lr, norm=norm
        )
        super().__init__(params, rule, **options)
