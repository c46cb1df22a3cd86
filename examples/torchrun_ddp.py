"""DistributedDataParallel: it averages the gradients, so the service takes them as equal on all workers.

Run it with ``torchrun --nproc-per-node 2 torchrun_ddp.py``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import stepwell

NUM_STEPS = 60


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    inputs = torch.randn(256, 16)  # each worker has data of its own
    targets = inputs.sin().sum(dim=1, keepdim=True)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    model = DistributedDataParallel(net)
    opt = stepwell.Prodigy(model.named_parameters(), weight_decay=0.01, gradients="replicated")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=NUM_STEPS)
    for step in range(1, NUM_STEPS + 1):
        loss = (model(inputs) - targets).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if dist.get_rank() == 0 and (step == 1 or step % 10 == 0):
            print(f"step {step:4d}  loss {loss.item():.4f}  d {opt.param_groups[0]['d']:.2e}")
    opt.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
