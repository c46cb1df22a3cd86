"""Memory: what the largest shard takes, what stands beside it on its host, and what a worker's buffers take."""

from __future__ import annotations

from ...optim import TILE_NUMEL, Rule
from ...sharding.buffers import MASTER
from ...sharding.layout import Layout
from .deployment import Deployment

TABLE_BYTES, DEVICE_TABLE_BYTES = 24, 16
"""Per tile: a shard's tables in its host's memory, and those of them that are on its GPU too."""

PROCESS_BYTES, DEVICE_PROCESS_BYTES = 150 * 2**20, 1024 * 2**20
"""What a shard's process takes whatever the model: of its host's memory, and of its GPU's."""


def slot_bytes(layout: Layout, rule: Rule, shard: int, num_shards: int) -> dict[str, int]:
    """Bytes of each slot on one shard, the master parameters first; their sum is the shard's ``size_bytes``."""
    found = {}
    for slot in (MASTER, *rule.slots):
        extents = ((len(extent.tile_range(shard, num_shards)), extent.dtype) for extent in layout.extents)
        found[slot.name] = sum(num_tiles * slot.width * slot.dtype(dtype).itemsize for num_tiles, dtype in extents)
    return found


def shard_bytes(plan: Deployment, *, is_gpu: bool) -> dict[str, int]:
    """What the largest shard takes of the memory that its state lies in, by what it is for."""
    found = slot_bytes(plan.layout, plan.spec.rule, plan.largest_shard, plan.num_shards)
    owned = [len(extent.tile_range(plan.largest_shard, plan.num_shards)) for extent in plan.layout.extents]
    held = sum(
        num_tiles * TILE_NUMEL * plan.gradient_itemsize(index) * plan.num_parts for index, num_tiles in enumerate(owned)
    )
    mean = sum(
        num_tiles * TILE_NUMEL * extent.dtype.itemsize
        for num_tiles, extent in zip(owned, plan.layout.extents, strict=True)
    )
    # On a GPU all of it is copied there; else what near workers push stays in their memory.
    found["gradients held"] = held if is_gpu else round(held * plan.far_share)
    found["their mean"] = mean if plan.is_written_out else 0
    found["tables"] = sum(owned) * (DEVICE_TABLE_BYTES if is_gpu else TABLE_BYTES)
    found["the process itself"] = DEVICE_PROCESS_BYTES if is_gpu else PROCESS_BYTES
    return found


def host_bytes(plan: Deployment, *, is_gpu: bool) -> dict[str, int]:
    """What a node's host memory has to hold beside what :func:`shard_bytes` says, for all that stand on the node."""
    shards, workers = min(plan.shards_per_node, plan.num_shards), min(plan.workers_per_node, plan.spec.world_size)
    state = sum(slot_bytes(plan.layout, plan.spec.rule, plan.largest_shard, plan.num_shards).values())
    through_store = 1.0 if is_gpu else plan.far_share
    to_shard = plan.gradient_bytes * plan.num_parts / plan.num_shards
    from_shard = plan.param_bytes * plan.num_parts / plan.num_shards
    return {
        "copies of the shards' state": 2 * plan.redundancy * state * shards,
        "gradients kept for lost shards": round(pushed_bytes(plan)) * workers * plan.log_steps * (plan.redundancy > 0),
        "the object store": round(through_store * (to_shard + from_shard) * shards),
        "the workers' buffers": 0 if is_gpu else worker_bytes(plan) * workers,
    }


def pushed_bytes(plan: Deployment) -> float:
    """What one worker pushes in a step, to all shards together."""
    return plan.gradient_bytes * plan.num_parts / plan.spec.world_size


def pulled_bytes(plan: Deployment) -> float:
    """What one worker gets back."""
    return plan.param_bytes * plan.num_parts / plan.spec.world_size


def worker_bytes(plan: Deployment) -> int:
    """A worker's buffers, beside its model and the gradients: what it pushes, and what it holds of the parameters."""
    held = plan.param_bytes if plan.spec.gradients != "sharded" else plan.param_bytes / plan.spec.world_size
    return round(pushed_bytes(plan) + held)
