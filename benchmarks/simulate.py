"""How the cost of running a service grows with its shards and workers, without any tensor.

The real coordinator, layout, coverage, messages and inbox; shards that answer without doing anything. Seconds are a
processor's, for all of it together in one process; what Ray takes for a call, some 0.1 ms of the caller's, is not in.
``python -m benchmarks.simulate`` writes the table.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from simulated import SimulatedService

from stepwell.client.planning.deployment import model_of
from stepwell.optim import RULES
from stepwell.server.messages import (
    Exchange,
    LoadHeader,
    Target,
    pack_exchange,
    pack_holdings,
    pack_job,
    pack_push,
    unpack_exchange,
    unpack_push,
)
from stepwell.server.shards import STATE_TIMEOUT_S
from stepwell.sharding.buffers import StateSource
from stepwell.sharding.coverage import Gradients, Holdings, Range
from stepwell.sharding.job import JobSpec
from stepwell.sharding.push import Push, PushHeader, pack_present
from stepwell.sharding.reports import Receipt
from stepwell.sharding.shard import Shard
from stepwell.sharding.tables import Tables

NUMEL = 7_000_000_000
GRID = ((16, 16), (64, 64), (64, 256), (256, 256), (256, 1024), (1024, 1024), (1024, 4096))
METHOD = """Written by `python -m benchmarks.simulate`: the real coordinator, layout, coverage, messages and inbox, and
shards that answer without doing anything. Seconds are a processor's, for all shards and workers together in one
process; where it says "each", for one of them. Calls are the coordinator's to shards, in a step the workers'. What Ray
takes for a call, some 0.1 ms of the caller's, is not in the seconds."""
OUT = Path(__file__).parent / "results" / "SIMULATED.md"


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What one thing took.

    Attributes:
        what: The thing.
        seconds: A processor's.
        calls: From the coordinator to shards, or from workers to shards.
        note: Sizes of messages.
    """

    what: str
    seconds: float
    calls: int
    note: str = ""


def job_of(num_workers: int, gradients: Gradients, numel: int = NUMEL) -> JobSpec:
    """A decoder's job."""
    return JobSpec(RULES.build("Prodigy", {}), model_of(numel, "bfloat16"), 1, num_workers, gradients=gradients)


def holdings_of(spec: JobSpec, rank: int) -> Holdings | None:
    """An equal part of every tensor, as FSDP gives out; None unless the model is sharded."""
    if spec.gradients != "sharded":
        return None
    edges = ([param.numel * at // spec.world_size for at in (rank, rank + 1)] for param in spec.params)
    ranges = tuple(Range(start, stop - start) for start, stop in edges)
    return Holdings(ranges, ranges)


def simulate(num_shards: int, num_workers: int, gradients: Gradients, numel: int = NUMEL) -> list[Cost]:
    """A service's life: it starts, workers register, all refresh, it saves, its group is formed anew, they leave."""
    spec = job_of(num_workers, gradients, numel)
    return [*_layout(spec), *asyncio.run(_lives(spec, num_shards)), *_step(spec, num_shards)]


def _layout(spec: JobSpec) -> list[Cost]:
    begin = time.process_time()
    Tables.build(spec, spec.layout())
    return [Cost("layout and tables, each process", time.process_time() - begin, 0)]


async def _lives(spec: JobSpec, num_shards: int) -> list[Cost]:
    service, job = SimulatedService(num_shards), pack_job(spec)
    coordinator, ranks = service.coordinator, range(spec.world_size)
    holdings = [pack_holdings(holdings_of(spec, rank)) for rank in ranks]
    found: list[Cost] = []

    async def measured(what: str, work: Coroutine[Any, Any, object], note: str = "") -> None:
        before, begin = service.traffic.num_calls, time.process_time()
        await work
        found.append(Cost(what, time.process_time() - begin, service.traffic.num_calls - before, note))

    async def join(rank: int) -> None:
        """What a worker does until it has the first parameters."""
        told = await coordinator.register(job, rank, f"process-{rank}", holdings[rank])
        if told.needs_parameters and spec.gradients == "sharded":
            await coordinator.hand_in(rank, [])
        elif told.needs_parameters and rank == 0:
            await coordinator.load([], LoadHeader(), "load")
        elif told.needs_parameters:
            await coordinator.wait_for_timeline(told.timeline, STATE_TIMEOUT_S)

    async def save(uri: str) -> None:
        await coordinator.begin_save("save", uri)
        await coordinator.end_save("save", uri)

    await measured("start", coordinator.start())
    note = f"job {len(job):,} bytes, holdings {len(holdings[-1]):,} bytes a worker"
    await measured("registration of all", _all(join(rank) for rank in ranks), note)
    await measured("refresh of all", _all(coordinator.refresh(rank, f"process-{rank}") for rank in ranks))
    with tempfile.TemporaryDirectory() as folder:
        await measured("save", save(folder))
        size_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        found[-1] = dataclasses.replace(found[-1], note=f"manifest {size_bytes:,} bytes")
    await measured("forming a group", coordinator._shards.form_group())
    await measured("goodbye of all", _all(coordinator.leave(rank, f"process-{rank}") for rank in ranks))
    return found


async def _all(work: Iterable[Coroutine[Any, Any, object]]) -> None:
    await asyncio.gather(*work)


def _step(spec: JobSpec, num_shards: int) -> list[Cost]:
    """One shard admits everybody and takes everybody's push: what each shard does, beside the others."""
    shard = Shard(spec, shard=num_shards // 2, num_shards=num_shards, device=torch.device("meta"))
    shard.load(StateSource(lambda *_: None, frozenset()), timeline=1)
    holdings = [holdings_of(spec, rank) for rank in range(spec.world_size)]
    begin = time.process_time()
    for rank, its_holdings in enumerate(holdings):
        shard.admit(rank, f"process-{rank}", its_holdings)
    admitted_s = time.process_time() - begin
    requests = [_request(spec, rank) for rank in range(spec.world_size)]
    nothing, receipt = torch.zeros(1, dtype=torch.bfloat16), Receipt.WAITING
    lengths = [
        [int((runs[:, 1] - runs[:, 0]).sum()) for runs in shard.members[rank].pushed] for rank in range(spec.world_size)
    ]
    begin = time.process_time()
    for its_lengths, request in zip(lengths, requests, strict=True):
        header = unpack_push(unpack_exchange(request).push)
        shard.require_sender(header)
        receipt = shard.receive(Push(header, tuple(nothing.expand(numel) for numel in its_lengths)))
    taken_s = time.process_time() - begin
    assert receipt is Receipt.COMPLETE
    tables = Tables.build(spec, shard.layout)
    vectors = (5 * num_shards + tables.squares.num_segments) * 8, 2 * tables.sums.num_segments * 8
    note = f"{len(requests[-1]):,} bytes a call, all-reduces of {vectors[0]:,} and {vectors[1]:,} bytes"
    return [
        Cost("admission of all, each shard", admitted_s, 0),
        Cost("a step's pushes, each shard", taken_s, spec.world_size * num_shards, note),
    ]


def _request(spec: JobSpec, rank: int) -> bytes:
    """What a worker sends to each shard, but for the gradient."""
    hyper = {name: [value] for name, value in spec.rule.hyper(spec.rule.defaults()).items()} if rank == 0 else None
    present = pack_present([True] * len(spec.params))
    header = PushHeader(1, 1, rank, f"process-{rank}", 0, present, hyper=hyper, max_abs=1.0)
    target = Target("held" if spec.gradients == "sharded" else "pushed", ("bfloat16",))
    return pack_exchange(Exchange(pack_push(header), None, target, 60.0))


def table(costs: dict[tuple[int, int, str], list[Cost]]) -> str:
    """The page: a table for each thing, a line for each size."""
    lines = ["# A service without tensors", "", f"Prodigy, {NUMEL / 1e9:g} B parameters in bfloat16. {METHOD}", ""]
    names = [cost.what for cost in next(iter(costs.values()))]
    for number, name in enumerate(names):
        lines += [f"## {name[0].upper()}{name[1:]}", "", "| shards | workers | gradients | seconds | calls | |"]
        lines.append("|---:|---:|---|---:|---:|---|")
        for (num_shards, num_workers, gradients), found in costs.items():
            cost, size = found[number], f"{num_shards:,} | {num_workers:,} | {gradients}"
            lines.append(f"| {size} | {cost.seconds:.3f} | {cost.calls:,} | {cost.note} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-shards", type=int, default=1024)
    parser.add_argument("--max-workers", type=int, default=4096)
    parser.add_argument("--gradients", nargs="*", default=["replicated", "sharded"])
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    costs = {}
    for gradients in given.gradients:
        for num_shards, num_workers in GRID:
            if num_shards <= given.max_shards and num_workers <= given.max_workers:
                begin = time.process_time()
                costs[num_shards, num_workers, gradients] = simulate(num_shards, num_workers, gradients)
                taken_s = time.process_time() - begin
                print(f"  {num_shards} shards, {num_workers} workers, {gradients}: {taken_s:.0f} s", file=sys.stderr)
    given.out.write_text(table(costs))
    print(table(costs))


if __name__ == "__main__":
    main()
