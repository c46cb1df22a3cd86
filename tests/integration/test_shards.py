"""Shards as Ray actors against the same shards in one process: equal to the bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import stepwell
from tests.integration.conftest import Launch
from tests.integration.training import Make, Trainer, assert_same_training
from tests.zoo import NUM_STEPS, straddling

SHORT = 60
OPTIONS: dict[Make, tuple[dict[str, Any], dict[str, Any]]] = {
    stepwell.Prodigy: ({"lr": 1.0, "weight_decay": 0.01}, {"lr": 0.5}),
    stepwell.AdamW: ({"lr": 1e-2}, {"lr": 3e-3, "weight_decay": 0.1}),
    stepwell.LAMB: ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3}),
    stepwell.NAdam: ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3}),
    stepwell.StableAdam: ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3}),
}


def train(make: Make, num_steps: int, **keywords: Any) -> Trainer:
    return Trainer(straddling(), make, options=OPTIONS[make], **keywords).run(num_steps)


@functools.cache
def in_one_process(make: Make, num_steps: int) -> Trainer:
    return train(make, num_steps, service="inprocess")


@pytest.mark.parametrize(
    ("make", "num_shards", "num_steps", "chunk_numel"),
    [
        (stepwell.Prodigy, 1, SHORT, None),
        (stepwell.Prodigy, 2, SHORT, 2**14),
        (stepwell.Prodigy, 3, NUM_STEPS, None),
        (stepwell.Prodigy, 5, SHORT, 2**16),
        (stepwell.AdamW, 2, NUM_STEPS, None),
        (stepwell.LAMB, 3, NUM_STEPS, None),
        (stepwell.NAdam, 2, SHORT, None),
        (stepwell.StableAdam, 3, SHORT, 2**12),
    ],
)
def test_ray_shards_give_the_bits_of_one_process(
    launch: Launch, make: Make, num_shards: int, num_steps: int, chunk_numel: int | None
) -> None:
    """With five shards and such large chunks some shards own nothing."""
    trained = train(make, num_steps, service=launch(num_shards, chunk_numel=chunk_numel))
    assert_same_training(trained, in_one_process(make, num_steps))
    trained.optimizer.close()
