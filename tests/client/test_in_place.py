"""Parameters that are views of the buffer which a step fills, beside such as had to stay where they were."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.client.inprocess import InProcessService, InProcessTransport
from tests.client.lines import FaultyTransport, reached_by
from tests.client.training import assert_equal, assert_same_state, loss_of, make_net, train, values_of


def optimizer_of(params: Any) -> stepwell.ServiceOptimizer:
    return stepwell.Prodigy(params, weight_decay=0.1, service=InProcessService(num_shards=2))


def stay(params: Iterable[Tensor]) -> None:
    """Keep parameters where they are: in memory that other processes may share."""
    for param in params:
        param.share_memory_()  # type: ignore[no-untyped-call]


def in_place(optimizer: stepwell.ServiceOptimizer) -> list[int]:
    """Indices of the parameters that lie in the optimizer's buffer."""
    assert optimizer._worker is not None
    held = optimizer._worker._buffers.held
    addresses = {place.param: place.view.data_ptr() for place in held.places}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [index for index, param in enumerate(params) if param.data_ptr() == addresses.get(index)]


def expected_net(dtype: torch.dtype = torch.float32, steps: int = 6) -> nn.Sequential:
    net = make_net(dtype)
    stay(net.parameters())
    addresses = [param.data_ptr() for param in net.parameters()]
    train(net, stepwell.Prodigy(net.parameters(), weight_decay=0.1), range(steps))
    assert [param.data_ptr() for param in net.parameters()] == addresses
    return net


ALL = [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parameters_are_views_with_storages_of_their_own_and_the_same_bits(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    before = list(net.parameters())
    optimizer = optimizer_of(net.parameters())
    assert_equal(net.parameters(), make_net(dtype).parameters())
    train(net, optimizer, range(6))
    assert in_place(optimizer) == ALL
    assert_equal(net.parameters(), expected_net(dtype).parameters())
    for param, same in zip(net.parameters(), before, strict=True):
        assert param is same
        assert param.untyped_storage().nbytes() == param.numel() * param.element_size()
        assert param.is_leaf
        assert param.is_contiguous()


# What is left where it is


def test_parameters_that_cannot_be_moved_are_copied() -> None:
    base = torch.randn(100)
    shared = nn.Parameter(torch.randn(9))
    stay([shared])
    params = [
        nn.Parameter(torch.randn(20, 30)),
        nn.Parameter(torch.randn(20, 30).t()),
        nn.Parameter(base[10:50]),
        nn.Parameter(torch.randn(7, dtype=torch.bfloat16)),
        shared,
        nn.Parameter(torch.randn(0, 3)),
        nn.Parameter(torch.tensor(2.0)),
    ]
    alias = params[6].detach()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    stay(twins)
    optimizer, expected = optimizer_of(params), stepwell.Prodigy(twins, weight_decay=0.1)
    assert in_place(optimizer) == [0]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for param, twin in zip(params, twins, strict=True):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad, twin.grad = grad, grad.clone()
        optimizer.step()
        expected.step()
        assert_equal(params, twins)
        assert torch.equal(alias, params[6]), "what shared its memory does so still"
        assert torch.equal(base[10:50], params[2])
    assert params[1].stride() == (1, 30)


def test_tied_parameters_stay_tied() -> None:
    first = nn.Parameter(torch.randn(12))
    second = nn.Parameter(torch.zeros(12))
    second.data = first.data
    optimizer = optimizer_of([first])
    assert in_place(optimizer) == []
    first.grad = torch.ones(12)
    optimizer.step()
    assert torch.equal(first, second)


# What becomes of them


def to_half_and_back(net: nn.Sequential) -> None:
    net.double().float()


def assign_data(net: nn.Sequential) -> None:
    for param in net.parameters():
        param.data = param.data.clone()


def share(net: nn.Sequential) -> None:
    net.share_memory()


@pytest.mark.parametrize("replace", [to_half_and_back, assign_data, share])
def test_parameter_whose_memory_was_replaced_is_copied_from_then_on(replace: Callable[[nn.Sequential], None]) -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(3))
    replace(net)
    assert in_place(optimizer) == []
    train(net, optimizer, range(3, 6))
    assert in_place(optimizer) == []
    assert_equal(net.parameters(), expected_net().parameters())


def test_parameter_of_another_dtype_from_now_on_is_copied() -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(3))
    cast("nn.Linear", net[0]).half()
    for step in range(3, 6):
        for param in net.parameters():
            param.grad = torch.ones_like(param) * step
        optimizer.step()
    assert in_place(optimizer) == [2, 3]
    assert optimizer._worker is not None
    state, _ = optimizer._worker.transport.read_state()
    masters = [state[index, "master_param"].view(param.shape) for index, param in enumerate(net.parameters())]
    assert_equal(net.parameters(), [masters[0].half(), masters[1].half(), masters[2], masters[3]])


def test_one_replaced_parameter_leaves_the_others_in_place() -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(3))
    weight = cast("nn.Linear", net[2]).weight
    weight.data = weight.data.clone()
    train(net, optimizer, range(3, 6))
    assert in_place(optimizer) == [0, 1, 3]
    assert_equal(net.parameters(), expected_net().parameters())


def test_graph_from_before_the_step_is_refused_after_it() -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    loss = loss_of(net, 0)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_skipped_step_changes_nothing() -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(2))
    before = values_of(net.parameters())
    for param in net.parameters():
        param.grad = torch.full_like(param, torch.inf)
    optimizer.step()
    assert_equal(net.parameters(), before)


@pytest.mark.parametrize("through", ["in place", "load_state_dict", "data", "assign"])
def test_change_by_hand_is_taken_over(through: str) -> None:
    def trained(optimizer: stepwell.ServiceOptimizer, net: nn.Sequential) -> None:
        train(net, optimizer, range(2))
        weight = next(net.parameters())
        other = {name: value * 0.5 for name, value in net.state_dict().items()}
        if through == "in place":
            with torch.no_grad():
                weight.mul_(0.5)
        elif through == "load_state_dict":
            net.load_state_dict(other)
        elif through == "data":
            weight.data.mul_(0.5)
            optimizer.reload_parameters()
        else:
            weight.data = other["0.weight"]
            optimizer.reload_parameters()
        train(net, optimizer, range(2, 5))

    net, twin = make_net(), make_net()
    stay(twin.parameters())
    optimizer = optimizer_of(net.parameters())
    expected = stepwell.Prodigy(twin.parameters(), weight_decay=0.1)
    trained(optimizer, net)
    trained(expected, twin)
    assert_equal(net.parameters(), twin.parameters())
    assert in_place(optimizer) == ([1, 2, 3] if through == "assign" else ALL)


def test_only_what_was_changed_is_sent_again() -> None:
    net = make_net()
    transport = FaultyTransport(InProcessTransport(InProcessService(num_shards=2)))
    with reached_by(lambda rank: transport):
        optimizer = stepwell.AdamW(net.parameters())
    train(net, optimizer, range(2))
    with torch.no_grad():
        list(net.parameters())[3].add_(1.0)
    train(net, optimizer, range(2, 4))
    assert transport.reloaded == [set(), set(), {3}, set()]


def test_averages_that_are_swapped_in_and_out() -> None:
    """As evaluation with an EMA does, by values and by memory."""
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(2))
    ema = [torch.zeros_like(param) for param in net.parameters()]
    trained = values_of(net.parameters())
    for _ in range(2):
        for param, average in zip(net.parameters(), ema, strict=True):
            param.data, average.data = average.data, param.data
    assert_equal(net.parameters(), trained)
    assert in_place(optimizer) == ALL
    train(net, optimizer, range(2, 6))
    assert_equal(net.parameters(), expected_net().parameters())
    assert not any(average.any() for average in ema)


def test_copies_of_the_model_have_memory_of_their_own() -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(2))
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    twin, stored = copy.deepcopy(net), io.BytesIO()
    torch.save(net.state_dict(), stored)
    train(net, optimizer, range(2, 4))
    stored.seek(0)
    for state in (twin.state_dict(), torch.load(stored)):
        assert_equal(state.values(), kept.values())
    assert not torch.equal(net.state_dict()["0.weight"], kept["0.weight"])


def test_one_small_parameter_is_saved_alone() -> None:
    params = [nn.Parameter(torch.randn(100_000)), nn.Parameter(torch.randn(5))]
    optimizer = optimizer_of(params)
    assert in_place(optimizer) == [0, 1]
    stored = io.BytesIO()
    torch.save(params[1], stored)
    assert len(stored.getvalue()) < 4000
    stored.seek(0)
    assert torch.equal(torch.load(stored), params[1])


def test_close_gives_parameters_memory_of_their_own() -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(2))
    before, addresses = values_of(net.parameters()), [param.data_ptr() for param in net.parameters()]
    optimizer.close()
    assert_equal(net.parameters(), before)
    assert all(param.data_ptr() != address for param, address in zip(net.parameters(), addresses, strict=True))


def test_added_group_moves_all_into_the_new_buffer() -> None:
    net, twin = make_net(), make_net()

    def trained(optimizer: stepwell.ServiceOptimizer, net: nn.Sequential) -> None:
        train(net, optimizer, range(2))
        optimizer.add_param_group({"params": list(net[2].parameters())})
        train(net, optimizer, range(2, 5))

    stay(twin.parameters())
    optimizer = optimizer_of(net[0].parameters())
    trained(optimizer, net)
    trained(stepwell.Prodigy(twin[0].parameters(), weight_decay=0.1), twin)
    assert in_place(optimizer) == ALL
    assert_equal(net.parameters(), twin.parameters())


def test_refresh_after_a_restore_brings_the_restored_parameters(tmp_path: Path) -> None:
    net = make_net()
    optimizer = optimizer_of(net.parameters())
    train(net, optimizer, range(2))
    values = values_of(net.parameters())
    optimizer.service.save(str(tmp_path))
    train(net, optimizer, range(2, 4))
    optimizer.service.restore(str(tmp_path))
    optimizer.refresh()
    assert_equal(net.parameters(), values)
    assert in_place(optimizer) == ALL


def test_checkpoint_of_other_batches_is_restored_into_parameters_in_place(tmp_path: Path) -> None:
    """It lays the shard's memory out anew."""

    def grown(service: InProcessService) -> tuple[nn.Sequential, stepwell.ServiceOptimizer]:
        net = make_net()
        optimizer = stepwell.AdamW(net[0].parameters(), service=service)
        optimizer.add_param_group({"params": list(net[2].parameters())})
        return net, optimizer

    net, optimizer = grown(InProcessService())
    train(net, optimizer, range(3))
    optimizer.service.save(str(tmp_path))
    groups = [{"params": list(part.parameters())} for part in (make_net()[0], make_net()[2])]
    resumed = stepwell.AdamW(groups)
    resumed.service.restore(str(tmp_path))
    resumed.refresh()
    params = [param for group in resumed.param_groups for param in group["params"]]
    assert_equal(params, net.parameters())
    for step in range(2):
        for param, twin in zip(params, net.parameters(), strict=True):
            param.grad = torch.full_like(param, 0.1 * (step + 1))
            twin.grad = param.grad.clone()
        resumed.step()
        optimizer.step()
        assert_equal(params, net.parameters())
    assert_same_state({**resumed.state_dict(), "param_groups": None}, {**optimizer.state_dict(), "param_groups": None})
