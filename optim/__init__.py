"""The update rules: pure arithmetic on tiles. Knows no sharding, no Ray, no I/O."""

from .adam import AdamRule, AdamWRule
from .lamb import LAMBRule
from .prodigy import ProdigyRule
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

RULES = RuleRegistry(AdamRule, AdamWRule, LAMBRule, ProdigyRule)
"""Every rule of this version."""

__all__ = [
    "RULES",
    "TILE_NUMEL",
    "AdamRule",
    "AdamWRule",
    "Coefficients",
    "Combined",
    "ElementwiseRule",
    "LAMBRule",
    "ProdigyRule",
    "ReducingRule",
    "Rule",
    "RuleRegistry",
    "Scope",
    "Slot",
    "StepInputs",
    "Tiles",
]
