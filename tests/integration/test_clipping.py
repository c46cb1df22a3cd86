"""Clipping and a gradient scaler with workers and shards that are processes of their own."""

from __future__ import annotations

import math

import torch

import stepwell
from stepwell.optim import ProdigyRule
from tests.integration.conftest import Launch
from tests.integration.training import D0, Trainer, make_workers, on_all, small_in_order
from tests.zoo import Run, assert_same_tensors, cosine

LIMITS = {"max_grad_norm": 4.0, "max_grad_value": 1.5}
BAD_STEP = 3


def test_scaled_and_clipped_steps_are_those_of_one_process(launch: Launch) -> None:
    """On three shards, with a gradient that overflows on one of two ranks; a scale of two to some power is exact."""
    workers = make_workers(launch(3), 2, **LIMITS)
    scalers = [stepwell.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in workers]
    oracle = Run(small_in_order(), ProdigyRule(d0=D0), world_size=2, rank_0=LIMITS)

    def step(worker: Trainer) -> tuple[float | None, bool, int, float]:
        scaler = scalers[worker.rank]
        worker.set_gradients()
        for param in worker.params:
            if param.grad is not None:
                param.grad.mul_(scaler.scale(torch.ones(())))
                if worker.step == BAD_STEP and worker.rank == 1:
                    param.grad.view(-1)[-1] = math.inf
        scaler.step(worker.optimizer)
        scaler.update()
        worker.step += 1
        optimizer = worker.optimizer
        return optimizer.grad_norm, optimizer.step_was_skipped, optimizer.num_skipped_steps, scaler.get_scale()

    scales = [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]
    for number, scale in enumerate(scales):
        first, second = on_all(workers, step)
        cosine(oracle.groups, number)
        is_bad = number == BAD_STEP
        results = [oracle.group.push(oracle.pushes(rank, found_inf=is_bad and rank == 1)) for rank in range(2)]
        assert results[1] is not None
        assert results[1].grad_norm is not None
        assert results[1].grad_norm > LIMITS["max_grad_norm"], "else nothing is clipped"
        assert first[1:] == second[1:] == (is_bad, int(number >= BAD_STEP), scale)
        assert first[0] == second[0]
        assert is_bad or first[0] == results[1].grad_norm
        for worker in workers:
            assert_same_tensors(worker.params, oracle.params(), "parameter")
