"""What must not touch the bits: how the state is sharded, the chunks' size, the kernels' calls, threads.

Everything here is equal to the bit. The oracle is the run on one shard, which tests/optim compares with other people's
code.
"""

from __future__ import annotations

import functools

import pytest
import torch

from stepwell import optim
from stepwell.optim import AdamAWDRule, AdamWRule, LAMBRule, ProdigyRule, Rule
from stepwell.sharding import kernels
from tests.zoo import NUM_STEPS, Problem, Run, State, ZooTensor, assert_same_state, convolutions, straddling

RULES: dict[str, Rule] = {
    "Prodigy": ProdigyRule(d0=1e-4),
    "Prodigy-slice_p": ProdigyRule(d0=1e-4, slice_p=11, weight_decay=0.01),
    "Prodigy-beta1": ProdigyRule(d0=1e-4, betas=(0.0, 0.99), weight_decay=0.01, decouple=False),
    "AdamW": AdamWRule(lr=0.01, amsgrad=True),
    "LAMB": LAMBRule(lr=0.01, weight_decay=0.1),
    "AdamAWD": AdamAWDRule(lr=0.01),
}

ALL_RULES = pytest.mark.parametrize("name", RULES)


@functools.cache
def on_one_shard(name: str) -> State:
    return Run(straddling(), RULES[name]).steps(NUM_STEPS).state()


def assert_same_small_state(run: Run) -> None:
    """Scalars and key state are replicated, with the same bits."""
    first = run.group.shards[0]
    for shard in run.group.shards:
        assert shard.scalars == first.scalars
        for name, values in first.buffers.key_state.values.items():
            assert torch.equal(shard.buffers.key_state.values[name], values), name


def test_problem_straddles_what_it_should() -> None:
    """Else the tests below would prove little."""
    layout = Run(straddling(), RULES["LAMB"], num_shards=7).layout
    (extent,) = layout.extents
    table = extent.table(range(extent.num_tiles))
    assert extent.tiles_per_block == extent.tiles_per_chunk == 4
    for num_shards in (2, 3, 5, 7):
        edges = [extent.tile_range(shard, num_shards).start for shard in range(1, num_shards)]
        cut = {int(table.tensor_of_tile[edge]) for edge in edges if table.index_in_tensor[edge] > 0}
        assert cut, f"no tensor lies on two of {num_shards} shards"
    keys_of_chunk = [set(table.tensor_of_tile[first : first + 4].tolist()) for first in range(0, extent.num_tiles, 4)]
    assert max(map(len, keys_of_chunk)) == 4


@pytest.mark.parametrize("num_shards", [2, 3, 5, 7])
@ALL_RULES
def test_result_is_the_same_for_any_number_of_shards(name: str, num_shards: int) -> None:
    run = Run(straddling(), RULES[name], num_shards=num_shards).steps(NUM_STEPS)
    assert_same_state(run.state(), on_one_shard(name))
    assert_same_small_state(run)


@pytest.mark.parametrize("chunk_numel", [2**12, 2**17])
@ALL_RULES
def test_result_is_the_same_for_any_size_of_chunks(name: str, chunk_numel: int) -> None:
    run = Run(straddling(), RULES[name], num_shards=3, chunk_numel=chunk_numel).steps(50)
    assert run.layout.extents[0].tiles_per_chunk == chunk_numel // 256
    assert_same_state(run.state(), Run(straddling(), RULES[name]).steps(50).state())


@pytest.mark.parametrize("piece_tiles", [1, 7, 4096])
@ALL_RULES
def test_result_is_the_same_for_any_size_of_kernel_calls(
    name: str, piece_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Run(straddling(), RULES[name]).steps(5).state()
    monkeypatch.setattr(kernels, "PIECE_TILES", piece_tiles)
    assert_same_state(Run(straddling(), RULES[name], num_shards=2).steps(5).state(), expected)


@ALL_RULES
def test_result_is_the_same_for_any_number_of_threads(name: str) -> None:
    """One tensor is large enough for torch to use its threads within a kernel's call."""
    problem = Problem((ZooTensor((400, 400)), ZooTensor((70,)), ZooTensor((300, 301), group=1)))
    states = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        states.append(Run(problem, RULES[name], num_shards=2).steps(6).state())
    assert_same_state(*states)


@ALL_RULES
def test_result_is_the_same_for_any_alignment_in_memory(name: str) -> None:
    """The gradient is read where it was received, at any address."""
    problem = straddling()
    aligned, odd = Run(problem, RULES[name]), Run(problem, RULES[name])
    memory = torch.zeros(aligned.layout.extents[0].padded_numel + 1)[1:]
    for _ in range(10):
        aligned.step()
        (push,) = odd.pushes()
        odd.group.push([type(push)(push.header, (memory.copy_(push.gradient[0]),))])
    assert memory.data_ptr() % 64 == 4
    assert_same_state(odd.state(), aligned.state())


@ALL_RULES
def test_result_is_the_same_when_float64_and_float32_share_the_model(name: str) -> None:
    tensors = [
        ZooTensor((900,)),
        ZooTensor((30, 40), dtype="float64"),
        ZooTensor((7,), group=1),
        ZooTensor((2000,), dtype="float64", group=1),
        ZooTensor((50, 50), dtype="bfloat16"),
    ]
    problem = Problem(tuple(tensors))
    expected = Run(problem, RULES[name]).steps(30).state()
    assert {tensor.dtype for tensor in expected.params} == {torch.float32, torch.float64}
    for num_shards in (2, 3, 9):
        assert_same_state(Run(problem, RULES[name], num_shards=num_shards).steps(30).state(), expected)


def test_more_shards_than_chunks_leave_some_with_nothing() -> None:
    problem = Problem((ZooTensor((5,)), ZooTensor((300,))))
    for name, rule in RULES.items():
        expected = Run(problem, rule).steps(10).state()
        run = Run(problem, rule, num_shards=6).steps(10)
        assert [shard.buffers.extents[0].numel for shard in run.group.shards].count(0) == 3, name
        assert_same_state(run.state(), expected)


OTHER_RULES = [
    optim.AdamGCCRule(lr=0.01),
    optim.NAdamRule(lr=0.01),
    optim.StableAdamRule(lr=0.01, weight_decay=0.1),
    optim.StableAdamRule(lr=0.01, ratio="init/current"),
    ProdigyRule(d0=1e-4, eps_d="old"),
    ProdigyRule(d0=1e-4, d_scope="group", stat_dtype="bfloat16", slice_p=3),
    ProdigyRule(d0=1e-4, estimator="inner_product", lr=0.01),
    optim.AdamRule(lr=0.01, weight_decay=0.1),
    optim.BAdamRule(lr=0.01),
    optim.DuvAdamRule(lr=0.01),
    optim.MomentumRule(lr=0.01),
    optim.PreLAMBRule(lr=0.01),
    optim.RAdamRule(lr=0.01, betas=(0.8, 0.9)),
    optim.RMSpropRule(lr=0.01, centered=True, momentum=0.9),
    optim.SAdamRule(lr=0.01),
    optim.SGDRule(lr=0.01, momentum=0.9),
    optim.SRAdamRule(lr=0.01, betas=(0.8, 0.9)),
    optim.SUAdamRule(lr=0.01),
    optim.UMRule(lr=0.01),
]


@pytest.mark.parametrize("rule", OTHER_RULES, ids=repr)
def test_every_rule_gives_the_same_result_for_any_number_of_shards(rule: Rule) -> None:
    expected = Run(straddling(), rule).steps(20).state()
    for num_shards in (2, 3, 7):
        run = Run(straddling(), rule, num_shards=num_shards).steps(20)
        assert_same_state(run.state(), expected)
        assert_same_small_state(run)


CHANNEL_RULES = [rule for rule in [*RULES.values(), *OTHER_RULES] if rule.num_channels((4, 3, 2, 2))]


def test_channels_straddle_what_they_should() -> None:
    run = Run(convolutions(), CHANNEL_RULES[0], num_shards=7)
    (extent,) = run.layout.extents
    table = extent.table(range(extent.num_tiles))
    assert extent.tiles_per_block == extent.tiles_per_chunk == 1
    numels = set(run.group.spec.keys().channel_numel.tolist())
    assert {1, 27, 252, 256, 257, 320, 1000} <= numels
    for num_shards in (2, 5, 7):
        edges = [extent.tile_range(shard, num_shards).start for shard in range(1, num_shards)]
        offsets = [(int(table.tensor_of_tile[edge]), int(table.index_in_tensor[edge]) * 256) for edge in edges]
        channel_numel = run.group.spec.keys().channel_numel
        assert any(offset % channel_numel[tensor] for tensor, offset in offsets), (
            f"no channel is on two of {num_shards}"
        )


@pytest.mark.parametrize("rule", CHANNEL_RULES, ids=repr)
def test_channels_give_the_same_result_however_they_are_cut(rule: Rule) -> None:
    expected = Run(convolutions(), rule).steps(50).state()
    for num_shards, chunk_numel in ((2, None), (3, 512), (5, None), (7, None), (40, None)):
        run = Run(convolutions(), rule, num_shards=num_shards, chunk_numel=chunk_numel).steps(50)
        assert_same_state(run.state(), expected)
        assert_same_small_state(run)


def test_every_rule_is_among_those_tested() -> None:
    tested = {rule.name for rule in [*RULES.values(), *OTHER_RULES]}
    assert tested == set(optim.RULES.names())
