"""Growth: a Prodigy step's time against the number of parameters, shards and workers, and the shards' memory.

Where not said otherwise there are two shards and one worker. Times per parameter stand beside those of torch's fused
AdamW, over 32 M parameters at most, in the turns right before. Memory is the shards' private memory, from /proc,
over the sum of the slots' bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import ray
import torch
from contestants import (
    ADAMW_BYTES,
    FUSED,
    MODEL_COPY_BYTES,
    STEP_BYTES,
    Workload,
    layered,
    ours,
    ray_of_its_own,
    service_of,
    yardsticks,
)
from harness import Contestant, Race, Row, Spread, cores, left_out, main, race, tell
from ranks import run_ranks, timed_together

import stepwell
from stepwell.server.cluster import address

MILLION = 1_000_000
YARDSTICK_NUMEL, QUICK_NUMEL = 32 * MILLION, 100_000
BYTES_PER_PARAM = STEP_BYTES["Prodigy"] + MODEL_COPY_BYTES
BYTES_PER_WORKER = 8
"""A gradient to be read and a copy of the parameters to be written, for every further worker."""
NEEDED_PER_PARAM = 56
"""Bytes of memory per parameter: gradient, parameters, buffers, slots, and what is on its way."""
STEPS_BEFORE_MEMORY = 3
ANSWER_TIMEOUT_S, RANKS_TIMEOUT_S = 60.0, 240.0
SHARDS, WORKERS = (1, 2, 4, 8), (1, 2, 4, 8)


def rows(quick: bool) -> list[Row]:
    """All four figures."""
    torch.set_num_threads(cores())
    budget_s = 0.3 if quick else 12.0
    unit = QUICK_NUMEL if quick else MILLION
    with ray_of_its_own():
        found = by_parameters([unit * factor for factor in (1, 4, 16, 64)], budget_s)
        found += by_parameters([unit * 256], budget_s)
        found += by_shards(8 * unit, SHARDS[:2] if quick else SHARDS, budget_s)
        found += by_workers(4 * unit, WORKERS[:2] if quick else WORKERS, budget_s)
        return found + memory(64 * unit)


def by_parameters(numels: list[int], budget_s: float) -> list[Row]:
    """The step over models of growing size, two shards."""
    names = {f"{numel / MILLION:g} M parameters": (numel, 2) for numel in numels}
    needed_bytes = NEEDED_PER_PARAM * sum(numels)
    if missing := left_out(", ".join(names), needed_bytes, section="growth with parameters"):
        return missing
    tell(f"growth: {', '.join(names)}")
    return _race_services(names, budget_s, axis="parameters", xs=[float(numel) for numel in numels])


def by_shards(numel: int, counts: tuple[int, ...], budget_s: float) -> list[Row]:
    """The step over one model with more and more shards."""
    tell(f"growth: {counts} shards")
    names = {f"{count} shard{'s'[: count > 1]}, {numel / MILLION:g} M": (numel, count) for count in counts}
    return _race_services(names, budget_s, axis="shards", xs=[float(count) for count in counts])


def _race_services(names: dict[str, tuple[int, int]], budget_s: float, *, axis: str, xs: list[float]) -> list[Row]:
    """Race services over ``(numel, num_shards)`` each."""
    with contextlib.ExitStack() as stack:
        contestants = []
        for name, (numel, num_shards) in names.items():
            service = stack.enter_context(service_of(num_shards))
            optimizer = ours("Prodigy", Workload(layered(numel)).params(with_grads=True), service=service)
            stack.callback(optimizer.close)
            contestants.append(Contestant(name, optimizer.step, BYTES_PER_PARAM * numel))
        reference = Workload(layered(min(YARDSTICK_NUMEL, max(numel for numel, _ in names.values()))))
        found = race(contestants, yardsticks=yardsticks(reference), budget_s=budget_s)
    return [
        _row(found, name, numel, reference.numel, axis=axis, x=x)
        for (name, (numel, _)), x in zip(names.items(), xs, strict=True)
    ]


def _row(found: Race, name: str, numel: int, reference: int, *, axis: str, x: float) -> Row:
    per_param = [
        ours_s / numel / (theirs_s / reference)
        for ours_s, theirs_s in zip(found.times[name], found.before[FUSED][name], strict=True)
    ]
    spread = Spread.of(per_param)
    return Row(
        name=name,
        ours=found.seconds(name) / numel * 1e9,
        theirs=found.seconds(FUSED) / reference * 1e9,
        ratio=spread.median,
        low=spread.low,
        high=spread.high,
        against=FUSED,
        bytes=found.size_bytes[name],
        gb_per_s=found.gb_per_s(name),
        bandwidth=found.bandwidth(name, FUSED),
        section=f"growth with {axis}",
        key=f"growth/{axis}/{name}",
        x=x,
        note=f"{FUSED}: over {reference / MILLION:g} M",
    )


def by_workers(numel: int, counts: tuple[int, ...], budget_s: float) -> list[Row]:
    """The step over one model with more and more workers, each with gradients of its own."""
    tell(f"growth: {counts} workers")
    with contextlib.ExitStack() as stack:
        names = [stack.enter_context(service_of(2)).name for _ in counts]
        return run_ranks(
            _race_workers, max(counts), counts, names, address(), numel, budget_s, timeout_s=RANKS_TIMEOUT_S
        )


def _race_workers(
    rank: int, world_size: int, counts: tuple[int, ...], names: list[str], where: str, numel: int, budget_s: float
) -> list[Row]:
    """Every rank races in every service that has so many; in the others' turns it waits."""
    torch.set_num_threads(1)
    workload, num_yardsticks = Workload(layered(numel), seed=rank), min(cores(), world_size)
    steps: dict[str, Callable[[], object]] = {}
    with contextlib.ExitStack() as stack:
        for count, name in zip(counts, names, strict=True):
            label = f"{count} worker{'s'[: count > 1]}, {numel / MILLION:g} M"
            if rank >= count:
                steps[label] = lambda: None
                continue
            service, params = stepwell.connect(name, address=where), workload.params(with_grads=True)
            optimizer = ours("Prodigy", params, service=service, rank=rank, world_size=count)
            stack.callback(optimizer.close)
            steps[label] = optimizer.step
        fused = torch.optim.AdamW(workload.params(with_grads=True), fused=True)
        # As many ranks as there are cores, each over parameters of its own.
        step = fused.step if rank < num_yardsticks else lambda: None
        yardstick = Contestant(FUSED, step, ADAMW_BYTES * numel * num_yardsticks)
        contestants = [
            Contestant(label, step, (BYTES_PER_PARAM + (count - 1) * BYTES_PER_WORKER) * numel)
            for (label, step), count in zip(steps.items(), counts, strict=True)
        ]
        found = race(contestants, yardsticks=[yardstick], budget_s=budget_s, clock=timed_together)
    return [
        _row(found, label, numel, numel * num_yardsticks, axis="workers", x=float(count))
        for label, count in zip(steps, counts, strict=True)
    ]


def memory(numel: int) -> list[Row]:
    """Memory of the shards' processes over the sum of their slots, for Prodigy and AdamW."""
    return [_memory(rule, numel) for rule in ("Prodigy", "AdamW")]


def _memory(rule: str, numel: int) -> Row:
    """What parameters take beyond an eighth of them, so that what a process has once (a compiler) does not count."""
    few, many = numel // 8, numel
    (taken_few, slots_few), (taken_many, slots_many) = (_taken(rule, count) for count in (few, many))
    taken, slots = taken_many - taken_few, slots_many - slots_few
    return Row(
        name=f"{rule}: private memory of 2 shards",
        ours=taken / (many - few),
        theirs=slots / (many - few),
        ratio=taken / slots,
        unit="bytes/param",
        bytes=taken,
        against="the sum of the slots",
        section=f"memory, {few / MILLION:g} M to {many / MILLION:g} M",
        key=f"memory/{rule}",
        note=f"and {(taken_few - taken / (many - few) * few) / 2**20:.0f} MiB whatever the number of parameters",
    )


def _taken(rule: str, numel: int) -> tuple[int, int]:
    """Bytes that two shards take for a job once some steps are done, and the bytes of their slots."""
    tell(f"memory: {rule}, {numel / MILLION:g} M")
    with service_of(2) as service:
        calls = [shard.__ray_call__.remote(lambda actor: os.getpid()) for shard in service.shards]
        pids: list[int] = ray.get(calls, timeout=ANSWER_TIMEOUT_S)
        before = sum(map(private_bytes, pids))
        optimizer = ours(rule, Workload(layered(numel)).params(with_grads=True), service=service)
        for _ in range(STEPS_BEFORE_MEMORY):
            optimizer.step()
        taken, slots = sum(map(private_bytes, pids)) - before, sum(service.status()["size_bytes"])
        optimizer.close()
    return taken, slots


def private_bytes(pid: int) -> int:
    """Memory that a process alone has: what it has mapped without a file behind it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


if __name__ == "__main__":
    main(rows, __doc__)
