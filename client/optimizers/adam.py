"""Adam, AdamW. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import AdamRule, AdamWRule
from ..keywords import ServiceOptions, make_rule, torch_keywords
from ..optimizer import ServiceOptimizer


class Adam(ServiceOptimizer):
    """Adam, as :class:`torch.optim.Adam`.

    The equations are those of :class:`stepwell.optim.AdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        weight_decay: Weight decay; the rule's equations say where it enters.
        amsgrad: Use the largest squared average so far.
        foreach: Accepted as torch's; has no effect, since the service computes the update.
        maximize: Go up the gradient.
        capturable: Accepted as torch's, as long as it is False.
        differentiable: Accepted as torch's, as long as it is False.
        fused: Accepted as torch's; has no effect, since the service computes the update.
        decoupled_weight_decay: Multiply the parameter, as AdamW does, instead of adding to the gradient.
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
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            AdamRule,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(
            params,
            rule,
            carried=torch_keywords(foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused),
            **options,
        )


class AdamW(ServiceOptimizer):
    """AdamW, as :class:`torch.optim.AdamW`: Adam whose weight decay multiplies the parameter.

    The equations are those of :class:`stepwell.optim.AdamWRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the largest squared average so far.
        maximize: Go up the gradient.
        foreach: Accepted as torch's; has no effect, since the service computes the update.
        capturable: Accepted as torch's, as long as it is False.
        differentiable: Accepted as torch's, as long as it is False.
        fused: Accepted as torch's; has no effect, since the service computes the update.
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
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            AdamWRule, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize
        )
        super().__init__(
            params,
            rule,
            carried=torch_keywords(foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused),
            **options,
        )
