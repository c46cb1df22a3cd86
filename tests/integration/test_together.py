"""What all ranks of a job do together: registering the parts of a sharded model, adding a parameter group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import ray
import torch

import stepwell
from stepwell.optim import AdamWRule
from stepwell.server.messages import pack_holdings, pack_job
from stepwell.server.wire import to_wire
from stepwell.sharding.coverage import Holdings, Range
from stepwell.sharding.errors import CoverageError, JobMismatchError, ServiceTimeoutError, StepwellError
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec
from tests.integration.conftest import Launch

LIMIT_S = 30.0
PARAMS = (ParamSpec("embedding", (10, 300), "float32", 0), ParamSpec("head", (7,), "float32", 0))
ADDED = (*PARAMS, ParamSpec("adapter", (4, 4), "float32", 1))


@pytest.fixture(scope="module")
def service(module_launch: Launch) -> stepwell.Service:
    """One service for all: a job whose registration was refused leaves no workers behind."""
    return module_launch(2, worker_timeout_s=5.0)


def job(**fields: Any) -> JobSpec:
    return dataclasses.replace(JobSpec(AdamWRule(), PARAMS, 1, 2, gradients="sharded"), **fields)


def rows(first: int, last: int, head: tuple[int, int]) -> Holdings:
    ranges = Range(first * 300, (last - first) * 300), Range(head[0], head[1] - head[0])
    return Holdings(ranges, ranges)


def ask_all(service: stepwell.Service, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Every rank asks the coordinator at once; what each is told, be it an error."""
    references = [getattr(service.coordinator, method).remote(*arguments) for arguments in calls]
    replies: list[Any] = []
    for reference in references:
        try:
            replies.append(ray.get(reference, timeout=LIMIT_S))
        except StepwellError as error:
            replies.append(error)
    return replies


def register(service: stepwell.Service, holdings: Sequence[Holdings | None], **fields: Any) -> list[Any]:
    packed = pack_job(job(**fields))
    calls = [(packed, rank, f"worker-{rank}", pack_holdings(held)) for rank, held in enumerate(holdings)]
    return ask_all(service, "register", calls)


@pytest.mark.parametrize(
    ("holdings", "message"),
    [
        ((rows(0, 5, (0, 4)), rows(6, 10, (4, 7))), "'embedding' .* gap .* no rank holds elements 1500 to 1800"),
        ((rows(0, 5, (0, 4)), rows(5, 10, (3, 7))), "'head' .* overlap .* ranks 0 and 1 push elements 3 to 4"),
    ],
)
def test_parts_that_do_not_make_up_the_model_are_told_to_every_rank(
    service: stepwell.Service, holdings: tuple[Holdings, Holdings], message: str
) -> None:
    for reply in register(service, holdings):
        with pytest.raises(CoverageError, match=message):
            raise reply


def test_rank_that_does_not_come_is_named_with_the_limit(service: stepwell.Service) -> None:
    (reply,) = register(service, [rows(0, 5, (0, 4))])
    with pytest.raises(ServiceTimeoutError, match=r"waited 5 s for all ranks to register; missing ranks: \[1\]"):
        raise reply


def test_first_parameters_come_from_every_rank_and_a_group_from_all_together(launch: Launch) -> None:
    service = launch(3, worker_timeout_s=5.0)
    values = torch.randn(10, 300, generator=torch.Generator().manual_seed(0))
    head = torch.arange(7.0)
    assert [reply.needs_parameters for reply in register(service, (rows(0, 5, (0, 4)), rows(5, 10, (4, 7))))] == [
        True
    ] * 2
    parts = [
        {(0, "master_param", 0): to_wire(values[:5]), (1, "master_param", 0): to_wire(head[:4])},
        {(0, "master_param", 1500): to_wire(values[5:]), (1, "master_param", 4): to_wire(head[4:])},
    ]
    ask_all(service, "hand_in", [(rank, [ray.put(part)]) for rank, part in enumerate(parts)])
    assert torch.equal(read(service, 0), values.flatten())
    assert torch.equal(read(service, 1), head)

    held = [
        Holdings((*each.pushed, part), (*each.held, part))
        for each, part in zip((rows(0, 5, (0, 4)), rows(5, 10, (4, 7))), (Range(0, 8), Range(8, 8)), strict=True)
    ]
    grown = job(params=ADDED, num_groups=2)
    other = dataclasses.replace(grown, params=(*PARAMS, dataclasses.replace(ADDED[2], name="lora")))
    adapter = [[ray.put({(2, "master_param", 8 * rank): to_wire(torch.full((8,), rank + 1.0))})] for rank in range(2)]

    def add(*specs: JobSpec) -> list[Any]:
        calls = [(pack_job(spec), rank, pack_holdings(held[rank]), adapter[rank]) for rank, spec in enumerate(specs)]
        return ask_all(service, "extend", calls)

    for reply in add(grown, other):
        with pytest.raises(JobMismatchError, match=r"parameter 2: .*'adapter'.*'lora'"):
            raise reply
    with pytest.raises(ServiceTimeoutError, match=r"all ranks to add a parameter group; missing ranks: \[1\]"):
        raise add(grown)[0]
    assert service.status()["num_params"] == 2
    first, second = add(grown, grown)
    assert first == second
    assert service.status()["num_params"] == 3
    assert read(service, 2).tolist() == [1.0] * 8 + [2.0] * 8
    assert torch.equal(read(service, 0), values.flatten())


def read(service: stepwell.Service, param: int) -> torch.Tensor:
    """A whole parameter, as the shards export it."""
    exports = ray.get([shard.export.remote() for shard in service.shards], timeout=LIMIT_S)
    pieces = [
        (offset, torch.from_numpy(values.copy()))
        for pieces, _ in exports
        for index, slot, offset, (_, values) in pieces
        if (index, slot) == (param, "master_param")
    ]
    return torch.cat([values for _, values in sorted(pieces, key=lambda piece: piece[0])])


def test_workers_of_another_number_and_kind_may_follow_those_who_left(launch: Launch) -> None:
    service = launch(2)
    params = [torch.nn.Parameter(torch.ones(300))]
    first = stepwell.AdamW(params, service=service)
    params[0].grad = torch.ones(300)
    first.step()
    with pytest.raises(JobMismatchError, match="world_size: the service has 1, rank 0 has 2"):
        stepwell.AdamW([torch.nn.Parameter(torch.ones(300))], service=service, rank=0, world_size=2)
    first.close()
    second = stepwell.AdamW([torch.nn.Parameter(torch.zeros(300))], service=service, rank=0, world_size=2)
    assert torch.equal(second.param_groups[0]["params"][0], params[0])
    assert service.status()["world_size"] == 2
