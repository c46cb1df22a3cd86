"""Prodigy's d under FSDP2: prodigyopt's, each rank's own, beside the service's and that of one process.

Not a matter of speed: every rank of prodigyopt sees its part of the sums alone, so that each estimates a d of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import prodigyopt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stepwell

BATCH = 24


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


def run_rank(rank: int, world_size: int, num_steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    net = shard(world_size)
    theirs = train(net, prodigyopt.Prodigy(net.parameters(), d0=1e-4), num_steps, rank, world_size)
    net = shard(world_size)
    optimizer = stepwell.Prodigy(net.parameters(), d0=1e-4)
    ours = train(net, optimizer, num_steps, rank, world_size)
    (Path(folder) / str(rank)).write_text(f"{theirs} {ours}")
    dist.barrier()
    optimizer.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    net = make_net()
    alone = train(net, prodigyopt.Prodigy(net.parameters(), d0=1e-4), arguments.steps)
    with tempfile.TemporaryDirectory(prefix="stepwell-bench-") as folder:
        mp.spawn(run_rank, (arguments.ranks, arguments.steps, folder), nprocs=arguments.ranks)
        found = [[float(d) for d in (Path(folder) / str(rank)).read_text().split()] for rank in range(arguments.ranks)]
    print(f"d after {arguments.steps} steps, {arguments.ranks} ranks under FSDP2; over that of one process")
    print(f"{'prodigyopt, one process':26s} {alone:.6f}")
    for index, name in enumerate(("prodigyopt", "stepwell.Prodigy")):
        for rank, values in enumerate(found):
            print(f"{name + f', rank {rank}':26s} {values[index]:.6f}  {values[index] / alone:.6f}")


if __name__ == "__main__":
    main()
