"""Prodigy: Adam whose step size is an estimate of the distance to the solution."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from .estimate import Estimate, Limits, bias_correction
from .hyper import read_betas, read_float, require
from .rule import (
    Coefficients,
    Combined,
    ReducingRule,
    Scope,
    Slot,
    StepInputs,
    Tiles,
    adam_denominator,
    tile_sum,
)
from .scalars import split_scalar

_CHOICES = {
    "eps_d": ("new", "old"),
    "estimator": ("prodigy", "inner_product"),
    "d_scope": ("model", "group"),
    "stat_dtype": ("state", "bfloat16"),
}


@final
@dataclasses.dataclass(frozen=True)
class ProdigyRule(ReducingRule):
    r"""Prodigy, as prodigyopt 1.1.2; every argument up to ``slice_p`` has its name and default.

    With d the distance estimate, lr the group's learning rate, k the number of steps so far, and
    ``bc = sqrt(1 - beta2^(k+1)) / (1 - beta1^(k+1))`` with ``use_bias_correction``, else 1::

        dlr = d * lr * bc
        m   = beta1 * m + d * (1 - beta1) * g
        v   = beta2 * v + d^2 * (1 - beta2) * g^2
        s   = beta3 * s + (d / d0) * dlr * g               (d in place of dlr with safeguard_warmup)
        r   = beta3 * r + (d / d0) * dlr * <g, p0 - p>     r is d_numerator, summed over the model
        d^  = d_coef * r / ||s||_1
        d   = max(d, d^) if d = d0;  d_max = max(d_max, d^);  d = min(d_max, growth_rate * d, max_d)
        p   = p - dlr * weight_decay * p - dlr * m / (sqrt(v) + d * eps)

    p0 is the parameter as registered. The last line has the new d only in ``d * eps``, and in ``d * g``, which stands
    for m when beta1 = 0. With ``decouple=False`` weight decay is added to g instead. ``beta3 = None`` means
    sqrt(beta2). ``slice_p`` takes s, p0 and both sums over every slice_p-th element of each flattened tensor. Only the
    change of r and ||s||_1 are summed over shards; r itself is replicated.

    If ||s||_1 = 0 the step moves no parameter and changes no scalar; so does lr = 0, which changes no slot either.
    Where a sum overflows d stays as it is.

    Beyond prodigyopt:

    * ``eps_d="old"``, the paper's form, has the old d in the last line. Everything then happens in one pass, in a step
      with ||s||_1 = 0 too, which leaves d as it is.
    * ``estimator="inner_product"`` estimates d from the plain sum of the gradients, with no p0::

            s   = s + g
            d   = d + |lr * <g, s>| / (d * max(||s||_2^2, 1e-30)),  at most growth_rate * d and max_d
            m   = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
            p   = p - dlr * weight_decay * p - dlr * m / (sqrt(v) + eps)         dlr = d * lr * bc with the new d

        beta3, d_coef and safeguard_warmup have no part in it, and d_numerator stays 0.

    * ``d_scope="group"`` keeps one d, d_max, d_numerator and k for each group, from the group's own sums and
      hyperparameters.
    * ``freeze_d`` leaves d and d_max as they are while the statistics go on; ``max_d`` caps d. Both may change at any
      step.
    * ``stat_dtype="bfloat16"`` keeps s and p0 in half the memory; p0 - p then has p0's rounding in it.
    * optax.contrib.prodigy is ``use_bias_correction=True``, its ``weight_decay_mask`` the parameters' own ``decays``.
    * A d that a person writes becomes d_max too, and scales d_numerator with it, unless they wrote those as well.

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
    structural: ClassVar[frozenset[str]] = frozenset({"decouple", "slice_p", *_CHOICES})
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
    eps_d: Literal["new", "old"] = "new"
    estimator: Literal["prodigy", "inner_product"] = "prodigy"
    d_scope: Literal["model", "group"] = "model"
    freeze_d: bool = False
    max_d: float = math.inf
    stat_dtype: Literal["state", "bfloat16"] = "state"

    def __post_init__(self) -> None:
        require(isinstance(self.slice_p, int) and self.slice_p >= 1, "slice_p value", self.slice_p)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"{name} value", f"{value!r} (expected one of {choices})")
        if self._is_inner and self.eps_d == "old":
            raise ValueError('Invalid eps_d value: old (estimator="inner_product" has the new d in every place)')
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``s`` and, for prodigy's estimator, ``p0`` (strided), ``exp_avg`` unless beta1 is 0, ``exp_avg_sq``."""
        momentum = (Slot("exp_avg"),) if self._has_momentum else ()
        s = Slot("s", stride=self.slice_p, flat=True, kept_in=self.stat_dtype)
        p0 = Slot("p0", init="param", stride=self.slice_p, flat=True, kept_in=self.stat_dtype, constant=True)
        return (s, *(() if self._is_inner else (p0,)), *momentum, Slot("exp_avg_sq"))

    @property
    def plain_scalars(self) -> dict[str, float]:
        """d, d_max, d_numerator and k, as prodigyopt's groups hold them."""
        return {"d": self.d0, "d_max": self.d0, "d_numerator": 0.0, "k": 0}

    @property
    def has_scalars_per_group(self) -> bool:
        """With ``d_scope="group"``."""
        return self.d_scope == "group"

    @property
    def is_one_pass(self) -> bool:
        """With ``eps_d="old"`` nothing waits for the new d."""
        return self.eps_d == "old"

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, the betas, eps, weight_decay, d0, d_coef, growth_rate, max_d and the three switches as 0 or 1."""
        beta1, beta2 = read_betas(group)
        beta3 = math.sqrt(beta2) if group["beta3"] is None else read_float(group, "beta3")
        numbers = ("lr", "eps", "weight_decay", "d0", "d_coef", "growth_rate", "max_d")
        values = {
            key: read_float(group, key) for key in (*numbers, "use_bias_correction", "safeguard_warmup", "freeze_d")
        }
        require(values["lr"] >= 0.0, "learning rate", values["lr"])
        require(values["eps"] > 0.0, "epsilon value", values["eps"])
        require(values["weight_decay"] >= 0.0, "weight_decay value", values["weight_decay"])
        require(0.0 <= beta3 < 1.0, "beta3 value", beta3)
        require(0.0 < values["d0"] < math.inf, "d0 value", values["d0"])
        require(values["d_coef"] > 0.0, "d_coef value", values["d_coef"])
        require(values["growth_rate"] >= 1.0, "growth_rate value", values["growth_rate"])
        require(values["max_d"] > 0.0, "max_d value", values["max_d"])
        if beta1 > 0.0 and not self._has_momentum:
            raise ValueError(
                f"Invalid betas value: {group['betas']} (registered with beta1 = 0, so there is no exp_avg)"
            )
        return {**values, "beta1": beta1, "beta2": beta2, "beta3": beta3}

    def write_scalars(self, scalars: Mapping[str, float], written: Mapping[str, float]) -> dict[str, float]:
        """A d that was written takes d_max and d_numerator along; see :meth:`Estimate.written`."""
        by_group: dict[int, dict[str, float]] = {}
        for key, value in written.items():
            name, group = split_scalar(key)
            by_group.setdefault(group or 0, {})[name] = value
        after = dict(scalars)
        for group, changes in by_group.items():
            after.update(self._flat(self._estimate_of(scalars, group).written(changes), group))
        return after

    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Gains of m, v and s; see the class's equations."""
        beta1, beta2 = step.per_tensor("beta1"), step.per_tensor("beta2")
        moving, d = self._moving(step), self._of_groups(step.scalars, step, "d")
        weight, s_gain, s_decay = self._statistics(step, d)
        return {
            "m_decay": torch.where(moving, beta1, 1.0),
            "m_gain": torch.where(moving, weight * (1.0 - beta1), 0.0),
            "v_decay": torch.where(moving, beta2, 1.0),
            "v_gain": torch.where(moving, weight * weight * (1.0 - beta2), 0.0),
            "s_decay": s_decay,
            "s_gain": torch.where(moving, s_gain, 0.0),
            "coupled_decay": self._coupled_decay(step),
        }

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """m, v and s; <g, p0 - p> and ||s||_1, or <g, s> and ||s||_2^2."""
        grad = self._decayed_grad(tiles, c)
        sliced_grad = tiles.sliced(grad)
        s = tiles.slots["s"] * c["s_decay"] + sliced_grad * c["s_gain"]
        slots = {"s": s, "exp_avg_sq": tiles.slots["exp_avg_sq"] * c["v_decay"] + grad * c["v_gain"] * grad}
        if self._has_momentum:
            slots["exp_avg"] = tiles.slots["exp_avg"] * c["m_decay"] + grad * c["m_gain"]
        if self._is_inner:
            return slots, {"dot": tile_sum(sliced_grad * s), "s_norm": tile_sum(s * s)}
        distance = tiles.slots["p0"] - tiles.sliced(tiles.param)
        return slots, {"dot": tile_sum(sliced_grad * distance), "s_norm": tile_sum(s.abs())}

    def combine(self, step: StepInputs, totals: Mapping[str, Tensor]) -> Combined:
        """Each estimate, from the sums of its groups."""
        scalars = dict(step.scalars)
        is_moving = self._estimates_move(step, totals)
        for members in self._members(step):
            if is_moving[members[0]]:
                after = self._next_estimate(step, members, totals)
                scalars.update(self._flat(after, members[0]))
        return Combined(scalars, moves=any(is_moving))

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step size has the old d (the new one with inner_product), eps that of ``after``."""
        d = self._of_groups(after.scalars, step, "d")
        moving = torch.tensor(self._estimates_move(step, totals))[step.group_of_tensor]
        coefficients = self._step_coefficients(step, d)
        for name in ("decay", "step_size"):
            coefficients[name] = torch.where(moving, coefficients[name], 0.0)
        return {**coefficients, "coupled_decay": self._coupled_decay(step)}

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameters; all slots are as ``local`` left them."""
        grad = tiles.grad if self._has_momentum else self._decayed_grad(tiles, c)
        return self._stepped(tiles.param, tiles.slots, grad, c), {}

    @property
    def _has_momentum(self) -> bool:
        return self.betas[0] > 0.0

    @property
    def _is_inner(self) -> bool:
        return self.estimator == "inner_product"

    def _members(self, step: StepInputs) -> list[list[int]]:
        """The groups of each estimate."""
        groups = list(range(len(step.hyper["lr"])))
        return [[group] for group in groups] if self.has_scalars_per_group else [groups]

    def _estimate_of(self, scalars: Mapping[str, float], group: int) -> Estimate:
        return Estimate(**{name: scalars[self.scalar_key(name, group)] for name in self.plain_scalars})

    def _flat(self, estimate: Estimate, group: int) -> dict[str, float]:
        return {self.scalar_key(name, group): value for name, value in dataclasses.asdict(estimate).items()}

    def _of_groups(self, scalars: Mapping[str, float], step: StepInputs, name: str) -> Tensor:
        """What each group sees of a scalar, ``(num_groups,)`` float64."""
        keys = [self.scalar_key(name, group) for group in range(len(step.hyper["lr"]))]
        return torch.tensor([scalars[key] for key in keys], dtype=torch.float64)

    def _shared(self, step: StepInputs, name: str) -> Tensor:
        """A hyperparameter as each group's estimate has it, ``(num_groups,)``: the first group's, or its own."""
        values = step.hyper[name]
        return values if self.has_scalars_per_group else values[:1].expand_as(values)

    def _has_lr(self, step: StepInputs) -> Tensor:
        """Whether each group's estimate has a group that moves, ``(num_groups,)`` bool."""
        has_lr = step.hyper["lr"] > 0.0
        return has_lr if self.has_scalars_per_group else has_lr.any().expand_as(has_lr)

    def _estimates_move(self, step: StepInputs, totals: Mapping[str, Tensor]) -> list[bool]:
        """Whether each group's estimate has its step; one whose ||s||_1 is 0 ends it, where that is known in time."""
        has_lr = self._has_lr(step).tolist()
        if self._is_inner or self.is_one_pass:
            return has_lr
        norms = totals["s_norm"].tolist()
        known = {group: math.fsum(norms[i] for i in members) for members in self._members(step) for group in members}
        return [moves and known[group] != 0.0 for group, moves in enumerate(has_lr)]

    def _next_estimate(self, step: StepInputs, members: list[int], totals: Mapping[str, Tensor]) -> Estimate:
        first = members[0]
        before = self._estimate_of(step.scalars, first)
        limits = Limits(
            growth_rate=step.hyper["growth_rate"][first].item(),
            max_d=step.hyper["max_d"][first].item(),
            is_frozen=step.hyper["freeze_d"][first].item() > 0.0,
        )
        if self._is_inner:
            weights = step.hyper["lr"]
        else:
            d = self._of_groups(step.scalars, step, "d")
            weights = (d / step.hyper["d0"]) * self._dlr(step, d)
        change = sum((weights[group] * totals["dot"][group]).item() for group in members)
        s_norm = math.fsum(totals["s_norm"][members].tolist())
        if self._is_inner:
            return before.as_inner_product(change, s_norm, limits=limits)
        return before.as_prodigy(
            change,
            s_norm,
            beta3=step.hyper["beta3"][first].item(),
            d_coef=step.hyper["d_coef"][first].item(),
            d0=step.hyper["d0"][members[-1]].item(),
            limits=limits,
        )

    def _statistics(self, step: StepInputs, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight of g in m and v, its gain in s and the decay of s, each ``(num_tensors,)``."""
        group = step.group_of_tensor
        if self._is_inner:
            ones = torch.ones_like(step.step_count)
            return ones, ones, ones
        s_step = torch.where(step.hyper["safeguard_warmup"] > 0.0, d, self._dlr(step, d))
        s_decay = torch.where(self._has_lr(step), self._shared(step, "beta3"), 1.0)
        return d[group], ((d / step.hyper["d0"]) * s_step)[group], s_decay[group]

    def _dlr(self, step: StepInputs, d: Tensor) -> Tensor:
        """d * lr * bc of each group, ``(num_groups,)`` float64."""
        k, beta1, beta2 = (
            self._of_groups(step.scalars, step, "k"),
            self._shared(step, "beta1"),
            self._shared(step, "beta2"),
        )
        corrected = list(map(bias_correction, beta1.tolist(), beta2.tolist(), k.tolist()))
        corrections = torch.tensor(corrected, dtype=torch.float64)
        is_corrected = self._shared(step, "use_bias_correction") > 0.0
        return d * step.hyper["lr"] * torch.where(is_corrected, corrections, 1.0)

    def _step_coefficients(self, step: StepInputs, d_after: Tensor) -> dict[str, Tensor]:
        """Decay, step size and eps, ``d_after`` being the d that eps has."""
        d_before = self._of_groups(step.scalars, step, "d")
        dlr = self._dlr(step, d_after if self._is_inner else d_before)[step.group_of_tensor]
        d_eps = torch.ones_like(dlr) if self._is_inner else d_after[step.group_of_tensor]
        scale = dlr if self._has_momentum else dlr * d_eps
        decay = dlr * step.per_tensor("weight_decay") if self.decouple else torch.zeros_like(dlr)
        moving = self._moving(step)
        return {
            "decay": torch.where(moving, decay, 0.0),
            "step_size": torch.where(moving, scale, 0.0),
            "eps": d_eps * step.per_tensor("eps"),
        }

    def _stepped(self, param: Tensor, slots: Mapping[str, Tensor], grad: Tensor, c: Coefficients) -> Tensor:
        momentum = slots["exp_avg"] if self._has_momentum else grad
        denominator = adam_denominator(slots["exp_avg_sq"], c["eps"])
        # 1 - decay would be rounded away: dlr is about 1e-6 at first.
        decayed = param - c["decay"] * param
        return decayed - c["step_size"] * momentum / denominator

    def _moving(self, step: StepInputs) -> Tensor:
        return step.present & (step.per_tensor("lr") > 0.0)

    def _coupled_decay(self, step: StepInputs) -> Tensor:
        decay = torch.zeros_like(step.step_count) if self.decouple else step.per_tensor("weight_decay")
        return torch.where(self._moving(step), decay, 0.0)

    def _decayed_grad(self, tiles: Tiles, c: Coefficients) -> Tensor:
        return tiles.grad if self.decouple else tiles.grad + c["coupled_decay"] * tiles.param
