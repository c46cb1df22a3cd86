"""Gradients on their way into the flat buffer: what arrives there, and what a worker says of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import stepwell
from stepwell.client import gathering
from stepwell.client.flat import FlatBuffer
from stepwell.client.gathering import Gatherer, bounds_of, largest
from stepwell.client.groups import param_specs
from stepwell.client.inprocess import InProcessService, InProcessTransport
from stepwell.sharding.errors import UnsupportedParameterError
from stepwell.sharding.layout import Layout
from tests.client.lines import FaultyTransport, SharedShards, reached_by
from tests.client.test_worker_ranks import Workers
from tests.client.training import assert_equal, copies_of, drive, make_net, set_grads, values_of

CPU = torch.device("cpu")
SHAPES = ((300,), (), (0, 4), (20, 30), (7, 1000), (5,), (3, 3), (2100,))

BATCHES = pytest.mark.parametrize("batch_numel", [1, 600, 1024, 2**20])


class Gathering:
    """A buffer and gradients for it.

    Args:
        dtype: Of the gradients.
        wire: Of the buffer; None for the same.
        is_added: Whether other ranks' gradients are to be added.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, wire: torch.dtype | None = None, *, is_added: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.grads: list[Tensor | None] = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
        params = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
        layout = Layout.build(list(param_specs([{"params": params}])))
        self.buffer = FlatBuffer(layout, CPU, dtype=wire)
        shapes = [param.shape for param in params]
        self.gatherer = Gatherer(self.buffer, shapes, [None] * len(self.buffer.places), is_added=is_added)

    def gather(self) -> float:
        return self.gatherer.gather(self.grads, {})

    def assert_bound(self, found: float) -> None:
        """At least the largest magnitude, at most the norm: no place counts that has no gradient."""
        sent = torch.cat(self.present).double()
        rounding = 1e-5
        assert float(sent.abs().max()) * (1 - rounding) <= found <= float(sent.norm()) * (1 + rounding)

    @property
    def present(self) -> list[Tensor]:
        """Gradients that there are, as they are sent."""
        return [grad.to(self.buffer.parts[0].dtype).reshape(-1) for grad in self.grads if grad is not None]

    @property
    def gathered(self) -> list[Tensor]:
        """What lies at the places of those, empty ones too."""
        views = {place.param: place.view for place in self.buffer.places}
        nothing = self.buffer.parts[0][:0]
        return [views.get(index, nothing) for index, grad in enumerate(self.grads) if grad is not None]


@BATCHES
@pytest.mark.parametrize("wire", [None, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_gradient_arrives_and_a_bound_is_known(
    dtype: torch.dtype, wire: torch.dtype | None, batch_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "CPU_BATCH_NUMEL", batch_numel)
    case = Gathering(dtype, wire)
    case.assert_bound(case.gather())
    assert_equal(case.gathered, case.present)
    total = sum(len(grad) for grad in case.present)
    assert int((case.buffer.parts[0] != 0).sum()) == total, "padding stays zero"


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_that_are_not_added_up_are_known_to_be_finite(wire: torch.dtype) -> None:
    case = Gathering(wire=wire, is_added=False)
    assert case.gather() == torch.finfo(wire).max
    assert_equal(case.gathered, case.present)


@BATCHES
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("index", [0, 1, 3, 4, 5, 7])
@pytest.mark.parametrize("is_added", [True, False])
def test_inf_and_nan_are_found_wherever_they_are(
    is_added: bool, index: int, value: float, batch_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "CPU_BATCH_NUMEL", batch_numel)
    case = Gathering(is_added=is_added)
    grad = case.grads[index]
    assert grad is not None
    grad.view(-1)[-1] = value
    found = case.gather()
    assert found == math.inf or (math.isnan(value) and math.isnan(found))


@BATCHES
@pytest.mark.parametrize("is_added", [True, False])
def test_what_a_place_had_before_does_not_count(
    is_added: bool, batch_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "CPU_BATCH_NUMEL", batch_numel)
    case = Gathering(is_added=is_added)
    for index, garbage in ((0, math.nan), (3, math.inf), (4, 1e30)):
        grad = case.grads[index]
        assert grad is not None
        grad.view(-1)[0] = garbage
    case.gather()
    for index in (0, 3, 4):
        case.grads[index] = None
    found = case.gather()
    if is_added:
        case.assert_bound(found)
    assert math.isfinite(found)
    assert_equal(case.gathered, case.present)
    case.grads = [None] * len(SHAPES)
    assert math.isfinite(case.gather())


def test_gradient_that_is_not_contiguous_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "CPU_BATCH_NUMEL", 500)
    case = Gathering()
    case.grads[4] = torch.randn(1000, 7).t()
    case.grads[3] = torch.ones(()).expand(20, 30) * 9
    case.gather()
    assert_equal(case.gathered, case.present)


@BATCHES
def test_value_that_overflows_on_the_wire_counts_as_inf(batch_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "CPU_BATCH_NUMEL", batch_numel)
    case = Gathering(wire=torch.float16)
    grad = case.grads[4]
    assert grad is not None
    grad[2, 7] = -1e6
    assert case.gather() == math.inf


@BATCHES
@pytest.mark.parametrize("value", [-1e30, 3e38])
@pytest.mark.parametrize("is_added", [True, False])
def test_sum_that_overflows_is_not_taken_for_inf(
    is_added: bool, value: float, batch_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "CPU_BATCH_NUMEL", batch_numel)
    case = Gathering(is_added=is_added)
    assert case.grads[4] is not None
    case.grads[4][2, 7:9] = value
    assert math.isfinite(case.gather())
    if is_added or value > 1e38:
        assert case.gather() == pytest.approx(abs(value)) or batch_numel == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_small", [0, 10, 10**6])
def test_bound_is_not_below_an_element_that_others_might_swamp(num_small: int, dtype: torch.dtype) -> None:
    values = torch.cat((torch.tensor([3.0]), torch.full((num_small,), 1e-4))).to(dtype)
    for order in (values, values.flip(0)):
        assert largest(bounds_of(order)) >= 3.0 * (1 - 2**-20)


def test_largest_of_several_dtypes_is_nan_if_one_is() -> None:
    two, five = torch.tensor(-2.0), torch.tensor(5.0, dtype=torch.float64)
    assert largest([]) == 0.0
    assert largest([two, five]) == 5.0
    for nan in (torch.tensor(math.nan), torch.tensor(math.nan, dtype=torch.float64)):
        assert math.isnan(largest([two, nan, five, torch.tensor(math.inf)]))


# What the header says

Line = tuple[list[nn.Parameter], stepwell.ServiceOptimizer, FaultyTransport]


def make_line(
    make: Callable[..., stepwell.ServiceOptimizer] = stepwell.AdamW,
    params: Sequence[Tensor] | None = None,
    **options: object,
) -> Line:
    copies = copies_of(make_net().parameters() if params is None else params)
    transport = FaultyTransport(InProcessTransport(InProcessService(num_shards=2)))
    with reached_by(lambda rank: transport):
        return copies, make(copies, **options), transport


def test_header_of_one_worker_says_that_all_is_finite() -> None:
    params, optimizer, transport = make_line()
    drive(params, optimizer, range(2))
    assert [header.max_abs for header in transport.headers] == [torch.finfo(torch.float32).max] * 2


def test_header_of_several_says_a_bound_on_the_magnitudes() -> None:
    workers = Workers(SharedShards(num_shards=2))
    for step, absent in enumerate(((), ((1, 0),))):
        workers.set_grads(step, absent)
        workers.step()
        for params, transport in zip(workers.params, workers.transports, strict=True):
            sent = torch.cat([param.grad.reshape(-1) for param in params if param.grad is not None])
            max_abs = transport.headers[-1].max_abs
            assert max_abs is not None
            assert float(sent.abs().max()) <= max_abs <= float(sent.norm()) * 1.001
            assert not transport.headers[-1].found_inf


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_header_says_that_the_gradient_is_not_finite(value: float) -> None:
    params, optimizer, transport = make_line()
    set_grads(params, 0)
    assert params[1].grad is not None
    params[1].grad[3] = value
    before = values_of(params)
    optimizer.step()
    assert transport.headers[-1].found_inf
    assert transport.headers[-1].max_abs is None
    assert optimizer.step_was_skipped
    assert_equal(params, before)


def test_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = stepwell.AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        UnsupportedParameterError, match=r"expected a dense gradient, got one of layout torch\.sparse_coo"
    ):
        optimizer.step()


# gradient_dtype


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_gradients_are_sent_in_the_dtype_that_is_asked_for(num_shards: int, wire: torch.dtype) -> None:
    """As if they had been rounded before, and training went on in float32."""
    params, expected = copies_of(make_net().parameters()), copies_of(make_net().parameters())
    service = InProcessService(num_shards=num_shards)
    drive(params, stepwell.Prodigy(params, service=service, gradient_dtype=wire), range(4))
    optimizer = stepwell.Prodigy(expected)
    for step in range(4):
        set_grads(expected, step)
        for param in expected:
            assert param.grad is not None
            param.grad.copy_(param.grad.to(wire))
        optimizer.step()
    assert_equal(params, expected)


def test_wider_gradients_than_the_model_change_nothing() -> None:
    params, expected = (copies_of(make_net(torch.bfloat16).parameters()) for _ in range(2))
    drive(params, stepwell.AdamW(params, gradient_dtype=torch.float32), range(4))
    drive(expected, stepwell.AdamW(expected), range(4))
    assert_equal(params, expected)


def test_gradient_dtype_holds_for_added_groups_and_copies() -> None:
    params = copies_of(make_net().parameters())
    added = nn.Parameter(torch.ones(500))
    optimizer = stepwell.AdamW(params, gradient_dtype=torch.bfloat16)
    optimizer.add_param_group({"params": [added]})
    twin = copy.deepcopy(optimizer)
    twins = [param for group in twin.param_groups for param in group["params"]]
    drive([*params, added], optimizer, range(2))
    drive(twins, twin, range(2))
    assert_equal(twins, [*params, added])
    for each in (optimizer, twin):
        assert each._worker is not None
        assert {part.dtype for part in each._worker._buffers.pushed.parts} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "bfloat16"])
def test_gradient_dtype_that_shards_do_not_take_is_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"gradient_dtype: expected one of torch\.float32, torch\.bfloat16"):
        stepwell.AdamW(make_net().parameters(), gradient_dtype=dtype)  # type: ignore[arg-type]
