"""Mixed precision's gradient scaler, for several ranks: their scales move alike."""

from __future__ import annotations

from typing import Any

import torch

from ..sharding.errors import NonFiniteGradientError
from .optimizer import ServiceOptimizer


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose ``update()`` goes by what the service decided, so that all ranks keep one scale.

    torch's own works too, and gives the same with one worker. With several each rank goes by its own gradients there:
    the scales part from each other, and a rank that saw nothing amiss keeps a scale with which another overflowed.

    Arguments and methods are torch's. Called on every rank, as ``optimizer.step()`` is; other optimizers than
    Stepwell's are treated as by torch.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Take the optimizer's step; the service undoes the scale, and skips the step for all if it overflowed for one.

        Returns:
            What ``optimizer.step()`` returns.
        """
        try:
            returned = super().step(optimizer, *args, **kwargs)
        except NonFiniteGradientError:
            self._adopt_decision(optimizer)
            raise
        self._adopt_decision(optimizer)
        return returned

    def _adopt_decision(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_enabled() and isinstance(optimizer, ServiceOptimizer):
            assert self._scale is not None, "super().step has seen to it"
            found_inf = torch.full_like(self._scale, float(optimizer.step_was_skipped))
            # What update() reads. A rank without any gradient has nothing there yet.
            self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found_inf.device: found_inf}
