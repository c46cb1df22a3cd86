"""Hugging Face's Trainer, given an optimizer and a schedule. A tiny GPT-2, made from a config: no downloads.

Run it with ``python hf_trainer.py``, and ``python hf_trainer.py --resume hf-out/checkpoint-40`` to go on from there.
"""

from __future__ import annotations

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import stepwell

NUM_STEPS = 80


def counting(num_rows: int, length: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Rows that count up from a random number: 5 6 7 8 ..."""
    starts = torch.randint(vocabulary, (num_rows, 1))
    rows = (starts + torch.arange(length)) % vocabulary
    return [{"input_ids": row, "labels": row} for row in rows]


def main(resume: str | None) -> None:
    # Before the optimizer: on several workers this starts torch.distributed, which tells the optimizer its rank.
    args = TrainingArguments(
        output_dir="hf-out",
        max_steps=NUM_STEPS,
        per_device_train_batch_size=16,
        max_grad_norm=1.0,  # the Trainer clips, before the optimizer steps; 0 turns it off
        logging_steps=8,
        save_steps=40,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    set_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config)
    opt = stepwell.Prodigy(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=NUM_STEPS)
    trainer = Trainer(model, args, train_dataset=counting(512, 16, 32), optimizers=(opt, schedule))
    trainer.train(resume_from_checkpoint=resume)  # reads the optimizer's state from the checkpoint's optimizer.pt
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']:4d}  loss {entry['loss']}  gradient norm {entry['grad_norm']}")
    print(f"d {opt.param_groups[0]['d']!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", help="a checkpoint folder of an earlier run")
    main(parser.parse_args().resume)
