"""How long a step takes, part by part, and what goes over each link in it."""

from __future__ import annotations

import dataclasses

from ...optim import TILE_NUMEL
from .deployment import Deployment
from .machines import Machine
from .memory import pulled_bytes, pushed_bytes, slot_bytes
from .traffic import GRADIENT, PassTraffic, passes_of

PASS_REACHED = 0.85
"""Of fused AdamW's bandwidth, by the shards' passes in a service."""

VOTE_COLUMNS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class LinkLoad:
    """Bytes over one link in a step."""

    name: str
    out_bytes: int
    in_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a step's time; the parts come one after the other."""

    name: str
    seconds: float


def link_loads(plan: Deployment) -> tuple[LinkLoad, ...]:
    """What each link has to carry; of those there are many of, one."""
    shards, workers = min(plan.shards_per_node, plan.num_shards), min(plan.workers_per_node, plan.spec.world_size)
    pushed, pulled, far = pushed_bytes(plan), pulled_bytes(plan), plan.far_share
    to_shard, from_shard = (each * plan.spec.world_size / plan.num_shards for each in (pushed, pulled))
    reduced = 2 * (plan.num_shards - 1) / plan.num_shards * sum(reduction_bytes(plan))
    gathered = _gathered_bytes(plan)
    return (
        LinkLoad("a worker and its shards", round(pushed), round(pulled)),
        LinkLoad("a shard and its workers", round(from_shard), round(to_shard)),
        LinkLoad("a shard and its neighbours, to reduce", round(reduced), round(reduced)),
        LinkLoad("a node's network, gradients", round(workers * pushed * far), round(shards * to_shard * far)),
        LinkLoad("a node's network, parameters", round(shards * from_shard * far), round(workers * pulled * far)),
        LinkLoad("a node's network, among replicas", round(gathered), round(gathered)),
    )


def _gathered_bytes(plan: Deployment) -> float:
    """What replicas on one node get of the parameters from those on others."""
    return plan.param_bytes * (1 - 1 / plan.num_nodes) if plan.spec.gradients == "replicated" else 0.0


def reduction_bytes(plan: Deployment) -> tuple[int, ...]:
    """The vectors that are summed over shards: the vote with the squares' places, and the rule's partials."""
    vote = (plan.num_shards * VOTE_COLUMNS + plan.tables.squares.num_segments) * 8
    return (vote, plan.num_sums * plan.tables.sums.num_segments * 8) if plan.num_sums else (vote,)


def parts_of(plan: Deployment, machine: Machine) -> tuple[Part, ...]:
    """A step's parts, in order."""
    latency = machine.latency
    hops = 2 * (plan.num_shards - 1) * latency.hop_s
    reductions = [hops + size / machine.network_bytes_per_s * 2 for size in reduction_bytes(plan)]
    passes = [Part(f"pass: {name}", seconds) for name, seconds in _pass_seconds(plan, machine)]
    parts = [
        Part("gradients into the flat buffer", _gather_seconds(plan, machine)),
        *_travel("gradients", pushed_bytes(plan), plan, machine),
        Part("calls, threads and Python", _call_seconds(plan, machine)),
        Part("all-reduce: the vote", reductions[0]),
        *passes,
        *_travel("parameters", pulled_bytes(plan), plan, machine),
        Part("parameters among replicas", _gathered_bytes(plan) / machine.network_bytes_per_s),
        Part("logs and copies", _redundancy_seconds(plan, machine)),
    ]
    if plan.num_sums:
        at = next(index for index, part in enumerate(parts) if part.name.startswith("pass: local")) + 1
        parts.insert(at, Part("all-reduce: the partials", reductions[1]))
    return tuple(parts)


def _share_of_node(plan: Deployment, machine: Machine) -> float:
    """The bandwidth of one shard's memory: a GPU's own, or its part of the node's."""
    return machine.bytes_per_s / (1 if machine.is_gpu else min(plan.shards_per_node, plan.num_shards))


def _pass_seconds(plan: Deployment, machine: Machine) -> list[tuple[str, float]]:
    bandwidth = PASS_REACHED * _share_of_node(plan, machine)
    passes = passes_of(plan.spec.rule)
    found = [(each.name, sum(_pass_bytes(plan, machine, each)) / bandwidth) for each in passes]
    if plan.is_written_out:
        mean = sum(
            numel * (plan.num_parts * plan.gradient_itemsize(index) + (1 if machine.is_gpu else 2) * itemsize)
            for index, numel, itemsize in _owned(plan)
        )
        found.insert(0, ("the gradient", mean / bandwidth))
    return found


def _pass_bytes(plan: Deployment, machine: Machine, each: PassTraffic) -> list[float]:
    """What one pass moves, extent by extent."""
    found = []
    for index, numel, itemsize in _owned(plan):
        dtype = plan.layout.extents[index].dtype
        per_element = each.size_bytes(plan.spec.rule, dtype, writes_cost_twice=not machine.is_gpu)
        if GRADIENT in each.reads:
            is_mean = plan.is_written_out
            per_element += itemsize if is_mean else plan.num_parts * plan.gradient_itemsize(index)
        if each.has_params and not machine.is_gpu:
            # Into the near workers' memory; a line is read before it is written.
            per_element += 2 * plan.num_parts * (1 - plan.far_share) * plan.param_itemsize(index)
        found.append(numel * per_element)
    return found


def _owned(plan: Deployment) -> list[tuple[int, int, int]]:
    """Per extent of the largest shard: its index, elements, and bytes of an element of the state."""
    return [
        (index, len(extent.tile_range(plan.largest_shard, plan.num_shards)) * TILE_NUMEL, extent.dtype.itemsize)
        for index, extent in enumerate(plan.layout.extents)
    ]


def _gather_seconds(plan: Deployment, machine: Machine) -> float:
    """A read of what backward left and a write of what is pushed; on a CPU by all workers of a node together."""
    if plan.overlap:
        return 0.0
    from_model = plan.param_bytes * plan.num_parts / plan.spec.world_size
    if machine.is_gpu:
        return (from_model + pushed_bytes(plan)) / machine.bytes_per_s
    workers = min(plan.workers_per_node, plan.spec.world_size)
    return workers * (from_model + 2 * pushed_bytes(plan)) / machine.host_bytes_per_s


def _travel(what: str, of_worker: float, plan: Deployment, machine: Machine) -> list[Part]:
    """Between workers and shards that share no memory: GPU, object store and network, each after the other.

    Args:
        what: What travels.
        of_worker: Bytes that one worker sends or gets.
        plan: The deployment.
        machine: Its machines.
    """
    of_shard = of_worker * plan.spec.world_size / plan.num_shards
    busiest = max(of_worker, of_shard)
    shards, workers = min(plan.shards_per_node, plan.num_shards), min(plan.workers_per_node, plan.spec.world_size)
    of_node = max(workers * of_worker, shards * of_shard) * plan.far_share
    through_store = 1.0 if machine.is_gpu else plan.far_share
    return [
        Part(f"{what}: between GPU and host", busiest / machine.link_bytes_per_s if machine.is_gpu else 0.0),
        Part(f"{what}: Ray's object store", through_store * busiest / machine.store_bytes_per_s),
        Part(f"{what}: the network", of_node / machine.network_bytes_per_s),
    ]


def _call_seconds(plan: Deployment, machine: Machine) -> float:
    latency = machine.latency
    further = (plan.num_shards - 1) * latency.shard_s + (plan.spec.world_size - 1) * latency.worker_s
    return latency.step_s + further + len(plan.spec.params) * latency.tensor_s


def _redundancy_seconds(plan: Deployment, machine: Machine) -> float:
    """The keeper is told of each step; every half a log the state is copied, beside the steps' own traffic."""
    if not plan.redundancy:
        return 0.0
    state = sum(slot_bytes(plan.layout, plan.spec.rule, plan.largest_shard, plan.num_shards).values())
    shards = min(plan.shards_per_node, plan.num_shards)
    bandwidth = machine.link_bytes_per_s if machine.is_gpu else machine.host_bytes_per_s / shards
    moved = plan.redundancy * state * (1 if machine.is_gpu else 3) / max(1, plan.log_steps // 2)
    return machine.latency.keeper_s + moved / bandwidth
