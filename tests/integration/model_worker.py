"""A training process of several: ``python -m tests.integration.model_worker MODE RANK WORLD_SIZE FOLDER``.

Modes: ``fsdp2``, ``hsdp`` (two replicas), ``ddp``, ``ddp-local`` (its gradients taken for each rank's own), ``plain``.
The service is the one that ``$STEPWELL_SERVICE`` names. With one process it is the oracle of the others, in process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stepwell
from stepwell.client.holdings import local_part, whole_value

NUM_STEPS = 20
BATCH = 12


def make_net() -> nn.Sequential:
    """A network whose dimensions no number of ranks divides, with a parameter of fewer rows than ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 11), nn.Tanh(), nn.Linear(11, 1))


def batch(step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """A rank's part of the batch of a step."""
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))
    part = x.chunk(world_size)[rank]
    return part, part.sin().sum(dim=1, keepdim=True)


def wrap(mode: str, net: nn.Sequential, world_size: int) -> tuple[nn.Module, str | None]:
    """The model as this mode trains it, and what its gradients mean where that is not left to be detected."""
    if mode in ("fsdp2", "hsdp"):
        shape, names = (
            ((world_size,), ("shard",)) if mode == "fsdp2" else ((2, world_size // 2), ("replicate", "shard"))
        )
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (net[0], net[2], net[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        return net, None
    if mode.startswith("ddp"):
        return DistributedDataParallel(net), "local" if mode == "ddp-local" else None
    return net, None


def train(mode: str, rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train, change parameters by hand half way, add a group; everything that a test looks at."""
    rule = getattr(stepwell, options.pop("rule", "Prodigy"))
    dtype = getattr(torch, options.pop("dtype", "float32"))
    model, gradients = wrap(mode, make_net().to(dtype), world_size)
    goes_through_dcp, adds, overflows_at = options.pop("dcp", 0), options.pop("add", 0), options.pop("overflows_at", 0)
    scaler = stepwell.GradScaler("cpu", init_scale=1024.0, growth_interval=8, enabled=bool(overflows_at))
    later = [param for name, param in model.named_parameters() if adds and name.endswith("4.bias")]
    first = [(name, param) for name, param in model.named_parameters() if not any(param is each for each in later)]
    optimizer = rule(first, **{"gradients": gradients, **options})
    losses = []
    for step in range(NUM_STEPS):
        if step == 5 and later:
            optimizer.add_param_group({"params": [("4.bias", param) for param in later]})
        if step == 10:
            with torch.no_grad():
                local_part(first[0][1]).mul_(0.5)
        if step == 15 and goes_through_dcp:
            before = optimizer.service.status()["step"]
            state = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, optimizer, state)
            assert optimizer.service.status()["step"] == before, "none was taken to fill an empty state"
        x, y = (each.to(dtype) for each in batch(step, rank, world_size))
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        overflows = overflows_at == step > 0 and rank == world_size - 1
        scaler.scale(loss * torch.inf if overflows else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return {
        "losses": losses,
        "params": [whole_value(param.detach()).clone() for param in model.parameters()],
        "state": optimizer.state_dict()["state"],
        "scalars": {name: optimizer.param_groups[0][name] for name in optimizer.rule.initial_scalars(1)},
        "gradients": optimizer.gradients,
        "skipped": optimizer.num_skipped_steps,
        "scale": scaler.get_scale(),
    }


def migrate(mode: str, rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Begin with torch's own AdamW; half way, unless this is the oracle, go on with ours and torch's state dict."""
    model, _ = wrap(mode, make_net().double(), world_size)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **options)
    for step in range(NUM_STEPS):
        if step == 10 and mode != "plain":
            state_dict = optimizer.state_dict()
            optimizer = stepwell.AdamW(model.named_parameters())
            optimizer.load_state_dict(state_dict)
        x, y = (each.double() for each in batch(step, rank, world_size))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return {"params": [whole_value(param.detach()).clone() for param in model.parameters()]}


def main(mode: str, rank: int, world_size: int, folder: Path) -> None:
    """Train and leave the results in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    options = json.loads((folder / "options.json").read_text())
    results = (migrate if options.pop("migrate", 0) else train)(mode, rank, world_size, options)
    dist.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
