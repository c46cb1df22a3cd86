"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .rule import (
    Coefficients,
    ElementwiseRule,
    Slot,
    StepInputs,
    Tiles,
    read_betas,
    read_float,
    require,
)


@final
@dataclasses.dataclass(frozen=True)
class AdamWRule(ElementwiseRule):
    r"""AdamW, as :class:`torch.optim.AdamW`.

    With :math:`g_t` the gradient, :math:`\gamma` = ``lr``, :math:`\lambda` = ``weight_decay``::

        p   = p * (1 - lr * weight_decay)
        m   = beta1 * m + (1 - beta1) * g
        v   = beta2 * v + (1 - beta2) * g^2
        p   = p - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    t counts the steps in which the parameter had a gradient. With ``amsgrad`` the root is taken of the running maximum
    of v. ``maximize`` turns the gradient's sign.

    References:
        I. Loshchilov, F. Hutter: Decoupled Weight Decay Regularization, arXiv:1711.05101, Algorithm 2.

    Differs:
        An element with v = 0 and eps = 0 stands still where torch gives NaN.
    """

    name: ClassVar[str] = "AdamW"
    structural: ClassVar[frozenset[str]] = frozenset({"amsgrad"})
    carried_group_keys: ClassVar[Mapping[str, object]] = {
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": True,
    }

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` with amsgrad."""
        names = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if self.amsgrad else [])
        return tuple(Slot(name) for name in names)

    @property
    def initial_scalars(self) -> dict[str, float]:
        """None."""
        return {}

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, eps, weight_decay, maximize."""
        beta1, beta2 = read_betas(group)
        values = {key: read_float(group, key) for key in ("lr", "eps", "weight_decay", "maximize")}
        require(values["lr"] >= 0.0, "learning rate", values["lr"])
        require(values["eps"] >= 0.0, "epsilon value", values["eps"])
        require(values["weight_decay"] >= 0.0, "weight_decay value", values["weight_decay"])
        return {**values, "beta1": beta1, "beta2": beta2}

    def apply_coefficients(
        self, step: StepInputs, scalars: Mapping[str, float], totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See the class's equations; ``root_scale`` is sqrt(1 - beta2^t)."""
        lr, beta1, beta2 = step.per_tensor("lr"), step.per_tensor("beta1"), step.per_tensor("beta2")
        sign = 1.0 - 2.0 * step.per_tensor("maximize")
        return {
            "keep": step.where_present(1.0 - lr * step.per_tensor("weight_decay"), 1.0),
            "m_decay": step.where_present(beta1, 1.0),
            "m_gain": step.where_present((1.0 - beta1) * sign, 0.0),
            "v_decay": step.where_present(beta2, 1.0),
            "v_gain": step.where_present(1.0 - beta2, 0.0),
            "step_size": step.where_present(lr / (1.0 - beta1**step.step_count), 0.0),
            "root_scale": step.where_present(torch.sqrt(1.0 - beta2**step.step_count), 1.0),
            "eps": step.per_tensor("eps"),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        exp_avg = tiles.slots["exp_avg"] * c["m_decay"] + tiles.grad * c["m_gain"]
        exp_avg_sq = tiles.slots["exp_avg_sq"] * c["v_decay"] + tiles.grad * tiles.grad * c["v_gain"]
        slots = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        second = exp_avg_sq
        if self.amsgrad:
            second = slots["max_exp_avg_sq"] = torch.maximum(tiles.slots["max_exp_avg_sq"], exp_avg_sq)
        root = second.sqrt() / c["root_scale"] + c["eps"]
        denominator = root.clamp_min(torch.finfo(root.dtype).tiny)
        return tiles.param * c["keep"] - c["step_size"] * exp_avg / denominator, slots
