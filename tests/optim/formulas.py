"""Rules that no library has as we define them, written down as a person would: one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
from torch import Tensor


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


AVERAGE = {"lr": 1e-3, "beta": 0.9, "weight_decay": 0.0, "weight_decay_by_lr": True}
"""Defaults of a rule with one running average."""
MOMENTS = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "weight_decay_by_lr": True}
"""Defaults of a rule with two."""


class Formula(torch.optim.Optimizer):
    """One tensor at a time: subclasses give the change of p from p, g, the state, the group and the step t."""

    DEFAULTS: ClassVar[Mapping[str, Any]]

    def __init__(self, params: Any, **options: Any) -> None:
        assert options.keys() <= self.DEFAULTS.keys()
        super().__init__(params, {**self.DEFAULTS, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["t"] = state.get("t", 0) + 1
                    change = self.change(p.clone(), p.grad, state, group, state["t"])
                    decay = group.get("weight_decay", 0.0)
                    p *= 1 - (group["lr"] * decay if group.get("weight_decay_by_lr", True) else decay)
                    p += change

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        raise NotImplementedError


def ema(state: dict[str, Any], name: str, beta: float, value: Tensor) -> Tensor:
    state[name] = beta * state.get(name, torch.zeros_like(value)) + (1 - beta) * value
    average: Tensor = state[name]
    return average


def softplus_50(x: Tensor) -> Tensor:
    return torch.logaddexp(50 * x, torch.zeros_like(x)) / 50


def ratio_to(average: Tensor, value: Tensor, clip: float) -> Tensor:
    ratio = torch.ones_like(value)
    ratio[average != 0] = (value / average)[average != 0]
    return ratio.clamp(-clip, clip)


class FormulaMomentum(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**AVERAGE, "bias_correction": False}

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        average = ema(state, "V", group["beta"], g)
        return -group["lr"] * (average / (1 - group["beta"] ** t) if group["bias_correction"] else average)


class FormulaSAdam(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = MOMENTS

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        beta1, beta2 = group["betas"]
        m_hat = ema(state, "m", beta1, g) / (1 - beta1**t)
        v_hat = ema(state, "v", beta2, g * g) / (1 - beta2**t)
        return -group["lr"] * m_hat / softplus_50(v_hat.sqrt())


class FormulaSRAdam(FormulaSAdam):
    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        beta1, beta2 = group["betas"]
        m_hat = ema(state, "m", beta1, g) / (1 - beta1**t)
        v_hat = ema(state, "v", beta2, g * g) / (1 - beta2**t)
        limit = 2 / (1 - beta2) - 1
        rho = limit - 2 * t * beta2**t / (1 - beta2**t)
        if rho <= 4:
            return -group["lr"] * m_hat
        r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
        return -group["lr"] * m_hat / softplus_50(v_hat.sqrt() / r)


class FormulaUM(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**AVERAGE, "norm": "rms"}

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        m_hat = ema(state, "m", group["beta"], g) / (1 - group["beta"] ** t)
        square = m_hat.square().mean() if group["norm"] == "rms" else m_hat.square().sum()
        return -group["lr"] * m_hat / square.sqrt() if square > 0 else torch.zeros_like(p)


class FormulaPreLAMB(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = AVERAGE

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        p_norm, g_norm = p.square().sum().sqrt(), g.square().sum().sqrt()
        scaled = g * p_norm / g_norm if p_norm > 0 and g_norm > 0 else g
        return -group["lr"] * ema(state, "m", group["beta"], scaled) / (1 - group["beta"] ** t)


class FormulaDuvAdam(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**MOMENTS, "ratio_clip": 10.0}

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        beta1, beta2 = group["betas"]
        r = ratio_to(state.get("m", torch.zeros_like(g)), g, group["ratio_clip"])
        v_hat = ema(state, "v", beta2, (r - 1).square()) / (1 - beta2**t)
        return -group["lr"] * ema(state, "m", beta1, g) / (1 - beta1**t) / (1 + v_hat.sqrt())


class FormulaSUAdam(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**MOMENTS, "ratio_clip": 10.0, "min_scale": 1e-3}

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        beta1, beta2 = group["betas"]
        s = g.sign()
        r = ratio_to(state.get("m", torch.zeros_like(g)), s, group["ratio_clip"])
        v_hat = ema(state, "v", beta2, (r - 1).abs()) / (1 - beta2**t)
        m_hat = ema(state, "m", beta1, s) / (1 - beta1**t)
        return -group["lr"] * p.abs().mean().clamp_min(group["min_scale"]) * m_hat / (1 + v_hat)


class FormulaBAdam(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**MOMENTS, "curvature_clip": 1e4, "min_scale": 1e-3}

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        beta1, beta2 = group["betas"]
        scale = p.abs().mean().clamp_min(group["min_scale"])
        u = -group["lr"] * scale * ema(state, "m", beta1, g) / (1 - beta1**t)
        if t > 1:
            before = state["u"]
            sign = torch.where(before < 0, -1.0, 1.0)
            clamped = sign * before.abs().clamp_min(max(float(before.abs().mean()), 1e-12))
            phi = ((g - state["g"]) / clamped).clamp(-group["curvature_clip"], group["curvature_clip"])
            v_hat = ema(state, "v", beta2, phi) / (1 - beta2 ** (t - 1))
            u = u / softplus_50(v_hat.abs())
        state["u"], state["g"] = u, g.clone()
        return u


def adam_step(g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Tensor:
    beta1, beta2 = group["betas"]
    m_hat = ema(state, "m", beta1, g) / (1 - beta1**t)
    v_hat = ema(state, "v", beta2, g * g) / (1 - beta2**t)
    step: Tensor = -group["lr"] * m_hat / (v_hat.sqrt() + group["eps"])
    return step


def norms(p: Tensor, excluded_c_in: int | None) -> Tensor | None:
    """Each output channel's norm, broadcast to the weight; None for a weight without channels."""
    if p.dim() < 4 or (p.shape[1] == excluded_c_in and p.shape[0] < p.shape[1]):
        return None
    return p.square().sum(dim=tuple(range(1, p.dim())), keepdim=True).sqrt()


class FormulaAdamGCC(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**MOMENTS, "eps": 1e-8}

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        centred = g.clone()
        centralize_gradient(centred, gc_conv_only=True)
        return adam_step(centred, state, group, t)


class FormulaStableAdam(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {**MOMENTS, "eps": 1e-8, "ratio": "current/init", "excluded_c_in": 256}

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        step, current = adam_step(g, state, group, t), norms(p, group["excluded_c_in"])
        if current is None:
            return step
        initial = state.setdefault("initial", current)
        top, bottom = (current, initial) if group["ratio"] == "current/init" else (initial, current)
        return step * torch.where((initial == 0) | (bottom == 0), torch.ones_like(top), top / bottom)


class FormulaAdamAWD(Formula):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "excluded_c_in": 256,
    }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group.pop("weight_decay", None)
        super().step(closure)

    def change(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], t: int) -> Any:
        stepped, before = p + adam_step(g, state, group, t), norms(p, group["excluded_c_in"])
        if before is not None:
            initial, now = state.setdefault("initial", before), norms(stepped, None)
            stepped = torch.where((initial == 0) | (now == 0), stepped, stepped * initial / now)
        return stepped - p
