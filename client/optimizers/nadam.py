"""NAdam. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import NAdamRule
from ..keywords import ServiceOptions, make_rule, torch_keywords
from ..optimizer import ServiceOptimizer


class NAdam(ServiceOptimizer):
    """NAdam, as :class:`torch.optim.NAdam`.

    The equations are those of :class:`stepwell.optim.NAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        weight_decay: Weight decay; the rule's equations say where it enters.
        momentum_decay: Decay of the momentum's schedule.
        decoupled_weight_decay: Multiply the parameter, as AdamW does, instead of adding to the gradient.
        foreach: Accepted as torch's; has no effect, since the service computes the update.
        maximize: Go up the gradient.
        capturable: Accepted as torch's, as long as it is False.
        differentiable: Accepted as torch's, as long as it is False.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range, or ``capturable`` or ``differentiable`` True.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            NAdamRule,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
        )
        super().__init__(
            params,
            rule,
            carried=torch_keywords(foreach=foreach, capturable=capturable, differentiable=differentiable),
            **options,
        )
