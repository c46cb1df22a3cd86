"""Reading hyperparameters from parameter groups, with torch's checks and messages."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

from torch import Tensor


def read_float(group: Mapping[str, object], key: str) -> float:
    """Read a number from a parameter group: a float, an int, a bool or a 0-dim tensor."""
    return _to_float(group[key], f"{key} value")


def read_betas(group: Mapping[str, object]) -> tuple[float, float]:
    """Read ``betas``, a pair in [0, 1)."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas value: {betas!r} (expected a pair of numbers)")
    labels = [f"beta parameter at index {index}" for index in range(2)]
    beta1, beta2 = (_to_float(beta, label) for beta, label in zip(betas, labels, strict=True))
    for beta, label in zip((beta1, beta2), labels, strict=True):
        require(0.0 <= beta < 1.0, label, beta)
    return beta1, beta2


def require(condition: bool, what: str, value: object) -> None:
    """Raise torch's form of error, ``Invalid <what>: <value>``, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"Invalid {what}: {value}")


def _to_float(value: object, what: str) -> float:
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return float(value)
    raise ValueError(f"Invalid {what}: {value!r} (expected a number or a 0-dim tensor)")
