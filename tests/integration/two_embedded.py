"""A process with two unnamed services, one of them closed, that waits to be killed: ``... two_embedded``."""

from __future__ import annotations

import time

import ray
import torch

import stepwell
from tests.integration.training import D0, Oracle, Trainer, small_in_order


def main() -> None:
    """Say "ready" when both have trained and one has been closed."""
    torch.set_num_threads(1)
    workers = [Trainer(small_in_order(), stepwell.Prodigy, d0=D0, service="embedded") for _ in range(2)]
    for stop in (1, 2, 3):
        for worker in workers:
            worker.run(stop)
    Oracle().to(3).require_same(workers[0])
    workers[0].optimizer.close()
    Oracle().to(6).require_same(workers[1].run(6))
    assert ray.is_initialized()
    print("ready", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
