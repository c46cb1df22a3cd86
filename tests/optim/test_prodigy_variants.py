"""Prodigy beyond prodigyopt: optax's form, the inner-product estimate, one pass, one d per group, and d by hand.

The battery compares the variants with a formula; here is what each of them promises beside its numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stepwell.optim import ProdigyRule, split_scalar
from stepwell.sharding.kernels import Kernels
from tests.optim.formula_prodigy import FormulaProdigy
from tests.zoo import (
    Problem,
    Run,
    ZooTensor,
    assert_same_state,
    assert_same_tensors,
    constant,
    run_reference,
    small,
)

D0 = 1e-3


def without_decay(problem: Problem, which: Sequence[int]) -> Problem:
    tensors = tuple(dataclasses.replace(t, decays=i not in which) for i, t in enumerate(problem.tensors))
    return dataclasses.replace(problem, tensors=tensors)


def optax_prodigy(problem: Problem, num_steps: int, *, weight_decay: float, decays: Sequence[bool]) -> dict[str, Any]:
    """``optax.contrib.prodigy``'s update in float64, with its names and ``weight_decay_mask``."""
    beta1, beta2, eps, estim_lr0 = 0.9, 0.999, 1e-8, D0
    beta3 = beta2**0.5
    params = [problem.initial(i) for i in range(len(problem.tensors))]
    indices = [i for i, tensor in enumerate(problem.tensors) if tensor.has_grad]
    params0 = [param.clone() for param in params]
    exp_avg, exp_avg_sq, grad_sum = ([torch.zeros_like(param) for param in params] for _ in range(3))
    estim_lr, numerator_weighted = estim_lr0, 0.0
    for count in range(num_steps):
        bc = math.sqrt(1 - beta2 ** (count + 1)) / (1 - beta1 ** (count + 1))
        dlr = estim_lr * bc
        grads = {i: problem.gradient(count, i, params[i]) for i in indices}
        numerator_acc = sum(float((grads[i] * (params0[i] - params[i])).sum()) for i in indices)
        for i, g in grads.items():
            exp_avg[i] = beta1 * exp_avg[i] + (1 - beta1) * estim_lr * g
            exp_avg_sq[i] = beta2 * exp_avg_sq[i] + (1 - beta2) * estim_lr**2 * g**2
            grad_sum[i] = beta3 * grad_sum[i] + estim_lr * dlr * g / estim_lr0
        numerator_weighted = beta3 * numerator_weighted + (estim_lr / estim_lr0) * dlr * numerator_acc
        denominator = sum(float(grad_sum[i].abs().sum()) for i in indices)
        estim_lr = max(estim_lr, numerator_weighted / denominator)
        for i in indices:
            decay = weight_decay * dlr * params[i] if decays[i] else 0.0
            params[i] = params[i] - decay - dlr * exp_avg[i] / (exp_avg_sq[i].sqrt() + estim_lr * eps)
    return {"params": params, "estim_lr": estim_lr}


def test_optaxs_form_is_bias_correction_and_a_mask_of_weight_decay() -> None:
    masked = (1, 2, 6)
    problem = without_decay(small().as_dtype("float64"), masked)
    rule = ProdigyRule(d0=D0, use_bias_correction=True, weight_decay=0.1)
    run = Run(problem, rule, num_shards=2).steps(60, schedule=constant)
    decays = [i not in masked for i in range(len(problem.tensors))]
    expected = optax_prodigy(problem, 60, weight_decay=0.1, decays=decays)
    assert expected["estim_lr"] > 10 * D0
    assert run.state().scalars["d"] == pytest.approx(expected["estim_lr"], rel=1e-11)
    for actual, wanted in zip(run.params(), expected["params"], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)


def test_inner_product_estimate_is_that_of_the_worked_example() -> None:
    run = Run(Problem((ZooTensor((2,)),)), ProdigyRule(estimator="inner_product", d0=1.0, lr=1.0))
    run.step(gradients={0: torch.tensor([2.0, -1.0])})
    assert run.state().scalars["d"] == 2.0
    before = run.params()[0]
    run.step(gradients={0: torch.tensor([1.0, 3.0])})
    assert run.state().scalars["d"] == pytest.approx(2.0 + 9.0 / 26.0, rel=1e-15)
    assert run.state().scalars == {"d": run.state().scalars["d"], "d_max": 2.0 + 9.0 / 26.0, "d_numerator": 0.0, "k": 2}
    m = 0.1 * (0.9 * torch.tensor([2.0, -1.0]) + torch.tensor([1.0, 3.0]))
    v = 0.001 * (0.999 * torch.tensor([4.0, 1.0]) + torch.tensor([1.0, 9.0]))
    moved = before - (2.0 + 9.0 / 26.0) * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(run.params()[0], moved, rtol=1e-5, atol=1e-6)
    assert set(run.state().slots) == {"master_param", "s", "exp_avg", "exp_avg_sq"}, "there is no p0"


def test_inner_product_estimate_stays_finite_when_the_gradients_cancel() -> None:
    run = Run(Problem((ZooTensor((2,)),)), ProdigyRule(estimator="inner_product", d0=1.0, growth_rate=1.5))
    for gradient in ([2.0, -1.0], [-2.0, 1.0], [0.0, 0.0], [1e-20, 0.0]):
        before = run.state().scalars["d"]
        run.step(gradients={0: torch.tensor(gradient)})
        assert before <= run.state().scalars["d"] <= 1.5 * before
    assert bool(torch.isfinite(run.params()[0]).all())


@pytest.mark.parametrize("eps_d", ["old", "new"])
def test_old_eps_needs_no_second_pass(eps_d: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a second pass")

    monkeypatch.setattr(Kernels, "apply", refuse)
    run = Run(small(), ProdigyRule(d0=D0, eps_d=eps_d), num_shards=2)
    if eps_d == "new":
        with pytest.raises(AssertionError, match="a second pass"):
            run.step()
        return
    before = run.params()
    run.steps(5)
    assert all(
        not torch.equal(new, old) or not tensor.has_grad
        for new, old, tensor in zip(run.params(), before, run.problem.tensors, strict=True)
    )
    assert run.state().step_counts[0] == 5


def test_old_eps_moves_on_when_d_cannot_be_estimated() -> None:
    """The sliced gradient is zero: known only when the parameters have moved already."""
    run = Run(Problem((ZooTensor((40,)),)), ProdigyRule(d0=D0, slice_p=11, eps_d="old"))
    gradient = torch.ones(40)
    gradient[::11] = 0.0
    before = run.state()
    run.step(gradients={0: gradient})
    after = run.state()
    assert after.scalars == {**before.scalars, "k": 1}
    assert after.step_counts == (1,)
    moved = after.params[0] != before.params[0]
    assert torch.equal(moved, gradient != 0)


def test_each_group_has_the_d_that_it_would_have_alone() -> None:
    problem = small()
    rule = ProdigyRule(d0=D0, d_scope="group", weight_decay=0.01)
    run = Run(problem, rule, num_shards=3).steps(40, schedule=constant)
    for group in (0, 1):
        alone = Problem(
            tuple(dataclasses.replace(t, has_grad=t.has_grad and t.group == group) for t in problem.tensors)
        )
        one = Run(alone, ProdigyRule(d0=D0, weight_decay=0.01)).steps(40, schedule=constant)
        for name, value in one.state().scalars.items():
            assert run.state().scalars[f"{name}[{group}]"] == pytest.approx(value, rel=1e-12)
        for index, tensor in enumerate(problem.tensors):
            if tensor.has_grad and tensor.group == group:
                torch.testing.assert_close(run.params()[index], one.params()[index], rtol=1e-6, atol=1e-7)
    assert run.state().scalars["d[0]"] != run.state().scalars["d[1]"]


def test_group_whose_s_is_zero_stands_still_beside_another() -> None:
    problem = Problem((ZooTensor((40,)), ZooTensor((40,), group=1)))
    run = Run(problem, ProdigyRule(d0=D0, slice_p=11, d_scope="group", weight_decay=0.1))
    unseen = torch.ones(40)
    unseen[::11] = 0.0
    before = run.state()
    run.step(gradients={0: torch.ones(40), 1: unseen})
    after = run.state()
    assert torch.equal(after.params[1], before.params[1])
    assert not torch.equal(after.params[0], before.params[0])
    assert (after.scalars["k[0]"], after.scalars["k[1]"]) == (1, 0)


@pytest.mark.parametrize("estimator", ["prodigy", "inner_product"])
def test_frozen_d_stays_while_the_statistics_go_on(estimator: Any) -> None:
    run = Run(small(), ProdigyRule(d0=D0, estimator=estimator, growth_rate=1.05)).steps(5, schedule=constant)
    before = run.state()
    for group in run.groups:
        group["freeze_d"] = True
    run.steps(8, schedule=constant)
    after = run.state()
    assert (after.scalars["d"], after.scalars["d_max"]) == (before.scalars["d"], before.scalars["d_max"])
    assert after.scalars["k"] == 8
    assert (after.scalars["d_numerator"] != before.scalars["d_numerator"]) == (estimator == "prodigy")
    for name in ("s", "exp_avg", "master_param"):
        assert not torch.equal(after.slots[name][0], before.slots[name][0])
    for group in run.groups:
        group["freeze_d"] = False
    assert run.steps(10, schedule=constant).state().scalars["d"] > after.scalars["d"]


def test_cap_of_d_is_live() -> None:
    run = Run(small(), ProdigyRule(d0=D0)).steps(30, schedule=constant)
    risen = run.state().scalars["d"]
    for cap, expected in ((risen / 4, risen / 4), (math.inf, None)):
        for group in run.groups:
            group["max_d"] = cap
        run.step()
        scalars = run.state().scalars
        assert scalars["d"] == (scalars["d_max"] if expected is None else expected)
        assert scalars["d_max"] >= risen


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_estimate_goes_on_from_a_d_that_a_person_wrote(factor: float) -> None:
    run = Run(small(), ProdigyRule(d0=D0)).steps(30, schedule=constant)
    before = run.state().scalars
    written = before["d"] * factor
    run.step(scalars={"d": written})
    after = run.state().scalars
    assert after["d_numerator"] == pytest.approx(before["d_numerator"] * factor, rel=0.2)
    assert after["d"] == pytest.approx(written, rel=0.2)
    assert after["d_max"] == after["d"]
    assert run.steps(60, schedule=constant).state().scalars["d"] >= written


def test_d_max_and_numerator_that_are_written_too_are_taken_as_they_are() -> None:
    rule = ProdigyRule(d_scope="group")
    scalars = {**rule.initial_scalars(2), "d[1]": 1e-3, "d_max[1]": 1e-3, "d_numerator[1]": 5.0}
    assert rule.write_scalars(scalars, {"d[1]": 2e-3}) == {
        **scalars,
        "d[1]": 2e-3,
        "d_max[1]": 2e-3,
        "d_numerator[1]": 10.0,
    }
    both = {"d[1]": 2e-3, "d_max[1]": 3e-3, "d_numerator[1]": 6.0}
    assert rule.write_scalars(scalars, both) == {**scalars, **both}
    assert rule.write_scalars(scalars, {"k[0]": 7}) == {**scalars, "k[0]": 7}
    tiny = {**scalars, "d[1]": 1e-300, "d_numerator[1]": 1e300}
    assert math.isfinite(rule.write_scalars(tiny, {"d[1]": 1e300})["d_numerator[1]"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slice_p": 11, "weight_decay": 0.1, "decouple": False},
        {"eps_d": "old", "d_scope": "group"},
        {"estimator": "inner_product", "d0": 1.0, "lr": 1e-3, "slice_p": 3},
    ],
    ids=str,
)
def test_half_size_statistics_are_those_of_the_formula(options: dict[str, Any]) -> None:
    """In float64, where the two round alike: s after its sum was taken, p0 before."""
    problem, keywords = small().as_dtype("float64"), {"d0": D0, "stat_dtype": "bfloat16", **options}
    run = Run(problem, ProdigyRule(**keywords), num_shards=2).steps(40, schedule=constant)
    exact = run_reference(problem, lambda groups: FormulaProdigy(groups, **keywords), 40, schedule=constant)
    full = Run(problem, ProdigyRule(**{**keywords, "stat_dtype": "state"})).steps(40, schedule=constant)
    for name, value in run.state().scalars.items():
        plain, group = split_scalar(name)
        assert value == pytest.approx(exact.optimizer.param_groups[group or 0][plain], rel=1e-10), name
    assert run.state().scalars != full.state().scalars
    for actual, expected in zip(run.params(), exact.params, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_half_size_statistics_are_rounded_and_d_is_close() -> None:
    problem = small()
    half = Run(problem, ProdigyRule(d0=D0, stat_dtype="bfloat16", slice_p=2), num_shards=3)
    full = Run(problem, ProdigyRule(d0=D0, slice_p=2))
    for index in range(len(problem.tensors)):
        rounded: Tensor = problem.initial(index).flatten()[::2].to(torch.bfloat16)
        assert torch.equal(half.group.read("p0", index), rounded)
    held, whole = (sum(shard.buffers.size_bytes for shard in run.group.shards) for run in (half, full))
    s_and_p0 = sum(extent.num_tiles * 128 * 4 * 2 for extent in full.layout.extents)
    assert whole - held == s_and_p0 / 2
    half.steps(60, schedule=constant)
    full.steps(60, schedule=constant)
    assert {tensor.dtype for tensor in half.state().slots["s"]} == {torch.bfloat16}
    assert half.state().scalars["d"] == pytest.approx(full.state().scalars["d"], rel=0.05)


def test_absent_tensors_change_nothing_of_a_group_of_their_own() -> None:
    run = Run(small(), ProdigyRule(d0=D0, d_scope="group", eps_d="old")).steps(5, schedule=constant)
    before = run.state()
    members = [i for i, tensor in enumerate(run.problem.tensors) if tensor.group == 1]
    run.groups[1]["lr"] = 0.0
    run.step()
    after = run.state()
    own = {name: value for name, value in before.scalars.items() if name.endswith("[1]")}
    assert {name: after.scalars[name] for name in own} == own
    for slot in after.slots:
        assert_same_tensors((after.slots[slot][i] for i in members), (before.slots[slot][i] for i in members), slot)


def test_lr_zero_changes_nothing_in_any_variant() -> None:
    for options in ({"eps_d": "old"}, {"d_scope": "group"}, {"estimator": "inner_product"}):
        run = Run(small(), ProdigyRule(d0=D0, weight_decay=0.1, **options)).steps(5, schedule=constant)  # type: ignore[arg-type]
        before = run.state()
        for group in run.groups:
            group["lr"] = 0.0
        run.step()
        after = run.state()
        assert_same_state(dataclasses.replace(after, counters=before.counters), before)


@pytest.mark.parametrize(
    "options", [{}, {"eps_d": "old"}, {"d_scope": "group"}, {"estimator": "inner_product"}], ids=str
)
def test_sums_that_overflow_leave_d_as_it_is(options: dict[str, Any]) -> None:
    """The gradient is finite, <g, p0 - p> or <g, s> is inf - inf: as a NaN it would stay in the scalars for good."""
    run = Run(small(), ProdigyRule(d0=1.0, **options)).steps(3, schedule=constant)
    before = run.state().scalars
    run.step(gradients={index: 3e38 * grad.sign() for index, grad in run.gradients(3).items()})
    scalars = run.state().scalars
    assert all(map(math.isfinite, scalars.values()))
    assert {name: scalars[name] for name in scalars if name.startswith("d[") or name == "d"} == {
        name: before[name] for name in before if name.startswith("d[") or name == "d"
    }


def test_inner_product_has_no_old_eps() -> None:
    with pytest.raises(ValueError, match="Invalid eps_d value: old"):
        ProdigyRule(estimator="inner_product", eps_d="old")
