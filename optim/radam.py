"""RAdam: Adam whose second moment counts only once its variance is small."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .hyper import require
from .moments import (
    bias_corrections,
    decay_coefficients,
    maximize_sign,
    moment_coefficients,
    read_adam_hyper,
    update_moments,
)
from .rule import Coefficients, Combined, ElementwiseRule, Slot, Tiles, adam_denominator
from .step_inputs import StepInputs


@final
@dataclasses.dataclass(frozen=True)
class RAdamRule(ElementwiseRule):
    r"""RAdam, as :class:`torch.optim.RAdam`.

    With t the parameter's own step count::

        g       = g + weight_decay * p                              (p = p * (1 - lr * weight_decay) if decoupled)
        m, v    as Adam
        rho_inf = 2 / (1 - beta2) - 1
        rho     = rho_inf - 2 * t * beta2^t / (1 - beta2^t)
        r       = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
        p       = p - lr * r * m_hat * sqrt(1 - beta2^t) / (sqrt(v) + eps)     while rho > rho_threshold
        p       = p - lr * m_hat                                                else

    References:
        L. Liu et al.: On the Variance of the Adaptive Learning Rate and Beyond, arXiv:1908.03265, Algorithm 2.

    Differs:
        ``rho_threshold`` is 5 as in torch; the paper has 4.
    """

    name: ClassVar[str] = "RAdam"
    structural: ClassVar[frozenset[str]] = frozenset({"decoupled_weight_decay"})
    carried_group_keys: ClassVar[Mapping[str, object]] = {"foreach": None, "capturable": False, "differentiable": False}

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False
    rho_threshold: float = 5.0

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg`` and ``exp_avg_sq``."""
        return Slot("exp_avg"), Slot("exp_avg_sq")

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """All fields but ``decoupled_weight_decay``."""
        values = read_adam_hyper(group, "maximize", "rho_threshold")
        require(values["rho_threshold"] >= 4.0, "rho_threshold value", values["rho_threshold"])
        return values

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``plain`` multiplies m, ``rectified`` multiplies m over the root; one of the two is 0."""
        first, second = bias_corrections(step)
        is_rectified, factor = rectification(step, step.per_tensor("rho_threshold"))
        step_size = step.per_tensor("lr") / first
        return {
            **moment_coefficients(step),
            **decay_coefficients(step, decoupled=self.decoupled_weight_decay),
            "sign": maximize_sign(step),
            "plain": step.where_present(torch.where(is_rectified, 0.0, step_size), 0.0),
            "rectified": step.where_present(torch.where(is_rectified, step_size * factor * second.sqrt(), 0.0), 0.0),
            "eps": step.per_tensor("eps"),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        grad = tiles.grad * c["sign"] + tiles.param * c["l2"]
        slots = update_moments(tiles, grad, c)
        denominator = adam_denominator(slots["exp_avg_sq"], c["eps"])
        update = slots["exp_avg"] * c["plain"] + c["rectified"] * slots["exp_avg"] / denominator
        return tiles.param * c["keep"] - update, slots


def rectification(step: StepInputs, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Whether rho is above ``threshold``, and the paper's r (1 where it is not), each ``(num_tensors,)``."""
    beta2, t = step.per_tensor("beta2"), step.step_count
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    power = beta2**t
    rho = rho_inf - 2.0 * t * power / (1.0 - power)
    is_rectified = step.present & (rho > threshold)
    safe = torch.where(is_rectified, rho, rho_inf)
    ratio = (safe - 4.0) * (safe - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * safe)
    return is_rectified, torch.where(is_rectified, ratio, 1.0).sqrt()
