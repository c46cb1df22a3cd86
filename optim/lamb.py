"""LAMB: Adam's direction, scaled per tensor to the parameter's norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .moments import bias_corrections, moment_coefficients, read_adam_hyper, update_moments
from .rule import Coefficients, Combined, ReducingRule, Scope, Slot, Tiles, adam_denominator, tile_sum
from .step_inputs import StepInputs


@final
@dataclasses.dataclass(frozen=True)
class LAMBRule(ReducingRule):
    r"""LAMB with bias correction and an unclamped trust ratio.

    For each tensor, with t its own step count::

        m   = beta1 * m + (1 - beta1) * g          m_hat = m / (1 - beta1^t)
        v   = beta2 * v + (1 - beta2) * g^2        v_hat = v / (1 - beta2^t)
        A   = m_hat / (sqrt(v_hat) + eps) + weight_decay * p
        p   = p - lr * (||p||_2 / ||A||_2) * A

    The ratio is 1 where either norm is 0. Norms are of the whole tensor, however it is sharded.

    References:
        Y. You et al.: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv:1904.00962,
        Algorithm 2, with phi the identity.

    Differs:
        Other implementations clamp ||p|| to 10 and leave bias correction out.
    """

    name: ClassVar[str] = "LAMB"
    scope: ClassVar[Scope] = Scope.TENSOR
    sums: ClassVar[tuple[str, ...]] = ("param_sq", "direction_sq")

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg`` and ``exp_avg_sq``."""
        return Slot("exp_avg"), Slot("exp_avg_sq")

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, eps, weight_decay."""
        return read_adam_hyper(group)

    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Moment updates, and what the direction needs."""
        return {**moment_coefficients(step), **self._direction_coefficients(step)}

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """m and v; ||p||^2 and ||A||^2."""
        slots = update_moments(tiles, tiles.grad, c)
        direction = self._direction(tiles.param, slots, c)
        sums = {"param_sq": tile_sum(tiles.param * tiles.param), "direction_sq": tile_sum(direction * direction)}
        return slots, sums

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step size with the trust ratio in it."""
        param_norm, direction_norm = totals["param_sq"].sqrt(), totals["direction_sq"].sqrt()
        either_zero = (param_norm == 0.0) | (direction_norm == 0.0)
        ratio = torch.where(either_zero, 1.0, param_norm / direction_norm)
        step_size = step.where_present(step.per_tensor("lr") * ratio, 0.0)
        return {**self._direction_coefficients(step), "step_size": step_size}

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The direction again, from the slots and the old parameters, scaled."""
        return tiles.param - c["step_size"] * self._direction(tiles.param, tiles.slots, c), {}

    def _direction_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        first, second = bias_corrections(step)
        return {
            "m_correction": first,
            "v_correction": second,
            "eps": step.per_tensor("eps"),
            "weight_decay": step.per_tensor("weight_decay"),
        }

    def _direction(self, param: Tensor, slots: Mapping[str, Tensor], c: Coefficients) -> Tensor:
        m_hat = slots["exp_avg"] / c["m_correction"]
        v_hat = slots["exp_avg_sq"] / c["v_correction"]
        return m_hat / adam_denominator(v_hat, c["eps"]) + c["weight_decay"] * param
