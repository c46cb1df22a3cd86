"""The named optimizers: one per rule, with the reference's keywords and defaults."""

from __future__ import annotations

import math
from typing import Unpack

from torch.optim.optimizer import ParamsT

from ..optim import AdamWRule, LAMBRule, ProdigyRule
from .optimizer import ServiceOptimizer, ServiceOptions


class Prodigy(ServiceOptimizer):
    """Prodigy; keywords and defaults of ``prodigyopt.Prodigy``. Leave ``lr`` at 1.

    After each step every group shows ``d``, ``d_max``, ``d_numerator`` and ``k``.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Factor on the estimated step size; schedule it, do not tune it.
        betas: Decay of the gradient's and the squared gradient's running averages.
        beta3: Decay of the distance estimate's averages; None takes sqrt(beta2).
        eps: Added to the denominator, scaled by d.
        weight_decay: Decoupled with ``decouple``, else L2.
        decouple: AdamW's form of weight decay.
        use_bias_correction: Adam's bias correction.
        safeguard_warmup: Keep lr out of the estimate's denominator, for long warm-ups.
        d0: First estimate of the distance.
        d_coef: Factor on the estimate.
        growth_rate: Largest factor by which d may rise in a step.
        fsdp_in_use: Accepted as prodigyopt's; has no effect, since the estimate is always global here.
        slice_p: Take the estimate's statistics over every slice_p-th element, to save memory.
        options: See :class:`stepwell.ServiceOptimizer`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = ProdigyRule(
            lr=lr,
            betas=betas,
            beta3=beta3,
            eps=eps,
            weight_decay=weight_decay,
            decouple=decouple,
            use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            fsdp_in_use=fsdp_in_use,
            slice_p=slice_p,
        )
        super().__init__(params, rule, **options)


class AdamW(ServiceOptimizer):
    """AdamW; keywords and defaults of ``torch.optim.AdamW``.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the largest squared average so far.
        maximize: Go up the gradient.
        foreach, fused: Accepted as torch's; have no effect, since the service computes the update.
        capturable, differentiable: Accepted as torch's, as long as they are False.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If ``capturable`` or ``differentiable`` is True.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[ServiceOptions],
    ) -> None:
        for name, wanted in (("capturable", capturable), ("differentiable", differentiable)):
            if wanted:
                raise ValueError(
                    f"{name}: expected False, got {wanted}; a step leaves this process and its CUDA graphs"
                )
        rule = AdamWRule(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(params, rule, **options)
        for group in self.param_groups:
            group.update(foreach=foreach, fused=fused)


class LAMB(ServiceOptimizer):
    """LAMB with bias correction and an unclamped trust ratio; see :class:`stepwell.optim.LAMBRule`.

    Args:
        params: Parameters, named parameters, or groups of either.
        lr: Learning rate.
        betas: Decay of the gradient's and the squared gradient's running averages.
        eps: Added to the denominator.
        weight_decay: Added to the direction, inside the trust ratio.
        options: See :class:`stepwell.ServiceOptimizer`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[ServiceOptions],
    ) -> None:
        super().__init__(params, LAMBRule(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **options)
