"""AdamGCC, StableAdam and AdamAWD: Adam with a sum over each output channel of a convolution's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from .hyper import read_betas, read_float, require
from .moments import bias_corrections, decoupled_keep, moment_coefficients, read_adam_hyper, update_moments
from .rule import Coefficients, Combined, KeySlot, ReducingRule, Scope, Slot, Tiles
from .step_inputs import StepInputs


@dataclasses.dataclass(frozen=True)
class ChannelAdamBase(ReducingRule):
    """What the three share: Adam's two averages, and sums over output channels of weights of 4 and more dimensions."""

    scope: ClassVar[Scope] = Scope.CHANNEL

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self.hyper(self.defaults())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """``exp_avg`` and ``exp_avg_sq``."""
        return Slot("exp_avg"), Slot("exp_avg_sq")

    def num_channels(self, shape: tuple[int, ...]) -> int:
        """Those of a weight with at least 4 dimensions."""
        return shape[0] if len(shape) >= 4 else 0

    def _direction(self, slots: Mapping[str, Tensor], c: Coefficients) -> Tensor:
        """lr * m_hat / (sqrt(v_hat) + eps)."""
        root = slots["exp_avg_sq"].sqrt() / c["root_scale"] + c["eps"]
        return c["step_size"] * slots["exp_avg"] / root.clamp_min(torch.finfo(root.dtype).tiny)

    def _direction_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        first, second = bias_corrections(step)
        return {
            "step_size": step.where_present(step.per_tensor("lr") / first, 0.0),
            "root_scale": second.sqrt(),
            "eps": step.per_tensor("eps"),
        }


@final
@dataclasses.dataclass(frozen=True)
class AdamGCCRule(ChannelAdamBase):
    r"""AdamGCC: Adam on gradients that are centred in each output channel.

    ::

        g   = g - mean of g over its output channel         weights of at least 4 dimensions; others keep their g
        p   = p * (1 - lr * weight_decay)
        p   = p - lr * m_hat / (sqrt(v_hat) + eps)

    ``weight_decay_by_lr=False`` makes the decay ``p * (1 - weight_decay)``.

    References:
        H. Yong et al.: Gradient Centralization: A New Optimization Technique for Deep Neural Networks,
        arXiv:2004.01461, equation 1; for convolutions alone.
    """

    name: ClassVar[str] = "AdamGCC"
    sums: ClassVar[tuple[str, ...]] = ("grad",)

    weight_decay: float = 0.0
    weight_decay_by_lr: bool = True

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """All fields."""
        return read_adam_hyper(group, "weight_decay_by_lr")

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradient's sum."""
        return {}, {"grad": tiles.grad}

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adam's."""
        return {**moment_coefficients(step), **self._direction_coefficients(step), "keep": decoupled_keep(step)}

    def channel_coefficients(
        self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The gradient's mean; nothing to subtract outside a channel."""
        return {"mean": _or_outside(totals["grad"] / step.channels.numel, 0.0)}

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """m, v and the parameters, from the centred gradient."""
        slots = update_moments(tiles, tiles.grad - c["mean"], c)
        return tiles.param * c["keep"] - self._direction(slots, c), slots


@dataclasses.dataclass(frozen=True)
class ChannelNormBase(ChannelAdamBase):
    """StableAdam and AdamAWD: each channel's norm is compared with what it was when the tensor had its first step."""

    excluded_c_in: int | None = dataclasses.field(default=256, kw_only=True)

    def __post_init__(self) -> None:
        value = self.excluded_c_in
        require(value is None or (isinstance(value, int) and value > 0), "excluded_c_in value", value)
        super().__post_init__()

    @property
    def key_slots(self) -> tuple[KeySlot, ...]:
        """``initial_norm``: the Euclidean norm of each channel before the tensor's first step."""
        return (KeySlot("initial_norm", Scope.CHANNEL),)

    def num_channels(self, shape: tuple[int, ...]) -> int:
        """Weights with c_in = ``excluded_c_in`` and fewer output channels than that have none."""
        is_excluded = len(shape) >= 4 and shape[1] == self.excluded_c_in and shape[0] < shape[1]
        return 0 if is_excluded else super().num_channels(shape)

    def local_coefficients(self, step: StepInputs) -> dict[str, Tensor]:
        """Moment updates and what the direction needs."""
        return {**moment_coefficients(step), **self._direction_coefficients(step)}

    def combine(self, step: StepInputs, totals: Mapping[str, Tensor]) -> Combined:
        """The norm of a tensor that has its first step, from the sums of this step over the old p."""
        is_first = (step.present & (step.step_count == 1.0))[step.channels.tensor]
        norm = torch.where(is_first, totals["param_sq"].sqrt(), step.key_state["initial_norm"])
        return Combined(step.scalars, key_state={"initial_norm": norm})


@final
@dataclasses.dataclass(frozen=True)
class StableAdamRule(ChannelNormBase):
    r"""StableAdam: Adam's step, scaled in each output channel by how much the channel's magnitude has changed.

    With rms_t the root mean square of an output channel before step t of its tensor::

        r   = rms_t / rms_1            ratio="current/init"
        r   = rms_1 / rms_t            ratio="init/current"
        p   = p * (1 - lr * weight_decay)
        p   = p - lr * r * m_hat / (sqrt(v_hat) + eps)

    r is 1 where it would divide by 0 or rms_1 is 0, and outside weights of at least 4 dimensions. Weights whose c_in is
    ``excluded_c_in`` and whose c_out is less have no channels; None excludes none. ``weight_decay_by_lr=False`` makes
    the decay ``p * (1 - weight_decay)``. rms_1 is kept as the channel's norm, ``initial_norm``, taken in the tensor's
    first step; only its quotient matters.
    """

    name: ClassVar[str] = "StableAdam"
    structural: ClassVar[frozenset[str]] = frozenset({"ratio", "excluded_c_in"})
    sums: ClassVar[tuple[str, ...]] = ("param_sq",)

    weight_decay: float = 0.0
    weight_decay_by_lr: bool = True
    ratio: str = "current/init"

    def __post_init__(self) -> None:
        require(self.ratio in ("current/init", "init/current"), "ratio value", self.ratio)
        super().__post_init__()

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, eps, weight_decay, weight_decay_by_lr."""
        return read_adam_hyper(group, "weight_decay_by_lr")

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """m and v; sum of p^2."""
        return update_moments(tiles, tiles.grad, c), {"param_sq": tiles.param * tiles.param}

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adam's."""
        return {**self._direction_coefficients(step), "keep": decoupled_keep(step)}

    def channel_coefficients(
        self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """r."""
        initial, current = after.key_state["initial_norm"], totals["param_sq"].sqrt()
        if self.ratio == "current/init":
            return {"r": _or_outside(torch.where(initial > 0.0, current / initial, 1.0), 1.0)}
        return {"r": _or_outside(torch.where((initial > 0.0) & (current > 0.0), initial / current, 1.0), 1.0)}

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameters."""
        return tiles.param * c["keep"] - c["r"] * self._direction(tiles.slots, c), {}


@final
@dataclasses.dataclass(frozen=True)
class AdamAWDRule(ChannelNormBase):
    r"""AdamAWD: after Adam's step each output channel is scaled back to the norm that it began with.

    ::

        p   = p - lr * m_hat / (sqrt(v_hat) + eps)
        p   = p * (||p_0||_2 / ||p||_2)                 per output channel of a weight of at least 4 dimensions

    p_0 is the channel before its tensor's first step, its norm the key state ``initial_norm``. A channel that began at
    0, or whose norm is 0 now, is left alone. Weights whose c_in is ``excluded_c_in`` and whose c_out is less have no
    channels; None excludes none. There is no weight decay.
    """

    name: ClassVar[str] = "AdamAWD"
    structural: ClassVar[frozenset[str]] = frozenset({"excluded_c_in"})
    sums: ClassVar[tuple[str, ...]] = ("param_sq", "stepped_sq")

    def hyper(self, group: Mapping[str, object]) -> dict[str, float]:
        """lr, beta1, beta2, eps."""
        beta1, beta2 = read_betas(group)
        values = {key: read_float(group, key) for key in ("lr", "eps")}
        require(values["lr"] >= 0.0, "learning rate", values["lr"])
        require(values["eps"] >= 0.0, "epsilon value", values["eps"])
        return {**values, "beta1": beta1, "beta2": beta2}

    def local(self, tiles: Tiles, c: Coefficients) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """m and v; sums of p^2 before Adam's step and after it."""
        slots = update_moments(tiles, tiles.grad, c)
        stepped = tiles.param - self._direction(slots, c)
        return slots, {"param_sq": tiles.param * tiles.param, "stepped_sq": stepped * stepped}

    def apply_coefficients(self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adam's."""
        return self._direction_coefficients(step)

    def channel_coefficients(
        self, step: StepInputs, after: Combined, totals: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What brings a channel back to its first norm; absent ones stay as they are."""
        initial, stepped = after.key_state["initial_norm"], totals["stepped_sq"].sqrt()
        is_scaled = (initial > 0.0) & (stepped > 0.0) & step.present[step.channels.tensor]
        return {"scale": _or_outside(torch.where(is_scaled, initial / stepped, 1.0), 1.0)}

    def apply(self, tiles: Tiles, c: Coefficients) -> tuple[Tensor, dict[str, Tensor]]:
        """Adam's step again, and scaled."""
        return (tiles.param - self._direction(tiles.slots, c)) * c["scale"], {}


def _or_outside(per_channel: Tensor, outside: float) -> Tensor:
    """``(num_channels,)`` to ``(num_channels + 1,)``: what holds outside any channel comes last."""
    return torch.cat((per_channel, torch.tensor([outside], dtype=torch.float64, device="cpu")))
