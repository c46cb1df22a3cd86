"""Ray Train: two workers, and a service in the same Ray cluster that they find by its name and that outlives them.

Run it with ``python ray_train.py``; ``python ray_train.py --fail`` lets a worker fail once, to show the restart.
"""

from __future__ import annotations

import argparse
import math
import tempfile

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn

import stepwell
from stepwell.client import ray_train

NUM_STEPS = 60
SHARDS = {"num_shards": 2, "num_cpus_per_shard": 0.5}


def train(config: dict[str, bool]) -> None:
    """One worker. Ray Train has initialised torch.distributed, which tells the optimizer its rank."""
    service = ray_train.resume("trainer", ray.train.get_checkpoint(), **SHARDS)
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(rank)
    inputs = torch.randn(256, 16)  # each worker has data of its own
    targets = inputs.sin().sum(dim=1, keepdim=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))  # no DDP: the service averages
    opt = stepwell.Prodigy(model.parameters(), weight_decay=0.01, service=service)
    first = opt.num_steps  # 0, or where the checkpoint was made
    for step in range(first, NUM_STEPS):
        if config["fail"] and first == 0 and step == 30 and rank == 1:
            raise RuntimeError("this worker fails, as it was told to")
        opt.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        loss = (model(inputs) - targets).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if (step + 1) % 20 == 0:
            ray_train.report(opt, {"step": step + 1, "loss": loss.item(), "d": opt.param_groups[0]["d"]})
    opt.close()


def main(fail: bool) -> None:
    # A small Ray on this machine alone; on a cluster call ray.init() and take a storage_path that every node reaches.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.2")
    with stepwell.launch("trainer", **SHARDS) as service:
        trainer = TorchTrainer(
            train,
            train_loop_config={"fail": fail},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(
                storage_path=tempfile.mkdtemp(), failure_config=ray.train.FailureConfig(max_failures=1)
            ),
        )
        for _, metrics in trainer.fit().best_checkpoints:
            print(f"step {metrics['step']:4d}  loss {metrics['loss']!r}  d {metrics['d']!r}")
        status = service.status()
        print(f"the service stands at step {status['step']} of timeline {status['timeline']}")
    ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fail", action="store_true", help="let a worker fail once")
    main(parser.parse_args().fail)
