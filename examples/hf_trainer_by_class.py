"""Hugging Face's Trainer, given an optimizer's class: it makes the optimizer and the schedule from its arguments.

Run it with ``python hf_trainer_by_class.py``. TrainingArguments' ``optim`` takes names of its own list only.
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import stepwell


def counting(num_rows: int, length: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Rows that count up from a random number: 5 6 7 8 ..."""
    starts = torch.randint(vocabulary, (num_rows, 1))
    rows = (starts + torch.arange(length)) % vocabulary
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    args = TrainingArguments(
        output_dir="hf-out",
        max_steps=80,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        weight_decay=0.01,  # for all parameters but biases and layer norms: two parameter groups
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    set_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    prodigy = {"lr": 1.0, "safeguard_warmup": True}  # learning_rate above is not looked at
    trainer = Trainer(
        GPT2LMHeadModel(config),
        args,
        train_dataset=counting(512, 16, 32),
        optimizer_cls_and_kwargs=(stepwell.Prodigy, prodigy),
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']:4d}  loss {entry['loss']:.4f}  lr {entry['learning_rate']:.3f}")


if __name__ == "__main__":
    main()
