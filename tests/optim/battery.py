"""Every rule, in configurations that exercise each of its branches. A new rule adds a line here, and one to ``BAD``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import prodigyopt
import pytest
import torch

from stepwell import optim
from tests.optim.formula_prodigy import FormulaProdigy
from tests.optim.formulas import (
    FormulaAdamAWD,
    FormulaAdamGCC,
    FormulaBAdam,
    FormulaDuvAdam,
    FormulaLAMB,
    FormulaMomentum,
    FormulaPreLAMB,
    FormulaSAdam,
    FormulaSRAdam,
    FormulaStableAdam,
    FormulaSUAdam,
    FormulaUM,
)
from tests.zoo import NUM_STEPS, Problem, convolutions, run_reference, small


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One configuration of one rule, and what it must equal.

    Attributes:
        rule: The rule.
        reference: The optimizer that it is compared with.
        keywords: What both are made with.
        options: What differs by parameter group.
        slack: Factor on the float32 errors that are allowed: a d that is the quotient of small sums rounds worse.
    """

    rule: type[optim.Rule]
    reference: type[torch.optim.Optimizer]
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Sequence[Mapping[str, object]] = ()
    slack: float = 1.0

    def __str__(self) -> str:
        settings = [f"{key}={value}" for key, value in self.keywords.items()]
        return "-".join([self.rule.name, *settings, *(["groups"] if self.options else [])]).replace(" ", "")

    def make_rule(self) -> optim.Rule:
        return self.rule(**self.keywords)

    def make_reference(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return self.reference(groups, **self.keywords)


def prodigy(options: Sequence[Mapping[str, object]] = (), **keywords: Any) -> Case:
    """Begins at d0 = 1e-3: from 1e-6 the first steps vanish in the rounding of float32 parameters, in any code."""
    return Case(optim.ProdigyRule, prodigyopt.Prodigy, {"d0": 1e-3, **keywords}, options)


def adam(options: Sequence[Mapping[str, object]] = (), **keywords: Any) -> Case:
    return Case(optim.AdamRule, torch.optim.Adam, keywords, options)


def adamw(options: Sequence[Mapping[str, object]] = (), **keywords: Any) -> Case:
    return Case(optim.AdamWRule, torch.optim.AdamW, keywords, options)


def lamb(options: Sequence[Mapping[str, object]] = (), **keywords: Any) -> Case:
    return Case(optim.LAMBRule, FormulaLAMB, keywords, options)


def variant(options: Sequence[Mapping[str, object]] = (), **keywords: Any) -> Case:
    return Case(optim.ProdigyRule, FormulaProdigy, {"d0": 1e-3, **keywords}, options, slack=30.0)


GROUPS: list[Mapping[str, object]] = [{"lr": 0.5, "weight_decay": 0.1}, {"lr": 1.0, "betas": (0.8, 0.99)}]

WITH_DECAY_BY_LR: dict[type[optim.Rule], type[torch.optim.Optimizer]] = {
    optim.MomentumRule: FormulaMomentum,
    optim.SAdamRule: FormulaSAdam,
    optim.SRAdamRule: FormulaSRAdam,
    optim.UMRule: FormulaUM,
    optim.PreLAMBRule: FormulaPreLAMB,
    optim.DuvAdamRule: FormulaDuvAdam,
    optim.SUAdamRule: FormulaSUAdam,
    optim.BAdamRule: FormulaBAdam,
    optim.AdamGCCRule: FormulaAdamGCC,
    optim.StableAdamRule: FormulaStableAdam,
}

CASES = [
    prodigy(),
    prodigy(safeguard_warmup=True),
    prodigy(use_bias_correction=True, d_coef=4.0),
    prodigy(use_bias_correction=True, safeguard_warmup=True, weight_decay=0.01, d_coef=4.0),
    prodigy(growth_rate=1.05),
    prodigy(d_coef=0.5, beta3=0.9, eps=0.01),
    prodigy(weight_decay=0.1),
    prodigy(weight_decay=0.1, decouple=False),
    prodigy(betas=(0.0, 0.99), weight_decay=0.01),
    prodigy(betas=(0.0, 0.99), weight_decay=0.01, decouple=False),
    prodigy(slice_p=11),
    prodigy(slice_p=300, betas=(0.8, 0.9)),
    prodigy([{"weight_decay": 0.1, "eps": 1e-6}, {"weight_decay": 0.0}], lr=0.5),
    adam(weight_decay=0.1),
    adam(weight_decay=0.1, decoupled_weight_decay=True),
    adam(amsgrad=True, maximize=True, eps=1e-3, weight_decay=0.1),
    adamw(),
    adamw(amsgrad=True, betas=(0.8, 0.9), lr=0.01),
    adamw(maximize=True, weight_decay=0.1),
    adamw([{"lr": 0.01, "betas": (0.5, 0.9)}, {"weight_decay": 0.3, "eps": 1e-3}]),
    lamb(),
    lamb(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3),
    lamb([{"lr": 0.01, "weight_decay": 0.1}, {"betas": (0.5, 0.9)}]),
    Case(optim.SGDRule, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    Case(optim.SGDRule, torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case(optim.SGDRule, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    Case(optim.SGDRule, torch.optim.SGD, {"lr": 0.01, "momentum": 0.8, "nesterov": True}),
    Case(optim.RMSpropRule, torch.optim.RMSprop),
    Case(optim.RMSpropRule, torch.optim.RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-3}),
    Case(optim.RAdamRule, torch.optim.RAdam),
    Case(optim.RAdamRule, torch.optim.RAdam, {"weight_decay": 0.1, "betas": (0.8, 0.9), "maximize": True}),
    Case(optim.RAdamRule, torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case(optim.MomentumRule, FormulaMomentum, {"weight_decay": 0.1}),
    Case(optim.MomentumRule, FormulaMomentum, {"bias_correction": True}),
    Case(optim.SAdamRule, FormulaSAdam, {"weight_decay": 0.1}),
    Case(optim.SRAdamRule, FormulaSRAdam, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    Case(optim.UMRule, FormulaUM),
    Case(optim.UMRule, FormulaUM, {"norm": "l2", "weight_decay": 0.1}),
    Case(optim.PreLAMBRule, FormulaPreLAMB, {"weight_decay": 0.1}),
    Case(optim.DuvAdamRule, FormulaDuvAdam, {"weight_decay": 0.1}),
    Case(optim.SUAdamRule, FormulaSUAdam, {"weight_decay": 0.1}),
    Case(optim.BAdamRule, FormulaBAdam, {"lr": 1e-4, "weight_decay": 0.1}),
    Case(optim.NAdamRule, torch.optim.NAdam),
    Case(optim.NAdamRule, torch.optim.NAdam, {"weight_decay": 0.1, "momentum_decay": 0.1, "maximize": True}),
    Case(optim.NAdamRule, torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.01}),
    Case(optim.AdamGCCRule, FormulaAdamGCC, {"weight_decay": 0.1}),
    Case(optim.StableAdamRule, FormulaStableAdam, {"weight_decay": 0.1}),
    Case(optim.StableAdamRule, FormulaStableAdam, {"ratio": "init/current", "excluded_c_in": 4, "lr": 0.01}),
    Case(optim.StableAdamRule, FormulaStableAdam, {"excluded_c_in": None}),
    Case(optim.AdamAWDRule, FormulaAdamAWD),
    Case(optim.AdamAWDRule, FormulaAdamAWD, {"excluded_c_in": 4, "betas": (0.8, 0.9)}),
    *[
        Case(rule, formula, {"lr": 1e-4, "weight_decay": 1e-3, "weight_decay_by_lr": False})
        for rule, formula in WITH_DECAY_BY_LR.items()
    ],
    variant(eps_d="old"),
    variant(eps_d="old", betas=(0.0, 0.99), weight_decay=0.01),
    variant(eps_d="old", slice_p=11, use_bias_correction=True, weight_decay=0.01, eps=1e-3),
    variant(eps_d="old", weight_decay=0.1, decouple=False),
    variant(use_bias_correction=True, weight_decay=0.1),
    variant(max_d=0.05),
    variant(GROUPS, d_scope="group"),
    variant(GROUPS, d_scope="group", eps_d="old", growth_rate=1.02, slice_p=3),
    variant(GROUPS, d_scope="group", beta3=0.9, d_coef=2.0, safeguard_warmup=True, use_bias_correction=True),
    variant(eps_d="old", beta3=0.9, d_coef=2.0, safeguard_warmup=True, use_bias_correction=True),
    variant(GROUPS, eps_d="old", max_d=0.05, slice_p=2),
    variant(estimator="inner_product", d0=1e-3, lr=0.01, max_d=0.05),
    variant(estimator="inner_product", lr=0.01, max_d=0.05, slice_p=11, use_bias_correction=True),
    variant(GROUPS, estimator="inner_product", d0=1e-3, growth_rate=1.02, d_scope="group", max_d=0.05),
    variant(estimator="inner_product", d0=1e-3, betas=(0.0, 0.99), max_d=0.01, weight_decay=0.1, decouple=False),
]

ALL_CASES = pytest.mark.parametrize("case", CASES, ids=str)

FIRST_CASES = list({case.rule: case for case in reversed(CASES)}.values())[::-1]
"""One of each rule."""

ONE_CASE_PER_RULE = pytest.mark.parametrize("case", FIRST_CASES, ids=lambda case: case.rule.name)

BAD = [
    (optim.ProdigyRule, {"lr": -1.0}),
    (optim.ProdigyRule, {"lr": float("nan")}),
    (optim.ProdigyRule, {"eps": 0.0}),
    (optim.ProdigyRule, {"betas": (1.0, 0.999)}),
    (optim.ProdigyRule, {"betas": (0.9, -0.1)}),
    (optim.ProdigyRule, {"betas": 0.9}),
    (optim.ProdigyRule, {"betas": (0.9, None)}),
    (optim.ProdigyRule, {"beta3": 1.5}),
    (optim.ProdigyRule, {"weight_decay": -0.1}),
    (optim.ProdigyRule, {"d0": 0.0}),
    (optim.ProdigyRule, {"d_coef": 0.0}),
    (optim.ProdigyRule, {"growth_rate": 0.5}),
    (optim.ProdigyRule, {"slice_p": 0}),
    (optim.ProdigyRule, {"slice_p": 1.5}),
    (optim.AdamRule, {"lr": -1.0}),
    (optim.AdamRule, {"betas": (0.9, 1.0)}),
    (optim.AdamWRule, {"lr": -1.0}),
    (optim.AdamWRule, {"lr": "fast"}),
    (optim.AdamWRule, {"lr": None}),
    (optim.AdamWRule, {"eps": -1e-8}),
    (optim.AdamWRule, {"betas": (0.9, 1.0)}),
    (optim.AdamWRule, {"betas": (0.9, 0.99, 0.999)}),
    (optim.AdamWRule, {"weight_decay": -0.1}),
    (optim.LAMBRule, {"lr": -1.0}),
    (optim.LAMBRule, {"eps": -1e-8}),
    (optim.LAMBRule, {"betas": (-0.5, 0.9)}),
    (optim.LAMBRule, {"weight_decay": -0.1}),
    (optim.SGDRule, {"momentum": -0.5}),
    (optim.RMSpropRule, {"alpha": -0.1}),
    (optim.RAdamRule, {"rho_threshold": 3.0}),
    (optim.MomentumRule, {"beta": 1.0}),
    (optim.SAdamRule, {"betas": (0.9, 1.0)}),
    (optim.SRAdamRule, {"lr": -1.0}),
    (optim.UMRule, {"norm": "l1"}),
    (optim.PreLAMBRule, {"beta": -0.1}),
    (optim.DuvAdamRule, {"ratio_clip": 0.0}),
    (optim.SUAdamRule, {"min_scale": -1.0}),
    (optim.BAdamRule, {"curvature_clip": 0.0}),
    (optim.NAdamRule, {"momentum_decay": -0.004}),
    (optim.NAdamRule, {"eps": -1e-8}),
    (optim.AdamGCCRule, {"weight_decay": -0.1}),
    (optim.StableAdamRule, {"ratio": "first/last"}),
    (optim.StableAdamRule, {"excluded_c_in": 0}),
    (optim.AdamAWDRule, {"excluded_c_in": 1.5}),
    (optim.AdamAWDRule, {"lr": -1.0}),
    (optim.AdamAWDRule, {"eps": -1.0}),
    (optim.ProdigyRule, {"eps_d": "none"}),
    (optim.ProdigyRule, {"estimator": "exact"}),
    (optim.ProdigyRule, {"d_scope": "tensor"}),
    (optim.ProdigyRule, {"stat_dtype": "float16"}),
    (optim.ProdigyRule, {"max_d": 0.0}),
]
"""Hyperparameters that a rule must refuse, naming the value."""


def base_problem_for(case: Case) -> Problem:
    """The small problem, or the one of convolutions for rules that see channels."""
    has_channels = issubclass(case.rule, optim.ReducingRule) and case.rule.scope is optim.Scope.CHANNEL
    return convolutions() if has_channels else small()


def problem_for(case: Case) -> Problem:
    """The same, with as many groups as the case has options for."""
    problem = base_problem_for(case)
    if len(case.options) > 1:
        return problem
    return dataclasses.replace(problem, tensors=tuple(dataclasses.replace(t, group=0) for t in problem.tensors))


@functools.cache
def fixed_problem_for(case: Case) -> Problem:
    """The same, with gradients taken along the path of the reference's own run in float64."""
    problem = problem_for(case)
    exact = run_reference(problem, case.make_reference, NUM_STEPS, options=case.options, dtype=torch.float64)
    return problem.along(exact.path)
