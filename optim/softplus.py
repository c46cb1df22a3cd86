"""SAdam and SRAdam: the softplus of the root stands for root + eps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .moments import bias_corrections, decoupled_keep, moment_coefficients, read_moment_hyper, update_moments
from .radam import rectification
from .rule import Coefficients, Combined, ElementwiseRule, Slot, Tiles
from .step_inputs import StepInputs

SHARPNESS = 50.0
"""beta of softplus_beta(x) = log(1 + exp(beta x)) / beta."""
IDENTITY_FROM = 50.0
"""beta x from which softplus is the identity: exact to rounding, in float64 too."""


def softplus(values: Tensor) -> Tensor:
    """softplus with sharpness 50; the identity where that is exact to rounding."""
    return torch.nn.functional.softplus(values, beta=SHARPNESS, threshold=IDENTITY_FROM)


@dataclasses.dataclass(frozen=True)
class SoftplusAdamBase(ElementwiseRule):
    """What SAdam and SRAdam share."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    weight_decay_by_lr: bool = True

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg`` and ``exp_avg_sq``."""
        return Slot("exp_avg"), Slot("exp_avg_sq")

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, weight_decay, weight_decay_by_lr."""
        return read_moment_hyper(group, "weight_decay_by_lr")


@final
@dataclasses.dataclass(frozen=True)
class SAdamRule(SoftplusAdamBase):
    r"""SAdam.

    With m_hat, v_hat Adam's bias-corrected averages::

        p   = p * (1 - lr * weight_decay)
        p   = p - lr * m_hat / softplus_50(sqrt(v_hat))

    There is no eps: the softplus is at least log(2) / 50.

    References:
        Q. Tong, G. Liang, J. Bi: Calibrating the Adaptive Learning Rate to Improve Convergence of ADAM,
        arXiv:1908.00700, Algorithm 2 (Sadam).
    """

    name: ClassVar[str] = "SAdam"

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the equations."""
        first, second = bias_corrections(step)
        return {
            **moment_coefficients(step),
            "keep": decoupled_keep(step),
            "step_size": step.where_present(step.per_tensor("lr") / first, 0.0),
            "root_scale": second.sqrt(),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        slots = update_moments(tiles, tiles.grad, c)
        denominator = softplus(slots["exp_avg_sq"].sqrt() / c["root_scale"])
        return tiles.param * c["keep"] - c["step_size"] * slots["exp_avg"] / denominator, slots


@final
@dataclasses.dataclass(frozen=True)
class SRAdamRule(SoftplusAdamBase):
    r"""SRAdam: RAdam with SAdam's softplus.

    With r and rho as in RAdam, rho_inf = 2 / (1 - beta2) - 1::

        p   = p * (1 - lr * weight_decay)
        p   = p - lr * m_hat / softplus_50(sqrt(v_hat) / r)     while rho > 4
        p   = p - lr * m_hat                                    else

    References:
        Q. Tong, G. Liang, J. Bi: Calibrating the Adaptive Learning Rate to Improve Convergence of ADAM,
        arXiv:1908.00700; L. Liu et al.: On the Variance of the Adaptive Learning Rate and Beyond, arXiv:1908.03265.
    """

    name: ClassVar[str] = "SRAdam"

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``plain`` multiplies m, ``rectified`` multiplies m over the softplus; one of the two is 0."""
        first, second = bias_corrections(step)
        is_rectified, factor = rectification(step, torch.full_like(step.step_count, 4.0))
        step_size = step.per_tensor("lr") / first
        return {
            **moment_coefficients(step),
            "keep": decoupled_keep(step),
            "plain": step.where_present(torch.where(is_rectified, 0.0, step_size), 0.0),
            "rectified": step.where_present(torch.where(is_rectified, step_size, 0.0), 0.0),
            "root_scale": second.sqrt() * factor,
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        slots = update_moments(tiles, tiles.grad, c)
        denominator = softplus(slots["exp_avg_sq"].sqrt() / c["root_scale"])
        update = slots["exp_avg"] * c["plain"] + c["rectified"] * slots["exp_avg"] / denominator
        return tiles.param * c["keep"] - update, slots
