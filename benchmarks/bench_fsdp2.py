"""Prodigy's d under FSDP2: prodigyopt's, each rank's own, beside the service's and that of one process.

Not a matter of speed: every rank of prodigyopt sees its part of the sums alone, so that each estimates a d of its own.
"""

from __future__ import annotations

import prodigyopt
import torch
import torch.distributed as dist
from harness import Row, main, tell
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stepwell

BATCH = 24
TIMEOUT_S = 120.0


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 16))


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, rank: int = 0, world_size: int = 1
) -> float:
    """Train on a rank's part of every batch; the last d."""
    for step in range(num_steps):
        x = torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
        optimizer.zero_grad()
        (net(x) - x[:, :16].sin()).square().mean().backward()
        optimizer.step()
    return float(optimizer.param_groups[0]["d"])


def shard(world_size: int) -> nn.Sequential:
    net, mesh = make_net(), init_device_mesh("cpu", (world_size,))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def run_rank(rank: int, world_size: int, num_steps: int, alone: float) -> list[Row]:
    net = shard(world_size)
    theirs = train(net, prodigyopt.Prodigy(net.parameters(), d0=1e-4), num_steps, rank, world_size)
    net = shard(world_size)
    optimizer = stepwell.Prodigy(net.parameters(), d0=1e-4)
    ours = train(net, optimizer, num_steps, rank, world_size)
    found: list[tuple[float, float]] = [(0.0, 0.0)] * world_size
    dist.all_gather_object(found, (ours, theirs))
    optimizer.close()
    return [
        Row(
            name=f"d on rank {each} after {num_steps} steps, beside that of one process",
            ours=(ours / alone - 1.0) * 1e6,
            theirs=(theirs / alone - 1.0) * 1e6,
            unit="millionths off",
            against="prodigyopt",
            section=f"FSDP2, {world_size} ranks",
            key=f"fsdp2/rank {each}",
        )
        for each, (ours, theirs) in enumerate(found)
    ]


def rows(quick: bool) -> list[Row]:
    """Each rank's d after training, prodigyopt's and the service's, beside that of one process."""
    num_steps, world_size = (8, 2) if quick else (60, 2)
    tell(f"d under FSDP2, {world_size} ranks")
    net = make_net()
    alone = train(net, prodigyopt.Prodigy(net.parameters(), d0=1e-4), num_steps)
    return run_ranks(run_rank, world_size, num_steps, alone, timeout_s=TIMEOUT_S)


if __name__ == "__main__":
    main(rows, __doc__)
