"""DuvAdam, SUAdam and BAdam: the second moment measures how the gradient changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .hyper import require
from .moments import bias_corrections, decoupled_keep, moment_coefficients, read_moment_hyper
from .rule import Coefficients, Combined, ElementwiseRule, ReducingRule, Scope, Slot, Tiles, tile_sum
from .softplus import softplus
from .step_inputs import StepInputs


@final
@dataclasses.dataclass(frozen=True)
class DuvAdamRule(ElementwiseRule):
    r"""DuvAdam: the second moment is that of the gradient's ratio to its running average.

    ::

        r   = g / m where m != 0 else 1, held within +-ratio_clip              m of the step before
        m   = beta1 * m + (1 - beta1) * g
        v   = beta2 * v + (1 - beta2) * (r - 1)^2
        p   = p * (1 - lr * weight_decay)
        p   = p - lr * m_hat / (1 + sqrt(v_hat))
    """

    name: ClassVar[str] = "DuvAdam"
    structural: ClassVar[frozenset[str]] = frozenset({"ratio_clip"})

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ratio_clip: float = 10.0
    weight_decay_by_lr: bool = True

    def __post_init__(self) -> None:
        require(self.ratio_clip > 0.0, "ratio_clip value", self.ratio_clip)
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg`` and ``exp_avg_sq``."""
        return Slot("exp_avg"), Slot("exp_avg_sq")

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, weight_decay, weight_decay_by_lr."""
        return read_moment_hyper(group, "weight_decay_by_lr")

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
        change = _ratio(tiles.grad, tiles.slots["exp_avg"], self.ratio_clip) - 1.0
        exp_avg = tiles.slots["exp_avg"] * c["m_decay"] + tiles.grad * c["m_gain"]
        exp_avg_sq = tiles.slots["exp_avg_sq"] * c["v_decay"] + change * change * c["v_gain"]
        param = tiles.param * c["keep"] - c["step_size"] * exp_avg / (1.0 + exp_avg_sq.sqrt() / c["root_scale"])
        return param, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@final
@dataclasses.dataclass(frozen=True)
class SUAdamRule(ReducingRule):
    r"""SUAdam: DuvAdam on the gradient's sign, scaled by the parameter's mean magnitude.

    ::

        s   = sign(g)
        r   = s / m where m != 0 else 1, held within +-ratio_clip              m of the step before
        m   = beta1 * m + (1 - beta1) * s
        v   = beta2 * v + (1 - beta2) * |r - 1|
        p   = p * (1 - lr * weight_decay)
        p   = p - lr * max(mean |p|, min_scale) * m_hat / (1 + v_hat)

    The mean is over the whole tensor, before its decay.
    """

    name: ClassVar[str] = "SUAdam"
    structural: ClassVar[frozenset[str]] = frozenset({"ratio_clip", "min_scale"})
    scope: ClassVar[Scope] = Scope.TENSOR
    sums: ClassVar[tuple[str, ...]] = ("param_abs",)

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ratio_clip: float = 10.0
    min_scale: float = 1e-3
    weight_decay_by_lr: bool = True

    def __post_init__(self) -> None:
        require(self.ratio_clip > 0.0, "ratio_clip value", self.ratio_clip)
        require(self.min_scale >= 0.0, "min_scale value", self.min_scale)
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg`` and ``exp_avg_sq``."""
        return Slot("exp_avg"), Slot("exp_avg_sq")

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, weight_decay, weight_decay_by_lr."""
        return read_moment_hyper(group, "weight_decay_by_lr")

    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Decays and gains of m and v."""
        return moment_coefficients(step)

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """m and v; sum of |p|."""
        sign = tiles.grad.sign()
        change = (_ratio(sign, tiles.slots["exp_avg"], self.ratio_clip) - 1.0).abs()
        slots = {
            "exp_avg": tiles.slots["exp_avg"] * c["m_decay"] + sign * c["m_gain"],
            "exp_avg_sq": tiles.slots["exp_avg_sq"] * c["v_decay"] + change * c["v_gain"],
        }
        return slots, {"param_abs": tile_sum(tiles.param.abs())}

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step size with the mean magnitude in it."""
        first, second = bias_corrections(step)
        scale = (totals["param_abs"] / step.numel.clamp_min(1.0)).clamp_min(self.min_scale)
        return {
            "keep": decoupled_keep(step),
            "step_size": step.where_present(step.per_tensor("lr") * scale / first, 0.0),
            "v_correction": second,
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameters."""
        denominator = 1.0 + tiles.slots["exp_avg_sq"] / c["v_correction"]
        return tiles.param * c["keep"] - c["step_size"] * tiles.slots["exp_avg"] / denominator, {}


@final
@dataclasses.dataclass(frozen=True)
class BAdamRule(ReducingRule):
    r"""BAdam: the second moment is a secant estimate of the curvature.

    With u the change of p in the step before, without decay, and g' the gradient of the step before::

        m     = beta1 * m + (1 - beta1) * g
        Phi   = (g - g') / sign_clamp(u, mean |u|), held within +-curvature_clip     from the second step on
        v     = beta2 * v + (1 - beta2) * Phi                                        from the second step on
        scale = max(mean |p|, min_scale)
        u     = -lr * scale * m_hat                                                  at the first step
        u     = -lr * scale * m_hat / softplus_50(|v / (1 - beta2^(t-1))|)           after it
        p     = p * (1 - lr * weight_decay) + u

    sign_clamp(x, c) keeps x's sign (+ for 0) and makes its magnitude at least c, here at least 1e-12. Means are over
    the whole tensor, that of p before its decay.
    """

    name: ClassVar[str] = "BAdam"
    structural: ClassVar[frozenset[str]] = frozenset({"curvature_clip", "min_scale"})
    scope: ClassVar[Scope] = Scope.TENSOR
    sums: ClassVar[tuple[str, ...]] = ("param_abs", "update_abs")

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    curvature_clip: float = 1e4
    min_scale: float = 1e-3
    weight_decay_by_lr: bool = True

    def __post_init__(self) -> None:
        require(self.curvature_clip > 0.0, "curvature_clip value", self.curvature_clip)
        require(self.min_scale >= 0.0, "min_scale value", self.min_scale)
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg``, ``exp_avg_sq`` (v), and gradient and update of the step before."""
        return Slot("exp_avg"), Slot("exp_avg_sq"), Slot("prev_grad"), Slot("prev_update")

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, weight_decay, weight_decay_by_lr."""
        return read_moment_hyper(group, "weight_decay_by_lr")

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums of |p| and |u|."""
        sums = {"param_abs": tile_sum(tiles.param.abs()), "update_abs": tile_sum(tiles.slots["prev_update"].abs())}
        return {}, sums

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``is_first`` is 1 for a tensor's first step."""
        moments, numel = moment_coefficients(step), step.numel.clamp_min(1.0)
        is_first = step.present & (step.step_count == 1.0)
        correction = 1.0 - step.per_tensor("beta2") ** (step.step_count - 1.0)
        scale = (totals["param_abs"] / numel).clamp_min(self.min_scale)
        first, _ = bias_corrections(step)
        return {
            **moments,
            "v_decay": torch.where(is_first, 1.0, moments["v_decay"]),
            "v_gain": torch.where(is_first, 0.0, moments["v_gain"]),
            "is_first": is_first.to(torch.float64),
            "v_correction": step.where_present(torch.where(is_first, 1.0, correction), 1.0),
            "keep": decoupled_keep(step),
            "step_size": step.where_present(step.per_tensor("lr") * scale / first, 0.0),
            "smallest": (totals["update_abs"] / numel).clamp_min(1e-12),
            "present": step.present.to(torch.float64),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        before = tiles.slots["prev_update"]
        magnitude = torch.maximum(before.abs(), c["smallest"])
        change = (tiles.grad - tiles.slots["prev_grad"]) / torch.where(before < 0.0, -magnitude, magnitude)
        exp_avg = tiles.slots["exp_avg"] * c["m_decay"] + tiles.grad * c["m_gain"]
        clipped = change.clamp(-self.curvature_clip, self.curvature_clip)
        exp_avg_sq = tiles.slots["exp_avg_sq"] * c["v_decay"] + clipped * c["v_gain"]
        smooth = softplus((exp_avg_sq / c["v_correction"]).abs())
        update = -c["step_size"] * exp_avg / torch.where(c["is_first"] > 0.0, 1.0, smooth)
        is_present = c["present"] > 0.0
        slots = {
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "prev_grad": torch.where(is_present, tiles.grad, tiles.slots["prev_grad"]),
            "prev_update": torch.where(is_present, update, before),
        }
        return tiles.param * c["keep"] + update, slots


def _ratio(values: Tensor, average: Tensor, clip: float) -> Tensor:
    """``values / average`` where the average is not 0, else 1, held within +-clip."""
    is_zero = average == 0.0
    ratio = values / torch.where(is_zero, 1.0, average)
    return torch.where(is_zero, 1.0, ratio).clamp(-clip, clip)
