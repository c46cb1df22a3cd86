"""What is planned: memory as real shards allocate it, traffic as rules have it, errors that name what was meant."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from stepwell.client.planning import measure
from stepwell.client.planning.deployment import Deployment, model_of
from stepwell.client.planning.machines import GIB, GPUS, Machine, with_gpu, without_gpu
from stepwell.client.planning.measure import (
    COPY,
    FUSED,
    MANY_TENSORS,
    NUM_TENSORS,
    ONE_SHARD,
    TWO_SHARDS,
    machine_of,
)
from stepwell.client.planning.memory import shard_bytes, slot_bytes
from stepwell.client.planning.plan import Plan
from stepwell.client.planning.step_time import link_loads, parts_of, reduction_bytes
from stepwell.client.planning.traffic import GRADIENT, passes_of
from stepwell.optim import RULES
from stepwell.sharding.coverage import Gradients
from stepwell.sharding.job import JobSpec
from stepwell.sharding.layout import ParamSpec
from stepwell.sharding.shard import Shard
from tests.command_line import Cli

PARAMS = (
    ParamSpec("w", (300, 70), "float32", 0),
    ParamSpec("b", (70,), "float32", 0),
    ParamSpec("half", (9, 1000), "bfloat16", 0),
    ParamSpec("double", (5000,), "float64", 0),
    ParamSpec("empty", (0, 3), "float32", 0),
)
FIELDS: dict[str, Mapping[str, Any]] = {
    "Prodigy": {},
    "Prodigy, sliced": {"slice_p": 11, "stat_dtype": "bfloat16"},
    "Prodigy, inner": {"estimator": "inner_product"},
    "AdamW": {"amsgrad": True},
    "LAMB": {},
    "BAdam": {},
    "SGD": {"momentum": 0.9},
}


def spec_of(
    name: str = "Prodigy",
    *,
    params: tuple[ParamSpec, ...] = PARAMS,
    world_size: int = 1,
    gradients: Gradients = "local",
) -> JobSpec:
    rule = RULES.build(name.split(",")[0], FIELDS.get(name, {}))
    return JobSpec(rule, params, 1, world_size, gradients=gradients)


def decoder(num_shards: int, num_workers: int, gradients: Gradients, **more: Any) -> Deployment:
    spec = spec_of(params=model_of(10_000_000, "bfloat16"), world_size=num_workers, gradients=gradients)
    return Deployment(spec=spec, num_shards=num_shards, **more)


@pytest.mark.parametrize("num_shards", [1, 3, 8])
@pytest.mark.parametrize("name", FIELDS)
def test_slots_take_what_a_real_shard_allocates(name: str, num_shards: int) -> None:
    spec = spec_of(name)
    for index in range(num_shards):
        shard = Shard(spec, shard=index, num_shards=num_shards)
        planned = slot_bytes(spec.layout(), spec.rule, index, num_shards)
        allocated = {
            slot: sum(extent.slots[slot].untyped_storage().nbytes() for extent in shard.buffers.extents)
            for slot in planned
        }
        assert planned == allocated
        assert sum(planned.values()) == shard.status().size_bytes
        assert planned.keys() == {slot for extent in shard.buffers.extents for slot in extent.slots}


def test_largest_shard_is_the_one_that_is_planned_for() -> None:
    plan = Deployment(spec=spec_of(), num_shards=7)
    found = shard_bytes(plan, is_gpu=False)
    sizes = [Shard(plan.spec, shard=index, num_shards=7).status().size_bytes for index in range(7)]
    assert sum(found[slot.name] for slot in plan.spec.rule.slots) + found["master_param"] == max(sizes)


@pytest.mark.parametrize(
    ("name", "fields", "sizes"),
    [
        ("AdamW", {}, [28]),
        ("Prodigy", {}, [36, 16]),
        ("Prodigy", {"eps_d": "old"}, [40]),
        ("LAMB", {}, [24, 16]),
        ("SGD", {}, [12]),
        ("SGD", {"momentum": 0.9}, [20]),
    ],
)
def test_passes_move_what_their_equations_have(name: str, fields: Mapping[str, Any], sizes: list[int]) -> None:
    """Bytes per float32 parameter, counted by hand: each operand read once, each result written once."""
    rule = RULES.build(name, fields)
    found = [
        each.size_bytes(rule, torch.float32, writes_cost_twice=False) + 4 * (GRADIENT in each.reads)
        for each in passes_of(rule)
    ]
    assert found == sizes


@pytest.mark.parametrize("name", RULES.names())
def test_each_rule_can_be_planned(name: str) -> None:
    rule = RULES.build(name, {})
    passes = passes_of(rule)
    assert [each.has_params for each in passes] == [False] * (len(passes) - 1) + [True]
    slots = {slot.name for slot in rule.slots}
    assert set().union(*(each.reads | each.writes for each in passes)) == {*slots, "master_param", GRADIENT}


@pytest.mark.parametrize(("gradients", "of_worker"), [("local", 1.0), ("replicated", 1 / 16), ("sharded", 1 / 16)])
def test_workers_push_what_their_gradients_mean(gradients: Gradients, of_worker: float) -> None:
    plan = decoder(4, 16, gradients, workers_per_node=8, shards_per_node=2)
    links = {link.name: link for link in link_loads(plan)}
    line, size_bytes = links["a worker and its shards"], 2 * 256 * sum(e.num_tiles for e in plan.layout.extents)
    assert line.out_bytes == line.in_bytes == round(size_bytes * of_worker)
    shard = links["a shard and its workers"]
    assert shard.in_bytes == shard.out_bytes == pytest.approx(line.out_bytes * 16 / 4, rel=1e-6)
    assert links["a node's network, gradients"].out_bytes == pytest.approx(line.out_bytes * 8 / 2, rel=1e-6)
    assert (links["a node's network, among replicas"].in_bytes > 0) == (gradients == "replicated")


def test_reductions_are_of_the_vectors_that_a_step_sums() -> None:
    plan = Deployment(spec=spec_of(), num_shards=3)
    shard = Shard(plan.spec, shard=0, num_shards=3)
    tables = shard._tables
    assert reduction_bytes(plan) == ((3 * 5 + tables.squares.num_segments) * 8, 2 * tables.sums.num_segments * 8)
    assert len(reduction_bytes(Deployment(spec=spec_of("AdamW"), num_shards=3))) == 1


def test_on_one_node_nothing_goes_over_the_network() -> None:
    plan = decoder(4, 8, "local", shards_per_node=4)
    assert plan.num_nodes == 1
    network = [link for link in link_loads(plan) if "network" in link.name]
    assert {(link.out_bytes, link.in_bytes) for link in network} == {(0, 0)}
    times = {part.name: part.seconds for part in parts_of(plan, without_gpu(64, network_gbps=10))}
    assert times["gradients: the network"] == times["gradients: Ray's object store"] == 0


def test_more_bandwidth_takes_less_and_the_rest_stays() -> None:
    plan, slow = decoder(2, 4, "sharded", shards_per_node=2), without_gpu(64, network_gbps=100)
    fast = dataclasses.replace(slow, bytes_per_s=2 * slow.bytes_per_s)
    before, after = (Plan.of(plan, machine) for machine in (slow, fast))
    for part, quicker in zip(before.parts, after.parts, strict=True):
        factor = 2 if part.name.startswith("pass:") else 1
        assert part.seconds == pytest.approx(factor * quicker.seconds), part.name
    assert before.step_s == pytest.approx(math.fsum(part.seconds for part in before.parts))


def test_what_does_not_fit_says_so_and_what_would() -> None:
    gradients = decoder(2, 64, "local")
    needed = Plan.of(gradients, with_gpu("h100", 400)).needed_bytes
    small = with_gpu("h100", 400, memory_gib=(needed - 1) / GIB)
    plan = Plan.of(gradients, small)
    assert not plan.fits
    assert plan.otherwise()["sharded"].fits
    assert Plan.of(gradients, dataclasses.replace(small, memory_bytes=needed)).fits


def test_measured_probes_become_a_machine() -> None:
    seconds = {FUSED: 28 * 8 * 2**20 / 60e9, COPY: 1e-3, ONE_SHARD: 4e-3, TWO_SHARDS: 6e-3}
    seconds[MANY_TENSORS] = seconds[TWO_SHARDS] + (NUM_TENSORS - 1) * 5e-6
    machine: Machine = machine_of(seconds, memory_bytes=GIB)
    assert machine.bytes_per_s == pytest.approx(60e9)
    latency = machine.latency
    assert latency.step_s == 4e-3
    assert latency.tensor_s == pytest.approx(5e-6)
    assert 4 * latency.hop_s + latency.shard_s == pytest.approx(2e-3)
    tiny = Deployment(spec=spec_of(params=model_of(256, "float32", 1)), num_shards=2, shards_per_node=2)
    assert Plan.of(tiny, machine).step_s == pytest.approx(6e-3, rel=0.01), "what was measured is foretold"
    assert machine_of({**seconds, TWO_SHARDS: 1e-3}).latency.hop_s == 0.0, "noise is not taken for a gain"


def test_command_plans_for_the_machine_that_it_measures(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    @contextlib.contextmanager
    def probes() -> Iterator[dict[str, Callable[[], object]]]:
        names = (FUSED, COPY, ONE_SHARD, TWO_SHARDS, MANY_TENSORS)
        yield {name: functools.partial(turns.append, name) for name in names}

    monkeypatch.setattr(measure, "probes", probes)
    run = cli("plan", "--here", "--params", "8e6", "--shards", "2", "--workers", "3", "--memory-gib", "3", "--json")
    assert run.code == 0, run.err
    fields = json.loads(run.out)
    assert turns[:6] == [FUSED, COPY, ONE_SHARD, TWO_SHARDS, MANY_TENSORS, FUSED], "they take turns"
    assert (fields["num_nodes"], fields["machine"]["memory_bytes"]) == (1, 3 * GIB)
    assert fields["machine"]["name"].startswith("this machine")
    assert fields["machine"]["bytes_per_s"] > 0


@pytest.mark.parametrize(("numel", "num_tensors"), [(1, None), (1_000_000, None), (70_000_000_000, None), (10, 3)])
def test_model_has_all_its_parameters(numel: int, num_tensors: int | None) -> None:
    params = model_of(numel, "bfloat16", num_tensors)
    assert sum(param.numel for param in params) == numel
    assert all(param.numel > 0 for param in params)
    if num_tensors is not None:
        assert len(params) == num_tensors


def test_command_prints_a_plan_that_is_readable_and_json(cli: Cli) -> None:
    sizes = ["--params", "70e9", "--rule", "prodigy", "--shards", "64", "--workers", "256"]
    command = ["plan", *sizes, "--network-gbps", "400", "--gpu", "h100"]
    readable = cli(*command, "--redundancy", "1", "--gradient-dtype", "bf16", "--workers-per-node", "8")
    assert readable.code == 0, readable.err
    for part in ("exp_avg_sq", "Bottleneck:", "It fits", "With local gradients:", "does not fit"):
        assert part in readable.out, part
    fields = json.loads(cli(*command, "--json").out)
    assert (fields["rule"], fields["numel"], fields["num_nodes"]) == ("Prodigy", 70_000_000_000, 32)
    assert fields["shard_bytes"]["exp_avg"] == pytest.approx(4 * 70e9 / 64, rel=0.02)
    assert fields["fits"] is True
    assert fields["otherwise"]["local"]["fits"] is False
    assert fields["calls_per_step"] == 64 * 256
    assert fields["bottleneck"] in {part["name"] for part in fields["parts"]}
    assert fields["step_s"] == pytest.approx(sum(part["seconds"] for part in fields["parts"]))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rule", "prodgy", "--gpu", "h100"], ["unknown rule 'prodgy'", "Did you mean Prodigy"]),
        (["--rule", "qqqq", "--gpu", "h100"], ["unknown rule 'qqqq'. This version knows Adam,"]),
        (["--gpu", "h10"], ["unknown GPU 'h10'", "h100", ", ".join(sorted(GPUS))]),
        (["--gpu", "h100", "--dtype", "floot32"], ["unknown dtype 'floot32'", "float32"]),
        (["--gpu", "h100", "--gradients", "sharted"], ["Did you mean sharded"]),
        (["--gpu", "h100", "--tensors", "9000000000"], ["tensors: expected 1 to 1000000"]),
        ([], ["memory-gib: expected", "--gpu NAME", "--here"]),
    ],
)
def test_command_names_what_may_have_been_meant(cli: Cli, arguments: list[str], parts: list[str]) -> None:
    cli("plan", "--params", "1e6", *arguments).require_error(*parts)
