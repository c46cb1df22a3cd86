"""One battery over all rules: against their references, and what holds for any rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor

from stepwell import optim
from stepwell.optim.rule import tile_sum
from stepwell.sharding.push import pack_present
from stepwell.sharding.vote import Decision
from tests.optim.battery import (
    ALL_CASES,
    BAD,
    CASES,
    FIRST_CASES,
    ONE_CASE_PER_RULE,
    Case,
    base_problem_for,
    fixed_problem_for,
    problem_for,
)
from tests.zoo import (
    NUM_STEPS,
    Problem,
    Run,
    ZooTensor,
    assert_same_state,
    assert_same_tensors,
    constant,
    run_reference,
    small,
)

SLACK = 1.1
"""How much farther from float64 than the reference's own float32 run a run may be: luck decides between the two."""


def error_of(problem: Problem, actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference of any tensor, in units of the largest value that it began or ended with."""
    errors = []
    for index, (left, right) in enumerate(zip(actual, exact, strict=True)):
        scale = torch.stack([right.double().abs().max(), problem.initial(index).double().abs().max()]).max()
        errors.append(float((left.double() - right.double()).abs().max() / scale))
    return max(errors)


def shown(reference: torch.optim.Optimizer, scalar: str) -> float:
    """What the reference's group shows of a scalar, which may be one group's own."""
    name, group = optim.split_scalar(scalar)
    return float(reference.param_groups[group or 0][name])


@ALL_CASES
def test_rule_follows_its_reference(case: Case) -> None:
    """With the same gradients for all, whatever their parameters: d within 1e-6 and parameters within 1e-5 (of their
    scale) of the reference's float64 run, or no farther from it than the reference's own float32 run is."""
    problem = fixed_problem_for(case)
    run = Run(problem, case.make_rule(), options=case.options).steps(NUM_STEPS)
    single = run_reference(problem, case.make_reference, NUM_STEPS, options=case.options)
    exact = run_reference(problem, case.make_reference, NUM_STEPS, options=case.options, dtype=torch.float64)

    start = [problem.initial(index) for index in range(len(problem.tensors))]
    assert error_of(problem, start, exact.params) > 0.01, "the parameters must have moved"
    assert error_of(problem, run.params(), exact.params) <= max(
        case.slack * 1e-5, SLACK * error_of(problem, single.params, exact.params)
    )
    for name, value in run.state().scalars.items():
        wanted, rounded = (shown(reference.optimizer, name) for reference in (exact, single))
        assert abs(value - wanted) <= max(case.slack * 1e-6 * abs(wanted), SLACK * abs(rounded - wanted)), name


@ONE_CASE_PER_RULE
def test_rule_agrees_with_its_reference_where_rounding_feeds_back(case: Case) -> None:
    """The gradients of a real training run, which depend on the parameters: close to the reference in float32."""
    problem = problem_for(case)
    run = Run(problem, case.make_rule(), options=case.options).steps(NUM_STEPS)
    single = run_reference(problem, case.make_reference, NUM_STEPS, options=case.options)
    assert error_of(problem, run.params(), single.params) < 1e-2
    assert problem.loss(run.params()) == pytest.approx(problem.loss(single.params), rel=1e-2)
    for name, value in run.state().scalars.items():
        assert value == pytest.approx(shown(single.optimizer, name), rel=1e-2), name


@ALL_CASES
def test_rule_keeps_float64_parameters_in_float64(case: Case) -> None:
    problem = fixed_problem_for(case).as_dtype("float64")
    run = Run(problem, case.make_rule(), options=case.options).steps(50)
    exact = run_reference(problem, case.make_reference, 50, options=case.options)
    assert error_of(problem, run.params(), exact.params) < 1e-11
    for name, value in run.state().scalars.items():
        assert value == pytest.approx(shown(exact.optimizer, name), rel=1e-11), name


@ONE_CASE_PER_RULE
def test_rule_follows_hyperparameters_that_change(case: Case) -> None:
    """A person or a scheduler writes into the groups in the middle of the run."""
    problem = fixed_problem_for(case)
    changes = {20: {"lr": 0.003}, 50: {"weight_decay": 0.05}, 80: {"lr": 0.01}}

    def schedule(groups: Sequence[dict[str, Any]], step: int) -> None:
        for group in groups:
            group.update(changes.get(step, {}))

    run = Run(problem, case.make_rule(), options=case.options).steps(100, schedule=schedule)
    single, exact = (
        run_reference(problem, case.make_reference, 100, options=case.options, dtype=dtype, schedule=schedule)
        for dtype in (torch.float32, torch.float64)
    )
    assert error_of(problem, run.params(), exact.params) <= max(
        1e-5, SLACK * error_of(problem, single.params, exact.params)
    )


@pytest.mark.parametrize(
    "case", [case for case in FIRST_CASES if case.rule not in (optim.ProdigyRule, optim.BAdamRule)], ids=str
)
def test_group_has_a_learning_rate_of_its_own(case: Case) -> None:
    """Without Prodigy (prodigyopt refuses unequal learning rates; it has tests of its own) and BAdam (chaotic)."""
    problem = base_problem_for(case).along(fixed_problem_for(case).path or [])

    def schedule(groups: Sequence[dict[str, Any]], step: int) -> None:
        groups[1]["lr"] = 0.02 if step < 60 else 0.0

    run = Run(problem, case.make_rule()).steps(100, schedule=schedule)
    exact = run_reference(problem, case.make_reference, 100, dtype=torch.float64, schedule=schedule)
    assert error_of(problem, run.params(), exact.params) < 1e-5


@ALL_CASES
def test_rule_maps_zero_gradients_to_zero(case: Case) -> None:
    """No NaN, no state, and no movement but weight decay's."""
    keywords = (
        {**case.keywords, "weight_decay": 0.0} if "weight_decay" in case.rule.__dataclass_fields__ else case.keywords
    )
    run = Run(problem_for(case), case.rule(**keywords))
    before = run.state()
    for _ in range(3):
        run.step(gradients={i: torch.zeros(t.shape) for i, t in enumerate(run.problem.tensors) if t.has_grad})
    after = run.state()
    assert_same_tensors(after.params, before.params)
    for slot in run.rule.slots:
        assert_same_tensors(after.slots[slot.name], before.slots[slot.name], slot.name)


@ALL_CASES
def test_rule_leaves_padding_zero(case: Case) -> None:
    run = Run(problem_for(case), case.make_rule(), options=case.options).steps(10)
    key_slots = {slot.name for slot in run.rule.key_slots}
    for name, tensors in run.state().slots.items():
        if name in key_slots:
            continue
        within = sum(int(tensor.count_nonzero()) for tensor in tensors)
        everywhere = sum(
            int(extent.slots[name].count_nonzero()) for shard in run.group.shards for extent in shard.buffers.extents
        )
        assert within > 0
        assert within == everywhere, f"{name}: {everywhere - within} elements between the tensors are not zero"


@ALL_CASES
def test_absent_tensor_stands_still(case: Case) -> None:
    """Parameter, slots and step count; Prodigy's s alone decays, as its docstring says."""
    run = Run(problem_for(case), case.make_rule(), options=case.options).steps(10)
    before = run.state()
    absent = (1, 5)
    for _ in range(3):
        run.step(gradients={i: grad for i, grad in run.gradients(run.next_sequence).items() if i not in absent})
    after = run.state()
    for name in before.slots:
        for index in absent:
            if (case.rule, name) != (optim.ProdigyRule, "s"):
                assert torch.equal(after.slots[name][index], before.slots[name][index]), name
        assert name in ("p0", "initial_norm") or not torch.equal(after.slots[name][0], before.slots[name][0]), (
            "the others have moved"
        )
    assert [after.step_counts[index] for index in absent] == [10, 10]
    assert after.step_counts[0] == 13


@pytest.mark.parametrize("case", [case for case in CASES if case.rule is not optim.ProdigyRule], ids=str)
def test_tensor_counts_its_own_steps(case: Case) -> None:
    """Tensors that come and go, in float64: each has its own bias correction, first step and averages.

    Without Prodigy, whose d depends on all tensors; tests/optim/test_prodigy.py has what becomes of it.
    """
    problem = fixed_problem_for(case).as_dtype("float64")

    def is_absent(index: int, step: int) -> bool:
        return (step + index) % (index % 3 + 2) == 0

    def leave_out(params: Sequence[torch.nn.Parameter], step: int) -> None:
        for index, param in enumerate(params):
            param.grad = None if is_absent(index, step) else param.grad

    run = Run(problem, case.make_rule(), options=case.options, num_shards=2)
    for step in range(30):
        run.step(gradients={i: grad for i, grad in run.gradients(step).items() if not is_absent(i, step)})
    exact = run_reference(
        problem, case.make_reference, 30, options=case.options, schedule=constant, adjust_gradients=leave_out
    )
    assert len(set(run.state().step_counts)) > 2
    assert error_of(problem, run.params(), exact.params) < 1e-11


@ALL_CASES
def test_learning_rate_zero_moves_no_parameter(case: Case) -> None:
    """Whether the run begins with it or comes to it; AdamAWD alone goes on to restore norms, to rounding."""
    keywords = {"weight_decay_by_lr": False, "weight_decay": 0.0} if "weight_decay_by_lr" in case.keywords else {}
    for at in (0, 5):
        run = Run(problem_for(case), case.rule(**{**case.keywords, **keywords}), options=case.options).steps(at)
        before = run.state()
        for group in run.groups:
            group["lr"] = 0.0
        run.step()
        after = run.state()
        assert after.counters == (at + 1, at + 1, 0)
        if case.rule is optim.AdamAWDRule and at:
            for actual, expected in zip(after.params, before.params, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)
        else:
            assert_same_tensors(after.params, before.params)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (3, 2, 2, 2)])
@ALL_CASES
def test_rule_follows_its_reference_from_zero_and_on_single_elements(
    case: Case, shape: tuple[int, ...], zeros: bool
) -> None:
    groups = range(max(1, len(case.options)))
    problem = Problem(tuple(ZooTensor(shape, group=group, dtype="float64", zeros=zeros) for group in groups))
    run = Run(problem, case.make_rule(), options=case.options, num_shards=2).steps(20, schedule=constant)
    exact = run_reference(problem, case.make_reference, 20, options=case.options, schedule=constant)
    for actual, expected, index in zip(run.params(), exact.params, groups, strict=True):
        # A channel of one element, centred or scaled back to its norm, need not move.
        assert shape == (1, 1, 1, 1) or not torch.equal(expected, problem.initial(index)), "it must have moved"
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


MOMENTUM_CASES = [
    (optim.SGDRule, torch.optim.SGD, {"dampening": 0.3}),
    (optim.SGDRule, torch.optim.SGD, {"nesterov": True}),
    (optim.RMSpropRule, torch.optim.RMSprop, {"centered": True, "eps": 1e-2}),
]


@pytest.mark.parametrize(("rule", "reference", "keywords"), MOMENTUM_CASES, ids=str)
def test_momentum_that_is_written_into_a_live_group_counts_as_in_torch(
    rule: Any, reference: Any, keywords: dict[str, Any]
) -> None:
    """0 for a while leaves the buffer as it was, and is no error with nesterov."""
    options = {"lr": 0.01, "momentum": 0.9, **keywords}
    changes = {5: 0.5, 8: 0.0, 12: 0.95}

    def schedule(groups: Sequence[dict[str, Any]], step: int) -> None:
        for group in groups:
            group["momentum"] = changes.get(step, group["momentum"])

    problem = small().as_dtype("float64")
    run = Run(problem, rule(**options)).steps(20, schedule=schedule)
    exact = run_reference(problem, lambda groups: reference(groups, **options), 20, schedule=schedule)
    assert error_of(problem, run.params(), exact.params) < 1e-11


@pytest.mark.parametrize("rule", [optim.SGDRule, optim.RMSpropRule])
def test_momentum_without_a_buffer_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid momentum value: 0\.5 .* give the optimizer a momentum above 0"):
        rule().hyper({**rule().defaults(), "momentum": 0.5})


@ALL_CASES
def test_absent_tensor_takes_no_part_in_what_the_others_do(case: Case) -> None:
    """Garbage in an absent tensor's place in the gradient is not read."""
    problem = problem_for(case)
    run, other = (Run(problem, case.make_rule(), options=case.options).steps(5) for _ in range(2))
    gradients = {i: grad for i, grad in run.gradients(5).items() if i != 5}
    run.step(gradients=gradients)
    garbage = {**gradients, 5: torch.full(problem.tensors[5].shape, torch.nan)}
    present = pack_present([i in gradients for i in range(len(problem.tensors))])
    assert other.step(gradients=garbage, present=present).decision is Decision.COMMIT
    assert_same_state(other.state(), run.state())


@pytest.mark.parametrize("case", [case for case in CASES if case.keywords.get("weight_decay")], ids=str)
def test_weight_decay_is_for_the_tensors_that_decay_alone(case: Case) -> None:
    """A tensor that is left out goes as one in a group without weight decay; the others go as before."""
    problem, left_out = problem_for(case), (0, 2, 5)
    tensors = list(enumerate(problem.tensors))
    masked, apart = (
        dataclasses.replace(problem, tensors=tuple(changed))
        for changed in (
            [dataclasses.replace(tensor, decays=index not in left_out) for index, tensor in tensors],
            [dataclasses.replace(tensor, group=int(index in left_out)) for index, tensor in tensors],
        )
    )
    run = Run(masked, case.make_rule()).steps(10)
    expected = Run(apart, case.make_rule(), options=[{}, {"weight_decay": 0.0}]).steps(10)
    plain = Run(problem, case.make_rule()).steps(10)
    assert not torch.equal(run.params()[0], plain.params()[0])
    for actual, wanted in zip(run.params(), expected.params(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@ONE_CASE_PER_RULE
def test_rule_lowers_the_loss(case: Case) -> None:
    """With the defaults of the class, but for a learning rate of a fit size."""
    lr = {"Prodigy": 1.0, "RAdam": 0.1, "SRAdam": 0.1}.get(case.rule.name, 0.05)
    problem = small()
    run = Run(problem, case.rule(lr=lr)).steps(NUM_STEPS)  # type: ignore[call-arg]
    assert problem.loss(run.params()) < 0.25 * problem.loss([problem.initial(i) for i in range(len(problem.tensors))])


@ONE_CASE_PER_RULE
def test_rule_has_the_keywords_and_defaults_of_its_reference(case: Case) -> None:
    """A parameter group shows what the reference's shows, so that state dicts and schedulers fit both."""
    reference = case.reference([torch.nn.Parameter(torch.zeros(1))])  # type: ignore[call-arg]
    group = {key: value for key, value in reference.param_groups[0].items() if key != "params"}
    ours = case.rule().defaults()
    assert {key: ours[key] for key in group} == group
    own = {"eps_d", "estimator", "d_scope", "freeze_d", "max_d", "stat_dtype", "rho_threshold"}
    assert set(ours) - set(group) <= own, "Prodigy's variants, and RAdam's threshold, which torch fixes at 5"


@pytest.mark.parametrize(("rule", "keywords"), BAD, ids=str)
def test_rule_refuses_bad_hyperparameters(rule: type[optim.Rule], keywords: dict[str, object]) -> None:
    (value,) = keywords.values()
    shown = value if not isinstance(value, tuple) else next((beta for beta in value if beta not in (0.9, 0.999)), value)
    with pytest.raises(ValueError, match="Invalid") as caught:
        rule(**keywords)
    assert str(shown) in str(caught.value)


@ONE_CASE_PER_RULE
def test_rule_refuses_bad_hyperparameters_written_into_a_live_group(case: Case) -> None:
    rule = case.make_rule()
    with pytest.raises(ValueError, match=r"Invalid learning rate: -3\.0"):
        rule.hyper({**rule.defaults(), "lr": -3.0})


@ONE_CASE_PER_RULE
def test_rule_reads_a_learning_rate_that_is_a_tensor(case: Case) -> None:
    rule = case.make_rule()
    hyper = rule.hyper({**rule.defaults(), "lr": torch.tensor(0.25)})
    assert hyper["lr"] == 0.25


@ALL_CASES
def test_registry_rebuilds_a_rule_from_plain_values(case: Case) -> None:
    rule = case.make_rule()
    fields = msgpack.unpackb(msgpack.packb(optim.RULES.to_fields(rule)))
    assert optim.RULES.build(rule.name, fields) == rule


def test_registry_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="unknown rule 'Sophia'"):
        optim.RULES.build("Sophia", {})
    with pytest.raises(ValueError, match="no field 'momentum'"):
        optim.RULES.build("LAMB", {"momentum": 0.9})


def test_battery_has_every_rule() -> None:
    assert {case.rule.name for case in CASES} == set(optim.RULES.names())
    assert {rule().name for rule, _ in BAD} == set(optim.RULES.names())


@pytest.mark.parametrize("width", [1, 3, 24, 256])
def test_tile_sum_of_a_row_depends_on_nothing_but_the_row(width: int) -> None:
    memory = torch.randn(1500 * width + 8, generator=torch.Generator().manual_seed(0))
    whole = tile_sum(memory[: 1500 * width].view(1500, width))
    for num_threads, first, num_rows in itertools.product((1, 2), (0, 1, 3), (1, 2, 3, 130, 1500)):
        torch.set_num_threads(num_threads)
        moved = torch.empty_like(memory)[first : first + 1500 * width].copy_(memory[: 1500 * width]).view(1500, width)
        parts = [tile_sum(moved[row : row + num_rows]) for row in range(0, 1500, num_rows)]
        assert torch.equal(torch.cat(parts), whole), (num_threads, first, num_rows)
