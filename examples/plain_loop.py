"""A plain PyTorch loop: Prodigy with a cosine schedule. The optimizer's state lives in this process.

Run it with ``python plain_loop.py``.
"""

from __future__ import annotations

import torch
from torch import nn

import stepwell

NUM_STEPS = 200


def main() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(512, 16)
    targets = inputs.sin().sum(dim=1, keepdim=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    opt = stepwell.Prodigy(model.parameters(), weight_decay=0.01)  # lr stays 1: Prodigy finds the step size, d
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=NUM_STEPS)
    for step in range(1, NUM_STEPS + 1):
        batch = torch.randint(len(inputs), (64,))
        loss = (model(inputs[batch]) - targets[batch]).square().mean()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
        opt.step()
        schedule.step()
        if step == 1 or step % 20 == 0:
            d, lr = opt.param_groups[0]["d"], schedule.get_last_lr()[0]
            print(f"step {step:4d}  loss {loss.item():.4f}  d {d:.2e}  lr {lr:.3f}")


if __name__ == "__main__":
    main()
