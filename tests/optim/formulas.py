"""Rules that no library has as we define them, written down as a person would: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FormulaLAMB(torch.optim.Optimizer):
    """LAMB with bias correction and no clamp; arXiv:1904.00962, Algorithm 2."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                t = state["t"] = state.get("t", 0) + 1
                m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * p.grad
                v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * p.grad**2
                update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + group["eps"])
                update = update + group["weight_decay"] * p
                p_norm, update_norm = float((p**2).sum()) ** 0.5, float((update**2).sum()) ** 0.5
                ratio = p_norm / update_norm if p_norm > 0 and update_norm > 0 else 1.0
                p -= group["lr"] * ratio * update
