"""Prodigy. Written by `make optimizers` from the rules; edit those."""

from __future__ import annotations

import math
from typing import Literal, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...optim import ProdigyRule
from ..keywords import ServiceOptions, make_rule
from ..optimizer import ServiceOptimizer


class Prodigy(ServiceOptimizer):
    """Prodigy, as prodigyopt 1.1.2; every argument up to ``slice_p`` has its name and default.

    The equations are those of :class:`stepwell.optim.ProdigyRule`. After each step every group shows ``d``, ``d_max``,
    ``d_numerator``, ``k``.

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
        eps_d: Which d scales eps, the step's "new" one or the "old" one.
        estimator: How the distance is estimated.
        d_scope: What one estimate d is taken over: the whole model, or each parameter group for itself.
        freeze_d: Keep the estimate as it is.
        max_d: Largest d.
        stat_dtype: The dtype in which the estimate's statistics are kept.
        options: See :class:`stepwell.ServiceOptimizer`.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-06,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        eps_d: Literal["new", "old"] = "new",
        estimator: Literal["prodigy", "inner_product"] = "prodigy",
        d_scope: Literal["model", "group"] = "model",
        freeze_d: bool = False,
        max_d: float = math.inf,
        stat_dtype: Literal["state", "bfloat16"] = "state",
        **options: Unpack[ServiceOptions],
    ) -> None:
        rule = make_rule(
            ProdigyRule,
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
            eps_d=eps_d,
            estimator=estimator,
            d_scope=d_scope,
            freeze_d=freeze_d,
            max_d=max_d,
            stat_dtype=stat_dtype,
        )
        super().__init__(params, rule, **options)
