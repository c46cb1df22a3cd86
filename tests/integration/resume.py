"""A process that resumes a training: ``python -m tests.integration.resume URI NUM_SHARDS START STOP OUT``."""

from __future__ import annotations

import sys

import torch

import stepwell
from tests.integration.training import D0, Trainer, small_in_order


def main(uri: str, num_shards: int, start: int, stop: int, out: str) -> None:
    """Train with an unnamed service that begins with a checkpoint; leave parameters and state in ``out``."""
    torch.set_num_threads(1)
    with stepwell.launch(num_shards=num_shards, num_cpus_per_shard=0, restore=uri) as service:
        worker = Trainer(small_in_order(), stepwell.Prodigy, d0=D0, shift=9.0, service=service)
        worker.step = start
        worker.run(stop)
        torch.save({"params": worker.values(), "state_dict": worker.optimizer.state_dict()}, out)
        worker.optimizer.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
