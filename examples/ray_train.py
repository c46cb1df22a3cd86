"""Ray Train: two workers, and a service in the same Ray cluster that they find by its name and that outlives them.

Run it with ``python ray_train.py``; ``python ray_train.py --fail`` lets a worker fail once, to show the restart.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn

import stepwell

NUM_STEPS = 60


def train(config: dict[str, object]) -> None:
    """One worker. Ray Train has initialised torch.distributed, which tells the optimizer its rank."""
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(rank)
    inputs = torch.randn(256, 16)  # each worker has data of its own
    targets = inputs.sin().sum(dim=1, keepdim=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))  # no DDP: the service averages
    opt = stepwell.Prodigy(model.parameters(), weight_decay=0.01, service=config["service"])
    first = 0
    if checkpoint := ray.train.get_checkpoint():  # the workers were restarted: the service went on, so take it back
        with checkpoint.as_directory() as folder:
            saved = json.loads(Path(folder, "service.json").read_text())
        if rank == 0:
            opt.service.restore(saved["uri"])
        torch.distributed.barrier()
        opt.refresh()
        first = saved["step"]
    for step in range(first, NUM_STEPS):
        if config["fail"] and first == 0 and step == 30 and rank == 1:
            raise RuntimeError("this worker fails, as it was told to")
        opt.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        loss = (model(inputs) - targets).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if (step + 1) % 20 == 0:
            report(opt, config, rank, step + 1, loss.item())
    opt.close()


def report(opt: stepwell.Prodigy, config: dict[str, object], rank: int, step: int, loss: float) -> None:
    """The service writes the checkpoint; Train's own holds where it lies. Every worker calls this after ``step``."""
    metrics = {"step": step, "loss": loss, "d": opt.param_groups[0]["d"]}
    torch.distributed.barrier()
    if rank != 0:
        ray.train.report(metrics)
        return
    uri = f"{config['folder']}/step-{step}"
    opt.service.save(uri)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "service.json").write_text(json.dumps({"uri": uri, "step": step}))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main(fail: bool) -> None:
    # A small Ray on this machine alone; on a cluster call ray.init() and take folders that every node reaches.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.2")
    with stepwell.launch("trainer", num_shards=2, num_cpus_per_shard=0.5) as service:
        trainer = TorchTrainer(
            train,
            train_loop_config={"service": service.name, "folder": tempfile.mkdtemp(), "fail": fail},
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
