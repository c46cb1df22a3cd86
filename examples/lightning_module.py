"""Lightning: configure_optimizers returns the optimizer and a schedule; the Trainer clips, saves and resumes.

Run it with ``python lightning_module.py``; then ``python lightning_module.py --resume`` goes on from half way.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stepwell

NUM_STEPS = 100


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        loss = (self.net(inputs) - targets).square().mean()
        d = self.optimizers().param_groups[0]["d"]
        self.log_dict({"loss": loss, "d": d})
        if self.global_step % 10 == 0:
            print(f"step {self.global_step:4d}  loss {loss.item()!r}  d {d!r}")
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        opt = stepwell.Prodigy(self.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=NUM_STEPS)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(resume: bool) -> None:
    lightning.seed_everything(0)
    inputs = torch.randn(512, 16)
    loader = DataLoader(TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True)), batch_size=32)
    trainer = lightning.Trainer(
        max_steps=NUM_STEPS,
        limit_train_batches=5,
        gradient_clip_val=10.0,  # Lightning clips, within the optimizer's closure
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint("lightning-out", filename="{step}", every_n_train_steps=50, save_top_k=-1)],
    )
    trainer.fit(Regression(), loader, ckpt_path="lightning-out/step=50.ckpt" if resume else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true", help="go on from lightning-out/step=50.ckpt")
    main(parser.parse_args().resume)
