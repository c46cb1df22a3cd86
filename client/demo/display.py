"""The demo's progress on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from . import events
from .settings import DemoSettings, counted


class Display:
    """A context that shows events.

    Args:
        demo: the settings of the run.
        console: where to draw.
    """

    def __init__(self, demo: DemoSettings, console: Console) -> None:
        self._demo, self._console = demo, console
        self._last: events.Step | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._progress.add_task("starting", total=demo.steps)

    def __enter__(self) -> Self:
        """Begins to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the terminal as it was."""
        self._progress.stop()

    def show(self, event: events.Event) -> None:
        """Draws one event."""
        match event:
            case events.Phase(text=text):
                self._describe(f"{text} ...")
                if not self._console.is_terminal:
                    self._line(f"{text} ...")
            case events.Start(step=step, numel=numel, train_bytes=train_bytes):
                self._progress.update(self._task, completed=step)
                self._describe("first step: compiling ...")
                self._line(
                    f"{self._demo.rule}: {numel:,} parameters, {train_bytes:,} bytes of text, "
                    f"{counted(self._demo.num_workers, 'worker')}, {counted(self._demo.num_shards, 'shard')}"
                )
            case events.Step():
                self._last = event
                self._progress.update(self._task, completed=event.step)
                self._describe(describe_step(event))
            case events.HeldOut(step=step, loss=loss):
                last = "" if self._last is None else f"  {describe_step(self._last)}"
                self._line(f"step {step:>5}/{self._demo.steps}  held-out loss {loss:.3f}{last}")
            case events.Saved(uri=uri):
                self._line(f"saved {uri}")

    def _describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe_step(step: events.Step) -> str:
    """Loss, d and step time, in columns that do not move."""
    estimate = "" if step.d is None else f"  d {step.d:.2e}"
    return f"loss {step.loss:.3f}{estimate}  {1e3 * step.step_s:4.0f} ms"
