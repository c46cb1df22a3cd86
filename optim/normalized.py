"""UM and PreLAMB: momentum scaled by norms of whole tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .hyper import require
from .moments import decoupled_keep, read_average_hyper
from .rule import Coefficients, Combined, ReducingRule, Scope, Slot, Tiles, tile_sum
from .step_inputs import StepInputs


@dataclasses.dataclass(frozen=True)
class NormalizedMomentumBase(ReducingRule):
    """What UM and PreLAMB share: one running average, and sums per tensor."""

    scope: ClassVar[Scope] = Scope.TENSOR

    lr: float = 1e-3
    beta: float = 0.9
    weight_decay: float = 0.0
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


@final
@dataclasses.dataclass(frozen=True)
class UMRule(NormalizedMomentumBase):
    r"""Unit momentum: a step of the same length for every tensor.

    ::

        p   = p * (1 - lr * weight_decay)
        m   = beta * m + (1 - beta) * g
        p   = p - lr * m_hat / norm(m_hat)

    ``norm`` is the root mean square (``"rms"``) or the Euclidean norm (``"l2"``) over the whole tensor; bias correction
    drops out of the quotient. Where the norm is 0 the tensor stands still.
    """

    name: ClassVar[str] = "UM"
    structural: ClassVar[frozenset[str]] = frozenset({"norm"})
    sums: ClassVar[tuple[str, ...]] = ("m_sq",)

    norm: str = "rms"

    def __post_init__(self) -> None:
        require(self.norm in ("rms", "l2"), "norm value", self.norm)
        super().__post_init__()

    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Decay and gain of m."""
        beta = step.per_tensor("beta")
        return {"m_decay": step.where_present(beta, 1.0), "m_gain": step.where_present(1.0 - beta, 0.0)}

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """m; sum of m^2."""
        exp_avg = tiles.slots["exp_avg"] * c["m_decay"] + tiles.grad * c["m_gain"]
        return {"exp_avg": exp_avg}, {"m_sq": tile_sum(exp_avg * exp_avg)}

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step size over the norm."""
        count = step.numel if self.norm == "rms" else torch.ones_like(step.numel)
        norm = (totals["m_sq"] / count.clamp_min(1.0)).sqrt()
        scaled = torch.where(norm > 0.0, step.per_tensor("lr") / norm, 0.0)
        return {
            "keep": decoupled_keep(step),
            "step_size": step.where_present(scaled, 0.0),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameters."""
        return tiles.param * c["keep"] - c["step_size"] * tiles.slots["exp_avg"], {}


@final
@dataclasses.dataclass(frozen=True)
class PreLAMBRule(NormalizedMomentumBase):
    r"""PreLAMB: the gradient is scaled to the parameter's norm before it is averaged.

    ::

        g_hat = g * ||p||_2 / ||g||_2           g where either norm is 0
        p     = p * (1 - lr * weight_decay)
        m     = beta * m + (1 - beta) * g_hat
        p     = p - lr * m / (1 - beta^t)

    Norms are of the whole tensor, that of p before its decay.
    """

    name: ClassVar[str] = "PreLAMB"
    sums: ClassVar[tuple[str, ...]] = ("param_sq", "grad_sq")

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """||p||^2 and ||g||^2."""
        return {}, {"param_sq": tile_sum(tiles.param * tiles.param), "grad_sq": tile_sum(tiles.grad * tiles.grad)}

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gain of m has the ratio of norms in it."""
        beta = step.per_tensor("beta")
        param_norm, grad_norm = totals["param_sq"].sqrt(), totals["grad_sq"].sqrt()
        either_zero = (param_norm == 0.0) | (grad_norm == 0.0)
        ratio = torch.where(either_zero, 1.0, param_norm / grad_norm)
        return {
            "keep": decoupled_keep(step),
            "m_decay": step.where_present(beta, 1.0),
            "m_gain": step.where_present((1.0 - beta) * ratio, 0.0),
            "step_size": step.where_present(step.per_tensor("lr") / (1.0 - beta**step.step_count), 0.0),
        }

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """m and the parameters."""
        exp_avg = tiles.slots["exp_avg"] * c["m_decay"] + tiles.grad * c["m_gain"]
        return tiles.param * c["keep"] - c["step_size"] * exp_avg, {"exp_avg": exp_avg}
