"""RMSprop. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import RMSpropRule
from ..keywords import ServiceOptions, make_rule, torch_keywords
from ..optimizer import ServiceOptimizer


class RMSprop(ServiceOptimizer):
    """RMSprop, as :class:`torch.optim.RMSprop`.

    The equations are those of :class:`stepwell.optim.RMSpropRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        alpha: Decay of the squared gradient's running average.
        eps: Added to the denominator.
        weight_decay: Weight decay; the rule's equations say where it enters.
        momentum: Momentum factor.
        centered: Take the squared average around the gradient's average.
        capturable: Accepted as torch's, as long as it is False.
        foreach: Accepted as torch's; has no effect, since the service computes the update.
        maximize: Go up the gradient.
        differentiable: Accepted as torch's, as long as it is False.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range, or ``capturable`` or ``differentiable`` True.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            RMSpropRule,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=maximize,
        )
        super().__init__(
            params,
            rule,
            carried=torch_keywords(capturable=capturable, foreach=foreach, differentiable=differentiable),
            **options,
        )
