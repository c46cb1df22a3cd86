"""Adam and AdamW."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .moments import (
    bias_corrections,
    decay_coefficients,
    maximize_sign,
    moment_coefficients,
    read_adam_hyper,
    update_moments,
)
from .rule import Coefficients, Combined, ElementwiseRule, Slot, Tiles
from .step_inputs import StepInputs

_TORCH_KEYS = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


@dataclasses.dataclass(frozen=True)
class AdamBase(ElementwiseRule):
    """Adam with either form of weight decay; see :class:`AdamRule` and :class:`AdamWRule`."""

    structural: ClassVar[frozenset[str]] = frozenset({"amsgrad", "decoupled_weight_decay"})

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    @abc.abstractmethod
    def is_decoupled(self) -> bool:
        """Whether weight decay multiplies the parameter, not adds to the gradient."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` with amsgrad."""
        names = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if self.amsgrad else [])
        return tuple(Slot(name) for name in names)

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, eps, weight_decay, maximize."""
        return read_adam_hyper(group, "maximize")

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the equations; ``root_scale`` is sqrt(1 - beta2^t)."""
        first, second = bias_corrections(step)
        return {
            **moment_coefficients(step),
            **decay_coefficients(step, decoupled=self.is_decoupled),
            "sign": maximize_sign(step),
            "step_size": step.where_present(step.per_tensor("lr") / first, 0.0),
            "root_scale": second.sqrt(),
            "eps": step.per_tensor("eps"),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        grad = tiles.grad * c["sign"]
        if not self.is_decoupled:
            grad = grad + tiles.param * c["l2"]
        slots = update_moments(tiles, grad, c)
        largest = slots["exp_avg_sq"]
        if self.amsgrad:
            largest = slots["max_exp_avg_sq"] = torch.maximum(tiles.slots["max_exp_avg_sq"], largest)
        root = largest.sqrt() / c["root_scale"] + c["eps"]
        denominator = root.clamp_min(torch.finfo(root.dtype).tiny)
        return tiles.param * c["keep"] - c["step_size"] * slots["exp_avg"] / denominator, slots


@final
@dataclasses.dataclass(frozen=True)
class AdamRule(AdamBase):
    r"""Adam, as :class:`torch.optim.Adam`.

    With g the gradient, t the parameter's own step count::

        g   = g + weight_decay * p                                  (unless decoupled_weight_decay)
        m   = beta1 * m + (1 - beta1) * g
        v   = beta2 * v + (1 - beta2) * g^2
        p   = p - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    With ``amsgrad`` the root is taken of the running maximum of v. ``maximize`` turns the gradient's sign.

    References:
        D. Kingma, J. Ba: Adam: A Method for Stochastic Optimization, arXiv:1412.6980, Algorithm 1.
        S. Reddi, S. Kale, S. Kumar: On the Convergence of Adam and Beyond, arXiv:1904.09237, Algorithm 2 (amsgrad).

    Differs:
        An element with v = 0 and eps = 0 stands still where torch gives NaN.
    """

    name: ClassVar[str] = "Adam"
    carried_group_keys: ClassVar[Mapping[str, object]] = _TORCH_KEYS

    decoupled_weight_decay: bool = False

    @property
    def is_decoupled(self) -> bool:
        """As asked for."""
        return self.decoupled_weight_decay


@final
@dataclasses.dataclass(frozen=True)
class AdamWRule(AdamBase):
    r"""AdamW, as :class:`torch.optim.AdamW`: Adam whose weight decay multiplies the parameter.

    With g the gradient, t the parameter's own step count::

        p   = p * (1 - lr * weight_decay)
        m   = beta1 * m + (1 - beta1) * g
        v   = beta2 * v + (1 - beta2) * g^2
        p   = p - (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    References:
        I. Loshchilov, F. Hutter: Decoupled Weight Decay Regularization, arXiv:1711.05101, Algorithm 2.

    Differs:
        As :class:`AdamRule`.
    """

    name: ClassVar[str] = "AdamW"
    structural: ClassVar[frozenset[str]] = frozenset({"amsgrad"})
    carried_group_keys: ClassVar[Mapping[str, object]] = {**_TORCH_KEYS, "decoupled_weight_decay": True}

    weight_decay: float = 1e-2

    @property
    def is_decoupled(self) -> bool:
        """Always."""
        return True
