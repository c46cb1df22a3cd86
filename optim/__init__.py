"""The update rules: pure arithmetic on tiles. Knows no sharding, no Ray, no I/O."""

from .adam import AdamRule, AdamWRule
from .curvature import BAdamRule, DuvAdamRule, SUAdamRule
from .lamb import LAMBRule
from .normalized import PreLAMBRule, UMRule
from .prodigy import ProdigyRule
from .radam import RAdamRule
from .rmsprop import RMSpropRule
from .rule import (
    TILE_NUMEL,
    Coefficients,
    Combined,
    ElementwiseRule,
    ReducingRule,
    Rule,
    RuleRegistry,
    Scope,
    Slot,
    StepInputs,
    Tiles,
)
from .sgd import MomentumRule, SGDRule
from .softplus import SAdamRule, SRAdamRule

RULES = RuleRegistry(
    AdamRule,
    AdamWRule,
    BAdamRule,
    DuvAdamRule,
    LAMBRule,
    MomentumRule,
    PreLAMBRule,
    ProdigyRule,
    RAdamRule,
    RMSpropRule,
    SAdamRule,
    SGDRule,
    SRAdamRule,
    SUAdamRule,
    UMRule,
)
"""Every rule of this version."""

__all__ = [
    "RULES",
    "TILE_NUMEL",
    "AdamRule",
    "AdamWRule",
    "BAdamRule",
    "Coefficients",
    "Combined",
    "DuvAdamRule",
    "ElementwiseRule",
    "LAMBRule",
    "MomentumRule",
    "PreLAMBRule",
    "ProdigyRule",
    "RAdamRule",
    "RMSpropRule",
    "ReducingRule",
    "Rule",
    "RuleRegistry",
    "SAdamRule",
    "SGDRule",
    "SRAdamRule",
    "SUAdamRule",
    "Scope",
    "Slot",
    "StepInputs",
    "Tiles",
    "UMRule",
]
