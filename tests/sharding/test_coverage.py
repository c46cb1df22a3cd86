"""Gradients that are reduced already: each rank pushes its part, and the result is that of one rank with all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.sharding.compiling import Kernel
from stepwell.sharding.coverage import (
    Coverage,
    Gradients,
    Holdings,
    Range,
    Runs,
    coverage_of,
    require_exact_cover,
)
from stepwell.sharding.errors import (
    CoverageError,
    IncarnationError,
    MessageError,
    ShapeMismatchError,
)
from stepwell.sharding.inprocess import ShardGroup
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import Layout, ParamSpec
from stepwell.sharding.push import Push, pack_present
from stepwell.sharding.reports import StepResult
from tests.zoo import (
    Problem,
    Run,
    ZooTensor,
    assert_same_state,
    assert_same_tensors,
    chosen_kernel,
    initial_state,
    small,
    straddling,
)

SIZES = st.lists(st.integers(0, 2000), min_size=1, max_size=6)


def layout_of(sizes: Sequence[int]) -> Layout:
    return Layout.build([ParamSpec(f"p{index}", (size,), "float32", 0) for index, size in enumerate(sizes)])


def split_rows(problem: Problem, world_size: int, *, num_replicas: int = 1) -> list[Holdings]:
    """What FSDP's ranks hold: rows of dimension 0 in runs of the same length, the last ones shorter or empty."""
    num_parts = world_size // num_replicas
    all_held = []
    for rank in range(world_size):
        held, pushed = [], []
        for tensor in problem.specs():
            rows, row = (tensor.shape[0], tensor.numel // max(tensor.shape[0], 1)) if tensor.shape else (1, 1)
            each = -(-rows // num_parts)
            first, last = (min(each * edge, rows) * row for edge in (rank % num_parts, rank % num_parts + 1))
            replica, numel = rank // num_parts, last - first
            start, stop = (first + numel * edge // num_replicas for edge in (replica, replica + 1))
            held.append(Range(first, numel))
            pushed.append(Range(start, stop - start))
        all_held.append(Holdings(tuple(pushed), tuple(held)))
    return all_held


class PartedRun(Run):
    """A run whose ranks push parts of one gradient."""

    def __init__(
        self,
        problem: Problem,
        rule: Rule,
        gradients: Gradients,
        *,
        num_shards: int,
        world_size: int,
        holdings: Sequence[Holdings] | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__(problem, rule)
        self.world_size = world_size
        kernel = kernel or chosen_kernel()
        spec = JobSpec(rule, problem.specs(), problem.num_groups, world_size, gradients=gradients, kernel=kernel)
        self.group = ShardGroup(spec, num_shards=num_shards)
        self.group.load(initial_state(problem), timeline=1)
        self.coverages = []
        for rank in range(world_size):
            held = None if holdings is None else holdings[rank]
            self.group.admit(rank, f"worker-{rank}", held)
            self.coverages.append(coverage_of(self.layout, gradients, rank, world_size, held))

    def params(self) -> list[Tensor]:
        return [
            self.group.read("master_param", index).view(tensor.shape)
            for index, tensor in enumerate(self.problem.tensors)
        ]

    def pushes_of(self, rank: int, gradients: dict[int, Tensor], **header: object) -> list[Push]:
        whole = Run.pushes(self, 0, gradients=gradients)
        parts = [torch.cat([push.gradient[index] for push in whole]) for index in range(len(self.layout.extents))]
        fields = {"rank": rank, "incarnation": f"worker-{rank}", **({} if rank == 0 else {"hyper": None}), **header}
        cut = []
        for shard, push in zip(self.group.shards, whole, strict=True):
            packed = []
            for index, (extent, flat) in enumerate(zip(shard.buffers.extents, parts, strict=True)):
                start, stop = extent.tiles.start * 256, extent.tiles.stop * 256
                runs, _ = self.coverages[rank][0].within(index, start, stop)
                packed.append(torch.cat([flat[:0], *(flat[start + a : start + b] for a, b in runs.tolist())]))
            cut.append(Push(dataclasses.replace(push.header, **fields), tuple(packed)))  # type: ignore[arg-type]
        return cut

    def step(self, **push: object) -> StepResult:
        gradients = self.problem_gradients()
        results = [self.group.push(self.pushes_of(rank, gradients)) for rank in range(self.world_size)]
        assert results[-1] is not None
        return results[-1]

    def problem_gradients(self) -> dict[int, Tensor]:
        return {
            index: self.problem.gradient(self.next_sequence - 1, index, param)
            for index, param in enumerate(self.params())
            if self.problem.tensors[index].has_grad
        }


RULES = pytest.mark.parametrize(
    "rule", [ProdigyRule(d0=1e-3), AdamWRule(lr=0.01), LAMBRule(lr=0.01)], ids=lambda rule: str(rule.name)
)


@pytest.mark.parametrize(("world_size", "num_replicas"), [(2, 1), (3, 1), (7, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("num_shards", [1, 3])
@RULES
def test_sharded_ranks_give_the_bits_of_one_rank(
    rule: Rule, num_shards: int, world_size: int, num_replicas: int
) -> None:
    holdings = split_rows(straddling(), world_size, num_replicas=num_replicas)
    run = PartedRun(
        straddling(), rule, "sharded", num_shards=num_shards, world_size=world_size, holdings=holdings
    ).steps(5)
    assert_same_state(run.state(), Run(straddling(), rule).steps(5).state())


@pytest.mark.parametrize("world_size", [2, 3, 64])
@pytest.mark.parametrize("num_shards", [1, 3])
@RULES
def test_replicated_ranks_give_the_bits_of_one_rank(rule: Rule, num_shards: int, world_size: int) -> None:
    run = PartedRun(small(), rule, "replicated", num_shards=num_shards, world_size=world_size).steps(10)
    assert_same_state(run.state(), Run(small(), rule).steps(10).state())


def test_each_ranks_scale_is_undone_and_the_whole_gradient_clipped() -> None:
    holdings = split_rows(small(), 2)
    run = PartedRun(small(), LAMBRule(), "sharded", num_shards=3, world_size=2, holdings=holdings)
    alone = Run(small(), LAMBRule())
    for _ in range(3):
        gradients = run.problem_gradients()
        for rank, (scale, limit) in enumerate(((1024.0, 0.5), (2.0, None))):
            scaled = {index: gradient * scale for index, gradient in gradients.items()}
            result = run.group.push(run.pushes_of(rank, scaled, grad_scale=scale, max_grad_norm=limit))
        assert result is not None
        assert result.grad_norm == alone.step(max_grad_norm=0.5).grad_norm
    assert_same_state(run.state(), alone.state())


@pytest.mark.parametrize("part", ["pushed", "held"])
def test_rank_gets_back_what_it_holds(part: str) -> None:
    problem = Problem((*straddling().tensors, ZooTensor((40, 13), dtype="float64")))
    holdings = split_rows(problem, 4, num_replicas=2)
    run = PartedRun(problem, AdamWRule(), "sharded", num_shards=3, world_size=4, holdings=holdings).steps(2)
    params = run.params()
    for rank, held in enumerate(holdings):
        ranges = held.pushed if part == "pushed" else held.held
        dtypes = [extent.dtype for extent in run.layout.extents]
        replies = [shard.parameters(dtypes, rank, part) for shard in run.group.shards]  # type: ignore[arg-type]
        for index, extent in enumerate(run.layout.extents):
            got = torch.cat([reply[index] for reply in replies])
            expected = [
                params[param].flatten()[ranges[param].offset :][: ranges[param].numel] for param in extent.params
            ]
            assert torch.equal(got, torch.cat(expected))


def test_tensor_that_no_rank_has_a_gradient_of_stands_still_and_its_place_is_not_read() -> None:
    """In a share that begins and ends within other tensors."""
    for gradients, holdings in (("replicated", None), ("sharded", split_rows(small(), 2))):
        states = []
        for filling in (0.0, torch.nan):
            run = PartedRun(
                small(),
                ProdigyRule(d0=1e-3),
                gradients,  # type: ignore[arg-type]
                num_shards=2,
                world_size=2,
                holdings=holdings,
            ).steps(2)
            mine = run.problem_gradients()
            present = pack_present([index in mine and index != 5 for index in range(8)])
            mine[5] = torch.full_like(run.params()[5], filling)
            for rank in range(2):
                run.group.push(run.pushes_of(rank, mine, present=present))
            states.append(run.state())
        assert states[0].step_counts == (3, 3, 3, 0, 3, 2, 3, 3)
        assert_same_state(states[1], states[0])


@given(sizes=SIZES, world_size=st.integers(1, 9), start=st.integers(0, 9000), length=st.integers(0, 9000))
def test_within_finds_every_element_of_a_window_once(
    sizes: list[int], world_size: int, start: int, length: int
) -> None:
    layout = layout_of(sizes)
    if not layout.extents:
        return
    padded = layout.extents[0].padded_numel
    seen = torch.zeros(padded, dtype=torch.int64)
    for rank in range(world_size):
        coverage = Coverage.share(layout, rank, world_size)
        runs, where = coverage.within(0, min(start, padded), min(start + length, padded))
        assert where.stop - where.start == int((runs[:, 1] - runs[:, 0]).sum())
        packed = torch.cat(
            [torch.zeros(0, dtype=torch.int64), *(torch.arange(a, b) for a, b in coverage.runs[0].tolist())]
        )
        positions = packed[where]
        assert positions.tolist() == [p + start for a, b in runs.tolist() for p in range(a, b)]
        seen[positions] += 1
    assert torch.equal(seen, ((torch.arange(padded) >= start) & (torch.arange(padded) < start + length)).long())


@given(sizes=SIZES, world_size=st.integers(1, 5))
def test_exact_cover_is_accepted(sizes: list[int], world_size: int) -> None:
    problem = Problem(tuple(ZooTensor((size,)) for size in sizes))
    require_exact_cover(problem.specs(), dict(enumerate(split_rows(problem, world_size))))


def _holdings(*ranges: tuple[int, int]) -> dict[int, Holdings]:
    each = (Range(*pair) for pair in ranges)
    return {rank: Holdings((part,), (part,)) for rank, part in enumerate(each)}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 4), (5, 5)], r"'w' \[10\]: there is a gap .* no rank holds elements 4 to 5"),
        ([(1, 9)], "gap .* no rank holds elements 0 to 1"),
        ([(0, 4), (4, 5)], "gap .* no rank holds elements 9 to 10"),
        ([(0, 5), (4, 6)], "overlap .* ranks 0 and 1 push elements 4 to 5"),
        ([(0, 10), (0, 10)], "overlap .* ranks 0 and 1 push elements 0 to 10"),
        ([(0, 0), (5, 0)], "gap .* no rank holds elements 0 to 10"),
    ],
)
def test_gap_and_overlap_are_refused_by_name(ranges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(CoverageError, match=message):
        require_exact_cover([ParamSpec("w", (10,), "float32", 0)], _holdings(*ranges))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pushed": [[0, 4]], "held": []},
        {"pushed": [[0, 4]], "held": [[0, 11]]},
        {"pushed": [[0, 5]], "held": [[0, 4]]},
        {"pushed": [[0, 1]], "held": [[1, 4]]},
        {"pushed": [[0, 1, 2]], "held": [[1, 4]]},
        {"pushed": 7, "held": [[1, 4]]},
    ],
)
def test_holdings_that_do_not_fit_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(MessageError, match="holdings"):
        Holdings.from_lists(fields, [ParamSpec("w", (10,), "float32", 0)])


def test_part_of_another_length_is_refused() -> None:
    run = PartedRun(small(), AdamWRule(), "sharded", num_shards=1, world_size=2, holdings=split_rows(small(), 2))
    (push,) = run.pushes_of(0, run.problem_gradients())
    with pytest.raises(ShapeMismatchError, match="gradient of rank 0: expected"):
        run.group.push([dataclasses.replace(push, gradient=(push.gradient[0][1:],))])


def test_rank_that_was_not_admitted_is_refused() -> None:
    run = PartedRun(small(), AdamWRule(), "replicated", num_shards=1, world_size=2)
    with pytest.raises(IncarnationError, match="rank 5"):
        run.group.shards[0].parameters([torch.float32], 5, "held")


def runs_of(coverage: Coverage) -> list[Runs]:
    return list(coverage.runs)


def test_share_of_few_tiles_leaves_ranks_with_nothing() -> None:
    layout = layout_of([300])
    assert [runs.tolist() for rank in range(4) for runs in runs_of(Coverage.share(layout, rank, 4))] == [
        [[0, 256]],
        [[256, 512]],
        [],
        [],
    ]


def test_step_is_laid_out_by_those_who_pushed_and_not_by_a_successor() -> None:
    """It is admitted after the step has begun and before the shard looks at what was pushed."""
    problem, rule = small(), AdamWRule(lr=0.1)
    parts = split_rows(problem, 2)
    run, oracle = (PartedRun(problem, rule, "sharded", num_shards=1, world_size=2, holdings=parts) for _ in range(2))
    oracle.step()
    gradients, shard = run.problem_gradients(), run.group.shards[0]
    for rank in range(2):
        for push in run.pushes_of(rank, gradients):
            shard.receive(push)
    shard.begin()
    for rank in range(2):
        shard.admit(rank, "successor", parts[1 - rank])
    run.group.run_step()
    assert_same_tensors(run.params(), oracle.params())
