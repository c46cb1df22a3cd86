"""SGD and Momentum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .hyper import read_float, require
from .moments import decay_coefficients, decoupled_keep, maximize_sign, read_average_hyper
from .rule import Coefficients, Combined, ElementwiseRule, Slot, Tiles
from .step_inputs import StepInputs


@final
@dataclasses.dataclass(frozen=True)
class SGDRule(ElementwiseRule):
    r"""SGD with momentum, as :class:`torch.optim.SGD`.

    ::

        g   = g + weight_decay * p
        b   = g at the parameter's first step, then momentum * b + (1 - dampening) * g
        u   = g without momentum, g + momentum * b with nesterov, else b
        p   = p - lr * u

    ``maximize`` turns the gradient's sign, before weight decay.

    References:
        I. Sutskever et al.: On the importance of initialization and momentum in deep learning, ICML 2013, equation 3;
        torch's form of it.

    Differs:
        A group that begins with momentum 0 and gets some later has b = (1 - dampening) * g then, torch b = g.
    """

    name: ClassVar[str] = "SGD"
    carried_group_keys: ClassVar[Mapping[str, object]] = {"foreach": None, "differentiable": False, "fused": None}

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        # Here alone, as in torch: a live group may come down to momentum 0, which makes nesterov plain SGD.
        if self.nesterov and (self.momentum <= 0.0 or self.dampening != 0.0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``momentum_buffer``, if the job begins with momentum."""
        return (Slot("momentum_buffer"),) if self.momentum != 0.0 else ()

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """All fields."""
        keys = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        values = {key: read_float(group, key) for key in keys}
        require(values["lr"] >= 0.0, "learning rate", values["lr"])
        require(values["momentum"] >= 0.0, "momentum value", values["momentum"])
        require(values["weight_decay"] >= 0.0, "weight_decay value", values["weight_decay"])
        if values["momentum"] > 0.0 and not self.slots:
            raise ValueError(
                f"Invalid momentum value: {values['momentum']} (registered with 0, so there is no momentum_buffer; "
                "give the optimizer a momentum above 0, then a group may have any)"
            )
        return values

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``of_grad`` and ``of_buffer`` make the update from the two; momentum 0 leaves the buffer alone, as torch."""
        momentum, dampening = step.per_tensor("momentum"), step.per_tensor("dampening")
        has_momentum = momentum != 0.0
        is_first = step.step_count == 1.0
        decay = torch.where(is_first, 0.0, momentum)
        gain = torch.where(is_first, 1.0, 1.0 - dampening)
        nesterov = step.per_tensor("nesterov") > 0.0
        return {
            "l2": decay_coefficients(step, decoupled=False)["l2"],
            "sign": maximize_sign(step),
            "b_decay": step.where_present(torch.where(has_momentum, decay, 1.0), 1.0),
            "b_gain": step.where_present(torch.where(has_momentum, gain, 0.0), 0.0),
            "of_grad": (nesterov | ~has_momentum).to(torch.float64),
            "of_buffer": torch.where(nesterov, momentum, has_momentum.to(torch.float64)),
            "step_size": step.where_present(step.per_tensor("lr"), 0.0),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        grad = tiles.grad * c["sign"] + tiles.param * c["l2"]
        if not self.slots:
            return tiles.param - c["step_size"] * grad, {}
        buffer = tiles.slots["momentum_buffer"] * c["b_decay"] + grad * c["b_gain"]
        update = grad * c["of_grad"] + buffer * c["of_buffer"]
        return tiles.param - c["step_size"] * update, {"momentum_buffer": buffer}


@final
@dataclasses.dataclass(frozen=True)
class MomentumRule(ElementwiseRule):
    r"""Momentum as a running average.

    ::

        p   = p * (1 - lr * weight_decay)
        V   = beta * V + (1 - beta) * g
        p   = p - lr * V                    V / (1 - beta^t) with bias_correction

    References:
        B. Polyak: Some methods of speeding up the convergence of iteration methods, 1964; in the averaged form.
    """

    name: ClassVar[str] = "Momentum"
    structural: ClassVar[frozenset[str]] = frozenset({"bias_correction"})

    lr: float = 1e-3
    beta: float = 0.9
    weight_decay: float = 0.0
    bias_correction: bool = False
    weight_decay_by_lr: bool = True

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg``."""
        return (Slot("exp_avg"),)

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta, weight_decay, weight_decay_by_lr."""
        return read_average_hyper(group, "weight_decay_by_lr")

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the equations."""
        beta, lr = step.per_tensor("beta"), step.per_tensor("lr")
        corrected = lr / (1.0 - beta**step.step_count) if self.bias_correction else lr
        return {
            "keep": decoupled_keep(step),
            "m_decay": step.where_present(beta, 1.0),
            "m_gain": step.where_present(1.0 - beta, 0.0),
            "step_size": step.where_present(corrected, 0.0),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        exp_avg = tiles.slots["exp_avg"] * c["m_decay"] + tiles.grad * c["m_gain"]
        return tiles.param * c["keep"] - c["step_size"] * exp_avg, {"exp_avg": exp_avg}
