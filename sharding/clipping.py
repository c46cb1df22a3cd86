"""Clipping the averaged gradient of the whole model, by value and by norm.

The norm is a sum over all shards. It is taken before the vote and travels with it: *Note: Clipping* in docs/design.md.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from .errors import HyperparameterError, MessageError
from .partials import SumTable
from .push import PushHeader

NORM_EPS = 1e-6
"""Added to the norm that the limit is divided by, as torch.nn.utils.clip_grad_norm_ does."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClipLimits:
    """How large a step's gradient may be; infinity measures the norm and clips nothing.

    Attributes:
        max_norm: Limit of the whole gradient's 2-norm, once its elements are clipped; None for none.
        max_value: Limit of each element's absolute value; None for none.

    Raises:
        HyperparameterError: If one is not a positive number; the message holds it.
    """

    max_norm: float | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("max_grad_norm", self.max_norm), ("max_grad_value", self.max_value)):
            if limit is not None:
                require_positive(name, limit)

    @property
    def is_set(self) -> bool:
        """Whether there is any."""
        return self.max_norm is not None or self.max_value is not None

    def coefficient(self, grad_norm: float | None) -> float:
        """What scales a gradient of this norm (after its elements were clipped) down; None stands for no limit."""
        if grad_norm is None or self.max_norm is None:
            return 1.0
        return min(1.0, self.max_norm / (grad_norm + NORM_EPS))


def limits_of(header: PushHeader) -> ClipLimits:
    """The limits that a rank sends.

    Raises:
        HyperparameterError: If one is not a positive number.
    """
    return ClipLimits(header.max_grad_norm, header.max_grad_value)


def check_clipping(header: PushHeader, *, is_heard: bool) -> None:
    """Refuse a header whose limits or scale cannot be.

    Args:
        header: The header.
        is_heard: Whether its rank may send limits.

    Raises:
        MessageError: If another rank does.
        HyperparameterError: If a limit or the scale is not a positive number, or the scale is infinite.
    """
    if limits_of(header).is_set and not is_heard:
        raise MessageError(f"max_grad_norm, max_grad_value: expected from rank 0 alone; rank {header.rank} is off")
    require_positive("grad_scale", header.grad_scale, below=math.inf)


def require_positive(name: str, value: float, *, below: float | None = None) -> None:
    """Refuse what is not a positive number.

    Args:
        name: What it is, for the message.
        value: The number.
        below: What it must be less than; None for nothing.

    Raises:
        HyperparameterError: With the value.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not value > 0.0 or (below is not None and not value < below):
        raise HyperparameterError(f"{name}: expected a positive number, got {value!r}")


def norm_of(sums: Tensor, table: SumTable) -> float:
    """The norm of the model's gradient; like the gradient it may be infinite or NaN.

    Args:
        sums: Sums of squares, ``(num_segments,)`` float64, summed over all shards.
        table: As there.
    """
    (total,) = table.totals(["square"], sums[None])["square"]
    return math.sqrt(total.item())
