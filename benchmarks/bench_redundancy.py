"""What it costs that a lost shard loses nothing: a Prodigy step, and the memory, with redundancy and without.

A turn is as many steps as two copies of the state are apart, so that each has a whole copy in it. Memory is what the
shards and the worker have in all, private and shared, beyond what they have before the job.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import ray
import torch
from contestants import Workload, layered, ours, ray_of_its_own, service_of
from harness import Contestant, Row, cores, left_out, main, race, tell

import stepwell

MILLION = 1_000_000
WITHOUT, WITH = "Prodigy, 2 shards", "Prodigy, 2 shards, redundancy=1"
STEPS_PER_TURN = 8
STEPS_BEFORE_MEMORY = 20
NEEDED_PER_PARAM = 200
"""Bytes of memory per parameter that both of them take together."""
ANSWER_TIMEOUT_S = 60.0


def rows(quick: bool) -> list[Row]:
    """Time for three sizes, memory for one."""
    torch.set_num_threads(cores())
    unit, budget_s = (100_000, 0.5) if quick else (MILLION, 10.0)
    with ray_of_its_own():
        return [*(row for factor in (1, 8, 32) for row in _time(factor * unit, budget_s)), *_memory(16 * unit)]


def _time(numel: int, budget_s: float) -> list[Row]:
    section = "redundancy"
    if missing := left_out(f"{numel / MILLION:g} M", NEEDED_PER_PARAM * numel, section=section):
        return missing
    tell(f"redundancy: {numel / MILLION:g} M")
    workload = Workload(layered(numel))
    with contextlib.ExitStack() as stack:
        contestants = []
        for name, redundancy in ((WITHOUT, 0), (WITH, 1)):
            service = stack.enter_context(service_of(2, redundancy=redundancy))
            optimizer = ours("Prodigy", workload.params(with_grads=True), service=service)
            stack.callback(optimizer.close)
            contestants.append(Contestant(name, functools.partial(_turn, optimizer)))
        found = race(contestants, budget_s=budget_s)
    scale = 1e9 / numel / STEPS_PER_TURN
    label, key = f"{WITH}, {numel / MILLION:g} M", f"redundancy/{numel // MILLION} M"
    return [found.row(WITH, WITHOUT, scale=scale, label=label, section=section, key=key)]


def _turn(optimizer: stepwell.ServiceOptimizer) -> None:
    for _ in range(STEPS_PER_TURN):
        optimizer.step()


def _memory(numel: int) -> list[Row]:
    taken = {redundancy: _taken(numel, redundancy) / numel for redundancy in (0, 1)}
    return [
        Row(
            name=f"memory of worker and shards, redundancy=1, {numel / MILLION:g} M",
            ours=taken[1],
            theirs=taken[0],
            ratio=taken[1] / taken[0],
            unit="bytes/param",
            against="redundancy=0",
            section="redundancy",
            key="redundancy/memory",
        )
    ]


def _taken(numel: int, redundancy: int) -> int:
    """Bytes that a job takes in the end, in the shards and in this process."""
    tell(f"redundancy: memory, redundancy={redundancy}")
    with service_of(2, redundancy=redundancy) as service:
        calls = [shard.__ray_call__.remote(lambda actor: os.getpid()) for shard in service.shards]
        pids: list[int] = [os.getpid(), *ray.get(calls, timeout=ANSWER_TIMEOUT_S)]
        params = Workload(layered(numel)).params(with_grads=True)
        before = sum(map(_size_bytes, pids))
        optimizer = ours("Prodigy", params, service=service)
        for _ in range(STEPS_BEFORE_MEMORY):
            optimizer.step()
        taken = sum(map(_size_bytes, pids)) - before
        optimizer.close()
    return taken


def _size_bytes(pid: int) -> int:
    """A process's memory without a file behind it; what several have mapped counts once in all."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


if __name__ == "__main__":
    main(rows, __doc__)
