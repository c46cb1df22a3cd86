"""The mean over ranks, seen through a whole step: SGD-like movement shows what the gradient was."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepwell.optim import AdamWRule, ProdigyRule, Rule
from stepwell.sharding.coverage import Gradients
from stepwell.sharding.gradient import LARGEST, average, is_surely_finite
from stepwell.sharding.kernels import Kernels
from stepwell.sharding.push import Push, PushHeader, pack_present
from stepwell.sharding.vote import Decision
from tests.zoo import Problem, Run, ZooTensor, assert_same_state, assert_same_tensors, small, straddling, views

TENSORS = (ZooTensor((300,)), ZooTensor(()), ZooTensor((20, 30), group=1), ZooTensor((700,), dtype="float64"))
NUM_TENSORS = len(TENSORS)


def grads_of(rank: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    return {i: torch.randn(t.shape, generator=generator, dtype=dtypes[t.dtype]) for i, t in enumerate(TENSORS)}


def mean_of(run: Run, gradients: list[dict[int, Tensor]]) -> list[Tensor]:
    """What the shards make of each rank's gradients, by tensor."""
    pushes = [run.pushes(rank, gradients=part) for rank, part in enumerate(gradients)]
    present = torch.tensor([[i in part for i in range(NUM_TENSORS)] for part in gradients])
    flat: list[list[Tensor]] = []
    for index, shard in enumerate(run.group.shards):
        gradient = average([push[index] for push in pushes], present, shard.buffers)
        means = [
            stretch.mean(extent.tensor_of_tile, extent.extent.dtype)
            for (stretch,), extent in zip(gradient, shard.buffers.extents, strict=True)
        ]
        flat.append([mean.reshape(-1) for mean in means])
    return views(run.layout, [torch.cat(parts) for parts in zip(*flat, strict=True)])


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_mean_is_over_all_ranks(world_size: int, num_shards: int) -> None:
    run = Run(Problem(TENSORS), AdamWRule(), world_size=world_size, num_shards=num_shards)
    gradients = [grads_of(rank) for rank in range(world_size)]
    for index, mean in enumerate(mean_of(run, gradients)):
        expected = torch.stack([part[index].double() for part in gradients]).mean(dim=0)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
        assert mean.dtype == (torch.float64 if index == 3 else torch.float32)


def test_tensor_is_divided_by_the_ranks_that_have_it() -> None:
    run = Run(Problem(TENSORS), AdamWRule(), world_size=3, num_shards=2)
    gradients = [grads_of(rank) for rank in range(3)]
    for rank, index in ((0, 0), (1, 0), (2, 2), (0, 3), (1, 3), (2, 3)):
        del gradients[rank][index]
    for index, mean in enumerate(mean_of(run, gradients)):
        having = [part[index] for part in gradients if index in part]
        expected = torch.stack(having).mean(dim=0) if having else torch.zeros_like(mean)
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_lies_in_an_absent_tensors_place_is_not_read(world_size: int, garbage: float) -> None:
    """A worker reuses its buffer: there lies the gradient of some step before."""
    present = pack_present([index != 2 for index in range(NUM_TENSORS)])
    runs = []
    for filling in (0.0, garbage):
        run = Run(Problem(TENSORS), ProdigyRule(), world_size=world_size, num_shards=2)
        for rank in range(world_size):
            gradients = grads_of(rank) | {2: torch.full(TENSORS[2].shape, filling)}
            result = run.group.push(run.pushes(rank, gradients=gradients, present=present))
        assert result is not None
        assert result.decision is Decision.COMMIT
        runs.append(run.state())
    assert_same_state(runs[1], runs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_half_precision_gradients_are_averaged_in_the_states_precision(world_size: int, dtype: torch.dtype) -> None:
    run = Run(Problem(TENSORS[:3]), AdamWRule(), world_size=world_size, num_shards=2, wire_dtype=dtype)
    gradients = [{i: grad for i, grad in grads_of(rank).items() if i < 3} for rank in range(world_size)]
    for index, mean in enumerate(mean_of(run, gradients)):
        rounded = [part[index].to(dtype).float() for part in gradients]
        torch.testing.assert_close(mean, torch.stack(rounded).mean(dim=0), rtol=1e-6, atol=1e-6)
        assert mean.dtype == torch.float32


def test_half_precision_sum_that_overflows_half_precision_is_finite() -> None:
    run = Run(Problem(TENSORS[:1]), AdamWRule(), world_size=2, wire_dtype=torch.float16)
    large = {0: torch.full((300,), 60000.0)}
    run.group.push(run.pushes(0, gradients=large))
    result = run.group.push(run.pushes(1, gradients=large))
    assert result is not None
    assert result.decision is Decision.COMMIT


def test_ranks_are_added_in_rank_order_whatever_order_they_come_in() -> None:
    states = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        run = Run(small(), ProdigyRule(), world_size=4, num_shards=3)
        for _ in range(5):
            pushes = [run.pushes(rank) for rank in range(4)]
            results = [run.group.push(pushes[rank]) for rank in order]
            assert [result is not None for result in results] == [False, False, False, True]
        states.append(run.state())
    assert_same_state(states[1], states[0])
    assert_same_state(states[2], states[0])


@pytest.mark.parametrize("rule", [ProdigyRule(d0=1e-3), AdamWRule(lr=0.01)], ids=lambda rule: rule.name)
def test_any_number_of_workers_with_the_same_global_batch_agree(rule: Rule) -> None:
    """But for rounding, which comes back through the gradient: along the path of the run on one worker, closely."""
    guide = Run(small(), rule)
    path = []
    for step in range(100):
        path.append(guide.params())
        guide.steps(step + 1)
    problem = small().along(path)
    alone = Run(problem, rule).steps(100)
    for world_size in (2, 4):
        run = Run(problem, rule, world_size=world_size, num_shards=2).steps(100)
        for name, value in alone.state().scalars.items():
            assert run.state().scalars[name] == pytest.approx(value, rel=1e-5)
        for actual, expected in zip(run.params(), alone.params(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_single_worker_is_not_written() -> None:
    run = Run(small(), ProdigyRule(decouple=False, weight_decay=0.1))
    run.steps(3)
    (push,) = run.pushes()
    before = [part.clone() for part in push.gradient]
    run.group.push([push])
    assert_same_tensors(push.gradient, before)


# What the ranks say of their gradients


def said(max_abs: float | None, grad_scale: float = 1.0) -> PushHeader:
    return PushHeader(0, 1, 0, "", 0, b"", max_abs=max_abs, grad_scale=grad_scale)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([said(3.0)], True),
        ([said(None)], False),
        ([said(3.0), said(None)], False),
        ([said(LARGEST)], True),
        ([said(LARGEST * 1.001)], False),
        ([said(torch.finfo(torch.float64).max)], False),
        ([said(0.2 * LARGEST)] * 2, True),
        ([said(0.3 * LARGEST)] * 2, False),
        ([said(LARGEST, grad_scale=3.0)], True),
        ([said(LARGEST, grad_scale=1.5)], False),
        ([said(LARGEST, grad_scale=0.5)], False),
        ([said(1e20, grad_scale=1e-20)], False),
        ([said(0.0, grad_scale=1e-39)], False),  # 1/scale is inf in float32, and inf times 0 is NaN
        ([said(1e300, grad_scale=1e-300)], False),
    ],
)
def test_bound_on_the_average_is_below_half_of_the_largest_number(headers: list[PushHeader], expected: bool) -> None:
    assert is_surely_finite(headers, "local") is expected


@pytest.mark.parametrize("gradients", ["replicated", "sharded"])
def test_gradients_side_by_side_are_not_added_up(gradients: Gradients) -> None:
    assert is_surely_finite([said(LARGEST)] * 3, gradients)
    assert not is_surely_finite([said(LARGEST), said(None)], gradients)
    assert not is_surely_finite([said(LARGEST), said(LARGEST, grad_scale=0.5)], gradients)


MAGNITUDES = st.floats(0.0, LARGEST, width=32) | st.sampled_from([0.0, 1e-45, LARGEST, LARGEST / 2, 0.49 * LARGEST])
SCALES = st.sampled_from([1.0, 3.0, 1e-3, 1e-20, 1e-38, 1e-40, 1e20, 1e38, 1e300, 1e-300])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(MAGNITUDES, SCALES), min_size=1, max_size=4))
def test_average_is_finite_where_the_ranks_show_that_it_is(ranks: list[tuple[float, float]]) -> None:
    headers = [said(magnitude, scale) for magnitude, scale in ranks]
    if is_surely_finite(headers, "local"):
        run = Run(Problem((ZooTensor((3,)),)), AdamWRule(), world_size=len(ranks))
        values = [torch.tensor([magnitude, -magnitude, 0.0]) for magnitude, _ in ranks]
        pushes = [
            run.pushes(rank, gradients={0: value}, grad_scale=scale)[0]
            for rank, (value, (_, scale)) in enumerate(zip(values, ranks, strict=True))
        ]
        buffers, present = run.group.shards[0].buffers, torch.ones(len(ranks), 1, dtype=torch.bool)
        (((stretch,),), (extent,)) = average(pushes, present, buffers), buffers.extents
        assert bool(torch.isfinite(stretch.mean(extent.tensor_of_tile, torch.float32)).all())


@pytest.mark.parametrize("max_abs", [[100.0, 100.0], [100.0, None], [0.6 * LARGEST, 100.0]])
def test_shards_look_where_the_ranks_do_not_show_that_all_is_finite(
    max_abs: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    look = Kernels.look

    def note(self: Kernels, *args: Any, **options: Any) -> tuple[int, Tensor]:
        looked.append(1)
        return look(self, *args, **options)

    monkeypatch.setattr(Kernels, "look", note)
    run = Run(Problem(TENSORS), AdamWRule(), world_size=2, num_shards=2)
    for rank in range(2):
        result = run.group.push(run.pushes(rank, gradients=grads_of(rank), max_abs=max_abs[rank]))
    assert result is not None
    assert result.decision is Decision.COMMIT
    assert looked == ([] if max_abs == [100.0, 100.0] else [1, 1])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_average_that_overflows_though_each_part_is_finite_is_skipped(scale: float) -> None:
    run = Run(Problem(TENSORS), AdamWRule(), world_size=2)
    largest = LARGEST * 0.9 * scale
    for rank in range(2):
        grads = grads_of(rank) | {0: torch.full((300,), largest)}
        result = run.group.push(run.pushes(rank, gradients=grads, max_abs=largest, grad_scale=scale))
    assert result is not None
    assert result.decision is Decision.SKIP


@pytest.mark.parametrize("found_by", [0, 1])
def test_step_is_skipped_if_one_rank_found_that_its_gradient_is_not_finite(found_by: int) -> None:
    run = Run(Problem(TENSORS), AdamWRule(), world_size=2, num_shards=2)
    before = run.buffers()
    for rank in range(2):
        grads, finds = grads_of(rank), rank == found_by
        if finds:
            grads[2][3, 4] = math.nan
        result = run.group.push(run.pushes(rank, gradients=grads, max_abs=None if finds else 100.0, found_inf=finds))
    assert result is not None
    assert result.decision is Decision.SKIP
    assert_same_tensors(run.buffers(), before)


def in_pieces(push: Push, cuts: random.Random) -> Push:
    """The same push, each extent's gradient cut between tiles wherever ``cuts`` says."""
    pieces = []
    for part in push.gradient:
        num_tiles = len(part) // 256
        inner = cuts.sample(range(1, num_tiles), min(3, num_tiles - 1)) if num_tiles > 1 else []
        pieces += [part[start * 256 : stop * 256] for start, stop in itertools.pairwise([0, *sorted(inner), num_tiles])]
    return dataclasses.replace(push, gradient=tuple(pieces))


@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16])
def test_gradients_in_pieces_give_the_bits_of_whole_ones(wire_dtype: torch.dtype | None) -> None:
    """Each rank's pieces are its own; one rank's gradient is whole. With clipping, which folds sums over the pieces."""
    whole, cut = (
        Run(straddling(), ProdigyRule(), world_size=3, num_shards=2, rank_0={"max_grad_norm": 0.1}) for _ in range(2)
    )
    whole.wire_dtype = cut.wire_dtype = wire_dtype
    cuts = random.Random(1)
    for _ in range(3):
        whole.step()
        for rank in range(3):
            pushes = cut.pushes(rank)
            cut.group.push(pushes if rank == 1 else [in_pieces(push, cuts) for push in pushes])
    assert_same_state(cut.state(), whole.state())
