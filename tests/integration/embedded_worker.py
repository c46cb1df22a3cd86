"""A training process of several: ``python -m tests.integration.embedded_worker RANK WORLD_SIZE FOLDER``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import stepwell
from tests.integration.training import LIMIT_S, Trainer, small_in_order


def main(rank: int, world_size: int, folder: Path) -> None:
    """Train with a service that nothing names; leave the results in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    worker = Trainer(small_in_order(), stepwell.Prodigy, shift=float(rank), d0=0.1)
    worker.rank, worker.world_size = rank, world_size
    began_with = worker.values()
    worker.run(30)
    if rank != 0:
        wait_for_file(folder / "0.pt")  # rank 0 is about to end; it has to keep the service for this rank
    results = {
        "began_with": began_with,
        "params": worker.values(),
        "state": worker.optimizer.state_dict()["state"],
        "status": worker.optimizer.service.status(),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def wait_for_file(path: Path) -> None:
    """Wait until another process has written a file."""
    deadline = time.monotonic() + LIMIT_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
