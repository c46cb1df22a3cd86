"""AdamAWD, AdamGCC, StableAdam. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import AdamAWDRule, AdamGCCRule, StableAdamRule
from ..keywords import ServiceOptions, make_rule
from ..optimizer import ServiceOptimizer


class AdamAWD(ServiceOptimizer):
    """AdamAWD: after Adam's step each output channel is scaled back to the norm that it began with.

    The equations are those of :class:`stepwell.optim.AdamAWDRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        excluded_c_in: Weights with so many input channels, and fewer output channels, are left alone.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        excluded_c_in: int | None = 256,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(AdamAWDRule, lr=lr, betas=betas, eps=eps, excluded_c_in=excluded_c_in)
        super().__init__(params, rule, **options)


class AdamGCC(ServiceOptimizer):
    """AdamGCC: Adam on gradients that are centred in each output channel.

    The equations are those of :class:`stepwell.optim.AdamGCCRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
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
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            AdamGCCRule, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight_decay_by_lr=weight_decay_by_lr
        )
        super().__init__(params, rule, **options)


class StableAdam(ServiceOptimizer):
    """StableAdam: Adam's step, scaled in each output channel by how much the channel's magnitude has changed.

    The equations are those of :class:`stepwell.optim.StableAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        excluded_c_in: Weights with so many input channels, and fewer output channels, are left alone.
        weight_decay: Weight decay; the rule's equations say where it enters.
        weight_decay_by_lr: Scale weight decay by the learning rate.
        ratio: Which way the ratio of norms is taken: "current/init" or "init/current".
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        excluded_c_in: int | None = 256,
        weight_decay: float = 0.0,
        weight_decay_by_lr: bool = True,
        ratio: str = "current/init",
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            StableAdamRule,
            lr=lr,
            betas=betas,
            eps=eps,
            excluded_c_in=excluded_c_in,
            weight_decay=weight_decay,
            weight_decay_by_lr=weight_decay_by_lr,
            ratio=ratio,
        )
        super().__init__(params, rule, **options)
