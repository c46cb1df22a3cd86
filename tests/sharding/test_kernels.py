"""Running passes: how often a device that computes for itself is waited for."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule, StableAdamRule
from stepwell.sharding import kernels, partials
from tests.zoo import Run, assert_same_state, small, straddling

NUM_STEPS = 3


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts values of tensors that Python asks for: each would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def trained(rule: Rule) -> Run:
    return Run(straddling(), rule, num_shards=2, rank_0={"max_grad_norm": 0.1}, kernel="eager").steps(NUM_STEPS)


@pytest.mark.parametrize("rule", [ProdigyRule(), ProdigyRule(eps_d="old"), LAMBRule(), StableAdamRule()])
def test_sums_that_are_brought_over_at_once_have_the_same_bits(rule: Rule) -> None:
    expected = trained(rule)
    with mock.patch.object(partials, "_is_at_hand", return_value=False):
        assert_same_state(trained(rule).state(), expected.state())


@pytest.mark.parametrize("rule", [AdamWRule(), ProdigyRule(), StableAdamRule()])
def test_number_of_waits_does_not_grow_with_the_model(rule: Rule) -> None:
    """However many calls a pass takes; but for the table of channels, which lies on the CPU."""
    nums = []
    for piece_tiles in (256, 4):
        run = Run(small(), rule, rank_0={"max_grad_norm": 0.1}, kernel="eager")
        with mock.patch.object(kernels, "PIECE_TILES", piece_tiles), Waits() as waits:
            run.steps(NUM_STEPS)
        nums.append(waits.num)
    assert nums[0] == nums[1]
