"""What Adam's relatives share: running averages of the gradient and its square, and the two forms of weight decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .hyper import read_betas, read_float, require
from .rule import Coefficients, Tiles
from .step_inputs import StepInputs


def read_adam_hyper(group: Mapping[str, object], *switches: str) -> dict[str, float]:
    """As :func:`read_moment_hyper`, and eps."""
    eps = read_float(group, "eps")
    require(eps >= 0.0, "epsilon value", eps)
    return {**read_moment_hyper(group, *switches), "eps": eps}


def read_moment_hyper(group: Mapping[str, object], *switches: str) -> dict[str, float]:
    """lr, beta1, beta2 and weight_decay of a group, checked as torch checks them, and ``switches`` as 0 or 1."""
    beta1, beta2 = read_betas(group)
    return {**_read_rates(group, *switches), "beta1": beta1, "beta2": beta2}


def read_average_hyper(group: Mapping[str, object], *switches: str) -> dict[str, float]:
    """The same for a rule with one running average: lr, beta, weight_decay, and ``switches``."""
    values = {**_read_rates(group, *switches), "beta": read_float(group, "beta")}
    require(0.0 <= values["beta"] < 1.0, "beta value", values["beta"])
    return values


def moment_coefficients(step: StepInputs) -> dict[str, Tensor]:
    """Decays and gains of m and v; an absent tensor keeps both."""
    beta1, beta2 = step.per_tensor("beta1"), step.per_tensor("beta2")
    return {
        "m_decay": step.where_present(beta1, 1.0),
        "m_gain": step.where_present(1.0 - beta1, 0.0),
        "v_decay": step.where_present(beta2, 1.0),
        "v_gain": step.where_present(1.0 - beta2, 0.0),
    }


def update_moments(tiles: Tiles, grad: Tensor, c: Coefficients) -> dict[str, Tensor]:
    """m = beta1 m + (1 - beta1) g and v = beta2 v + (1 - beta2) g^2, as slots."""
    return {
        "exp_avg": tiles.slots["exp_avg"] * c["m_decay"] + grad * c["m_gain"],
        "exp_avg_sq": tiles.slots["exp_avg_sq"] * c["v_decay"] + grad * grad * c["v_gain"],
    }


def bias_corrections(step: StepInputs) -> tuple[Tensor, Tensor]:
    """1 - beta1^t and 1 - beta2^t of each tensor, t its own step count; 1 where absent."""
    corrections = (1.0 - step.per_tensor(beta) ** step.step_count for beta in ("beta1", "beta2"))
    first, second = (step.where_present(correction, 1.0) for correction in corrections)
    return first, second


def decay_coefficients(step: StepInputs, *, decoupled: bool) -> dict[str, Tensor]:
    """``keep``, which multiplies the parameter, and ``l2``, which adds the parameter to the gradient."""
    decay = step.per_tensor("weight_decay")
    nothing = torch.zeros_like(decay)
    return {
        "keep": step.where_present(1.0 - step.per_tensor("lr") * decay if decoupled else nothing + 1.0, 1.0),
        "l2": step.where_present(nothing if decoupled else decay, 0.0),
    }


def decoupled_keep(step: StepInputs) -> Tensor:
    """What decay leaves of the parameter: 1 - lr * weight_decay, or 1 - weight_decay without ``weight_decay_by_lr``."""
    factor = torch.where(step.per_tensor("weight_decay_by_lr") > 0.0, step.per_tensor("lr"), 1.0)
    return step.where_present(1.0 - factor * step.per_tensor("weight_decay"), 1.0)


def maximize_sign(step: StepInputs) -> Tensor:
    """-1 for groups that go up the gradient, else 1."""
    return 1.0 - 2.0 * step.per_tensor("maximize")


def _read_rates(group: Mapping[str, object], *switches: str) -> dict[str, float]:
    values = {key: read_float(group, key) for key in ("lr", "weight_decay", *switches)}
    require(values["lr"] >= 0.0, "learning rate", values["lr"])
    require(values["weight_decay"] >= 0.0, "weight_decay value", values["weight_decay"])
    return values
