"""Training processes of a benchmark: started, timed together, and ended whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Row, cores
from torch.multiprocessing.spawn import spawn

untyped_spawn: Any = spawn
DIST_TIMEOUT = timedelta(seconds=120)
END_TIMEOUT_S = 10.0


def run_ranks(function: Callable[..., list[Row]], world_size: int, *args: Any, timeout_s: float) -> list[Row]:
    """Run ``function(rank, world_size, *args)`` in ``world_size`` processes of one gloo group; rank 0's rows.

    Raises:
        TimeoutError: If they have not all ended within ``timeout_s``. Then they are ended.
    """
    with tempfile.TemporaryDirectory(prefix="stepwell-bench-") as folder:
        context: Any = untyped_spawn(_run_rank, (world_size, folder, function, args), nprocs=world_size, join=False)
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=max(0.0, min(1.0, deadline - time.monotonic()))):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"expected {world_size} ranks to end within {timeout_s:g} s; they were ended")
        finally:
            for process in context.processes:
                process.terminate()
            for process in context.processes:
                process.join(END_TIMEOUT_S)
        return [Row.from_dict(row) for row in json.loads((Path(folder) / "rows.json").read_text())]


def timed_together(step: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until the last is done; the same number on every rank."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    taken_s = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(taken_s, op=dist.ReduceOp.MAX)
    return float(taken_s)


def _run_rank(rank: int, world_size: int, folder: str, function: Callable[..., list[Row]], args: Any) -> None:
    torch.set_num_threads(max(1, cores() // world_size))
    with _process_group(rank, world_size, folder):
        rows = function(rank, world_size, *args)
        if rank == 0:
            (Path(folder) / "rows.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
        dist.barrier()


@contextlib.contextmanager
def _process_group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=DIST_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
