"""RMSprop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .hyper import read_float, require
from .moments import decay_coefficients, maximize_sign
from .rule import Coefficients, Combined, ElementwiseRule, Slot, Tiles
from .step_inputs import StepInputs


@final
@dataclasses.dataclass(frozen=True)
class RMSpropRule(ElementwiseRule):
    r"""RMSprop, as :class:`torch.optim.RMSprop`.

    ::

        g   = g + weight_decay * p
        v   = alpha * v + (1 - alpha) * g^2
        a   = alpha * a + (1 - alpha) * g                  with centered
        r   = sqrt(v) + eps, or sqrt(v - a^2) + eps with centered
        b   = momentum * b + g / r;   p = p - lr * b       with momentum
        p   = p - lr * g / r                               without

    References:
        T. Tieleman, G. Hinton: Lecture 6.5, Coursera 2012; A. Graves: Generating Sequences With Recurrent Neural
        Networks, arXiv:1308.0850, equations 38 to 41 (centered).

    Differs:
        An element with r = 0 stands still where torch gives NaN. v - a^2 that rounding makes negative counts as 0.
    """

    name: ClassVar[str] = "RMSprop"
    structural: ClassVar[frozenset[str]] = frozenset({"centered"})
    carried_group_keys: ClassVar[Mapping[str, object]] = {"foreach": None, "capturable": False, "differentiable": False}

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``square_avg``; ``momentum_buffer`` if the job begins with momentum; ``grad_avg`` with centered."""
        names = ["square_avg"]
        names += ["momentum_buffer"] if self.momentum > 0.0 else []
        names += ["grad_avg"] if self.centered else []
        return tuple(Slot(name) for name in names)

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """All fields but ``centered``."""
        values = {key: read_float(group, key) for key in ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")}
        require(values["lr"] >= 0.0, "learning rate", values["lr"])
        require(values["eps"] >= 0.0, "epsilon value", values["eps"])
        require(values["momentum"] >= 0.0, "momentum value", values["momentum"])
        require(values["weight_decay"] >= 0.0, "weight_decay value", values["weight_decay"])
        require(values["alpha"] >= 0.0, "alpha value", values["alpha"])
        if values["momentum"] > 0.0 and self.momentum == 0.0:
            raise ValueError(
                f"Invalid momentum value: {values['momentum']} (registered with 0, so there is no momentum_buffer; "
                "give the optimizer a momentum above 0, then a group may have any)"
            )
        return values

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``of_step`` and ``of_buffer`` choose between the two; momentum 0 leaves the buffer alone, as torch."""
        alpha, momentum = step.per_tensor("alpha"), step.per_tensor("momentum")
        has_momentum = (momentum > 0.0).to(torch.float64)
        return {
            "l2": decay_coefficients(step, decoupled=False)["l2"],
            "sign": maximize_sign(step),
            "v_decay": step.where_present(alpha, 1.0),
            "v_gain": step.where_present(1.0 - alpha, 0.0),
            "eps": step.per_tensor("eps"),
            "b_decay": step.where_present(torch.where(momentum > 0.0, momentum, 1.0), 1.0),
            "b_gain": step.where_present(has_momentum, 0.0),
            "of_step": 1.0 - has_momentum,
            "of_buffer": has_momentum,
            "step_size": step.where_present(step.per_tensor("lr"), 0.0),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step."""
        grad = tiles.grad * c["sign"] + tiles.param * c["l2"]
        slots = {"square_avg": tiles.slots["square_avg"] * c["v_decay"] + grad * grad * c["v_gain"]}
        variance = slots["square_avg"]
        if self.centered:
            slots["grad_avg"] = tiles.slots["grad_avg"] * c["v_decay"] + grad * c["v_gain"]
            variance = (variance - slots["grad_avg"] * slots["grad_avg"]).clamp_min(0.0)
        root = variance.sqrt() + c["eps"]
        update = grad / root.clamp_min(torch.finfo(root.dtype).tiny)
        if self.momentum > 0.0:
            buffer = slots["momentum_buffer"] = tiles.slots["momentum_buffer"] * c["b_decay"] + update * c["b_gain"]
            update = update * c["of_step"] + buffer * c["of_buffer"]
        return tiles.param - c["step_size"] * update, slots
