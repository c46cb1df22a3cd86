"""One training process of the demo: `python -m stepwell.client.demo.worker SETTINGS_AS_JSON`.

It is what a user's own training script looks like, with events for the parent around it: rank 0 writes them
to stdout, a line each. The process ends when its stdin does, so that none outlives its parent.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from ...sharding.errors import StepwellError
from ..optimizers import LAMB, AdamW, Prodigy
from . import events
from .model import GPT, GPTSettings, generate, params_digest
from .settings import DemoError, DemoSettings, WorkerSettings, counted
from .text import held_out_batches, read_corpus, train_batch

STOP_GRACE_S = 20.0
PROMPT = b"def "
SAMPLE_BYTES = 400
HELD_OUT_BATCHES = 4

Optimizer = Prodigy | AdamW | LAMB
Emit = Callable[[events.Event], None]


class Training:
    """The run of one rank: made on all ranks, which call the same methods in the same order."""

    def __init__(self, settings: WorkerSettings, emit: Emit) -> None:
        self.settings, self.demo, self.rank = settings, settings.demo, settings.rank
        self.emit = emit
        emit(events.Phase("reading the standard library"))
        self.corpus = read_corpus()
        self.model = GPT(GPTSettings(context_numel=self.demo.context_numel), seed=self.demo.seed)
        emit(events.Phase(f"starting Ray and {counted(self.demo.num_shards, 'shard')}, compiling kernels"))
        self.optimizer = make_optimizer(self.demo, self.model)
        self.step = 0

    def run(self) -> None:
        """Trains to the last step."""
        if self.demo.resume is not None:
            self._resume(self.demo.resume)
        scheduler = self._scheduler()
        numel = sum(parameter.numel() for parameter in self.model.parameters())
        self.emit(events.Start(step=self.step, numel=numel, train_bytes=self.corpus.train.numel()))
        self._look_at_held_out()
        while self.step < self.demo.steps:
            self._train_step(scheduler)
            if self.step == self.demo.save_step:
                self._save()
            if self.step % self.demo.held_out_every == 0 or self.step == self.demo.steps:
                self._look_at_held_out()
        if self.rank == 0:
            self.emit(events.Phase("writing some Python"))
            sample = generate(self.model, PROMPT, num_bytes=SAMPLE_BYTES, seed=self.demo.seed)
            digest = params_digest(self.model)
            self.emit(events.Done(step=self.step, params_digest=digest, sample=printable(sample)))

    def _train_step(self, scheduler: LambdaLR) -> None:
        began = time.perf_counter()
        inputs, targets = train_batch(
            self.corpus,
            seed=self.demo.seed,
            step=self.step,
            batch_size=self.demo.batch_size,
            context_numel=self.demo.context_numel,
            rank=self.rank,
            world_size=self.demo.num_workers,
        )
        loss = self.model.loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        # Only the number shown is averaged here; the gradients are averaged by the service.
        mean_loss = loss.detach().double()
        dist.all_reduce(mean_loss)
        self.emit(
            events.Step(
                step=self.step,
                loss=mean_loss.item() / self.demo.num_workers,
                d=self._estimate(),
                lr=lr,
                step_s=time.perf_counter() - began,
            )
        )

    def _estimate(self) -> float | None:
        d = self.optimizer.param_groups[0].get("d")
        return None if d is None else float(d)

    def _scheduler(self) -> LambdaLR:
        for group in self.optimizer.param_groups:
            group["initial_lr"] = self.demo.learning_rate
        return LambdaLR(self.optimizer, self.demo.lr_factor, last_epoch=self.step - 1)

    def _resume(self, uri: str) -> None:
        self.emit(events.Phase(f"restoring {uri}"))
        applied = torch.zeros(1, dtype=torch.int64)
        if self.rank == 0:
            applied[0] = self.optimizer.service.restore(uri)
        dist.broadcast(applied, src=0)
        self.step = int(applied.item())
        if self.step >= self.demo.steps:
            raise DemoError(
                f"{uri} is at step {self.step}, and --steps {self.demo.steps} asks for no more: "
                f"try --steps {2 * self.step}"
            )
        self.optimizer.refresh()

    def _save(self) -> None:
        if self.rank == 0:
            self.optimizer.service.save(self.settings.checkpoint)
            self.emit(events.Saved(step=self.step, uri=self.settings.checkpoint))
        dist.barrier()

    @torch.no_grad()
    def _look_at_held_out(self) -> None:
        if self.rank == 0:
            batches = held_out_batches(
                self.corpus,
                batch_size=self.demo.batch_size,
                context_numel=self.demo.context_numel,
                num_batches=HELD_OUT_BATCHES,
            )
            losses = [self.model.loss(inputs, targets).item() for inputs, targets in batches]
            self.emit(events.HeldOut(step=self.step, loss=sum(losses) / len(losses)))
        dist.barrier()


def make_optimizer(demo: DemoSettings, model: GPT) -> Optimizer:
    """Starts the embedded service on rank 0 and joins it on every rank."""
    params, lr, num_shards = list(model.parameters()), demo.learning_rate, demo.num_shards
    match demo.rule:
        case "prodigy":
            # In so short a run the first steps count: without bias correction they are three times as long, and the
            # held-out loss ends at 2.39 instead of 1.73 (800 steps of this model and batch with prodigyopt).
            return Prodigy(params, lr=lr, use_bias_correction=True, service="embedded", num_shards=num_shards)
        case "adamw":
            return AdamW(params, lr=lr, service="embedded", num_shards=num_shards)
        case _:
            return LAMB(params, lr=lr, service="embedded", num_shards=num_shards)


def printable(text: bytes) -> str:
    """Text for a terminal: what is no character, or would control the terminal, becomes the replacement character."""
    decoded = text.decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in decoded)


def train(settings: WorkerSettings, emit: Emit) -> None:
    """One rank's whole run, its process group and its optimizer included.

    Args:
        settings: what to do.
        emit: takes what there is to tell.

    Raises:
        StepwellError: the service refused or was lost; already told.
        DemoError: the demo cannot go on; already told.
    """
    if settings.demo.num_workers > 1:
        torch.set_num_threads(1)
    with _process_group(settings), contextlib.ExitStack() as stack, _failure_told(emit):
        training = Training(settings, emit)
        stack.callback(training.optimizer.close)
        training.run()
        emit(events.Phase("stopping the service"))


@contextlib.contextmanager
def _process_group(settings: WorkerSettings) -> Iterator[None]:
    num_workers = settings.demo.num_workers
    dist.init_process_group(
        "gloo",
        init_method=Path(settings.rendezvous).as_uri(),
        rank=settings.rank,
        world_size=num_workers,
        timeout=datetime.timedelta(minutes=5),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _failure_told(emit: Emit) -> Iterator[None]:
    # Around the work alone: the clean-up that follows can take seconds.
    try:
        yield
    except (StepwellError, DemoError) as error:
        emit(events.Failed(" ".join(str(error).split())))
        raise


def main() -> int:
    """The process: its exit code is 0, or 1 after a `failed` event or a traceback."""
    _end_with_parent()
    stream = _claim_stdout()
    settings = WorkerSettings.from_json(sys.argv[1])

    def emit(event: events.Event) -> None:
        if settings.rank == 0 or isinstance(event, events.Failed):
            stream.write(events.encode(event) + "\n")
            stream.flush()

    try:
        train(settings, emit)
    except (StepwellError, DemoError):
        traceback.print_exc()  # for the log; the person was told
        return 1
    return 0


def _claim_stdout() -> TextIO:
    """Keeps stdout for events alone: whatever else writes there from now on goes to the log."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _end_with_parent() -> None:
    """Ends this process when its stdin ends, which it does when the parent wants it or dies."""

    def stop(_signum: int, _frame: object) -> None:
        raise SystemExit(1)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(STOP_GRACE_S)
        os._exit(1)

    # Ctrl-C reaches every process of the terminal; the parent alone decides what it means. SIGTERM is Ray's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, stop)
    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
