"""BAdam, DuvAdam, SUAdam. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import BAdamRule, DuvAdamRule, SUAdamRule
from ..keywords import ServiceOptions, make_rule
from ..optimizer import ServiceOptimizer


class BAdam(ServiceOptimizer):
    """BAdam: the second moment is a secant estimate of the curvature.

    The equations are those of :class:`stepwell.optim.BAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        weight_decay: Weight decay; the rule's equations say where it enters.
        curvature_clip: Largest magnitude of one step's estimate of the curvature.
        min_scale: Smallest mean magnitude of a tensor that scales its step.
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
        curvature_clip: float = 10000.0,
        min_scale: float = 0.001,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            BAdamRule,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            curvature_clip=curvature_clip,
            min_scale=min_scale,
            weight_decay_by_lr=weight_decay_by_lr,
        )
        super().__init__(params, rule, **options)


class DuvAdam(ServiceOptimizer):
    """DuvAdam: the second moment is that of the gradient's ratio to its running average.

    The equations are those of :class:`stepwell.optim.DuvAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        weight_decay: Weight decay; the rule's equations say where it enters.
        ratio_clip: Largest magnitude of the gradient's ratio to its average.
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
        ratio_clip: float = 10.0,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            DuvAdamRule,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            ratio_clip=ratio_clip,
            weight_decay_by_lr=weight_decay_by_lr,
        )
        super().__init__(params, rule, **options)


class SUAdam(ServiceOptimizer):
    """SUAdam: DuvAdam on the gradient's sign, scaled by the parameter's mean magnitude.

    The equations are those of :class:`stepwell.optim.SUAdamRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        weight_decay: Weight decay; the rule's equations say where it enters.
        ratio_clip: Largest magnitude of the gradient's ratio to its average.
        min_scale: Smallest mean magnitude of a tensor that scales its step.
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
        ratio_clip: float = 10.0,
        min_scale: float = 0.001,
        weight_decay_by_lr: bool = True,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            SUAdamRule,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            ratio_clip=ratio_clip,
            min_scale=min_scale,
            weight_decay_by_lr=weight_decay_by_lr,
        )
        super().__init__(params, rule, **options)
