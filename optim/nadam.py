"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .hyper import read_float, require
from .moments import (
    bias_corrections,
    decay_coefficients,
    maximize_sign,
    moment_coefficients,
    read_adam_hyper,
    update_moments,
)
from .rule import Coefficients, Combined, ElementwiseRule, KeySlot, Scope, Slot, Tiles
from .step_inputs import StepInputs


@final
@dataclasses.dataclass(frozen=True)
class NAdamRule(ElementwiseRule):
    r"""NAdam, as :class:`torch.optim.NAdam`.

    With t the parameter's own step count::

        g     = g + weight_decay * p                              (p = p * (1 - lr * weight_decay) if decoupled)
        mu_t  = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        M_t   = mu_1 * ... * mu_t                                 the key state mu_product
        m, v  as Adam
        p     = p - lr * ((1 - mu_t) / (1 - M_t) * g + mu_{t+1} / (1 - M_t * mu_{t+1}) * m) / (sqrt(v_hat) + eps)

    ``maximize`` turns the gradient's sign.

    References:
        T. Dozat: Incorporating Nesterov Momentum into Adam, ICLR Workshop 2016, Algorithm 2.

    Differs:
        M_t is kept to float32, as torch keeps it whatever the parameter's dtype, so that a state dict loses nothing.
        An element with v = 0 and eps = 0 stands still where torch gives NaN.
    """

    name: ClassVar[str] = "NAdam"
    structural: ClassVar[frozenset[str]] = frozenset({"decoupled_weight_decay"})
    carried_group_keys: ClassVar[Mapping[str, object]] = {"foreach": None, "capturable": False, "differentiable": False}

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg`` and ``exp_avg_sq``."""
        return Slot("exp_avg"), Slot("exp_avg_sq")

    @property
    def key_slots(self) -> tuple[KeySlot, ...]:
        """``mu_product``, per tensor."""
        return (KeySlot("mu_product", Scope.TENSOR, init=1.0, shown_in="float32"),)

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """All fields but ``decoupled_weight_decay``."""
        momentum_decay = read_float(group, "momentum_decay")
        require(momentum_decay >= 0.0, "momentum_decay value", momentum_decay)
        return {**read_adam_hyper(group, "maximize"), "momentum_decay": momentum_decay}

    def combine(self, step: StepInputs, totals: Mapping[str, Tensor]) -> Combined:
        """M_t of the tensors that are present."""
        before = step.key_state["mu_product"]
        # As torch multiplies its float32 tensor with a Python float.
        product = (before.to(torch.float32) * self._mu(step, step.step_count).to(torch.float32)).to(torch.float64)
        return Combined(step.scalars, key_state={"mu_product": torch.where(step.present, product, before)})

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``of_grad`` and ``of_average`` hold the learning rate and Nesterov's weights of g and m."""
        lr, product = step.per_tensor("lr"), after.key_state["mu_product"]
        mu, mu_next = self._mu(step, step.step_count), self._mu(step, step.step_count + 1.0)
        _, second = bias_corrections(step)
        return {
            **moment_coefficients(step),
            **decay_coefficients(step, decoupled=self.decoupled_weight_decay),
            "sign": maximize_sign(step),
            "of_grad": step.where_present(lr * (1.0 - mu) / (1.0 - product), 0.0),
            "of_average": step.where_present(lr * mu_next / (1.0 - product * mu_next), 0.0),
            "v_correction": second,
            "eps": step.per_tensor("eps"),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        grad = tiles.grad * c["sign"] + tiles.param * c["l2"]
        slots = update_moments(tiles, grad, c)
        root = (slots["exp_avg_sq"] / c["v_correction"]).sqrt() + c["eps"]
        update = grad * c["of_grad"] + slots["exp_avg"] * c["of_average"]
        return tiles.param * c["keep"] - update / root.clamp_min(torch.finfo(root.dtype).tiny), slots

    def _mu(self, step: StepInputs, t: Tensor) -> Tensor:
        return step.per_tensor("beta1") * (1.0 - 0.5 * 0.96 ** (t * step.per_tensor("momentum_decay")))
