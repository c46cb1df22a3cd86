"""Prodigy where it differs from prodigyopt on purpose; see the rule's docstring.

Gradients are random and do not depend on the parameters, so that a run can be compared with an oracle whose parameters
go another way.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import prodigyopt
import pytest
import torch
from torch import Tensor, nn

from stepwell.optim import ProdigyRule
from tests.zoo import (
    Problem,
    ReferenceRun,
    Run,
    ZooTensor,
    assert_same_state,
    assert_same_tensors,
    constant,
    run_reference,
    small,
)

D0 = 1e-3
NUM_STEPS = 60
LEAVES_AT = 5
"""From this step on a parameter has no gradient, or a group lr = 0. d is still rising then."""
GONE = (0, 7)


def fixed_problem() -> Problem:
    """Two groups, gradients along the path of a run of the reference."""
    return small().along(reference(small(), dtype=torch.float64).path)


def reference(problem: Problem, **options: Any) -> ReferenceRun:
    return run_reference(
        problem, lambda groups: prodigyopt.Prodigy(groups, d0=D0), NUM_STEPS, schedule=constant, **options
    )


def zero_gradients(params: Sequence[nn.Parameter], step: int, which: Sequence[int]) -> None:
    """What stands still here is, for d, a parameter with a zero gradient there."""
    for index in which if step >= LEAVES_AT else ():
        params[index].grad = torch.zeros_like(params[index])


def test_absent_parameter_keeps_its_share_of_the_denominator() -> None:
    """prodigyopt drops it from the sum; given a zero gradient instead, it gives the d that we give without one."""
    problem = fixed_problem()
    run = Run(problem, ProdigyRule(d0=D0))
    for step in range(NUM_STEPS):
        gone = GONE if step >= LEAVES_AT else ()
        run.step(gradients={i: grad for i, grad in run.gradients(step).items() if i not in gone})
    kept = reference(problem, adjust_gradients=lambda params, step: zero_gradients(params, step, GONE))
    assert run.state().scalars["d"] == pytest.approx(kept.optimizer.param_groups[0]["d"], rel=1e-5)

    def drop(params: Sequence[nn.Parameter], step: int) -> None:
        for index in GONE if step >= LEAVES_AT else ():
            params[index].grad = None

    dropped = reference(problem, adjust_gradients=drop)
    assert dropped.optimizer.param_groups[0]["d"] > 1.05 * run.state().scalars["d"], "the hazard is there"


def test_absent_parameters_s_decays_as_the_numerator_does() -> None:
    run = Run(small(), ProdigyRule(d0=D0, betas=(0.9, 0.99))).steps(5, schedule=constant)
    before = run.state().slots["s"][0]
    for _ in range(4):
        run.step(gradients={i: grad for i, grad in run.gradients(run.next_sequence).items() if i != 0})
    expected = before.double() * math.sqrt(0.99) ** 4
    torch.testing.assert_close(run.state().slots["s"][0].double(), expected, rtol=1e-6, atol=0.0)


def test_group_whose_lr_becomes_zero_stands_still() -> None:
    problem = fixed_problem()

    def schedule(groups: Sequence[dict[str, Any]], step: int) -> None:
        groups[1]["lr"] = 1.0 if step < LEAVES_AT else 0.0

    run = Run(problem, ProdigyRule(d0=D0, weight_decay=0.01))
    run.steps(LEAVES_AT, schedule=schedule)
    before = run.state()
    run.steps(NUM_STEPS, schedule=schedule)
    after = run.state()
    members = [index for index, tensor in enumerate(problem.tensors) if tensor.group == 1]
    for name in set(after.slots) - {"s"}:
        assert_same_tensors((after.slots[name][i] for i in members), (before.slots[name][i] for i in members), name)
    assert not torch.equal(after.params[0], before.params[0])

    run = Run(problem, ProdigyRule(d0=D0)).steps(NUM_STEPS, schedule=schedule)
    oracle = reference(problem, adjust_gradients=lambda params, step: zero_gradients(params, step, members))
    assert run.state().scalars["d"] == pytest.approx(oracle.optimizer.param_groups[0]["d"], rel=1e-5)


@pytest.mark.parametrize("at", [0, 10])
def test_lr_zero_for_all_changes_nothing_but_the_step_number(at: int) -> None:
    run = Run(small(), ProdigyRule(d0=D0, weight_decay=0.1, decouple=False)).steps(at, schedule=constant)
    before = run.state()
    for group in run.groups:
        group["lr"] = 0.0
    run.step()
    after = run.state()
    assert after.counters == (at + 1, at + 1, 0)
    assert_same_state(dataclasses.replace(after, counters=before.counters), before)


def test_groups_may_have_different_learning_rates_under_one_d() -> None:
    """A group's step is its own lr's share of d; prodigyopt raises. Formula in float64, one tensor at a time."""
    problem = fixed_problem()
    lrs = (1.0, 0.25)
    run = Run(problem, ProdigyRule(d0=D0), options=[{"lr": lr} for lr in lrs]).steps(NUM_STEPS, schedule=constant)

    beta1, beta2, beta3 = 0.9, 0.999, math.sqrt(0.999)
    d, d_max, numerator = D0, D0, 0.0
    params = [problem.initial(i).double() for i in range(len(problem.tensors))]
    first = [param.clone() for param in params]
    m, v, s = ([torch.zeros_like(param) for param in params] for _ in range(3))
    for step in range(NUM_STEPS):
        numerator *= beta3
        denominator = 0.0
        for i, tensor in enumerate(problem.tensors):
            if not tensor.has_grad:
                continue
            g = problem.gradient(step, i, params[i])
            dlr = d * lrs[tensor.group]
            numerator += d / D0 * dlr * float((g * (first[i] - params[i])).sum())
            m[i] = beta1 * m[i] + d * (1 - beta1) * g
            v[i] = beta2 * v[i] + d * d * (1 - beta2) * g * g
            s[i] = beta3 * s[i] + d / D0 * dlr * g
            denominator += float(s[i].abs().sum())
        d_hat = numerator / denominator
        new_d = max(d, d_hat) if d == D0 else d
        d_max = max(d_max, d_hat)
        new_d = min(d_max, math.inf)
        for i, tensor in enumerate(problem.tensors):
            if tensor.has_grad:
                params[i] -= d * lrs[tensor.group] * m[i] / (v[i].sqrt() + new_d * 1e-8)
        d = new_d

    assert run.state().scalars["d"] == pytest.approx(d, rel=1e-5)
    for actual, expected in zip(run.params(), params, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_numerator_is_carried_once_whatever_the_number_of_shards(num_shards: int) -> None:
    """Summing the carried part over shards multiplies it by their number at every step."""
    problem = fixed_problem()
    run = Run(problem, ProdigyRule(d0=D0), num_shards=num_shards).steps(NUM_STEPS, schedule=constant)
    expected = reference(problem).optimizer.param_groups[0]["d_numerator"]
    assert run.state().scalars["d_numerator"] == pytest.approx(expected, rel=1e-5)


def test_first_rise_is_not_capped_by_growth_rate_the_later_ones_are() -> None:
    run = Run(small(), ProdigyRule(d0=1e-6, growth_rate=1.1))
    history = [run.state().scalars["d"]]
    for _ in range(30):
        run.step()
        history.append(run.state().scalars["d"])
    rises = [after / before for before, after in itertools.pairwise(history) if after > before]
    assert rises[0] > 1.2
    assert max(rises[1:]) <= 1.1 * (1 + 1e-12)


def test_p0_of_a_parameter_that_begins_at_zero_is_stored_in_full() -> None:
    """prodigyopt keeps a 0-dim zero, so that the state's shape depends on the values. The numbers are the same."""
    problem = fixed_problem()
    assert problem.tensors[6].zeros
    run = Run(problem, ProdigyRule(d0=D0)).steps(NUM_STEPS, schedule=constant)
    assert torch.equal(run.state().slots["p0"][6], torch.zeros(13))
    assert run.state().slots["s"][6].count_nonzero() == 13
    assert run.state().scalars["d"] == pytest.approx(reference(problem).optimizer.param_groups[0]["d"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_state_is_float32_whatever_the_models_dtype(dtype: str) -> None:
    """In half precision the state of prodigyopt gives NaN, or d stalls."""
    problem = small().as_dtype(dtype)
    run = Run(problem, ProdigyRule()).steps(200)
    state = run.state()
    assert {tensor.dtype for tensors in state.slots.values() for tensor in tensors} == {torch.float32}
    full = Run(small(), ProdigyRule()).steps(200).state()
    assert state.scalars["d"] == pytest.approx(full.scalars["d"], rel=0.1)


@pytest.mark.parametrize("slice_p", [2, 11, 256, 1000])
def test_slice_p_strides_the_tensor_not_the_tile_or_the_shard(slice_p: int) -> None:
    problem = small()
    run = Run(problem, ProdigyRule(slice_p=slice_p), num_shards=3)
    for index in range(len(problem.tensors)):
        assert torch.equal(run.group.read("p0", index), problem.initial(index).flatten()[::slice_p])
    gradients = run.gradients(0)
    run.step(gradients=gradients)
    for index, gradient in gradients.items():
        s: Tensor = run.group.read("s", index)
        torch.testing.assert_close(s, 1e-6 * gradient.flatten()[::slice_p], rtol=1e-6, atol=0.0)


def test_zero_sum_of_s_ends_the_step_before_anything_moves() -> None:
    """As in prodigyopt: the sliced gradient is zero, so d cannot be estimated, though others have a gradient."""
    problem = Problem((ZooTensor((40,)),))
    run = Run(problem, ProdigyRule(slice_p=11, weight_decay=0.1))
    gradient = torch.ones(40)
    gradient[::11] = 0.0
    before = run.state()
    run.step(gradients={0: gradient})
    after = run.state()
    assert after.scalars == before.scalars
    assert after.step_counts == before.step_counts
    assert torch.equal(after.params[0], before.params[0])
    assert after.counters == (1, 1, 0)


def test_d_is_what_a_person_wrote_from_the_next_step_on() -> None:
    problem = small()
    run = Run(problem, ProdigyRule(d0=D0)).steps(5, schedule=constant)
    before = run.params()
    gradients = run.gradients(5)
    run.step(gradients=gradients, scalars={"d": 0.5, "d_max": 0.5})
    assert run.state().scalars["d"] >= 0.5
    assert run.state().scalars["k"] == 6
    moved = (run.params()[0] - before[0]).abs().max()
    assert moved > 0.01, "with d below 0.01 it could not have moved so far"
