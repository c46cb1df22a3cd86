"""A training job for `ray job submit`: it finds its service by name, or starts it, and goes on where that stands.

The service outlives the job. A second job with the same names resumes from it, or, if the service is gone, from the
last checkpoint in the run's folder; either way it ends with the parameters of one job that went through. Replace
``Net``, ``batch`` and the loss by your own; deploy/README.md has the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import sys
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup
from torch import Tensor, nn

import stepwell
from stepwell.sharding.errors import ServiceNotFoundError


@dataclasses.dataclass(frozen=True)
class Run:
    """What the job was told; `python train.py --help` says what it means."""

    service: str
    checkpoints: str
    steps: int
    horizon: int
    save_every: int
    keep_last: int
    workers: int
    gpus_per_worker: float
    shards: int
    cpus_per_shard: float
    gpus_per_shard: float


ROOM_TIMEOUT_S = 300.0
"""How long a job waits for room for its workers; shards have taken theirs by then."""


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))


def batch(step: int, rank: int) -> Tensor:
    """A rank's data of one step: a function of the step alone, so that a resumed run sees what it would have seen."""
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(step * 4099 + rank))


def find_or_launch(run: Run) -> stepwell.Service:
    """The service of this name, with the state that it has, or else that of the last checkpoint."""
    try:
        service = stepwell.connect(run.service)
        print(f"found service {run.service}")
    except ServiceNotFoundError:
        service = stepwell.launch(
            run.service,
            num_shards=run.shards,
            num_cpus_per_shard=run.cpus_per_shard,
            num_gpus_per_shard=run.gpus_per_shard,
        )
        print(f"started service {run.service}")
    # A job that died after it had launched the service left one without state: that counts as gone, too.
    if service.status()["rule"] is None and (saved := service.checkpoints(run.checkpoints)):
        service.restore(saved[-1].uri)
    return service


def reserve(run: Run) -> dict[str, Any]:
    """Room for all workers, given up when the job ends; without it those that have some would wait for the others."""
    each = {"CPU": 1.0, "GPU": run.gpus_per_worker}
    group = placement_group([{name: amount for name, amount in each.items() if amount}] * run.workers)
    try:
        ray.get(group.ready(), timeout=ROOM_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        sys.exit(f"no room for {run.workers} workers with {each} each within {ROOM_TIMEOUT_S:g} s; see `ray status`")
    return {"num_cpus": 1, "num_gpus": run.gpus_per_worker, "scheduling_strategy": InGroup(group)}


def train(run: Run, rank: int, first: int) -> str:
    """One worker, from step ``first`` on; what rank 0 has to say at the end. Rank 0 saves as it goes."""
    device = torch.device("cuda" if run.gpus_per_worker else "cpu")
    torch.manual_seed(rank)  # of the parameters rank 0's count, and those of the service once it has a job
    model = Net().to(device)
    opt = stepwell.Prodigy(
        model.parameters(), weight_decay=0.01, service=run.service, rank=rank, world_size=run.workers
    )
    loss = torch.tensor(math.nan)
    for step in range(first, run.steps):
        opt.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / run.horizon))
        inputs = batch(step, rank).to(device)
        loss = (model(inputs) - inputs.sin().sum(dim=1, keepdim=True)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if rank == 0 and ((step + 1) % run.save_every == 0 or step + 1 == run.steps):
            opt.service.save(run.checkpoints, keep_last=run.keep_last)
    digest = hashlib.sha256(b"".join(param.detach().cpu().numpy().tobytes() for param in model.parameters()))
    d = opt.param_groups[0]["d"]
    opt.close()
    return f"step {run.steps}  loss {loss.item():.6f}  d {d!r}  parameters {digest.hexdigest()[:16]}"


def parse() -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", required=True, help="its name in the cluster")
    parser.add_argument("--checkpoints", required=True, help="the run's folder: a path or URI that every node reaches")
    parser.add_argument("--steps", type=int, default=200, help="train until there were so many")
    parser.add_argument("--horizon", type=int, help="steps of the learning rate's schedule (default: --steps)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--keep-last", type=int, default=3, help="checkpoints that stay")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    parser.add_argument("--shards", type=int, default=2, help="of a service that has to be started")
    parser.add_argument("--cpus-per-shard", type=float, default=1)
    parser.add_argument("--gpus-per-shard", type=float, default=0)
    given = vars(parser.parse_args())
    return Run(**{**given, "horizon": given["horizon"] or given["steps"]})


def main() -> None:
    run = parse()
    ray.init(log_to_driver=False)  # the cluster that the job was submitted to
    first = find_or_launch(run).status()["step"]
    print(f"at step {first}", flush=True)
    if first < run.steps:
        worker = ray.remote(max_retries=0, **reserve(run))(train)
        print(ray.get([worker.remote(run, rank, first) for rank in range(run.workers)])[0])


if __name__ == "__main__":
    main()
