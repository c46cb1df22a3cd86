"""Prodigy: Adam whose step size is an estimate of the distance to the solution."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import Tensor

from .estimate import Estimate, Limits, bias_correction
from .hyper import read_betas, read_float, require
from .rule import Coefficients, Combined, ReducingRule, Scope, Slot, Tiles, adam_denominator, tile_sum
from .scalars import split_scalar
from .step_inputs import StepInputs

_CHOICES = {
    "eps_d": ("new", "old"),
    "estimator": ("prodigy", "inner_product"),
    "d_scope": ("model", "group"),
    "stat_dtype": ("state", "bfloat16"),
}

_LOCAL_AT_REST = {
    "m_decay": 1.0,
    "m_gain": 0.0,
    "v_decay": 1.0,
    "v_gain": 0.0,
    "s_gain": 0.0,
    "coupled_decay": 0.0,
}
_APPLY_AT_REST = {"decay": 0.0, "step_size": 0.0, "coupled_decay": 0.0}
"""Coefficients that leave a tensor alone; s decays and eps counts all the same."""

_DECAYS = frozenset({"decay", "coupled_decay"})
"""Coefficients that some parameters are spared."""


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
        return self._spread(step, [self._local_numbers(step, group) for group in step.groups], _LOCAL_AT_REST)

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
        is_moving = self._estimates_move(step, totals)
        numbers = [self._apply_numbers(step, after, group, moves=is_moving[group]) for group in step.groups]
        return self._spread(step, numbers, _APPLY_AT_REST)

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
        return [[group] for group in step.groups] if self.has_scalars_per_group else [list(step.groups)]

    def _first(self, group: int) -> int:
        """The first group of a group's estimate, whose hyperparameters hold for that."""
        return group if self.has_scalars_per_group else 0

    def _estimate_of(self, scalars: Mapping[str, float], group: int) -> Estimate:
        return Estimate(**{name: scalars[self.scalar_key(name, group)] for name in self.plain_scalars})

    def _flat(self, estimate: Estimate, group: int) -> dict[str, float]:
        return {self.scalar_key(name, group): getattr(estimate, name) for name in self.plain_scalars}

    def _has_lr(self, step: StepInputs, group: int) -> bool:
        """Whether a group's estimate has a group that moves."""
        rates = step.hyper["lr"]
        return rates[group] > 0.0 if self.has_scalars_per_group else any(lr > 0.0 for lr in rates)

    def _estimates_move(self, step: StepInputs, totals: Mapping[str, Tensor]) -> list[bool]:
        """Whether each group's estimate has its step; one whose ||s||_1 is 0 ends it, where that is known in time."""
        has_lr = [self._has_lr(step, group) for group in step.groups]
        if self._is_inner or self.is_one_pass:
            return has_lr
        norms = totals["s_norm"].tolist()
        known = {group: math.fsum(norms[i] for i in members) for members in self._members(step) for group in members}
        return [moves and known[group] != 0.0 for group, moves in enumerate(has_lr)]

    def _next_estimate(self, step: StepInputs, members: list[int], totals: Mapping[str, Tensor]) -> Estimate:
        before, h = self._estimate_of(step.scalars, members[0]), step.hyper_of(members[0])
        limits = Limits(growth_rate=h["growth_rate"], max_d=h["max_d"], is_frozen=h["freeze_d"] > 0.0)
        dots, norms = totals["dot"].tolist(), totals["s_norm"].tolist()
        change = sum(self._weight_of_dot(step, group) * dots[group] for group in members)
        s_norm = math.fsum(norms[group] for group in members)
        if self._is_inner:
            return before.as_inner_product(change, s_norm, limits=limits)
        d0 = step.hyper["d0"][members[-1]]
        return before.as_prodigy(change, s_norm, beta3=h["beta3"], d_coef=h["d_coef"], d0=d0, limits=limits)

    def _weight_of_dot(self, step: StepInputs, group: int) -> float:
        """What a group's dot counts in its estimate."""
        if self._is_inner:
            return step.hyper["lr"][group]
        d = step.scalars[self.scalar_key("d", group)]
        return (d / step.hyper["d0"][group]) * self._dlr(step, d, group)

    def _dlr(self, step: StepInputs, d: float, group: int) -> float:
        """d * lr * bc of a group."""
        shared = step.hyper_of(self._first(group))
        correction = 1.0
        if shared["use_bias_correction"] > 0.0:
            k = step.scalars[self.scalar_key("k", group)]
            correction = bias_correction(shared["beta1"], shared["beta2"], k)
        return d * step.hyper["lr"][group] * correction

    def _local_numbers(self, step: StepInputs, group: int) -> dict[str, float]:
        """A group's coefficients of the first pass."""
        h, d = step.hyper_of(group), step.scalars[self.scalar_key("d", group)]
        weight, s_gain, s_decay = 1.0, 1.0, 1.0
        if not self._is_inner:
            weight = d
            s_gain = (d / h["d0"]) * (d if h["safeguard_warmup"] > 0.0 else self._dlr(step, d, group))
            s_decay = step.hyper["beta3"][self._first(group)] if self._has_lr(step, group) else 1.0
        numbers = {
            "m_decay": h["beta1"],
            "m_gain": weight * (1.0 - h["beta1"]),
            "v_decay": h["beta2"],
            "v_gain": weight * weight * (1.0 - h["beta2"]),
            "s_gain": s_gain,
            "coupled_decay": self._coupled_decay(h),
        }
        return {**(numbers if h["lr"] > 0.0 else _LOCAL_AT_REST), "s_decay": s_decay}

    def _apply_numbers(self, step: StepInputs, after: Combined, group: int, *, moves: bool) -> dict[str, float]:
        """A group's coefficients of the second pass: decay, step size and eps."""
        h = step.hyper_of(group)
        d_before, d_after = (scalars[self.scalar_key("d", group)] for scalars in (step.scalars, after.scalars))
        dlr = self._dlr(step, d_after if self._is_inner else d_before, group)
        d_eps, has_lr = 1.0 if self._is_inner else d_after, h["lr"] > 0.0
        scale = dlr if self._has_momentum else dlr * d_eps
        return {
            "decay": dlr * h["weight_decay"] if moves and has_lr and self.decouple else 0.0,
            "step_size": scale if moves and has_lr else 0.0,
            "coupled_decay": self._coupled_decay(h) if has_lr else 0.0,
            "eps": d_eps * h["eps"],
        }

    def _coupled_decay(self, h: Mapping[str, float]) -> float:
        return 0.0 if self.decouple else h["weight_decay"]

    def _spread(
        self, step: StepInputs, by_group: list[dict[str, float]], at_rest: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Numbers per tensor from those per group; no decay where there is none."""
        spread = step.spread(by_group, absent=at_rest)
        return {name: values * step.decays if name in _DECAYS else values for name, values in spread.items()}

    def _stepped(self, param: Tensor, slots: Mapping[str, Tensor], grad: Tensor, c: Coefficients) -> Tensor:
        momentum = slots["exp_avg"] if self._has_momentum else grad
        denominator = adam_denominator(slots["exp_avg_sq"], c["eps"])
        # 1 - decay would be rounded away: dlr is about 1e-6 at first.
        decayed = param - c["decay"] * param
        return decayed - c["step_size"] * momentum / denominator

    def _decayed_grad(self, tiles: Tiles, c: Coefficients) -> Tensor:
        return tiles.grad if self.decouple else tiles.grad + c["coupled_decay"] * tiles.param
