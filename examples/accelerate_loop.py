"""Hugging Face Accelerate: prepare, gradient accumulation, clipping, and its own checkpoints.

Run it with ``python accelerate_loop.py``; then ``python accelerate_loop.py --resume`` goes on from half way.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stepwell

NUM_EPOCHS = 10


def main(resume: bool) -> None:
    data = DataLoaderConfiguration(use_seedable_sampler=True)  # the epoch decides the order, in a resumed run too
    # Before the optimizer: on several workers this starts torch.distributed, which tells the optimizer its rank.
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=data)
    set_seed(0)
    inputs = torch.randn(512, 16)
    loader = DataLoader(TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True)), batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    opt = stepwell.Prodigy(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=NUM_EPOCHS * len(loader) // 2)
    model, opt, schedule, loader = accelerator.prepare(model, opt, schedule, loader)

    first = 0
    if resume:
        accelerator.load_state("accelerate-out/half-way")
        first = NUM_EPOCHS // 2
    for epoch in range(first, NUM_EPOCHS):
        loader.set_epoch(epoch)
        for batch, target in loader:
            with accelerator.accumulate(model):
                loss = (model(batch) - target).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm=10.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
        d = opt.param_groups[0]["d"]
        accelerator.print(f"epoch {epoch + 1:3d}  loss {loss.item()!r}  d {d!r}  lr {schedule.get_last_lr()[0]:.3f}")
        if epoch + 1 == NUM_EPOCHS // 2:
            accelerator.save_state("accelerate-out/half-way")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true", help="go on from accelerate-out/half-way")
    main(parser.parse_args().resume)
