"""Momentum, SGD. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import MomentumRule, SGDRule
from ..keywords import ServiceOptions, make_rule, torch_keywords
from ..optimizer import ServiceOptimizer


class Momentum(ServiceOptimizer):
    """Momentum as a running average.

    The equations are those of :class:`stepwell.optim.MomentumRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        beta: Decay of the running average.
        weight_decay: Weight decay; the rule's equations say where it enters.
        bias_correction: Divide the average by 1 - beta^t.
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
        bias_correction: bool = False,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            MomentumRule,
            lr=lr,
            beta=beta,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            weight_decay_by_lr=weight_decay_by_lr,
        )
        super().__init__(params, rule, **options)


class SGD(ServiceOptimizer):
    """SGD with momentum, as :class:`torch.optim.SGD`.

    The equations are those of :class:`stepwell.optim.SGDRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        momentum: Momentum factor.
        dampening: Share of the gradient that is kept out of the momentum.
        weight_decay: Weight decay; the rule's equations say where it enters.
        nesterov: Nesterov's form of momentum.
        maximize: Go up the gradient.
        foreach: Accepted as torch's; has no effect, since the service computes the update.
        differentiable: Accepted as torch's, as long as it is False.
        fused: Accepted as torch's; has no effect, since the service computes the update.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range, or ``differentiable`` True.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            SGDRule,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        super().__init__(
            params, rule, carried=torch_keywords(foreach=foreach, differentiable=differentiable, fused=fused), **options
        )
