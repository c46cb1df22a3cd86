"""One optimizer step: Stepwell beside what a user would pick instead, in interleaved rounds of one run.

Prints the median time per parameter, and the median over rounds of the ratio to the reference of the same rule. The
bandwidth column is the bytes that the step must move, each once, over the time: for Prodigy p, g, p0, m, v and s are
read and p, m, v and s written, 40 bytes a parameter; for AdamW p, g, m and v are read, p, m and v written, 28 bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import prodigyopt
import torch

import stepwell

SHAPES = [(1024, 1024), (1024,), (4096, 1024), (4096,), (1024, 4096), (1024,)]
BYTES_PER_PARAM = {"Prodigy": 40, "AdamW": 28}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="copies of a transformer-like block of 9.4 M parameters")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ray", action="store_true", help="also two shards as Ray actors")
    args = parser.parse_args()
    contestants = _contestants(args.layers, args.ray)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(args.rounds + 1):
        for name, step in contestants.items():
            begin = time.perf_counter()
            step()
            if index:
                times[name].append(time.perf_counter() - begin)
    _report(times, numel=args.layers * sum(torch.Size(shape).numel() for shape in SHAPES))


def _contestants(layers: int, with_ray: bool) -> dict[str, Callable[[], object]]:
    optimizers: dict[str, torch.optim.Optimizer] = {
        "Prodigy: prodigyopt": prodigyopt.Prodigy(_params(layers)),
        "Prodigy: stepwell in process": stepwell.Prodigy(_params(layers)),
        "AdamW: torch, fused": torch.optim.AdamW(_params(layers), fused=True),
        "AdamW: torch, foreach": torch.optim.AdamW(_params(layers), foreach=True),
        "AdamW: stepwell in process": stepwell.AdamW(_params(layers)),
    }
    if with_ray:
        service = stepwell.launch(num_shards=2)
        optimizers["Prodigy: stepwell, 2 Ray shards"] = stepwell.Prodigy(_params(layers), service=service)
    return {name: optimizer.step for name, optimizer in optimizers.items()}


def _params(layers: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in SHAPES * layers]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-2
    return params


def _report(times: dict[str, list[float]], numel: int) -> None:
    references = {"Prodigy": "Prodigy: prodigyopt", "AdamW": "AdamW: torch, fused"}
    print(f"{numel / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':34s}{'ns/param':>10s}{'GB/s':>8s}{'x reference':>13s}")
    for name, values in times.items():
        rule = name.partition(":")[0]
        ratio = statistics.median(v / r for v, r in zip(values, times[references[rule]], strict=True))
        per_param = statistics.median(values) / numel * 1e9
        print(f"{name:34s}{per_param:10.2f}{BYTES_PER_PARAM[rule] / per_param:8.1f}{ratio:13.2f}")


if __name__ == "__main__":
    main()
