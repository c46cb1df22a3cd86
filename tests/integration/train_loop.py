"""What a worker of Ray Train runs in these tests: it trains, has the faults that it is told to have, and looks."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import ray.train

import stepwell
from stepwell.client import ray_train
from stepwell.server.service import end
from tests.integration.training import D0, ByHand, Trainer, small_in_order

SAVE_EVERY = 3
LIMIT_S = 600.0

Fault = Literal["worker", "service", "wait"]
"""A worker is killed; the whole service is ended first; all wait to be killed."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the loop is told.

    Attributes:
        service: The service's name.
        folder: Where the run notes what it did.
        world_sizes: With how many workers each step is to be taken, in the end.
        faults: What happens after how many steps, once.
        roll_back: See :func:`stepwell.client.ray_train.resume`.
        redundancy: Of a service that is launched.
    """

    service: str
    folder: str
    world_sizes: Sequence[int]
    faults: dict[int, Fault]
    roll_back: bool
    redundancy: int

    def notes(self) -> list[str]:
        """What the run did."""
        return Path(self.folder, "notes").read_text().splitlines()

    def note(self, line: str) -> None:
        with Path(self.folder, "notes").open("a") as notes:
            notes.write(f"{line}\n")

    def marker(self, step: int) -> Path:
        """Is there when the fault after ``step`` has come."""
        return Path(self.folder, f"fault-{step}")


def train(config: dict[str, Plan]) -> None:
    """One worker. Each attempt notes with how many workers it began, and where."""
    plan, context = config["plan"], ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    checkpoint = ray.train.get_checkpoint()
    service = ray_train.resume(
        plan.service,
        checkpoint,
        roll_back=plan.roll_back,
        num_shards=2,
        num_cpus_per_shard=0.5,
        redundancy=plan.redundancy,
        kernel="eager",
    )
    ranks = {"rank": rank, "world_size": world_size}
    worker = Trainer(small_in_order(), stepwell.Prodigy, shift=float(rank), service=service, d0=D0, **ranks)
    worker.step = worker.optimizer.num_steps
    if plan.roll_back:
        assert worker.step == (0 if checkpoint is None else checkpoint.get_metadata()["step"])
    if rank == 0:
        plan.note(f"{world_size} at {worker.step}")
    while worker.step < len(plan.world_sizes):
        suffer(plan, worker)
        worker.run(worker.step + 1)
        if worker.step % SAVE_EVERY == 0:
            report(plan, worker)
    oracle = ByHand()
    for size in plan.world_sizes:
        oracle.average([(each, size) for each in range(size)])
    oracle.require_same(worker)
    ray.train.collective.barrier()
    if rank == 0:
        plan.note("same")
    worker.optimizer.close()


def report(plan: Plan, worker: Trainer) -> None:
    """Report; where the loop has a state of its own, rank 0 with that."""
    with tempfile.TemporaryDirectory() as folder:
        own = ray.train.Checkpoint.from_directory(folder)
        own.set_metadata({"step": worker.step})
        is_kept = plan.roll_back and worker.rank == 0
        ray_train.report(worker.optimizer, {"step": worker.step}, own if is_kept else None)


def suffer(plan: Plan, worker: Trainer) -> None:
    """The fault that is to come now, if any. The last rank is killed, so that others wait for it in their step."""
    fault, marker = plan.faults.get(worker.step), plan.marker(worker.step)
    if fault is None or marker.exists():
        return
    ray.train.get_all_reported_checkpoints()  # else Train may not have heard of the last one, and goes further back
    if fault == "wait":
        ray.train.collective.barrier()
        marker.touch()
        threading.Event().wait(LIMIT_S)
    elif worker.rank == worker.world_size - 1:
        marker.touch()
        if fault == "service":
            end(plan.service)
        os.kill(os.getpid(), signal.SIGKILL)
