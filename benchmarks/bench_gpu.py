"""One optimizer step on a GPU, model and shard in one process, beside what a user would pick instead; and services.

The gradient is given: hooks have looked at ours, or copied it, within a backward that is not timed; what is too small
for hooks is copied in the step. A turn begins when the GPU has nothing left to do and ends when it has done all of the
step, so that Python's part counts where the GPU waits for it. The yardstick is a copy of 2 GiB on the same GPU, bytes
read and written together; the bytes of a step are those of the step on CPUs (bench_step.py). Where there is no GPU
nothing is measured, and what another machine has found stays: ``run.py --take`` brings it in.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Sequence

import torch
from bench_step import OLD, PRODIGYOPT, THEIRS
from contestants import (
    COPY,
    FUSED,
    MODEL_COPY_BYTES,
    STEP_BYTES,
    Workload,
    backward_of,
    layered,
    lora,
    ours,
    ray_of_its_own,
    service_of,
)
from harness import Contestant, Race, Row, cores, main, race, tell

COPIED_BYTES = 2**31

FIELDS = (("Prodigy", PRODIGYOPT), (OLD, PRODIGYOPT), ("AdamW", FUSED))
"""Of ours each beside one other, as memory has no room for all of them at a time."""


def llama(num_layers: int) -> list[torch.Size]:
    """Shapes like those of Llama 3.2 1B, which has 16 layers: tied embeddings, grouped queries, gated MLPs."""
    width, hidden, keys = 2048, 8192, 512
    layer = [(width, width), (keys, width), (keys, width), (width, width), (width,), (width,)]
    layer += [(hidden, width), (hidden, width), (width, hidden)]
    return [torch.Size(shape) for shape in [(128_256, width), *(layer * num_layers), (width,)]]


def rows(quick: bool) -> list[Row]:
    """A section for each size; nothing without a GPU."""
    if not torch.cuda.is_available():
        tell("no GPU here")
        return []
    sizes = {
        "1 B": llama(1 if quick else 12),
        "LoRA": lora(),
        "128 M": layered(1_280_000 if quick else 128_000_000),
        "1 M": layered(1_000_000),
    }
    budget_s = 0.2 if quick else 4.0
    found = [row for name, shapes in sizes.items() for row in _size(name, shapes, budget_s)]
    if importlib.util.find_spec("ray") is None:
        tell("no Ray here: services are left out")
        return found
    with ray_of_its_own():
        return found + _services(layered(1_280_000 if quick else 128_000_000), budget_s)


def _size(name: str, shapes: Sequence[torch.Size], budget_s: float) -> list[Row]:
    tell(f"GPU: {name}")
    section, found = f"GPU, {name}, in process", list[Row]()
    workload = Workload(shapes, device=torch.device("cuda"))
    for rule, other in FIELDS:
        result = _race(workload, rule, other, budget_s)
        torch.cuda.empty_cache()
        found += [] if found else result.machine(section)
        found.append(
            result.row(
                rule,
                other,
                scale=1e3,
                unit="ms",
                yardstick=COPY,
                section=section,
                key=f"gpu/{name}/{rule}",
                note=f"{workload.numel / 1e6:.0f} M parameters in {len(shapes)} tensors; bandwidth against the copy's",
            )
        )
    return found


def _race(workload: Workload, rule: str, other: str, budget_s: float) -> Race:
    """One of ours beside one of theirs; all that they have is free again afterwards."""
    build, num_bytes = THEIRS[other]
    params = workload.params(with_grads=False)
    optimizer, theirs = ours(rule, params, overlap=True), build(workload.params(with_grads=True))
    source = torch.ones(COPIED_BYTES // 4, device="cuda")
    target = torch.zeros_like(source)
    contestants = [
        Contestant(
            rule,
            optimizer.step,
            prepare=backward_of(workload, params),
            size_bytes=(STEP_BYTES[rule] + MODEL_COPY_BYTES) * workload.numel,
        ),
        Contestant(other, theirs.step, num_bytes * workload.numel),
    ]
    copy = Contestant(COPY, lambda: target.copy_(source), 2 * COPIED_BYTES)
    try:
        return race(contestants, yardsticks=[copy], budget_s=budget_s, num_warmups=5, clock=timed)
    finally:
        optimizer.close()


def _services(shapes: Sequence[torch.Size], budget_s: float) -> list[Row]:
    """The worker on the GPU, shards there too or on CPUs, beside one process."""
    tell("GPU: services")
    workload, alone = Workload(shapes, device=torch.device("cuda")), "Prodigy, in process"
    with contextlib.ExitStack() as stack:
        optimizers = {alone: ours("Prodigy", workload.params(with_grads=True))}
        for name, num_shards, num_gpus in (("a shard on the GPU", 1, 0.3), ("2 shards on CPUs", 2, 0.0)):
            # So that there is room for both, and for what Ray runs beside them.
            num_threads = 0 if num_gpus else max(1, cores() // 2 // num_shards)
            launched = service_of(num_shards, num_gpus_per_shard=num_gpus, num_threads=num_threads)
            service = stack.enter_context(launched)
            optimizers[f"Prodigy, {name}"] = ours("Prodigy", workload.params(with_grads=True), service=service)
        num_bytes = (STEP_BYTES["Prodigy"] + MODEL_COPY_BYTES) * workload.numel
        contestants = []
        for name, optimizer in optimizers.items():
            stack.callback(optimizer.close)
            contestants.append(Contestant(name, optimizer.step, num_bytes))
        result = race(contestants, budget_s=budget_s, num_warmups=3, clock=timed)
    section = f"GPU, {workload.numel / 1e6:.0f} M, services, the worker on the GPU"
    key = "gpu/service/"
    return [
        result.row(name, alone, scale=1e3, unit="ms", section=section, key=key + name)
        for name in optimizers
        if name != alone
    ]


def timed(step: Callable[[], object]) -> float:
    """Seconds that one call takes, until the GPU is done with it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(rows, __doc__)
