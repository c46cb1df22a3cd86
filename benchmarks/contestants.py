"""Who takes part in the races: Stepwell's optimizers, and what a user would pick instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from harness import Contestant, cores, tell
from torch import Tensor

import stepwell

FUSED, COPY = "torch AdamW, fused", "a copy"

ADAMW_BYTES, COPY_BYTES = 28, 8
STEP_BYTES = {"Prodigy": 52, 'Prodigy, eps_d="old"': 40, "AdamW": ADAMW_BYTES}
"""Per parameter: p, g and the slots read once in each pass that needs them, and written once where they change."""
MODEL_COPY_BYTES = 4
"""What a service writes beside its own parameters: those of a float32 model."""

GROWTH_RATE = 1.02
"""Both sides' limit on how fast d rises, so that it stays finite over many steps along one and the same gradient."""

MAX_COPIED = 32_000_000
"""Elements that the copy copies: more than any cache holds, and no more memory than that takes."""
WORKER_TIMEOUT_S = 120.0


class Workload:
    """A model's parameters, as often as they are asked for, and one set of gradients for all of these.

    Args:
        shapes: Shapes of its parameters.
        seed: Seed of the values.
        dtype: Of parameters and gradients.
        device: Where all of it lies.

    Attributes:
        grads: One gradient per parameter, which nobody may change.
        numel: Parameters in all.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pattern = (torch.randn(2**20 + 7, generator=generator) * 0.02).to(device, dtype)
        self.shapes, self.numel = list(shapes), sum(shape.numel() for shape in shapes)
        self.grads = [self._fill(shape) for shape in self.shapes]

    def params(self, *, with_grads: bool) -> list[torch.nn.Parameter]:
        """Parameters of their own, with the gradients given or without any."""
        params = [torch.nn.Parameter(self._fill(shape)) for shape in self.shapes]
        if with_grads:
            for param, grad in zip(params, self.grads, strict=True):
                param.grad = grad
        return params

    def backward(self, params: Sequence[Tensor]) -> None:
        """Put gradients on ``params`` as a model's backward does, one after the other, at little cost."""
        loss_of(params, self.grads).backward()  # type: ignore[no-untyped-call]

    def _fill(self, shape: torch.Size) -> Tensor:
        num_copies = -(-shape.numel() // self._pattern.numel())
        return self._pattern.repeat(num_copies)[: shape.numel()].clone().reshape(shape)


def loss_of(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """A loss with the given gradients: the sum of p * g."""
    dots = [torch.dot(param.reshape(-1), grad.reshape(-1)) for param, grad in zip(params, grads, strict=True)]
    return torch.stack(dots).sum()


def layered(numel: int) -> list[torch.Size]:
    """Shapes like a transformer's layers, ``numel`` parameters in all."""
    width = 1024 if numel >= 16_000_000 else 256
    block = [(width, width), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    shapes: list[torch.Size] = []
    left = numel
    while left > 0:
        for shape in map(torch.Size, block):
            if left > 0:
                shapes.append(shape if shape.numel() <= left else torch.Size((left,)))
                left -= shapes[-1].numel()
    return shapes


def lora(num_tensors: int = 600) -> list[torch.Size]:
    """Many small tensors of about 7,000 elements, as low-rank adapters have."""
    return [torch.Size((437, 16)), torch.Size((16, 438))] * (num_tensors // 2)


def yardsticks(workload: Workload) -> list[Contestant]:
    """The machine's own bandwidth: torch's fused AdamW over the same parameters, and a plain copy."""
    fused = torch.optim.AdamW(workload.params(with_grads=True), fused=True)
    source = torch.ones(min(workload.numel, MAX_COPIED))
    target = torch.zeros_like(source)
    return [
        Contestant(FUSED, fused.step, ADAMW_BYTES * workload.numel),
        Contestant(COPY, lambda: target.copy_(source), COPY_BYTES * source.numel()),
    ]


def backward_of(workload: Workload, params: Sequence[Tensor]) -> Callable[[], None]:
    """Fresh gradients, by a backward whose hooks run."""

    def run() -> None:
        for param in params:
            param.grad = None
        workload.backward(params)

    return run


def behind_backward(
    workload: Workload, params: Sequence[Tensor], optimizer: torch.optim.Optimizer | None
) -> Callable[[], None]:
    """A training step: backward, the optimizer's step if there is one, gradients dropped."""

    def iteration() -> None:
        workload.backward(params)
        if optimizer is not None:
            optimizer.step()
        for param in params:
            param.grad = None

    return iteration


def ours(rule: str, params: list[torch.nn.Parameter], **options: Any) -> stepwell.ServiceOptimizer:
    """One of Stepwell's optimizers, by the name of its figures."""
    options.setdefault("service", "inprocess")
    if rule == "AdamW":
        return stepwell.AdamW(params, **options)
    if rule.startswith("Prodigy"):
        eps_d: Literal["new", "old"] = "old" if "old" in rule else "new"
        return stepwell.Prodigy(params, growth_rate=GROWTH_RATE, eps_d=eps_d, **options)
    raise ValueError(f"rule: expected one of {sorted(STEP_BYTES)}, got {rule!r}")


@contextlib.contextmanager
def ray_of_its_own() -> Iterator[None]:
    """One Ray on this machine for all services of a benchmark; it ends with the block, or with the process."""
    import ray  # not where there is none

    from stepwell.server import cluster

    tell("starting Ray")
    cluster.start_embedded(num_cpus=cores())
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def service_of(
    num_shards: int, *, redundancy: int = 0, num_gpus_per_shard: float = 0, num_threads: int | None = None
) -> Iterator[stepwell.Service]:
    """A service whose shards have ``num_threads`` each; None: as many together as there are cores, and at least one."""
    if num_threads is None:
        num_threads = max(1, cores() // num_shards)
    service = stepwell.launch(
        num_shards=num_shards,
        # A shard without a CPU of its own has one thread; Ray would start a process in stock for every CPU.
        num_cpus_per_shard=num_threads if num_threads > 1 else 0,
        worker_timeout_s=WORKER_TIMEOUT_S,
        redundancy=redundancy,
        num_gpus_per_shard=num_gpus_per_shard,
    )
    try:
        yield service
    finally:
        service.shutdown()
