"""Gradients that are copied within backward: whatever becomes of them before the step, the bits are the same."""

from __future__ import annotations

import copy
import gc
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stepwell
from stepwell.client import overlap
from stepwell.client.gathering import Gatherer, Seen
from stepwell.client.holdings import local_part
from stepwell.client.inprocess import InProcessService, InProcessTransport
from stepwell.sharding.errors import ServiceTimeoutError
from tests.client.lines import Fault, FaultyTransport, SharedShards, SharedTransport, reached_by
from tests.client.training import assert_equal, assert_same_state, loss_of, make_net, set_grads, train, values_of

NUM_STEPS = 5
NUM_PARAMS = 4

Params = Sequence[nn.Parameter]


@pytest.fixture(autouse=True)
def _hooks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MIN_NUMEL", 1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Per step, which places were not copied again."""
    steps: list[set[int]] = []
    gather = Gatherer.gather

    def note(self: Gatherer, grads: Sequence[Tensor | None], copied: dict[int, Seen]) -> float:
        steps.append(set(copied))
        return gather(self, grads, copied)

    monkeypatch.setattr(Gatherer, "gather", note)
    return steps


def backward(net: nn.Module, step: int, factor: float = 1.0) -> None:
    (loss_of(net, step) * factor).backward()  # type: ignore[no-untyped-call]


def run(change: Callable[[Params, int], None], *, overlap: bool, accumulate: int = 1) -> tuple[nn.Module, Any]:
    """Train, with ``change`` between the backward and the step."""
    net = make_net()
    optimizer = stepwell.Prodigy(net.parameters(), overlap=overlap, weight_decay=0.1)
    params = list(net.parameters())
    for step in range(NUM_STEPS):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for part in range(accumulate):
            backward(net, 10 * step + part)
        change(params, step)
        optimizer.step()
    return net, optimizer


def nothing(params: Params, step: int) -> None:
    pass


def clip_norm(params: Params, step: int) -> None:
    nn.utils.clip_grad_norm_(params, 0.01, foreach=(None, True, False)[step % 3])


def clip_norm_that_changes_nothing(params: Params, step: int) -> None:
    nn.utils.clip_grad_norm_(params, math.inf)


def clip_value(params: Params, step: int) -> None:
    nn.utils.clip_grad_value_(params, 1e-3, foreach=(None, True, False)[step % 3])


def in_one_kernel(params: Params, step: int) -> None:
    torch._foreach_mul_([cast("Tensor", param.grad) for param in params], 0.5)


def first_in_place(params: Params, step: int) -> None:
    assert params[0].grad is not None
    params[0].grad.mul_(0.5)


def through_a_detached_one(params: Params, step: int) -> None:
    assert params[0].grad is not None
    params[0].grad.detach()[0] = 3.0


def first_replaced(params: Params, step: int) -> None:
    assert params[0].grad is not None
    params[0].grad = params[0].grad * 2


def first_removed(params: Params, step: int) -> None:
    params[0].grad = None


def first_by_hand(params: Params, step: int) -> None:
    params[0].grad = None
    set_grads(params[:1], step)


def first_with_more_by_hand(params: Params, step: int) -> None:
    assert params[0].grad is not None
    params[0].grad += params[0].detach()


def first_through_another_graph(params: Params, step: int) -> None:
    """Backward alone adds to it, whose hook copies it again."""
    params[0].square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("change", "num_taken"),
    [
        (nothing, 4),
        (clip_norm, 0),
        (clip_norm_that_changes_nothing, 0),
        (clip_value, 0),
        (in_one_kernel, 0),
        (first_in_place, 3),
        (through_a_detached_one, 3),
        (first_replaced, 3),
        (first_removed, 3),
        (first_by_hand, 3),
        (first_with_more_by_hand, 3),
        (first_through_another_graph, 4),
    ],
)
def test_bits_are_those_without_overlap(
    change: Callable[[Params, int], None], num_taken: int, accumulate: int, taken: list[set[int]]
) -> None:
    net, optimizer = run(change, overlap=True, accumulate=accumulate)
    assert [len(step) for step in taken] == [num_taken] * NUM_STEPS
    expected_net, expected = run(change, overlap=False, accumulate=accumulate)
    assert not any(taken[NUM_STEPS:])
    assert_equal(net.parameters(), expected_net.parameters())
    assert_same_state(optimizer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradient_that_is_not_finite_is_found_in_the_hook(value: float, taken: list[set[int]]) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), overlap=True)
    before = values_of(net.parameters())
    backward(net, 0, value)
    optimizer.step()
    assert [len(step) for step in taken] == [NUM_PARAMS]
    assert optimizer.step_was_skipped
    assert_equal(net.parameters(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_are_copied_in_other_dtypes(dtype: torch.dtype, taken: list[set[int]]) -> None:
    nets = make_net(dtype), make_net(dtype)
    for net, overlap_ in zip(nets, (True, False), strict=True):
        train(net, stepwell.AdamW(net.parameters(), overlap=overlap_, gradient_dtype=torch.float16), range(NUM_STEPS))
    assert [len(step) for step in taken] == [NUM_PARAMS] * NUM_STEPS + [0] * NUM_STEPS
    assert_equal(nets[0].parameters(), nets[1].parameters())


def test_closure_that_runs_backward_in_the_step(taken: list[set[int]]) -> None:
    def trained(overlap_: bool) -> nn.Module:
        net = make_net()
        optimizer = stepwell.AdamW(net.parameters(), overlap=overlap_)
        for step in range(NUM_STEPS):

            def closure(step: int = step) -> float:
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.item()

            optimizer.step(closure)
        return net

    overlapped, expected = trained(True), trained(False)
    assert [len(step) for step in taken] == [NUM_PARAMS] * NUM_STEPS + [0] * NUM_STEPS
    assert_equal(overlapped.parameters(), expected.parameters())


def test_gradient_with_a_graph_of_its_own(taken: list[set[int]]) -> None:
    def trained(overlap_: bool) -> nn.Module:
        net = make_net()
        optimizer = stepwell.AdamW(net.parameters(), overlap=overlap_)
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            loss_of(net, step).backward(create_graph=True)  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad()
        return net

    with pytest.warns(UserWarning, match="create_graph=True"):
        overlapped, expected = trained(True), trained(False)
    assert all(len(step) == NUM_PARAMS for step in taken[:NUM_STEPS])
    assert_equal(overlapped.parameters(), expected.parameters())


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize("scaler_type", [torch.amp.GradScaler, stepwell.GradScaler])
def test_gradient_scaler(
    scaler_type: type[torch.amp.GradScaler], unscales: bool, taken: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``unscale_`` changes gradients and leaves their version counters alone."""
    monkeypatch.setattr(overlap, "MAX_USELESS_STEPS", 99)

    def trained(overlap_: bool) -> tuple[nn.Module, float]:
        net = make_net()
        optimizer = stepwell.AdamW(net.parameters(), overlap=overlap_)
        scaler = scaler_type("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, step) * (math.inf if step == 3 else 1.0)).backward()  # type: ignore[no-untyped-call]
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return net, scaler.get_scale()

    overlapped, expected = trained(True), trained(False)
    assert [len(step) for step in taken[:8]] == [0 if unscales else NUM_PARAMS] * 8
    assert overlapped[1] == expected[1]
    assert_equal(overlapped[0].parameters(), expected[0].parameters())


# What has hooks, and how long


def hooks_of(params: Sequence[Tensor]) -> list[int]:
    return [len(getattr(param, "_post_accumulate_grad_hooks", None) or ()) for param in params]


def test_small_and_frozen_parameters_have_no_hooks(monkeypatch: pytest.MonkeyPatch, taken: list[set[int]]) -> None:
    monkeypatch.setattr(overlap, "MIN_NUMEL", 41)
    net = make_net()
    params = list(net.parameters())
    params[2].requires_grad_(False)
    optimizer = stepwell.AdamW(params, overlap=True)
    assert hooks_of(params) == [1, 0, 0, 0]
    params[2].requires_grad_(True)
    train(net, optimizer, range(2))
    assert taken == [{0}, {0}]


def test_no_hooks_without_overlap() -> None:
    params = list(make_net().parameters())
    optimizer = stepwell.AdamW(params, overlap=False)
    assert hooks_of(params) == [0] * NUM_PARAMS
    optimizer.close()


def test_close_removes_the_hooks() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), overlap=True)
    backward(net, 0)
    optimizer.close()
    assert hooks_of(list(net.parameters())) == [0] * NUM_PARAMS
    backward(net, 0)


def test_hooks_of_an_optimizer_that_is_gone_do_nothing() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), overlap=True)
    buffers = optimizer._worker._buffers.pushed  # type: ignore[union-attr]
    optimizer._worker = None
    del optimizer
    gc.collect()
    backward(net, 0)
    assert not buffers.parts[0].any()


def test_no_gradient_is_kept_alive_after_the_step() -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), overlap=True)
    train(net, optimizer, range(1))
    early = optimizer._worker._buffers._early  # type: ignore[union-attr]
    assert early is not None
    assert not early._copied


def test_added_group_has_hooks_too(taken: list[set[int]]) -> None:
    def trained(overlap_: bool) -> nn.Sequential:
        net = make_net()
        optimizer = stepwell.AdamW(net[0].parameters(), overlap=overlap_)
        train(net, optimizer, range(2))
        optimizer.add_param_group({"params": list(net[2].parameters())})
        train(net, optimizer, range(2, 4))
        return net

    overlapped = trained(True)
    assert hooks_of(list(overlapped.parameters())) == [1] * NUM_PARAMS
    assert [len(step) for step in taken] == [2, 2, 4, 4]
    assert_equal(overlapped.parameters(), trained(False).parameters())


def test_two_optimizers_of_one_model(taken: list[set[int]]) -> None:
    def trained(overlap_: bool) -> nn.Sequential:
        net = make_net()
        first = stepwell.AdamW(net[0].parameters(), overlap=overlap_)
        second = stepwell.Prodigy(net.parameters(), overlap=overlap_)
        for step in range(NUM_STEPS):
            net.zero_grad()
            backward(net, step)
            first.step()
            second.step()
        return net

    overlapped = trained(True)
    assert [len(step) for step in taken] == [2, 4] * NUM_STEPS
    assert_equal(overlapped.parameters(), trained(False).parameters())


def test_copies_of_the_model_have_no_hooks_and_a_copy_of_the_optimizer_has_its_own(taken: list[set[int]]) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), overlap=True)
    train(net, optimizer, range(2))
    stored = io.BytesIO()
    torch.save(net, stored)
    stored.seek(0)
    for other in (copy.deepcopy(net), torch.load(stored, weights_only=False)):
        assert hooks_of(list(other.parameters())) == [0] * NUM_PARAMS
        backward(other, 7)
    twin_net, twin = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(2, 4))
    train(twin_net, twin, range(2, 4))
    assert [len(step) for step in taken] == [NUM_PARAMS] * 6
    assert_equal(twin_net.parameters(), net.parameters())


@pytest.mark.parametrize("changes_at", [(0, 1, 2, 3, 4, 5), (0, 1, 3, 4)])
def test_hooks_that_never_help_are_removed(
    changes_at: tuple[int, ...], taken: list[set[int]], caplog: pytest.LogCaptureFixture
) -> None:
    net = make_net()
    optimizer = stepwell.AdamW(net.parameters(), overlap=True)
    with caplog.at_level(logging.INFO, logger="stepwell"):
        for step in range(6):
            optimizer.zero_grad()
            backward(net, step)
            if step in changes_at:
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
    goes_on = len(changes_at) < 6
    assert hooks_of(list(net.parameters())) == [int(goes_on)] * NUM_PARAMS
    assert caplog.text.count("from now on step() copies them") == int(not goes_on)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("again", [True, False])
def test_hook_leaves_the_memory_of_an_unsettled_push_alone(when: Any, again: bool, taken: list[set[int]]) -> None:
    """A shard may read it still. The next step copies all, and the one after it uses the hooks again."""

    def trained(overlap_: bool) -> nn.Sequential:
        net = make_net()
        transport = FaultyTransport(
            InProcessTransport(InProcessService(num_shards=2)), Fault("step", 2, when, ServiceTimeoutError("no answer"))
        )
        with reached_by(lambda rank: transport):
            optimizer = stepwell.AdamW(net.parameters(), overlap=overlap_)
        train(net, optimizer, range(1))
        with pytest.raises(ServiceTimeoutError):
            train(net, optimizer, range(1, 2))
        pushed = optimizer._worker._buffers.pushed  # type: ignore[union-attr]
        before = values_of(pushed.parts)
        if not again:
            optimizer.zero_grad()
            backward(net, 2)
        assert_equal(pushed.parts, before)
        optimizer.step()
        train(net, optimizer, range(3, 5))
        return net

    overlapped = trained(True)
    assert [len(step) for step in taken] == [4, 4, 0, 4, 4]
    assert_equal(overlapped.parameters(), trained(False).parameters())


def test_replicas_stay_out(caplog: pytest.LogCaptureFixture) -> None:
    """What their hooks see is not reduced yet."""
    shared = SharedShards()
    params = list(make_net().parameters())
    with reached_by(lambda rank: SharedTransport(shared, rank)), caplog.at_level(logging.INFO, logger="stepwell"):
        stepwell.AdamW(params, rank=0, world_size=2, gradients="replicated", overlap=True)
    assert hooks_of(params) == [0] * NUM_PARAMS
    assert caplog.text.count("overlap: gradients are reduced among ranks after backward's hooks") == 1


# torch's wrappers


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def doubled(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
    """Stands for the all-reduce, which of one rank changes nothing."""
    future = torch.futures.Future[Tensor]()
    future.set_result(bucket.buffer() * 2)
    return future


# torch compares these with the classes themselves.
doubled.__annotations__ = {"bucket": vars(dist)["GradBucket"], "return": torch.futures.Future[Tensor]}


@pytest.mark.parametrize("is_view", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.usefixtures("process_group")
def test_gradients_that_ddp_reduces_after_the_hook_are_copied_again(
    is_view: bool, keeps: bool, taken: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "MAX_USELESS_STEPS", 99)

    def trained(overlap_: bool) -> nn.Module:
        net = DistributedDataParallel(make_net(), gradient_as_bucket_view=is_view)
        net.register_comm_hook(None, doubled)
        optimizer = stepwell.SGD(net.parameters(), lr=0.1, overlap=overlap_)
        for step in range(NUM_STEPS):
            optimizer.zero_grad(set_to_none=not keeps)
            backward(net, step)
            optimizer.step()
        return net

    overlapped = trained(True)
    assert not any(taken)
    assert len(taken) == NUM_STEPS
    assert_equal(overlapped.parameters(), trained(False).parameters())


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_stay_out(caplog: pytest.LogCaptureFixture) -> None:
    def trained(overlap_: bool) -> nn.Module:
        net = make_net()
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        train(net, stepwell.AdamW(net.parameters(), overlap=overlap_), range(NUM_STEPS))
        return net

    with caplog.at_level(logging.INFO, logger="stepwell"):
        overlapped = trained(True)
    assert caplog.text.count("overlap: gradients are reduced among ranks after backward's hooks") == 1
    expected = trained(False)
    assert_equal(map(local_part, overlapped.parameters()), map(local_part, expected.parameters()))
