"""Prodigy and its variants, written down as a person would: one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

Group = dict[str, Any]


class FormulaProdigy(torch.optim.Optimizer):
    """OPTIMIZERS: prodigyopt's definition, the paper's eps, the inner-product estimate, one d per group, a cap of d."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "lr": 1.0,
        "betas": (0.9, 0.999),
        "beta3": None,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decouple": True,
        "use_bias_correction": False,
        "safeguard_warmup": False,
        "d0": 1e-6,
        "d_coef": 1.0,
        "growth_rate": math.inf,
        "slice_p": 1,
        "eps_d": "new",
        "estimator": "prodigy",
        "d_scope": "model",
        "max_d": math.inf,
        "stat_dtype": "state",
    }

    def __init__(self, params: Any, **options: Any) -> None:
        assert options.keys() <= self.DEFAULTS.keys()
        defaults = {**self.DEFAULTS, **options}
        super().__init__(params, {**defaults, "d": defaults["d0"], "d_max": defaults["d0"], "d_numerator": 0.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        per_group = self.defaults["d_scope"] == "group"
        for unit in [[group] for group in self.param_groups] if per_group else [self.param_groups]:
            if self.defaults["estimator"] == "prodigy":
                self.prodigy_step(unit)
            else:
                self.inner_product_step(unit)

    def prodigy_step(self, unit: list[Group]) -> None:
        head = unit[0]
        d, k, beta3 = head["d"], head["k"], head["beta3"] or math.sqrt(head["betas"][1])
        change = norm = 0.0
        for group, p, g in members(unit):
            beta1, beta2 = group["betas"]
            state, dlr = self.state[p], d * group["lr"] * correction(head, k)
            p0 = state.setdefault("p0", rounded(group, strided(group, p).clone()))
            change += d / group["d0"] * dlr * float((strided(group, g) * (p0 - strided(group, p))).sum())
            average(state, "m", beta1, d * (1 - beta1) * g)
            average(state, "v", beta2, d * d * (1 - beta2) * g * g)
            s_step = d if group["safeguard_warmup"] else dlr
            average(state, "s", beta3, d / group["d0"] * s_step * strided(group, g))
            norm += float(state["s"].abs().sum())
            state["s"] = rounded(group, state["s"])
        if norm == 0:
            return
        head["d_numerator"] = beta3 * head["d_numerator"] + change
        d_hat = head["d_coef"] * head["d_numerator"] / norm
        grown_from = max(d, d_hat) if d == head["d0"] else d
        d_max = max(head["d_max"], d_hat)
        new_d = min(d_max, grown_from * head["growth_rate"], head["max_d"])
        for group, p, g in members(unit):
            state, dlr = self.state[p], d * group["lr"] * correction(head, k)
            d_eps = new_d if head["eps_d"] == "new" else d
            direction = state["m"] if group["betas"][0] > 0 else d_eps * g
            decay = dlr * group["weight_decay"] * p if group["decouple"] else 0.0
            p -= decay + dlr * direction / (state["v"].sqrt() + d_eps * group["eps"])
        for group in unit:
            group.update(d=new_d, d_max=d_max, k=k + 1, d_numerator=head["d_numerator"])

    def inner_product_step(self, unit: list[Group]) -> None:
        head = unit[0]
        d, k = head["d"], head["k"]
        product = square = 0.0
        for group, p, g in members(unit):
            beta1, beta2 = group["betas"]
            state = self.state[p]
            average(state, "s", 1.0, strided(group, g))
            product += group["lr"] * float((strided(group, g) * state["s"]).sum())
            square += float(state["s"].square().sum())
            state["s"] = rounded(group, state["s"])
            average(state, "m", beta1, (1 - beta1) * g)
            average(state, "v", beta2, (1 - beta2) * g * g)
        d = min(d + abs(product) / (d * max(square, 1e-30)), d * head["growth_rate"], head["max_d"])
        for group, p, g in members(unit):
            state, dlr = self.state[p], d * group["lr"] * correction(head, k)
            direction = state["m"] if group["betas"][0] > 0 else g
            decay = dlr * group["weight_decay"] * p if group["decouple"] else 0.0
            p -= decay + dlr * direction / (state["v"].sqrt() + group["eps"])
        for group in unit:
            group.update(d=d, d_max=max(head["d_max"], d), k=k + 1)


def members(unit: list[Group]) -> list[tuple[Group, Tensor, Tensor]]:
    """Every parameter with a gradient, that with coupled weight decay in it."""
    found = []
    for group in unit:
        coupled = 0.0 if group["decouple"] else group["weight_decay"]
        found += [(group, p, p.grad + coupled * p) for p in group["params"] if p.grad is not None]
    return found


def correction(group: Group, k: int) -> float:
    beta1, beta2 = group["betas"]
    return math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1)) if group["use_bias_correction"] else 1.0


def average(state: dict[str, Any], name: str, decay: float, change: Tensor) -> None:
    state[name] = decay * state.get(name, torch.zeros_like(change)) + change


def strided(group: Group, value: Tensor) -> Tensor:
    return value.flatten()[:: group["slice_p"]]


def rounded(group: Group, value: Tensor) -> Tensor:
    return value.to(torch.bfloat16).to(value.dtype) if group["stat_dtype"] == "bfloat16" else value
