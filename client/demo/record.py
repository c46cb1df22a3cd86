"""What happened in a run: kept as a file of events, and summed up at the end."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import TextIO

from . import events
from .settings import DemoSettings, Json


@dataclasses.dataclass(slots=True)
class Record:
    """Takes the events of one run in their order.

    Attributes:
        stream: where each event is written as a line.
        began: when the run began, on the monotonic clock.
    """

    stream: TextIO
    began: float = dataclasses.field(default_factory=time.monotonic)
    start: events.Start | None = None
    steps: list[events.Step] = dataclasses.field(default_factory=list)
    held_out: list[events.HeldOut] = dataclasses.field(default_factory=list)
    saved: events.Saved | None = None
    done: events.Done | None = None

    def add(self, event: events.Event) -> None:
        """Writes and keeps one event."""
        self.stream.write(events.encode(event) + "\n")
        self.stream.flush()
        match event:
            case events.Start():
                self.start = event
            case events.Step():
                self.steps.append(event)
            case events.HeldOut():
                self.held_out.append(event)
            case events.Saved():
                self.saved = event
            case events.Done():
                self.done = event

    def summary(self, demo: DemoSettings, *, picture: Path) -> dict[str, Json]:
        """The whole run in one JSON object; only for a run that is done."""
        assert self.start is not None
        assert self.done is not None
        first, last = self.held_out[0], self.held_out[-1]
        return {
            "rule": demo.rule,
            "steps": self.done.step,
            "first_step": self.start.step,
            "num_shards": demo.num_shards,
            "num_workers": demo.num_workers,
            "numel": self.start.numel,
            "held_out_loss_before": first.loss,
            "held_out_loss_after": last.loss,
            "train_loss_last": self.steps[-1].loss,
            "d": self.steps[-1].d,
            "step_ms_median": 1e3 * statistics.median(step.step_s for step in self.steps),
            "seconds": time.monotonic() - self.began,
            "resumed_from": demo.resume,
            "checkpoint": None if self.saved is None else self.saved.uri,
            "picture": str(picture),
            "events": str(Path(demo.out, "events.jsonl")),
            "params_digest": self.done.params_digest,
            "sample": self.done.sample,
        }
