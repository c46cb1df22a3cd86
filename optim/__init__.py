"""The update rules: pure arithmetic on tiles. Knows no sharding, no Ray, no I/O."""

from .adamw import AdamWRule
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

RULES = RuleRegistry(AdamWRule, LAMBRule, ProdigyRule)
"""Every rule of this version."""

__all__ = [
    "RULES",
    "TILE_NUMEL",
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
