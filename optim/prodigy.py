"""Prodigy: Adam whose step size is an estimate of the distance to the solution."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .rule import (
    Coefficients,
    Combined,
    ReducingRule,
    Scope,
    Slot,
    StepInputs,
    Tiles,
    adam_denominator,
    read_betas,
    read_float,
    require,
    tile_sum,
)


@final
@dataclasses.dataclass(frozen=True)
class ProdigyRule(ReducingRule):
    r"""Prodigy, as prodigyopt 1.1.2; every argument has its name and default.

    With d the distance estimate, lr the group's learning rate, k the number of steps so far, and
    ``bc = sqrt(1 - beta2^(k+1)) / (1 - beta1^(k+1))`` with ``use_bias_correction``, else 1::

        dlr = d * lr * bc
        m   = beta1 * m + d * (1 - beta1) * g
        v   = beta2 * v + d^2 * (1 - beta2) * g^2
        s   = beta3 * s + (d / d0) * dlr * g               (d in place of dlr with safeguard_warmup)
        r   = beta3 * r + (d / d0) * dlr * <g, p0 - p>     r is d_numerator, summed over the model
        d^  = d_coef * r / ||s||_1
        d   = max(d, d^) if d = d0;  d_max = max(d_max, d^);  d = min(d_max, growth_rate * d)
        p   = p - dlr * weight_decay * p - dlr * m / (sqrt(v) + d * eps)

    p0 is the parameter as registered. The last line has the new d only in ``d * eps``, and in ``d * g``, which stands
    for m when beta1 = 0. With ``decouple=False`` weight decay is added to g instead. ``beta3 = None`` means
    sqrt(beta2). ``slice_p`` takes s, p0 and both sums over every slice_p-th element of each flattened tensor. Only the
    change of r and ||s||_1 are summed over shards; r itself is replicated.

    If ||s||_1 = 0 the step moves no parameter and changes no scalar; so does lr = 0, which changes no slot either.

    References:
        K. Mishchenko, A. Defazio: Prodigy: An Expeditiously Adaptive Parameter-Free Learner, arXiv:2306.06101,
        Algorithm 4 (Adam version).

    Differs:
        A parameter without a gradient keeps its share of ||s||_1, and its s decays by beta3 as r does; prodigyopt drops
        it from the sum for that step, and d jumps for good. A group whose lr is 0 stands still in the same way;
        prodigyopt goes on moving and decaying it. Groups may have different learning rates, each in its own dlr, under
        one d; prodigyopt raises. p0 is always stored in full. lr = 0 is legal.
        An element with v = 0 stands still where prodigyopt, with d * eps rounded to 0, gives NaN.
    """

    name: ClassVar[str] = "Prodigy"
    structural: ClassVar[frozenset[str]] = frozenset({"decouple", "slice_p"})
    scalar_minimums: ClassVar[Mapping[str, float]] = {"d": sys.float_info.min, "d_max": sys.float_info.min, "k": 0}
    scope: ClassVar[Scope] = Scope.GROUP
    sums: ClassVar[tuple[str, ...]] = ("dot", "s_norm")
    step_is_tensor: ClassVar[bool] = False

    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.0
    decouple: bool = True
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float = math.inf
    fsdp_in_use: bool = False
    slice_p: int = 1

    def __post_init__(self) -> None:
        require(isinstance(self.slice_p, int) and self.slice_p >= 1, "slice_p value", self.slice_p)
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``s`` and ``p0`` (strided by slice_p), ``exp_avg`` unless beta1 is 0, ``exp_avg_sq``."""
        momentum = (Slot("exp_avg"),) if self._has_momentum else ()
        s = Slot("s", stride=self.slice_p, flat=True)
        p0 = Slot("p0", init="param", stride=self.slice_p, flat=True)
        return (s, p0, *momentum, Slot("exp_avg_sq"))

    @property
    def initial_scalars(self) -> dict[str, float]:
        """d, d_max, d_numerator and k, as prodigyopt's groups hold them."""
        return {"d": self.d0, "d_max": self.d0, "d_numerator": 0.0, "k": 0}

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, the betas, eps, weight_decay, d0, d_coef, growth_rate and the two switches as 0 or 1."""
        beta1, beta2 = read_betas(group)
        beta3 = math.sqrt(beta2) if group["beta3"] is None else read_float(group, "beta3")
        keys = ("lr", "eps", "weight_decay", "d0", "d_coef", "growth_rate", "use_bias_correction", "safeguard_warmup")
        values = {key: read_float(group, key) for key in keys}
        require(values["lr"] >= 0.0, "learning rate", values["lr"])
        require(values["eps"] > 0.0, "epsilon value", values["eps"])
        require(values["weight_decay"] >= 0.0, "weight_decay value", values["weight_decay"])
        require(0.0 <= beta3 < 1.0, "beta3 value", beta3)
        require(0.0 < values["d0"] < math.inf, "d0 value", values["d0"])
        require(values["d_coef"] > 0.0, "d_coef value", values["d_coef"])
        require(values["growth_rate"] >= 1.0, "growth_rate value", values["growth_rate"])
        if beta1 > 0.0 and not self._has_momentum:
            raise ValueError(
                f"Invalid betas value: {group['betas']} (registered with beta1 = 0, so there is no exp_avg)"
            )
        return {**values, "beta1": beta1, "beta2": beta2, "beta3": beta3}

    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Gains of m, v and s; see the class's equations."""
        d, dlr = step.scalars["d"], self._dlr(step)[step.group_of_tensor]
        beta1, beta2 = step.per_tensor("beta1"), step.per_tensor("beta2")
        moving = self._moving(step)
        s_step = torch.where(step.per_tensor("safeguard_warmup") > 0.0, d, dlr)
        s_decay = step.hyper["beta3"][0] if self._any_lr(step) else torch.tensor(1.0, dtype=torch.float64)
        return {
            "m_decay": torch.where(moving, beta1, 1.0),
            "m_gain": torch.where(moving, d * (1.0 - beta1), 0.0),
            "v_decay": torch.where(moving, beta2, 1.0),
            "v_gain": torch.where(moving, d * d * (1.0 - beta2), 0.0),
            "s_decay": s_decay.expand(moving.shape),
            "s_gain": torch.where(moving, (d / step.per_tensor("d0")) * s_step, 0.0),
            "coupled_decay": self._coupled_decay(step),
        }

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """m, v and s; <g, p0 - p> and ||s||_1."""
        grad = self._decayed_grad(tiles, c)
        sliced_grad = tiles.sliced(grad)
        s = tiles.slots["s"] * c["s_decay"] + sliced_grad * c["s_gain"]
        slots = {"s": s, "exp_avg_sq": tiles.slots["exp_avg_sq"] * c["v_decay"] + grad * c["v_gain"] * grad}
        if self._has_momentum:
            slots["exp_avg"] = tiles.slots["exp_avg"] * c["m_decay"] + grad * c["m_gain"]
        distance = tiles.slots["p0"] - tiles.sliced(tiles.param)
        return slots, {"dot": tile_sum(sliced_grad * distance), "s_norm": tile_sum(s.abs())}

    def combine(self, step: StepInputs, totals: Mapping[str, Tensor]) -> Combined:
        """The estimate d, from the sums of every group."""
        d, d_max, d_numerator, k = (step.scalars[name] for name in ("d", "d_max", "d_numerator", "k"))
        s_norm = math.fsum(totals["s_norm"].tolist())
        if s_norm == 0.0 or not self._any_lr(step):
            return Combined(scalars=step.scalars, moves=False)
        d_numerator *= step.hyper["beta3"][0].item()
        weights = (d / step.hyper["d0"]) * self._dlr(step)
        for weight, dot in zip(weights.tolist(), totals["dot"].tolist(), strict=True):
            d_numerator += weight * dot
        d_hat = step.hyper["d_coef"][0].item() * d_numerator / s_norm
        grown_from = max(d, d_hat) if d == step.hyper["d0"][-1].item() else d
        d_max = max(d_max, d_hat)
        d = min(d_max, grown_from * step.hyper["growth_rate"][0].item())
        return Combined(scalars={"d": d, "d_max": d_max, "d_numerator": d_numerator, "k": k + 1})

    def apply_coefficients(
        self, step: StepInputs, scalars: Mapping[str, float], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The step size has the old d, eps the new one."""
        dlr, moving = self._dlr(step)[step.group_of_tensor], self._moving(step)
        scale = dlr if self._has_momentum else dlr * scalars["d"]
        decay = dlr * step.per_tensor("weight_decay") if self.decouple else torch.zeros_like(step.step_count)
        return {
            "decay": torch.where(moving, decay, 0.0),
            "step_size": torch.where(moving, scale, 0.0),
            "eps": scalars["d"] * step.per_tensor("eps"),
            "coupled_decay": self._coupled_decay(step),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameters; all slots are as ``local`` left them."""
        momentum = tiles.slots["exp_avg"] if self._has_momentum else self._decayed_grad(tiles, c)
        denominator = adam_denominator(tiles.slots["exp_avg_sq"], c["eps"])
        # 1 - decay would be rounded away: dlr is about 1e-6 at first.
        decayed = tiles.param - c["decay"] * tiles.param
        return decayed - c["step_size"] * momentum / denominator, {}

    @property
    def _has_momentum(self) -> bool:
        return self.betas[0] > 0.0

    def _any_lr(self, step: StepInputs) -> bool:
        return bool((step.hyper["lr"] > 0.0).any())

    def _dlr(self, step: StepInputs) -> Tensor:
        """d * lr * bc of each group, ``(num_groups,)`` float64."""
        beta1, beta2 = step.hyper["beta1"][0].item(), step.hyper["beta2"][0].item()
        k = step.scalars["k"]
        corrected = step.hyper["use_bias_correction"][0].item() > 0.0
        bias_correction = math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1)) if corrected else 1.0
        return step.scalars["d"] * step.hyper["lr"] * bias_correction

    def _moving(self, step: StepInputs) -> Tensor:
        return step.present & (step.per_tensor("lr") > 0.0)

    def _coupled_decay(self, step: StepInputs) -> Tensor:
        decay = torch.zeros_like(step.step_count) if self.decouple else step.per_tensor("weight_decay")
        return torch.where(self._moving(step), decay, 0.0)

    def _decayed_grad(self, tiles: Tiles, c: Coefficients) -> Tensor:
        return tiles.grad if self.decouple else tiles.grad + c["coupled_decay"] * tiles.param
