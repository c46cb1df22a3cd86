"""Parameters written straight to the ranks' memory, by the pass that computes them or after it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from stepwell.optim import AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.sharding.compiling import KERNELS, Kernel
from stepwell.sharding.coverage import Gradients, Part
from stepwell.sharding.delivery import Delivery, Sink
from stepwell.sharding.push import Push
from tests.sharding.test_coverage import PartedRun, split_rows
from tests.zoo import Problem, Run, ZooTensor, assert_same_state, cosine, straddling

WIRES = (torch.float32, torch.bfloat16)


def sinks_of(run: Run, rank: int, part: Part, dtype: torch.dtype) -> list[Sink]:
    """Memory for what each shard hands to a rank, filled with rubbish."""
    sinks = []
    for shard in run.group.shards:
        sizes = [int((runs[:, 1] - runs[:, 0]).sum()) for runs in shard.members[rank].runs(part)]
        sinks.append(Sink(part, tuple(torch.full((size,), torch.nan, dtype=dtype) for size in sizes)))
    return sinks


def with_sinks(pushes: list[Push], sinks: list[Sink]) -> list[Push]:
    return [dataclasses.replace(push, sink=sink) for push, sink in zip(pushes, sinks, strict=True)]


def require_delivered(run: Run, rank: int, sinks: list[Sink]) -> None:
    for shard, sink in zip(run.group.shards, sinks, strict=True):
        expected = shard.parameters([part.dtype for part in sink.parts], rank, sink.part)
        assert all(torch.equal(*each) for each in zip(sink.parts, expected, strict=True))


@pytest.mark.parametrize("rule", [ProdigyRule(d0=1e-3), ProdigyRule(eps_d="old"), AdamWRule(), LAMBRule()], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_rank_gets_the_new_parameters_in_its_dtype(rule: Rule, kernel: Kernel) -> None:
    problem = Problem((ZooTensor((900,)), ZooTensor((3, 5)), ZooTensor((2000,), group=1), ZooTensor((1,))))
    run = Run(problem, rule, world_size=2, num_shards=3, kernel=kernel)
    plain = Run(problem, rule, world_size=2, num_shards=3, kernel=kernel)
    for _ in range(3):
        sinks = [sinks_of(run, rank, "held", dtype) for rank, dtype in enumerate(WIRES)]
        for rank in range(2):
            run.group.push(with_sinks(run.pushes(rank), sinks[rank]))
            plain.group.push(plain.pushes(rank))
        for rank in range(2):
            require_delivered(run, rank, sinks[rank])
    assert_same_state(run.state(), plain.state())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gradients", ["replicated", "sharded"])
def test_each_rank_gets_its_part(gradients: Gradients, kernel: Kernel) -> None:
    """A replica's share is of whole tiles, and written within the pass; a sharded rank's rows are copied after it."""
    holdings = split_rows(straddling(), 2) if gradients == "sharded" else None
    part: Part = "pushed" if gradients == "replicated" else "held"
    rule = ProdigyRule(d0=1e-3)
    run = PartedRun(straddling(), rule, gradients, num_shards=3, world_size=2, holdings=holdings, kernel=kernel)
    for step in range(2):
        cosine(run.groups, step)
        values = run.problem_gradients()
        sinks = [sinks_of(run, rank, part, torch.float32) for rank in range(2)]
        for rank in range(2):
            run.group.push(with_sinks(run.pushes_of(rank, values), sinks[rank]))
        for rank in range(2):
            require_delivered(run, rank, sinks[rank])
    assert_same_state(run.state(), Run(straddling(), rule, kernel=kernel).steps(2).state())


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_are_delivered_by_a_step_that_moves_nothing(kernel: Kernel) -> None:
    """Someone has changed one by hand: with lr = 0 no pass writes it."""
    run = Run(straddling(), ProdigyRule(), num_shards=2, kernel=kernel).steps(1)
    run.groups[0]["lr"] = run.groups[1]["lr"] = 0.0
    value = torch.full((run.problem.initial(0).numel(),), 7.0)
    sinks = sinks_of(run, 0, "held", torch.float32)
    pushes = [dataclasses.replace(push, reloaded={0: value}) for push in run.pushes()]
    run.group.push(with_sinks(pushes, sinks))
    require_delivered(run, 0, sinks)
    assert torch.equal(run.params()[0].flatten(), value)


def test_whole_tiles_are_written_within_the_pass() -> None:
    run = Run(straddling(), AdamWRule(), num_shards=2)
    shard, (sink, _) = run.group.shards[0], sinks_of(run, 0, "held", torch.float32)
    direct = Delivery([(sink, shard.members[0].held)], shard.buffers).direct

    def whole(extent: list[tuple[range, Tensor]]) -> list[range]:
        return [tiles for tiles, _ in extent]

    assert list(map(whole, direct)) == [[range(len(extent.tiles))] for extent in shard.buffers.extents]
