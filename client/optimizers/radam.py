"""RAdam. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import RAdamRule
from ..keywords import ServiceOptions, make_rule, torch_keywords
from ..optimizer import ServiceOptimizer


class RAdam(ServiceOptimizer):
    """RAdam, as :class:`torch.optim.RAdam`.

    The equations are those of :class:`stepwell.optim.RAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        weight_decay: Weight decay; the rule's equations say where it enters.
        decoupled_weight_decay: Multiply the parameter, as AdamW does, instead of adding to the gradient.
        foreach: Accepted as torch's; has no effect, since the service computes the update.
        maximize: Go up the gradient.
        capturable: Accepted as torch's, as long as it is False.
        differentiable: Accepted as torch's, as long as it is False.
        rho_threshold: From which rho on the step is rectified: 5 in torch, 4 in the paper.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range, or ``capturable`` or ``differentiable`` True.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        rho_threshold: float = 5.0,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            RAdamRule,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            rho_threshold=rho_threshold,
        )
        super().__init__(
            params,
            rule,
            carried=torch_keywords(foreach=foreach, capturable=capturable, differentiable=differentiable),
            **options,
        )
