"""The update rules: pure arithmetic on tiles. Knows no sharding, no Ray, no I/O."""

from .adam import AdamRule, AdamWRule
from .channels import AdamAWDRule, AdamGCCRule, StableAdamRule
from .curvature import BAdamRule, DuvAdamRule, SUAdamRule
from .lamb import LAMBRule
from .nadam import NAdamRule
from .normalized import PreLAMBRule, UMRule
from .prodigy import ProdigyRule
from .radam import RAdamRule
from .registry import RuleRegistry
from .rmsprop import RMSpropRule
from .rule import (
    MASTER_PARAM,
    TILE_NUMEL,
    Coefficients,
    Combined,
    ElementwiseRule,
    KeySlot,
    ReducingRule,
    Rule,
    Scope,
    Slice,
    Slot,
    Tiles,
    strided,
)
from .scalars import scalars_of_group, split_scalar
from .sgd import MomentumRule, SGDRule
from .softplus import SAdamRule, SRAdamRule
from .step_inputs import Channels, StepInputs

RULES = RuleRegistry(
    AdamAWDRule,
    AdamGCCRule,
    AdamRule,
    AdamWRule,
    BAdamRule,
    DuvAdamRule,
    LAMBRule,
    MomentumRule,
    NAdamRule,
    PreLAMBRule,
    ProdigyRule,
    RAdamRule,
    RMSpropRule,
    SAdamRule,
    SGDRule,
    SRAdamRule,
    SUAdamRule,
    StableAdamRule,
    UMRule,
)
"""Every rule of this version."""

__all__ = [
    "MASTER_PARAM",
    "RULES",
    "TILE_NUMEL",
    "AdamAWDRule",
    "AdamGCCRule",
    "AdamRule",
    "AdamWRule",
    "BAdamRule",
    "Channels",
    "Coefficients",
    "Combined",
    "DuvAdamRule",
    "ElementwiseRule",
    "KeySlot",
    "LAMBRule",
    "MomentumRule",
    "NAdamRule",
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
    "Slice",
    "Slot",
    "StableAdamRule",
    "StepInputs",
    "Tiles",
    "UMRule",
    "scalars_of_group",
    "split_scalar",
    "strided",
]
