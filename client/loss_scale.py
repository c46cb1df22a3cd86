"""The loss scale that ``torch.amp.GradScaler`` hands to an optimizer which undoes it itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from ..sharding.clipping import require_positive


@contextlib.contextmanager
def attached_scale(optimizer: torch.optim.Optimizer) -> Iterator[tuple[float, bool]]:
    """What a scaler has attached for this step: the scale, and whether it found inf or NaN; 1.0 and False without one.

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
        yield grad_scale, bool(found_inf)
    except BaseException:
        attached.pop("grad_scale", None)
        attached.pop("found_inf", None)
        raise
