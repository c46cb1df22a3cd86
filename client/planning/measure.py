"""What this machine is capable of: its memory's bandwidth, and what a step takes whatever its size."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ...server.service import launch
from ...sharding.available import available_bytes
from ..optimizers import Prodigy
from .machines import STORE_BYTES_PER_S, Latency, Machine

FUSED, COPY = "torch AdamW, fused", "a copy"
ONE_SHARD, TWO_SHARDS, MANY_TENSORS = "one tensor, 1 shard", "one tensor, 2 shards", "many tensors, 2 shards"

NUMEL = 8 * 2**20
"""Elements that the yardsticks go over: more than a cache holds."""
ADAMW_BYTES, COPY_BYTES = 28, 8
STEP_NUMEL, NUM_TENSORS = 2**16, 256
"""Elements of a step over next to nothing, of which each shard has some; and tensors that have as many together."""
NUM_WARM_UPS, NUM_ROUNDS = 3, 25
PAUSE_S = 0.002
"""Before each turn: threads that still spin for the last loop give up meanwhile."""


@contextlib.contextmanager
def probes() -> Iterator[dict[str, Callable[[], object]]]:
    """What is timed, by name; its services run in a Ray of this process's own, unless it is in one."""
    with contextlib.ExitStack() as stack:
        found = _yardsticks()
        for name, num_shards, num_tensors in ((ONE_SHARD, 1, 1), (TWO_SHARDS, 2, 1), (MANY_TENSORS, 2, NUM_TENSORS)):
            found[name] = stack.enter_context(_stepping(num_shards, num_tensors))
        yield found


def _yardsticks() -> dict[str, Callable[[], object]]:
    param = torch.nn.Parameter(torch.ones(NUMEL))
    param.grad = torch.ones(NUMEL)
    source, target = torch.ones(NUMEL), torch.zeros(NUMEL)
    return {FUSED: torch.optim.AdamW([param], fused=True).step, COPY: lambda: target.copy_(source)}


@contextlib.contextmanager
def _stepping(num_shards: int, num_tensors: int) -> Iterator[Callable[[], object]]:
    """Steps of Prodigy, with both reductions, over next to nothing."""
    # A shard without a CPU of its own has one thread, as each has where there are as many shards as cores.
    service = launch(num_shards=num_shards, num_cpus_per_shard=0, redundancy=0)
    try:
        params = [torch.nn.Parameter(torch.ones(STEP_NUMEL // num_tensors)) for _ in range(num_tensors)]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizer = Prodigy(params, service=service, growth_rate=1.02)
        try:
            yield optimizer.step
        finally:
            optimizer.close()
    finally:
        service.shutdown()


def measure() -> dict[str, float]:
    """Median seconds of each probe; they take turns."""
    with probes() as found:
        times: dict[str, list[float]] = {name: [] for name in found}
        for number in range(NUM_WARM_UPS + NUM_ROUNDS):
            for name, step in found.items():
                taken_s = _timed(step)
                if number >= NUM_WARM_UPS:
                    times[name].append(taken_s)
    return {name: statistics.median(each) for name, each in times.items()}


def _timed(step: Callable[[], Any]) -> float:
    time.sleep(PAUSE_S)
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def machine_of(seconds: Mapping[str, float], *, memory_bytes: int | None = None) -> Machine:
    """The machine on which the probes took so long.

    Args:
        seconds: By the probes' names.
        memory_bytes: What one shard may take; None for what is free now.
    """
    bytes_per_s = ADAMW_BYTES * NUMEL / seconds[FUSED]
    assumed = Latency()
    around_s = max(seconds[TWO_SHARDS] - seconds[ONE_SHARD] - assumed.shard_s, 0.0)
    latency = dataclasses.replace(
        assumed,
        step_s=seconds[ONE_SHARD],
        hop_s=around_s / 4,  # two reductions, which go around twice
        tensor_s=max(seconds[MANY_TENSORS] - seconds[TWO_SHARDS], 0.0) / (NUM_TENSORS - 1),
    )
    return Machine(
        name=f"this machine, {len(os.sched_getaffinity(0))} cores",
        memory_bytes=available_bytes() if memory_bytes is None else memory_bytes,
        bytes_per_s=bytes_per_s,
        host_bytes_per_s=bytes_per_s,
        is_gpu=False,
        link_bytes_per_s=float("inf"),
        network_bytes_per_s=STORE_BYTES_PER_S,
        store_bytes_per_s=STORE_BYTES_PER_S,
        latency=latency,
    )
