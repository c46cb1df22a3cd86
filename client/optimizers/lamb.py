"""LAMB. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import LAMBRule
from ..keywords import ServiceOptions, make_rule
from ..optimizer import ServiceOptimizer


class LAMB(ServiceOptimizer):
    """LAMB with bias correction and an unclamped trust ratio.

    The equations are those of :class:`stepwell.optim.LAMBRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate, a float or a 0-dim tensor.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        weight_decay: Added to the direction, inside the trust ratio.
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
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(LAMBRule, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, rule, **options)
