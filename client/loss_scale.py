"""The loss scale that ``torch.amp.GradScaler`` hands to an optimizer which undoes it itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch

from ..sharding.clipping import require_positive


@dataclasses.dataclass(frozen=True, slots=True)
class LossScale:
    """What a scaler says of a step's gradients.

    Attributes:
        grad_scale: What they are multiplied by; 1.0 without a scaler.
        found_inf: Whether it found inf or NaN.
        is_undone: Whether ``unscale_`` has been at them. It leaves their version counters alone.
    """

    grad_scale: float
    found_inf: bool
    is_undone: bool


@contextlib.contextmanager
def attached_scale(optimizer: torch.optim.Optimizer) -> Iterator[LossScale]:
    """What a scaler has attached to the optimizer for this step.

    The scaler removes both attributes afterwards, but not if the step fails. They must go then too: it multiplies a
    scale that it finds with its own.

    Raises:
        HyperparameterError: If the scale is not a positive, finite number.
    """
    attached = vars(optimizer)
    scale, found_inf = attached.get("grad_scale"), attached.get("found_inf")
    try:
        grad_scale = 1.0 if scale is None else float(scale)
        require_positive("grad_scale", grad_scale, below=math.inf)
        yield LossScale(grad_scale, bool(found_inf), is_undone=scale is None and found_inf is not None)
    except BaseException:
        attached.pop("grad_scale", None)
        attached.pop("found_inf", None)
        raise
