"""Parameters that a person changed by hand, and states that are loaded."""

from __future__ import annotations

import pytest
import torch

from stepwell.optim import AdamWRule, ProdigyRule
from stepwell.sharding.buffers import MASTER
from tests.zoo import Run, assert_same_state, assert_same_tensors, constant, small, state_source

CHANGED = 5
"""A parameter of four tiles, on two of three shards."""


@pytest.mark.parametrize("num_shards", [1, 3])
def test_parameter_changed_by_hand_is_what_the_next_step_starts_from(num_shards: int) -> None:
    """AdamW with lr = 0 moves nothing, so the new value stands there after the step."""
    run = Run(small(), AdamWRule(), num_shards=num_shards).steps(3)
    before = run.state()
    value = torch.linspace(-1.0, 1.0, 990)
    for group in run.groups:
        group["lr"] = 0.0
    run.step(reloaded={CHANGED: value})
    after = run.state()
    assert torch.equal(after.params[CHANGED], value)
    for index in set(range(8)) - {CHANGED}:
        assert torch.equal(after.params[index], before.params[index])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masters_more_precise_value_stays_where_the_models_was_not_changed(dtype: str) -> None:
    """The worker sends its whole parameter though it changed a few elements: the others keep their precision."""
    problem = small().as_dtype(dtype)
    run = Run(problem, AdamWRule(lr=0.01), num_shards=3).steps(20, schedule=constant)
    master = run.state().params[CHANGED]
    value = run.params()[CHANGED].flatten()
    assert not torch.equal(master, value.float()), "the master is more precise"
    value[[0, 300, 989]] = 7.0
    for group in run.groups:
        group["lr"] = 0.0
    run.step(reloaded={CHANGED: value})
    master[[0, 300, 989]] = 7.0
    assert torch.equal(run.state().params[CHANGED], master)


def test_reload_of_equal_values_changes_nothing() -> None:
    run, untroubled = (Run(small(), ProdigyRule(d0=1e-3), num_shards=2).steps(5) for _ in range(2))
    everything = {index: param.flatten() for index, param in enumerate(run.params())}
    run.step(reloaded=everything)
    untroubled.step()
    assert_same_state(run.state(), untroubled.state())


@pytest.mark.parametrize("slice_p", [1, 11])
def test_p0_follows_a_parameter_that_was_changed_before_its_first_step(slice_p: int) -> None:
    """p0 is the parameter as training begins with it; later changes do not move it."""
    value = torch.linspace(-1.0, 1.0, 990)
    run = Run(small(), ProdigyRule(slice_p=slice_p), num_shards=3)
    run.step(reloaded={CHANGED: value})
    assert torch.equal(run.state().slots["p0"][CHANGED], value[::slice_p])
    run.step(reloaded={CHANGED: value + 1})
    assert torch.equal(run.state().slots["p0"][CHANGED], value[::slice_p])
    assert torch.equal(run.state().slots["p0"][0], small().initial(0).flatten()[::slice_p])


def test_reload_comes_with_a_commit_alone() -> None:
    run = Run(small(), ProdigyRule(), num_shards=2).steps(3)
    buffers = run.buffers()
    gradients = run.gradients(3)
    gradients[0][0, 0] = torch.nan
    run.step(gradients=gradients, reloaded={CHANGED: torch.zeros(990)})
    assert_same_tensors(run.buffers(), buffers)


def test_load_takes_slots_step_counts_and_scalars() -> None:
    """A state that is taken out and loaded into other shards is the state."""
    first = Run(small(), ProdigyRule(d0=1e-3), num_shards=3).steps(10, schedule=constant)
    state = first.state()
    values = {(i, name): tensor for name, tensors in state.slots.items() for i, tensor in enumerate(tensors)}
    source = state_source(
        values,
        step_counts=dict(enumerate(state.step_counts)),
        scalars=state.scalars,
        sequence=state.counters[0],
        step=state.counters[1],
        skipped_steps=state.counters[2],
    )
    second = Run(small(), ProdigyRule(d0=1e-3), num_shards=2, source=source)
    assert_same_state(second.state(), state)
    assert_same_state(second.steps(20, schedule=constant).state(), first.steps(20, schedule=constant).state())


def test_load_starts_what_it_is_not_given_afresh() -> None:
    """Parameters alone: slots, counts and scalars as at registration, p0 from the new parameters."""
    run = Run(small(), ProdigyRule(d0=1e-3, slice_p=2), num_shards=2).steps(10)
    params = [torch.full(tensor.shape, float(index)) for index, tensor in enumerate(run.problem.tensors)]
    run.group.load(state_source({(i, MASTER.name): param for i, param in enumerate(params)}), timeline=2)
    state = run.state()
    assert state.counters == (0, 0, 0)
    assert state.step_counts == (0,) * 8
    assert state.scalars == {"d": 1e-3, "d_max": 1e-3, "d_numerator": 0.0, "k": 0}
    assert_same_tensors(state.params, [param.flatten() for param in params])
    assert_same_tensors(state.slots["p0"], [param.flatten()[::2] for param in params])
    for name in ("s", "exp_avg", "exp_avg_sq"):
        assert all(not tensor.any() for tensor in state.slots[name])


def test_load_keeps_parameters_that_it_is_not_given() -> None:
    run = Run(small(), AdamWRule(), num_shards=2).steps(5)
    before = run.state()
    run.group.load(state_source({(0, "exp_avg"): torch.ones(520)}), timeline=2)
    after = run.state()
    assert_same_tensors(after.params, before.params)
    assert torch.equal(after.slots["exp_avg"][0], torch.ones(520))
    assert not after.slots["exp_avg_sq"][0].any()
