"""Clipping the averaged gradient: as torch does, equal to the bit for any number of shards, never what is not finite.

Most of it is seen through whole steps with SGD, whose parameters show what the gradient was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule, SGDRule
from stepwell.sharding import kernels
from stepwell.sharding.coverage import Gradients
from stepwell.sharding.errors import HyperparameterError, MessageError, StepAbortedError
from stepwell.sharding.reports import StepResult
from stepwell.sharding.vote import Decision
from tests.sharding.test_coverage import PartedRun, split_rows
from tests.zoo import (
    Problem,
    Run,
    ZooTensor,
    assert_same_state,
    assert_same_tensors,
    constant,
    run_reference,
    small,
    straddling,
)

LIMITS: list[dict[str, float]] = [
    {"max_grad_norm": 2.0},
    {"max_grad_norm": 1e6},
    {"max_grad_value": 0.05},
    {"max_grad_norm": 1.0, "max_grad_value": 0.3},
    {"max_grad_norm": math.inf},
    {"max_grad_norm": math.inf, "max_grad_value": math.inf},
]
NUM_STEPS = 20

MIXED = Problem(
    (
        ZooTensor((900,)),
        ZooTensor((30, 40), dtype="float64"),
        ZooTensor((7,), group=1),
        ZooTensor((2000,), dtype="float64", group=1),
        ZooTensor((50, 50), dtype="bfloat16"),
    )
)


def train(run: Run, num_steps: int = NUM_STEPS) -> list[StepResult]:
    return [run.step() for _ in range(num_steps)]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_clipping_is_that_of_torch(limits: dict[str, float]) -> None:
    norms: list[Tensor] = []

    def clip(params: Sequence[nn.Parameter], _: int) -> None:
        if "max_grad_value" in limits:
            nn.utils.clip_grad_value_(params, limits["max_grad_value"])
        norms.append(nn.utils.clip_grad_norm_(params, limits.get("max_grad_norm", math.inf)))

    reference = run_reference(
        small(),
        lambda groups: torch.optim.SGD(groups, lr=0.1),
        NUM_STEPS,
        dtype=torch.float64,
        schedule=constant,
        adjust_gradients=clip,
    )
    run = Run(small(), SGDRule(lr=0.1), num_shards=2, rank_0=limits)
    for result, norm in zip(train(run), norms, strict=True):
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for actual, expected in zip(run.params(), reference.params, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [ProdigyRule(d0=1e-3), AdamWRule(lr=0.01), LAMBRule(lr=0.01), SGDRule(lr=0.1, momentum=0.9)],
    ids=lambda rule: str(rule.name),
)
@pytest.mark.parametrize("problem", [straddling(), MIXED], ids=["straddling", "float64 too"])
def test_result_is_the_same_for_any_number_of_shards(problem: Problem, rule: Rule) -> None:
    limits = {"max_grad_norm": 5.0, "max_grad_value": 1.5}
    one = Run(problem, rule, world_size=2, rank_0=limits)
    expected = train(one)
    assert min(result.grad_norm or 0.0 for result in expected) > 5.0, "else nothing is clipped"
    for num_shards in (2, 3, 7):
        run = Run(problem, rule, world_size=2, num_shards=num_shards, rank_0=limits)
        assert train(run) == expected
        assert_same_state(run.state(), one.state())


@pytest.mark.parametrize("piece_tiles", [1, 7, 4096])
def test_norm_is_the_same_for_any_size_of_pieces(piece_tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"max_grad_norm": 5.0}
    expected = train(Run(straddling(), SGDRule(lr=0.1), rank_0=limits), 3)
    monkeypatch.setattr(kernels, "PIECE_TILES", piece_tiles)
    run = Run(straddling(), SGDRule(lr=0.1), num_shards=2, chunk_numel=2**14, rank_0=limits)
    assert train(run, 3) == expected


@pytest.mark.parametrize("limits", [{"max_grad_norm": math.inf}, {"max_grad_norm": 1e4}, {"max_grad_value": 1e4}])
def test_limit_that_is_not_reached_changes_no_bit(limits: dict[str, float]) -> None:
    measured = Run(small(), ProdigyRule(d0=1e-3), num_shards=2, rank_0=limits)
    plain = Run(small(), ProdigyRule(d0=1e-3))
    assert all(result.grad_norm for result in train(measured))
    assert all(result.grad_norm is None for result in train(plain))
    assert_same_state(measured.state(), plain.state())


def test_limits_may_change_with_each_step() -> None:
    run, oracle = (Run(small(), SGDRule(lr=0.1), num_shards=shards) for shards in (3, 1))
    for limit in (None, 0.5, None, math.inf, 0.25):
        gradients = oracle.gradients(oracle.next_sequence - 1)
        result = run.step(max_grad_norm=limit, gradients=gradients)
        if limit is None:
            assert result.grad_norm is None
        else:
            assert result.grad_norm == pytest.approx(
                math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
            )
            factor = min(1.0, limit / ((result.grad_norm or 0.0) + 1e-6))
            gradients = {index: grad * factor for index, grad in gradients.items()}
        oracle.step(gradients=gradients)
        assert_same_state(run.state(), oracle.state())


def test_gradient_without_elements_has_norm_0() -> None:
    run = Run(small(), SGDRule(lr=0.1), num_shards=2, rank_0={"max_grad_norm": 1.0})
    before = run.params()
    assert run.step(gradients={}).grad_norm == 0.0
    zeros = {index: torch.zeros_like(param) for index, param in enumerate(before)}
    result = run.step(gradients=zeros)
    assert (result.decision, result.grad_norm) == (Decision.COMMIT, 0.0)
    assert_same_tensors(run.params(), before)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_what_lies_in_an_absent_tensors_place_is_not_counted(garbage: float) -> None:
    run, plain = (Run(small(), SGDRule(lr=0.1), num_shards=2, rank_0={"max_grad_norm": 1.0}) for _ in range(2))
    gradients = plain.gradients(0)
    del gradients[2]
    push = plain.pushes(gradients=gradients)
    expected = plain.group.push(push)
    assert run.step(gradients={**gradients, 2: torch.full((257,), garbage)}, present=push[0].header.present) == expected
    assert_same_state(run.state(), plain.state())


def test_gradient_of_a_single_worker_is_not_written() -> None:
    run = Run(small(), SGDRule(lr=0.1), rank_0={"max_grad_norm": 0.1, "max_grad_value": 0.1})
    (push,) = run.pushes()
    before = [part.clone() for part in push.gradient]
    run.group.push([push])
    assert_same_tensors(push.gradient, before)


# What is not finite, and what only seems so


def require_skip(run: Run, results: StepResult | None) -> None:
    """The step was skipped and counted on every shard, and no buffer has moved."""
    assert results is not None
    assert results.decision is Decision.SKIP
    assert {(s.sequence, s.history.num_steps, s.history.num_skipped) for s in run.group.shards} == {(1, 1, 1)}
    fresh = Run(run.problem, run.rule, num_shards=len(run.group.shards), world_size=run.world_size)
    assert_same_tensors(run.buffers(), fresh.buffers())
    assert_same_state(run.state(), dataclasses.replace(fresh.state(), counters=(1, 1, 1)))


def filled(problem: Problem, value: float) -> dict[int, Tensor]:
    return {i: torch.full_like(problem.initial(i), value) for i in range(len(problem.tensors))}


def test_norm_of_large_gradients_does_not_overflow() -> None:
    """Their squares are infinite in float32."""
    run = Run(small(), SGDRule(lr=0.1), num_shards=3, rank_0={"max_grad_norm": 1.0})
    result = run.step(gradients=filled(small(), 3e38))
    assert result.decision is Decision.COMMIT
    numel = sum(param.numel() for param in run.params())
    assert result.grad_norm == pytest.approx(3e38 * math.sqrt(numel), rel=1e-6)
    for index, param in enumerate(run.params()):
        moved = (small().initial(index) - param).double() / 0.1
        torch.testing.assert_close(moved, torch.full_like(moved, 1.0 / math.sqrt(numel)), rtol=1e-4, atol=1e-5)


def test_norm_of_small_gradients_does_not_vanish() -> None:
    run = Run(small(), SGDRule(lr=0.1), num_shards=3, rank_0={"max_grad_norm": 1.0})
    result = run.step(gradients=filled(small(), 1e-30))
    assert result.grad_norm == pytest.approx(1e-30 * math.sqrt(sum(param.numel() for param in run.params())), rel=1e-6)


def test_norm_that_overflows_float64_skips_the_step() -> None:
    """Each gradient is finite; with a norm of infinity nothing would be left of any."""
    run = Run(MIXED, AdamWRule(), num_shards=3, rank_0={"max_grad_norm": 1.0})
    gradients = filled(MIXED, 1e-3) | {3: torch.full((2000,), 1e200, dtype=torch.float64)}
    result = run.step(gradients=gradients)
    require_skip(run, result)
    assert result.grad_norm == math.inf


@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 1.0}], ids=str)
def test_average_that_overflows_skips_the_step(limits: dict[str, float]) -> None:
    """Every rank's gradient is finite."""
    run = Run(small(), ProdigyRule(), num_shards=3, world_size=2, rank_0=limits)
    result = None
    for rank in range(2):
        gradients = {i: grad * 1e-3 for i, grad in filled(small(), 1.0).items()}
        gradients[7].view(-1)[-1] = 3e38
        result = run.group.push(run.pushes(rank, gradients=gradients))
    require_skip(run, result)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_infinity_is_found_before_it_is_clipped(bad: float) -> None:
    run = Run(small(), ProdigyRule(), num_shards=3, rank_0={"max_grad_norm": 1.0, "max_grad_value": 0.5})
    gradients = filled(small(), 1e-3)
    gradients[7].view(-1)[-1] = bad
    require_skip(run, run.step(gradients=gradients))
    assert run.step().decision is Decision.COMMIT


@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_found_infinity_itself_skips_the_step(rank: int, limits: dict[str, float]) -> None:
    run = Run(small(), ProdigyRule(), num_shards=3, world_size=2, rank_0=limits)
    results = [run.group.push(run.pushes(each, found_inf=each == rank)) for each in range(2)]
    require_skip(run, results[1])


# The loss scale


@pytest.mark.parametrize("num_shards", [1, 3])
def test_each_ranks_own_scale_is_undone(num_shards: int) -> None:
    scales = (8.0, 1.0, 2.0**20)
    plain = Run(small(), SGDRule(lr=0.1), world_size=3)
    scaled = Run(small(), SGDRule(lr=0.1), world_size=3, num_shards=num_shards)
    for rank, scale in enumerate(scales):
        gradients = plain.gradients(0, rank)
        larger = {index: grad * scale for index, grad in gradients.items()}
        scaled.group.push(scaled.pushes(rank, gradients=larger, grad_scale=scale))
        plain.group.push(plain.pushes(rank, gradients=gradients))
    assert_same_state(scaled.state(), plain.state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_is_undone_in_the_states_precision(dtype: torch.dtype) -> None:
    """Divided in float16 these gradients would be zero."""
    scale = 2.0**24
    run = Run(small(), SGDRule(lr=1.0), wire_dtype=dtype, rank_0={"max_grad_norm": math.inf})
    result = run.step(gradients=filled(small(), 0.0625), grad_scale=scale)
    numel = sum(param.numel() for param in run.params())
    assert result.grad_norm == pytest.approx(0.0625 / scale * math.sqrt(numel), rel=1e-12)


def test_scale_that_is_no_power_of_two_is_undone_but_for_rounding() -> None:
    problem = Problem(MIXED.tensors[:4])
    run, plain = Run(problem, SGDRule(lr=0.1), num_shards=2), Run(problem, SGDRule(lr=0.1))
    gradients = plain.gradients(0)
    run.step(gradients={index: grad * 1000.0 for index, grad in gradients.items()}, grad_scale=1000.0)
    plain.step(gradients=gradients)
    for actual, expected in zip(run.params(), plain.params(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", ["replicated", "sharded"])
def test_parts_of_one_gradient_are_unscaled_and_clipped_as_a_whole(gradients: Gradients) -> None:
    limits = {"max_grad_norm": 5.0, "max_grad_value": 1.5}
    whole = Run(straddling(), SGDRule(lr=0.1), rank_0=limits)
    holdings = split_rows(straddling(), 3) if gradients == "sharded" else None
    run = PartedRun(straddling(), SGDRule(lr=0.1), gradients, num_shards=2, world_size=3, holdings=holdings)
    for _ in range(3):
        grads = run.problem_gradients()
        expected = dataclasses.replace(whole.step(gradients=grads), ranks=(0, 1, 2))
        scaled = {index: grad * 1024.0 for index, grad in grads.items()}
        results = [
            run.group.push(run.pushes_of(rank, scaled, grad_scale=1024.0, **(limits if rank == 0 else {})))
            for rank in range(3)
        ]
        assert results[-1] == expected
    assert_same_state(run.state(), whole.state())


# What is refused


@pytest.mark.parametrize("name", ["max_grad_norm", "max_grad_value"])
def test_limits_of_another_rank_than_0_are_refused(name: str) -> None:
    run = Run(small(), ProdigyRule(), world_size=2)
    limits: dict[str, Any] = {name: 1.0}
    with pytest.raises(MessageError, match="max_grad_norm, max_grad_value: expected from rank 0 alone; rank 1 is off"):
        run.group.push(run.pushes(1, **limits))


WRONG: list[Any] = [0.0, -1.0, math.nan, -math.inf, "1", True]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["max_grad_norm", "max_grad_value", "grad_scale"])
def test_limit_or_scale_that_is_no_positive_number_is_refused(name: str, value: object) -> None:
    run = Run(small(), ProdigyRule(), rank_0={name: value})
    with pytest.raises(HyperparameterError, match=rf"{name}: expected a positive number, got {value!r}"):
        run.group.push(run.pushes())


def test_infinite_scale_is_refused() -> None:
    run = Run(small(), ProdigyRule())
    with pytest.raises(HyperparameterError, match="grad_scale: expected a positive number, got inf"):
        run.group.push(run.pushes(grad_scale=math.inf))


@pytest.mark.parametrize("limits", [(None, 1.0), (1.0, 2.0), (1.0, None)], ids=str)
def test_shards_with_different_limits_give_the_step_up(limits: tuple[float | None, float | None]) -> None:
    """Whoever measures no norm must still fit into the others' all-reduce."""
    run = Run(small(), ProdigyRule(), num_shards=2)
    before = run.buffers()
    pushes = [run.pushes(attempt=attempt, max_grad_norm=limit) for attempt, limit in enumerate(limits)]
    for index, shard in enumerate(run.group.shards):
        shard.receive(pushes[index][index])
    assert len({len(next(shard.step())) for shard in run.group.shards}) == 1
    for index, shard in enumerate(run.group.shards):
        shard.receive(pushes[index][index])
    with pytest.raises(StepAbortedError, match="different attempts"):
        run.group.run_step()
    assert_same_tensors(run.buffers(), before)


def test_step_that_lacks_rank_0_and_so_its_limits_is_given_up() -> None:
    run = Run(small(), ProdigyRule(), num_shards=2, world_size=2, rank_0={"max_grad_norm": 1.0})
    first, second = run.pushes(0), run.pushes(1)
    for shard, push in zip(run.group.shards, second, strict=True):
        shard.receive(push)
    run.group.shards[0].receive(first[0])
    with pytest.raises(StepAbortedError, match="rank 0 of 2 did not push to shard 1"):
        run.group.run_step()
