"""SAdam, SRAdam. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import SAdamRule, SRAdamRule
from ..keywords import ServiceOptions, make_rule
from ..optimizer import ServiceOptimizer


class SAdam(ServiceOptimizer):
    """SAdam.

    The equations are those of :class:`stepwell.optim.SAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
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
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            SAdamRule, lr=lr, betas=betas, weight_decay=weight_decay, weight_decay_by_lr=weight_decay_by_lr
        )
        super().__init__(params, rule, **options)


class SRAdam(ServiceOptimizer):
    """SRAdam: RAdam with SAdam's softplus.

    The equations are those of :class:`stepwell.optim.SRAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
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
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            SRAdamRule, lr=lr, betas=betas, weight_decay=weight_decay, weight_decay_by_lr=weight_decay_by_lr
        )
        super().__init__(params, rule, **options)
